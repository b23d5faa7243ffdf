"""CLIP's byte-pair tokenizer, from the vocabulary in the package: no network, no tokenizer files beside the model.

Text is NFC-normalised, lower-cased and split as CLIP does it (Radford et al. 2021, "Learning Transferable Visual Models
From Natural Language Supervision", section 2.4); ids are those of transformers' CLIPTokenizer.
"""

from __future__ import annotations

import gzip
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from aquatint.storage import write_json, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS = 49406, 49407
PAD, PAD_2 = EOS, 0  # CLIP-L is padded with its end token, bigG with "!"
CHUNK_TOKENS = 75  # what is left of the 77 positions after BOS and EOS
COMMA_REACH = 20  # a chunk ends early, after a comma, if that is at most this many tokens back; the same as in A1111 and Forge
_COMMA = 267
_NUM_MERGES = 49152 - 256 - 2  # the file lists more than CLIP was trained with
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenize(text: str) -> list[int]:
    """The ids of a text of any length, without BOS and EOS."""
    ids: list[int] = _tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def chunk(text: str) -> list[list[int]]:
    """A text's ids in chunks of at most 75, broken where image generation programs break them. "" is one empty chunk."""
    chunks: list[list[int]] = [[]]
    for token in tokenize(text):
        if len(chunks[-1]) == CHUNK_TOKENS:
            chunks.append([])
            if token != _COMMA:
                _move_tail(chunks)
        chunks[-1].append(token)
    return chunks


def padded(ids: list[int], pad: int) -> list[int]:
    """One chunk as the 77 ids that an encoder reads: BOS, the text, EOS, and `pad` up to the end."""
    return [BOS, *ids, EOS, *[pad] * (CHUNK_TOKENS - len(ids))]


def write_tokenizer_folder(folder: Path, pad: int) -> None:
    """The tokenizer as files that transformers reads; `pad` is PAD or PAD_2."""
    vocabulary, merges = _vocabulary()
    names = {token: name for name, token in vocabulary.items()}
    special = {"bos_token": _START, "eos_token": _END, "pad_token": names[pad], "unk_token": _END}
    write_json(folder / "vocab.json", vocabulary)
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})


def _move_tail(chunks: list[list[int]]) -> None:
    """Moves what follows the last comma of a full chunk to the next one, if that is near enough."""
    full = chunks[-2]
    tail = full[::-1].index(_COMMA) if _COMMA in full else CHUNK_TOKENS
    if 0 < tail < COMMA_REACH:
        chunks[-1].extend(full[-tail:])
        del full[-tail:]


@cache
def _tokenizer() -> Tokenizer:
    """Built from the same parts as transformers' own, which costs six seconds less to import."""
    from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    vocabulary, merges = _vocabulary()
    tokenizer = Tokenizer(BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=_END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (_START, _END)])
    return tokenizer


@cache
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id, and the merges in order: bytes, bytes that end a word, merges, the two special tokens."""
    packed = (files("aquatint.models.sdxl") / "assets" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")[1 : 1 + _NUM_MERGES]  # the first line is a comment
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    symbols = _byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(left + right for left, right in merges), _START, _END]
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_symbols() -> list[str]:
    """A printable character for each byte, in the vocabulary's order: those that print first, then the rest, from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
