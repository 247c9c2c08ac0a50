"""The ablation: tests the paper's two claims on generated videos, whose class is only visible in several clips.

A job is one row of the table with one seed and one number of steps. The seed determines the videos of both parts, the
weights, the batches and the augmentations, so that intervals over seeds are valid for other videos, too. A job
pretrains a network, extracts the features of both parts once, and measures all figures of the tables and pictures. It
writes them to a file when it is finished, so that any number of processes, started at any time, can share the remaining
jobs. Jobs that were measured with other code are measured again.

    tclr ablation --out runs/ablation               # runs the missing jobs, then writes tables and pictures
    tclr ablation --out runs/ablation --job 5       # runs one job
    tclr ablation --out runs/ablation --plan true   # lists the jobs
"""

import dataclasses
import fcntl
import hashlib
import json
import platform
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import auto_cli

from . import checkpoint, evaluate, linear, motions, train
from .checkpoint import whole
from .clips import ClipPlan, even_positions, spread
from .features import code_hash
from .finetune import subset
from .models import TinyResNet3d
from .videos import Loaded

CODE = "ablation", "augment", "clips", "evaluate", "finetune", "linear", "models", "motions", "train"


class Row(NamedTuple):
    """How the network of a row is pretrained. weights: None for a network that is not trained."""

    weights: dict | None
    windows: str = "same"
    form: str = "paper"


def terms(*names):
    return {name: float(name in names) for name in ("ic_global", "ic_local", "ll", "gl")}


SCRATCH, INVARIANT, TCLR = "random init", "IC (independent)", "IC + LL + GL"
ROWS = {
    SCRATCH: Row(None),
    INVARIANT: Row(terms("ic_global"), windows="independent"),  # the paper's IC: views from two times of a video
    "IC (same)": Row(terms("ic_global")),  # views are two augmentations of one window
    "IC + ic_local (release)": Row(terms("ic_global", "ic_local"), form="release"),
    "LL": Row(terms("ll")),
    "GL": Row(terms("gl")),
    "IC + LL": Row(terms("ic_global", "ll")),
    "IC + GL": Row(terms("ic_global", "gl")),
    "LL + GL": Row(terms("ll", "gl")),
    TCLR: Row(terms("ic_global", "ll", "gl")),
    "IC + LL + GL (release)": Row(terms("ic_global", "ic_local", "ll", "gl"), form="release"),
}
DECISIVE = (SCRATCH, INVARIANT, TCLR), ("IC (same)", "IC + LL", "IC + GL")  # rows that the claims need, in order
SHARES = 0.01, 0.1, 0.2, 0.5, 1.0  # shares of the labels


@dataclass(frozen=True)
class Ablation:
    """The settings of all jobs. Their hash is in the names of the result files."""

    groups: int = 40  # 8 classes x 2 takes x 40 groups = 640 training videos
    test_groups: int = 20
    takes: int = 2
    video_frames: int = 96
    video_side: int = 32
    frames: int = 8
    stride: int = 4
    side: int = 24
    width: int = 8
    steps: int = 150
    batch: int = 32
    lr: float = 2e-3
    temperature: float = 0.1
    eval_clips: int = 8
    eval_stride: int = 4

    @property
    def hash(self):
        return digest(dataclasses.asdict(self))

    @property
    def data_hash(self):
        return digest([self.groups, self.test_groups, self.takes, self.video_frames, self.video_side])


class Job(NamedTuple):
    row: str
    seed: int
    scale: Ablation


def digest(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def jobs(scale, seeds=8, other_seeds=3):
    """All jobs: first the rows of DECISIVE with `seeds` seeds, then the other rows with `other_seeds` seeds.

    The last ones are IC (independent) and IC + LL + GL with half and with twice the steps, to see whether the number of
    steps changes their order.
    """
    wanted = [Job(row, seed, scale) for rows in DECISIVE for seed in range(seeds) for row in rows]
    decisive = sum(DECISIVE, ())
    wanted += [Job(row, seed, scale) for seed in range(other_seeds) for row in ROWS if row not in decisive]
    for factor in 0.5, 2:
        other = dataclasses.replace(scale, steps=round(factor * scale.steps))
        wanted += [Job(row, seed, other) for seed in range(other_seeds) for row in (INVARIANT, TCLR)]
    return wanted


def figures_file(out, job):
    row = job.row.translate(str.maketrans("", "", " ()"))
    return out / f"{row}-seed{job.seed}-{job.scale.hash}-{code_hash(*CODE)[:8]}.json"


def data(out, scale, seed):
    """(train, test), with different groups, so with different appearances. Rendered once for all rows of a seed."""
    a, path = scale, out / f"videos-seed{seed}-{scale.data_hash}-{code_hash('motions')[:8]}.npz"
    with claimed(path, wait=True):
        if not path.exists():
            arrays = {}
            for part, (first, groups) in dict(test=(1, a.test_groups), train=(1 + a.test_groups, a.groups)).items():
                videos = motions.generate(
                    classes=motions.ROUTINES, first_group=first, groups=groups, takes=a.takes, frames=a.video_frames,
                    side=a.video_side, seed=seed,
                )  # fmt: skip
                arrays[part] = torch.stack(videos.frames).numpy()
                arrays |= {f"{part}_labels": videos.labels.numpy(), f"{part}_names": np.array(videos.names)}
            with whole(path) as file:
                np.savez(file, **arrays)
    with np.load(path) as saved:
        return [Loaded(saved[f"{part}_names"].tolist(), *(torch.from_numpy(saved[name]) for name in
                (part, f"{part}_labels"))) for part in ("train", "test")]  # fmt: skip


@contextmanager
def claimed(path, *, wait=False):
    """Locks a file, and yields whether this process has the lock. The system releases it when the process ends."""
    lock = path.with_name(f".{path.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
        lock.unlink(missing_ok=True)


def pretrained(job, train_set, progress=iter):
    """The embedder of a job, and the terms of its last step."""
    a, row = job.scale, ROWS[job.row]
    torch.manual_seed(job.seed)
    embedder = train.Embedder(TinyResNet3d(a.width)).to(memory_format=torch.channels_last_3d).eval()
    steps = [None]
    if row.weights:
        recipe = train.Recipe(
            steps=a.steps, batch=a.batch, lr=a.lr, temperature=a.temperature, form=row.form, side=a.side, seed=job.seed,
            weights=row.weights,
        )  # fmt: skip
        plan = ClipPlan(a.frames, a.stride, row.windows)
        train.pretrain(embedder, train_set, plan, recipe, lambda **terms: steps.append(terms), progress)
    return embedder, steps[-1]


def measure(job, embedder, splits):
    """R@1, R@5 and linear accuracy by clips per video; with all clips, accuracy by share of labels, and confusion."""
    a, (train_set, test_set) = job.scale, splits
    describe = evaluate.backbone_features(embedder.backbone)
    plan = dict(clips=a.eval_clips, frames=a.frames, stride=a.eval_stride, side=a.side)
    gallery, queries = (evaluate.clip_features(describe, videos, **plan) for videos in splits)
    classes = len(motions.ROUTINES)
    curve, by_share = {}, {}
    for share in SHARES:
        chosen = subset(train_set.labels, share, job.seed)
        layer = linear.fit(gallery[chosen], train_set.labels[chosen], classes)
        by_share[share] = linear.accuracy(layer, queries, test_set.labels, a.eval_clips)
    for clips in range(1, a.eval_clips + 1):
        ranks = evaluate.ranking(gallery, queries, clips)
        recall = partial(evaluate.recall, ranks, train_set.labels, test_set.labels)
        curve[clips] = dict(r1=recall(1), r5=recall(5), linear=linear.accuracy(layer, queries, test_set.labels, clips))
    found = test_set.labels * classes + linear.predictions(layer, queries, a.eval_clips)
    confusion = found.bincount(minlength=classes * classes).unflatten(0, (classes, classes)).tolist()
    return dict(by_clips=curve, by_share=by_share, confusion=confusion)


def oracle(scale, seed):
    """The best possible accuracy by clips per video, if the movements that each clip shows are recognised.

    Each movement that no clip shows must be guessed, out of two. "best" is the bound for a single clip with the best
    start. A clip shows a movement if it has two frames between which the movement happens.
    """
    a, videos = scale, list(_phases(scale, seed))
    length = (a.frames - 1) * a.eval_stride + 1
    even = even_positions(a.video_frames, a.eval_clips, a.frames, a.eval_stride)[:, 0]
    chance = lambda *starts: sum(_chance(phases, starts, length) for phases in videos) / len(videos)  # noqa: E731
    bounds = {clips: chance(*even[spread(clips, a.eval_clips)].tolist()) for clips in range(1, a.eval_clips + 1)}
    starts = range(a.video_frames - length + 1)
    best = [max(_chance(phases, [start], length) for start in starts) for phases in videos]
    return bounds | dict(best=sum(best) / len(best))


def _phases(scale, seed):
    """The movements of each test video with their first and last frames."""
    for group in range(1, scale.test_groups + 1):
        for take in range(1, scale.takes + 1):
            for label, name in enumerate(motions.ROUTINES):
                random = motions.randomness(seed, group, take, label)
                yield motions.draw_phases(name, scale.video_frames, random)


def _chance(phases, starts, length):
    """The probability of the right class for a video, if the movements in clips with these starts are known."""
    ends = [(start, start + length - 1) for start in starts]
    seen = [any(min(last, end) > max(first, start) for start, end in ends) for _, first, last in phases]
    return 0.5 ** seen.count(False)


def run_job(out, job):
    """Runs a job, and writes its weights and its figures."""
    path, started = figures_file(out, job), time.perf_counter()
    splits = data(out, job.scale, job.seed)
    embedder, last_step = pretrained(job, splits[0])
    checkpoint.save(path.with_suffix(".pt"), embedder=embedder.state_dict())
    figures = dict(row=job.row, seed=job.seed, steps=job.scale.steps, last_step=last_step)
    figures |= measure(job, embedder, splits) | here() | dict(scale=dataclasses.asdict(job.scale), hash=job.scale.hash)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    with whole(path) as file:
        file.write(json.dumps(figures, indent=1).encode() + b"\n")
    shown = figures["by_clips"][job.scale.eval_clips]
    print(f"{job.row}, seed {job.seed}, {job.scale.steps} steps: {figures['seconds']} s, {shown}", flush=True)


def here():
    """The versions and the machine with which figures are measured."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno", "."], capture_output=True, text=True).stdout
    commit = head + "+" * bool(changed) if head else "unknown"
    facts = dict(commit=commit, code=code_hash(*CODE)[:8], torch=torch.__version__, python=platform.python_version())
    return facts | dict(numpy=np.__version__, machine=platform.machine(), threads=torch.get_num_threads())


def finished(out, wanted):
    """The figures of all finished jobs, in the order of the jobs."""
    files = [figures_file(out, job) for job in wanted]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def weights_of(out, job):
    """The newest file of weights of a job, or None if there is none."""
    stem = figures_file(out, job).stem.rpartition("-")[0]
    return max(out.glob(f"{stem}-????????.pt"), key=lambda path: path.stat().st_mtime, default=None)


def follow(out, wanted, named, measure):
    """Calls measure(out, job, weights) once for the network of each job, and writes the figures that it returns.

    named(weights): the name of the file for the figures. Jobs without saved weights are left out.
    """
    for job in wanted:
        if weights := weights_of(out, job):
            path, started = named(weights), time.perf_counter()
            with claimed(path) as mine:
                if mine and not path.exists():
                    figures = measure(out, job, weights)
                    made = here() | dict(weights=weights.name, seconds=round(time.perf_counter() - started, 1))
                    figures = dict(row=job.row, seed=job.seed, figures=figures, made=made)
                    with whole(path) as file:
                        file.write(json.dumps(figures, indent=1).encode() + b"\n")
                    print(path.stem, made["seconds"], "s", flush=True)


def followed(out, wanted, named):
    """{(row, seed): figures} that `follow` has measured. <first figure>_commit is the commit of their code."""
    files = {job: named(weights) for job in wanted if (weights := weights_of(out, job))}
    read = {job: json.loads(path.read_text()) for job, path in files.items() if path.exists()}
    commits = {job: {f"{next(iter(each['figures']))}_commit": each["made"]["commit"]} for job, each in read.items()}
    return {(job.row, job.seed): each["figures"] | commits[job] for job, each in read.items()}


def run(out: Path = Path("runs/ablation"), seeds: int = 8, other_seeds: int = 3, label_seeds: int = 5,
        job: int | None = None, scale: Ablation = Ablation(), plan: bool = False):  # fmt: skip  # noqa: B008
    """Tests the claims of the paper on generated videos. Continues if an earlier call was stopped.

    Several processes with the same arguments share the jobs. If `job` is not given, the networks of `label_seeds` seeds
    are then finetuned on shares of the labels (labels.py), and those of all seeds are evaluated clip by clip (sets.py).
    plan: list the jobs, and run none.
    """
    from . import claims, labels, sets  # not at the top of the file, since they import this module

    wanted = jobs(scale, seeds, other_seeds)
    if job is not None and not 0 <= job < len(wanted):
        raise SystemExit(f"job: found {job}, wanted 0..{len(wanted) - 1}")
    if plan:
        for number, (row, seed, of) in enumerate(wanted):
            done = " (done)" if figures_file(out, wanted[number]).exists() else ""
            print(f"{number}: {row}, seed {seed}, {of.steps} steps{done}")
        return
    out.mkdir(parents=True, exist_ok=True)
    for one in wanted if job is None else [wanted[job]]:
        path = figures_file(out, one)
        with claimed(path) as mine:
            if mine and not path.exists():
                run_job(out, one)
    figures = finished(out, wanted)
    for module, count in ((sets, seeds), (labels, label_seeds)):
        networks = [Job(row, seed, scale) for seed in range(count) for row in module.ROWS]
        if job is None:
            follow(out, networks, module.named, module.measure)
        found = followed(out, networks, module.named)
        for each in figures:
            if each["steps"] == scale.steps:
                each |= found.get((each["row"], each["seed"]), {})
    claims.write(figures, scale, out)


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
