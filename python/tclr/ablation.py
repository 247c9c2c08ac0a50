"""The ablation: every subset of {IC, LL, GL} and random init, several seeds, on a procedural set where order matters.

A row = one subset and seed: pretrain, extract the features of both splits once, then retrieval and linear accuracy with
1 .. all clips a video. "IC" is the paper's: ic_global of form="paper". A row is a file of its own, written when it is
finished, so that the table can be made in any number of sittings; one of other code is left aside, and measured again:

    python -m tclr.ablation --out runs/ablation            # the rows that are missing, then the table and the pictures
    python -m tclr.ablation --out runs/ablation --row 5    # one of them
"""

import csv
import dataclasses
import hashlib
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from jsonargparse import auto_cli

from . import evaluate, linear, motions, train
from .checkpoint import whole
from .clips import ClipPlan
from .features import code_hash
from .models import TinyResNet3d
from .videos import Loaded

TERMS = dict(IC="ic_global", LL="ll", GL="gl")
CODE = "ablation", "augment", "clips", "evaluate", "linear", "models", "motions", "train"  # what a row depends on
SUBSETS = ("random init", "LL", "GL", "LL + GL", "IC", "IC + LL", "IC + GL", "IC + LL + GL")


@dataclass(frozen=True)
class Ablation:
    """What a row depends on beside its subset and seed; its hash names the row's file."""

    groups: int = 42  # 12 classes x 4 takes x 42 groups = 2,016 videos to train on
    test_groups: int = 21
    takes: int = 4
    video_frames: int = 64
    video_side: int = 40
    data_seed: int = 0
    frames: int = 8
    stride: int = 4
    side: int = 32
    width: int = 8
    steps: int = 120
    batch: int = 32
    lr: float = 2e-3
    temperature: float = 0.1
    form: str = "paper"
    eval_clips: int = 8
    eval_stride: int = 3

    @property
    def hash(self):
        return digest(dataclasses.asdict(self))

    @property
    def data_hash(self):
        a = self
        return digest([a.groups, a.test_groups, a.takes, a.video_frames, a.video_side, a.data_seed])


def digest(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def rows(seeds):
    """Every (subset, seed), seed by seed: the first seed's table is whole before the next begins."""
    return [(subset, seed) for seed, subset in product(range(seeds), SUBSETS)]


def row_file(out, ablation, subset, seed):
    return out / f"{subset.replace(' ', '')}-seed{seed}-{ablation.hash}-{code_hash(*CODE)[:8]}.json"


def weights(subset):
    """Of the objective's terms, or None for no training: "IC + LL" -> ic_global 1, ll 1, gl 0"""
    chosen = subset.split(" + ")
    return None if subset == "random init" else {term: float(name in chosen) for name, term in TERMS.items()}


def data(out, ablation):
    """(train, test), of different groups: no test video's looks are trained on. Rendered once, for all rows."""
    a, path = ablation, out / f"videos-{ablation.data_hash}-{code_hash('motions')[:8]}.npz"
    if not path.exists():
        size = dict(classes=motions.CHANGES, takes=a.takes, frames=a.video_frames, side=a.video_side, seed=a.data_seed)
        groups = dict(test=(1, a.test_groups), train=(1 + a.test_groups, a.groups))
        arrays = {}
        for part, (first, count) in groups.items():
            videos = motions.generate(first_group=first, groups=count, **size)
            arrays[part] = torch.stack(videos.frames).numpy()
            arrays |= {f"{part}_labels": videos.labels.numpy(), f"{part}_names": np.array(videos.names)}
        with whole(path) as file:
            np.savez(file, **arrays)
    with np.load(path) as saved:
        return [Loaded(saved[f"{part}_names"].tolist(), *(torch.from_numpy(saved[name]) for name in
                (part, f"{part}_labels"))) for part in ("train", "test")]  # fmt: skip


def measure(ablation, subset, seed, splits, progress=iter):
    """One row's figures: a dict of the last step's terms, and of R@1, R@5 and linear accuracy by clips a video."""
    a, (train_set, test_set) = ablation, splits
    torch.manual_seed(seed)
    embedder = train.Embedder(TinyResNet3d(a.width)).to(memory_format=torch.channels_last_3d).eval()
    steps = []
    if weights(subset):
        recipe = train.Recipe(
            steps=a.steps, batch=a.batch, lr=a.lr, temperature=a.temperature, form=a.form, side=a.side, seed=seed,
            weights=weights(subset),
        )  # fmt: skip
        record = lambda **terms: steps.append(terms)  # noqa: E731
        train.pretrain(embedder, train_set, ClipPlan(a.frames, a.stride), recipe, record, progress)
    describe = evaluate.backbone_features(embedder.backbone)
    plan = dict(clips=a.eval_clips, frames=a.frames, stride=a.eval_stride, side=a.side)
    gallery, queries = (evaluate.clip_features(describe, videos, **plan) for videos in splits)
    layer = linear.fit(gallery, train_set.labels, len(motions.CHANGES))
    curve = {}
    for clips in range(1, a.eval_clips + 1):
        ranks = evaluate.ranking(gallery, queries, clips)
        recall = partial(evaluate.recall, ranks, train_set.labels, test_set.labels)
        curve[clips] = dict(r1=recall(1), r5=recall(5), linear=linear.accuracy(layer, queries, test_set.labels, clips))
    return dict(last_step=steps[-1] if steps else None, by_clips=curve)


def run_row(out, ablation, subset, seed, splits):
    """Measures a row and writes its file, whole or not at all."""
    started = time.perf_counter()
    figures = measure(ablation, subset, seed, splits)
    seconds = round(time.perf_counter() - started, 1)
    facts = dict(subset=subset, seed=seed, ablation=dataclasses.asdict(ablation), hash=ablation.hash)
    path = row_file(out, ablation, subset, seed)
    facts |= figures | dict(torch=torch.__version__, seconds=seconds)
    with whole(path) as file:
        file.write(json.dumps(facts, indent=1).encode() + b"\n")
    print(f"{subset}, seed {seed}: {seconds} s, {figures['by_clips'][ablation.eval_clips]}", flush=True)


def finished(out, ablation, seeds):
    """The rows there are: a dict (subset, seed) -> figures."""
    files = {row: row_file(out, ablation, *row) for row in rows(seeds)}
    return {row: json.loads(file.read_text()) for row, file in files.items() if file.exists()}


def summary(found):
    """{(subset, clips, figure): (mean, spread, seeds)} in %, the spread the standard deviation over seeds."""
    values = defaultdict(list)
    for (subset, _), row in found.items():
        for clips, figures in row["by_clips"].items():
            for name, value in figures.items():
                values[subset, int(clips), name].append(100 * value)
    spread = {key: stdev(each) if len(each) > 1 else 0.0 for key, each in values.items()}
    return {key: (mean(each), spread[key], len(each)) for key, each in values.items()}


def write_table(found, ablation, folder):
    """ablation.csv, every figure of every row, and ablation.md: R@1, R@5 and linear accuracy, mean +- spread."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ablation.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subset", "seed", "clips", "r1", "r5", "linear", "seconds", "hash", "torch"])
        for (subset, seed), row in found.items():
            for clips, figures in row["by_clips"].items():
                facts = row["seconds"], row["hash"], row["torch"]
                writer.writerow([subset, seed, clips, *(f"{value:.4f}" for value in figures.values()), *facts])
    figures, counts = summary(found), (1, ablation.eval_clips)
    columns = [(clips, name) for clips in counts for name in ("r1", "r5", "linear")]
    label = dict(r1="R@1", r5="R@5", linear="linear")
    head = ["", "seeds", *(f"{label[name]}, {clips} clip{'s' * (clips > 1)}" for clips, name in columns)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for subset in SUBSETS:
        cells = [figures.get((subset, *column)) for column in columns]
        if cells[0]:
            lines.append(
                [
                    subset,
                    str(cells[0][2]),
                    *(f"{value:.1f}" + f" ± {spread:.1f}" * (n > 1) for value, spread, n in cells),
                ]
            )
    (folder / "ablation.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def plot(found, folder):
    """ablation.png: R@1 and linear accuracy against the number of clips a video, a line a subset."""
    import matplotlib.pyplot as plt

    figures = summary(found)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, (name, label) in zip(axes, dict(r1="R@1 (%)", linear="linear accuracy (%)").items(), strict=True):
        for colour, subset in enumerate(SUBSETS):
            points = sorted((key[1], *value) for key, value in figures.items() if key[::2] == (subset, name))
            if points:
                clips, means, spreads, _ = zip(*points, strict=True)
                axis.errorbar(
                    clips, means, spreads, color=f"C{colour}", marker="o", markersize=3, capsize=2, label=subset
                )
        axis.axhline(100 / len(motions.CHANGES), color="gray", linestyle=":", label="chance")
        axis.set(xlabel="clips a video", ylabel=label, ylim=(0, None))
    axes[1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(folder / "ablation.png", dpi=130)
    plt.close(figure)


def run(out: Path = Path("runs/ablation"), seeds: int = 3, row: int | None = None, scale: Ablation = Ablation()):  # noqa: B008
    """Measures the rows that are missing, or one of 0 .. 8 seeds - 1; then the table and the curve of what there is."""
    wanted, splits = rows(seeds), None
    out.mkdir(parents=True, exist_ok=True)
    for subset, seed in wanted if row is None else [wanted[row]]:
        if not row_file(out, scale, subset, seed).exists():
            splits = splits or data(out, scale)
            run_row(out, scale, subset, seed, splits)
    found = finished(out, scale, seeds)
    write_table(found, scale, out)
    plot(found, out)


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
