"""Random augmentations of a batch of clips: every clip draws its own parameters and keeps them over its frames."""

import math

import torch
import torch.nn.functional as F

LUMA = torch.tensor([0.299, 0.587, 0.114])


class Augment:
    """Clips uint8 [N, F, 3, H, W] -> float in [0, 1], [N, F, 3, side, side]: random crop, colours, an erased rectangle.

    No flip: which way things move is what there is to learn.
    """

    def __init__(self, side, generator, *, smallest_crop=0.7, grayscale=0.3, erase=0.5):
        self.side, self.generator = side, generator
        self.smallest_crop, self.grayscale, self.erase = smallest_crop, grayscale, erase

    def __call__(self, clips):
        return self._erased(self._recoloured(self._cropped(clips.float() / 255)))

    def _uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def _cropped(self, clips):
        """A square of side U[smallest, 1] anywhere in the frame, resized. [N, F, 3, H, W] -> [N, F, 3, side, side]"""
        N, frames = clips.shape[:2]
        size = self._uniform(self.smallest_crop, 1, N)
        centre = self._uniform(-1, 1, N, 2) * (1 - size)[:, None]
        theta = torch.cat([torch.diag_embed(size[:, None].expand(N, 2)), centre[:, :, None]], 2)
        grid = F.affine_grid(theta, (N, 1, self.side, self.side), align_corners=False)
        images = F.grid_sample(clips.flatten(1, 2), grid, padding_mode="border", align_corners=False)
        return images.unflatten(1, (frames, 3))

    def _recoloured(self, clips):
        """Contrast, saturation, hue and grayscale, each linear in RGB: one 3x3 matrix a clip; then brightness."""
        N = len(clips)
        matrix = self._hue_rotation(N)
        saturation = self._uniform(0.6, 1.4, N) * (torch.rand(N, generator=self.generator) >= self.grayscale)
        gray = LUMA.expand(3, 3)
        matrix = (saturation[:, None, None] * torch.eye(3) + (1 - saturation)[:, None, None] * gray) @ matrix
        matrix = self._uniform(0.6, 1.4, N)[:, None, None] * matrix
        centred = torch.einsum("nij,nfjhw->nfihw", matrix, clips - 0.5)
        return (centred + 0.5 + self._uniform(-0.15, 0.15, N)[:, None, None, None, None]).clamp_(0, 1)

    def _hue_rotation(self, N):
        """Rotations of RGB about the gray axis: [N, 3, 3]"""
        angle = self._uniform(-math.pi, math.pi, N)[:, None, None]
        axis = 1 / math.sqrt(3)
        cross = axis * torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
        return angle.cos() * torch.eye(3) + angle.sin() * cross + (1 - angle.cos()) / 3

    def _erased(self, clips):
        """Half the clips lose a rectangle of a quarter to a half of the side, set to gray."""
        N, pixel = len(clips), torch.arange(self.side)
        start = self._uniform(0, 0.75, N, 2) * self.side
        extent = self._uniform(0.25, 0.5, N, 2) * self.side * (torch.rand(N, 1, generator=self.generator) < self.erase)
        within = (pixel >= start[..., None]) & (pixel < (start + extent)[..., None])
        hole = within[:, 0, :, None] & within[:, 1, None, :]
        return clips.masked_fill_(hole[:, None, None], 0.5)


def centre_crop(clips, side, share=0.8):
    """The test-time crop. uint8 [N, F, 3, H, W] -> float in [0, 1], [N, F, 3, side, side]"""
    H = clips.shape[-1]
    size = round(share * H)
    start = (H - size) // 2
    clips = clips[..., start : start + size, start : start + size].float() / 255
    if size == side:
        return clips
    return F.interpolate(clips.flatten(0, 1), (side, side), mode="bilinear").unflatten(0, clips.shape[:2])
