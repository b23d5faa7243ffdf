"""CLIP's byte-pair tokenizer, from the vocabulary in the package: no network, no tokenizer files beside the model.

Text is NFC-normalised, lower-cased and split as CLIP does it (Radford et al. 2021, "Learning Transferable Visual Models
From Natural Language Supervision", section 2.4); ids are those of transformers' CLIPTokenizer.

Chunks are those of A1111, Forge and reForge: 75 tokens each, as many as it takes, and the word BREAK in capitals starts a
new one. Other marks of their prompt language, such as `(word:1.2)`, `[word]` and `\\(`, are not interpreted: they are text.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aquatint.storage import write_json, write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS = 49406, 49407
PAD, PAD_2 = EOS, 0  # CLIP-L is padded with its end token, bigG with "!"
CHUNK_TOKENS = 75  # what is left of the 77 positions after BOS and EOS
COMMA_REACH = 20  # a chunk ends early, after a comma, if that is at most this many tokens back; the same as in A1111 and Forge
_COMMA = 267
_BREAK = re.compile(r"\bBREAK\b")
_MAX_WORDS, _MAX_WORD_LETTERS = 1 << 18, 40  # what is remembered when many texts are tokenized, some 60 MB
_PRINTING = (*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1))
_NUM_MERGES = 49152 - 256 - 2  # the file lists more than CLIP was trained with
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def tokenize(text: str) -> list[int]:
    """The ids of a text of any length, without BOS and EOS."""
    ids: list[int] = _tokenizer().encode(text, add_special_tokens=False).ids
    return ids


def chunk(text: str) -> list[list[int]]:
    """A text's ids in chunks of at most 75, broken where image generation programs break them. "" is one empty chunk.

    A chunk ends at BREAK, which is removed with the blanks around it (commas stay); else after the last comma, if fewer
    than 20 tokens follow it; else after 75 tokens. As in those programs, an empty chunk stands between BREAK and BREAK.
    """
    return list(chain.from_iterable(_chunks_of_parts(text, tokenize)))


class ChunkReport(NamedTuple):
    """How a text is read: its tokens (BREAK is none), its chunks, and whether one of these ends between two commas."""

    num_tokens: int
    num_chunks: int
    splits_tag: bool


def chunk_report(text: str) -> ChunkReport:
    """How one text is read."""
    return next(chunk_reports([text]))


def chunk_reports(texts: Iterable[str]) -> Iterator[ChunkReport]:
    """How each of many texts is read. Several times as fast as `chunk`, since most words come again."""
    words = _Words()
    for text in texts:
        parts = _chunks_of_parts(text, words.tokenize)
        chunks = list(chain.from_iterable(parts))
        splits_tag = any(before[-1] != _COMMA != after[0] for part in parts for before, after in pairwise(part))
        yield ChunkReport(sum(map(len, chunks)), len(chunks), splits_tag)


def num_chunks(texts: Sequence[str]) -> list[int]:
    """How many chunks each text has."""
    return [report.num_chunks for report in chunk_reports(texts)]


class _Words(dict[str, list[int]]):
    """The ids of words between blanks. No token reaches over a blank, so a text's ids are those of its words."""

    def tokenize(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self.__getitem__, text.split(" "))))

    def __missing__(self, word: str) -> list[int]:
        ids = tokenize(word)
        if len(word) <= _MAX_WORD_LETTERS:
            if len(self) >= _MAX_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _chunks_of_parts(text: str, tokenize: Callable[[str], list[int]]) -> list[list[list[int]]]:
    """The chunks of each part between BREAKs. Nothing after the last BREAK is no part."""
    parts = [_cut(tokenize(part)) for part in (_BREAK.split(text) if "BREAK" in text else [text])]
    return parts[:-1] if len(parts) > 1 and parts[-1] == [[]] else parts


def _cut(ids: list[int]) -> list[list[int]]:
    """Ids without BREAK in chunks. A comma that finds its chunk full starts the next one, and the tag before it stays."""
    chunks = []
    while len(ids) > CHUNK_TOKENS:
        end = CHUNK_TOKENS
        if ids[end] != _COMMA:
            end = next((near for near in range(end, end - COMMA_REACH, -1) if ids[near - 1] == _COMMA), end)
        chunks.append(ids[:end])
        ids = ids[end:]
    return [*chunks, ids]


def padded(ids: list[int], pad: int) -> list[int]:
    """One chunk as the 77 ids that an encoder reads: BOS, the text, EOS, and `pad` up to the end."""
    return [BOS, *ids, EOS, *[pad] * (CHUNK_TOKENS - len(ids))]


def token_text(token: int) -> str:
    """What a token stands for, to be shown to people: without the mark that ends a word, and with parts of letters as `\\xf0`."""
    name = _names()[token]
    if token in (BOS, EOS):
        return name
    return bytes(map(_bytes_of_symbols().__getitem__, name.removesuffix("</w>"))).decode("utf-8", "backslashreplace")


def write_tokenizer_folder(folder: Path, pad: int) -> None:
    """The tokenizer as files that transformers reads; `pad` is PAD or PAD_2."""
    vocabulary, merges = _vocabulary()
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _names()[pad], "unk_token": _END}
    write_json(folder / "vocab.json", vocabulary)
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})


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


@cache
def _names() -> list[str]:
    """The vocabulary's tokens in the order of their ids."""
    return list(_vocabulary()[0])


@cache
def _bytes_of_symbols() -> dict[str, int]:
    order = [*_PRINTING, *(byte for byte in range(256) if byte not in _PRINTING)]  # the vocabulary's
    return dict(zip(_byte_symbols(), order, strict=True))


def _byte_symbols() -> list[str]:
    """A printable character for each byte, in the vocabulary's order: those that print, then the others as U+0100 and so on."""
    return [*map(chr, _PRINTING), *(chr(256 + index) for index in range(256 - len(_PRINTING)))]
