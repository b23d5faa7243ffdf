"""Where crops of mode "focus" are centred: worked out once per content, and kept in the cache."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from aquatint.config.schema import Config
from aquatint.data.focus import FOCUS_VERSION, focus_point
from aquatint.data.image import BadImage, load_image, quiet_decoders
from aquatint.data.manifest import Manifest
from aquatint.data.places import Opener
from aquatint.data.shards import ShardStore
from aquatint.errors import StorageError
from aquatint.utils.progress import track

POINTS_PER_SHARD = 4096
CENTRE = (0.5, 0.5)


def focus_points(config: Config, manifest: Manifest, opener: Opener) -> dict[bytes, tuple[float, float]] | None:
    """The point (down, right) in 0..1 of each content, or None for another crop mode.

    A picture that cannot be decoded gets its centre: whoever encodes it will say what is wrong with it.
    """
    if config.crop.mode != "focus":
        return None
    store = ShardStore(config.cache.folder / "focus")
    keys = {digest.tobytes(): _key(digest.tobytes(), config.data.alpha_color) for digest in manifest.digests}
    missing = {digest: row for row, digest in enumerate(map(bytes, manifest.digests)) if keys[digest] not in store}

    def find(digest: bytes) -> tuple[bytes, tuple[float, float] | None]:
        """None where it is not the content's fault that there is no point: that is not kept."""
        try:
            with opener.open(manifest.picture(missing[digest]).place) as file:
                return digest, focus_point(load_image(file, config.data.alpha_color, config.data.max_pixels))
        except BadImage:
            return digest, CENTRE
        except (StorageError, OSError):
            return digest, None

    found: dict[bytes, tuple[float, float]] = {}
    if missing:
        with (
            track("looking for what stands out", len(missing)) as on_progress,
            quiet_decoders(),
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            for done, (digest, point) in enumerate(pool.map(find, missing), start=1):
                if point is not None:
                    found[digest] = point
                on_progress(done, len(missing))
                if len(found) == POINTS_PER_SHARD or (found and done == len(missing)):
                    store.write({keys[one]: {"point": torch.tensor(place, dtype=torch.float32)} for one, place in found.items()})
                    found = {}
        store.save_index()
    points = {digest: store.read(key)["point"].tolist() if key in store else CENTRE for digest, key in keys.items()}
    return {digest: (float(np.float32(down)), float(np.float32(right))) for digest, (down, right) in points.items()}


def _key(digest: bytes, alpha_color: str) -> bytes:
    return hashlib.blake2b(b"focus" + FOCUS_VERSION.to_bytes(2, "little") + digest + alpha_color.lower().encode(), digest_size=16).digest()
