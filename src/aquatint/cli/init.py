"""`init`: the first config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from aquatint.errors import UsageError

PRESETS = "lora-6gb, lora-8gb, full-12gb, full-16gb, full-24gb, full-48gb, full-80gb"
UNKNOWN_GPU_GB = 24


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("run.toml"),
    preset: Annotated[str | None, typer.Option(help=f"What to begin with: {PRESETS}.")] = None,
    vram: Annotated[float | None, typer.Option(metavar="GB", help="The GPU's memory, which chooses the preset.")] = None,
    base: Annotated[Path | None, typer.Option(help="The base model.")] = None,
    pictures: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A folder, table, tar or URL of pictures; may be given again.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The name of the run.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Only what the preset sets, without the other settings.")] = False,
) -> None:
    """Write a commented config to begin with."""
    from aquatint.config.template import render
    from aquatint.storage import write_text

    if path.suffix != ".toml":
        raise UsageError(f"{path} does not end in .toml", hint="choose a name such as run.toml")
    if path.exists():
        raise UsageError(f"{path} exists already", hint="choose another name, or move it away; it is not overwritten")
    changes: dict[str, Any] = {"run.name": run_name(name, path)}
    chosen = choose_preset(preset, vram)
    if base is not None:
        changes["model.base"] = base.absolute()
    changes |= {
        f"data.sources.{index}.path": place if "://" in place else str(Path(place).absolute()) for index, place in enumerate(pictures or [])
    }
    write_text(path, render(chosen, changes, every_setting=not short))
    typer.echo(f"wrote {path} from the preset {chosen.name}")
    missing = [key for key, value in (("model.base", base), ("data.sources", pictures)) if not value]
    edit = f"set {' and '.join(missing)} in it, then " if missing else ""
    typer.echo(f"next: {edit}run `aquatint check {path}`")


def run_name(name: str | None, path: Path) -> str:
    """The name asked for, or one made of the file's. Raises UsageError."""
    from aquatint.config.describe import table
    from aquatint.config.words import wrong_value

    allowed = table().settings["run.name"].schema["pattern"]
    if name is None:
        likely = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")
        return likely if re.match(allowed, likely) else "run"
    if not re.match(allowed, name):
        message, hint = wrong_value("run.name", name)
        raise UsageError(message, hint=hint)
    return name


def choose_preset(preset: str | None, vram: float | None) -> Any:
    """The preset of that name, or for that much GPU memory, or for this computer's GPU. Raises UsageError."""
    from aquatint.cli.doctor import find_gpus
    from aquatint.config.template import load_preset, preset_for, preset_names
    from aquatint.config.words import nearest

    if preset is not None:
        if preset not in preset_names():
            guess = nearest(preset, preset_names())
            hint = f"did you mean {guess}? " if guess else ""
            raise UsageError(f"there is no preset {preset}", hint=f"{hint}there are {', '.join(preset_names())}")
        return load_preset(preset)
    if vram is None:
        gpus = find_gpus()
        vram = max((gpu.memory_gib for gpu in gpus), default=UNKNOWN_GPU_GB)
        found = f"the GPU here has {vram:.0f} GB" if gpus else f"found no GPU here, so the config is for one with {UNKNOWN_GPU_GB} GB"
        typer.echo(f"{found}; choose another size with --vram")
    chosen = preset_for(round(vram))
    if chosen is None:
        raise UsageError(
            f"a GPU with {vram:g} GB is too small to train SDXL",
            hint="8 GB are needed for a LoRA, and 12 for the whole model; "
            f"`aquatint init --preset {preset_names()[0]}` writes that config anyway",
        )
    return chosen
