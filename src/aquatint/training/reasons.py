"""Why something has to be encoded anew: what was wanted last time is remembered, and compared with what is wanted now.

Only for people: whether an entry is in the cache is decided by its key alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from aquatint.errors import ModelFileError, StorageError
from aquatint.tensor_file import TensorFile, write_tensors

Bytes = npt.NDArray[np.uint8]
_RECIPE_KEY = "aquatint.recipe"


@dataclass(frozen=True)
class Wanted:
    """What a cache was asked for: the name of each row's picture as a digest (n, 16), the parts that may differ from row
    to row (n, bytes each), and what is the same for all, in words. The words of both are reasons: "its file changed".
    """

    names: Bytes
    parts: Mapping[str, Bytes]
    recipe: Mapping[str, str]


def name_digests(names: Sequence[str]) -> Bytes:
    """(n, 16)."""
    digests = b"".join(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest() for name in names)
    return np.frombuffer(digests, np.uint8).reshape(-1, 16).copy()


def reasons(now: Wanted, before: Wanted | None, missing: npt.NDArray[np.int64]) -> Counter[str]:
    """How many of the rows `missing` are not in the cache for which reason."""
    if before is None or not len(before.names):
        return Counter({"new": len(missing)} if len(missing) else {})
    changed = [reason for reason, value in now.recipe.items() if before.recipe.get(reason) != value]
    if changed:
        return Counter({" and ".join(changed): len(missing)} if len(missing) else {})
    order = np.argsort(_as_one(before.names), kind="stable")
    place = np.searchsorted(_as_one(before.names)[order], _as_one(now.names[missing]))
    place = order[np.minimum(place, len(order) - 1)]
    known = (before.names[place] == now.names[missing]).all(axis=1)
    found: Counter[str] = Counter({"new": int((~known).sum())})
    left = known
    for reason, part in now.parts.items():
        other = before.parts.get(reason)
        if other is None or other.shape[1:] != part.shape[1:]:
            differs = left
        else:
            differs = left & (part[missing] != other[place]).any(axis=1)
        found[reason] += int(differs.sum())
        left = left & ~differs
    found["no longer in the cache"] += int(left.sum())
    return +found


def _as_one(digests: Bytes) -> npt.NDArray[np.void]:
    return np.ascontiguousarray(digests).view(np.dtype((np.void, 16))).reshape(-1)


def remember(path: Path, wanted: Wanted) -> None:
    """Raises StorageError."""
    columns = {"names": wanted.names, **{f"part_{index}": part for index, part in enumerate(wanted.parts.values())}}
    text = json.dumps({"parts": list(wanted.parts), "recipe": dict(wanted.recipe)})
    write_tensors(path, {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}, {_RECIPE_KEY: text})


def remembered(path: Path) -> Wanted | None:
    """What was wanted last time, if that is known."""
    try:
        with TensorFile(path) as file:
            text = json.loads(file.metadata[_RECIPE_KEY])
            columns = {name: file.read(name).numpy() for name in file.tensors}
    except (ModelFileError, StorageError, KeyError, ValueError):
        return None
    return Wanted(columns["names"], {name: columns[f"part_{index}"] for index, name in enumerate(text["parts"])}, text["recipe"])


def in_words(found: Mapping[str, int]) -> str:
    """`12 new, 3 whose file changed`."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))
