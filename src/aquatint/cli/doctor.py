"""What `doctor` says about this computer, with plain advice."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GIB = 1 << 30
NEEDED = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow", "pydantic", "ruamel.yaml", "typer", "rich", "matplotlib")
OPTIONAL = {"tensorboard": "tensorboard", "wandb": "wandb", "s3fs": "remote", "ray": "ray", "smartcrop": "focus"}  # package -> extra
MIN_VRAM_GIB = 12
MIN_MEMORY_GIB = 16
MIN_DISK_GIB = 60
MIN_SHARED_GIB = 1
BF16_CAPABILITY = (8, 0)  # Ampere: RTX 30, A100


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver sees it."""

    name: str
    memory_gib: float
    free_gib: float
    driver: str


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` says what to do, and is empty if all is well."""

    topic: str
    fact: str
    advice: str = ""


def doctor_text(folder: Path) -> str:
    """The report, for a run in `folder`."""
    findings = [*check_packages(), *check_gpu(), *check_memory(), *check_disk(folder)]
    width = max(len(finding.topic) for finding in findings) + 2
    rows = []
    for finding in findings:
        rows.append(f"{'! ' if finding.advice else '  '}{finding.topic:<{width}}{finding.fact}")
        rows += [f"  {'':<{width}}-> {finding.advice}"] if finding.advice else []
    count = sum(bool(finding.advice) for finding in findings)
    verdict = f"{count} thing{'s' if count > 1 else ''} to look at, marked with !" if count else "everything is in order"
    return "\n".join([*rows, "", verdict])


def check_packages() -> Iterator[Finding]:
    """Versions of what is installed, without importing it."""
    yield Finding("aquatint", installed("aquatint") or "not installed as a package")
    yield Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    for package in NEEDED:
        found = installed(package)
        yield Finding(package, found or "missing", "" if found else "install aquatint again: `pip install .`")
    for package, extra in OPTIONAL.items():
        yield Finding(package, installed(package) or f"not installed (optional: `pip install aquatint[{extra}]`)")


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def find_gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this computer, as `nvidia-smi` lists them; none if there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [gpu for line in output.splitlines() if (gpu := parse_gpu(line))]


def parse_gpu(line: str) -> Gpu | None:
    """One line of `nvidia-smi`, with memory in MiB; None for what is not one."""
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    return Gpu(parts[0], int(parts[1]) / 1024, int(parts[2]) / 1024, parts[3])


def check_gpu() -> Iterator[Finding]:
    """What the driver sees, and whether torch can use it."""
    gpus = find_gpus()
    for index, gpu in enumerate(gpus):
        busy = gpu.memory_gib - gpu.free_gib
        advice = ""
        if gpu.memory_gib < MIN_VRAM_GIB - 0.5:
            advice = f"training all of SDXL needs a GPU with {MIN_VRAM_GIB} GB or more"
        elif busy > gpu.memory_gib / 10:
            advice = f"{busy:.1f} GiB of it are in use: close other programs that use the GPU"
        yield Finding(f"gpu {index}", f"{gpu.name}, {gpu.memory_gib:.1f} GiB, driver {gpu.driver}", advice)
    if not gpus:
        yield Finding("gpu", "none found", "the demo runs without one; real training takes an NVIDIA GPU and its driver")
    if installed("torch"):
        yield check_torch(driver=bool(gpus))


def check_torch(*, driver: bool) -> Finding:
    """Whether torch sees the GPU, and whether that one has bf16. `driver`: whether the driver sees one."""
    try:
        import torch
    except Exception as error:  # whatever a broken installation may raise: it is what the report is for
        return Finding("torch", f"cannot be imported ({type(error).__name__}: {error})", "install torch again, see pytorch.org")
    if not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            advice = "this torch is for CPUs only: install the CUDA version, see pytorch.org" if driver else ""
            return Finding("torch", "built for CPUs", advice)
        return Finding("torch", f"built for CUDA {torch.version.cuda}, but sees no GPU", "update the GPU driver" if driver else "")
    capability = torch.cuda.get_device_capability()
    slow = "" if capability >= BF16_CAPABILITY else "this GPU has no fast bf16: training works, but is slow"
    return Finding("torch", f"sees {torch.cuda.device_count()} GPU(s), CUDA {torch.version.cuda}", slow)


def check_memory() -> Iterator[Finding]:
    """Main memory, and the shared memory through which loader workers hand over batches."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB if sys.platform != "win32" else 0
    if total:
        advice = "" if total >= MIN_MEMORY_GIB - 1 else "loading SDXL takes about 12 GB; use `ema.enabled = false` and few loader workers"
        yield Finding("main memory", f"{total:.1f} GiB", advice)
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / GIB
        advice = "" if size >= MIN_SHARED_GIB else "in Docker, start with `--shm-size=2g`, or set `loader.workers = 0`"
        yield Finding("shared memory", f"{size:.1f} GiB", advice)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Free space, and whether files can be made."""
    free = shutil.disk_usage(folder).free / GIB
    small = f"a run takes 20 to {MIN_DISK_GIB} GiB; `aquatint plan` says how much" if free < MIN_DISK_GIB else ""
    advice = small if os.access(folder, os.W_OK) else "this user cannot write here: choose another folder"
    yield Finding("disk", f"{free:.1f} GiB free in {folder}", advice)
