"""A further experiment on the ablation's networks: why R@1 gains less from more clips than linear accuracy does.

Retrieval by the mean of a video's features dilutes what only some of its clips show, so here the same features are also
compared clip by clip. The experiment also measures how constant features are over a video: the share of the variance of
all clips' features that is between the means of videos. It is 1 for features that do not change over a video.

This experiment was designed after the first results of the ablation were known.
"""

import torch

from . import ablation, checkpoint, evaluate, train
from .features import code_hash
from .models import TinyResNet3d

ROWS = ablation.SCRATCH, ablation.INVARIANT, "IC (same)", ablation.TCLR
CODE = "augment", "clips", "evaluate", "models", "motions", "sets"


def named(weights):
    return weights.with_name(f"{weights.stem}-sets-{code_hash(*CODE)[:8]}.json")


@torch.no_grad()
def measure(out, job, weights):
    """The figures of a network: "sets" {clips: R@1 of clip-by-clip retrieval} and "constancy"."""
    a, splits = job.scale, ablation.data(out, job.scale, job.seed)
    embedder = train.Embedder(TinyResNet3d(a.width)).eval()
    embedder.load_state_dict(checkpoint.load(weights)["embedder"])
    plan = dict(clips=a.eval_clips, frames=a.frames, stride=a.eval_stride, side=a.side)
    describe = evaluate.backbone_features(embedder.backbone)
    gallery, queries = (evaluate.clip_features(describe, videos, **plan) for videos in splits)
    labels = [videos.labels for videos in splits]
    ranks = {clips: evaluate.set_ranking(gallery, queries, clips) for clips in range(1, a.eval_clips + 1)}
    r1 = {str(clips): evaluate.recall(each, *labels, 1) for clips, each in ranks.items()}
    return dict(sets=r1, constancy=constancy(gallery))


def constancy(features):
    """The share of the variance of features [videos, clips, C] that is between the means of videos."""
    features = features - features.mean((0, 1))
    return (features.mean(1).square().sum() * features.shape[1] / features.square().sum()).item()
