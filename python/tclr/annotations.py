"""Reads the annotation files of a data set: its videos, their parts and their classes.

A label is the index of a class in a list of names, which comes from the training part and is used for all parts. A line
with a path outside of the root, an unknown class or a wrong label is an error that names the file and the line. CRLF,
a byte order mark, blank lines, duplicates, unusual names and missing videos are accepted.
"""

import csv
import json
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v", ".ts", ".m2ts", ".mts", ".vob"}
KINETICS_PARTS = {"train": "train", "val": "val", "validate": "val", "test": "test"}
DIVING48_CLASSES = 48  # label 30 is in neither part, but is counted


@dataclass(frozen=True)
class Entry:
    """A video: its path below the root, its label, and its frames start..end - 1. end = None: all to the last one."""

    path: str
    label: int | None
    start: int = 0
    end: int | None = None


@dataclass
class Listing:
    """The videos of one part. missing: the paths of videos that do not exist; counts: of listed, missing, duplicates.

    classes: the name of each label, in the order of the labels, or None if the videos have no classes.
    """

    root: Path
    entries: list
    classes: list | None
    missing: list
    counts: Counter


def read(dataset, root, part="train", split=1, *, train=None, classes=None):
    """The videos of one part of a data set.

    dataset: "ucf101", "hmdb51", "kinetics400", "diving48" or "folder".
    part: "train", "val" or "test", if the data set has it; for a folder of videos also "all".
    split: 1 to 3, for UCF101 and HMDB51.
    train: the part whose classes give the labels of all parts; by default "train", or `part` for a folder without it.
    classes: the names that labels stand for, such as those of a trained classifier, instead of the data set's own.
    Raises ValueError, naming file and line, for a wrong annotation, and if no video is found.
    """
    if dataset not in READERS:
        raise ValueError(f"dataset: found {dataset!r}, wanted one of {', '.join(READERS)}")
    reader, parts = READERS[dataset]
    for argument, name in dict(part=part, train=train or part).items():
        if name not in parts:
            raise ValueError(f"{argument}: found {name!r}, wanted one of {', '.join(parts)} for {dataset}")
    if split not in (1, 2, 3):
        raise ValueError(f"split: found {split!r}, wanted 1, 2 or 3")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"root: found {str(root)!r}, wanted a folder that is there")
    draft = Draft(root.resolve())
    own = reader(draft, part, split, train)
    counts = Counter(listed=len(draft.entries), missing=len(draft.missing), duplicates=draft.duplicates)
    if not draft.entries:
        raise ValueError(f"root: found none of the {counts['missing']} videos of {dataset} {part} below {root}")
    listing = Listing(draft.root, list(draft.entries.values()), own, draft.missing, +counts)
    return listing if classes is None else labelled(listing, classes)


def labelled(listing, classes):
    """The listing with labels for these class names. Raises ValueError for a video of any other class."""
    if listing.classes is None:
        raise ValueError(f"{listing.entries[0].path}: found no class, wanted one of {shortened(classes)}")
    labels = {name: label for label, name in enumerate(classes)}
    for entry in listing.entries:
        if (name := listing.classes[entry.label]) not in labels:
            raise ValueError(f"{entry.path}: found the unknown class {name!r}, wanted one of {shortened(classes)}")
    entries = [replace(entry, label=labels[listing.classes[entry.label]]) for entry in listing.entries]
    return replace(listing, entries=entries, classes=list(classes))


def shortened(names, most=8):
    """The first names of a list, and the number of all."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} classes)" if len(names) > most else "")


class Draft:
    """A listing that is being read. It checks all paths, so that none leads out of the root."""

    def __init__(self, root):
        self.root, self.entries, self.missing, self.duplicates = root, {}, [], 0
        self._labels = {}

    def add(self, where, candidates, label, start=0, end=None):
        """Adds the first candidate path that is a file. If none is, the first one is counted as missing."""
        if self._labels.setdefault((candidates[0], start, end), label) != label:
            raise ValueError(f"{where}: found {candidates[0]} a second time, under another class")
        found = next((path for path in candidates if self.inside(where, path).is_file()), None)
        if found is None:
            self.missing.append(candidates[0])
        elif (found, start, end) in self.entries:
            self.duplicates += 1
        else:
            self.entries[found, start, end] = Entry(found, label, start, end)

    def inside(self, where, path):
        """The file for a path below the root, after following symbolic links."""
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\0" in path:
            raise ValueError(f"{where}: found {path!r}, wanted a path below the root, without '..'")
        whole = (self.root / pure).resolve()
        if not whole.is_relative_to(self.root):
            raise ValueError(f"{where}: found {path!r}, a link that leads out of the root to {whole}")
        return whole

    def folder(self, *names):
        """The first of these folders that exists, as a prefix of paths; empty, for the root itself, if none does."""
        return next((f"{name}/" for name in names if self.inside("root", name).is_dir()), "")

    def text(self, path):
        """The text of an annotation file. Names keep bytes that are not UTF-8, as the file system does."""
        file = self.inside("root", path)
        if not file.is_file():
            raise ValueError(f"root: found no {path} below {self.root}")
        return file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape")

    def lines(self, path):
        """(where, line) of all lines that are not blank. splitlines would also split at characters in names."""
        for number, line in enumerate(self.text(path).split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", line.strip(" \t\r")


def ucf101(draft, part, split, train):
    """ucfTrainTestlist/ and UCF-101/<Class>/<file>.avi. The name of the folder is the class."""
    lists, videos = draft.folder("ucfTrainTestlist"), draft.folder("UCF-101")
    numbers = {}
    for where, line in draft.lines(f"{lists}classInd.txt"):
        number, _, name = line.partition(" ")
        if not name or name in numbers or number != str(len(numbers) + 1):
            raise ValueError(f"{where}: found {line!r}, wanted '{len(numbers) + 1} <Class>', each class once")
        numbers[name] = number
    for where, line in draft.lines(f"{lists}{part}list0{split}.txt"):
        path, _, number = line.rpartition(" ") if part == "train" else (line, "", None)
        name = path.partition("/")[0]
        draft.inside(where, path)
        if name not in numbers:
            raise ValueError(f"{where}: found the unknown class {name!r}, wanted one of classInd.txt")
        if number not in (None, numbers[name]):
            raise ValueError(f"{where}: found the label {number!r}, wanted {numbers[name]} for {name}")
        draft.add(where, [videos + path], int(numbers[name]) - 1)
    return list(numbers)


def hmdb51(draft, part, split, train):
    """<class>_test_split<n>.txt with lines '<file>.avi <flag>' (1 train, 2 test, 0 neither), and <class>/<file>."""
    lists, videos = draft.folder("testTrainMulti_7030_splits", "splits"), draft.folder("hmdb51_org", "videos")
    ending = f"_test_split{split}.txt"
    names = sorted(name.removesuffix(ending) for name in os.listdir(draft.root / lists) if name.endswith(ending))
    if not names:
        raise ValueError(f"root: found no <class>{ending} below {draft.root / lists}")
    flags, train = dict(train="1", test="2"), train or "train"
    rows = {name: list(_hmdb51_rows(draft, f"{lists}{name}{ending}")) for name in names}
    classes = [name for name in names if any(flag == flags[train] for *_, flag in rows[name])]
    for name in names:
        for where, file, flag in rows[name]:
            if flag != flags[part]:
                continue
            if name not in classes:
                raise ValueError(f"{where}: found the class {name!r} without a video of {train}, wanted one at least")
            draft.add(where, [f"{videos}{name}/{file}"], classes.index(name))
    return classes


def _hmdb51_rows(draft, path):
    for where, line in draft.lines(path):
        file, _, flag = line.rpartition(" ")
        if flag not in ("0", "1", "2") or not file:
            raise ValueError(f"{where}: found {line!r}, wanted '<file> <flag>' with the flag 0, 1 or 2")
        draft.inside(where, file)
        yield where, file.rstrip(), flag


def kinetics400(draft, part, split, train):
    """<part>.csv: label,youtube_id,time_start,time_end,split[,is_cc]; <id>_<start>_<end>.mp4, often below <label>/."""
    folder = draft.folder("annotations")
    train = train or "train"
    rows = {name: list(_kinetics_rows(draft, f"{folder}{name}.csv")) for name in {train, part}}
    classes = sorted({row["label"] for _, row in rows[train]})
    labels = {name: label for label, name in enumerate(classes)}
    for where, row in rows[part]:
        if row["label"] not in labels:
            raise ValueError(f"{where}: found the unknown class {row['label']!r}, wanted one of {train}.csv")
        if KINETICS_PARTS.get(row["split"]) != part:
            raise ValueError(f"{where}: found the split {row['split']!r}, wanted that of {part}")
        try:
            file = f"{row['youtube_id']}_{int(row['time_start']):06}_{int(row['time_end']):06}.mp4"
        except ValueError:
            times = f"{row['time_start']!r} and {row['time_end']!r}"
            raise ValueError(f"{where}: found the times {times}, wanted whole seconds") from None
        folders = f"{part}/{row['label']}/", f"{row['label']}/", f"{part}/", ""
        draft.add(where, [path + file for path in folders], labels[row["label"]])
    return classes


def _kinetics_rows(draft, path):
    lines = csv.reader(line for line in draft.text(path).split("\n"))
    header = next(lines, [])
    header = [name.strip() for name in header]
    wanted = ["label", "youtube_id", "time_start", "time_end", "split"]
    if header[:5] != wanted:
        raise ValueError(f"{path}:1: found the columns {','.join(header)!r}, wanted {','.join(wanted)}")
    for row in lines:
        if any(cell.strip() for cell in row):
            if len(row) < 5:
                raise ValueError(f"{path}:{lines.line_num}: found {len(row)} columns, wanted {','.join(wanted)}")
            yield f"{path}:{lines.line_num}", dict(zip(header, (cell.strip() for cell in row), strict=False))


def diving48(draft, part, split, train):
    """Diving48_V2_<part>.json: [{vid_name, label, start_frame, end_frame}, ...], and rgb/<vid_name>.mp4."""
    path = f"{draft.folder('annotations')}Diving48_V2_{part}.json"
    try:
        items = json.loads(draft.text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: found no JSON: {error.msg}") from None
    for number, item in enumerate(items, 1):
        where = f"{path}: item {number}"
        if not isinstance(item, dict) or not {"vid_name", "label", "start_frame", "end_frame"} <= item.keys():
            raise ValueError(f"{where}: found {item!r}, wanted vid_name, label, start_frame and end_frame")
        label, start, end = (item[name] for name in ("label", "start_frame", "end_frame"))
        if type(label) is not int or not 0 <= label < DIVING48_CLASSES:
            raise ValueError(f"{where}: found the label {label!r}, wanted 0 to {DIVING48_CLASSES - 1}")
        if type(start) is not int or type(end) is not int or not 0 <= start < end:
            raise ValueError(f"{where}: found the frames {start!r} to {end!r}, wanted 0 <= start < end")
        draft.add(where, [f"{draft.folder('rgb')}{item['vid_name']}.mp4"], label, start, end)
    return [str(label) for label in range(DIVING48_CLASSES)]


def folder(draft, part, split, train):
    """Any folder of videos, or one for each part: <class>/<file>, or just files, which then have no labels."""
    train = train or ("train" if part != "all" and draft.inside("root", "train").is_dir() else part)
    classes, own = (_classes(draft, name) for name in (train, part))
    labels = {name: label for label, name in enumerate(classes or [])}
    prefix = "" if part == "all" else f"{part}/"
    for name in own or [""]:
        subfolder = f"{prefix}{name}/" if own else prefix
        for file in _videos(draft, subfolder):
            if own and name not in labels:
                known = f"one of {shortened(classes)}" if classes else "none"
                raise ValueError(f"{subfolder}{file}: found the unknown class {name!r}, wanted {known} of {train}/")
            draft.add(subfolder + file, [subfolder + file], labels[name] if own else None)
    return classes if own else None


def _classes(draft, part):
    """The names of a part's subfolders that contain videos, or None if there are none."""
    top, prefix = (draft.root, "") if part == "all" else (draft.inside("root", part), f"{part}/")
    if not top.is_dir():
        raise ValueError(f"part: found no folder {part!r} below {draft.root}; 'all' takes the videos of the root")
    below = sorted(name for name in os.listdir(top) if draft.inside(f"{prefix}{name}", prefix + name).is_dir())
    return [name for name in below if _videos(draft, f"{prefix}{name}/")] or None


def _videos(draft, subfolder):
    return sorted(name for name in os.listdir(draft.root / subfolder) if Path(name).suffix.lower() in SUFFIXES)


READERS = {
    "ucf101": (ucf101, ("train", "test")),
    "hmdb51": (hmdb51, ("train", "test")),
    "kinetics400": (kinetics400, ("train", "val", "test")),
    "diving48": (diving48, ("train", "test")),
    "folder": (folder, ("all", "train", "val", "test")),
}
