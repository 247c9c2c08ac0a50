"""Which frames a clip takes: the paper's window with its global and local clips, and the clips of an evaluation."""

from dataclasses import dataclass

import torch

from .videos import Loaded


@dataclass(frozen=True)
class ClipPlan:
    """A window of frames * stride frames: the global clip is every stride-th, the T = stride local clips its chunks.

    Of the global clip's frames, j * frames / T .. (j + 1) * frames / T - 1 lie in local clip j; with the paper's 16
    frames and stride 4 these are 4j..4j+3. The alignment is what the global-local loss relies on.
    """

    frames: int = 16
    stride: int = 4

    @property
    def window(self):
        return self.frames * self.stride

    @property
    def local_clips(self):
        return self.stride

    def global_frames(self):
        """Positions in the window: [frames]"""
        return torch.arange(0, self.window, self.stride)

    def local_frames(self):
        """Positions in the window: [T, frames]"""
        return torch.arange(self.window).reshape(self.local_clips, self.frames)

    def cut(self, windows):
        """Global clips [B, frames, ...] and local clips [B T, frames, ...], both without a copy of the windows."""
        return windows[:, :: self.stride], windows.unflatten(1, (self.local_clips, self.frames)).flatten(0, 1)


def random_windows(videos, chosen, length, generator, threads=None):
    """A window of each chosen video, its start uniform: [B, length, 3, H, W]

    videos: a set of videos, or the frames themselves, a list of [F, 3, H, W]. Every start is drawn before anything is
    read, so that `threads`, a concurrent.futures.Executor that reads several videos at once, changes no bit. A window
    is read once, and all the clips of a video are cut from it.
    """
    if not hasattr(videos, "read"):
        videos = Loaded(None, videos, None)
    starts = [int(torch.randint(videos.length(i) - length + 1, (), generator=generator)) for i in chosen]
    positions = [torch.arange(start, start + length) for start in starts]
    windows = list((threads.map if threads else map)(videos.read, chosen, positions))
    return torch.cat(windows).unflatten(0, (len(windows), length))  # unlike stack, cat leaves pixels' channels adjacent


def even_positions(total, count, frames, stride):
    """Positions of `count` evenly spaced clips of every stride-th of `total` frames: [count, frames]"""
    span = (frames - 1) * stride + 1
    if total < span:
        raise ValueError(f"video: found {total} frames, wanted at least {span} for {frames} at stride {stride}")
    starts = (torch.arange(count) + 0.5) * (total - span + 1) / count
    return starts.long()[:, None] + torch.arange(frames) * stride


def even_clips(video, count, frames, stride):
    """Evenly spaced clips of a video's frames. video: [F, 3, H, W]; returns [count, frames, 3, H, W]"""
    return video[even_positions(len(video), count, frames, stride)]


def read_even_clips(videos, i, count, frames, stride):
    """Evenly spaced clips of video i of a set, decoded once where they overlap: [count, frames, 3, H, W]"""
    positions = even_positions(videos.length(i), count, frames, stride)
    return videos.read(i, positions.flatten()).unflatten(0, positions.shape)


def spread(count, total):
    """Which `count` of `total` evenly spaced clips are themselves spread most evenly: [count]"""
    return ((torch.arange(count) + 0.5) * total / count).long()
