"""Nearest-neighbour retrieval: the gallery has the training videos, the queries are the test videos."""

import torch
import torch.nn.functional as F

from . import processes
from .augment import centre_crop
from .clips import read_even_clips, spread
from .processes import rank, ranks


@torch.no_grad()
def clip_features(describe, videos, *, clips, frames, stride, side, device="cpu"):
    """Features of evenly spaced clips. describe: [N, F, 3, side, side] -> [N, C]; returns [videos, clips, C]

    With several processes, all must call this. Each takes 16 videos in turn, so batches are the same as in one process.
    """
    parts, features = [range(len(videos))[start : start + 16] for start in range(0, len(videos), 16)], []
    for first in range(0, len(parts), ranks()):
        own = None
        with processes.telling():
            for some in parts[first + rank() : first + rank() + 1]:
                some = torch.cat([read_even_clips(videos, i, clips, frames, stride) for i in some])
                own = describe(centre_crop(some.to(device), side)).float().cpu()
        features += [each for each in processes.exchange(own) if each is not None]
    return torch.cat(features).unflatten(0, (len(videos), clips))


def backbone_features(backbone, pooled=False):
    """A function from clips to features [N, C T], time slices concatenated as in the release, or their mean [N, C]."""
    return lambda clips: backbone(clips).mean(2) if pooled else backbone(clips).flatten(1)


def single_frame(clips):
    """The pixels of each clip's middle frame: [N, 3 H W]"""
    return clips[:, clips.shape[1] // 2].flatten(1)


def ranking(gallery, queries, clips):
    """Gallery indices by cosine similarity, nearest first, of features averaged over `clips` evenly spread clips.

    gallery, queries: [videos, all clips, C]; returns [queries, gallery]
    """
    chosen = spread(clips, gallery.shape[1])
    gallery, queries = (F.normalize(features[:, chosen].mean(1), dim=1) for features in (gallery, queries))
    return (queries @ gallery.T).argsort(dim=1, descending=True, stable=True)


def set_ranking(gallery, queries, clips):
    """As `ranking`, but each clip of a video is compared with the most similar clip of the other video.

    The similarity of two videos is the mean of these cosines over the clips of both. What only one clip shows counts in
    full here, while a mean of features dilutes it.
    """
    chosen = spread(clips, gallery.shape[1])
    gallery, queries = (F.normalize(features[:, chosen], dim=2) for features in (gallery, queries))
    similarity = []
    for some in queries.split(32):
        cosines = torch.einsum("qac,gbc->qgab", some, gallery)
        similarity.append(cosines.amax(3).mean(2) + cosines.amax(2).mean(2))
    return torch.cat(similarity).argsort(dim=1, descending=True, stable=True)


def recall(ranks, gallery_labels, query_labels, k):
    """R@k: the share of queries with a video of their class among their k nearest videos."""
    return (gallery_labels[ranks[:, :k]] == query_labels[:, None]).any(1).float().mean().item()
