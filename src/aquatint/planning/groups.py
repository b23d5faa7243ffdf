"""What `[[training.groups]]` makes of the tensors that are trained: which are frozen, which have rates of their own, and a table of it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import prod

from aquatint.config.check import Finding
from aquatint.config.schema import Config
from aquatint.models.adapter_shapes import NAME
from aquatint.models.sdxl.shapes import Shape, is_text
from aquatint.optim.groups import GroupSettings, first_fit, fits

MAX_SUGGESTED = 3
COLUMNS = ("part", "tensors", "weights", "learning rate", "weight decay", "")


def matched_name(name: str) -> str:
    """The name that patterns are held against: of a part of an adapter, that of the weight beside it."""
    layer, mark, _ = name.rpartition(f".{NAME}.")
    return f"{layer}.weight" if mark else name


def group_of(config: Config, names: Collection[str]) -> dict[str, int]:
    """The group, by its place in `training.groups`, of those tensors that one fits."""
    groups = config.training.groups
    found = first_fit({matched_name(name) for name in names}, [group.match for group in groups]) if groups else {}
    return {name: found[matched_name(name)] for name in names if matched_name(name) in found}


def settings_of(config: Config, index: int | None, *, text: bool = False) -> GroupSettings:
    """How the tensors of a group are trained, or with None those of no group, which for `text` encoders is a way of their own."""
    usual = config.optimizer.weight_decay
    if index is None:
        return GroupSettings(config.text_encoders.learning_rate_factor if text else 1.0, usual)
    group = config.training.groups[index]
    return GroupSettings(group.learning_rate_factor, usual if group.weight_decay is None else group.weight_decay)


def own_settings(config: Config, names: Collection[str]) -> dict[str, GroupSettings]:
    """What is asked for of those tensors that a group fits, and of all others of text encoders."""
    groups = group_of(config, names)
    return {name: settings_of(config, groups.get(name), text=is_text(name)) for name in names if name in groups or is_text(name)}


def frozen_names(config: Config, names: Collection[str]) -> frozenset[str]:
    """Those tensors that `training.groups` freezes."""
    return frozenset(name for name, settings in own_settings(config, names).items() if settings.is_frozen)


def group_findings(config: Config, trainable: Collection[str]) -> Iterator[Finding]:
    """What is wrong with `training.groups` for a model in which these tensors could be trained."""
    groups, names = config.training.groups, {matched_name(name) for name in trainable}
    unknown = [(index, one) for index, group in enumerate(groups) for one in group.match if not any(fits(name, one) for name in names)]
    for index, pattern in unknown:
        whole = "the UNet or a trained text encoder" if config.text_encoders.train else "the UNet"
        what = whole if config.adapter.kind == "none" else "the layers that have an adapter"
        yield Finding((f"training.groups.{index}.match",), f'"{pattern}" fits no tensor of {what}', suggestion(pattern, nameable(names)))
    used = {*group_of(config, trainable).values(), *(index for index, _ in unknown)}
    for index in sorted(set(range(len(groups))) - used):
        message = f"earlier groups have all that `training.groups.{index}` fits"
        yield Finding((f"training.groups.{index}.match",), message, "the first group that fits a tensor counts: put it before them")
    if groups and not unknown and len(frozen_names(config, trainable)) == len(trainable):
        message = "`training.groups` freezes everything"
        yield Finding(("training.groups",), message, "nothing would be trained: leave out what is to learn")


def nameable(names: Iterable[str]) -> list[str]:
    """What patterns are made of: blocks, layers, tensors, and kinds of layers as `*.attn2`."""
    parts = [name.split(".") for name in names]
    whole = {".".join(one[:length]) for one in parts for length in range(1, len(one) + 1)}
    return [*sorted(whole, key=len), *sorted({f"*.{part}" for one in parts for part in one[1:] if not part.isdecimal()})]


def suggestion(pattern: str, known: Sequence[str]) -> str:
    """A hint for a pattern that fits nothing."""
    near = difflib.get_close_matches(pattern.removesuffix(".*"), known, n=MAX_SUGGESTED)
    meant = " or ".join(f'"{one}"' for one in near)
    return f"{f'did you mean {meant}? ' if near else ''}docs/groups.md lists the names"


# the table


def block_of(name: str) -> str:
    """The block of a tensor: `conv_in`, `down_blocks.0`, `mid_block` and so on, or the text encoder that it is of."""
    first, second = name.split(".")[:2]
    return f"{first}.{second}" if second.isdecimal() else first


def table(config: Config, shapes: Mapping[str, Shape]) -> list[str]:
    """How each block is trained, in columns; a block that several groups share has several rows.

    Without groups, there is one row for everything, or one for each network if text encoders are trained. The decay is that of
    matrices and convolutions: norms and biases have none.
    """
    groups = group_of(config, shapes)
    sizes: dict[tuple[str, int | None], list[int]] = {}
    for name, shape in shapes.items():
        block = block_of(name) if config.training.groups or is_text(name) else "the UNet" if config.text_encoders.train else "everything"
        sizes.setdefault((block, groups.get(name)), []).append(prod(shape))
    return in_columns([COLUMNS, *(_cells(config, block, index, found) for (block, index), found in sizes.items())])


def _cells(config: Config, block: str, index: int | None, sizes: Sequence[int]) -> tuple[str, ...]:
    settings, learning_rate = settings_of(config, index, text=is_text(block)), config.optimizer.learning_rate
    rates = ("frozen", "") if settings.is_frozen else (f"{learning_rate * settings.factor:g}", f"{settings.weight_decay:g}")
    return (block, f"{len(sizes):,}", f"{sum(sizes):,}", *rates, "" if index is None else " ".join(config.training.groups[index].match))


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: numbers to the right, the first and the last column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *numbers, last in rows:
        middle = "".join(f"{cell:>{width + 3}}" for cell, width in zip(numbers, widths[1:-1], strict=True))
        lines.append(f"{first:<{widths[0]}}{middle}   {last}".rstrip())
    return lines
