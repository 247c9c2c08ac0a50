"""Measures what a call of the Triton backend costs on the host, without a GPU: python -m benchmarks.host

Triton runs with the pretended driver of tests/standin.py, whose launches do nothing. This counts the launches and the
other device operations of a forward and a backward pass, and times all that Python and PyTorch do for them after the
first call. The launch by a real driver, a few microseconds each, is not included.
"""

import statistics
import sys
import time

import pytest
import torch

import tclr_kernels as tk
from tests import standin

from . import rows

CASES = {  # name -> N, D, G, temperature
    "nt_xent, 40 videos of 4 clips": (4, 128, 40, 0.1),
    "nt_xent, 80 rows": (40, 128, 1, 0.1),
    "nt_xent, 8,192 rows": (4096, 128, 1, 0.1),
    "nt_xent, 8,192 rows, temperature on the device": (4096, 128, 1, torch.tensor(0.1)),
}
COLUMNS = "case", "status", "launches", "operations", "host_us", "cpu", "torch", "triton", "commit", "date"


def row(N, D, G, tau, repeats=200):
    shape = (N, D) if G == 1 else (G, N, D)
    inputs = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]

    def step():
        torch.autograd.grad(tk.nt_xent(*inputs, temperature=tau, backend="triton"), inputs)

    with pytest.MonkeyPatch.context() as patch:
        device = standin.install(patch)
        step()
        with device.counted() as (launches, operations):
            step()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(1e6 * (time.perf_counter() - start))
    host_us = round(statistics.median(times), 1)
    return dict(launches=len(launches), operations=len(operations), host_us=host_us)


def main():
    torch.set_num_threads(1)
    path = rows.default_path().with_name(rows.default_path().name.replace("cpu-", "host-", 1))
    failures = 0
    with rows.writing(path, COLUMNS) as add:
        for name, case in CASES.items():
            made = rows.here() | dict(case=name) | rows.attempted(row, *case)
            add(made)
            print(*(made.get(column, "") for column in COLUMNS[:5]), sep="\t", flush=True)
            failures += made["status"] != "ok"
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
