"""python -m benchmarks.step: the share of a pretraining step that the loss takes, here and in the official code.

A step is augmentation, backbone and head, forward and backward, with the loss between them. Decoding is left out. Both
losses get the same embeddings and take turns. The rows have the medians.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

import tclr_kernels as tk

from . import baselines, rows

sys.path.insert(0, str(rows.ROOT / "python"))
from tclr import augment, clips, config, train  # noqa: E402

CASES = {  # network, clips, videos a batch, size of a frame, side of a clip
    "tiny net, 8 frames of 32 x 32": (config.Net("tiny", width=8), clips.ClipPlan(8, 4), 32, (40, 40), 32),
    "R3D-18, 16 frames of 112 x 112": (config.Net("r3d18"), clips.ClipPlan(16, 4), 2, (128, 171), 112),
}
LOSSES = {
    "tclr_kernels": lambda *z: tk.tclr(*z, form="release").total,
    "release": lambda *z: baselines.release(*z, 0.1),
}
COLUMNS = [
    *("case", "videos", "status", "rest_ms", "loss_ms", "share", "release_loss_ms", "release_share", "rounds"),
    *("cpu", "threads", "torch", "python", "commit", "date"),
]


def measure(case, rounds):
    net, plan, videos, size, side = CASES[case]
    embedder = config.build(net, seed=0)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(256, (videos, plan.window, 3, *size), dtype=torch.uint8, generator=generator)
    rest, losses = [], {name: [] for name in LOSSES}
    for round in range(rounds + 1):
        started = time.perf_counter()
        embeddings = train.embed(embedder, windows, plan, augment.ReleaseAugment(side, generator))
        forward = time.perf_counter() - started
        leaves = [z.detach().requires_grad_() for z in embeddings]
        for name, loss in LOSSES.items():
            for _ in range(10):
                started = time.perf_counter()
                gradients = torch.autograd.grad(loss(*leaves), leaves)
                if round:
                    losses[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        torch.autograd.backward(embeddings, gradients)
        if round:
            rest.append(forward + time.perf_counter() - started)
    rest, ours, theirs = (1e3 * statistics.median(times) for times in (rest, *losses.values()))
    return dict(
        case=case, videos=videos, rounds=rounds, rest_ms=f"{rest:.0f}", loss_ms=f"{ours:.2f}",
        release_loss_ms=f"{theirs:.1f}", share=f"{ours / (ours + rest):.3%}",
        release_share=f"{theirs / (theirs + rest):.3%}",
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=rows.default_path("step"))
    arguments = parser.parse_args()
    lines = (dict(case=case) | rows.attempted(measure, case, arguments.rounds) for case in CASES)
    return rows.record(arguments.out, COLUMNS, lines)


if __name__ == "__main__":
    sys.exit(main())
