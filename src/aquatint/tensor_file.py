"""Safetensors files, read by `preadv` and written as a stream.

The layout (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, then the tensors'
bytes without holes. Reading by position never maps the file, so a file that is cut short while it is open is an error
and not a crash, and loading needs no second copy of the weights. Writing holds one tensor at a time in memory and
computes the digest on the way. Torch is imported only where tensors are made, so headers can be looked at without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from aquatint.errors import ModelFileError
from aquatint.storage import atomic_file, storage_errors

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's reference reader
MAX_DIMENSIONS = 64  # more than any tensor has, and few enough to multiply
MAX_NUMBERS = 64
_READ_BYTES = 1 << 27  # one read of Linux moves at most 2 GiB; smaller ones keep Ctrl-C quick
DTYPES = {  # the format's name -> torch's name and bytes per element
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1), "U8": ("uint8", 1), "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1),
}  # fmt: skip
_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a torch dtype: `BF16` for torch.bfloat16."""
    return _NAMES[str(dtype).removeprefix("torch.")]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a format's name: torch.bfloat16 for `BF16`."""
    import torch

    return getattr(torch, DTYPES[name][0])  # type: ignore[no-any-return]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in a file: `dtype` is the format's name, `start` and `end` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


class TensorFile:
    """A safetensors file, open for reading. Raises ModelFileError if it is not one, StorageError if it can't be read."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with storage_errors("read", self.path):
            self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            self.tensors, self.metadata = _read_header(self._descriptor, self.path)
        except BaseException:
            os.close(self._descriptor)
            raise

    def read(self, name: str) -> torch.Tensor:
        """A tensor of its own memory, in the file's dtype and shape."""
        import torch

        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Fills a contiguous CPU tensor of the same dtype and number of elements.

        Raises ModelFileError if the file was cut short after it was opened.
        """
        info = self.tensors[name]
        if dtype_name(tensor.dtype) != info.dtype or tensor.numel() != prod(info.shape):
            raise ValueError(f"{name}: cannot read {info.dtype} {info.shape} into {tensor.dtype} {tuple(tensor.shape)}")
        view = memoryview(as_bytes(tensor))
        position, done = info.start, 0
        with storage_errors("read", self.path):
            while done < len(view):
                count = os.preadv(self._descriptor, [view[done : done + _READ_BYTES]], position + done)
                if count == 0:
                    raise _refusal(self.path, f"it ends inside the tensor `{name}`")
                done += count

    def numbers(self, name: str) -> tuple[float, ...]:
        """The few numbers of a small float tensor, without torch. Raises ModelFileError for one that is large or has another type."""
        info = self.tensors[name]
        if info.dtype not in ("F64", "F32", "F16", "BF16") or prod(info.shape) > MAX_NUMBERS:
            raise _refusal(self.path, f"`{name}` should hold a few numbers, and is {info.dtype} of shape {info.shape}")
        with storage_errors("read", self.path):
            data = os.pread(self._descriptor, info.end - info.start, info.start)
        if info.dtype == "BF16":  # the upper half of a float32
            data = b"".join(b"\0\0" + data[start : start + 2] for start in range(0, len(data), 2))
        form = {"F64": "d", "F16": "e"}.get(info.dtype, "f")
        if len(data) != prod(info.shape) * struct.calcsize(form):
            raise _refusal(self.path, f"it ends inside the tensor `{name}`")
        return struct.unpack(f"<{prod(info.shape)}{form}", data)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def as_bytes(tensor: torch.Tensor) -> Any:
    """A contiguous CPU tensor's memory as a flat numpy array of uint8, shared with the tensor."""
    import torch

    flat = tensor.detach().reshape(-1)  # what is empty may have strides that cannot be viewed
    return flat.view(torch.uint8).numpy() if len(flat) else torch.empty(0, dtype=torch.uint8).numpy()


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor | LazyTensor],
    metadata: Mapping[str, str] | None = None,
    *,
    data_digest_key: str | None = None,
) -> str:
    """Writes a safetensors file atomically and returns the SHA-256 of the whole file, in hex.

    With `data_digest_key`, the metadata gets that key with "0x" and the SHA-256 of the bytes after the header
    (ModelSpec's `hash_sha256`), and that digest is returned. Raises StorageError; an older file then stays as it was.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + prod(tensors[name].shape) * tensors[name].dtype.itemsize
        entries[name] = {"dtype": dtype_name(tensors[name].dtype), "shape": list(tensors[name].shape), "data_offsets": [start, end]}

    def header(data_digest: str) -> bytes:
        extra = {data_digest_key: f"0x{data_digest}"} if data_digest_key else {}
        strings = {**(metadata or {}), **extra}
        text = json.dumps({"__metadata__": strings, **entries} if strings else entries, separators=(",", ":"), ensure_ascii=False)
        data = text.encode(errors="replace")  # of what is no character, other readers refuse even the escape
        data += b" " * (-len(data) % 8)
        return len(data).to_bytes(8, "little") + data

    first_header = header("0" * 64)
    digest = hashlib.sha256(b"" if data_digest_key else first_header)
    with atomic_file(path) as file:
        file.write(first_header)
        for name in names:
            value = tensors[name]
            tensor = value.load() if isinstance(value, LazyTensor) else value
            if tensor.dtype != value.dtype or tuple(tensor.shape) != tuple(value.shape):
                raise ValueError(f"{name}: announced {value.dtype} {value.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
            data = as_bytes(tensor.detach().cpu().contiguous())
            digest.update(data)
            file.write(data)
        if data_digest_key:
            file.seek(0)
            file.write(header(digest.hexdigest()))
    return digest.hexdigest()


def _refusal(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is not a readable safetensors file: {reason}",
        hint="the download or copy may be incomplete: compare its size with the source and fetch it again",
    )


def _read_header(descriptor: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    with storage_errors("read", path):
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise _refusal(path, "its header is missing or does not fit in the file")
        text = os.pread(descriptor, length, 8)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("the header is not a table")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata is not a table of texts")
        tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, RecursionError) as error:
        raise _refusal(path, str(error)) from error
    expected = 8 + length
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.end)):
        if info.start != expected:
            raise _refusal(path, "tensors overlap or leave holes")
        expected = info.end
    if expected != size:
        raise _refusal(path, f"it has {size} bytes, its header promises {expected}")
    return tensors, metadata


def _tensor_info(name: str, entry: Any, data_start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]}:
            pass
        case _:
            raise ValueError(f"tensor `{name}` is not described by dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise ValueError(f"tensor `{name}` has the unknown dtype {dtype!r}")
    if len(shape) > MAX_DIMENSIONS or not all(type(value) is int and 0 <= value < 2**62 for value in (*shape, start, end)):
        raise ValueError(f"tensor `{name}` has a bad shape or place")
    num_bytes = prod(shape) * DTYPES[dtype][1]
    if end - start != num_bytes:
        raise ValueError(f"tensor `{name}` has {end - start} bytes, its shape needs {num_bytes}")
    return TensorInfo(dtype, tuple(shape), data_start + start, data_start + end)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return table
