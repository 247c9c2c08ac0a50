"""Where the time of a small objective goes: python -m benchmarks.parts

The objective in the form of the official release, forward and backward: the whole, each of its terms alone, and one of
a single video, which has nothing to compute. And the arithmetic of all terms, in registers: no memory, no reductions.
The parts take turns in one run, once with one thread and once with all.
"""

import argparse
import statistics
from pathlib import Path

import torch

import tclr_kernels as tk

from . import floors, measure, rows

B, T, D = 40, 4, 128
TERMS = {"instance, global clips": "ic_global", "instance, local clips": "ic_local"}
TERMS |= {"local-local": "ll", "global-local": "gl"}
WITH_LL = "instance, local clips, and local-local from the same matrix"
COLUMNS = "part", "threads", "p50_us", "runs", "cpu", "isa", "torch", "commit", "date"


def step(terms, B=B, T=T):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, B, D), (2, B, T, D), (2, B, T, D)
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weights = {term: float(term in terms) for term in TERMS.values()}
    return lambda: torch.autograd.grad(tk.tclr(*inputs, form="release", weights=weights).total, inputs)


def arithmetic():
    """Each similarity once (it is kept for the backward), and both sides' gradients from it."""
    similarities = ((2 * B) ** 2 + (2 * B * T) ** 2) / 2 + B * (2 * T) ** 2
    return floors.in_registers(3 * D * similarities, 2 * similarities)


def parts():
    made = {name: step([term]) for name, term in TERMS.items()}
    return {
        "all": step(TERMS.values()),
        **made,
        WITH_LL: step(["ic_local", "ll"]),
        "one video, one clip": step(TERMS.values(), 1, 1),
    }


def lines(seconds):
    before = torch.get_num_threads()
    for threads in sorted({1, before}):
        torch.set_num_threads(threads)
        # the arithmetic has threads of its own, which keep the cores busy for a while after each call
        for steps in (parts(), {"the arithmetic alone": arithmetic()}):
            first = {name: measure.once(step)[0] for name, step in steps.items()}
            for name, taken in measure.interleaved(steps, first, seconds).items():
                middle = 1e6 * statistics.median(taken)
                yield dict(part=name, threads=threads, p50_us=f"{middle:.4g}", runs=len(taken))
    torch.set_num_threads(before)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time each part")
    parser.add_argument("--out", type=Path, default=rows.default_path("parts"))
    options = parser.parse_args()
    rows.record(options.out, COLUMNS, lines(options.seconds))


if __name__ == "__main__":
    main()
