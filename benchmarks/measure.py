"""Time and memory of a step."""

import ctypes
import gc
import statistics
import subprocess
import sys
import time
from pathlib import Path

from . import cases, providers

BURST = 0.02  # seconds a provider runs on end before the next one's turn
ROUNDS = 5, 60  # at least, at most
LONG = 10.0  # a step of this many seconds is repeated only twice


def once(step):
    """The seconds of one step, and its result."""
    start = time.perf_counter()
    result = step()
    return time.perf_counter() - start, result


def interleaved(steps, first, seconds):
    """Times steps in turns, so that a slow minute of the machine affects all of them.

    steps: name -> step; first: name -> the seconds of an earlier run; seconds: to spend on each step, about.
    Returns name -> seconds of each run.
    """
    typical = {name: first[name] if first[name] > 1 else once(step)[0] for name, step in steps.items()}
    burst = {name: max(1, min(20, round(BURST / t))) for name, t in typical.items()}
    turn = sum(typical[name] * (burst[name] + 1) for name in steps)
    rounds = min(ROUNDS[1], max(ROUNDS[0] if max(typical.values()) < LONG else 2, int(seconds * len(steps) / turn)))
    times = {name: [] for name in steps}
    gc.disable()
    for number in range(rounds):
        for name in list(steps) if number % 2 else reversed(steps):
            if typical[name] < 0.1:
                steps[name]()  # brings its data back into the caches
            times[name] += [once(steps[name])[0] for _ in range(burst[name])]
    gc.enable()
    return times


def percentiles(seconds):
    """The 20th, 50th and 80th percentile, in milliseconds."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return [1e3 * tenths[i] for i in (1, 4, 7)]


def peak_memory(case, name):
    """MiB that a step takes beyond its inputs, measured in a process of its own; None where the system cannot say."""
    command = [sys.executable, "-m", "benchmarks", "memory", case.key, name]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def peak_memory_here(key, name):
    """The same, in this process: its peak resident memory, minus what it held after the inputs were made."""
    case, provider = cases.BY_KEY[key], providers.PROVIDERS[name]
    warm_up = cases.WARM_UP[case.loss]._replace(dtype=case.dtype, mode=case.mode)
    provider.step(warm_up, warm_up.inputs())()  # loads libraries and starts threads, which are no part of the step
    inputs = case.inputs()
    return peak_of(provider.step(case, inputs), compiles=provider.backend == "inductor")


def peak_of(step, compiles=False):
    """MiB that a step takes beyond what this process holds.

    compiles: the first call compiles, so the step runs once before, and the compiler's memory does not count.
    """
    _give_back()
    before = _resident("VmRSS")
    if compiles:
        step()
        _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again here: what a compiler needed does not count
    step()
    return _resident("VmHWM") - before


def _resident(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def _give_back():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
