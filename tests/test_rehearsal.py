"""benchmarks/gpu.sh without a GPU: the order and limits of its steps, and with --full the steps; see rehearsal/."""

import collections
import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import setup
from benchmarks import budget, gpu, rows

ROOT = Path(__file__).parents[1]
FOLDERS = "benchmarks", "csrc", "tclr_kernels", "tests", "python"
COMPILED = "compile for the times and the sanitizers"
TESTS = "tests on the GPU"


def copy(folder):
    """This repository's sources and what is compiled of them, as new as they are here; not its CUDA kernels."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_cuda.so", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy2(ROOT / name, folder)
    return folder


def run(folder, **environment):
    """gpu.sh in a copy, with its output."""
    command = ["env", "--unset=PYTEST_CURRENT_TEST", "bash", "benchmarks/gpu.sh"]
    environment = os.environ | dict(OUT=str(folder / "out"), COMMIT="abc1234") | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def rehearsing(folder, log):
    """The environment in which Python finds a GPU that is not there. folder: the repository or a copy of it"""
    rehearsal = f"{folder}/tests/rehearsal"
    python_path = os.pathsep.join(filter(None, [rehearsal, os.environ.get("PYTHONPATH")]))
    path = f"{rehearsal}/bin{os.pathsep}{os.environ['PATH']}"
    return dict(PYTHONPATH=python_path, PATH=path, PYTEST_ADDOPTS="-p values", REHEARSAL=str(log))


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_all_limits_together_are_below_nine_minutes():
    assert sum(map(budget.limit, budget.ON_ONE)) < budget.TOTAL


def test_fewer_processes_take_longer():
    assert budget.limit(TESTS, 2) > budget.limit(TESTS, 16) == budget.limit(TESTS, 64)


def test_the_busiest_process():
    jobs = [{"a", "b"}, {"a"}, {"a", "c"}, {"b", "c", "d"}]
    assert budget.busiest(jobs, 1) == 4 and budget.busiest(jobs, 4) == 3
    assert budget.busiest(jobs, 2) == 4  # a b | a, then a b | a c, then a b c d


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path):
    """With a Python that only tells what it is asked for, fails at the times, and takes too long at the tests."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy2(ROOT / "benchmarks/gpu.sh", tmp_path / "benchmarks")
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        'case "$*" in\n'
        f"  *benchmarks.budget*) {sys.executable} {ROOT}/benchmarks/budget.py 16 | sed '/tests/s/=.*/=1/' ;;\n"
        "  *--results*) exit 3 ;;\n"
        "  *pytest*) sleep 60 ;;\n"
        "  -m*|setup.py*) echo $TRITON_CACHE_DIR $TCLR_KERNELS_CUDA ;;\n"
        "esac\n"
    )
    python.chmod(0o755)
    done = run(tmp_path, PYTHON=str(python), PATH=rehearsing(ROOT, "")["PATH"])
    steps = {row["step"]: row["status"] for row in table(tmp_path / "out" / "steps.csv")}
    assert steps == dict.fromkeys(budget.ON_ONE, "0") | {"times": "3", TESTS: "124"}
    assert list(steps) == list(budget.ON_ONE) and done.returncode == 1
    assert "FAILED: times, status 3" in done.stdout and "FAILED: tests on the GPU, status 124" in done.stdout
    told = collections.Counter(line for line in done.stdout.splitlines() if line.endswith("triton 1"))
    assert set(told.values()) == {7}  # all others have the same cache, and ask for the CUDA kernels


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    path = tmp_path / "rows.csv"
    with pytest.raises(KeyboardInterrupt), rows.writing(path, ["a", "status"]) as add:
        assert table(path) == []
        for a in "12":
            add(dict(a=a, b="no column", status="ok"))
            assert table(path)[-1] == dict(a=a, status="ok")
        raise KeyboardInterrupt
    assert [row["a"] for row in table(path)] == ["1", "2"]


def test_a_file_of_rows_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.csv"
    rows.write(path, ["a"], [dict(a="1")])
    with pytest.raises(ZeroDivisionError):
        rows.write(path, ["a"], (dict(a=1 // (1 - a)) for a in range(2)))
    assert table(path) == [dict(a="1")]


def test_a_row_that_fails_or_ends_its_process_or_hangs_does_not_end_the_others(monkeypatch):
    worker = gpu.Worker()
    assert worker.row(dict, [("a", 1)]) == dict(status="ok", a=1)
    assert worker.row(os._exit, 3)["status"].startswith("error: EOFError")
    assert worker.row(int, "x")["status"].startswith("error: ValueError: invalid literal")
    monkeypatch.setattr(gpu, "SECONDS_PER_ROW", 0.1)
    assert worker.row(time.sleep, 100)["status"] == "error: TimeoutError: no answer within 0.1 s"
    assert worker.process is None


FEW = """
import sys
from benchmarks import gpu
gpu.VIDEOS, gpu.SHAPES = (8,), [gpu.SHAPES[0]._replace(loss="no_such_loss"), gpu.SHAPES[0]]
gpu.SHAPES += [gpu.SHAPES[1]._replace(backend="native")]
gpu.tk.available_backends = lambda device: dict(triton=None, native="not built")
sys.exit(gpu.main(["--results", sys.argv[1]]))
"""


def test_times_without_a_gpu(tmp_path):
    environment = os.environ | rehearsing(ROOT, tmp_path / "log") | dict(TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", FEW, tmp_path], cwd=ROOT, env=environment)
    assert done.returncode == 1
    statuses = [row["status"] for row in table(tmp_path / "operation-stand-in.csv")]
    assert statuses[0].startswith("error: AttributeError") and statuses[1:] == ["ok", "error: not built"]
    (objective,) = table(tmp_path / "objective-stand-in.csv")
    assert objective["status"] == "ok" and objective["eager_us"]
    assert "gradient_kernel" in (tmp_path / "log").read_text()


@pytest.mark.full
@pytest.mark.skipif(setup.nvcc() is None, reason="the build of the CUDA kernels needs nvcc")
def test_all_of_it_runs(tmp_path):
    folder, log = copy(tmp_path), tmp_path / "log"
    one_target = dict(TCLR_KERNELS_CUDA_ARCHS="9.0a")  # compile_cuda.py compiles for the others
    done = run(folder, PYTHON=sys.executable, **one_target, **rehearsing(folder, log))
    print(done.stdout[-20000:], done.stderr[-5000:])
    steps = table(folder / "out/steps.csv")
    assert [(row["step"], row["status"]) for row in steps] == [(name, "0") for name in budget.ON_ONE]
    assert done.returncode == 0

    operations = table(folder / "out/operation-stand-in.csv")
    wanted = [{name: str(value) for name, value in gpu.name_of(shape).items()} for shape in gpu.SHAPES]
    assert [{name: row[name] for name in wanted[0]} for row in operations] == wanted
    objectives = table(folder / "out/objective-stand-in.csv")
    assert [row["B"] for row in objectives] == [str(B) for B in gpu.VIDEOS]
    assert {(row["status"], row["commit"]) for row in operations + objectives} == {("ok", "abc1234")}

    jobs = collections.defaultdict(lambda: collections.defaultdict(set))
    for line in log.read_text().splitlines():
        step, job, variant = line.split("\t")
        jobs[step][job].add(variant)
    variants = {step: set().union(*of_jobs.values()) for step, of_jobs in jobs.items()}
    print({step: len(found) for step, found in variants.items()})
    counted = {step: budget.busiest(jobs[step][job] for job in sorted(jobs[step])) for step in (COMPILED, TESTS)}
    print(counted)
    for step in set(variants) - {TESTS}:
        assert variants[step] <= variants[COMPILED], f"{step} compiles by itself"
    for step, most in counted.items():
        assert most <= budget.STEPS[step].compilations, f"{step}: the busiest process compiles {most} variants"
