import hashlib
import json

import pytest
import torch

from aquatint.demo.model import tiny_spec, write_tiny_base
from aquatint.errors import NumericalError, StorageError
from aquatint.models.sdxl.export import export_diffusers, export_single_file, modelspec_metadata
from aquatint.models.sdxl.load import SPEC_KEY, open_base
from aquatint.models.sdxl.markers import scheduler_config
from aquatint.models.sdxl.process import Process
from aquatint.models.sdxl.shapes import CARRIED, COMPONENTS, TEXT_ENCODERS
from aquatint.tensor_file import TensorFile, as_bytes
from tests.models.sdxl.small import small_spec

EPSILON = {"process": Process()}
V_ZTSNR = {"process": Process("v_prediction", zero_terminal_snr=True)}


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    write_tiny_base(path, seed=1, spec=small_spec())
    return open_base(path)


def contents(path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with TensorFile(path) as file:
        return {name: (info.dtype, info.shape, as_bytes(file.read(name)).tobytes()) for name, info in file.tensors.items()}


def test_original_to_internal_to_original_is_byte_equal(tiny_base, tmp_path):
    base = open_base(tiny_base)
    export_single_file(tmp_path / "again.safetensors", base, base.component("unet"), dtype=torch.float32, **EPSILON)
    assert contents(tmp_path / "again.safetensors") == contents(tiny_base)


def test_single_file_to_folder_to_single_file_is_byte_equal(tiny_base, tmp_path):
    base = open_base(tiny_base)
    export_diffusers(tmp_path / "folder", base, base.component("unet"), dtype=torch.float32, **EPSILON)
    folder = open_base(tmp_path / "folder")
    export_single_file(tmp_path / "again.safetensors", folder, folder.component("unet"), dtype=torch.float32, **EPSILON)
    assert contents(tmp_path / "again.safetensors") == contents(tiny_base)


def test_a_trained_module_is_written_in_the_asked_dtype_and_the_rest_is_copied(small_base, tmp_path):
    unet = small_base.load_unet()
    with torch.no_grad():
        unet.conv_in.bias.fill_(0.1)
    export_single_file(tmp_path / "trained.safetensors", small_base, unet.state_dict(), dtype=torch.bfloat16, **EPSILON)
    trained = open_base(tmp_path / "trained.safetensors")
    component = trained.component("unet")
    assert {tensor.dtype for tensor in component.values()} == {torch.bfloat16}
    assert torch.equal(component["conv_in.bias"].load(), torch.full((8,), 0.1, dtype=torch.bfloat16))
    for part in ("vae", "text_encoders"):
        assert trained.digest(part) == small_base.digest(part)


@pytest.mark.parametrize(
    ("prediction", "zero_terminal_snr", "markers"),
    [("epsilon", False, set()), ("v_prediction", False, {"v_pred"}), ("v_prediction", True, {"v_pred", "ztsnr"})],
)
def test_markers_say_how_to_sample(small_base, tmp_path, prediction, zero_terminal_snr, markers):
    path = tmp_path / "model.safetensors"
    export_single_file(path, small_base, small_base.component("unet"), dtype=torch.float16, process=Process(prediction, zero_terminal_snr))
    with TensorFile(path) as file:
        assert {name for name in file.tensors if "." not in name} == markers
        assert all((file.tensors[name].dtype, file.tensors[name].shape) == ("F32", (0,)) for name in markers)
        assert file.metadata["modelspec.prediction_type"] == ("v" if markers else "epsilon")
    base = open_base(path)
    assert (base.process.prediction, base.process.zero_terminal_snr) == (prediction, zero_terminal_snr)


def test_the_reference_reader_reads_empty_markers(small_base, tmp_path):
    from safetensors.torch import load_file

    export_single_file(tmp_path / "model.safetensors", small_base, small_base.component("unet"), dtype=torch.float16, **V_ZTSNR)
    assert load_file(tmp_path / "model.safetensors")["ztsnr"].shape == (0,)


def test_metadata_is_modelspec_with_the_hash_of_the_data(small_base, tmp_path):
    path = tmp_path / "portrait.safetensors"
    digest = export_single_file(
        path, small_base, small_base.component("unet"), dtype=torch.float16, **EPSILON, metadata={"modelspec.author": "A. Person"}
    )
    data = path.read_bytes()
    with TensorFile(path) as file:
        metadata = file.metadata
    assert hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest() == digest
    assert metadata["modelspec.hash_sha256"] == f"0x{digest}"
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "sgm",
        "modelspec.title": "portrait",
        "modelspec.resolution": "1024x1024",
        "modelspec.author": "A. Person",
    }
    assert {key: metadata[key] for key in expected} == expected


def test_sizes_are_written_only_when_they_are_not_sdxl_s(tiny_base):
    with TensorFile(tiny_base) as file:
        assert json.loads(file.metadata[SPEC_KEY])["unet"] == tiny_spec().unet
    assert not any(key.startswith("aquatint") for key in modelspec_metadata(title="x", **EPSILON))


def test_optional_metadata_is_left_out_when_unknown():
    metadata = modelspec_metadata(title="x", license="CC0", date="2026-11-23", **V_ZTSNR)
    assert metadata["modelspec.license"] == "CC0"
    assert metadata["modelspec.date"] == "2026-11-23"
    assert "modelspec.author" not in metadata
    assert "zero terminal SNR" in metadata["modelspec.usage_hint"]


@pytest.mark.parametrize(("value", "dtype"), [(1e6, torch.float16), (float("nan"), torch.float32)])
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(small_base, tmp_path, value, dtype):
    unet = small_base.load_unet().state_dict()
    unet["conv_out.bias"] = torch.full((4,), value)
    with pytest.raises(NumericalError, match=r"conv_out\.bias"):
        export_single_file(tmp_path / "model.safetensors", small_base, unet, dtype=dtype, **EPSILON)
    with pytest.raises(NumericalError, match=r"conv_out\.bias"):
        export_diffusers(tmp_path / "folder", small_base, unet, dtype=dtype, **EPSILON)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_reads_back_differently_is_an_error(small_base, tmp_path, monkeypatch):
    monkeypatch.setattr("aquatint.models.sdxl.export.markers", lambda process: {})
    with pytest.raises(StorageError, match="does not read back"):
        export_single_file(tmp_path / "model.safetensors", small_base, small_base.component("unet"), dtype=torch.float32, **V_ZTSNR)


def test_an_export_without_part_of_the_unet_is_our_own_mistake(small_base, tmp_path):
    unet = small_base.component("unet")
    del unet["conv_in.weight"]
    with pytest.raises(KeyError, match="conv_in"):
        export_single_file(tmp_path / "model.safetensors", small_base, unet, dtype=torch.float32, **EPSILON)


def test_a_folder_is_never_overwritten(small_base, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        export_diffusers(tmp_path / "folder", small_base, small_base.component("unet"), dtype=torch.float32, **EPSILON)


def test_a_folder_opens_as_the_same_model(small_base, tmp_path):
    export_diffusers(tmp_path / "folder", small_base, small_base.component("unet"), dtype=torch.float32, **V_ZTSNR)
    folder = open_base(tmp_path / "folder")
    assert (folder.process.prediction, folder.process.zero_terminal_snr, folder.spec) == ("v_prediction", True, small_base.spec)
    assert [folder.digest(part) for part in ("unet", "vae", "text_encoders")] == [
        small_base.digest(part) for part in ("unet", "vae", "text_encoders")
    ]
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        *COMPONENTS,
        "tokenizer",
        "tokenizer_2",
        "scheduler",
        "model_index.json",
    }


@pytest.mark.parametrize(
    ("prediction", "zero_terminal_snr", "spacing"),
    [("epsilon", False, "leading"), ("v_prediction", False, "trailing"), ("v_prediction", True, "trailing")],
)
def test_the_scheduler_config_says_what_was_trained(prediction, zero_terminal_snr, spacing):
    config = scheduler_config(Process(prediction, zero_terminal_snr))
    assert (config["prediction_type"], config["rescale_betas_zero_snr"], config["timestep_spacing"]) == (
        prediction,
        zero_terminal_snr,
        spacing,
    )
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")


def test_trained_text_encoders_come_back_from_both_layouts(small_base, tmp_path):
    """Queries, keys and values of bigG become one tensor and three again; what is in every file and used by nothing stays as it is."""
    origin = {name: tensor.load() for name, tensor in small_base.tensors(("unet", *TEXT_ENCODERS)).items()}
    carried = {f"{encoder}.{CARRIED[encoder]}" for encoder in TEXT_ENCODERS}
    trained = {name: tensor if name in carried else tensor + 1 for name, tensor in origin.items()}
    export_single_file(tmp_path / "trained.safetensors", small_base, trained, dtype=torch.float16, **EPSILON)
    export_diffusers(tmp_path / "trained", small_base, trained, dtype=torch.float16, **EPSILON)
    for path in (tmp_path / "trained.safetensors", tmp_path / "trained"):
        found = {name: tensor.load() for name, tensor in open_base(path).tensors(("unet", *TEXT_ENCODERS)).items()}
        assert found.keys() == trained.keys()
        for name in found.keys() - carried:
            assert torch.equal(found[name], trained[name].half()), name
    assert open_base(tmp_path / "trained.safetensors").digest("vae") == small_base.digest("vae")
