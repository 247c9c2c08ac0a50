"""Measures the launches of the Triton backend on the host, without a GPU: python -m benchmarks.launches

Triton's own just-in-time compiler runs with the stand-in driver of tests/standin.py, whose launches do nothing. This
counts the launches and the other device operations of a forward and a backward pass. host_us is the time of all that
Python and PyTorch do for them after the first call, and launch_us the part of it that the launches take. triton_us is
the time of Triton's own `kernel[grid](...)` for the same launches. The driver's own work, a few microseconds for each
launch, is not included.
"""

import statistics
import sys
import time

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels.triton import large, rectangle, sets, small
from tests import standin

from . import rows

VIEWS = [(4096, 128)] * 2
VIDEOS = [(2, 40, 128), (2, 40, 4, 128), (2, 40, 4, 128)]
CASES = {  # name -> loss, shapes of its inputs, their dtype, settings
    "nt_xent, 40 videos of 4 clips": (tk.nt_xent, [(40, 4, 128)] * 2, torch.bfloat16, {}),
    "nt_xent, 80 rows": (tk.nt_xent, [(40, 128)] * 2, torch.bfloat16, {}),
    "nt_xent, 8,192 rows": (tk.nt_xent, VIEWS, torch.bfloat16, {}),
    "nt_xent, 8,192 rows, temperature on the device": (
        tk.nt_xent,
        VIEWS,
        torch.bfloat16,
        dict(temperature=torch.tensor(0.1)),
    ),
    "tclr of the paper, 40 videos": (tk.tclr, VIDEOS, torch.float32, {}),
    "tclr of the release, 40 videos": (tk.tclr, VIDEOS, torch.float32, dict(form="release")),
    "tclr of the release, 40 videos, bfloat16": (tk.tclr, VIDEOS, torch.bfloat16, dict(form="release")),
    "info_nce, 256 queries and 4,096 negatives": (
        tk.info_nce,
        [(256, 128)] * 2,
        torch.float32,
        dict(negatives=torch.zeros(4096, 128)),
    ),
    "sup_con, 512 rows": (tk.sup_con, [(512, 128)], torch.float32, dict(labels=torch.zeros(512, dtype=torch.int64))),
}
FIGURES = "launches", "operations", "host_us", "launch_us", "triton_us"
COLUMNS = "case", "status", *FIGURES, "cpu", "torch", "triton", "commit", "date"


def row(loss, shapes, dtype, settings):
    inputs = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]

    def step():
        out = loss(*inputs, **settings, backend="triton")
        torch.autograd.grad(out if isinstance(out, torch.Tensor) else out.total, inputs)

    with pytest.MonkeyPatch.context() as patch:
        device = standin.install(patch)
        step()
        with device.counted() as (launches, operations):
            step()
        host_us = microseconds(step)
        with pytest.MonkeyPatch.context() as recording:
            calls = recorded(recording)
            step()
        ours, own = (sum(microseconds(lambda c=c, f=f: f(*c)) for c in calls) for f in (launch, direct))
    times = host_us, ours, own
    return dict(zip(FIGURES, (len(launches), len(operations), *(round(t, 1) for t in times)), strict=True))


def microseconds(step):
    """The median of 200 single runs."""
    times = []
    for _ in range(200):
        start = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def recorded(patch):
    """A list to which every launch adds its arguments."""
    calls = []

    def record(*arguments, **settings):
        calls.append((arguments, settings))
        sets.launch(*arguments, **settings)

    for module in (large, small, rectangle):
        patch.setattr(module, "launch", record)
    return calls


def launch(arguments, settings):
    sets.launch(*arguments, **settings)


def direct(arguments, settings):
    """The same launch by Triton's own interface."""
    kernel, programs, *others = arguments
    kernel[(programs,)](*others, **settings, **sets.COMPILER_OPTIONS)


def main():
    torch.set_num_threads(1)
    lines = (dict(case=name) | rows.attempted(row, *case) for name, case in CASES.items())
    return rows.record(rows.default_path("launches"), COLUMNS, lines)


if __name__ == "__main__":
    sys.exit(main())
