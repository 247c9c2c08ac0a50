"""Frames of a video file, by torchcodec where it loads and by PyAV otherwise; both decode from the nearest key frame.

AVI goes to PyAV in any case: it stores no times of showing, and with B frames torchcodec 0.13 then returns a neighbour.
The container's own count of frames is never asked: frames are numbered by the time stamps of the packets there are.
"""

from bisect import bisect_right
from pathlib import Path

import av
import numpy as np
import torch

try:
    import torchcodec
    from torchcodec.decoders import VideoDecoder
except (ImportError, OSError, RuntimeError):  # the last two: FFmpeg's libraries or the PyTorch it was built for are not
    torchcodec = None

PYAV = f"PyAV {av.__version__}"
DECODER = f"torchcodec {torchcodec.__version__}" if torchcodec else PYAV


class Unreadable(ValueError):
    """A file that is no video to learn from, and the reason in one line."""


def read(path, positions, decoder=DECODER):
    """The frames at these positions, in any order, repeats allowed: (uint8 [P, 3, H, W], how many are held frames).

    Where the decoder delivers fewer frames than there are packets, the last one it did deliver is held. Raises
    Unreadable, with the reason, where a frame wanted is damaged or there is none to hold.
    """
    positions = torch.as_tensor(positions)
    if decoder != PYAV and Path(path).suffix.lower() != ".avi":
        try:
            return VideoDecoder(str(path)).get_frames_at(positions.tolist()).data, 0
        except (RuntimeError, ValueError, IndexError):
            pass  # PyAV has the last word: it holds frames, and says what is wrong
    wanted, order = positions.unique(return_inverse=True)
    with _Video(path) as video:
        frames, held = video.frames(wanted.tolist())
    return frames if torch.equal(wanted, positions) else frames[order], held


def length(path):
    """How many frames the file's packets hold, without decoding one. Raises Unreadable with the reason."""
    with _Video(path) as video:
        return len(video.times)


def decode(path, decoder=DECODER):
    """Every frame of a file: uint8 [F, 3, H, W]. Raises Unreadable with the reason."""
    return read(path, range(length(path)), decoder)[0]


def delivered(path):
    """How many frames the decoder delivers, every one decoded, none kept. Raises Unreadable with the reason."""
    with _Video(path) as video:
        frames = 0
        for frame in video.decoded_from(0):
            _checked(frame)
            frames += 1
        return frames


class _Video:
    """An open file by PyAV. times: the time stamp of each frame, in the order of showing; keys: those of key frames."""

    def __init__(self, path):
        try:
            self.container = av.open(str(path))
        except (av.FFmpegError, OSError) as error:
            raise Unreadable(f"no video file: {_reason(error)}") from None

    def __enter__(self):
        try:
            self._index()
        except BaseException:
            self.container.close()
            raise
        return self

    def __exit__(self, *_):
        self.container.close()

    def _index(self):
        if not self.container.streams.video:
            raise Unreadable("no video stream: audio alone" if self.container.streams.audio else "no video stream")
        self.stream = self.container.streams.video[0]
        self.stream.thread_count = 1
        try:
            packets = [packet for packet in self.container.demux(self.stream) if packet.size]
        except av.FFmpegError as error:
            raise Unreadable(f"damaged: {_reason(error)}") from None
        if any(packet.is_corrupt for packet in packets):
            raise Unreadable("truncated: a packet is cut short")
        if len(packets) < 2:
            raise Unreadable(f"found {len(packets)} frames, wanted 2 or more")
        self.times = sorted(_time(packet) for packet in packets)
        self.keys = sorted(_time(packet) for packet in packets if packet.is_keyframe) or self.times[:1]

    def frames(self, wanted):
        """wanted: positions, ascending, each once; returns (uint8 [P, 3, H, W], how many of them are held frames)."""
        result, done, held, position, last = None, 0, 0, -1, None
        for frame in self.decoded_from(wanted[0]):
            if last is None:
                result = np.empty((len(wanted), frame.height, frame.width, 3), np.uint8)
            time = frame.pts if frame.pts is not None else frame.dts
            position = position + 1 if time is None else bisect_right(self.times, time) - 1
            while done < len(wanted) and wanted[done] <= position:
                exact = wanted[done] == position
                result[done] = _rgb(frame if exact or last is None else last)
                done, held = done + 1, held + (not exact)
            last = frame
            if done == len(wanted):
                break
        if held == done:
            raise Unreadable(f"nothing could be decoded from frame {wanted[0]} on")
        result[done:] = result[done - 1]
        return torch.from_numpy(result).permute(0, 3, 1, 2), held + len(wanted) - done

    def decoded_from(self, position):
        """Decoded frames from the last key frame that is not after `position`."""
        start = self.keys[max(0, bisect_right(self.keys, self.times[position]) - 1)]
        try:
            self.container.seek(start, stream=self.stream)
            yield from self.container.decode(self.stream)
        except av.FFmpegError as error:
            raise Unreadable(f"damaged: {_reason(error)}") from None


def _time(packet):
    return packet.pts if packet.pts is not None else packet.dts if packet.dts is not None else 0


def _rgb(frame):
    """uint8 [H, W, 3]. One thread: handing the rows of small frames out takes 20 times as long as converting them."""
    return _checked(frame).to_ndarray(format="rgb24", threads=1)


def _checked(frame):
    if frame.is_corrupt:
        raise Unreadable("damaged: the decoder reports errors in a frame")
    return frame


def _reason(error):
    return getattr(error, "strerror", None) or type(error).__name__
