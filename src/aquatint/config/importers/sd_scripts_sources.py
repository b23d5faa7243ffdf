"""The subsets of sd-scripts as sources: where their pictures lie here, how often they are shown, and their captions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aquatint.config.importers.draft import shown
from aquatint.config.importers.sd_scripts_notes import WITHOUT_EFFECT, Draft, Place, Subset, Written
from aquatint.config.importers.survey import Survey, survey
from aquatint.config.overrides import from_folder

_ENDINGS = (".txt", ".caption")  # what kohya_ss writes, and the default of sd-scripts
_ENDING = re.compile(r"\.[A-Za-z0-9_.-]+")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_NOTHING_HERE = "there is nothing at this path here: correct it"


def find_places(draft: Draft, folder: Path, subsets: Sequence[Subset]) -> list[Place]:
    """The subsets that are used. sd-scripts leaves out those without pictures or repeats, too."""
    places: dict[str, Place] = {}
    for subset in subsets:
        written = subset.options.get("metadata_file") or subset.options.get("image_dir")
        if written is None or not written.value.strip():
            draft.note(written, "not supported", "it is empty")
            draft.note_unset("image_dir", f"a subset of dataset {subset.dataset + 1} has no image_dir and no metadata_file: it is left out")
            continue
        path, remark = locate(written.value, folder)
        endings, found = _caption_files(draft, subset, path)
        if subset.get("num_repeats", 1) < 1:
            draft.note(subset.options["num_repeats"], "mapped", "its subset is left out, as in sd-scripts")
            draft.note(written, "mapped", "left out, because it has less than one repeat")
        elif found is not None and not found.num_pictures and written.name == "image_dir":
            draft.note(written, "not supported", "there are no pictures directly in it: sd-scripts leaves it out too")
        elif path in places:
            draft.note(written, "approximated", "the same pictures stand in another subset; here they count once")
        else:
            places[path] = Place(subset, path, endings, found if written.name == "image_dir" else None)
            draft.note(written, "approximated" if remark else "mapped", remark or f"path = {shown(path)}")
            if found is not None and found.inner and written.name == "image_dir":
                inner = ", ".join(found.inner[:3])
                draft.note(written, "approximated", f"pictures in the folders inside ({inner}) are used here, and are not in sd-scripts")
    return list(places.values())


def locate(text: str, folder: Path) -> tuple[str, str]:
    """Where a path of sd-scripts is here, and a remark if it is nowhere. There, paths count from where it was started."""
    if _WINDOWS.match(text):
        return text, "this is a path of Windows: correct it to where the pictures are here"
    for spelling in dict.fromkeys((text, text.replace("\\", "/"))):
        for start in (Path.cwd(), folder, folder.parent):
            if (found := from_folder(start, Path(spelling))).exists():
                return str(found), ""
    return str(from_folder(folder, Path(text.replace("\\", "/")))), _NOTHING_HERE


def _caption_files(draft: Draft, subset: Subset, path: str) -> tuple[tuple[str, ...], Survey | None]:
    """The endings of a subset's caption files, and what lies in its folder."""
    written = subset.options.get("caption_extension")
    if "metadata_file" in subset.options:
        draft.note(written, "mapped", f"{WITHOUT_EFFECT} beside metadata_file, which has the captions")
        return (), survey(Path(path), ())
    endings: tuple[str, ...] = _ENDINGS
    if written is not None:
        ending = written.value if written.value.startswith(".") else f".{written.value}"
        if _ENDING.fullmatch(ending):
            endings = (ending,)
            is_same = ending == written.value
            text = f"caption_extensions = {shown([ending])}"
            draft.note(written, "mapped" if is_same else "approximated", text if is_same else f"{text}, with the point that was missing")
        else:
            draft.note(written, "not supported", "this is no ending of a file")
    found = survey(Path(path), endings)
    if subset.is_named_by_folder:
        return found.endings if found and found.endings else _ENDINGS[:1], found
    if written is None:
        text = "sd-scripts looks for .caption, if its command line names no other ending; here both .txt and .caption are taken"
        draft.note_unset("caption_extension", text)
    return endings, found


def source_tables(draft: Draft, places: Sequence[Place]) -> list[dict[str, Any]]:
    """The `[[data.sources]]` tables."""
    shares = _reg_shares(places)
    return [_source(draft, index, place, shares) for index, place in enumerate(places)]


def _source(draft: Draft, index: int, place: Place, shares: Mapping[str, tuple[float, str]]) -> dict[str, Any]:
    subset, key = place.subset, f"data.sources.{index}"
    path = subset.options.get("metadata_file") or subset.options["image_dir"]
    settings: dict[str, Any] = {"path": place.path}
    draft.origins[f"{key}.path"] = f"{path.name}, {path.where}"
    if path.name == "metadata_file":
        settings["kind"] = "table"
        _note_image_dir(draft, place)
    settings |= _role_and_repeats(draft, place, shares)
    if place.endings:
        settings["caption_extensions"] = list(place.endings)
    if subset.get("enable_wildcard"):
        settings["caption_lines"] = "alternatives"
    if subset.get("alpha_mask"):
        settings["masks"] = "alpha"
    draft.note(subset.options.get("alpha_mask"), "mapped", f"masks = {shown(settings.get('masks', 'none'))}")
    if trigger := _trigger(draft, place):
        settings["trigger"] = trigger
    return settings


def _note_image_dir(draft: Draft, place: Place) -> None:
    written = place.subset.options.get("image_dir")
    if written is None:
        return
    parent = Path(place.path).parent
    if locate(written.value, parent)[0] == str(parent):
        draft.note(written, "mapped", "the folder of metadata_file, where the paths in it start here too")
    else:
        text = "paths in a table start at the table's own folder: move the metadata file there, unless its paths are complete"
        draft.note(written, "approximated", text)


def _role_and_repeats(draft: Draft, place: Place, shares: Mapping[str, tuple[float, str]]) -> dict[str, Any]:
    subset = place.subset
    repeats, reg, weight = (subset.options.get(name) for name in ("num_repeats", "is_reg", "prior_loss_weight"))
    if not place.is_reg:
        value = float(subset.get("num_repeats", 1))
        draft.note(reg, "mapped", 'role = "train"')
        draft.note(repeats, "mapped", f"repeats = {value:g}")
        return {"repeats": value} if value != 1 else {}
    settings: dict[str, Any] = {"role": "regularization"}
    share, how = shares.get(place.path, (0.0, ""))
    if share:
        settings["share"] = share
        draft.note(reg, "approximated", f'role = "regularization", share = {share:g}: {how}')
        draft.note(repeats, "approximated", f"share = {share:g} instead: sd-scripts repeats these until they are as many as the others")
    else:
        settings |= {"repeats": float(subset.get("num_repeats", 1))}
        draft.note(reg, "mapped", 'role = "regularization"')
        draft.note(repeats, "mapped", f"repeats = {settings['repeats']:g}")
    if weight is not None and weight.value != 1 and weight.value > 0:
        settings["loss_weight"] = float(weight.value)
        draft.note(weight, "mapped", f"loss_weight = {weight.value:g} of regularization pictures")
    return settings


def _reg_shares(places: Sequence[Place]) -> dict[str, tuple[float, str]]:
    """Shares of regularization sources: in each dataset of sd-scripts, they are repeated until they are as many as the others."""
    own = {place.subset.dataset: 0.0 for place in places if not place.is_reg}
    reg = {place.subset.dataset for place in places if place.is_reg} & set(own)
    is_counted = all(place.num_samples for place in places)
    for place in places:
        if not place.is_reg:
            own[place.subset.dataset] += (place.num_samples or 0) if is_counted else 1
    total = sum(own.values()) + sum(own[dataset] for dataset in reg)
    how = "as many samples as from the others, as in sd-scripts"
    if not is_counted and len(own) > 1:
        how = "as many samples as from the others, if all folders had the same number of pictures: correct it"
    shares = {}
    for dataset in reg:
        group = [place for place in places if place.is_reg and place.subset.dataset == dataset]
        weights = [float(place.num_samples or 0) if is_counted else 1.0 for place in group]
        for place, weight in zip(group, weights, strict=True):
            shares[place.path] = (round(own[dataset] / total * weight / sum(weights), 4), how)
    return shares


def _trigger(draft: Draft, place: Place) -> str:
    """Words in front of every caption: the prefix, and the class where no picture has a caption of its own."""
    subset, words = place.subset, []
    separator = subset.get("caption_separator") or ","
    if prefix := subset.get("caption_prefix"):
        plain = prefix.replace(subset.get("keep_tokens_separator") or "\0", separator)
        words += [word for part in plain.split(separator) if (word := part.strip())]
        text = f"trigger = {shown(f'{separator} '.join(words))}: always in front, never moved or dropped"
        draft.note(subset.options["caption_prefix"], "approximated", text)
    written = subset.options.get("class_tokens")
    if written is not None and written.value.strip():
        words += _class_words(draft, place, written)
    return f"{separator} ".join(words)


def _class_words(draft: Draft, place: Place, written: Written) -> list[str]:
    """The class words, which in sd-scripts are the caption of pictures without a caption file."""
    if "metadata_file" in place.subset.options:
        draft.note(written, "mapped", f"{WITHOUT_EFFECT} beside metadata_file, which has the captions")
        return []
    if place.survey is None:
        text = "sd-scripts uses it for pictures without a caption file: if none has one, set it as `trigger`"
        draft.note(written, "approximated", text)
        return []
    count, captioned = place.survey.num_pictures, place.survey.num_captioned
    if captioned == count:
        draft.note(written, "mapped", f"{WITHOUT_EFFECT}, as every picture has a caption file")
        return []
    if captioned:
        text = f"{count - captioned:,} of {count:,} pictures have no caption file; sd-scripts gives them this caption: write it into files"
        draft.note(written, "not supported", text)
        return []
    draft.note(written, "mapped", f"trigger = {shown(written.value.strip())}, as no picture has a caption file")
    draft.set("data.max_uncaptioned_share", 1.0, "pictures with nothing but trigger words")
    return [written.value.strip()]
