"""The options of sd-scripts' dataset configs: where they may stand, what they may be, and why some have no counterpart here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aquatint.config.importers.draft import Verdict

Kind = Literal["flag", "whole", "number", "text", "size", "two numbers", "table"]
Place = Literal["anywhere", "datasets", "subsets"]  # `datasets` also stands for [general]

KIND_WORDS: Mapping[Kind, str] = {
    "flag": "true or false",
    "whole": "a whole number",
    "number": "a number",
    "text": "a text",
    "size": "a whole number, or two for width and height",
    "two numbers": "two numbers",
    "table": "a table",
}


@dataclass(frozen=True)
class Option:
    """An option. `missing` says why there is no such thing here, `verdict` how bad that is; at the value `off` it does not matter."""

    kind: Kind
    place: Place = "anywhere"
    missing: str = ""
    off: Any = None
    verdict: Verdict = "not supported"


OPTIONS: Mapping[str, Option] = {
    # subsets
    "image_dir": Option("text", "subsets"),
    "metadata_file": Option("text", "subsets"),
    "is_reg": Option("flag", "subsets"),
    "class_tokens": Option("text"),
    "num_repeats": Option("whole"),
    "caption_extension": Option("text"),
    "caption_prefix": Option("text"),
    "caption_separator": Option("text"),
    "enable_wildcard": Option("flag"),
    "alpha_mask": Option("flag"),
    "shuffle_caption": Option("flag"),
    "keep_tokens": Option("whole"),
    "keep_tokens_separator": Option("text"),
    "caption_dropout_rate": Option("number"),
    "caption_tag_dropout_rate": Option("number"),
    "flip_aug": Option("flag"),
    "random_crop": Option("flag"),
    "caption_suffix": Option("text", missing="nothing is put behind captions here: write it into the caption files", off=""),
    "secondary_separator": Option("text", missing="each tag is moved and dropped on its own here, and the mark would stay in it", off=""),
    "caption_dropout_every_n_epochs": Option(
        "whole", missing="whole epochs without captions do not exist here: captions.dropout_prob drops a share of them at all times", off=0
    ),
    "token_warmup_min": Option("whole", missing="captions have all their tags from the first step on here", off=1),
    "token_warmup_step": Option("number", missing="captions have all their tags from the first step on here", off=0),
    "color_aug": Option("flag", missing="colours are never changed here: pictures are encoded once, and cached", off=False),
    "face_crop_aug_range": Option(
        "two numbers", missing='there is no search for faces here; crop.mode = "focus" keeps what stands out in a picture'
    ),
    "conditioning_data_dir": Option(
        "text", "subsets", 'pictures that steer others are not trained here; for masks, put them beside the pictures as NAME-masklabel.png'
        ' and set masks = "files"',
    ),
    "custom_attributes": Option("table", missing="they are notes for scripts of your own", off={}),
    "cache_info": Option("flag", missing="what was found out about pictures is always kept here", off=False, verdict="mapped"),
    # datasets
    "batch_size": Option("whole", "datasets"),
    "resolution": Option("size", "datasets"),
    "enable_bucket": Option("flag", "datasets"),
    "min_bucket_reso": Option("whole", "datasets"),
    "max_bucket_reso": Option("whole", "datasets"),
    "bucket_reso_steps": Option("whole", "datasets"),
    "validation_split": Option("number", "datasets"),
    "prior_loss_weight": Option("number", "datasets"),
    "bucket_no_upscale": Option(
        "flag", "datasets", "small pictures are enlarged here; buckets.tiers = [768, 512] would train them at a smaller size instead", False
    ),
    "skip_image_resolution": Option(
        "size", "datasets", "no picture is left out for its size alone here; buckets.max_upscale leaves out those that are far too small"
    ),
    "validation_seed": Option("whole", "datasets", "held-out pictures are chosen by their content here, the same in every run"),
    "network_multiplier": Option("number", "datasets", "it belongs to adapters such as LoRA", 1.0),
    "resize_interpolation": Option("text", missing="there is one way of resizing here, so that a cached picture fits every run"),
    "max_token_length": Option("whole", "datasets", "captions of any length are used whole here", verdict="approximated"),
    "debug_dataset": Option("flag", "datasets", "`aquatint check` shows what there is to see", False),
}  # fmt: skip

_LARGEST = 1e9

FROM_COMMAND_LINE = {  # names of the command line, which the file does not know
    "train_batch_size": "batch_size",
    "dataset_repeats": "num_repeats",
    "train_data_dir": "image_dir",
    "in_json": "metadata_file",
    "masked_loss": "conditioning_data_dir",
}


def fits(kind: Kind, value: Any) -> bool:
    """Whether sd-scripts would take this value."""
    if kind in ("flag", "text", "table"):
        return isinstance(value, {"flag": bool, "text": str, "table": dict}[kind])
    if isinstance(value, list):
        number: Kind = "whole" if kind == "size" else "number"
        return kind in ("size", "two numbers") and len(value) == 2 and all(fits(number, one) for one in value)
    if isinstance(value, bool) or kind == "two numbers":
        return False
    return isinstance(value, int | float if kind == "number" else int) and abs(value) <= _LARGEST  # NaN is not, either
