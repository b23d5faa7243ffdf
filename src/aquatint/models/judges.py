"""Encoders that pictures are measured with: CLIP and DINOv2 as transformers saves them, and the Inception network of FID.

Everything is read from files of the user's, in float32 and from safetensors alone. Pictures are prepared as each encoder's
own preprocessor_config.json says, and resized by Pillow, which smooths what it shrinks (aliasing changes these scores more than
training does: arXiv 2104.11222). Pictures are uint8 (H, W, 3) in sRGB; embeddings are float32 (N, D).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from aquatint.errors import ModelFileError
from aquatint.models.inception import load_inception, shrink
from aquatint.models.sdxl.places import read_json
from aquatint.models.sdxl.tokenizer import CHUNK_TOKENS, EOS, PAD, padded, tokenize
from aquatint.storage import digest_file
from aquatint.tensor_file import TensorFile

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, CLIPModel

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.float32]

_PROCESSOR = "preprocessor_config.json"
_GET_FOLDER = "fetch the whole folder of the model again, with its .safetensors file"


class Judge(Protocol):
    """An encoder. `digest` is the SHA-256 of its weights' files."""

    digest: str

    def embed(self, pictures: Sequence[Pixels]) -> Rows:
        """The embeddings of pictures of any sizes, each a function of its picture alone."""
        ...


class Clip:
    """CLIP (arXiv 2103.00020): pictures and texts in one space."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel

        _check_kind(folder, "evaluation.clip", ("clip",))
        self._model: CLIPModel = _load(CLIPModel, folder).to(device)
        words = self._model.config.text_config
        if words.vocab_size != EOS + 1 or words.max_position_embeddings != CHUNK_TOKENS + 2:
            raise ModelFileError(f"{folder} reads texts otherwise than CLIP does", hint="choose a CLIP of OpenAI, or one made like it")
        self._processor, self._device = CLIPImageProcessorPil.from_dict(read_json(folder / _PROCESSOR)), device
        self.digest = _digest(folder)

    @torch.no_grad()
    def embed(self, pictures: Sequence[Pixels]) -> Rows:
        seen = self._model.vision_model(pixel_values=_prepared(self._processor, pictures, self._device))
        return _rows(self._model.visual_projection(seen.pooler_output))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Rows:
        """The embeddings of texts, each of its first 75 tokens."""
        ids = torch.tensor([padded(tokenize(text)[:CHUNK_TOKENS], PAD) for text in texts], device=self._device)
        return _rows(self._model.text_projection(self._model.text_model(input_ids=ids).pooler_output))


class Dinov2:
    """DINOv2 (arXiv 2304.07193): the CLS token after the last norm, which FD-DINOv2 (arXiv 2306.04675) takes."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import BitImageProcessorPil, Dinov2Model, Dinov2WithRegistersModel

        kinds = {"dinov2": Dinov2Model, "dinov2_with_registers": Dinov2WithRegistersModel}
        self._model = _load(kinds[_check_kind(folder, "evaluation.dinov2", tuple(kinds))], folder).to(device)
        self._processor, self._device = BitImageProcessorPil.from_dict(read_json(folder / _PROCESSOR)), device
        self.digest = _digest(folder)

    @torch.no_grad()
    def embed(self, pictures: Sequence[Pixels]) -> Rows:
        return _rows(self._model(_prepared(self._processor, pictures, self._device)).last_hidden_state[:, 0])


class Inception:
    """The network of FID, with pictures resized as clean-fid does it."""

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise _not_there(path, "evaluation.inception")
        self._network, self._device = load_inception(path).to(device), device
        self.digest = digest_file(path)

    def embed(self, pictures: Sequence[Pixels]) -> Rows:
        shrunk = [shrink(torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0)) for picture in pictures]
        return _rows(self._network(torch.cat(shrunk).to(self._device)))


def _prepared(processor: BaseImageProcessor, pictures: Sequence[Pixels], device: torch.device) -> torch.Tensor:
    """(B, 3, H, W) float32."""
    values: torch.Tensor = processor(list(pictures), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    return values.float().to(device)


def _rows(embeddings: torch.Tensor) -> Rows:
    return embeddings.float().cpu().numpy()


# Files


def _check_kind(folder: Path, setting: str, kinds: Sequence[str]) -> str:
    """The model's type, of `kinds`. Raises ModelFileError if it is of another, or of one that the config does not tell."""
    if not folder.is_dir():
        raise _not_there(folder, setting)
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in kinds:
        raise ModelFileError(
            f"{folder} holds a model of type {kind!r}, and `{setting}` needs {kinds[0]!r}",
            hint="choose the folder of such a model, as transformers saves it",
        )
    return str(kind)


def _not_there(path: Path, setting: str) -> ModelFileError:
    what = "file" if setting.endswith("inception") else "folder"
    return ModelFileError(f"there is no {what} {path}", hint=f"check the spelling of `{setting}`; relative paths start at the config file")


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or its parts. Raises ModelFileError if there is none: pickles are not read."""
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not files:
        pickles = ", ".join(path.name for path in sorted(folder.glob("*.bin")))
        what = f", and {pickles} may hold any program: it is not read" if pickles else ""
        raise ModelFileError(f"there is no model.safetensors in {folder}{what}", hint=_GET_FOLDER)
    return files


def _digest(folder: Path) -> str:
    digests = [digest_file(path) for path in _weight_files(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _load(model_class: Any, folder: Path) -> Any:
    """The model in float32, frozen. Raises ModelFileError for weights that are missing, misshapen or damaged."""
    for path in _weight_files(folder):
        TensorFile(path).close()  # says what is wrong with a file that is damaged
    options = {"local_files_only": True, "use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        model, found = model_class.from_pretrained(folder, **options)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelFileError(f"the model in {folder} cannot be loaded: {reason}", hint=_GET_FOLDER) from error
    if found["missing_keys"]:
        raise ModelFileError(f"the weights in {folder} lack `{min(found['missing_keys'])}`", hint=_GET_FOLDER)
    return model.eval().requires_grad_(False)
