"""The seconds that each step of gpu.sh may take: python -m benchmarks.budget PROCESSES

A step that compiles with Triton takes SECONDS for each compilation of its busiest process, plus its running time. The
rehearsal (`tests/test_rehearsal.py`) runs the steps without a GPU and counts the compilations. It fails if there are
more than this table allows. The running times are estimates, not measured.
"""

import math
import sys
from typing import NamedTuple

SECONDS = 0.8  # for one compilation on one core; CONTRIBUTING.md has what was measured
PROCESSES = 16  # the number of processes that the table assumes
TOTAL = 540  # seconds of all steps on one GPU


class Step(NamedTuple):
    """A step of gpu.sh.

    running: seconds without Triton's compilations. compilations: those of the busiest process. gpus: how many it needs.
    """

    running: int
    compilations: int = 0
    gpus: int = 1


STEPS = {
    "build": Step(110),
    "what is here": Step(10),
    "compile for the times and the sanitizers": Step(42, 22),
    "times": Step(75),
    "tests on the GPU": Step(60, 130),
    "compute-sanitizer memcheck": Step(25),
    "compute-sanitizer racecheck": Step(45),
    "compute-sanitizer initcheck": Step(25),
    "compute-sanitizer synccheck": Step(25),
    "tests on several GPUs": Step(200, gpus=2),  # not part of TOTAL
}
ON_ONE = [name for name, step in STEPS.items() if step.gpus == 1]


def limit(name, processes=PROCESSES):
    """The time limit of a step, in seconds. With fewer processes than the table assumes, each has more to do."""
    step = STEPS[name]
    return math.ceil((step.running + SECONDS * step.compilations) * max(1, PROCESSES / processes))


def busiest(jobs, processes=PROCESSES):
    """The compilations of the busiest process, if no process finds another one's compilations in the cache.

    jobs: sets of variants, in the order in which they are handed out. Each goes to the process that has the fewest.
    """
    done = [set() for _ in range(processes)]
    for job in jobs:
        min(done, key=len).update(job)
    return max(map(len, done))


if __name__ == "__main__":
    for name in STEPS:
        print(f"[{name!r}]={limit(name, int(sys.argv[1]))}")
