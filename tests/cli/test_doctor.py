import subprocess
from types import SimpleNamespace

import pytest

from aquatint.cli import doctor
from aquatint.cli.doctor import Gpu, doctor_text, find_gpus, parse_gpu


def lines(text):
    return {line[2:].split("  ")[0].strip(): line for line in text.splitlines() if line[2:3].strip()}


def test_the_report_names_versions_gpu_memory_and_disk(tmp_path):
    found = lines(doctor_text(tmp_path))
    assert {"aquatint", "python", "torch", "diffusers", "wandb", "disk"} <= set(found)
    assert str(tmp_path) in found["disk"]


def test_what_needs_a_look_is_marked_counted_and_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "find_gpus", list)
    monkeypatch.setattr(doctor, "installed", lambda package: None if package in ("matplotlib", "wandb") else "1.0")
    text = doctor_text(tmp_path)
    assert lines(text)["matplotlib"].startswith("! ")
    assert lines(text)["wandb"].startswith("  "), "optional packages may be missing"
    assert text.count("! ") == text.count("-> ")
    assert text.splitlines()[-1].split()[0] == str(text.count("-> "))


def test_a_line_of_the_driver_is_read():
    assert parse_gpu("NVIDIA GeForce RTX 3060, 12288, 11264, 550.54.14") == Gpu("NVIDIA GeForce RTX 3060", 12.0, 11.0, "550.54.14")
    assert parse_gpu("NVIDIA GB10, [N/A], [N/A], 580.1") is None
    assert parse_gpu("") is None


@pytest.mark.parametrize(
    "failure", [subprocess.CalledProcessError(9, "nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 10), OSError()]
)
def test_a_driver_that_does_not_answer_counts_as_none(monkeypatch, failure):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", fail)
    assert find_gpus() == []


def test_gpus_are_listed_as_the_driver_names_them(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="A, 24576, 24000, 1\nB, 81559, 81000, 1\n"))
    assert [gpu.name for gpu in find_gpus()] == ["A", "B"]


@pytest.mark.parametrize(
    ("gpu", "advice"),
    [
        (Gpu("small", 8.0, 8.0, "1"), "12 GB or more"),
        (Gpu("busy", 24.0, 12.0, "1"), "close other programs"),
        (Gpu("fine", 24.0, 23.5, "1"), ""),
    ],
)
def test_a_gpu_gets_advice_if_it_needs_some(monkeypatch, gpu, advice):
    monkeypatch.setattr(doctor, "find_gpus", lambda: [gpu])
    finding = next(doctor.check_gpu())
    assert advice in finding.advice
    assert bool(finding.advice) == bool(advice)


def test_a_torch_for_cpus_beside_a_gpu_is_pointed_out(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install the CUDA version" in doctor.check_torch(driver=True).advice
    assert doctor.check_torch(driver=False).advice == ""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the GPU driver" in doctor.check_torch(driver=True).advice


@pytest.mark.parametrize(("capability", "advice"), [((7, 5), "slow"), ((8, 6), ""), ((9, 0), "")])
def test_a_gpu_without_bf16_is_pointed_out(monkeypatch, capability, advice):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert advice in doctor.check_torch(driver=True).advice
    assert bool(doctor.check_torch(driver=True).advice) == bool(advice)
