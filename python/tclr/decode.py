"""Reads any frames of a video file. They are exactly those that decoding the file from its beginning would give.

The frames are those of `ffmpeg -map 0:v:0 -fps_mode passthrough`, in its order and orientation, and resized to the size
of the first one. index.py finds the positions from which decoding may start. Frames are decoded by torchcodec if it is
installed and the file's timestamps identify its frames, and by PyAV otherwise.
"""

from bisect import bisect_right
from contextlib import suppress
from itertools import islice

import av
import numpy as np
import torch

from . import index
from .index import Unreadable  # noqa: F401

try:
    import torchcodec
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError):  # the last two: FFmpeg is missing, or PyTorch has another version
    torchcodec = None

PYAV = f"PyAV {av.__version__}"
DECODER = f"torchcodec {torchcodec.__version__}" if torchcodec else PYAV


def read(path, positions, decoder=DECODER):
    """The frames at these positions, and how many of the positions are past the end: (uint8 [P, 3, H, W], int).

    Positions may have any order and may repeat. A position past the end gives the last frame. Raises Unreadable, with
    the reason, if the file cannot be decoded from end to end without an error, and ValueError for a negative position.
    """
    found = index.find(path)
    positions = torch.as_tensor(positions)
    if len(positions) == 0 or positions.min() < 0:
        raise ValueError(f"positions: found {positions.tolist()}, wanted one or more, none of them negative")
    held = int((positions >= found.frames).sum())
    positions = positions.clamp(max=found.frames - 1)
    if decoder != PYAV and found.times and (frames := _by_torchcodec(path, found, positions.tolist())) is not None:
        return frames, held
    wanted, order = positions.unique(return_inverse=True)
    frames = _by_pyav(path, found, wanted.tolist())
    return frames if torch.equal(wanted, positions) else frames[order], held


def length(path):
    """The number of frames that decoding the file gives. Raises Unreadable with the reason."""
    return index.find(path).frames


def size(path):
    """(H, W) of the first frame. Raises Unreadable with the reason."""
    with index.Video(path) as video:
        for frame in video.all_frames():
            return index.upright_size(frame)
    return index.enough(0)


def decode(path, decoder=DECODER):
    """All frames of a file: uint8 [F, 3, H, W]. Raises Unreadable with the reason. With PyAV, this makes no index."""
    if decoder != PYAV:
        return read(path, range(length(path)), decoder)[0]
    size, frames = None, []
    with index.Video(path) as video:
        for frame in video.all_frames():
            size = size or index.upright_size(frame)
            frames.append(_upright(frame, size).copy())
    index.enough(len(frames))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _by_torchcodec(path, found, positions):
    """The frames, or None if torchcodec fails, or returns a frame whose timestamp differs from that in the index."""
    try:
        decoder = VideoDecoder(str(path))
        if len(decoder) != found.frames:
            return None
        batch = decoder.get_frames_at(positions)
    except (RuntimeError, ValueError, IndexError):
        return None
    expected = torch.tensor([found.times[position] for position in positions], dtype=torch.float64)
    return batch.data if torch.allclose(batch.pts_seconds, expected, rtol=0, atol=1e-4) else None


def _by_pyav(path, found, wanted):
    """The frames at positions `wanted`, which are ascending and unique."""
    start = bisect_right(found.starts, wanted[0], key=lambda start: start.frame) - 1
    if start >= 0:
        with suppress(Unreadable):
            if (frames := _from(path, found, wanted, found.starts[start])) is not None:
                return frames
    if (frames := _from(path, found, wanted)) is None:
        raise Unreadable(f"found fewer than the {found.frames} frames that were there when its index was made")
    return frames


def _from(path, found, wanted, start=None):
    """Decodes from `start` or the beginning. None if the seek lands elsewhere, or the file has too few frames."""
    result = np.empty((len(wanted), *found.size, 3), np.uint8)
    with index.Video(path) as video:
        frames = video.all_frames() if start is None else islice(video.frames_after(start.seek), start.skip, None)
        done = 0
        for position, frame in enumerate(frames, start.frame if start else 0):
            if start and video.landing != start.landing:
                return None
            if position == wanted[done]:
                result[done] = _upright(frame, found.size) if found.changes else _rgb(frame)
                done += 1
                if done == len(wanted):
                    return torch.from_numpy(result).permute(0, 3, 1, 2)
    return None


def _rgb(frame, **options):
    """A frame as uint8 [H, W, 3], not copied. It uses one thread, since several are much slower for small frames."""
    frame = frame.reformat(format="rgb24", threads=1, **options)
    (plane,) = frame.planes
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : 3 * frame.width]
    return rows.reshape(frame.height, frame.width, 3)


def _upright(frame, size):
    """A frame in upright orientation, resized to `size`: uint8 [H, W, 3]"""
    steps = index.turn(frame)
    height, width = index.swapped(size, steps)
    other = (height, width) != (frame.height, frame.width)
    picture = _rgb(frame, **(dict(width=width, height=height, interpolation="BICUBIC") if other else {}))
    for step in steps:
        picture = TURNS[step](picture) if step in TURNS else _rotated(picture, step)
    return picture


TURNS = {
    "hflip": lambda picture: picture[:, ::-1],
    "vflip": lambda picture: picture[::-1],
    "clock": lambda picture: np.rot90(picture, -1),
    "cclock": np.rot90,
    "transpose": lambda picture: picture.transpose(1, 0, 2),
}


def _rotated(picture, degrees):
    """A picture rotated clockwise without changing its size, by the filter that ffmpeg uses."""
    graph, picture = av.filter.Graph(), av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    first = graph.add_buffer(width=picture.width, height=picture.height, format=picture.format, time_base=1)
    graph.link_nodes(first, graph.add("rotate", f"{degrees}*PI/180"), graph.add("buffersink")).configure()
    graph.vpush(picture)
    return _rgb(graph.vpull())
