import weakref
from types import SimpleNamespace

import pytest
import torch

from aquatint.config.schema import Config
from aquatint.diffusion.schedule import sdxl_schedule
from aquatint.errors import UsageError
from aquatint.models.sdxl.model import build_unet
from aquatint.optim.clipping import Clipping
from aquatint.optim.create import create_optimizer
from aquatint.optim.fused import FusedBackward
from aquatint.planning.trace import with_fake_weights
from aquatint.tensor_file import TensorFile
from aquatint.training import dry_step as dry
from aquatint.training.build import train_run
from aquatint.training.dry_step import Reserve, Size, dry_step, longest_tokens, random_batch, state_held, wants_dry_step
from aquatint.training.objective import Objective
from aquatint.training.step import Parts
from tests.planning.small import small_spec
from tests.runs import rows, small_config

SIZE = Size(batch_size=2, height=64, width=96, tokens=154, widths=(40, 24))
NOTHING = Reserve(0, 0)


def parts_of(unet, *, fused=False) -> Parts:
    optimizer = create_optimizer("adafactor", unet.named_parameters(), seed=0, learning_rate=1.0, weight_decay=0.0)
    clipping = Clipping("delayed", 1.0)
    return Parts(
        unet=unet, optimizer=optimizer, ema=None, objective=Objective(sdxl_schedule(zero_terminal_snr=False), "epsilon", torch.ones(1000)),
        learning_rate=lambda step: 1.0, autocast=False, clipping=clipping, device=torch.device("cpu"),
        fused=FusedBackward(optimizer, clipping) if fused else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def unet():
    module = with_fake_weights(build_unet(small_spec()), torch.float32)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(0))
    module.enable_gradient_checkpointing()
    return module.train()


def test_the_batch_has_the_shapes_of_the_run():
    batch = random_batch(SIZE, torch.device("cpu"))
    assert batch.latents.shape == batch.noise.shape == (2, 4, 8, 12)
    assert batch.prompt_embeds.shape == (2, 154, 40)
    assert batch.pooled_prompt_embeds.shape == (2, 24)
    assert batch.time_ids.tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    assert {tensor.dtype for tensor in (batch.latents, batch.noise, batch.prompt_embeds, batch.time_ids)} == {torch.float32}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_it_leaves_weights_state_gradients_and_random_numbers_as_they_were(unet, fused, accumulation_steps):
    parts = parts_of(unet, fused=fused)
    before, state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}, torch.get_rng_state()
    dry_step(parts, SIZE, accumulation_steps, Reserve(1 << 20, 8), lambda: "")
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None for weight in unet.parameters())
    assert not parts.optimizer.state
    assert parts.clipping.previous_norm == 0
    hooks = [weight._post_accumulate_grad_hooks for weight in unet.parameters()]
    assert {len(one or ()) for one in hooks} == {1 if fused else 0}
    if parts.fused is not None:
        parts.fused.remove()


def test_gradients_are_freed_one_by_one_only_where_the_run_frees_them(unet, monkeypatch):
    most = {}
    for fused in (False, True):
        parts, alive = parts_of(unet, fused=fused), []
        count = lambda *_, alive=alive: alive.append(sum(w.grad is not None for w in unet.parameters()))  # noqa: E731
        monkeypatch.setattr(dry, "room", count)
        dry_step(parts, SIZE, 1, Reserve(0, 1), lambda: "")
        most[fused] = max(alive)
        if parts.fused is not None:
            parts.fused.remove()
    assert most[True] < 5
    assert most[False] == len(list(unet.parameters()))


def test_room_is_taken_for_the_state_that_is_not_there_yet(unet, monkeypatch):
    taken = []
    monkeypatch.setattr(dry, "room", lambda device, num_bytes: taken.append(num_bytes))
    parts = parts_of(unet)
    with state_held(parts, Reserve(1000, 0)):
        pass
    weight = next(unet.parameters())
    parts.optimizer.state[weight] = {"step": torch.zeros(()), "exp_avg_sq": torch.zeros(99)}
    with state_held(parts, Reserve(1000, 0)):
        pass
    assert taken == [1000, 600]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"), MemoryError()],
)
def test_running_out_of_memory_is_a_usage_error_with_the_planners_advice(unet, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(dry, "one_pass", fail)
    with pytest.raises(UsageError, match="a batch of 2 with 96 × 64 pixels and 154 tokens does not fit") as caught:
        dry_step(parts_of(unet), SIZE, 1, NOTHING, lambda: "set this")
    assert caught.value.hint == "set this"
    assert "more" not in caught.value.message


def test_what_does_not_fit_leaves_nothing_in_memory_for_the_next_try(unet, monkeypatch):
    def no_room(device, num_bytes):
        if num_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dry, "room", no_room)
    seen = []
    hook = unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(output)))
    parts = parts_of(unet, fused=True)
    assert dry.out_of_memory(parts, SIZE, 1, Reserve(0, 1)) == "CUDA out of memory"
    assert [ref() for ref in seen] == [None]
    hook.remove()
    parts.fused.remove()


def test_the_most_memory_that_it_names_is_its_own_and_not_that_of_what_was_tried_before(monkeypatch, capsys):
    taken = [40 << 30]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: taken.clear())
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: max(taken))
    monkeypatch.setattr(dry, "dry_step", lambda *_: taken.append(10 << 30))
    monkeypatch.setattr(dry, "largest_size", lambda *_: SIZE)
    monkeypatch.setattr(dry, "reserve_of", lambda *_: NOTHING)
    config = Config.model_validate({"model": {"base": "base"}, "data": {"sources": [{"path": "pictures"}]}})
    dry.try_step(config, None, None, SimpleNamespace(device=torch.device("cuda")))
    assert "it fits, with 10.00 GiB at most\n" in capsys.readouterr().err


def test_other_errors_pass_through(unet, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(dry, "one_pass", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        dry_step(parts_of(unet), SIZE, 1, NOTHING, lambda: "")


def test_the_longest_text_decides_about_the_tokens():
    assert longest_tokens([]) == longest_tokens(["", "a cat"]) == 77
    assert longest_tokens(["a", "word " * 100, "b"]) == 154


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [("auto", "cuda", True), ("auto", "cpu", False), (True, "cpu", True), (False, "cuda", False)],
)
def test_without_a_word_on_it_only_gpus_are_tried(setting, device, expected):
    config = Config.model_validate({
        "model": {"base": "base"}, "data": {"sources": [{"path": "pictures"}]}, "training": {"dry_step": setting},
    })  # fmt: skip
    assert wants_dry_step(config, torch.device(device)) is expected


def test_a_run_is_the_same_with_it_and_without(tiny_base, tmp_path, capsys):
    found = []
    for name in ("with", "without"):
        fused = {"length": "3 steps", "fused_backward": True, "clip": "delayed", "gradient_checkpointing": True}
        config = small_config(
            tmp_path, tiny_base, run={"name": name}, training={**fused, "dry_step": name == "with"},
            validation={"every": None, "share": 0.0}, tracking={"log_every": "1 step"},
        )  # fmt: skip
        result = train_run(config)
        with TensorFile(result.exported[0]) as file:
            tensors = {key: file.read(key) for key in file.tensors}
        found.append(([row["loss"] for row in rows(result.folder) if "loss" in row], tensors))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(tensor, found[1][1][key]) for key, tensor in found[0][1].items())
    assert "dry step    2 × 64 × 64 pixels, 77 tokens: it fits\n" in capsys.readouterr().err
