"""Features of a data set by a checkpoint, extracted once and shared by all that reads them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from . import checkpoint, config, evaluate


@dataclass
class Features:
    """clips: [videos, clips, C]; labels: [videos]; and what they came from: videos, the configuration's hash."""

    clips: torch.Tensor
    labels: torch.Tensor
    videos: object
    hash: str


def embedder_of(run, seed=0):
    """The pretrained embedder of a run's folder, or the one it starts from where nothing was trained yet."""
    embedder = config.build(config.read_run(run)[0], seed).eval()
    file = Path(run) / "last.pt"
    if file.exists():
        embedder.load_state_dict(checkpoint.load(file)["embedder"])
    return embedder


def weights_hash(embedder):
    digest = hashlib.sha256()
    for name, value in embedder.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def features(run, embedder, data, part, evaluation, device="cpu"):
    """Features of every video of `part`, from the run's cache where checkpoint and configuration are the same."""
    run, e = Path(run), evaluation
    videos = config.open_videos(data, part, (e.frames - 1) * e.stride + 1, run)
    if videos.labels is None:
        raise ValueError(f"{data.root}: found videos without classes, wanted a labelled data set to evaluate on")
    key = config.digest(weights_hash(embedder), data, part, evaluation)
    path = run / "features" / f"{key}.safetensors"
    if not path.exists():
        describe = evaluate.backbone_features(embedder.to(device).backbone, e.pooled)
        plan = dict(clips=e.clips, frames=e.frames, stride=e.stride, side=e.side, device=device)
        path.parent.mkdir(exist_ok=True)
        with checkpoint.whole(path) as file:
            file.write(save(dict(clips=evaluate.clip_features(describe, videos, **plan).contiguous())))
    return Features(load_file(path)["clips"], videos.labels, videos, key)
