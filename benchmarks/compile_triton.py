"""python -m benchmarks.compile_triton: compiles all Triton kernels, with the tiles of all tables, without a GPU.

The launchers run on meta tensors, and the kernels that they would launch are compiled for sm_80, sm_90, sm_100 and
gfx942, to find registers, spills, shared memory, and instructions by class. For kernels that compute tiles of S, it
also makes a PREDICTION of a tile's time on an H200 for each unit. It writes benchmarks/results/triton-compiled.csv and
docs/triton.md; with --page, only the page, from the existing table. TRITON_INTERPRET must not be set.
"""

import argparse
import contextlib
import csv
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.rows import attempted, write, writing
from tclr_kernels.triton import large, rectangle, sets, small, wide

RESULTS = Path(__file__).parent / "results" / "triton-compiled.csv"
VERSIONS = Path(__file__).parent / "results" / "triton-versions.csv"
TRIED = Path(__file__).parent / "results" / "tiles-nvidia-h100-80gb-hbm3.csv"
PAGE = Path(__file__).parents[1] / "docs" / "triton.md"
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program may have
TABLE = {"sm_80": "ampere", "sm_89": "compact", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "amd"}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
CLASSES = {  # instruction class -> its patterns in SASS and in CDNA assembly
    "tensor": (r"\b(?:[HQ]G?MMA|UTC\w*MMA|DMMA)\b", r"v_mfma"),
    "ex2": (r"MUFU\.EX2", r"v_exp_f32"),
    "fma": (r"\bF(?:FMA|MUL|ADD)2?\b", r"v_(?:pk_)?(?:fma|mul|add|fmac)_f32"),
    "shared": (r"\b(?:LDSM?|STSM?)\b", r"ds_(?:read|write|load|store)"),
    "global": (r"\b(?:LDG|STG|LDGSTS)\b", r"(?:global|buffer)_(?:load|store)"),
}


SPILL = r"\b(?:STL|LDL)\b"


class Launch(NamedTuple):
    """A kernel with its arguments by name."""

    kernel: object
    arguments: dict
    options: dict


class Case(NamedTuple):
    """A problem whose launches are compiled."""

    G: int
    V: int
    N: int
    D: int
    dtype: torch.dtype
    tau: float = 0.1
    normalize: bool = True
    cross: bool = False
    tf32: bool = False

    def __str__(self):
        dtype = "tf32" if self.tf32 else str(self.dtype)[6:]
        kind = "cross" if self.cross else "self"
        rows = "" if self.normalize else " raw"
        return f"{self.G}x{self.V}x{self.N}x{self.D} {dtype} {kind} tau={self.tau}{rows}"

    def run(self):
        module = small if small.serves(self.V, self.N) else large
        x = [torch.empty(self.G, self.N, self.D, dtype=self.dtype, device="meta") for _ in range(self.V)]
        settings = self.tau, self.normalize, self.cross
        term, neg, pos = module.forward(x, *settings)
        module.backward(x, *settings, neg, pos, term, None, None)


class Rectangle(NamedTuple):
    """A problem of the general operation: n rows against K columns, or n rows against themselves if K is 0."""

    n: int
    K: int
    D: int
    dtype: torch.dtype
    labels: bool = False
    pairs: bool = False
    tf32: bool = False

    def __str__(self):
        dtype = "tf32" if self.tf32 else str(self.dtype)[6:]
        kind = ("pairs" if self.pairs else "labels") if self.labels else "plain"
        return f"{self.n}x{self.K or self.n}x{self.D} {dtype} {kind}" + " symmetric" * (self.K == 0)

    def run(self):
        symmetric, K = self.K == 0, self.K or self.n
        columns, rows = ([torch.empty(1, size, self.D, dtype=self.dtype, device="meta")] for size in (K, self.n))
        keys = [torch.empty(1, size, dtype=torch.int64, device="meta") for size in (self.n, K)] if self.labels else []
        settings = [] if symmetric else rows, columns, 0.1, True, False, 0 if symmetric else -1, *(keys or [None] * 2)
        neg, *_ = rectangle.forward(*settings, not (symmetric or self.labels))
        if self.pairs:
            rectangle.pairs(*settings, neg)
        of_rows = [neg] * (2 if self.pairs else 7 if self.labels else 3)
        rectangle.backward(*settings, of_rows, [], True, not symmetric)


CASES = [
    *(Case(1, 2, 65536, D, torch.bfloat16) for D in (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)),
    *(Case(1, 2, 65536, D, torch.float32) for D in (16, 32, 64, 128, 192, 256, 384, 512, 1024)),
    Case(1, 2, 65536, 128, torch.float64),
    *(Case(1, 2, 65536, D, torch.bfloat16, tau=0.005) for D in (64, 128, 192, 256, 384, 512, 1024)),
    Case(1, 2, 65536, 128, torch.bfloat16, normalize=False),
    *(Case(1, 2, 65536, D, torch.float32, tau=0.005) for D in (128, 384)),
    *(Case(1, 2, 65536, D, torch.float32, tf32=True) for D in (16, 32, 64, 128, 192, 256, 384, 512, 1024)),
    *(Case(1, 2, 65536, D, torch.float32, tau=0.005, tf32=True) for D in (64, 128, 192, 256, 384, 512, 1024)),
    Case(1, 2, 65536, 128, torch.float64, tau=0.002),
    Case(1, 2, 65536, 128, torch.bfloat16, cross=True),
    # so few rows that the columns are split
    *(Case(1, 2, 2048, D, torch.bfloat16) for D in (64, 128, 256, 384, 512, 1024)),
    *(Case(1, 2, 2048, D, torch.float32, tf32=tf32) for D in (128, 384, 512) for tf32 in (True, False)),
    Case(1, 2, 512, 1024, torch.bfloat16),
    *(Case(1, 2, 512, 1024, torch.float32, tf32=tf32) for tf32 in (True, False)),
    Case(1, 2, 2048, 128, torch.bfloat16, tau=0.005),
    Case(1, 2, 2048, 128, torch.bfloat16, cross=True),
    *(Case(40, 2, 4, 128, dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)),
    Case(40, 4, 4, 128, torch.float32, cross=True),
]
RECTANGLES = [
    *(Rectangle(1024, 65536, D, torch.bfloat16) for D in (64, 128, 192, 256, 384, 512, 1024)),
    *(Rectangle(1024, 65536, D, torch.float32, tf32=tf32) for D in (32, 128, 384, 512) for tf32 in (True, False)),
    *(Rectangle(65536, 0, D, torch.bfloat16, labels=True) for D in (64, 128, 192, 256, 384, 512, 1024)),
    *(Rectangle(65536, 0, D, torch.float32, labels=True) for D in (32, 128, 384, 512)),
    *(Rectangle(65536, 0, D, torch.float32, labels=True, tf32=True) for D in (32, 128)),
    Rectangle(1024, 65536, 128, torch.bfloat16, labels=True),
    Rectangle(1024, 65536, 128, torch.bfloat16, labels=True, pairs=True),
    Rectangle(1024, 65536, 128, torch.float64, labels=True),
    Rectangle(1, 16, 128, torch.bfloat16),
]
# those whose gradients of half precision and TF32 have at most 256 features, one for each entry of a table
GRADIENTS = [
    *(Case(1, 2, 65536, D, torch.bfloat16, tau=tau) for D in (64, 128, 192, 256) for tau in (0.1, 0.005)),
    *(Case(1, 2, 2048, D, torch.bfloat16) for D in (128, 256)),
    *(Case(1, 2, 65536, D, torch.float32, tau=tau, tf32=True) for D in (192, 256) for tau in (0.1, 0.005)),
    *(Case(1, 2, 65536, D, torch.float32, normalize=False, tf32=True) for D in (64, 128)),
    *(Rectangle(65536, 0, D, torch.bfloat16, labels=labels) for D in (64, 128, 256) for labels in (True, False)),
]
SELECTED = [case for case in CASES if case.dtype == torch.bfloat16 and case.D in (128, 384, 512)]
SELECTED += [case for case in CASES if str(case) == "1x2x65536x128 float32 self tau=0.1"]


def recorded(case, table):
    """The launches of a forward and a backward with an upstream gradient of term."""
    made = []

    def record(kernel, programs, *arguments, **settings):
        names = kernel.arg_names
        constants = {name: value for name, value in settings.items() if name in names}
        options = {name: value for name, value in settings.items() if name not in names}
        positional = dict(zip([n for n in names if n not in constants], arguments, strict=True))
        alike = made and made[-1].kernel is kernel and constants.items() <= made[-1].arguments.items()
        if not alike:  # the chunks of one product are compiled once
            made.append(Launch(kernel, positional | constants, options))

    modules = small, large, wide, rectangle
    before = [module.launch for module in modules], large.table_of, large.tf32_allowed
    for module in modules:
        module.launch = record
    large.table_of, large.tf32_allowed = lambda x: (table, 132), lambda: case.tf32
    try:
        case.run()
    finally:
        for module, own in zip(modules, before[0], strict=True):
            module.launch = own
        large.table_of, large.tf32_allowed = before[1:]
    return made


def source(launch):
    """The source of a launch as the just-in-time compiler sees it: types, constants, and divisibility by 16."""
    signature, constants, attributes = {}, {}, {}
    for k, (name, parameter) in enumerate(zip(launch.kernel.arg_names, launch.kernel.params, strict=True)):
        value, specialised = launch.arguments[name], not parameter.do_not_specialize
        if parameter.is_constexpr or (type(value) is int and value == 1 and specialised):
            signature[name], constants[(k,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = parameter.annotation_type or ("i32" if abs(value) < 2**31 else "i64")
        if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and specialised):
            attributes[(k,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled(launch, target):
    """The properties of the compiled kernel, by column of the table."""
    kernel = triton.compile(source(launch), target=target, options=launch.options | sets.COMPILER_OPTIONS)
    facts = cuda_facts(kernel) if target.backend == "cuda" else hip_facts(kernel)
    return dict(shared=kernel.metadata.shared, ahead=copies_ahead(kernel.asm["ttgir"]), **facts)


def copies_ahead(text):
    """How many groups of copies are still pending in a loop after the wait for the oldest; "" if there are no copies.

    text: the kernel in Triton's GPU dialect. A wait without an argument comes after the loop.
    """
    waits = [int(count) for count in re.findall(r"ttg.async_wait %[^{]*\{num = (\d+)", text)]
    return min(waits, default="")


def cuda_facts(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(NVIDIA / "cuobjdump", "-res-usage", file.name)
        sass = _run(NVIDIA / "cuobjdump", "-sass", file.name)
    facts = dict(registers=int(re.search(r"REG:(\d+)", usage)[1]), spills=len(re.findall(SPILL, sass)))
    facts |= dict(spills_in_loops=spills_in_loops(sass))
    return facts | {f"{name}_instructions": len(re.findall(pattern, sass)) for name, (pattern, _) in CLASSES.items()}


def spills_in_loops(sass):
    """The number of spills in the innermost loops with matrix products, which take nearly all the time of a kernel."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*)", sass)]
    jumps = [(at, re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text)) for at, text in lines]
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    inside = {loop: [text for at, text in lines if loop[0] <= at <= loop[1]] for loop in loops}
    busy = [loop for loop in loops if any(re.search(CLASSES["tensor"][0], text) for text in inside[loop])]
    innermost = [x for x in busy if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in busy)]
    return sum(bool(re.search(SPILL, text)) for loop in innermost for text in inside[loop])


def hip_facts(kernel):
    text = kernel.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    counts = {f"{name}_instructions": len(re.findall(pattern, text)) for name, (_, pattern) in CLASSES.items()}
    return dict(registers=registers, spills=spills, spills_in_loops="") | counts


def _run(*command):
    return subprocess.run([str(x) for x in command], check=True, capture_output=True, text=True).stdout


# rates of one multiprocessor of an H200, in a clock: products by dtype (as measured on random data), exp2, float32
# operations, bytes (L2: 9.8 TB/s at 1.98 GHz, from github.com/te42kyfo/gpu-benches, gpu-l2-cache/h200.txt)
FLOPS = 790e12  # of the whole device
RATES = dict(half=1705.0, tf32=850.0, pairs=1705 / 3, float=128.0, double=64.0)
RATES |= dict(ex2=16.0, fma=128.0, shared=128.0, l2=37.5)
REGISTERS = 65536  # of a multiprocessor
MAKERS = "sums_kernel", "unbounded_sums_kernel", "gradient_kernel"  # the kernels that compute tiles of S
PIPES = ("tensor", "ex2", "fma", "shared", "l2")


def predicted(launch, facts):
    """A PREDICTION for a tile: clocks by unit, the busiest unit, and the share of the products' time in the whole.

    facts: those of the compiled kernel. Its registers and shared memory give the number of programs on a
    multiprocessor.
    """
    a, name = launch.arguments, launch.kernel.__name__
    if name not in MAKERS:
        return {}
    gradient, bounded = "DC" in a, a.get("BOUNDED", name == "sums_kernel")
    area, warps, pairs = a["BM"] * a["BN"], launch.options["num_warps"], a["PRECISION"] == "pairs"
    size = a["z"].element_size()
    kind = a["PRECISION"] if a["PRECISION"] in RATES else {2: "half", 4: "float", 8: "double"}[size]
    products = 3 if pairs else 1
    chunks = a["DP"] // a["DC"] if gradient else 1
    exponentials = (2 if gradient and not bounded else 1) * chunks
    operations = {(False, True): 3, (False, False): 5, (True, True): 3, (True, False): 7}[gradient, bounded]
    rows, columns = a["BM"] * a["DP"] * size, a["BN"] * a["DP"] * size
    # parts: features are read in parts; again: columns are read again for dz
    parts, again = a["BK"] < a["DP"], chunks > 1 or a["BK"] < a["DP"]
    moving = rows if name == "sums_kernel" else columns
    fetched = chunks * (rows + columns if parts else moving) + (columns if gradient and again else 0)
    # every 64 rows of a tile read all of its columns; every group of 4 warps with some of the columns reads all rows
    down = a["BM"] // 64 or 1
    across = warps // 4 // down or 1
    shared = products * chunks * (rows * across + columns * down) / (2 if pairs else 1) + fetched
    if gradient:
        shared += products * columns * down / (2 if pairs else 1)
        if kind == "tf32":
            shared += columns * (not again)  # a transposed copy
        # W is moved to the threads that multiply it, by shuffles in TF32, and through memory to other groups of warps
        shared += chunks * area * size * (1 + across if across > 1 else kind == "tf32")
    clocks = {
        "tensor": area * a["DP"] * (chunks + gradient) / RATES[kind],
        "ex2": area * exponentials / RATES["ex2"],
        "fma": area * operations * chunks / RATES["fma"],
        "shared": shared / RATES["shared"],
        "l2": fetched / RATES["l2"],
    }
    limit = max(clocks, key=clocks.get)
    # a program alone: reads of shared memory overlap with products; all else is serial, and so are reads without stages
    ahead = launch.options.get("num_stages", 1) > 1 and (parts or not gradient or kind != "tf32")
    waits = a["BK"] / a["DP"] * parts if ahead else 1
    alone = max(clocks["tensor"], clocks["shared"]) + clocks["ex2"] + clocks["fma"] + clocks["l2"] * waits
    registers = 32 * warps * -(-facts["registers"] // 8) * 8
    # the system uses 1 KiB of shared memory for each program
    programs = min(REGISTERS // registers, (SHARED["sm_90"] + 1) * 1024 // (facts["shared"] + 1024))
    once = 0.5 if name == "unbounded_sums_kernel" else 1  # this kernel computes each entry of S twice
    useful = area * a["DP"] * (once + gradient) / RATES[kind]
    return {f"predicted_{name}": round(value) for name, value in clocks.items()} | dict(
        predicted_limit=limit,
        predicted_programs=programs,
        predicted_floor_share=round(useful / max(clocks[limit], alone / programs), 2),
        predicted_serial_share=round(useful / sum(clocks.values()), 2),
    )


def rows(cases, targets, only=""):
    """A row for each case, kernel and target. A kernel that was already compiled for another case is left out.

    only: leave out kernels whose name does not contain this
    """
    seen = set()
    for target in targets:
        for case in cases:
            for launch in recorded(case, TABLE[target]):
                if only not in launch.kernel.__name__:
                    continue
                key = target, source(launch).hash(), tuple(launch.options.items())
                if key in seen:
                    continue
                seen.add(key)
                tile = {k: launch.arguments[k] for k in ("BM", "BN", "DP", "BK", "DC") if k in launch.arguments}
                tile |= dict(warps=launch.options["num_warps"], stages=launch.options.get("num_stages", ""))
                facts = attempted(compiled, launch, TARGETS[target])
                foreseen = target == "sm_90" and facts["status"] == "ok"
                prediction = predicted(launch, facts) if foreseen else {}
                yield dict(target=target, case=str(case), kernel=launch.kernel.__name__, **tile) | facts | prediction


# The most accesses to spilled registers within loops over tiles on sm_90, by kernel, dtype and features, with Triton
# 3.6 to 3.9. The loops have 500 instructions and more.
IN_LOOPS = {
    ("gradient_kernel", "half", 128): 5,  # with Triton 3.9 only, at low temperatures
    ("gradient_kernel", "half", 512): 2,
    ("gradient_kernel", "pairs", 192): 3,
    ("gradient_kernel", "tf32", 192): 6,
    ("gradient_kernel", "tf32", 256): 1,
    ("gradient_kernel", "tf32", 512): 39,  # with Triton 3.9 only, for few rows
    ("gradient_kernel", "tf32", 1024): 7,
    ("rectangle_gradient_kernel", "half", 256): 1,
    ("rectangle_gradient_kernel", "half", 512): 2,
}
# Kernels for these dtypes may spill before and after their loops, since their tiles were chosen by their times.
MEASURED = "half", "tf32", "pairs"
ELSEWHERE = 8  # the most spills of other kernels; for those without products, ptxas chooses 64, 80, 96 or 168 registers


def kind_of(row):
    """The dtype of the packed rows that a row of the table is about."""
    _, dtype, *others = row["case"].split()
    kind = dict(bfloat16="half", tf32="tf32", float64="double").get(dtype, "pairs")
    return "pairs" if kind == "tf32" and (row.get("DP") or 0) <= 128 and "raw" not in others else kind


def spills_too_much(row):
    kind = kind_of(row)
    if row["spills_in_loops"] > IN_LOOPS.get((row["kernel"], kind, row.get("DP")), 0):
        return True
    return row["spills"] > ELSEWHERE and not (row.get("DP") and kind in MEASURED)


def too_large(row):
    """Why a row is an error: it did not compile, needs too much shared memory, or spills too much. None if it is ok."""
    target = row["target"]
    if row["status"] != "ok":
        return f"{row['status']}, on {target}"
    if row["shared"] > SHARED[target] * 1024:
        return f"{row['shared']} bytes of shared memory on {target}, which has {SHARED[target]} KiB"
    if target == "sm_90" and spills_too_much(row):
        return f"{row['spills']} spills on {target}, {row['spills_in_loops']} of them in a loop"
    return None


COLUMNS = [
    *(
        "target",
        "case",
        "kernel",
        "BM",
        "BN",
        "DP",
        "BK",
        "DC",
        "warps",
        "stages",
        "status",
        "registers",
        "spills",
        "spills_in_loops",
        "shared",
        "ahead",
    ),
    *(f"{name}_instructions" for name in CLASSES),
    *(f"predicted_{name}" for name in (*PIPES, "limit", "programs", "floor_share", "serial_share")),
]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


HEAD = """\
# The Triton kernels, compiled ahead of time

This page is written by `python -m benchmarks.compile_triton` from `benchmarks/results/triton-compiled.csv`; the
measured times are rows of `benchmarks/gpu.py`. Registers, spills, shared memory and instructions are reported by the
compiler. Clocks and ranges are **predictions** of a simple model. If a measured time is outside of its range, the model
is wrong.

The floor of a loss is the time of its matrix products alone, at the rate that cuBLAS reaches on random data: half a
product in the forward, since S is symmetric, and two in the backward. These kernels will not reach it. For float32
without TF32, each number is the sum of two float16, and each product is computed as three products of float16; the
product of the two lower halves is left out.

The range follows from the clocks that each unit of a multiprocessor needs for a tile. An H200 has 132 multiprocessors.
In a clock, each of them computes 1,705 multiply-adds of matrix products (half of that in TF32), 16 exp2 and 128 float32
operations, and reads 128 bytes of shared memory and 37.5 bytes of L2 (9.8 TB/s, from
[gpu-benches](https://github.com/te42kyfo/gpu-benches/blob/master/gpu-l2-cache/h200.txt)). For shared memory, the model
assumes Triton's layout of products: the columns of a tile are read once for every 64 of its rows, and the rows once for
each of the groups of four warps that divide the columns among them. The two ends of the range come from two
assumptions:

- *overlapped*: a tile takes as long as its busiest unit. If there are too few thread blocks to hide latencies, it takes
  longer: the time of a thread block that runs alone, divided by the number of thread blocks on a multiprocessor;
- *serial*: nothing overlaps, and a tile takes the sum of the clocks of all units.

Neither includes latencies, bank conflicts, barriers, the issue of other instructions (such as the shuffles of the
sums), or multiprocessors that are idle in the last wave of thread blocks. So a measured time may even be above the slow
end of the range.

For half precision, TF32 and float32 as pairs, the tiles of `tclr_kernels/triton/tiles.py` for Hopper were chosen by
time. [Those that were tried](../benchmarks/results/tiles-nvidia-h100-80gb-hbm3.csv) were measured on an H100 with
Triton 3.6, as the losses of `benchmarks/gpu.py` with other tiles. A time is that of the forward or of the backward
alone.

## Spilled registers

A program keeps a whole row of the gradient, so its registers often do not suffice. Many tiles for Hopper spill some of
them before and after their loop over the columns, which happens once in a program and costs little. Tiles without
spills were slower: the gradient of float32 as pairs with 192 features and 8,192 rows takes 279 us with a tile of
128x64, which spills, and 1,786 us with one of 64x32 that reads 32 features at a time and does not spill. Both have
eight warps, which share 64 rows badly.

Spills are counted as instructions that access spilled registers. Those in a loop would cost time in every step. The
most that the tests allow there on sm_90, with Triton 3.6, 3.7.1, 3.8 and 3.9 (`IN_LOOPS` in
`benchmarks/compile_triton.py`):

{limits}

## Features that are not a power of two

A tensor in Triton has a power of two of entries. The sums read rows in parts of 64 features, so they pad D to a
multiple of 64. A program of the gradient keeps that of all features of its rows in registers. On Hopper and Blackwell,
for 129 to 384 features, it keeps it in several tensors of 128 or 64 features, so that D is padded to a multiple of 64
here, too, and S is still computed once:

| D | padded to | products of the gradient | with D padded to a power of two |
| ---: | ---: | ---: | ---: |
| 130 to 192 | 192 | 384 M^2 | 512 M^2 |
| 300 | 320 | 640 M^2 | 1,024 M^2 |
| 384 | 384 | 768 M^2 | 1,024 M^2 |

For 385 to 511 features, several tensors would spill in the loop, so D is padded to 512. On devices whose products take
both factors from registers (Ampere and Ada), D is padded to a power of two. Where a program computes fewer features
than a row has, D is padded to a multiple of these: on Blackwell, 256 of half precision above 256 features, and 128 of
TF32 above 128; on Hopper, 256 of float32 as pairs above 256, in the gradient of rectangles.
"""

COLUMNS_OF_KERNELS = """\
Clocks are those that a unit needs for one tile. *limit* is the busiest unit, and *programs* is the number of thread
blocks that a multiprocessor can hold. *share* is the time of the matrix products divided by the predicted time.
"""


PREDICTED = {"bfloat16": "half", "tf32": "tf32", "float32": "pairs"}  # dtypes on the page -> keys of RATES


def markdown(titles, lines):
    ruled = [titles, [":---" if k == 0 else "---:" for k in range(len(titles))], *lines]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in ruled)


def in_all(made, dtype, D, assumption):
    """The predicted share of NT-Xent's floor in its time: D M^2 flop forward, 4 D M^2 backward. assumption: a column"""
    made = [row for row in made if row["target"] == "sm_90" and row["case"] == f"1x2x65536x{D} {dtype} self tau=0.1"]
    share = {row["kernel"]: float(row[assumption]) for row in made if row[assumption]}
    if "gradient_kernel" not in share:  # the gradient is computed by the vendor's library instead
        return None
    return 5 / (1 / share["sums_kernel"] + 4 / share["gradient_kernel"])


def page(made):
    """The text of docs/triton.md, from the rows of the table."""
    lines = []
    for row in made:
        if row["target"] == "sm_90" and row["predicted_limit"] and row["case"].split()[1] in PREDICTED:
            tile = f"{row['BM']}x{row['BN']}, {row['BK']} of {row['DP']} features" + (
                f", {row['DC']} of the gradient" if row["DC"] else ""
            )
            facts = row["warps"], row["registers"], row["spills"], int(row["shared"]) // 1024
            shown = *PIPES, "limit", "programs", "floor_share", "serial_share"
            prediction = [row[f"predicted_{name}"] for name in shown]
            lines.append([row["case"], row["kernel"], tile, *facts, *prediction])
    titles = ["G x V x N x D", "kernel", "tile", "warps", "registers", "spills", "shared, KiB"]
    titles += [*(f"{name}, clocks" for name in PIPES), "limit", "programs", "share, overlapped", "share, serial"]
    kernels = markdown(titles, lines)

    lines = []
    for (dtype, kind), D in itertools.product(PREDICTED.items(), (128, 192, 256, 384, 512, 1024)):
        shares = [in_all(made, dtype, D, f"predicted_{name}_share") for name in ("floor", "serial")]
        for M in (8192, 32768, 131072) if all(shares) else ():
            floor = floor_of(M, D, kind)
            lines.append([dtype, f"{M:,}", D, f"{floor:.3g}", " to ".join(f"{floor / share:.3g}" for share in shares)])
    titles = ["dtype", "rows M", "D", "floor, 5 D M^2, ms", "predicted range, ms"]
    totals = markdown(titles, lines)

    lines = []
    for target in TARGETS:
        own = [row for row in made if row["target"] == target]
        if own:
            most = {name: max(int(row[name]) for row in own) for name in ("registers", "spills", "shared")}
            spilling = sum(row["spills"] != "0" for row in own)
            lines.append([target, len(own), spilling, *most.values(), SHARED[target] * 1024])
    titles = ["target", "variants", "that spill", "most registers", "most spills", "most shared", "shared, limit"]
    targets = markdown(titles, lines)
    parts = [
        HEAD.replace("{limits}", limits()),
        "## NT-Xent, forward and backward, on an H200: predictions\n",
        totals,
        "\nThese times do not include the kernels that pack rows, finish the sums and compute coefficients.\n",
        "## What was measured\n",
        measured(),
        "\nThese times include all kernels of a call, which were captured in a CUDA graph.\n",
        "## The kernels that compute tiles of S, on sm_90\n",
        COLUMNS_OF_KERNELS,
        kernels,
        "\n## All kernels of all cases\n",
        targets,
        "\n## A selection of cases on sm_90, compiled by several versions of Triton\n",
        "All versions use the same tiles.\n",
        versions_page(read(VERSIONS)),
    ]
    return "\n".join(parts) + "\n"


def limits():
    """IN_LOOPS as a table."""
    words = dict(half="half precision", pairs="float32 as pairs", tf32="TF32")
    lines = [[kernel, words[kind], D, most] for (kernel, kind, D), most in sorted(IN_LOOPS.items())]
    return markdown(["kernel", "rows", "features, padded", "at most"], lines)


def floor_of(M, D, kind):
    """The time of NT-Xent's matrix products in milliseconds."""
    return 5 * D * M * M / FLOPS * RATES["half"] / RATES[kind] * 1000


def measured():
    """A table of NT-Xent's measured times on GPUs, with their floor."""
    lines = []
    for path in sorted(RESULTS.parent.glob("operation-*.csv")):
        for row in read(path):
            if (row["loss"], row["backend"], row["status"]) != ("nt_xent", "triton", "ok"):
                continue
            M, D, forward, both = int(row["M"]), int(row["D"]), float(row["forward_us"]), float(row["both_us"])
            dtype = row["dtype"].removeprefix("float32 ")
            floor = floor_of(M, D, PREDICTED[dtype])
            facts = row["device"], row["triton"], row["commit"], dtype, f"{M:,}", D
            times = floor, forward / 1000, both / 1000
            lines.append([*facts, *(f"{x:.3g}" for x in times), f"{1000 * floor / both:.2f}"])
    titles = ["device", "Triton", "commit", "dtype", "rows M", "D", "floor, ms", "forward, ms", "both, ms"]
    return markdown([*titles, "floor / both"], lines)


def versions_page(made):
    """A table of the versions of Triton, from the rows that --version has written."""
    lines = []
    for version in sorted({row["triton"] for row in made}):
        own = [row for row in made if row["triton"] == version]
        spilling = [int(row["spills"]) for row in own if row["spills"] != "0"]
        in_loops = max((int(row.get("spills_in_loops") or 0) for row in own), default=0)
        lines.append([version, len(own), len(spilling), max(spilling, default=0), in_loops])
    return markdown(["Triton", "variants", "that spill", "most spills", "most spills in loops"], lines)


def add_version():
    """Compiles a selection of cases on sm_90 with the installed Triton, and replaces its rows in the table."""
    others = [row for row in read(VERSIONS) if row["triton"] != triton.__version__] if VERSIONS.exists() else []
    made = [dict(row, triton=triton.__version__) for row in rows(SELECTED, ["sm_90"])]
    tile = "BM", "BN", "DP", "BK", "DC", "warps", "stages"
    columns = "triton", "case", "kernel", *tile, "registers", "spills", "spills_in_loops", "ahead"
    write(VERSIONS, columns, sorted(others + made, key=lambda row: row["triton"]))
    PAGE.write_text(page(read(RESULTS)))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="default: all; their rows of the table are written anew"
    )
    parser.add_argument("--only", default="", help="cases whose text contains this, and no table")
    parser.add_argument("--page", action="store_true", help="only write the page, from the table as it is")
    parser.add_argument("--version", action="store_true", help="only count the spills of the Triton that is installed")
    options = parser.parse_args(arguments)
    if options.page:
        PAGE.write_text(page(read(RESULTS)))
        return 0
    if sets.INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: nothing would be compiled")
    if options.version:
        add_version()
        return 0
    cases = [case for case in CASES + RECTANGLES if options.only in str(case)]
    targets = options.target or list(TARGETS)
    made, whole = [], cases == CASES + RECTANGLES
    others = [row for row in read(RESULTS) if row["target"] not in targets] if whole and RESULTS.exists() else []
    with writing(RESULTS, COLUMNS) if whole else contextlib.nullcontext(lambda row: None) as add:
        for row in others:
            add(row)
        for row in rows(cases, targets):
            add(row)
            made.append(row)
            print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    wrong = [row for row in made if too_large(row)]
    for row in wrong:
        print(f"{too_large(row)}: {row['kernel']}, {row['case']}", file=sys.stderr)
    if whole:
        write(RESULTS, COLUMNS, sorted(others + made, key=lambda row: list(TARGETS).index(row["target"])))
    if whole and all(row["status"] == "ok" for row in made):  # the page needs them all
        PAGE.write_text(page(read(RESULTS)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
