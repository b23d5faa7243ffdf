"""Where a crop should be centred so that what stands out in a picture is kept.

The eye is smartcrop's (MIT, pure Python on Pillow; a port of smartcrop.js): it scores windows by skin tones, edges and saturated
colours. Of 192 generated scenes with a subject of a fifth to two fifths of the short side, its point lay within the subject in 98%;
libvips' "attention" had 81%, the picture's middle 11%. Without colour it had 84%, and 52% where the background is louder than the
subject. It knows no faces: it keeps a head because skin stands out. Where the subject fills the picture it points at some detail of
it, and the middle may be the better choice.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt

from aquatint.data.image import Pixels
from aquatint.errors import UsageError

FOCUS_VERSION = 1  # raise it when `focus_point` gives other points than before
_SHORT_SIDE_PX = 128  # finer detail only distracts: 192 pixels were worse in scenes with fine patterns, and twice as slow
_MAX_ASPECT = 4
_CELL_PX = 4
_WINDOW_CELLS = 12  # 3/8 of the short side: a narrow window sees an eye, a wide one cannot say where in it the subject is
_AS_GOOD = 0.02  # of the range of scores: what is so near to the best counts as equal


def focus_point(pixels: Pixels) -> tuple[float, float]:
    """The point (down, right) in 0..1 on which crops of an upright picture, uint8 (H, W, 3), should be centred.

    Of the best windows it is the middle of the one nearest to the picture's middle; so a picture of nothing has its middle for
    a point. Raises UsageError if smartcrop is not installed.
    """
    scores = _scores(pixels)
    best = np.argwhere(scores >= scores.max() - _AS_GOOD * np.ptp(scores))
    middles = (best + _WINDOW_CELLS / 2) / (np.array(scores.shape) + _WINDOW_CELLS - 1)
    down, right = middles[np.square(middles - 0.5).sum(axis=1).argmin()].tolist()
    return down, right


def _scores(pixels: Pixels) -> npt.NDArray[np.float64]:
    """How much each window would keep of what stands out, by the row and column of its first cell."""
    from PIL import Image

    finder = _import_smartcrop().SmartCrop()
    rows, columns = _cells(pixels)
    small = np.asarray(Image.fromarray(pixels).resize((columns * _CELL_PX, rows * _CELL_PX), Image.Resampling.BOX))
    framed = Image.fromarray(np.pad(small, ((1, 1), (1, 1), (0, 0)), "edge"))  # Pillow filters no border, which then looks like edges
    features = finder.prepare_features_image(framed).crop((1, 1, columns * _CELL_PX + 1, rows * _CELL_PX + 1))
    cells = finder.precompute_features(features.resize((columns, rows), Image.Resampling.LANCZOS)).astype(np.float64)
    gains = finder.get_importance(height=_WINDOW_CELLS, width=_WINDOW_CELLS) - finder.outside_importance
    windows = np.lib.stride_tricks.sliding_window_view(cells, gains.shape)
    return np.asarray((windows * gains).sum(axis=(2, 3)))


def _cells(pixels: Pixels) -> tuple[int, int]:
    """Rows and columns of cells: even, so that a window can lie in the middle. Long pictures are squeezed, which moves no point."""
    sides = pixels.shape[:2]
    rows, columns = (2 * round(min(_MAX_ASPECT, side / min(sides)) * _SHORT_SIDE_PX / (2 * _CELL_PX)) for side in sides)
    return rows, columns


def _import_smartcrop() -> ModuleType:
    try:
        import smartcrop
    except ImportError:
        raise UsageError('crop.mode = "focus" needs the package smartcrop', hint="pip install aquatint[focus]") from None
    module: ModuleType = smartcrop
    return module
