"""Measures what a call costs on the host, without a GPU: python -m benchmarks.host

The Triton backend runs with the pretended driver of tests/standin.py, whose launches do nothing. The native backend's
CUDA kernels run through their binding with the host's executor of csrc/cuda/host.h, whose launches do nothing either:
once with the loss as a single call ("native"), and once composed of several ("native, composed"). This counts the
launches and the other device operations of a forward and a backward pass, and times all that Python and PyTorch do for
them after the first call. The launch by a real driver, a few microseconds each, is not included.
"""

import contextlib
import itertools
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends, reduced
from tests import cuda, standin

from . import rows
from .launches import microseconds

CASES = {  # name -> N, D, G, temperature
    "nt_xent, 40 videos of 4 clips": (4, 128, 40, 0.1),
    "nt_xent, 80 rows": (40, 128, 1, 0.1),
    "nt_xent, 8,192 rows": (4096, 128, 1, 0.1),
    "nt_xent, 8,192 rows, temperature on the device": (4096, 128, 1, torch.tensor(0.1)),
}
COLUMNS = "case", "backend", "status", "launches", "operations", "host_us", "cpu", "torch", "triton", "commit", "date"
BACKENDS = "triton", "native", "native, composed"


LAUNCHING = {f"aten::{name}" for name in ("sum", "div", "mul", "copy_", "fill_", "zero_", "cat")}


class Dry:
    """The CUDA kernels' binding on the host, whose launches do nothing."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.host = cuda.Host(cuda.build(Path(self.folder.name)))
        self.host.executor.run_dry(True)

    @contextlib.contextmanager
    def counted(self):
        launches, operations, before = [], [], self.host.executor.launches()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            yield launches, operations
        launches += range(self.host.executor.launches() - before)
        operations += [event.name for event in profile.events() if event.name in LAUNCHING]


def installed(backend, patch, dry):
    if backend == "triton":
        return standin.install(patch)
    patch.setitem(backends.BACKENDS, "native", dry.host)
    if backend != "native":
        patch.setattr(reduced, "must_be_composed", lambda inputs: True)
    return dry


def row(backend, dry, N, D, G, tau):
    shape = (N, D) if G == 1 else (G, N, D)
    inputs = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]

    def step():
        torch.autograd.grad(tk.nt_xent(*inputs, temperature=tau, backend=backend.split(",")[0]), inputs)

    with pytest.MonkeyPatch.context() as patch:
        device = installed(backend, patch, dry)
        step()
        with device.counted() as (launches, operations):
            step()
        host_us = microseconds(step)
    return dict(launches=len(launches), operations=len(operations), host_us=round(host_us, 1))


def lines():
    dry = Dry()
    for (name, case), backend in itertools.product(CASES.items(), BACKENDS):
        yield dict(case=name, backend=backend) | rows.attempted(row, backend, dry, *case)


def main():
    torch.set_num_threads(1)
    return rows.record(rows.default_path("host"), COLUMNS, lines())


if __name__ == "__main__":
    sys.exit(main())
