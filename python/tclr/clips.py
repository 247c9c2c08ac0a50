"""The frames of each clip: TCLR's window with its global and local clips, and the clips of an evaluation."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from .videos import Loaded


@dataclass(frozen=True)
class ClipPlan:
    """A window of frames * stride frames of a video, and the clips that are cut from it.

    The global clip is every stride-th frame of the window; the T = stride local clips are its consecutive parts. Frames
    j * frames / T to (j + 1) * frames / T - 1 of the global clip are also in local clip j; with the paper's 16 frames
    and stride 4 these are 4j to 4j + 3. The global-local loss relies on this alignment.

    windows: with "same", both views of a video show the same window. LL and GL need this. The official release also
    uses it, and its IC also compares local clips (`ic_local`). With "independent", each view shows another window, as
    in CVRL and in the paper's baseline "IC", so that the instance loss enforces invariance to time.
    decay: for independent windows. None draws the two starts independently. A number p >= 0 draws their distance t in
    0..R with a probability proportional to (1 - t / (R + 1))^p: 0 makes all distances equally likely, 1 is CVRL's
    linear decrease, and larger numbers prefer near windows more.
    """

    frames: int = 16
    stride: int = 4
    windows: Literal["same", "independent"] = "same"
    decay: float | None = None

    def __post_init__(self):
        if self.windows not in ("same", "independent"):
            raise ValueError(f"clips.windows: found {self.windows!r}, wanted 'same' or 'independent'")
        if self.decay is not None and self.windows == "same":
            raise ValueError(f"clips.decay: found {self.decay} beside windows 'same', wanted windows 'independent'")
        if self.decay is not None and not 0 <= self.decay < math.inf:
            raise ValueError(f"clips.decay: found {self.decay}, wanted a finite number of at least 0")

    @property
    def window(self):
        return self.frames * self.stride

    @property
    def local_clips(self):
        return self.stride

    @property
    def windows_drawn(self):
        """The number of windows that are drawn from a video for its two views."""
        return 1 if self.windows == "same" else 2

    def cut(self, windows):
        """Global clips [B, frames, ...] and local clips [B T, frames, ...], both without a copy of the windows."""
        return windows[:, :: self.stride], windows.unflatten(1, (self.local_clips, self.frames)).flatten(0, 1)


def random_windows(videos, chosen, plan, generator, threads=None, own=None):
    """Random windows of the chosen videos: [B, window, 3, H, W], or [2 B, ...] if `plan` has independent windows.

    With two windows of each video, the first windows of all videos come first.

    videos: a set of videos, or a list of their frames [F, 3, H, W].
    threads: a concurrent.futures.Executor that reads several videos at once. All starts are drawn before anything is
    read, so the result does not depend on it.
    own: a range of positions in `chosen`. Only these videos are read, but the same random numbers are drawn.
    """
    if not hasattr(videos, "read"):
        videos = Loaded(None, videos, None)
    own = range(len(chosen)) if own is None else own
    # All processes draw the same random numbers: as many for each video, however long it is. So no process has to open
    # the videos of another.
    lengths = [videos.length(i) if place in own else plan.window for place, i in enumerate(chosen)]
    starts = [random_starts(length - plan.window, plan, generator) for length in lengths]
    chosen, starts = ([each[place] for place in own] for each in (chosen, starts))
    positions = [(torch.tensor(some)[:, None] + torch.arange(plan.window)).flatten() for some in starts]
    windows = list((threads.map if threads else map)(videos.read, chosen, positions))
    if plan.windows_drawn == 2:
        windows = [window[half] for half in (slice(plan.window), slice(plan.window, None)) for window in windows]
    return torch.cat(windows).unflatten(0, (-1, plan.window))  # unlike stack, cat keeps the memory order of channels


def random_starts(latest, plan, generator):
    """The first frames of the windows of one video, each in 0..latest: a list of one or two.

    The number of random numbers that are drawn does not depend on `latest`.
    """
    draw = lambda last: int(torch.randint(last + 1, (), generator=generator))  # noqa: E731
    if plan.decay is None:
        return [draw(latest) for _ in range(plan.windows_drawn)]
    likely = (1 - torch.arange(latest + 1, dtype=torch.float64) / (latest + 1)) ** plan.decay
    drawn = torch.rand((), dtype=torch.float64, generator=generator) * likely.sum()
    distance = min(latest, int(torch.searchsorted(likely.cumsum(0), drawn, right=True)))
    pair = draw(latest - distance)
    return [pair, pair + distance][:: 1 - 2 * draw(1)]


def even_positions(total, count, frames, stride):
    """Positions of `count` evenly spaced clips of every stride-th of `total` frames: [count, frames]"""
    span = (frames - 1) * stride + 1
    if total < span:
        raise ValueError(f"video: found {total} frames, wanted at least {span} for {frames} at stride {stride}")
    starts = (torch.arange(count) + 0.5) * (total - span + 1) / count
    return starts.long()[:, None] + torch.arange(frames) * stride


def read_even_clips(videos, i, count, frames, stride):
    """Evenly spaced clips of video i of a set: [count, frames, 3, H, W]. Frames in several clips are decoded once."""
    positions = even_positions(videos.length(i), count, frames, stride)
    return videos.read(i, positions.flatten()).unflatten(0, positions.shape)


def spread(count, total):
    """The indices of `count` clips that are spread evenly over `total` clips: [count]"""
    return ((torch.arange(count) + 0.5) * total / count).long()
