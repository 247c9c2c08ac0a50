"""An index of the frames of a video file, which is made once by decoding the file from end to end.

Containers do not say reliably where a frame is: timestamps may be guessed, repeated or missing, packets may be hidden
or have two frames, and a seek may land anywhere. So frames are counted in the order in which the decoder returns them.
Every position from which decoding may start later is tried, and must give the same frames, bit for bit, as decoding
from the beginning. Each video's index is kept as a small file in a cache folder.
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

FORMAT = 1  # version of the cached files; files of another version are made again
KEY_DISTANCE = 8  # the fewest packets between two starts
OVERLAP = 4  # frames that must agree beyond the first frame of the next start
SEEKABLE = {"mp4", "matroska"}  # containers with an index of their packets
MOST_PLACES = 64  # if more frames than this look the same, only these are compared
PLANAR = {"yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p"}  # 8 bits, a plane for each component


class Unreadable(ValueError):
    """The video file cannot be used. The message gives the reason in one line."""


@dataclass(frozen=True)
class Start:
    """A position to decode from: after a seek to `seek` and `skip` dropped frames, frame number `frame` comes next.

    landing: (pts, dts, size) of the first packet after the seek, with which a reader checks its position.
    """

    frame: int
    seek: int
    skip: int
    landing: tuple


@dataclass(frozen=True)
class Index:
    """The index of a file. reason: why it cannot be read, or None; size: (H, W) of the first frame, upright.

    changes: whether frames must be rotated or resized. times: the timestamps of all frames in seconds, if they identify
    every frame and every seek lands on its key frame; otherwise None.
    """

    frames: int = 0
    size: tuple = (0, 0)
    changes: bool = False
    starts: tuple = ()
    times: tuple | None = None
    reason: str | None = None


class Video:
    """An open file, decoded by libav on one thread, so that frames and errors always come in the same order."""

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
        """All packets from here on, including the empty last one. Raises Unreadable if the container is damaged."""
        try:
            for packet in self.container.demux(self.stream):
                self.landing = self.landing or stamps(packet)
                yield packet
        except av.FFmpegError as error:
            raise Unreadable(f"damaged: {reason(error)}") from error

    def packets_after(self, seek):
        """All packets after a seek. Raises Unreadable if the container is damaged."""
        try:
            self.container.seek(seek, stream=self.stream)
        except av.FFmpegError as error:
            raise Unreadable(f"damaged: {reason(error)}") from error
        yield from self.packets()

    def all_frames(self, seen=lambda packet: None):
        """All frames of the file. Raises Unreadable at the first error. Calls `seen` with each packet."""
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
        """The frames after a seek. Frames that depend on earlier ones may be damaged or missing."""
        for packet in self.packets_after(seek):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            yield from frames


def find(path):
    """The index of a file, from memory or from the cache, or made now. Raises Unreadable with the reason."""
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
    """(size, mtime, ctime) of a file, at least one of which differs after every change of the file.

    `cp -p`, archives and `touch -r` can restore the mtime, but not the ctime.
    """
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def enough(frames):
    """Returns the number of frames. Raises Unreadable if there are fewer than two."""
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
    """Makes the index of a file, which decodes it about three times. Errors of the disk or network are raised."""
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
    """A file decoded from end to end: the fingerprint and the timestamps of each frame, and its key packets.

    seekable: the container has an index of its packets; ordered: timestamps increase from frame to frame; changes:
    frames must be rotated or resized.
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
        """(skip, frame), if the fresh frames without the first `skip` are those of the file from `frame` on.

        fresh: (fingerprint, timestamps) of each frame. The result is None if the frames do not agree, or could be at
        several positions. Frames that look the same are distinguished by their timestamps if those of the file are
        ordered; otherwise, one of the frames that agree must be unique in the file.
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
    """The starts from which decoding gives the right frames, up to OVERLAP frames beyond the next start."""
    starts, until, following = [], len(walk.prints), walk.packets
    for number, key in reversed(walk.keys):
        start = _best(path, walk, key, following - number, until)
        if start:
            starts.append(start)
            until, following = start.frame, number
    return reversed(starts)


def _best(path, walk, key, distance, until):
    """The start for a key packet, before frame `until`, or None. If there are two, it is the later one.

    Most demuxers seek by decoding time, some by presentation time, so both are tried.
    """
    pts, dts, _ = key
    seeks = [time for time in dict.fromkeys((dts, pts)) if time is not None]
    try:
        exact = next((seek for seek in seeks if _landing(path, seek) == key), None)
        starts = [_tried(path, walk, seek, distance, until) for seek in (seeks if exact is None else [exact])]
    except Unreadable:  # the stream does not support seeks
        return None
    return max((start for start in starts if start and start.frame < until), key=lambda s: s.frame, default=None)


def _landing(path, seek):
    """The timestamps of the first packet after a seek, or None."""
    with Video(path) as video:
        next(video.packets_after(seek), None)
        return video.landing


def _tried(path, walk, seek, distance, until):
    """The start where a seek lands, if decoding from there gives the right frames until `until` + OVERLAP, or None."""
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
    """A hash of all pixels of a frame."""
    if frame.format.name not in PLANAR:
        parts = [frame.to_ndarray(format="rgb24", threads=1)]
    else:
        parts = [
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
            for plane in frame.planes
        ]
    return hash((frame.width, frame.height, *(part.tobytes() for part in parts)))


def turn(frame):
    """The steps that make a frame upright: ffmpeg's filters in its order, or degrees of a clockwise rotation."""
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
    """(H, W) of a frame in upright orientation."""
    return swapped((frame.height, frame.width), turn(frame))


def swapped(size, steps):
    """(H, W), or (W, H) if the steps exchange height and width."""
    return size[::-1] if {"transpose", "clock", "cclock"} & set(steps) else size


def _libraries():
    """The versions of the decoding libraries, since another version may seek or decode differently."""
    return [av.__version__, *(".".join(map(str, version)) for version in av.library_versions.values())]


def _folder():
    """The folder of the cached indices: TCLR_INDEX, or a folder in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TCLR_INDEX") or Path(caches) / "tclr" / "index")


def _load(file, key):
    """A cached index, or None if there is none for this version of the file, or if it is damaged."""
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
    """Writes to another name first and then renames, so that readers never see an incomplete file."""
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
