"""Compares several builds of the package: python -m benchmarks.builds NAME=FOLDER [NAME=FOLDER ...]

FOLDER has a `tclr_kernels/` with compiled kernels: a checkout, or a folder made by `pip install --target` from a wheel.
Each build runs in its own process. They take turns, one case at a time, so that a busy machine slows all of them down
alike. The others are compared with the first one.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from . import rows

CASES = {  # -> the statement that makes `step`
    "nt_xent, 80 rows": "step = nt_xent(40)",
    "nt_xent, 1,024 rows": "step = nt_xent(512)",
    "nt_xent, 4,096 rows": "step = nt_xent(2048)",
    "objective, B = 40": "step = objective(40)",
}
WORKER = """
import statistics, sys, time
sys.path.insert(0, sys.argv[1])
import torch, tclr_kernels as tk
assert tk.__file__.startswith(sys.argv[1]), tk.__file__
assert tk.available_backends("cpu")["native"] is None

def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]

def nt_xent(N):
    a, b = leaves((N, 128), (N, 128))
    return lambda: tk.nt_xent(a, b, temperature=0.1).backward()

def objective(B):
    inputs = leaves((2, B, 128), (2, B, 4, 128), (2, B, 4, 128))
    return lambda: tk.tclr(*inputs, temperature=0.1, form="release").total.backward()

for line in sys.stdin:
    exec(line)
    step()
    times, end = [], time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    print(1e6 * statistics.median(times), flush=True)
"""
COLUMNS = "case", "build", "us", "ratio", "rounds", "cpu", "threads", "torch", "commit", "date"


def started(folder):
    command = [sys.executable, "-c", WORKER, str(Path(folder).resolve())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")


def once(worker, statement):
    print(statement, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    workers = {name: started(folder) for name, folder in (build.split("=", 1) for build in options.builds)}
    rows.record(rows.default_path("builds"), COLUMNS, lines(workers, options.rounds))
    for worker in workers.values():
        worker.stdin.close()


def lines(workers, rounds):
    """A row for each case and build."""
    for case, statement in CASES.items():
        times = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                times[name].append(once(worker, statement))
        first = next(iter(times.values()))
        for name, own in times.items():
            ratio = statistics.median(one / other for one, other in zip(own, first, strict=True))
            yield dict(case=case, build=name, us=f"{statistics.median(own):.4g}", ratio=f"{ratio:.3f}", rounds=rounds)


if __name__ == "__main__":
    main()
