"""The seconds that each step of gpu.sh may take: python -m benchmarks.budget PROCESSES

A step that compiles with Triton takes the compilations of its busiest process times SECONDS, plus all else that it
does. The compilations are counted by `tests/test_rehearsal.py`, which runs the steps without a GPU and fails where they
have become more than this table allows. The running times are estimates, not measured.
"""

import math
import sys
from typing import NamedTuple

SECONDS = 1.0  # of one core for one compilation; see CONTRIBUTING.md for what was measured
PROCESSES = 16  # that the table is made for
TOTAL = 540


class Step(NamedTuple):
    """running: seconds of all but Triton's compilations; compilations: of the busiest process; gpus: at least."""

    running: int
    compilations: int = 0
    gpus: int = 1


STEPS = {
    "build": Step(90),
    "what is here": Step(20),
    "compile for the times and the sanitizers": Step(30, 28),
    "times": Step(65),
    "tests on the GPU": Step(50, 110),
    "compute-sanitizer memcheck": Step(30),
    "compute-sanitizer racecheck": Step(45),
    "compute-sanitizer initcheck": Step(30),
    "compute-sanitizer synccheck": Step(30),
    "tests on several GPUs": Step(200, gpus=2),  # beyond TOTAL, which is for one
}
ON_ONE = [name for name, step in STEPS.items() if step.gpus == 1]


def limit(name, processes=PROCESSES):
    """Seconds of a step. With fewer processes than the table is made for, each has more to do."""
    step = STEPS[name]
    return math.ceil((step.running + SECONDS * step.compilations) * max(1, PROCESSES / processes))


def busiest(jobs, processes=PROCESSES):
    """The compilations of the process that has the most, where none finds in the cache what another has compiled.

    jobs: sets of variants, in the order in which they are handed out, each to the process that has the fewest so far
    """
    done = [set() for _ in range(processes)]
    for job in jobs:
        min(done, key=len).update(job)
    return max(map(len, done))


if __name__ == "__main__":
    for name in STEPS:
        print(f"[{name!r}]={limit(name, int(sys.argv[1]))}")
