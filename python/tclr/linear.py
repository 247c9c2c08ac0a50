"""Linear evaluation: one linear layer on frozen features, and its accuracy with several clips per video."""

import torch
import torch.nn.functional as F
from torch import nn

from .clips import spread


def fit(features, labels, classes):
    """A linear classifier of single clips. features: [videos, clips, C]; labels: [videos]; returns Linear(C, classes)

    The objective, cross-entropy + 1e-4 |W|^2 for standardised features, is convex. L-BFGS finds its minimum without
    any choice of epochs, learning rate or seed. The standardisation is included in the layer's weights.
    """
    clips = features.shape[1]
    x, y = features.flatten(0, 1).float(), labels.repeat_interleave(clips)
    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / scale
    layer = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + 1e-4 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    with torch.no_grad():
        layer.weight /= scale
        layer.bias -= layer.weight @ mean
    return layer.requires_grad_(False)


def predictions(layer, features, clips):
    """The class of each video by the mean softmax of `clips` evenly spread clips. [videos, all clips, C] -> [videos]"""
    chosen = spread(clips, features.shape[1])
    return layer(features[:, chosen].float()).softmax(2).mean(1).argmax(1)


def accuracy(layer, features, labels, clips):
    """The share of videos whose predicted class is correct."""
    return (predictions(layer, features, clips) == labels).float().mean().item()
