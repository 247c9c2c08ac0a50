"""Sets of videos: `Loaded` holds every frame in memory, `Files` decodes what is asked for.

Both offer what the trainer is written on: names, labels [videos] or None, classes or None, counts, len(),
length(i, counted) -> frames of video i, and read(i, positions) -> uint8 [P, 3, H, W].
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

COUNTS = "missing", "unreadable", "replaced", "padded", "decoded", "held"  # of `Files`


@dataclass
class Loaded:
    """Decoded videos. frames: a list of uint8 [F, 3, H, W]; labels: [videos]; counts: how the decoding went."""

    names: list
    frames: list
    labels: torch.Tensor | None
    counts: Counter = field(default_factory=Counter)
    classes: list | None = None

    def __len__(self):
        return len(self.names)

    def length(self, i, counted=True):
        return len(self.frames[i])

    def read(self, i, positions):
        return self.frames[i][torch.as_tensor(positions)]


class Files:
    """Videos decoded on demand; safe to read from several threads.

    A video under `shortest` frames is played forwards and backwards up to it. One that cannot be read is replaced by
    the next readable one in an order drawn from `seed`, of the same class where there are labels, and listed in
    `bad_videos` with the reason. What read(i, positions) returns depends on nothing but the files and the seed, never
    on what was read before: a resumed run sees what the uninterrupted one would have seen. `size` = (H, W) brings
    videos of different sizes to one, covered and cut around the centre; without it they stay as they are.

    counts: decoded, replaced, held (reads; "held" where a file has become shorter since its frames were counted, and
    its last one was repeated); padded, unreadable (videos).
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

    def length(self, i, counted=True):
        """Frames of video i, or of the one that stands in for it. counted=False: where another process reads it."""
        return max(self.shortest, self._first_readable(i, self._own_length, counted))

    def read(self, i, positions):
        """The frames at these positions, in any order, repeats allowed: uint8 [P, 3, H, W]"""
        return self._first_readable(i, lambda j: self._own_frames(j, torch.as_tensor(positions)))

    def _first_readable(self, i, function, counted=True):
        """function(j) of video i, or of the first that takes its place."""
        for j in self._candidates(i):
            try:
                result = function(j)
            except decode.Unreadable as error:
                self._report(self.names[j], str(error))
                continue
            if j != i and counted:
                self._count("replaced")
            return result
        raise ValueError(f"{self.names[i]} cannot be read, nor can any video that could take its place")

    def _candidates(self, i):
        start = self._place[i]
        for j in self._order[start:] + self._order[:start]:
            if self.labels is None or self.labels[j] == self.labels[i]:
                yield j

    def _own_length(self, j):
        """Frames of video j itself."""
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
        """The bad videos that this process met since the last call: [(name, reason), ...]"""
        with self._lock:
            found, self._news = self._news, []
        return found

    def learn(self, findings):
        """Takes the bad videos that another process met as met here."""
        for name, reason in findings:
            self._report(name, reason, own=False)

    def tally(self):
        """`counts` of all processes together, those that are not 0."""
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
        """Counts a bad video when it is first met, and lists it unless an earlier run or another set has."""
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
    """Every process learns which bad videos the others met, so that the first one lists them all."""
    files = isinstance(videos, Files)
    found = processes.exchange(videos.findings() if files else [])
    if any(found):
        with processes.together():  # what follows need not be an exchange
            for findings in found:
                videos.learn(findings)


def check_sizes(found, threads=8):
    """Raises ValueError where two readable videos of the set `found` differ in size: batches need one size.

    Each process looks at its part of the videos; the error is the same in all.
    """
    paths = list(dict.fromkeys(entry.path for entry in found.entries))
    with processes.telling():
        own = _first_sizes(found.root, paths, range(processes.rank(), len(paths), processes.ranks()), threads)
    seen = {}
    for size, place in sorted((each for some in processes.exchange(own) for each in some.items()), key=lambda x: x[1]):
        seen.setdefault(size, paths[place])
    if len(seen) > 1:
        named = " and ".join(f"{path} of {h} x {w}" for (h, w), path in list(seen.items())[:2])
        raise ValueError(f"data.size: found none, but {named}, wanted one size: set data.size = [H, W]")


def _first_sizes(root, paths, places, threads):
    """{(H, W): place} of the first two sizes that readable videos at these places have."""
    seen = {}
    with ThreadPoolExecutor(threads) as pool:
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
    """By the whole file: one that is damaged behind its first frame is replaced, whatever its size."""
    try:
        return decode.length(path) > 0
    except decode.Unreadable:
        return False


def _listed(path):
    """{video: reason} of a list of bad videos; none where there is no list."""
    if path is None or not path.exists():
        return {}
    with open(path, newline="", errors="surrogateescape") as file:
        return {row["video"]: row["reason"] for row in csv.DictReader(file)}


def _list(path, reasons):
    """Writes a list of bad videos, {video: reason}, whole: on a full disk the one before stays."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("video", "reason"), *reasons.items()])
    with checkpoint.whole(path, shared=True) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))


def covered(frames, size):
    """Frames scaled until they cover `size` = (H, W), cut around the centre. uint8 [P, 3, h, w] -> [P, 3, H, W]"""
    have, scale = frames.shape[2:], max(want / side for want, side in zip(size, frames.shape[2:], strict=True))
    if scale != 1:
        scaled = [max(want, round(scale * side)) for want, side in zip(size, have, strict=True)]
        frames = F.interpolate(frames, scaled, mode="bilinear", antialias=True)
    top, left = ((side - want) // 2 for want, side in zip(size, frames.shape[2:], strict=True))
    return frames[..., top : top + size[0], left : left + size[1]]


def mirrored(positions, frames):
    """Positions of a video played forwards, backwards, forwards, ... as positions in its `frames` frames."""
    there_and_back = torch.tensor([*range(frames), *range(frames - 2, 0, -1)])
    return there_and_back[positions % len(there_and_back)]


def mirror_pad(video, length):
    """Plays a short video forwards, backwards, forwards, ... up to `length` frames. video: [F, 3, H, W]"""
    return video[mirrored(torch.arange(length), len(video))]


def load(root, split, shortest, progress=iter):
    """Decodes a split of UCF101, such as "trainlist01", into memory.

    Videos under `shortest` frames are mirror-padded, unreadable ones left out; both are counted.
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
