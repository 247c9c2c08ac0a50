"""Measures what labels cost: python -m benchmarks.labels

NT-Xent of 4,096 rows, D = 128, forward and backward, without labels and with labels of several numbers of classes.
"own" gives each row its index as its label, which is the same loss as without labels. All take turns in one run.
"""

import argparse
import statistics
from pathlib import Path

import torch

import tclr_kernels as tk

from . import measure, rows

N, D = 2048, 128
CLASSES = 1000, 100, 10, 2
COLUMNS = "labels", "p50_ms", "ratio", "runs", "cpu", "threads", "torch", "commit", "date"


def steps():
    """For each kind of labels, a function that makes one step."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, D, generator=generator).requires_grad_() for _ in range(2))
    labels = {"none": None, "own": torch.arange(N)}
    labels |= {str(n): torch.randint(n, (N,), generator=generator) for n in CLASSES}
    return {name: lambda x=x: tk.nt_xent(a, b, labels=x).backward() for name, x in labels.items()}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.labels", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to time each kind of labels")
    parser.add_argument("--out", type=Path, default=rows.default_path("labels"))
    options = parser.parse_args()
    made = steps()
    times = measure.interleaved(made, {name: measure.once(step)[0] for name, step in made.items()}, options.seconds)
    middle = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    lines = [
        dict(labels=name, p50_ms=f"{middle[name]:.4g}", ratio=f"{middle[name] / middle['none']:.3f}", runs=len(seconds))
        for name, seconds in times.items()
    ]
    rows.record(options.out, COLUMNS, lines)


if __name__ == "__main__":
    main()
