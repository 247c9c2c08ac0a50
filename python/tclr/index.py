"""Where the frames of a video file are, found out once by decoding it from end to end.

Containers do not tell: stamps are guessed, repeated or missing, packets are hidden or hold two frames, and a seek may
land anywhere. So frames are counted in the order in which the decoder puts them out, and every place from which
decoding may start later is tried: what comes from there must be, bit for bit, what the decoding from end to end gave.
What was found is kept in a folder of its own, one small file for each video.
"""

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import av
import numpy as np

FORMAT = 1  # of the cached files; another number makes all of them anew
KEY_DISTANCE = 8  # packets, at least, between two places to start from
OVERLAP = 4  # frames that must agree, beyond the place from which the next start takes over
SEEKABLE = {"mp4", "matroska"}  # containers that say where each packet is
MOST_PLACES = 64  # of frames that look alike: in more, it is not worth looking for the right one
PLANAR = {"yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p"}  # 8 bits, one plane for each component


class Unreadable(ValueError):
    """A file that is no video to learn from, and the reason in one line."""


@dataclass(frozen=True)
class Start:
    """A place to decode from: seek to `seek`, drop `skip` frames, and frame number `frame` comes next.

    landing: (pts, dts, size) of the first packet after the seek, by which a reader sees that it is in the right place.
    """

    frame: int
    seek: int
    skip: int
    landing: tuple


@dataclass(frozen=True)
class Index:
    """What is known about a file. reason: why it cannot be read, or None; size: (H, W) of the first frame, upright.

    changes: frames have to be turned, or differ in size. times: the stamp of each frame, in seconds, where stamps alone
    identify every frame and every seek lands on its key frame; None elsewhere.
    """

    frames: int = 0
    size: tuple = (0, 0)
    changes: bool = False
    starts: tuple = ()
    times: tuple | None = None
    reason: str | None = None


class Video:
    """An open file, decoded by libav on one thread, so that its frames and errors come in one order."""

    def __init__(self, path):
        try:
            self.container = av.open(str(path))
        except (av.FFmpegError, OSError) as error:
            raise Unreadable(f"no video file: {reason(error)}") from error
        self.landing = None

    def __enter__(self):
        try:
            streams = self.container.streams
            if not streams.video:
                raise Unreadable("no video stream: audio alone" if streams.audio else "no video stream")
            self.stream = streams.video[0]
            if self.stream.codec_context is None:
                raise Unreadable("no decoder for the video stream")
            self.stream.codec_context.thread_count = 1
        except BaseException:
            self.container.close()
            raise
        return self

    def __exit__(self, *_):
        self.container.close()

    def packets(self):
        """Every packet from here on, the empty last one too. Raises Unreadable where the container is damaged."""
        try:
            for packet in self.container.demux(self.stream):
                self.landing = self.landing or stamps(packet)
                yield packet
        except av.FFmpegError as error:
            raise Unreadable(f"damaged: {reason(error)}") from error

    def packets_after(self, seek):
        """Every packet from where a seek lands on. Raises Unreadable where the container is damaged."""
        try:
            self.container.seek(seek, stream=self.stream)
        except av.FFmpegError as error:
            raise Unreadable(f"damaged: {reason(error)}") from error
        yield from self.packets()

    def all_frames(self, seen=lambda packet: None):
        """Every frame of the file. Raises Unreadable at the first error; `seen` is called with each packet before."""
        cut = ""
        for packet in self.packets():
            seen(packet)
            cut = cut or "truncated, a packet is cut short: " * packet.is_corrupt
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                raise Unreadable(f"{cut}damaged: {reason(error)}") from error
            for frame in frames:
                if frame.is_corrupt:
                    raise Unreadable(f"{cut}damaged: the decoder reports errors in a frame")
                yield frame

    def frames_after(self, seek):
        """The frames that follow a seek. What refers to frames before it may be damaged or missing."""
        for packet in self.packets_after(seek):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            yield from frames


def find(path):
    """The index of a file, from memory, from the cache, or made now. Raises Unreadable with the reason."""
    try:
        path = Path(path).resolve()
        now = state(path)
    except OSError as error:
        raise Unreadable(f"no video file: {reason(error)}") from None
    index = _known(path, now)
    if index.reason:
        raise Unreadable(index.reason)
    return index


def state(path):
    """(size, time of the last change, the same of its entry) of a file: together they differ after every change.

    `cp -p`, archives and `touch -r` set the first time to what it was; the second one cannot be set.
    """
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def enough(frames):
    """The number of frames, if a clip can be taken from them. Raises Unreadable."""
    if frames < 2:
        raise Unreadable(f"found {frames} frames, wanted 2 or more")
    return frames


def reason(error):
    return getattr(error, "strerror", None) or type(error).__name__


def stamps(packet):
    return packet.pts, packet.dts, packet.size


@lru_cache(1 << 13)
def _known(path, now):
    known = dict(zip(("size", "modified", "changed"), now, strict=True))
    key = dict(format=FORMAT, path=os.fsencode(path).hex(), **known, libraries=_libraries())
    file = _folder() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:40]}.json"
    index = _load(file, key)
    if index is None:
        index = make(path)
        if state(path) == now:
            _save(file, key, index)
    return index


def make(path):
    """The index of a file by decoding it, about three times in all. An error of the disk or network is raised."""
    try:
        walk = _Walk(path)
        enough(len(walk.prints))
    except Unreadable as error:
        if isinstance(error.__cause__, OSError):
            raise
        return Index(reason=str(error))
    starts = tuple(_proven(path, walk))
    exact = len(starts) == len(walk.keys) and not any(start.skip for start in starts)
    by_time = exact and walk.seekable and walk.ordered and not walk.changes
    times = tuple(float(pts * walk.time_base) for pts, _ in walk.stamps) if by_time else None
    return Index(len(walk.prints), walk.size, walk.changes, starts, times)


class _Walk:
    """A file decoded from end to end: a fingerprint and the stamps of each frame, and its key packets.

    seekable: the container says where packets are; ordered: every stamp is above the one before; changes: frames have
    to be turned, or differ in size.
    """

    def __init__(self, path):
        self.prints, self.stamps, self.keys, self.packets, self.changes = [], [], [], 0, False
        with Video(path) as video:
            for frame in video.all_frames(self._note):
                if not self.prints:
                    self.size, coded = upright_size(frame), (frame.width, frame.height)
                self.changes |= coded != (frame.width, frame.height) or turn(frame) != ()
                self.prints.append(fingerprint(frame))
                self.stamps.append((frame.pts, frame.dts))
            self.time_base = video.stream.time_base
            self.seekable = bool(SEEKABLE & set(video.container.format.name.split(",")))
        times = [pts for pts, _ in self.stamps]
        self.ordered = None not in times and all(a < b for a, b in zip(times, times[1:], strict=False))
        self.places = defaultdict(list)
        for place, mark in enumerate(self.prints):
            self.places[mark].append(place)

    def _note(self, packet):
        last = self.keys[-1][0] if self.keys else 0
        if packet.is_keyframe and packet.size and self.packets - last >= KEY_DISTANCE:
            self.keys.append((self.packets, stamps(packet)))
        self.packets += 1

    def aligned(self, fresh):
        """(skip, frame): of the fresh frames, (fingerprint, stamps) each, all but `skip` are those from `frame` on.

        None where they are not, or could be in several places. Frames that look alike are told apart by their stamps if
        the file's stamps are in order; otherwise one of those that agree must be the only frame of its looks.
        """
        last, (mark, time) = len(fresh) - 1, fresh[-1]
        places = self.places.get(mark, [])
        timely = [place for place in places if self.ordered and time == self.stamps[place]]
        found = []
        for place in timely or places[:MOST_PLACES]:
            run = 0
            while run <= min(last, place) and fresh[last - run][0] == self.prints[place - run]:
                run += 1
            if timely or any(len(self.places[mark]) == 1 for mark, _ in fresh[last + 1 - run :]):
                found.append((last + 1 - run, place + 1 - run))
        return found[0] if len(found) == 1 else None


def _proven(path, walk):
    """The starts that give what the decoding from end to end gave, up to where the next one takes over and beyond."""
    starts, until, following = [], len(walk.prints), walk.packets
    for number, key in reversed(walk.keys):
        start = _best(path, walk, key, following - number, until)
        if start:
            starts.append(start)
            until, following = start.frame, number
    return reversed(starts)


def _best(path, walk, key, distance, until):
    """The start by a key packet that lies before frame `until`, the later one of two, or None.

    Most demuxers seek by the time of decoding, some by the time of showing.
    """
    pts, dts, _ = key
    seeks = [time for time in dict.fromkeys((dts, pts)) if time is not None]
    try:
        exact = next((seek for seek in seeks if _landing(path, seek) == key), None)
        starts = [_tried(path, walk, seek, distance, until) for seek in (seeks if exact is None else [exact])]
    except Unreadable:  # a stream in which nothing can be sought
        return None
    return max((start for start in starts if start and start.frame < until), key=lambda s: s.frame, default=None)


def _landing(path, seek):
    """The stamps of the first packet after a seek, or None."""
    with Video(path) as video:
        next(video.packets_after(seek), None)
        return video.landing


def _tried(path, walk, seek, distance, until):
    """The start at which a seek lands, if decoding from there agrees until OVERLAP frames beyond `until`, or None."""
    enough = min(until + OVERLAP, len(walk.prints))
    with Video(path) as video:
        frames, fresh = video.frames_after(seek), []
        while some := [(fingerprint(frame), (frame.pts, frame.dts)) for frame in islice(frames, distance + OVERLAP)]:
            fresh += some
            found = walk.aligned(fresh)
            if found is None and len(fresh) > 2 * distance + 4 * OVERLAP:
                return None
            if found and found[1] + len(fresh) - found[0] >= enough:
                return Start(found[1], seek, found[0], video.landing)
    return None


def fingerprint(frame):
    """A number that two frames share only if all their pixels are the same."""
    if frame.format.name not in PLANAR:
        parts = [frame.to_ndarray(format="rgb24", threads=1)]
    else:
        parts = [
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
            for plane in frame.planes
        ]
    return hash((frame.width, frame.height, *(part.tobytes() for part in parts)))


def turn(frame):
    """The steps that bring a frame upright, named and ordered as ffmpeg's own filters; a number: degrees clockwise."""
    stored = frame.side_data.get("DISPLAYMATRIX") if frame.side_data else None
    if stored is None:
        return ()
    a, b, _, c, d, *_ = np.frombuffer(bytes(stored), np.int32).tolist()
    if not (math.hypot(a, c) and math.hypot(b, d)):
        return ()
    angle = round(math.degrees(math.atan2(b / math.hypot(b, d), a / math.hypot(a, c)))) % 360
    if abs(angle - 90) < 1:
        return ("transpose",) if c > 0 else ("clock",)
    if abs(angle - 180) < 1:
        return ("hflip",) * (a < 0) + ("vflip",) * (d < 0)
    if abs(angle - 270) < 1:
        return ("clock", "vflip") if c < 0 else ("cclock",)
    if angle:
        return (angle,)
    return ("vflip",) * (d < 0)


def upright_size(frame):
    """(H, W) of a frame as it is shown."""
    return swapped((frame.height, frame.width), turn(frame))


def swapped(size, steps):
    """(H, W), or (W, H) where the steps turn a picture on its side."""
    return size[::-1] if {"transpose", "clock", "cclock"} & set(steps) else size


def _libraries():
    """What read the file: another version may seek or decode differently."""
    return [av.__version__, *(".".join(map(str, version)) for version in av.library_versions.values())]


def _folder():
    """Where indices are kept: TCLR_INDEX, or else below the user's folder of caches."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TCLR_INDEX") or Path(caches) / "tclr" / "index")


def _load(file, key):
    """A cached index, or None where there is none for this very file, or what is there is not whole."""
    try:
        checksum, _, text = file.read_text().partition("\n")
        if checksum != _checksum(text):
            return None
        plain = json.loads(text)
        if plain.pop("key") != key or plain.keys() != Index.__dataclass_fields__.keys():
            return None
        starts = tuple(Start(**{**start, "landing": tuple(start["landing"])}) for start in plain.pop("starts"))
        times = plain.pop("times")
        return Index(size=tuple(plain.pop("size")), starts=starts, times=times and tuple(times), **plain)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _save(file, key, index):
    """Writes under another name first, so that a reader meets a whole file or none."""
    text = json.dumps(dict(key=key, **asdict(index)))
    unfinished = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".part", delete=False) as written:
            unfinished = written.name
            written.write(f"{_checksum(text)}\n{text}")
        os.replace(unfinished, file)
    except OSError as error:
        if unfinished:
            Path(unfinished).unlink(missing_ok=True)
        _cannot_keep(str(file.parent), reason(error))


@lru_cache
def _cannot_keep(folder, why):
    warnings.warn(
        f"{folder}: {why}. The frame index of each video cannot be kept there, so every process makes it anew; "
        "TCLR_INDEX names another folder.",
        stacklevel=2,
    )


def _checksum(text):
    return hashlib.sha256(text.encode()).hexdigest()
