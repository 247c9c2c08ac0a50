"""The CUDA kernels compiled with nvcc, without a GPU: python -m benchmarks.compile_cuda

It counts the registers, spills, instructions by class, barriers, and divisions of 64-bit integers for sm_80, sm_90a and
sm_100, and writes benchmarks/results/cuda-compiled.csv. A warning, more spills than in SPILLS, and warpgroup products
that ptxas serialises are errors. Shared memory is not counted, since its size is an argument of the launch.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setup
from benchmarks.compile_triton import CLASSES, NVIDIA
from benchmarks.rows import reason, writing

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cuda-compiled.csv"
TARGETS = "80", "90a", "100"
# Bytes that a kernel may spill; 0 for all others. The objective's sums spill on sm_80 and sm_100 only.
SPILLS = {"hopper::sum_blocks<3>": 16, "sum_all_tiles<float>": 40}
COUNTED = {f"{name}_instructions": pattern for name, (pattern, _) in CLASSES.items()} | {
    "all_instructions": r"^\s+/\*[0-9a-f]{4,}\*/",
    "double_instructions": r"\bD(?:FMA|MUL|ADD|SETP|MNMX)\b",
    "barriers": r"\bBAR\.",
    "long_divisions": r"\bCALL\b.*_(?:div|rem)_[su]64",
}
COLUMNS = "target", "kernel", "status", "registers", "spills", *COUNTED
USED = re.compile(
    r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r".*?Used (\d+) registers"
)


def demangled(names):
    """`make_gradient<OnTensorCores<Half> >` and the like."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = (re.sub(r"^void |tclr::|\(anonymous namespace\)::", "", line) for line in text.splitlines())
    return dict(zip(names, (line.split("(")[0].replace("> >", ">>") for line in plain), strict=True))


def instructions(cubin):
    """The number of instructions of each kind, for every kernel."""
    text = subprocess.run([NVIDIA / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"\.section\s+\.text\.(\w+)", text)[1:]
    return {
        name: {count: len(re.findall(pattern, sass, re.MULTILINE)) for count, pattern in COUNTED.items()}
        for name, sass in zip(functions[::2], functions[1::2], strict=True)
    }


def rows(target):
    """A row for each kernel. Some kernels, which read and write rows, are in both sources and are listed once."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda source: compile(target, source, Path(folder)), setup.CUDA_SOURCES))
    found = {name: facts for of_source in compiled for name, facts in of_source.items()}
    if target != "90a":  # on other targets, Hopper's kernels are empty
        found = {name: facts for name, facts in found.items() if not name.startswith("hopper::")}
    yield from (dict(target=f"sm_{target}", kernel=name) | found[name] for name in sorted(found))


def compile(target, source, folder):
    """For every kernel of a source: its registers, its spills, and its instructions by kind."""
    cubin = folder / f"{source.stem}.cubin"
    flags = [*setup.NVCC_FLAGS, f"-arch=sm_{target}", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
    command = [setup.nvcc(), *flags, source, "-o", cubin]
    log = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if log.returncode != 0:
        print(log.stderr, file=sys.stderr)
        raise RuntimeError(f"nvcc ended with status {log.returncode}")
    if waiting := serialized(log.stderr):
        raise RuntimeError(waiting[0])
    counts = instructions(cubin)
    found = USED.findall(log.stderr.replace("\n", " "))
    names = demangled([name for name, *_ in found])
    return {
        names[name]: dict(registers=int(registers), spills=int(stores) + int(loads)) | counts[name]
        for name, stores, loads, registers in found
    }


def serialized(log):
    """The messages of ptxas about warpgroup products that it serialises, which -Werror does not count as warnings."""
    return re.findall(r".*(?:wgmma.*serialized|warpgroup\.wait is injected).*", log)


def tried(target):
    """The rows of a target, or one row with the error."""
    try:
        yield from (dict(row, status="ok") for row in rows(target))
    except Exception as error:
        yield dict(target=f"sm_{target}", status=reason(error))


def main(arguments=None):
    how = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=how).parse_args(arguments)
    if setup.nvcc() is None:
        raise SystemExit("error: nvcc is neither in CUDA_HOME/bin nor in PATH")
    wrong = []
    with writing(RESULTS, COLUMNS) as add:
        for target in TARGETS:
            for row in tried(target):
                add(row)
                print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
                if row["status"] != "ok" or row["spills"] > SPILLS.get(row["kernel"], 0):
                    wrong.append(row)
    for row in wrong:
        fault = f"{row['kernel']} spills" if row["status"] == "ok" else row["status"]
        print(f"{fault} on {row['target']}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
