"""Files that other programs read, and files that other programs (or accidents) wrote."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.errors import ModelFileError, StorageError
from aquatint.tensor_file import DTYPES, LazyTensor, TensorFile, TensorInfo, as_bytes, dtype_name, torch_dtype, write_tensors


def file_bytes(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((as_bytes(a) == as_bytes(b)).all())


# What we write


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads_back_here_and_in_the_reference_reader(tmp_path: Path, name: str) -> None:
    path, dtype = tmp_path / "a.safetensors", torch_dtype(name)
    noise = torch.frombuffer(bytearray(range(48)), dtype=torch.uint8) % 2
    tensor = (noise if name == "BOOL" else noise * 37).view(dtype).reshape(2, -1, 3 if dtype.itemsize < 8 else 1)
    write_tensors(path, {"x": tensor})
    with TensorFile(path) as file:
        assert same_bytes(file.read("x"), tensor)
        assert file.tensors["x"].dtype == name == dtype_name(dtype)
    assert same_bytes(safetensors.torch.load_file(path)["x"], tensor)


def test_scalars_empty_tensors_and_metadata_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"scalar": torch.tensor(3.5), "marker": torch.zeros(0), "hole": torch.zeros(3, 0, dtype=torch.int64), "b": torch.arange(5)}
    metadata = {"title": 'ä "quoted" \n', "file": "?.png"}
    write_tensors(path, tensors, {**metadata, "file": os.fsdecode(b"\xff.png")})
    with TensorFile(path) as file:
        assert file.metadata == metadata
        assert {name: file.read(name).tolist() for name in file.tensors} == {name: value.tolist() for name, value in tensors.items()}
        assert all(file.tensors[name].shape == tuple(value.shape) for name, value in tensors.items())
    with safetensors.safe_open(path, "pt") as reference:
        assert set(reference.keys()) == set(tensors)
        assert reference.metadata() == metadata
    write_tensors(path, {})
    with TensorFile(path) as file:
        assert (file.tensors, file.metadata) == ({}, {})


def test_what_the_reference_writer_wrote_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"half": torch.randn(3, 5).half(), "double": torch.randn(7, dtype=torch.float64), "byte": torch.arange(9, dtype=torch.uint8)}
    safetensors.torch.save_file(tensors, path, {"k": "v"})
    with TensorFile(path) as file:
        assert file.metadata == {"k": "v"}
        assert all(same_bytes(file.read(name), tensor) for name, tensor in tensors.items())


def test_tensors_that_are_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"transposed": base.T, "strided": base[::2, 1::2], "expanded": base[:1].expand(3, 6)}
    write_tensors(tmp_path / "a.safetensors", {**views, "parameter": torch.nn.Parameter(base)})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert all(torch.equal(file.read(name), tensor) for name, tensor in views.items())
        assert torch.equal(file.read("parameter"), base)


def test_the_data_is_aligned_to_the_elements(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(1), "c": torch.zeros(1).double()})
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert all(info.start % DTYPES[info.dtype][1] == 0 for info in file.tensors.values())
        assert min(info.start for info in file.tensors.values()) % 8 == 0


def test_the_same_tensors_give_the_same_file(tmp_path: Path) -> None:
    a, b = torch.randn(3), torch.randn(4).half()
    first = write_tensors(tmp_path / "1", {"a": a, "b": b}, {"k": "v"})
    second = write_tensors(tmp_path / "2", {"b": b, "a": a}, {"k": "v"})
    assert first == second == hashlib.sha256((tmp_path / "2").read_bytes()).hexdigest()


def test_the_digest_of_the_data_stands_in_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = write_tensors(path, {"a": torch.randn(100), "b": torch.arange(3)}, {"k": "v"}, data_digest_key="hash")
    content = path.read_bytes()
    assert digest == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    with TensorFile(path) as file:
        assert file.metadata == {"k": "v", "hash": f"0x{digest}"}


def test_lazy_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []

    def lazy(name: str, value: torch.Tensor) -> LazyTensor:
        return LazyTensor(value.dtype, tuple(value.shape), lambda: made.append(name) or value)  # type: ignore[func-returns-value]

    write_tensors(tmp_path / "a", {"b": lazy("b", torch.ones(2)), "a": lazy("a", torch.zeros(3))})
    assert made == ["a", "b"]
    with TensorFile(tmp_path / "a") as file:
        assert file.read("b").tolist() == [1, 1]


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2).half(), torch.zeros(1, 2)])
def test_a_lazy_tensor_that_is_not_what_it_said_stops_the_write(tmp_path: Path, wrong: torch.Tensor) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "a", {"x": LazyTensor(torch.float32, (2,), lambda: wrong)})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_tensors(path, {"x": torch.ones(4)})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"could not write .*a: No space left on device"):
        write_tensors(path, {"x": torch.zeros(4)})
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("a", before)]


def test_a_file_can_be_written_from_its_own_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_tensors(path, {"x": torch.arange(1000.0)})
    with TensorFile(path) as file:
        write_tensors(path, {"y": LazyTensor(torch.float32, (1000,), lambda: file.read("x"))})
        assert torch.equal(file.read("x"), torch.arange(1000.0))
    with TensorFile(path) as file:
        assert torch.equal(file.read("y"), torch.arange(1000.0))


def test_a_link_is_written_through_and_the_mode_is_the_umasks(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        (tmp_path / "link").symlink_to(tmp_path / "target")
        write_tensors(tmp_path / "link", {"x": torch.ones(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o644


@settings(max_examples=15, deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(0, 4), max_size=4), max_size=5), st.dictionaries(st.text(), st.text()))
def test_any_names_shapes_and_metadata_read_back(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("any") / "a"
    shapes.pop("__metadata__", None)
    tensors = {name: torch.randn(shape).to([torch.float32, torch.float16][len(shape) % 2]) for name, shape in shapes.items()}
    write_tensors(path, tensors, metadata)
    with TensorFile(path) as file:
        assert file.metadata == metadata
        assert file.tensors.keys() == tensors.keys()
        assert all(same_bytes(file.read(name), tensor) for name, tensor in tensors.items())


# What we read


def test_a_tensor_can_be_read_into_memory_that_is_there(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"x": torch.arange(6.0).reshape(2, 3)})
    into = torch.empty(6)
    with TensorFile(tmp_path / "a") as file:
        assert file.tensors["x"] == TensorInfo("F32", (2, 3), file.tensors["x"].start, file.tensors["x"].start + 24)
        file.read_into("x", into)
        assert into.tolist() == [0, 1, 2, 3, 4, 5]
        for wrong in (torch.empty(5), torch.empty(6).half()):
            with pytest.raises(ValueError, match="cannot read"):
                file.read_into("x", wrong)


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
MALFORMED = {
    "empty": b"",
    "five bytes": b"\x02\0\0\0\0",
    "no header": (0).to_bytes(8, "little"),
    "header past the end": file_bytes({}, length=1000),
    "header of 2^60 bytes": file_bytes({}, length=2**60),
    "header of 2^64-1 bytes": file_bytes({}, length=2**64 - 1),
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "pickle": b"\x80\x02}q\0.",
    "zip": b"PK\x03\x04" + bytes(60),
    "zeros": bytes(64),
    "not json": file_bytes(b"{nonsense}"),
    "not utf-8": file_bytes(b'{"\xff\xfe": {}}'),
    "utf-16": file_bytes("{}".encode("utf-16-le")),
    "a list": file_bytes([]),
    "deep nesting": file_bytes(DEEP),
    "a number of 5,000 digits": file_bytes(b'{"a":' + b"9" * 5000 + b"}"),
    "name twice": file_bytes(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    "field twice": file_bytes(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "metadata is a list": file_bytes({"__metadata__": []}),
    "metadata holds a number": file_bytes({"__metadata__": {"step": 1}}),
    "entry is a list": file_bytes({"a": ["F32", [2], [0, 8]]}, bytes(8)),
    "entry is a number": file_bytes({"a": 1}, bytes(8)),
    "entry without dtype": file_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "entry without shape": file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
    "entry without place": file_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "unknown dtype": file_bytes({"a": entry("F33")}, bytes(8)),
    "dtype is a list": file_bytes({"a": entry(["F32"])}, bytes(8)),
    "shape is a number": file_bytes({"a": entry(shape=2)}, bytes(8)),
    "shape is a text": file_bytes({"a": entry(shape="2")}, bytes(8)),
    "shape has a fraction": file_bytes({"a": entry(shape=[2.0])}, bytes(8)),
    "shape has a truth value": file_bytes({"a": entry(shape=[2, True])}, bytes(8)),
    "shape has nan": file_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "negative shape": file_bytes({"a": entry(shape=[-1, -2])}, bytes(8)),
    "shape overflows": file_bytes({"a": entry(shape=[2**40, 2**40, 2**40])}, bytes(8)),
    "shape of 500,000 huge sides": file_bytes({"a": entry(shape=[2**61] * 500_000)}, bytes(8)),
    "shape does not fit": file_bytes({"a": entry(shape=[3])}, bytes(8)),
    "three offsets": file_bytes({"a": entry(offsets=[0, 4, 8])}, bytes(8)),
    "backward": file_bytes({"a": entry(offsets=[8, 0])}, bytes(8)),
    "before the data": file_bytes({"a": entry(offsets=[-8, 0])}, bytes(8)),
    "past the end": file_bytes({"a": entry(offsets=[8, 16])}, bytes(8)),
    "cut short": file_bytes({"a": entry()}, bytes(7)),
    "trailing bytes": file_bytes({"a": entry()}, bytes(9)),
    "overlap": file_bytes({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "the same place twice": file_bytes({"a": entry(), "b": entry()}, bytes(8)),
    "a hole": file_bytes({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "a hole at the start": file_bytes({"a": entry(offsets=[4, 12])}, bytes(12)),
}  # fmt: skip


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_refused_at_once_with_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(MALFORMED[kind])
    descriptors, start = open_files(), time.perf_counter()
    with pytest.raises(ModelFileError, match=r"a\.safetensors is not a readable safetensors file: .+") as caught:
        TensorFile(path)
    assert time.perf_counter() - start < 1.0
    assert "fetch it again" in caught.value.hint
    assert len(caught.value.message) < 1000
    assert open_files() == descriptors


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_header_is_refused_or_still_tells_the_truth_about_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a"
    write_tensors(path, {"a": torch.ones(2, 3), "b": torch.zeros(5).half(), "c": torch.zeros(0)}, {"k": "v"})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 7 + int.from_bytes(content[:8], "little")))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    num_bytes = 34
    with contextlib.suppress(ModelFileError), TensorFile(path) as file:
        num_bytes = sum(file.read(name).nbytes for name in file.tensors)
    assert num_bytes == 34


def test_a_file_that_is_cut_while_it_is_open_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_tensors(path, {"x": torch.ones(10_000)})
    with TensorFile(path) as file:
        os.truncate(path, 20_000)
        with pytest.raises(ModelFileError, match="it ends inside the tensor `x`"):
            file.read("x")


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_not_a_file_is_a_storage_error(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "a").mkdir()
    with pytest.raises(StorageError, match=r"could not read .*a: (No such file|Is a directory)"):
        TensorFile(tmp_path / "a")
