"""Finetuning of the whole network with a classifier on the backbone, with all labels or a share of them."""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint, train
from .augment import ReleaseAugment, centre_crop
from .clips import read_even_clips

DROPS, FACTOR = (6, 10, 14), 0.3  # the learning rate is multiplied by FACTOR at these epochs of 16


def subset(labels, share, seed):
    """A random share of the videos of each class, at least one. A smaller share is a subset of a larger one."""
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=train.drawn(seed, "labels", label))
        chosen += members[order[: max(1, round(share * len(members)))]].tolist()
    return sorted(chosen)


class Classifier(nn.Module):
    """Clips [N, F, 3, H, W] -> logits [N, classes], from the backbone's features averaged over time."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone, self.fc = backbone, nn.Linear(backbone.features, classes)

    def forward(self, clips):
        return self.fc(self.backbone(clips).mean(2))


def finetune(model, videos, chosen, evaluation, *, epochs=16, batch=16, lr=1e-4, seed=0, device="cpu", record=print,
             augment=ReleaseAugment):  # fmt: skip
    """Trains `model` in place, with a random clip of each of the `chosen` videos in every epoch.

    record(epoch=, loss=) is called after each epoch. augment: augment(side, generator) returns a function that augments
    a batch of clips. The release's flips them, so it does not suit classes that differ by left and right. Raises
    FloatingPointError if the loss of a batch is not finite.
    """
    e, model = evaluation, model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs * drop // 16 for drop in DROPS], FACTOR)
    for epoch in range(epochs):
        generator = train.drawn(seed, "finetune", epoch)
        order = torch.randperm(len(chosen), generator=generator)
        losses = []
        for some in order.split(batch):
            if len(some) == 1 and len(order) > 1:  # batch normalisation is meaningless for a single clip
                continue
            some = [chosen[i] for i in some]
            clips = torch.stack([random_clip(videos, i, e, generator) for i in some]).to(device)
            loss = F.cross_entropy(model(augment(e.side, generator)(clips)), videos.labels[some].to(device))
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                names = ", ".join(videos.names[i] for i in some)
                raise FloatingPointError(f"epoch {epoch}: the loss is {losses[-1]}; its batch: {names}")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        record(epoch=epoch, loss=sum(losses) / len(losses))
    return model.eval()


def random_clip(videos, i, evaluation, generator):
    """A random clip of video i: uint8 [frames, 3, H, W]"""
    span = (evaluation.frames - 1) * evaluation.stride + 1
    start = int(torch.randint(videos.length(i) - span + 1, (), generator=generator))
    return videos.read(i, start + torch.arange(evaluation.frames) * evaluation.stride)


def save(path, model, classes, evaluation, **more):
    """Writes a classifier with the names of its classes, so that it can be used with another order of classes."""
    state = dict(model=model.state_dict(), classes=list(classes), evaluation=dataclasses.asdict(evaluation))
    checkpoint.save(path, **state, **more)


@torch.no_grad()
def accuracy(model, videos, evaluation, device="cpu"):
    """The share of videos that are classified correctly by the mean softmax of evenly spaced clips."""
    right, e = 0, evaluation
    for i in range(len(videos)):
        clips = centre_crop(read_even_clips(videos, i, e.clips, e.frames, e.stride).to(device), e.side)
        right += int(model(clips).softmax(1).mean(0).argmax() == videos.labels[i])
    return right / len(videos)
