"""Sets of videos: `Loaded` has all frames in memory, `Files` decodes them on demand.

Both offer what the trainer is written on: names, labels [videos] or None, classes or None, counts, len(),
length(i) -> frames of video i, and read(i, positions) -> uint8 [P, 3, H, W].
"""

import csv
import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from . import annotations, checkpoint, decode, processes

COUNTS = "missing", "unreadable", "replaced", "padded", "decoded", "held"  # the keys of `Files.counts`


@dataclass
class Loaded:
    """Decoded videos. frames: a list of uint8 [F, 3, H, W]; labels: [videos]; counts: of the decoding, see `load`."""

    names: list
    frames: list
    labels: torch.Tensor | None
    counts: Counter = field(default_factory=Counter)
    classes: list | None = None

    def __len__(self):
        return len(self.names)

    def length(self, i):
        return len(self.frames[i])

    def read(self, i, positions):
        return self.frames[i][torch.as_tensor(positions)]


class Files:
    """Videos that are decoded on demand. Several threads may read at the same time.

    A video with fewer than `shortest` frames is played forwards and backwards up to this length. An unreadable video is
    replaced by the next readable one in a random order that depends on `seed`, with the same class if there are labels,
    and is listed in `bad_videos` with the reason. The result of read(i, positions) depends on the files and the seed
    only, so a resumed run sees the same frames as an uninterrupted one. If `size` = (H, W) is given, all frames are
    resized to cover it and cropped around the centre.

    counts: "decoded", "replaced" and "held" count reads, "padded" and "unreadable" count videos. A read is "held" if
    the file has become shorter since its frames were counted, so that its last frame was repeated.
    """

    def __init__(self, listing, *, shortest=64, size=None, seed=0, bad_videos=None, decoder=decode.DECODER):
        self.root, self.entries, self.classes = listing.root, listing.entries, listing.classes
        self.names = [entry.path for entry in self.entries]
        labels = [entry.label for entry in self.entries]
        self.labels = None if self.classes is None else torch.tensor(labels)
        self.shortest, self.size, self.decoder = shortest, size, decoder
        self.counts = Counter(missing=len(listing.missing))
        self.bad_videos = Path(bad_videos) if bad_videos else None
        self._order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        self._place = {i: place for place, i in enumerate(self._order)}
        self.bad, self._frames, self._padded, self._lock = {}, {}, set(), threading.Lock()
        self._news = []

    def __len__(self):
        return len(self.entries)

    def length(self, i):
        """The number of frames of video i or its replacement."""
        return max(self.shortest, self._first_readable(i, self._own_length))

    def read(self, i, positions):
        """The frames at these positions, in any order, repeats allowed: uint8 [P, 3, H, W]"""
        return self._first_readable(i, lambda j: self._own_frames(j, torch.as_tensor(positions)))

    def _first_readable(self, i, function):
        """function(j) for j = i, or for the first readable video that can replace it."""
        for j in self._candidates(i):
            try:
                result = function(j)
            except decode.Unreadable as error:
                self._report(self.names[j], str(error))
                continue
            if j != i:
                self._count("replaced")
            return result
        raise ValueError(f"{self.names[i]} cannot be read, nor can any video that could take its place")

    def _candidates(self, i):
        start = self._place[i]
        for j in self._order[start:] + self._order[:start]:
            if self.labels is None or self.labels[j] == self.labels[i]:
                yield j

    def _own_length(self, j):
        """The number of frames of video j. Raises Unreadable instead of replacing the video."""
        if j not in self._frames:
            entry = self.entries[j]
            frames = decode.length(self.root / entry.path)
            self._frames[j] = (frames if entry.end is None else min(frames, entry.end)) - entry.start
        if self._frames[j] < 2:
            raise decode.Unreadable(f"found {self._frames[j]} frames from frame {self.entries[j].start} on, wanted 2")
        return self._frames[j]

    def _own_frames(self, j, positions):
        own = self._own_length(j)
        entry = self.entries[j]
        frames, held = decode.read(self.root / entry.path, entry.start + mirrored(positions, own), self.decoder)
        with self._lock:
            self.counts["decoded"] += 1
            self.counts["held"] += held > 0
            if own < self.shortest and j not in self._padded:
                self._padded.add(j)
                self.counts["padded"] += 1
        return frames if self.size is None else covered(frames, self.size)

    def findings(self):
        """The unreadable videos that this process has found since the last call: [(name, reason), ...]"""
        with self._lock:
            found, self._news = self._news, []
        return found

    def learn(self, findings):
        """Adds the unreadable videos that another process has found."""
        for name, reason in findings:
            self._report(name, reason, own=False)

    def tally(self):
        """The `counts` of all processes together, without those that are 0."""
        with self._lock:
            mine = self.counts.copy(), self._padded.copy()
        counts, padded = zip(*processes.exchange(mine), strict=True)
        total = {name: sum(each[name] for each in counts) for name in COUNTS}
        total |= dict(missing=self.counts["missing"], unreadable=len(self.bad), padded=len(set().union(*padded)))
        return {name: count for name, count in total.items() if count}

    def _count(self, what):
        with self._lock:
            self.counts[what] += 1

    def _report(self, name, reason, own=True):
        """Counts an unreadable video when it is found first, and adds it to the list unless it is already there."""
        with self._lock:
            if name in self.bad:
                return
            if own:
                self._news.append((name, reason))
            self.bad[name] = reason
            self.counts["unreadable"] += 1
            if self.bad_videos and name not in (listed := _listed(self.bad_videos)):
                _list(self.bad_videos, listed | {name: reason})


def share_findings(videos):
    """Exchanges the unreadable videos between the processes, so that the first process can list all of them."""
    files = isinstance(videos, Files)
    found = processes.exchange(videos.findings() if files else [])
    if any(found):
        with processes.together():  # what follows need not be an exchange
            for findings in found:
                videos.learn(findings)


def check_sizes(found):
    """Raises ValueError if two readable videos of the set `found` differ in size, since a batch needs one size.

    Each process checks its part of the videos, and all raise the same error.
    """
    paths = list(dict.fromkeys(entry.path for entry in found.entries))
    with processes.telling():
        own = _first_sizes(found.root, paths, range(processes.rank(), len(paths), processes.ranks()))
    seen = {}
    for size, place in sorted((each for some in processes.exchange(own) for each in some.items()), key=lambda x: x[1]):
        seen.setdefault(size, paths[place])
    if len(seen) > 1:
        named = " and ".join(f"{path} of {h} x {w}" for (h, w), path in list(seen.items())[:2])
        raise ValueError(f"data.size: found none, but {named}, wanted one size: set data.size = [H, W]")


def _first_sizes(root, paths, places):
    """{(H, W): place} for the first two sizes among the readable videos at these places."""
    seen = {}
    with ThreadPoolExecutor(8) as pool:
        for place, size in zip(places, pool.map(lambda place: _size(root / paths[place]), places), strict=True):
            if size and size not in seen and _readable(root / paths[place]):
                seen[size] = place
            if len(seen) > 1:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return seen


def _size(path):
    try:
        return decode.size(path)
    except decode.Unreadable:
        return None


def _readable(path):
    """Whether the whole file can be decoded. A file that is damaged after its first frame will be replaced."""
    try:
        return decode.length(path) > 0
    except decode.Unreadable:
        return False


def _listed(path):
    """{video: reason} from a list of unreadable videos; empty if there is no list."""
    if path is None or not path.exists():
        return {}
    with open(path, newline="", errors="surrogateescape") as file:
        return {row["video"]: row["reason"] for row in csv.DictReader(file)}


def _list(path, reasons):
    """Writes a list of bad videos, {video: reason}. On a full disk, the previous file stays."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("video", "reason"), *reasons.items()])
    with checkpoint.whole(path, shared=True) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def covered(frames, size):
    """Resizes frames to cover `size` = (H, W) and crops them around the centre. uint8 [P, 3, h, w] -> [P, 3, H, W]"""
    have, scale = frames.shape[2:], max(want / side for want, side in zip(size, frames.shape[2:], strict=True))
    if scale != 1:
        scaled = [max(want, round(scale * side)) for want, side in zip(size, have, strict=True)]
        frames = F.interpolate(frames, scaled, mode="bilinear", antialias=True)
    top, left = ((side - want) // 2 for want, side in zip(size, frames.shape[2:], strict=True))
    return frames[..., top : top + size[0], left : left + size[1]]


def mirrored(positions, frames):
    """Converts positions in a video that is played forwards, backwards, forwards, ... to positions in its frames."""
    there_and_back = torch.tensor([*range(frames), *range(frames - 2, 0, -1)])
    return there_and_back[positions % len(there_and_back)]


def mirror_pad(video, length):
    """Plays a short video forwards, backwards, forwards, ... up to `length` frames. video: [F, 3, H, W]"""
    return video[mirrored(torch.arange(length), len(video))]


def load(root, split, shortest, progress=iter):
    """Decodes a split of UCF101, such as "trainlist01", into memory.

    Videos with fewer than `shortest` frames are mirror-padded, and unreadable ones are left out; both are counted.
    """
    listing = annotations.read("ucf101", root, split[:-6], int(split[-2:]))
    videos, names, labels, counts = [], [], [], Counter(missing=len(listing.missing))
    for entry in progress(listing.entries):
        name = entry.path.removeprefix("UCF-101/")
        try:
            video = decode.decode(listing.root / entry.path)
        except decode.Unreadable as error:
            counts["unreadable"] += 1
            print(f"left out {name}: {error}")
            continue
        if len(video) < shortest:
            counts["padded"] += 1
            video = mirror_pad(video, shortest)
        counts["decoded"] += 1
        names.append(name)
        videos.append(video)
        labels.append(entry.label)
    if not videos:
        raise ValueError(f"{root}: no video of {split} could be decoded")
    return Loaded(names, videos, torch.tensor(labels), +counts, listing.classes)
