"""Checks every provider of every case, measures its time and memory, and writes the rows."""

import os
from collections.abc import Callable
from typing import NamedTuple

from . import cases, measure, oracle, rows
from .providers import serving

WEIGHED = "native", "dense", "compile", "lightly"  # whose memory is measured, each in a process of its own


def run(path, keys=None, providers=None, seconds=1.0, memory=True):
    """Measures cases and writes their rows as they are made. keys, providers: the names to measure; None for all."""
    if os.getloadavg()[0] > 0.5:
        print(f"warning: the load is {os.getloadavg()[0]:.1f}; times from a busy machine are no results")
    place = rows.here()
    for case in cases.CASES:
        if keys and case.key not in keys:
            continue
        chosen = {name: p for name, p in serving(case).items() if not providers or name in providers}
        print(f"{case.key}: {case.regime}", flush=True)
        for row in measured(case, chosen, seconds, memory):
            rows.add(path, [{**place, **row}])


class Tried(NamedTuple):
    """The first run of a provider: its row so far, its step if it is right, and the seconds that it took."""

    row: dict
    step: Callable | None = None
    seconds: float = 0.0


def measured(case, providers, seconds, memory):
    """The rows of a case: all providers are checked; those that are right are timed in turns."""
    try:
        inputs = case.inputs()
        right = oracle.truth(case, inputs)
        tried = {name: checked(case, provider, inputs, right) for name, provider in providers.items()}
    except Exception as error:  # such as too little memory
        tried = dict.fromkeys(providers, Tried({"status": rows.reason(error)}))
    timed = {name: t for name, t in tried.items() if t.step is not None}
    steps, first = {n: t.step for n, t in timed.items()}, {n: t.seconds for n, t in timed.items()}
    times = measure.interleaved(steps, first, seconds) if steps else {}
    dtype = str(case.dtype).removeprefix("torch.")
    for name, provider in providers.items():
        row = dict(provider=name, backend=provider.backend, case=case.loss, shape=case.shape, rows=case.rows)
        row.update(tried[name].row, dtype=dtype, mode=case.mode)
        if name in times:
            milliseconds = map("{:.4g}".format, measure.percentiles(times[name]))
            row.update(zip(("p20_ms", "p50_ms", "p80_ms"), milliseconds, strict=True), runs=len(times[name]))
            weight = measure.peak_memory(case, name) if memory and name in WEIGHED else None
            row["peak_mb"] = "" if weight is None else f"{weight:.1f}"
        report(row)
        yield row


def checked(case, provider, inputs, right):
    """Runs a provider once and compares its result with the correct one. Returns Tried."""
    try:
        step = provider.step(case, inputs)
        seconds, result = measure.once(step)
        found = None if case.loss in provider.floors else oracle.errors(result, right)
    except Exception as error:  # another library that cannot compute this: its row has the error
        return Tried({"status": rows.reason(error)})
    if found is None:
        return Tried({"status": "floor"}, step, seconds)
    loss_error, grad_error = found
    holds = oracle.holds(loss_error, grad_error, case.dtype)
    row = dict(status="ok" if holds else "wrong", loss_error=f"{loss_error:.1e}")
    row["grad_error"] = "" if result[1] is None else f"{grad_error:.1e}"
    return Tried(row, step if holds else None, seconds)


def report(row):
    numbers = f"{row.get('p50_ms', '-'):>10} ms {row.get('peak_mb', '') or '-':>8} MiB"
    errors = f"loss {row.get('loss_error', '')} gradient {row.get('grad_error', '')}"
    print(f"  {row['provider']:<12}{row['status']:<8}{numbers}  {errors}", flush=True)
