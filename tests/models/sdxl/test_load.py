import json
from pathlib import Path

import pytest
import torch

from aquatint.demo.model import random_tensors, write_tiny_base
from aquatint.errors import ModelFileError
from aquatint.models.sdxl.export import export_diffusers
from aquatint.models.sdxl.keys import PREFIXES, original_shapes, to_original
from aquatint.models.sdxl.load import LOGIT_SCALE, open_base
from aquatint.models.sdxl.process import Process
from aquatint.models.sdxl.shapes import COMPONENTS
from aquatint.tensor_file import TensorFile, write_tensors
from tests.models.sdxl.small import small_spec, spec_metadata, write_header, write_small


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    write_tiny_base(path, seed=1, spec=small_spec())
    return path


@pytest.fixture(scope="module")
def small_folder(small_base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "folder"
    base = open_base(small_base)
    export_diffusers(folder, base, base.component("unet"), dtype=torch.float32, process=Process())
    return folder


def random_vae() -> dict[str, torch.Tensor]:
    return {name: value.load() for name, value in random_tensors("vae", small_spec(), seed=7).items()}


def test_modules_hold_the_file_exactly(small_base):
    base = open_base(small_base)
    clip, bigg = base.load_text_encoders()
    modules = {"unet": base.load_unet(), "vae": base.load_vae(), "text_encoder": clip, "text_encoder_2": bigg}
    with TensorFile(small_base) as file:
        for component, module in modules.items():
            for name, tensor in module.state_dict().items():
                origin = to_original(component, name)
                stored = file.read(origin.name)
                if origin.part is not None:
                    stored = stored.chunk(3)[origin.part]
                stored = stored.t() if origin.transposed else stored.reshape(tensor.shape)
                assert torch.equal(tensor, stored), name


def test_only_the_unet_can_be_trained(small_base):
    base = open_base(small_base)
    assert all(parameter.requires_grad for parameter in base.load_unet().parameters())
    assert not any(parameter.requires_grad for module in (base.load_vae(), *base.load_text_encoders()) for parameter in module.parameters())


def test_weights_are_converted_tensor_by_tensor(small_base):
    base = open_base(small_base)
    half, whole = base.load_unet(torch.bfloat16), base.load_unet()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    for name, parameter in whole.named_parameters():
        assert torch.equal(half.get_parameter(name), parameter.bfloat16())


def test_every_buffer_is_real(small_base):
    for module in open_base(small_base).load_text_encoders():
        ((_, positions),) = module.named_buffers()
        assert torch.equal(positions, torch.arange(77).unsqueeze(0))


def test_parameters_are_their_own_memory(small_base):
    base = open_base(small_base)
    first, second = base.load_unet(), base.load_unet()
    with torch.no_grad():
        first.conv_in.weight.zero_()
    assert second.conv_in.weight.abs().sum() > 0


def test_both_layouts_are_the_same_model(small_base, small_folder):
    file, folder = open_base(small_base), open_base(small_folder)
    assert (file.layout, folder.layout) == ("single_file", "diffusers")
    assert file.spec == folder.spec
    for component in ("unet", "vae", "text_encoders"):
        assert file.digest(component) == folder.digest(component)


@pytest.mark.parametrize(("kind", "name"), [("vae", "post_quant_conv.bias"), ("vae_encoder", "quant_conv.bias")])
def test_a_digest_changes_with_one_bit(kind, name, small_base, tmp_path):
    vae = random_vae()
    digests = []
    for value in (0.0, 1e-30):
        vae[name] = torch.full_like(vae[name], value)
        write_tiny_base(tmp_path / "base.safetensors", seed=1, spec=small_spec(), vae_tensors=vae)
        digests.append(open_base(tmp_path / "base.safetensors").digest(kind))
    assert len({*digests, open_base(small_base).digest(kind)}) == 3


def test_a_lazy_tensor_outlives_what_made_it(small_base):
    tensor = open_base(small_base).component("unet")["conv_in.weight"]
    assert tensor.load().shape == tensor.shape == (8, 4, 3, 3)


def test_no_file_stays_open(small_base):
    def open_files() -> list[str]:
        return [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]

    base = open_base(small_base)
    base.load_unet()
    base.digest("text_encoders")
    component = base.component("vae")
    component["quant_conv.bias"].load()
    assert open_files().count(str(small_base)) == 1
    del component
    assert open_files().count(str(small_base)) == 0


def test_tensors_that_nobody_uses_are_made_up_when_the_base_lost_them(tmp_path):
    lost = (PREFIXES["text_encoder"] + "embeddings.position_ids", PREFIXES["text_encoder_2"] + "logit_scale")
    base = open_base(write_small(tmp_path / "model.safetensors", without=lost))
    position_ids = base.component("text_encoder")["embeddings.position_ids"]
    assert torch.equal(position_ids.load(), torch.arange(77).unsqueeze(0))
    assert position_ids.dtype == torch.int64
    assert base.component("text_encoder_2")["logit_scale"].load().item() == pytest.approx(LOGIT_SCALE)


@pytest.mark.parametrize(
    ("markers", "metadata", "expected"),
    [
        ([], {}, ("epsilon", False)),
        (["v_pred"], {}, ("v_prediction", False)),
        (["v_pred", "ztsnr"], {}, ("v_prediction", True)),
        (["ztsnr"], {}, ("epsilon", False)),
        ([], {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        (["ztsnr"], {"modelspec.prediction_type": "v"}, ("v_prediction", True)),
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False)),
    ],
)
def test_what_a_single_file_predicts_is_detected(tmp_path, markers, metadata, expected):
    shapes = {**original_shapes(small_spec()), **dict.fromkeys(markers, (0,))}
    base = open_base(write_header(tmp_path / "model.safetensors", shapes, {**spec_metadata(small_spec()), **metadata}))
    assert (base.process.prediction, base.process.zero_terminal_snr) == expected


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({}, ("epsilon", False)),
        ({"prediction_type": "v_prediction"}, ("v_prediction", False)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ("v_prediction", True)),
        ({"prediction_type": "sample"}, ("x0", False)),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, ("flow", False)),
        ({"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"}, ("flow", False)),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, ("edm", False)),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"}, ("v_prediction", False)),
    ],
)
def test_what_a_diffusers_folder_predicts_is_detected(small_folder, tmp_path, scheduler, expected):
    for path in small_folder.iterdir():
        if path.name != "scheduler":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    base = open_base(tmp_path)
    assert (base.process.prediction, base.process.zero_terminal_snr) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    vae = random_vae()
    vae["decoder.conv_out.weight"][0, 0, 0, 0] = value
    write_tiny_base(tmp_path / "base.safetensors", seed=1, spec=small_spec(), vae_tensors=vae)
    with pytest.raises(ModelFileError, match=r"first_stage_model\.decoder\.conv_out\.weight"):
        open_base(tmp_path / "base.safetensors").load_vae()


def test_weights_that_do_not_fit_in_half_precision_are_refused(tmp_path):
    vae = random_vae()
    vae["decoder.conv_out.weight"][0, 0, 0, 0] = 1e6
    write_tiny_base(tmp_path / "base.safetensors", seed=1, spec=small_spec(), vae_tensors=vae)
    with pytest.raises(ModelFileError, match="float16"):
        open_base(tmp_path / "base.safetensors").load_vae(torch.float16)


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
VAE_FORMS = ("checkpoint", "alone", "alone with matrices", "diffusers names", "old diffusers names", "diffusers folder", "vae folder")


def old_name(name: str) -> str:
    for new, old in OLD_NAMES.items():
        name = name.replace(new, old)
    return name


def write_vae(form: str, folder: Path) -> Path:
    """The same random autoencoder in each form that people have one."""
    vae, official, flat = random_vae(), {}, {}
    for name, tensor in vae.items():
        origin = to_original("vae", name)
        official[origin.name] = tensor[..., None, None] if origin.as_conv else tensor
        flat[origin.name.removeprefix(PREFIXES["vae"])] = tensor
    if form.endswith("folder"):
        write_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", vae)
        (folder / "vae" / "config.json").write_text(json.dumps(small_spec().vae))
        return folder if form == "diffusers folder" else folder / "vae"
    tensors = {
        "checkpoint": official,
        "alone": {name.removeprefix(PREFIXES["vae"]): tensor for name, tensor in official.items()},
        "alone with matrices": flat,
        "diffusers names": vae,
        "old diffusers names": {old_name(name): tensor for name, tensor in vae.items()},
    }
    write_tensors(folder / "vae.safetensors", tensors[form])
    return folder / "vae.safetensors"


@pytest.mark.parametrize("form", VAE_FORMS)
def test_another_vae_takes_the_place_of_the_base_s_own(small_base, tmp_path, form):
    base = open_base(small_base, write_vae(form, tmp_path))
    loaded = base.load_vae().state_dict()
    assert loaded.keys() == random_vae().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in random_vae().items())
    assert base.digest("vae") != open_base(small_base).digest("vae")
    assert base.digest("unet") == open_base(small_base).digest("unet")


def test_a_base_without_vae_opens_with_another_one(tmp_path):
    path = write_small(tmp_path / "base.safetensors", without=(PREFIXES["vae"],))
    assert open_base(path, write_vae("diffusers names", tmp_path)).load_vae().config.scaling_factor == 0.13025


def test_a_sharded_folder_and_a_half_precision_one_open(small_base, small_folder, tmp_path):
    for path in small_folder.iterdir():
        if path.name not in ("unet", "vae"):
            (tmp_path / path.name).symlink_to(path)
    tensors = {component: {n: v.load() for n, v in open_base(small_base).component(component).items()} for component in ("unet", "vae")}
    names = sorted(tensors["unet"])
    for index, some in enumerate((names[:100], names[100:]), start=1):
        write_tensors(
            tmp_path / "unet" / f"diffusion_pytorch_model-0000{index}-of-00002.safetensors", {name: tensors["unet"][name] for name in some}
        )
    write_tensors(
        tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors", {name: tensor.half() for name, tensor in tensors["vae"].items()}
    )
    for component in ("unet", "vae"):
        (tmp_path / component / "config.json").write_text(json.dumps(getattr(small_spec(), component)))
    base = open_base(tmp_path)
    assert base.digest("unet") == open_base(small_base).digest("unet")
    assert base.load_vae().dtype == torch.float16


def test_older_folders_spell_clip_l_with_a_prefix(small_folder):
    with TensorFile(small_folder / "text_encoder" / "model.safetensors") as file:
        assert all(name.startswith("text_model.") for name in file.tensors)
    clip, _ = open_base(small_folder).load_text_encoders()
    assert all(not name.startswith("text_model.") for name in clip.state_dict())


def test_components_cover_the_whole_file(small_base):
    base = open_base(small_base)
    with TensorFile(small_base) as file:
        assert {to_original(c, name).name for c in COMPONENTS for name in base.component(c)} == set(file.tensors)


def test_an_encoder_in_half_precision_has_one_in_full_beside_it(tiny_base: Path) -> None:
    base = open_base(tiny_base)
    images = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    half, full = base.vae_encoder("cpu", "bfloat16"), base.vae_encoder("cpu", "float32")
    assert full.precise is None
    assert half.precise is not None
    assert half.precise is half.precise, "it is loaded once"
    assert half.precise.digest == half.digest == full.digest
    assert torch.equal(half.precise.encode(images), full.encode(images))
    assert not torch.equal(half.encode(images), full.encode(images))
