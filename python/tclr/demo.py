"""python -m tclr.demo: pretrains a small network on generated videos, by IC and by IC + LL + GL, and compares them.

IC is the paper's: its two views show different times of a video. The views of IC + LL + GL show the same frames.
"""

import argparse
import dataclasses
import json
import platform
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import tclr_kernels as tk

from . import evaluate, motions, processes, report, train, videos
from .clips import ClipPlan
from .models import TinyResNet3d

MARK = "run.json"
RANDOM, IC, TCLR, PIXELS = "random init", "IC", "IC + LL + GL", "single-frame pixels"
WEIGHTS = {IC: train.IC_ONLY, TCLR: None}
WINDOWS = {IC: "independent", TCLR: "same"}


def arguments(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tclr.demo",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for everything, also the videos")
    add("--overwrite", action="store_true", help="write into --out even if it has files that are not from the demo")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    add("--backend", choices=tk.available_backends(), help="backend of tclr_kernels; without it, the best one")
    add("--groups", type=int, default=25, help="groups of videos in the data set; UCF101 has 25")
    add("--test-groups", type=int, default=8, help="how many of these groups are for testing")
    add("--takes", type=int, default=4, help="videos of each class in a group")
    add("--video-frames", type=int, default=64, help="frames of a video")
    add("--video-side", type=int, default=40, help="height and width of a video")
    add("--frames", type=int, default=8, help="frames of a clip")
    add(
        "--stride",
        type=int,
        default=4,
        help="stride of the global clip, in frames; also the number of local clips",
    )
    add("--side", type=int, default=32, help="height and width of a clip")
    add("--steps", type=int, default=200, help="steps of each pretraining")
    add("--batch", type=int, default=32, help="videos per step")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--width", type=int, default=8, help="channels of the network's first stage")
    add("--eval-clips", type=int, default=8, help="largest number of clips per video in the evaluation")
    add("--eval-stride", type=int, default=3, help="such a clip has every N-th frame of a video")
    return parser.parse_args(argv)


class Demo:
    """One run of the demo: its options, its folder and what it has measured so far."""

    def __init__(self, options):
        self.options, self.out, self.console = options, options.out, Console()
        self.plan = ClipPlan(options.frames, options.stride)
        self.seconds = {}
        claim(self.out, options.overwrite)
        self.metrics = report.Metrics(self.out / "metrics.jsonl")

    def run(self):
        self.gallery, self.queries = self.stage("write and decode", self.data)
        ranks = {run: self.stage(run, partial(self.measure, run)) for run in (PIXELS, RANDOM, IC, TCLR)}
        self.stage("pictures", partial(self.pictures, ranks))
        self.metrics.close()
        self.summary()
        return self.metrics.rows

    def stage(self, name, function):
        started = time.perf_counter()
        result = function()
        self.seconds[name] = round(time.perf_counter() - started, 1)
        return result

    def data(self):
        """Writes the data set's video files, and then decodes both splits into memory."""
        o, root = self.options, self.out / "dataset"
        size = dict(groups=o.groups, test_groups=o.test_groups, takes=o.takes, frames=o.video_frames, side=o.video_side)
        motions.write_dataset(root, **size, seed=o.seed, progress=self.progress("writing videos"))
        splits = []
        for split in "trainlist01", "testlist01":
            found = videos.load(root, split, self.plan.window, self.progress(f"decoding {split}"))
            self.metrics.add("videos", split=split, **found.counts)
            self.console.print(f"{split}: " + ", ".join(f"{n} {how}" for how, n in found.counts.items()))
            splits.append(found)
        return splits

    def measure(self, run):
        """Computes the features of both splits for one run, and measures retrieval. Returns the last ranking."""
        o = self.options
        describe = evaluate.single_frame if run == PIXELS else self.trained(run)
        features = [
            evaluate.clip_features(
                describe, split, clips=o.eval_clips, frames=o.frames, stride=o.eval_stride, side=o.side
            )
            for split in (self.gallery, self.queries)
        ]
        for clips in range(1, o.eval_clips + 1):
            ranks = evaluate.ranking(*features, clips)
            recalls = {f"r{k}": evaluate.recall(ranks, self.gallery.labels, self.queries.labels, k) for k in (1, 5)}
            self.metrics.add("retrieval", run=run, clips=clips, **recalls)
        return ranks

    def trained(self, run):
        """A function from clips to features of the backbone, which is pretrained if the run has a pretraining.

        All runs start from the same weights.
        """
        o = self.options
        torch.manual_seed(o.seed)
        embedder = train.Embedder(TinyResNet3d(o.width)).to(memory_format=torch.channels_last_3d).eval()
        if run in WEIGHTS:
            recipe = train.Recipe(
                steps=o.steps, batch=o.batch, lr=o.lr, side=o.side, seed=o.seed, backend=o.backend, weights=WEIGHTS[run]
            )
            record = partial(self.metrics.add, "step", run=run)
            plan = dataclasses.replace(self.plan, windows=WINDOWS[run])
            train.pretrain(embedder, self.gallery, plan, recipe, record, self.progress(f"pretraining {run}"))
        return evaluate.backbone_features(embedder.backbone)

    def pictures(self, ranks):
        runs = [IC, TCLR]
        report.plot_losses(self.metrics, runs, self.out / "losses.png")
        chance = (self.queries.labels[:, None] == self.gallery.labels).float().mean().item()
        report.plot_clips(self.metrics, [TCLR, IC, RANDOM, PIXELS], chance, self.out / "clips.png")
        chosen = torch.linspace(0, len(self.queries) - 1, min(8, len(self.queries))).long().tolist()
        report.plot_gallery(self.queries, self.gallery, ranks[TCLR], chosen, self.out / "gallery.png")

    def summary(self):
        """Prints the table and a summary, and writes the options, versions and times of the run."""
        o, counts = self.options, sorted({1, self.options.eval_clips})
        title = f"Retrieval (%): {len(self.queries)} queries, {len(self.gallery)} videos in the gallery"
        self.console.print(report.table(self.metrics, [PIXELS, RANDOM, IC, TCLR], counts, title))
        for clips in counts:
            r1 = {run: self.metrics.of("retrieval", run=run, clips=clips)[0]["r1"] for run in (RANDOM, IC, TCLR)}
            ratios = ", ".join(f"{run} {r1[run] / max(r1[RANDOM], 1e-9):.1f}x" for run in (IC, TCLR))
            self.console.print(
                f"R@1 as a multiple of random init, with {clips} clip{'s' * (clips > 1)} per video: {ratios}"
            )
        took = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        self.console.print(f"{took}; {sum(self.seconds.values()):.0f} s in all. Written to {self.out}/")
        facts = dict(options={k: str(v) if isinstance(v, Path) else v for k, v in vars(o).items()})
        facts.update(windows=WINDOWS, seconds=self.seconds, torch=torch.__version__)
        facts.update(machine=platform.processor() or platform.machine())
        (self.out / MARK).write_text(json.dumps(facts, indent=1) + "\n")

    def progress(self, description):
        """Wraps an iterable with a length in a progress bar."""

        def bar(things):
            columns = TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn()
            with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as progress:
                yield from progress.track(things, description=description)

        return bar


def claim(out, overwrite):
    """Marks the folder as that of a demo. Files of an earlier demo are overwritten; nothing is deleted."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists() and not overwrite:
        raise SystemExit(f"{out} has files that are not from the demo: choose another --out, or pass --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("{}\n")


if __name__ == "__main__":
    with processes.single("demo"):
        Demo(arguments()).run()
