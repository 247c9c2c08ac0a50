"""The features of a data set, extracted once from a checkpoint and then cached for all evaluations."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from . import checkpoint, config, evaluate, index, processes
from .videos import share_findings

CODE = "augment", "clips", "decode", "evaluate", "features", "index", "models", "videos"  # what features depend on


@dataclass
class Features:
    """clips: [videos, clips, C]; labels: [videos]; their videos; and hashes of everything, and of the weights."""

    clips: torch.Tensor
    labels: torch.Tensor
    videos: object
    hash: str
    weights: str


def embedder_of(run):
    """The pretrained embedder of a run's folder, or a randomly initialised one if there is no checkpoint yet."""
    state = checkpoint.newest(Path(run) / "last.pt")
    if state is None:
        return config.build(config.read_run(run)[0], seed=0).eval()
    net = config.Net(**state["settings"]["net"]) if "settings" in state else config.read_run(run)[0]
    embedder = config.build(net, seed=0).eval()
    embedder.load_state_dict(state["embedder"])
    return embedder


def weights_hash(embedder):
    digest = hashlib.sha256()
    for name, value in embedder.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@processes.telling()
def features(run, embedder, data, part, evaluation, device="cpu", classes=None):
    """The features of all videos of `part`, from the run's cache if nothing that they depend on has changed.

    classes: the names that labels stand for, instead of the classes of the training part. Several processes share the
    work; the first one reads and writes the cache, and all get the features.
    """
    run, e = Path(run), evaluation
    videos = config.open_labelled(data, part, (e.frames - 1) * e.stride + 1, run, classes)
    settings = data.size, evaluation, videos.shortest, videos.decoder, torch.device(device).type, torch.__version__
    read = files(videos)
    weights = weights_hash(embedder)
    given = {f"evaluation.{name}": value for name, value in asdict(e).items()}
    code = code_hash(*CODE)
    given |= {"data.size": data.size, "sizes of the video files": config.digest([each[:2] for each in read])}
    processes.same(**given, weights=weights[:8], torch=torch.__version__, code=code[:8])
    key = config.digest(weights, code, *settings, read, digits=64)
    path, labels = run / "features" / f"{key}.safetensors", config.digest(videos.labels.tolist(), digits=64)
    clips = processes.from_first(lambda: cached(path, len(videos), labels))
    if clips is None:
        describe = evaluate.backbone_features(embedder.to(device).backbone, e.pooled)
        plan = dict(clips=e.clips, frames=e.frames, stride=e.stride, side=e.side, device=device)
        clips = evaluate.clip_features(describe, videos, **plan).contiguous()
        share_findings(videos)
        with processes.together():
            if files(videos) != read:
                raise ValueError(f"{data.root}: found videos of {part} that changed while they were read, wanted none")
        processes.from_first(lambda: keep(path, clips, labels if videos.bad else "any"))
    return Features(clips, videos.labels, videos, key[:8], weights)


def keep(path, clips, labels):
    """Writes features to the cache."""
    path.parent.mkdir(exist_ok=True)
    with checkpoint.whole(path, shared=True) as file:
        file.write(save(dict(clips=clips), metadata=dict(labels=labels)))


def files(videos):
    """[path, size, mtime, ctime, first frame, end] of every video of a set, in its order."""
    return [[each.path, *index.state(videos.root / each.path), each.start, each.end] for each in videos.entries]


def code_hash(*modules):
    """A hash of the source of these modules. Modules without a source file are left out."""
    digest = hashlib.sha256()
    for name in modules:
        if (source := Path(__file__).with_name(f"{name}.py")).exists():
            digest.update(source.read_bytes())
    return digest.hexdigest()


def cached(path, videos, labels):
    """The features in a file, or None if it does not exist, is damaged, or was made for other labels.

    Features depend on labels only if a video was unreadable, and was replaced by another one of its class.
    """
    try:
        with safe_open(path, "pt") as file:
            clips, made_for = file.get_tensor("clips"), file.metadata()["labels"]
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, TypeError):
        print(f"{path}: found no features that can be read; they are extracted again")
        return None
    return clips if made_for in ("any", labels) and len(clips) == videos else None
