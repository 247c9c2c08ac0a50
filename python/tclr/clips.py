"""Which frames a clip takes: the paper's window with its global and local clips, and the clips of an evaluation."""

from dataclasses import dataclass

import torch


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


def random_windows(videos, chosen, length, generator):
    """A window of each chosen video, its start uniform. videos: list of [F, 3, H, W]; returns [B, length, 3, H, W]"""
    windows = []
    for i in chosen:
        last = len(videos[i]) - length
        start = int(torch.randint(last + 1, (), generator=generator))
        windows.append(videos[i][start : start + length])
    return torch.stack(windows)


def even_clips(video, count, frames, stride):
    """`count` evenly spaced clips of every stride-th frame. video: [F, 3, H, W]; returns [count, frames, 3, H, W]"""
    span = (frames - 1) * stride + 1
    if len(video) < span:
        raise ValueError(f"video: found {len(video)} frames, wanted at least {span} for {frames} at stride {stride}")
    starts = (torch.arange(count) + 0.5) * (len(video) - span + 1) / count
    return video[starts.long()[:, None] + torch.arange(frames) * stride]


def spread(count, total):
    """Which `count` of `total` evenly spaced clips are themselves spread most evenly: [count]"""
    return ((torch.arange(count) + 0.5) * total / count).long()
