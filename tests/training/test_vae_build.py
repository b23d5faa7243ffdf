import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from aquatint.config.schema import dump
from aquatint.errors import DataError, Interrupted, LockedError, ModelFileError, ResumeError
from aquatint.models.sdxl.load import open_base
from aquatint.storage import folder_lock
from aquatint.tensor_file import TensorFile, as_bytes, write_tensors
from aquatint.training import vae_build
from aquatint.training.caching import cache_run
from aquatint.training.vae_build import find_data, train_vae_run
from tests.runs import rows
from tests.training.vae_runs import vae_config, write_base

TRAINED = ("first_stage_model.decoder.", "first_stage_model.post_quant_conv.")
ADVERSARIAL = {"adversarial_weight": 0.5, "adversarial_start": "2 steps"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Sums are in the same order every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    write_base(path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder of a run that learns."""
    settings = {"length": "16 steps", "learning_rate": 1e-4, "warmup": "4 steps", "ema_decay": 0.8, "samples_every": "16 steps"}
    config = vae_config(tmp_path_factory.mktemp("runs"), base, vae=settings, validation={"share": 0.3, "max_pictures": 3})
    return train_vae_run(config).folder


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    with TensorFile(path) as file:
        return {name: (info.dtype, as_bytes(file.read(name)).tobytes()) for name, info in file.tensors.items()}


def test_held_out_pictures_are_decoded_better_afterwards(trained: Path):
    measured = [row for row in rows(trained) if "val_l1" in row]
    assert [row["step"] for row in measured] == [0, 3, 6, 9, 12, 15, 16]
    first, last = measured[0], measured[-1]
    assert first["val_l1"] == first["val_l1_raw"]
    assert last["val_l1"] < 0.9 * first["val_l1"]
    assert last["val_psnr"] > first["val_psnr"] + 0.5


def test_the_run_s_folder_is_its_own_and_complete(trained: Path):
    assert trained.name == "test-vae"
    files = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert {
        "config.json", "environment.json", "metrics.jsonl", "run.log", "ledger.txt", "loss.png", "samples/step-000000.png",
        "samples/step-000016.png", "checkpoints/step-000016/decoder.safetensors", "export/test-vae.safetensors", "export/test.safetensors",
    } <= files  # fmt: skip


def test_everything_but_the_decoder_is_exported_as_it_was_bit_for_bit(trained: Path, base: Path):
    before, after = contents(base), contents(trained / "export" / "test.safetensors")
    assert before.keys() == after.keys()
    different = {name for name in before if before[name] != after[name]}
    assert different == {name for name in before if name.startswith(TRAINED)}


def test_the_autoencoder_alone_is_that_of_the_whole_file_under_original_names(trained: Path, base: Path):
    whole = contents(trained / "export" / "test.safetensors")
    prefix = "first_stage_model."
    assert contents(trained / "export" / "test-vae.safetensors") == {
        name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)
    }
    used = open_base(base, trained / "export" / "test-vae.safetensors")
    assert used.digest("vae") == open_base(trained / "export" / "test.safetensors").digest("vae") != open_base(base).digest("vae")


def test_latents_stay_good_with_the_new_decoder(trained: Path, base: Path):
    assert open_base(trained / "export" / "test.safetensors").digest("vae_encoder") == open_base(base).digest("vae_encoder")


def test_what_is_exported_is_the_average_in_the_format_asked_for(trained: Path):
    exported = open_base(trained / "export" / "test.safetensors").component("vae")
    with TensorFile(trained / "checkpoints" / "step-000016" / "ema.safetensors") as file:
        assert {name.split(".")[0] for name in file.tensors} == {"decoder", "post_quant_conv"}
        assert all(torch.equal(exported[name].load(), file.read(name)) for name in file.tensors)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_resumed_run_equals_a_straight_one(tmp_path: Path, base: Path, how: str, monkeypatch: pytest.MonkeyPatch):
    straight = train_vae_run(vae_config(tmp_path, base, name="straight", vae=ADVERSARIAL)).folder
    real = vae_build.vae_step

    def cut_short(parts, batches, step):
        if step == 4 and how == "killed":
            raise KeyboardInterrupt
        report = real(parts, batches, step)
        if step == 3 and how == "stopped":
            os.kill(os.getpid(), signal.SIGINT)
        return report

    monkeypatch.setattr(vae_build, "vae_step", cut_short)
    config = vae_config(tmp_path, base, name=how, vae=ADVERSARIAL)
    with pytest.raises(Interrupted if how == "stopped" else KeyboardInterrupt) as caught:
        train_vae_run(config)
    assert how == "killed" or (caught.value.exit_code, "step 4 of 6" in caught.value.message) == (75, True)
    monkeypatch.undo()
    resumed = train_vae_run(config).folder
    names = ("decoder", "optimizer", "ema", "discriminator", "discriminator-optimizer")
    for file in (*(f"{name}.safetensors" for name in names), "state.json"):
        path = f"checkpoints/step-000006/{file}"
        assert (straight / path).read_bytes() == (resumed / path).read_bytes(), file
    assert (straight / "metrics.jsonl").read_bytes() == (resumed / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in rows(resumed) if "adversarial" in row] == [4, 6]


def test_other_settings_or_pictures_are_not_gone_on_with_unasked(tmp_path: Path, base: Path):
    short = {"length": "2 steps"}
    train_vae_run(vae_config(tmp_path, base, vae=short))
    with pytest.raises(ResumeError, match=r"vae_training\.l1_weight: 1\.0 -> 2\.0"):
        train_vae_run(vae_config(tmp_path, base, vae={**short, "l1_weight": 2.0}))
    free = vae_config(tmp_path, base, vae={**short, "samples_every": "5 steps"}, training={"batch_size": 3}, captions={"dropout_prob": 0.2})
    assert train_vae_run(free).state.step == 2
    next((tmp_path / "pictures").glob("*.png")).unlink()
    with pytest.raises(ResumeError, match="pictures"):
        train_vae_run(vae_config(tmp_path, base, vae=short))
    assert train_vae_run(vae_config(tmp_path, base, vae={"length": "3 steps"}), accept_changes=True).state.step == 3


def test_small_pictures_are_left_out_with_their_reason(tmp_path: Path, base: Path):
    config = vae_config(tmp_path, base, vae={"resolution": 96})
    data = find_data(config)
    assert 0 < len(data.manifest) < 12
    assert data.manifest.sizes_hw.min() >= 96
    assert {one.reason for one in data.manifest.rejected} == {"has a side below vae_training.resolution = 96"}
    with pytest.raises(DataError, match="no picture to train the decoder on") as caught:
        find_data(vae_config(tmp_path, base, vae={"resolution": 512}))
    assert "12 are smaller" in caught.value.hint


def test_held_out_pictures_are_those_of_the_main_run_and_never_trained(tmp_path: Path, tiny_base: Path):
    config = vae_config(tmp_path, tiny_base, validation={"share": 0.3, "max_pictures": 3})
    data, main = find_data(config), cache_run(config)
    held_out = {data.manifest.name(row) for rows in data.held_out for row in rows}
    trained = {data.manifest.name(row) for row in data.stream.rows}
    assert held_out == {main.held_out.names[row] for row in range(len(main.held_out))}
    assert not held_out & trained
    assert len(held_out | trained) == 12


def test_without_a_share_for_validation_trained_pictures_are_measured(tmp_path: Path, base: Path):
    data = find_data(vae_config(tmp_path, base, validation={"share": 0.0}))
    assert len(data.stream.rows) == 12
    assert sum(map(len, data.held_out)) == 2


def test_a_run_has_its_folder_to_itself(tmp_path: Path, base: Path):
    config = vae_config(tmp_path, base)
    with folder_lock(tmp_path / "runs" / "test-vae"), pytest.raises(LockedError):
        train_vae_run(config)


def test_a_perceptual_model_is_looked_at_before_anything_else(tmp_path: Path, base: Path):
    write_tensors(tmp_path / "other.safetensors", {"features.0.weight": torch.zeros(1)})
    config = vae_config(tmp_path, base, vae={"perceptual_model": tmp_path / "other.safetensors", "perceptual_weight": 1.0})
    with pytest.raises(ModelFileError, match="not VGG16"):
        train_vae_run(config)
    assert not (tmp_path / "runs" / "test-vae" / "config.json").exists()


def test_the_config_of_the_folder_is_the_user_s(trained: Path):
    written = json.loads((trained / "config.json").read_text())
    assert written["run"]["name"] == "test"
    assert written.keys() == dump(vae_config(trained, trained)).keys()
