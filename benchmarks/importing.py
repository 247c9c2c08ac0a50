"""What `import tclr_kernels` adds to `import torch`: python -m benchmarks.importing

The median of 20 new processes: wall-clock seconds, and seconds of CPU time.
"""

import statistics
import subprocess
import sys

from . import rows

CODE = """
import time, torch
clock, processor = time.perf_counter(), time.process_time()
import tclr_kernels
print(time.perf_counter() - clock, time.process_time() - processor)
"""
COLUMNS = "seconds", "processor_seconds", "runs", "cpu", "torch", "python", "tclr_kernels", "commit", "date"


def seconds():
    """The wall-clock seconds and the CPU seconds of one new process."""
    run = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True, cwd=rows.ROOT)
    return tuple(map(float, run.stdout.split()))


def main(runs=20):
    seconds()  # writes the bytecode
    clock, processor = map(statistics.median, zip(*(seconds() for _ in range(runs)), strict=True))
    line = dict(seconds=f"{clock:.4f}", processor_seconds=f"{processor:.4f}", runs=runs)
    rows.record(rows.default_path("importing"), COLUMNS, [line])


if __name__ == "__main__":
    main()
