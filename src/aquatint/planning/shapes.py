"""The shapes that a config offers its pictures."""

from __future__ import annotations

from aquatint.config.schema import Config
from aquatint.data.bucket_sets import BucketSet, bucket_sets


def sets_of(config: Config) -> tuple[BucketSet, ...]:
    """One set for each tier, largest first. Raises UsageError if a tier has no shape."""
    section = config.buckets
    return bucket_sets(
        section.set, resolution=section.resolution, tiers=section.tiers, step=section.step, min_side=section.min_side,
        max_side=section.max_side, max_aspect=section.max_aspect, area_weight=section.area_weight,
    )  # fmt: skip


def largest_bucket(config: Config) -> tuple[int, int]:
    """Height and width of the bucket with the most pixels, the squarest of them. Raises UsageError if there is none."""
    shapes = sets_of(config)[0].shapes.tolist()
    height, width = max(shapes, key=lambda shape: (shape[0] * shape[1], -abs(shape[0] - shape[1])))
    return height, width


def sample_size(config: Config) -> tuple[int, int]:
    """Height and width of sample pictures as far as they are known without the data: the config's, or the largest bucket's."""
    section = config.samples
    return largest_bucket(config) if section.height is None or section.width is None else (section.height, section.width)
