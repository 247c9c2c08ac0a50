"""The CUDA kernels compiled with nvcc, without a GPU: python -m benchmarks.compile_cuda

For sm_80, sm_90a and sm_100: registers, spills, instructions by class. Writes benchmarks/results/cuda-compiled.csv; a
warning or a spill is an error. Shared memory is asked for at the launch: `shared` in csrc/cuda/.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import setup
from benchmarks.compile_triton import CLASSES, NVIDIA

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "cuda-compiled.csv"
TARGETS = "80", "90a", "100"
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
    """Of every kernel, its instructions by class."""
    text = subprocess.run([NVIDIA / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True).stdout
    functions = re.split(r"Function : (\S+)", text)[1:]
    return {
        name: {f"{kind}_instructions": len(re.findall(pattern, sass)) for kind, (pattern, _) in CLASSES.items()}
        for name, sass in zip(functions[::2], functions[1::2], strict=True)
    }


def rows(target):
    """One row a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        flags = [*setup.NVCC_FLAGS, f"-arch=sm_{target}", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
        command = [setup.nvcc(), *flags, ROOT / "csrc/cuda/kernels.cu", "-o", cubin]
        log = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if log.returncode != 0:
            raise SystemExit(log.stderr)
        counts = instructions(cubin)
    found = USED.findall(log.stderr.replace("\n", " "))
    names = demangled([name for name, *_ in found])
    for name, stores, loads, registers in sorted(found, key=lambda f: names[f[0]]):
        facts = dict(
            target=f"sm_{target}", kernel=names[name], registers=int(registers), spills=int(stores) + int(loads)
        )
        yield facts | counts[name]


def main(arguments=None):
    how = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=how).parse_args(arguments)
    if setup.nvcc() is None:
        raise SystemExit("error: nvcc is neither in CUDA_HOME/bin nor in PATH")
    made = [row for target in TARGETS for row in rows(target)]
    for row in made:
        print(" ".join(f"{k}={v}" for k, v in row.items()))
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, made[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
    spilling = [row for row in made if row["spills"]]
    for row in spilling:
        print(f"{row['kernel']} spills on {row['target']}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
