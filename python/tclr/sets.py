"""A further experiment on the ablation's networks: why R@1 gains less from more clips than linear accuracy does.

Retrieval by the mean of a video's features dilutes what only some of its clips show; here the same features are also
compared clip by clip. And how much of a network's features stays the same over a video: the share of the variance of
clips' features, over all videos, that lies between the means of videos. That of an invariant feature is 1.

This was thought of after the ablation's first figures had been seen.
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
    """sets: {clips: R@1, clip by clip}; constancy."""
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
    """The share of the variance of features [videos, clips, C] that lies between the means of videos."""
    features = features - features.mean((0, 1))
    return (features.mean(1).square().sum() * features.shape[1] / features.square().sum()).item()
