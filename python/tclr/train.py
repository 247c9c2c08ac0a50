"""Pretraining without labels: the paper's algorithm."""

import math
from dataclasses import dataclass

import torch
from torch import nn

import tclr_kernels as tk

from .augment import Augment
from .clips import ClipPlan, random_windows
from .models import Projector

IC_ONLY = dict(ic_global=1.0, ll=0.0, gl=0.0)


@dataclass(frozen=True)
class Recipe:
    """How to pretrain; `weights` are those of `tclr_kernels.tclr`."""

    steps: int = 150
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 10
    weight_decay: float = 1e-4
    temperature: float = 0.1
    weights: dict = None
    form: str = "paper"
    backend: str = None
    side: int = 32
    seed: int = 0


class Embedder(nn.Module):
    """Backbone and shared head: clips [N, F, 3, H, W] -> time-pooled [N, D] and, on demand, time slices [N, T, D]."""

    def __init__(self, backbone, dim=128):
        super().__init__()
        self.backbone = backbone
        self.head = Projector(backbone.features, dim)

    def forward(self, clips):
        slices = self.backbone(clips).transpose(1, 2)
        return self.head(slices.mean(1)), slices


def pretrain(embedder, videos, plan: ClipPlan, recipe: Recipe, record, progress=iter):
    """Trains `embedder` in place. videos: list of uint8 [F, 3, H, W]; record(step=, total=, ...) follows each step."""
    generator = torch.Generator().manual_seed(recipe.seed)
    augment = Augment(recipe.side, generator)
    loss = tk.TCLRLoss(temperature=recipe.temperature, form=recipe.form, weights=recipe.weights, backend=recipe.backend)
    optimizer = torch.optim.AdamW(embedder.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, recipe))
    embedder.train()
    for step, chosen in zip(progress(range(recipe.steps)), batches(len(videos), recipe.batch, generator), strict=False):
        windows = random_windows(videos, chosen, plan.window, generator)
        g, s, x = embed(embedder, windows, plan, augment, local=recipe.weights != IC_ONLY)
        terms = loss(g.float(), s.float(), x.float())
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        schedule.step()
        record(step=step, **{name: term.item() for name, term in terms._asdict().items()})
    embedder.eval()


def embed(embedder, windows, plan, augment, *, local=True):
    """Two views of each window: g: [2, B, D] global clips; s: [2, B, T, D] their slices; x: [2, B, T, D] local clips.

    windows: uint8 [B, window, 3, H, W]. Without `local`, s and x are stand-ins for losses that do not read them.
    """
    B, T = len(windows), plan.local_clips
    clips = windows[:, plan.global_frames()]
    g, slices = embedder(augment(torch.cat([clips, clips])))
    g = g.unflatten(0, (2, B))
    if not local:
        unread = g.detach()[:, :, None].expand(-1, -1, T, -1)
        return g, unread, unread
    s = embedder.head(slices).unflatten(0, (2, B))
    clips = windows[:, plan.local_frames()].flatten(0, 1)
    x, _ = embedder(augment(torch.cat([clips, clips])))
    return g, s, x.unflatten(0, (2, B, T))


def batches(videos, size, generator):
    """Endless batches of `size` different videos, every video once an epoch; an epoch's remainder is left out."""
    if size > videos:
        raise ValueError(f"batch: found {size}, wanted at most the {videos} videos there are")
    while True:
        order = torch.randperm(videos, generator=generator).tolist()
        for start in range(0, videos - size + 1, size):
            yield order[start : start + size]


def warm_cosine(step, recipe):
    """The learning rate's factor: a linear rise over `warmup` steps, then half a cosine down to 0."""
    if step < recipe.warmup:
        return (step + 1) / (recipe.warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup))
