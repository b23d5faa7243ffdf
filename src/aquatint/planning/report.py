"""The plan of a run as text: steps, memory, time and disk, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from aquatint.config.schema import Config
from aquatint.config.sections.data import SourceSection
from aquatint.data.downloads import is_url, public_name
from aquatint.models.sdxl.load import open_base
from aquatint.models.sdxl.model import ModelSpec, sdxl_spec
from aquatint.planning import groups
from aquatint.planning.batch import is_open, with_batch_size
from aquatint.planning.disk import plan_disk
from aquatint.planning.fit import Help, mild_helps
from aquatint.planning.forecast import forecast_lines
from aquatint.planning.knobs import changes_text
from aquatint.planning.main_memory import MainMemory, machine_bytes, plan_main_memory, shortage
from aquatint.planning.memory import MemoryPlan, Part, Tracer, gib, plan_memory
from aquatint.planning.schedule import StepPlan, count, expected_held_out, number, plan_steps
from aquatint.planning.sources import is_remote, list_source, repeats_of, sources_of
from aquatint.planning.trained import check_groups, trainable_shapes

NAME_WIDTH, SIZE_WIDTH = 28, 11


def plan_text(config: Config) -> str:
    """Everything that can be known beforehand. Needs neither weights nor a GPU. Raises UsageError for an unusable base."""
    spec, remark = find_spec(config)
    check_groups(config, spec)
    remarks = [remark] if remark else []
    if is_open(config):
        config = with_batch_size(config, 1)
        remarks.append('`training.batch_size = "auto"`: this is for one picture at a time, and `--vram 24GiB` says how many a card takes')
    pictures = [0 if is_remote(source) else list_source(source).num_pictures for source in sources_of(config)]
    tracer, steps = Tracer(spec), plan_of_steps(config, pictures)
    total, apart = sum(pictures), pictures_of(config, pictures, "validation")
    memory, least = plan_memory(config, spec, tracer), list(mild_helps(config, spec, tracer))
    blocks = [
        [f"Plan of `{config.run.name}`", *remarks],
        ["Steps", *steps_lines(config, pictures, steps)],
        ["What is trained", *groups.table(config, trainable_shapes(config, spec))],
        [place(memory), *memory_lines(memory, config.training.at_once), *saving_lines(least)],
        [all_in_all(memory), *main_memory_lines(plan_main_memory(config, spec, memory), machine_bytes())],
        ["Time", *(forecast_lines(config, tracer, steps, total, apart) if steps else ["unknown without pictures"])],
        ["Disk", *table(plan_disk(config, spec, total, steps))],
    ]
    return "\n\n".join("\n".join([block[0], *(f"  {line}".rstrip() for line in block[1:])]) for block in blocks) + "\n"


def find_spec(config: Config) -> tuple[ModelSpec, str]:
    """The sizes of the base model, and a remark if they had to be assumed. Raises ModelFileError."""
    if config.model.base.exists():
        return open_base(config.model.base, config.model.vae).spec, ""
    return sdxl_spec(), f"{config.model.base} is not there: the sizes are those of SDXL 1.0"


def pictures_of(config: Config, pictures: Sequence[int], role: str) -> int:
    """How many of the pictures found in each source are in those with this role."""
    return sum(found for source, found in zip(config.data.sources, pictures, strict=True) if source.role == role)


def held_out_pictures(config: Config, pictures: Sequence[int]) -> int:
    """About how many are not trained: those of sources for validation, or else a share of all but those for regularization."""
    section = config.validation
    share = section.share if section.every is not None else 0.0
    apart = pictures_of(config, pictures, "validation")
    return apart or expected_held_out(pictures_of(config, pictures, "train"), share=share, max_pictures=section.max_pictures)


def trained_pictures(config: Config, pictures: Sequence[int]) -> list[int]:
    """About how many of the pictures found in each source are trained."""
    own, apart = (pictures_of(config, pictures, role) for role in ("train", "validation"))
    kept = Fraction(own - held_out_pictures(config, pictures), own) if own and not apart else Fraction(1)
    shares = {"train": kept, "regularization": 1, "validation": 0}
    return [round(found * shares[source.role]) for source, found in zip(config.data.sources, pictures, strict=True)]


def plan_of_steps(config: Config, pictures: Sequence[int]) -> StepPlan | None:
    """The steps of the run, or None if there is nothing to train on. `pictures` are the files found in each source."""
    counts = trained_pictures(config, pictures)
    if not any(counts):
        return None
    samples = max(1, round(sum(found * times for found, times in zip(counts, repeats_of(config, counts), strict=True))))
    training = config.training
    return plan_steps(samples, training.at_once, training.accumulation_steps, training.length)


def steps_lines(config: Config, pictures: Sequence[int], steps: StepPlan | None) -> list[str]:
    """From pictures to steps."""
    found = zip(config.data.sources, pictures, strict=True)
    lines = [f"{public_name(source.path)}: {_uses(source, number_found)}" for source, number_found in found]
    apart = pictures_of(config, pictures, "validation")
    if not apart and (held_out := held_out_pictures(config, pictures)):
        lines.append(f"about {count(held_out, 'picture')} of these for validation only")
    return [*lines, *(steps.lines() if steps else ["there is nothing to train on yet"])]


def _uses(source: SourceSection, found: int) -> str:
    """How often the pictures of a source are shown."""
    if is_url(source.path):
        return "not counted before the run begins"
    if source.role == "validation":
        return f"{count(found, 'picture')} for validation only"
    if source.share is not None:
        return f"{count(found, 'picture')}, {source.share:.0%} of all samples"
    times = f"{number(source.repeats)} {'repeat' if source.repeats == 1 else 'repeats'}"
    return f"{count(found, 'picture')} × {times} = {found * source.repeats:,.0f}"


def memory_lines(plan: MemoryPlan, batch_size: int) -> list[str]:
    """Every phase with its parts, and the card that it takes."""
    height, width = plan.size_hw
    lines = [f"an estimate, for the largest bucket ({width} × {height} pixels) and a batch of {batch_size}"]
    for phase in plan.phases:
        mark = "  <- the most" if phase is plan.largest and len(plan.phases) > 1 else ""
        lines += ["", f"{phase.name:<{NAME_WIDTH}}{gib(phase.bytes):>{SIZE_WIDTH}}{mark}"]
        lines += [f"  {line}" for line in table(phase.parts, NAME_WIDTH - 2)]
    if not plan.on_gpu:
        return [*lines, "", f"with about {gib(plan.outside)} for the program itself {gib(plan.needed)}; workers of the loader not counted"]
    card = f"a card with {plan.card_gib} GB should do" if plan.card_gib else "no single card has that much"
    return [*lines, "", f"with about {gib(plan.outside)} for the driver and what the allocator cannot use, {card}"]


def place(plan: MemoryPlan) -> str:
    """Whose memory a plan is about."""
    return "GPU memory" if plan.on_gpu else "Main memory"


def all_in_all(plan: MemoryPlan) -> str:
    """What main memory is called where the run itself may be in it."""
    return "Main memory" if plan.on_gpu else "Main memory, all in all"


def main_memory_lines(found: MainMemory, machine: int | None) -> list[str]:
    """What is in main memory at its fullest, and whether a machine with so much will do."""
    copy = f"; {gib(found.copy)} more, where they are free, hold what is saved while training goes on" if found.copy else ""
    lines = [*table(found.parts), f"together {gib(found.bytes)}{copy}"]
    lack = shortage(found, machine)
    return [*lines, f"warning: {lack}"] if lack else lines


def saving_lines(found: Sequence[Help]) -> list[str]:
    """What would make it less."""
    if not found:
        return []
    return [
        "",
        "to need less (all in all, with each alone):",
        *(f"  {gib(saving.plan.needed):>{SIZE_WIDTH}}   {changes_text(saving.level.changes)} ({saving.level.price})" for saving in found),
        "`--fit 12GiB` finds what to change for a card with 12 GB",
    ]


def table(parts: Sequence[Part], width: int = NAME_WIDTH) -> list[str]:
    """One line per part."""
    return [f"{part.name:<{width}}{gib(part.bytes):>{SIZE_WIDTH}}   {part.note}".rstrip() for part in parts]
