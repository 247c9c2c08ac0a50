"""A small 3D ResNet that keeps time in its last stage, and the projection head."""

import torch
from torch import nn


class Block(nn.Module):
    """Two 3x3x3 convolutions around a shortcut. [N, C, F, H, W] -> [N, C', F', H', W']"""

    def __init__(self, wide_in, wide, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(wide_in, wide, 3, stride, 1, bias=False),
            nn.BatchNorm3d(wide),
            nn.ReLU(),
            nn.Conv3d(wide, wide, 3, 1, 1, bias=False),
            nn.BatchNorm3d(wide),
        )
        self.shortcut = nn.Identity()
        if wide_in != wide or stride != (1, 1, 1):
            self.shortcut = nn.Sequential(nn.Conv3d(wide_in, wide, 1, stride, bias=False), nn.BatchNorm3d(wide))

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


class TinyResNet3d(nn.Module):
    """Clips [N, F, 3, H, W] -> time slices [N, C, F / 2].

    The net sees the differences of neighbouring frames: on RGB it learns to tell videos apart by their background.
    """

    def __init__(self, width=16):
        super().__init__()
        self.features = 4 * width
        self.stem = nn.Sequential(nn.Conv3d(3, width, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(width), nn.ReLU())
        self.stages = nn.Sequential(
            Block(width, width, (1, 1, 1)),
            Block(width, 2 * width, (2, 2, 2)),
            Block(2 * width, 4 * width, (1, 2, 2)),
        )

    def forward(self, clips):
        moves = (clips[:, 1:] - clips[:, :-1]).transpose(1, 2)
        return self.stages(self.stem(moves)).mean((3, 4))


class Projector(nn.Sequential):
    """The head all embeddings share. [..., features] -> [..., dim]; the losses normalise."""

    def __init__(self, features, dim=128):
        super().__init__(
            nn.Linear(features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(),
            nn.Linear(features, dim, bias=False),
            nn.BatchNorm1d(dim),
        )

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
