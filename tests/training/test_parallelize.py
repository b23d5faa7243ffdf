import subprocess
import sys
import textwrap

import pytest
import torch

from aquatint.errors import UsageError
from aquatint.models.sdxl import speed as ways
from aquatint.training import parallelize
from aquatint.training.parallelize import Speed, choose_device, ready_for_training, trained_parameters, weight_dtype


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2).requires_grad_(False)
        self.checkpointing = False

    def enable_gradient_checkpointing(self, function: object = None) -> None:
        self.checkpointing = True if function is None else "pointwise"


@pytest.mark.parametrize("checkpointing", [True, "pointwise", False])
def test_every_weight_is_trained_and_activations_are_recomputed_if_asked(checkpointing):
    net = ready_for_training(Net().eval(), gradient_checkpointing=checkpointing, device=torch.device("cpu"))
    assert all(p.requires_grad for p in net.parameters())
    assert net.training
    assert net.checkpointing == checkpointing


def test_what_is_frozen_is_not_trained():
    net = ready_for_training(Net(), gradient_checkpointing=False, device=torch.device("cpu"), frozen=["layer.bias"])
    assert list(trained_parameters(net)) == ["layer.weight"]


def test_weights_are_half_precision_only_in_pure_bf16():
    assert weight_dtype("bf16_pure") == torch.bfloat16
    assert weight_dtype("bf16_mixed") == weight_dtype("fp32") == torch.float32


def test_a_gpu_that_is_not_there_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="no CUDA GPU"):
        choose_device("cuda")


def test_the_unet_is_rearranged_when_it_is_frozen_and_compiled_when_it_is_checkpointed(monkeypatch: pytest.MonkeyPatch):
    done: list[tuple[object, ...]] = []
    for way in ("use_channels_last", "use_kernels", "use_fused_qkv"):
        monkeypatch.setattr(
            ways, way, lambda net, way=way, **settings: done.append((way, net.layer.bias.requires_grad, *settings.values()))
        )
    monkeypatch.setattr(ways, "can_compile_exactly", lambda: True)
    monkeypatch.setattr(ways, "compile_blocks", lambda net, num_shapes: done.append(("compile_blocks", (num_shapes, net.checkpointing))))
    speed = Speed(channels_last=True, kernels=True, fused_qkv=True, compile="blocks", num_shapes=9)
    settings = {"device": torch.device("cpu"), "frozen": ["layer.bias"], "speed": speed}
    ready_for_training(Net(), gradient_checkpointing=True, **settings)
    rearranged = [("use_channels_last", False), ("use_kernels", False, False), ("use_fused_qkv", False)]
    assert done == [*rearranged, ("compile_blocks", (9, True))]


@pytest.mark.parametrize("speed", [Speed(kernels=True), Speed(compile="blocks")])
def test_kernels_for_a_gpu_without_triton_are_refused_with_advice(speed: Speed, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallelize, "has_kernels", lambda device: False)
    with pytest.raises(UsageError, match="needs Triton"):
        ready_for_training(Net(), gradient_checkpointing=False, device=torch.device("cuda"), speed=speed)


def test_a_torch_that_may_compile_otherwise_the_next_time_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ways, "can_compile_exactly", lambda: False)
    with pytest.raises(UsageError, match="other arithmetic the next time"):
        ready_for_training(Net(), gradient_checkpointing=False, device=torch.device("cpu"), speed=Speed(compile="blocks"))


@pytest.mark.parametrize(("limit", "asked"), [(24, [("trim", 1 << 30), ("mmap", 1 << 25)]), (23, [("mmap", 1 << 20)])])
def test_freed_memory_is_kept_for_a_small_model_and_returned_for_a_large_one(limit, asked, monkeypatch: pytest.MonkeyPatch):
    """Of six float32 weights, 24 bytes."""
    told: list[tuple[str, int]] = []
    names = {parallelize.M_TRIM_THRESHOLD: "trim", parallelize.M_MMAP_THRESHOLD: "mmap"}
    monkeypatch.setattr(parallelize, "tell_glibc", lambda option, value: told.append((names[option], value)))
    monkeypatch.setattr(parallelize, "LARGE_MODEL_BYTES", limit)
    ready_for_training(Net(), gradient_checkpointing=False, device=torch.device("cpu"))
    assert told == asked


@pytest.mark.long
def test_kept_memory_is_taken_again_without_fresh_pages():
    """200 MB in pieces of 2 MB are 50,000 pages. In a process of its own: the switch cannot be undone."""
    script = """
        import resource
        import torch
        from aquatint.training.parallelize import keep_freed_memory

        def fresh_pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            [torch.zeros(1 << 19) + 1 for _ in range(100)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        keep_freed_memory()
        print(fresh_pages(), fresh_pages())
    """
    output = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True).stdout
    first, second = map(int, output.split())
    assert first > 40_000
    assert second < 1000


def test_freed_tensors_go_back_to_the_system():
    """After the switch, 200 MB in pieces of 2 MB leave nothing behind. In a process of its own: the switch cannot be undone."""
    script = """
        import torch
        from aquatint.training.parallelize import return_freed_memory

        def resident_mb():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024

        return_freed_memory()
        before = resident_mb()
        tensors = [torch.zeros(1 << 19) + 1 for _ in range(100)]
        kept = [torch.zeros(1000) for _ in range(100)]
        held = resident_mb() - before
        del tensors
        print(held, resident_mb() - before)
    """
    output = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True).stdout
    held, left = map(float, output.split())
    assert held > 150
    assert left < 20
