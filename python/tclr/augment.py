"""Random augmentations of a batch of clips. Each clip has its own random parameters, the same for all of its frames.

kornia is not used, since its VideoSequential needs 3 s for eight clips of 16 frames on two cores. Here, all colour
changes of a clip except gamma are one 3x3 matrix, applied to a whole batch on a GPU and clip by clip on the CPU.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

LUMA = torch.tensor([0.299, 0.587, 0.114])


class Random:
    """Draws random numbers for a batch of clips.

    share: (own, batch), if the clips are those of a range `own` of the videos in a batch of `batch` videos. Numbers are
    drawn for the whole batch, and those of the own videos are returned, so that they do not depend on how the videos
    are distributed over processes. Clips are in the order [2 views, videos, clips of a view].
    """

    def __init__(self, generator, share=None):
        self.generator, self.share = generator, share

    def _drawn(self, draw, N, *shape):
        """draw(shape, generator=) for N clips."""
        if self.share is None:
            return draw((N, *shape), generator=self.generator)
        own, batch = self.share
        clips = N // (2 * len(own))
        whole = draw((2 * batch * clips, *shape), generator=self.generator)
        return whole.unflatten(0, (2, batch, clips))[:, own.start : own.stop].flatten(0, 2)

    def _uniform(self, low, high, *shape):
        return low + (high - low) * self._drawn(torch.rand, *shape)

    def _happens(self, probability, *shape):
        return self._drawn(torch.rand, *shape) < probability


class Augment(Random):
    """Clips uint8 [N, F, 3, H, W] -> float in [0, 1], [N, F, 3, side, side]: random crop, colours, an erased rectangle.

    Clips are not flipped, since the direction of motion is what the network has to learn.
    """

    def __init__(self, side, generator, *, share=None):
        super().__init__(generator, share)
        self.side = side

    def __call__(self, clips, views=1):
        return self._erased(self._recoloured(self._cropped(torch.cat([clips] * views).float() / 255)))

    def _cropped(self, clips):
        """Crops and resizes a random square with a side of U[0.7, 1]: [N, F, 3, H, W] -> [N, F, 3, side, side]"""
        N, frames = clips.shape[:2]
        size = self._uniform(0.7, 1, N)
        centre = self._uniform(-1, 1, N, 2) * (1 - size)[:, None]
        theta = torch.cat([torch.diag_embed(size[:, None].expand(N, 2)), centre[:, :, None]], 2)
        grid = F.affine_grid(theta, (N, 1, self.side, self.side), align_corners=False)
        images = F.grid_sample(clips.flatten(1, 2), grid, padding_mode="border", align_corners=False)
        return images.unflatten(1, (frames, 3))

    def _recoloured(self, clips):
        """Changes contrast, saturation, hue and grayscale by one 3x3 matrix for each clip, and then brightness."""
        N = len(clips)
        matrix = hue_rotation(self._uniform(-math.pi, math.pi, N))
        saturation = self._uniform(0.6, 1.4, N) * ~self._happens(0.3, N)
        gray = LUMA.expand(3, 3)
        matrix = (saturation[:, None, None] * torch.eye(3) + (1 - saturation)[:, None, None] * gray) @ matrix
        matrix = self._uniform(0.6, 1.4, N)[:, None, None] * matrix
        centred = torch.einsum("nij,nfjhw->nfihw", matrix, clips - 0.5)
        return (centred + 0.5 + self._uniform(-0.15, 0.15, N)[:, None, None, None, None]).clamp_(0, 1)

    def _erased(self, clips):
        """Sets a rectangle to gray in half of the clips, with sides of a quarter to a half of the frame's side."""
        N, pixel = len(clips), torch.arange(self.side)
        start = self._uniform(0, 0.75, N, 2) * self.side
        extent = self._uniform(0.25, 0.5, N, 2) * self.side * self._happens(0.5, N, 1)
        within = (pixel >= start[..., None]) & (pixel < (start + extent)[..., None])
        hole = within[:, 0, :, None] & within[:, 1, None, :]
        return clips.masked_fill_(hole[:, None, None], 0.5)


def hue_rotation(angle):
    """Rotations of RGB about the gray axis. angle: [N]; returns [N, 3, 3]"""
    angle, axis = angle[:, None, None], 1 / math.sqrt(3)
    cross = axis * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) / 3


@dataclass(frozen=True)
class Strengths:
    """The probability and the largest deviation of each operation of the official release."""

    smallest_crop: float = 0.6  # side of the square, as a share of the height
    contrast: tuple = (0.125, 0.25)
    hue: tuple = (0.3, 0.1)  # in turns
    saturation: tuple = (0.3, 0.25)
    brightness: tuple = (0.3, 0.25)
    grayscale: float = 0.175
    gamma: tuple = (0.75, 0.25)  # of the clips in grayscale
    drop_channel: float = 0.125  # of the clips that keep their colours
    flip: float = 0.5
    erase: float = 0.5
    erased: tuple = (9, 18)  # sides of the rectangle, in pixels


class ReleaseAugment(Random):
    """Clips uint8 [N, F, 3, H, W] on any device -> float in [0, 1], [N, F, 3, side, side], as in the official release.

    The operations, in the release's order: a random square, resized with anti-aliasing; contrast, hue, saturation,
    brightness; grayscale and then gamma, or a dropped channel; flip; a rectangle set to gray. In the release, a bug
    restricts the square to the left part of the frame; here it may be anywhere. Hue is a rotation of RGB about the gray
    axis. Colours are clamped to [0, 1] once, before gamma. In memory, the frames of a channel are contiguous, as 3D
    convolutions need them.

    The parameters are drawn on the CPU by `generator`, so they are the same on every device.
    """

    def __init__(self, side, generator, strengths=Strengths(), *, share=None):  # noqa: B008 (frozen)
        super().__init__(generator, share)
        self.side, self.strengths = side, strengths

    def __call__(self, clips, views=1):
        """The augmented clips, one view after another: [views N, F, 3, side, side]"""
        N, (H, W) = views * len(clips), clips.shape[-2:]
        boxes, flips = self._crops(N, H, W)
        matrix, shift, gamma = self._colours(N)
        holes = self._holes(N)
        coloured = torch.empty(N, 3, clips.shape[1], self.side, self.side, device=clips.device)
        at_once = 1 if clips.device.type == "cpu" else N  # on the CPU, a single clip stays in the cache
        for first in range(0, N, at_once):
            some = slice(first, first + at_once)
            small = self._resized(clips, first, boxes[some], flips[some])
            coloured[some] = self._recoloured(small, matrix[some], shift[some])
        for n in (gamma != 1).nonzero().flatten().tolist():
            coloured[n].pow_(gamma[n].item())
        return coloured.masked_fill_(holes.to(clips.device, non_blocking=True), 0.5).transpose(1, 2)

    def _factor(self, name, N):
        """1 + U[-far, far] for clips with this operation, 1 for others: [N]"""
        probability, far = getattr(self.strengths, name)
        return 1 + self._uniform(-far, far, N) * self._happens(probability, N)

    def _crops(self, N, H, W):
        """Random squares [(top, left, side), ...] in pixels, and which clips are flipped: [N]"""
        sides = (self._uniform(self.strengths.smallest_crop, 1, N) * min(H, W)).round()
        top, left = ((self._uniform(0, 1, N) * (length - sides + 1)).floor() for length in (H, W))
        return torch.stack([top, left, sides], 1).int().tolist(), self._happens(self.strengths.flip, N).tolist()

    def _colours(self, N):
        """matrix [N, 3, 3], shift [N, 3] as a multiple of the clip's mean luma, and gamma [N], 1 if there is none."""
        contrast, hue = self._factor("contrast", N), self._factor("hue", N) - 1
        saturation, brightness = self._factor("saturation", N), self._factor("brightness", N)
        gray, gamma = self._happens(self.strengths.grayscale, N), self._factor("gamma", N)
        drop = self._happens(self.strengths.drop_channel, N) & ~gray
        dropped = F.one_hot(self._drawn(partial(torch.randint, 3), N), 3) * drop[:, None]
        saturation = torch.where(gray, 0, saturation)[:, None, None]
        matrix = saturation * torch.eye(3) + (1 - saturation) * LUMA.expand(3, 3)
        matrix = (contrast * brightness)[:, None, None] * matrix @ hue_rotation(2 * math.pi * hue)
        shift = ((1 - contrast) * brightness)[:, None].expand(N, 3)
        return matrix * (1 - dropped)[:, :, None], shift * (1 - dropped), torch.where(gray, gamma, 1)

    def _holes(self, N):
        """The erased rectangles: [N, 1, 1, side, side]"""
        pixel = torch.arange(self.side)
        extent = self._uniform(*self.strengths.erased, N, 2).round() * self._happens(self.strengths.erase, N)[:, None]
        start = (self._uniform(0, 1, N, 2) * (self.side - extent + 1)).floor()
        within = (pixel >= start[..., None]) & (pixel < (start + extent)[..., None])
        return (within[:, 0, :, None] & within[:, 1, None, :])[:, None, None]

    def _resized(self, clips, first, boxes, flips):
        """Crops, resizes and flips each clip: uint8 [., F, 3, H, W] -> uint8 [N, 3, F, side, side]"""
        small = clips.new_empty(len(boxes), 3, clips.shape[1], self.side, self.side)
        for n, (top, left, side) in enumerate(boxes):
            square = clips[(first + n) % len(clips), ..., top : top + side, left : left + side]
            square = square if clips.device.type == "cpu" else square.float()  # PyTorch resizes uint8 on the CPU only
            square = F.interpolate(square, (self.side, self.side), mode="bilinear", antialias=True)
            square = square if square.dtype == torch.uint8 else square.round_()
            small[n] = (square.flip(-1) if flips[n] else square).transpose(0, 1)
        return small

    def _recoloured(self, small, matrix, shift):
        """matrix x + shift * the mean luma of the clip, in [0, 1]: [N, 3, F, side, side]"""
        matrix, shift, luma = (part.to(small.device, non_blocking=True) for part in (matrix / 255, shift / 255, LUMA))
        pixels = small.flatten(2).float()
        shift = shift * (pixels.mean(2) @ luma)[:, None]
        return torch.baddbmm(shift[:, :, None], matrix, pixels).clamp_(0, 1).view(small.shape)


def centre_crop(clips, side):
    """The test-time crop: a centred square of 0.8 of the shorter side, resized to [N, F, 3, side, side], float."""
    H, W = clips.shape[-2:]
    size = round(0.8 * min(H, W))
    top, left = (H - size) // 2, (W - size) // 2
    clips = clips[..., top : top + size, left : left + size].float() / 255
    if size == side:
        return clips
    resized = F.interpolate(clips.flatten(0, 1), (side, side), mode="bilinear", antialias=True)
    return resized.unflatten(0, clips.shape[:2])
