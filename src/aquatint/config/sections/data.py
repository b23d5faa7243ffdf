"""Pictures, captions, buckets and the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from aquatint.config.sections.fields import Color, Ending, Location, Section, Share


class SourceSection(Section):
    path: Location
    """Pictures: a folder, a table (JSONL, CSV, Parquet, sd-scripts JSON), or tar shards; `*` and URLs (s3, gs, https) are fine."""
    kind: Literal["auto", "folder", "table", "tar"] = "auto"
    """What `path` is. `auto` tells by its ending, and takes a folder with a metadata.jsonl, .csv or .parquet as a table."""
    role: Literal["train", "regularization", "validation"] = "train"
    """`regularization`: pictures of the general class, beside your own. `validation`: only measured, never trained."""
    repeats: Annotated[float, Field(gt=0.0, le=10_000.0)] = 1.0
    """How often each picture is shown per epoch. 0.5 shows half of them in each, in turns."""
    share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of all samples that come from here, instead of `repeats`."""
    loss_weight: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Weight of its samples in the loss."""
    caption_extensions: Annotated[tuple[Ending, ...], Field(min_length=1)] = (".txt",)
    """The caption of `a.jpg` is in `a` plus the first of these that exists; a .json file may hold several."""
    caption_lines: Literal["whole", "alternatives"] = "whole"
    """`alternatives`: each line of a caption file is a caption of its own, of which each sample gets one."""
    trigger: str = ""
    """Words put before every caption from here."""
    picture_column: str | None = None
    """In a table: the column of paths, URLs or picture bytes. Found by its usual names if not set."""
    caption_columns: tuple[str, ...] = ()
    """In a table: the columns of captions; several are alternatives. Found by their usual names if not set."""
    mask_column: str | None = None
    """In a table: the column of mask paths."""
    masks: Literal["none", "alpha", "files"] = "none"
    """Where the loss counts: everywhere, where a picture is opaque, or where its mask file (`a-masklabel.png`) is white."""


class DataSection(Section):
    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1)]
    """Where the pictures are: one `[[data.sources]]` table per folder or table."""
    alpha_color: Color = "#ffffff"
    """Colour behind transparent pictures."""
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    """A picture with more pixels than this is refused from its header, before it is decoded."""
    decode: Literal["scaled", "whole"] = "scaled"
    """`scaled` decodes a JPEG far larger than its bucket at 1/2, 1/4 or 1/8 of its size, at twice the speed. `whole` decodes all of it."""
    max_bad_share: Share = 0.01
    """The run is refused when more than this share of the pictures cannot be used. At least one bad one is allowed."""
    max_uncaptioned_share: Share = 0.01
    """The run is refused when more than this share of the pictures has no caption. 1 allows a set without captions."""
    mask_floor: Share = 0.0
    """Least weight of the loss outside of a mask."""


class BucketsSection(Section):
    set: Literal["aquatint", "kohya", "novelai", "sdxl_table"] = "aquatint"
    """Shapes to choose from. `aquatint` crops least; the others are as in those trainers, with their way of choosing."""
    resolution: Annotated[int, Field(ge=32)] = 1024
    """Side of the square that has the same area as the largest bucket, in pixels."""
    tiers: tuple[Annotated[int, Field(ge=32)], ...] = ()
    """Smaller resolutions, for pictures that would be enlarged more than `max_upscale` otherwise."""
    step: Annotated[int, Field(ge=32, multiple_of=32)] = 32
    """Bucket sides are multiples of this, in pixels. The UNet needs multiples of 32."""
    min_side: Annotated[int, Field(ge=32)] = 512
    """Shortest side of a bucket, in pixels; in a smaller tier, as much shorter as the tier is smaller."""
    max_side: Annotated[int, Field(ge=32)] = 2048
    """Longest side of a bucket, in pixels."""
    max_aspect: Annotated[float, Field(ge=1.0)] = 4.0
    """Widest bucket, as long side over short side."""
    area_weight: Annotated[float, Field(ge=0.0)] = 0.5
    """Price of a bucket smaller than `resolution` squared, against the price of cropping."""
    upscale_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Price of enlarging a small picture, against the price of a smaller tier. Does nothing without `tiers`."""
    max_upscale: Annotated[float, Field(ge=1.0)] = 4.0
    """A picture that would be enlarged more than this many times in every tier is left out, with that reason."""


class CropSection(Section):
    mode: Literal["center", "random", "focus"] = "center"
    """Which part of the picture is kept where its shape differs from its bucket's. `focus` looks for what stands out."""
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """How many different random crops are cached per picture."""
    flip_prob: Share = 0.0
    """Share of the samples that are mirrored. Leave 0 for pictures with text, or characters that are not symmetric."""


class CategorySection(Section):
    tags: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tags, or patterns with `*`, such as "artist:*"."""
    drop_prob: Share
    """Share of these tags that are left out, instead of `tag_drop_prob`."""


class TagWeightsSection(Section):
    enabled: bool = False
    """Weigh pictures with rare tags more in the loss, and those with frequent ones less; the mean over the set is 1."""
    power: Annotated[float, Field(ge=0.0, le=2.0)] = 0.5
    """A tag weighs (median count / its count) to this power."""
    lowest: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Least weight of a tag."""
    highest: Annotated[float, Field(ge=1.0)] = 2.0
    """Greatest weight of a tag."""
    ignore: tuple[str, ...] = ()
    """Further tags that say nothing about the subject; counts of people and quality tags are always ignored."""


class CaptionsSection(Section):
    style: Literal["tags", "prose"] = "prose"
    """`tags` are split at `separator`; `prose` is used as it is written."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """What stands between tags."""
    shuffle: bool = False
    """Shuffle the tags, all but the first `keep_first`."""
    keep_first: Annotated[int, Field(ge=0)] = 1
    """How many leading tags are never moved and never dropped."""
    keep_separator: str = ""
    """Or: a mark such as "|||" in the captions; the tags before it are never moved and never dropped."""
    tag_drop_prob: Share = 0.0
    """Share of the other tags that are left out, each on its own."""
    tag_drop: Literal["uniform", "weighted"] = "uniform"
    """`weighted` drops frequent tags more often than rare ones, with the same share over all."""
    categories: tuple[CategorySection, ...] = ()
    """Tags with a drop share of their own: one `[[captions.categories]]` table each."""
    wildcards: bool = False
    """`{red|blue}` in a caption stands for one of the two."""
    pick: Literal["first", "random"] = "random"
    """Which caption is used of a picture that has several."""
    text: Literal["auto", "cached", "online"] = "auto"
    """`cached` encodes captions before the training; `online` at every step, each time rendered anew. `auto`: online if they vary."""
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """How many renderings of a caption (shuffled, tags dropped) are cached."""
    dropout_prob: Share = 0.1
    """Share of the samples that are trained without their caption, which is what makes guidance work."""
    dropout_zeros_share: Share = 0.5
    """Of those, the share that sees zeros (as A1111 and Forge do); the rest sees the encoded empty text (as ComfyUI does)."""
    tag_weights: TagWeightsSection = TagWeightsSection()
    """Loss weights by how rare a picture's tags are."""


class CacheSection(Section):
    folder: Path = Path("cache")
    """Where encoded pictures and captions are kept. Any number of runs can share it."""
    latent_dtype: Literal["float16", "float32"] = "float16"
    """Number format of the cached latents (mean and standard deviation)."""
    text_dtype: Literal["float16", "float32"] = "float16"
    """Number format of the cached text embeddings."""
    vae_precision: Literal["float32", "bfloat16"] = "float32"
    """Number format in which pictures are encoded. SDXL's own autoencoder overflows in float16, so that is not offered."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """How many pictures are encoded at once."""
    shard_entries: Annotated[int, Field(ge=1, le=65536)] = 256
    """How many entries one cache file holds."""
    engine: Literal["local", "processes", "ray"] = "local"
    """Who encodes: this process, several on this machine, or Ray tasks on a cluster (`pip install aquatint[ray]`)."""
    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    """How many encode at once with `processes` or `ray`; one per GPU."""
    memory_mib: Annotated[int, Field(ge=0)] = 0
    """Keep so much of the cache in each reading process's memory. 0: the system's own file cache does it."""


class LoaderSection(Section):
    workers: Annotated[int, Field(ge=0, le=64)] = 2
    """Processes that read batches ahead of the training step. 0 reads in the training process."""
    prefetch: Annotated[int, Field(ge=1, le=64)] = 4
    """Batches that each worker holds ready."""
