"""Reads and writes the result rows, a CSV file for each device. All plots and numbers of the pages come from them."""

import contextlib
import csv
import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from tclr_kernels import info

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = [
    *("case", "provider", "backend", "shape", "rows", "dtype", "mode", "status"),
    *("p50_ms", "p20_ms", "p80_ms", "runs", "peak_mb", "loss_error", "grad_error"),
    *("cpu", "threads", "isa", "torch", "triton", "python", "tclr_kernels", "commit", "date"),
]
KEY = "case", "provider", "shape", "dtype", "mode"


def here():
    """The columns that say on which machine and with which versions a row was measured."""
    versions = info.versions()
    facts = info.build_facts()
    return {
        "cpu": info.cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": facts["isa"] if facts else "",
        "torch": versions["torch"],
        "triton": versions["triton"] or "",
        "python": platform.python_version(),
        "tclr_kernels": versions["tclr-kernels"],
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit():
    """The commit, with a + if the sources that matter have uncommitted changes."""
    sources = ["--", "tclr_kernels", "csrc", "benchmarks/*.py", "setup.py"]
    changed = _git("status", "--porcelain", "--untracked-files=no", *sources)
    return _git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def _git(*arguments):
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() or ("unknown" if done.returncode else "")


def default_path(kind="cpu"):
    """results/<kind>-<cpu>.csv, with the instruction set in its name, since one CPU name covers several generations."""
    name = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)|@.*", "", info.cpu_model().lower())).strip("-")
    facts = info.build_facts()
    isa = f"{facts['isa']}-" if facts else ""
    return RESULTS / f"{kind}-{name}-{isa}{torch.get_num_threads()}-threads.csv"


def files():
    """The result files of all devices."""
    return sorted(RESULTS.glob("cpu-*.csv")) + sorted(RESULTS.glob("gpu-*.csv"))


def newest(paths):
    """The file with the latest row."""
    return max(paths, key=lambda path: max(row["date"] for row in read(path)))


def read(path):
    """The rows of a file, as dicts of strings; none if there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@contextlib.contextmanager
def writing(path, columns):
    """Yields a function that adds one row to a new file at once, so that an interrupted run keeps its rows.

    Missing columns stay empty; unknown ones are left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n", extrasaction="ignore")

        def add(row):
            writer.writerow(row)
            file.flush()

        writer.writeheader()
        file.flush()
        yield add


def attempted(make, *arguments):
    """The row that a function returns, with the status "ok". If it raises, a row with the error as its status."""
    try:
        return {"status": "ok"} | make(*arguments)
    except Exception as error:
        return {"status": reason(error)}


def reason(error):
    """An error in one line, as it stands in the status column."""
    return f"error: {type(error).__name__}: {' '.join(str(error).split())[:100]}"


def write(path, columns, made):
    """Replaces the rows of a file. Whatever happens, the file has either the old rows or the new ones."""
    unfinished = path.with_suffix(".unfinished")
    with writing(unfinished, columns) as add:
        for row in made:
            add(row)
    os.replace(unfinished, path)


def record(path, columns, made):
    """Writes rows to a file with the columns of `here`, and prints each as soon as it is made.

    Returns the exit status of the program: 1 if a row has an error as its status, else 0.
    """
    place, failures = here(), []

    def printed():
        for row in made:
            print(*row.values(), sep="\t", flush=True)
            failures.append(row.get("status", "ok") != "ok")
            yield place | row

    write(path, columns, printed())
    return int(any(failures))


def is_scaling(row):
    """Whether a row belongs to the series of NT-Xent cases that differ only in the number of rows."""
    return (row["case"], row["dtype"], row["mode"]) == ("nt_xent", "float32", "forward+backward") and row[
        "shape"
    ].endswith("x128")


def add(path, new):
    """Adds rows to a file; each replaces the one with the same case, provider, shape, dtype and mode."""
    rows = {tuple(row[k] for k in KEY): row for row in read(path)}
    rows.update({tuple(row[k] for k in KEY): row for row in new})
    write(path, COLUMNS, sorted(rows.values(), key=lambda row: (row["case"], int(row["rows"]))))
