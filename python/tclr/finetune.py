"""Full finetuning with a classifier on the backbone, from all labels or a share of them."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint, train
from .augment import ReleaseAugment, centre_crop
from .clips import read_even_clips

DROPS, FACTOR = (6, 10, 14), 0.3  # of the learning rate, at these epochs of 16


def subset(labels, share, seed):
    """A share of the videos of each class, one at least, drawn by the seed; smaller shares lie in larger ones."""
    chosen = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=train.drawn(seed, "labels", label))
        chosen += members[order[: max(1, round(share * len(members)))]].tolist()
    return sorted(chosen)


class Classifier(nn.Module):
    """Clips [N, F, 3, H, W] -> logits [N, classes], from the backbone's slices averaged over time."""

    def __init__(self, backbone, classes):
        super().__init__()
        self.backbone, self.fc = backbone, nn.Linear(backbone.features, classes)

    def forward(self, clips):
        return self.fc(self.backbone(clips).mean(2))


def finetune(model, videos, chosen, evaluation, *, epochs=16, batch=16, lr=1e-4, seed=0, device="cpu", record=print,
             augment=ReleaseAugment):  # fmt: skip
    """Trains in place on the `chosen` videos, a random clip of each an epoch. record(epoch=, loss=) follows each.

    augment: augment(side, generator) augments a batch of clips; the release's flips them, so that left and right are
    one.
    """
    e, model = evaluation, model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs * drop // 16 for drop in DROPS], FACTOR)
    for epoch in range(epochs):
        generator = train.drawn(seed, "finetune", epoch)
        order = torch.randperm(len(chosen), generator=generator)
        losses = []
        for some in order.split(batch):
            if len(some) == 1 and len(order) > 1:  # batch normalisation has nothing to say about one clip
                continue
            some = [chosen[i] for i in some]
            clips = torch.stack([random_clip(videos, i, e, generator) for i in some]).to(device)
            loss = F.cross_entropy(model(augment(e.side, generator)(clips)), videos.labels[some].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        record(epoch=epoch, loss=sum(losses) / len(losses))
    return model.eval()


def random_clip(videos, i, evaluation, generator):
    """uint8 [frames, 3, H, W]"""
    span = (evaluation.frames - 1) * evaluation.stride + 1
    start = int(torch.randint(videos.length(i) - span + 1, (), generator=generator))
    return videos.read(i, start + torch.arange(evaluation.frames) * evaluation.stride)


def save(path, model, classes, evaluation, **more):
    """Writes a classifier with the names its labels stand for, so that no other data set's order changes them."""
    state = dict(model=model.state_dict(), classes=list(classes), evaluation=dataclasses.asdict(evaluation))
    checkpoint.save(path, **state, **more)


@torch.no_grad()
def accuracy(model, videos, evaluation, device="cpu"):
    """The share of videos that the mean softmax of evenly spaced clips puts into their class."""
    right, e = 0, evaluation
    for i in range(len(videos)):
        clips = centre_crop(read_even_clips(videos, i, e.clips, e.frames, e.stride).to(device), e.side)
        right += int(model(clips).softmax(1).mean(0).argmax() == videos.labels[i])
    return right / len(videos)
