"""What a person would want to know about a picture before it is trained: sharp or blurred, seen before, or empty.

Pure functions on uint8 (H, W, 3) arrays. They only ever lead to a remark: nothing is left out because of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from aquatint.data.image import Pixels, resize

BLURRED_BELOW = 40.0  # variance of the Laplacian; sharp photographs and drawings have hundreds
FLAT_BELOW = 4.0  # standard deviation of the grey values; a plain wall has more
SAME_WITHIN = 6  # differing bits of 64; re-saved, resized and slightly brightened copies differ in 0 to 4
_SIDE_PX = 512  # long side at which sharpness is judged, so that it does not depend on how large the file is
_BANDS = 8

Fingerprints = npt.NDArray[np.uint64]


def grey(pixels: Pixels) -> npt.NDArray[np.float64]:
    """Luma (H, W) in 0..255 (ITU-R BT.601)."""
    luma: npt.NDArray[np.float64] = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return luma


def sharpness(pixels: Pixels) -> float:
    """Variance of the Laplacian of the picture at a long side of 512 pixels (Pech-Pacheco et al., ICPR 2000).

    A smaller picture is judged as it is.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, _SIDE_PX / max(height, width))
    small = grey(resize(pixels, (max(8, round(height * scale)), max(8, round(width * scale)))))
    inner = small[1:-1, 1:-1]
    laplacian = small[:-2, 1:-1] + small[2:, 1:-1] + small[1:-1, :-2] + small[1:-1, 2:] - 4 * inner
    return float(laplacian.var())


def contrast(pixels: Pixels) -> float:
    """Standard deviation of the grey values: near 0 for a picture of one colour."""
    return float(grey(resize(pixels, (64, 64))).std())


def fingerprint(pixels: Pixels) -> int:
    """64 bits that look-alikes share: whether each of 8 x 8 fields is brighter than its right neighbour ("dHash", N. Krawetz, 2013)."""
    small = grey(resize(pixels, (8, 9)))
    bits = (small[:, :-1] > small[:, 1:]).reshape(-1)
    return int(np.packbits(bits).view(">u8")[0])


def near_duplicates(fingerprints: Sequence[int], max_distance: int = SAME_WITHIN) -> list[tuple[int, ...]]:
    """Groups of rows whose fingerprints are linked by steps of at most `max_distance` differing bits, each sorted.

    Exact: of two fingerprints that differ in fewer than 8 bits, at least one of 8 bytes is equal, so only rows that share
    a byte at the same place are compared. Raises ValueError for a larger distance.
    """
    if max_distance >= _BANDS:
        raise ValueError(f"look-alikes can be found within {_BANDS - 1} bits, not {max_distance}")
    values, which = np.unique(np.asarray(fingerprints, dtype=np.uint64), return_inverse=True)
    parent = np.arange(len(values))
    for band in range(_BANDS):
        keys = (values >> np.uint64(8 * band)) & np.uint64(0xFF)
        order = np.argsort(keys, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            _link(rows, values, parent, max_distance)
    groups: dict[int, list[int]] = {}
    for row, value in enumerate(which.tolist()):
        groups.setdefault(_root(parent, value), []).append(row)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _link(rows: npt.NDArray[np.intp], values: Fingerprints, parent: npt.NDArray[np.intp], max_distance: int) -> None:
    """Joins the rows that are near each other; a few thousand at a time are compared with all."""
    for start in range(0, len(rows), 1024):
        some = rows[start : start + 1024]
        distance = np.bitwise_count(values[some, None] ^ values[None, rows])
        for left, right in zip(*np.nonzero(distance <= max_distance), strict=True):
            one, other = _root(parent, int(some[left])), _root(parent, int(rows[right]))
            parent[max(one, other)] = min(one, other)


def _root(parent: npt.NDArray[np.intp], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = int(parent[row])
    return row
