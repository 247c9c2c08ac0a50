"""How much slower a call is while other processes use the same cores: python -m benchmarks.busy

Each loss is timed forward and backward, by this library and by the fastest plain PyTorch, with free cores and beside
processes that keep every core busy, as data loaders do. A row has the 95th percentile of 200 calls (the median of three
runs) in both cases, and `rise`, their ratio. `of_dense` is this rise divided by that of plain PyTorch.
"""

import argparse
import multiprocessing
import statistics
import time
from pathlib import Path

import torch

from . import cases, measure, rows
from .providers import PROVIDERS

CASES = "tclr_release:2x40x4x128", "nt_xent:40x128", "nt_xent:512x128", "nt_xent:4096x128"
NAMES = "native", "dense"
COLUMNS = [
    *("case", "provider", "rows", "calls", "runs", "free_p50_ms", "free_p95_ms", "busy_p50_ms", "busy_p95_ms", "rise"),
    *("of_dense", "busy_processes", "cpu", "threads", "isa", "torch", "commit", "date"),
]


def spin(started):
    started.set()
    while True:
        pass


class Busy:
    """Processes that do nothing but compute, as long as the context lasts."""

    def __init__(self, count):
        self.context, self.count, self.processes = multiprocessing.get_context("spawn"), count, []

    def __enter__(self):
        for _ in range(self.count):
            started = self.context.Event()
            process = self.context.Process(target=spin, args=(started,), daemon=True)
            process.start()
            self.processes.append(process)
            started.wait()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()  # a handler of SIGTERM may have been inherited
            process.join()


def percentiles(step, calls, seconds):
    """The median and the 95th percentile of `calls` calls in milliseconds, or of as many as fit into `seconds`."""
    for _ in range(3):
        step()
    end, times = time.perf_counter() + seconds, []
    while len(times) < calls and (len(times) < 20 or time.perf_counter() < end):
        times.append(1e3 * measure.once(step)[0])
    return statistics.median(times), statistics.quantiles(times, n=20, method="inclusive")[-1], len(times)


def measured(steps, arguments):
    """{name: (the medians of both percentiles over all runs, the fewest calls of a run)}. The steps take turns."""
    found = {name: [] for name in steps}
    for _ in range(arguments.runs):
        for name, step in steps.items():
            found[name].append(percentiles(step, arguments.calls, arguments.seconds))
    return {
        name: (*(statistics.median(x) for x in list(zip(*of_runs, strict=True))[:2]), min(x[2] for x in of_runs))
        for name, of_runs in found.items()
    }


def lines(case, arguments):
    """The rows of a case."""
    inputs = case.inputs()
    steps = {name: PROVIDERS[name].step(case, inputs) for name in NAMES}
    free = measured(steps, arguments)
    with Busy(arguments.processes):
        busy = measured(steps, arguments)
    rise = {name: busy[name][1] / free[name][1] for name in steps}
    for name in steps:
        yield dict(
            case=case.key, provider=name, rows=case.rows, runs=arguments.runs, busy_processes=arguments.processes,
            calls=min(free[name][2], busy[name][2]), rise=f"{rise[name]:.2f}",
            of_dense=f"{rise[name] / rise['dense']:.2f}",
            **{f"{when}_{what}_ms": f"{x:.4g}" for when, found in (("free", free), ("busy", busy))
               for what, x in zip(("p50", "p95"), found[name], strict=False)},
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.busy", description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=cases.BY_KEY, default=CASES)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="the most that a run may take, except for 20 calls")
    parser.add_argument("--processes", type=int, default=torch.get_num_threads(), help="how many keep the cores busy")
    parser.add_argument("--out", type=Path, default=rows.default_path("busy"), help="the CSV to write")
    arguments = parser.parse_args()
    made = (line for key in arguments.case for line in lines(cases.BY_KEY[key], arguments))
    rows.record(arguments.out, COLUMNS, made)


if __name__ == "__main__":
    main()
