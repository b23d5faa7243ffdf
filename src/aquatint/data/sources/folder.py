"""A folder of pictures, with captions and masks in files beside them. Names only: no file is opened here.

The caption of `a.jpg` is `a` with the first of `caption_extensions` that is there. With `masks = "files"` its mask is
`a-masklabel.png` (as OneTrainer has it), `a.mask.png`, `a_mask.png` or `masks/a.png`, with any picture's extension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from aquatint.data.downloads import is_url, public_name
from aquatint.data.places import Identity, Opener, Place, identity_of, stat_plain
from aquatint.data.sources.listing import Contents, Entry, Remarks, Source
from aquatint.data.sources.names import MASK_FOLDER, Names, printable
from aquatint.data.sources.remote import scan_bucket
from aquatint.data.sources.side_files import Notices, Sorted, sort_out
from aquatint.errors import DataError


def containers(source: Source, opener: Opener) -> tuple[str, ...] | None:
    """None: a folder's own times do not tell whether its files have changed."""
    return None


def list_folder(source: Source, opener: Opener, remarks: Remarks) -> Iterator[Entry]:
    """Pictures by extension, in folders inside too, sorted by the bytes of their paths.

    Hidden names are skipped; links are followed, each folder once. Files are asked for their size and times only, once
    each. What is to be said of the whole is in `remarks` at the end. Raises DataError if there is no such folder.
    """
    scan = scan_bucket(source.path) if is_url(source.path) else _Disk(source.path)
    walk = _Walk(source, scan, remarks)
    waiting = [walk.folder("")]  # of each folder that is open, what is left of it
    while waiting:
        step = next(waiting[-1], None)
        if step is None:
            waiting.pop()
        elif isinstance(step, str):
            waiting.append(walk.folder(step))
        else:
            yield step
    remarks.warnings.extend(walk.notices.texts(source))
    if isinstance(scan, _Disk) and scan.outside.count:
        remarks.warnings.append(f"links lead out of {source.path}, and what they lead to is used: {scan.outside}")


class _Walk:
    """One way through a source's folders. Paths are relative to the source's own folder."""

    def __init__(self, source: Source, scan: Callable[[str], Contents], remarks: Remarks) -> None:
        self.source, self.scan, self.remarks = source, scan, remarks
        self.notices = Notices()
        self.root = source.path.rstrip("/")
        self.top = public_name(self.root).rpartition("/")[2] if is_url(source.path) else Path(source.path).name

    def folder(self, path: str) -> Iterator[Entry | str]:
        """The entries of a folder's own pictures and the paths of its folders, sorted together."""
        try:
            contents = self._visible(path, self.scan(path))
            if self.source.masks == "files" and MASK_FOLDER in contents.folders:
                inside = self._visible(path, self.scan(_join(path, MASK_FOLDER)))
                for stray in inside.folders:
                    self.notices.masks_without.add(self._name(_join(path, f"{MASK_FOLDER}/{stray}/")))
                contents = _with_masks(contents, inside)
        except OSError as error:
            reason = error.strerror or str(error)
            self.remarks.warnings.append(f"a folder could not be listed, and nothing in it is used: {self._name(path)}: {reason}")
            return
        found = sort_out(contents.files, self.source, self.remarks, self.notices, lambda name: self._name(_join(path, name)))
        for name in sorted([*found.pictures, *(f"{folder}/" for folder in contents.folders)], key=os.fsencode):
            if name.endswith("/"):
                yield _join(path, name[:-1])
            elif entry := self._entry(path, name, found, contents.identity_of):
                yield entry

    def _visible(self, path: str, contents: Contents) -> Contents:
        files = [name for name in contents.files if not name.startswith(".")]
        if hidden := len(contents.files) - len(files):
            self.remarks.others["hidden"] += hidden
        return Contents([name for name in contents.folders if not name.startswith(".")], files, contents.identity_of)

    def _entry(self, path: str, name: str, found: Sorted, identity_of: Callable[[str], Identity]) -> Entry | None:
        """None, and a problem, if the file cannot be asked for its size and times."""
        try:
            identity = identity_of(name)
        except OSError as error:
            self.remarks.problems.append((self._name(_join(path, name)), self._why(error, _join(path, name))))
            return None
        caption, mask = found.captions.get(name), found.masks.get(name)
        return Entry(
            self._name(_join(path, name)),
            self._place(path, name),
            identity,
            caption=self._place(path, caption) if caption else None,
            caption_identity=_identity_or_none(identity_of, caption) if caption else None,
            mask=self._place(path, mask) if mask else None,
            mask_identity=_identity_or_none(identity_of, mask) if mask else None,
        )

    def _why(self, error: OSError, path: str) -> str:
        if isinstance(error, FileNotFoundError) and os.path.islink(f"{self.root}/{path}"):  # noqa: PTH114
            return "is a link to a file that does not exist"
        return f"cannot be read: {error.strerror or error}"

    def _place(self, path: str, name: str) -> Place:
        return Place(f"{self.root}/{_join(path, name)}")

    def _name(self, path: str) -> str:
        """For people: from the source's own folder on."""
        return printable(_join(self.top, path) if path else self.top)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _identity_or_none(identity_of: Callable[[str], Identity], name: str) -> Identity | None:
    """None for a side file that cannot be read, as whoever opens it will find out and say."""
    try:
        return identity_of(name)
    except OSError:
        return None


def _with_masks(contents: Contents, masks: Contents) -> Contents:
    """A folder with the files of its folder of masks, in place of that."""
    inside = [f"{MASK_FOLDER}/{name}" for name in masks.files]
    folders = [name for name in contents.folders if name != MASK_FOLDER]
    start = len(MASK_FOLDER) + 1

    def identity_of(name: str) -> Identity:
        return masks.identity_of(name[start:]) if name.startswith(f"{MASK_FOLDER}/") else contents.identity_of(name)

    return Contents(folders, [*contents.files, *inside], identity_of)


class _Disk:
    """Lists folders of a disk by their path in the root, each once. `outside` are links that lead out of the root."""

    def __init__(self, root: str) -> None:
        if not Path(root).is_dir():
            what = "is not a folder" if Path(root).exists() else "does not exist"
            raise DataError(f"the picture folder {root} {what}", hint="correct the path in data.sources")
        self.root = root.rstrip("/")
        self.outside = Names()
        self._inside = f"{Path(root).resolve()}/"
        self._seen: set[tuple[int, int]] = set()

    def __call__(self, path: str) -> Contents:
        place = f"{self.root}/{path}" if path else self.root or "/"
        status = Path(place).stat()
        if (status.st_dev, status.st_ino) in self._seen:  # a link in a circle, or a second way to the same folder
            return Contents((), (), self._identity_in(place))
        self._seen.add((status.st_dev, status.st_ino))
        folders: list[str] = []
        files: list[str] = []
        with os.scandir(place) as scan:
            for entry in scan:
                (folders if _is_folder(entry) else files).append(entry.name)
                if entry.is_symlink() and not f"{os.path.realpath(entry.path)}/".startswith(self._inside):
                    self.outside.add(printable(_join(path, entry.name)))
        return Contents(folders, files, self._identity_in(place))

    def _identity_in(self, place: str) -> Callable[[str], Identity]:
        return lambda name: identity_of(stat_plain(f"{place}/{name}"))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself is no folder; whoever opens it will say what is wrong
        return False
