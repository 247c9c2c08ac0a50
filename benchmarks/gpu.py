"""Device times of the GPU's backends against the bars of their plans: python -m benchmarks.gpu [--results FOLDER]

Each row is checked first, then timed by events around CUDA-graph replays, the median of several. Beside the operation
stand the three dense products that materialising would take (S, and the two of the gradient), by cuBLAS, where they
fit; beside the whole objective its time when called eagerly, its launches, and the structure of TCLR's release.
"""

import argparse
import csv
import datetime
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import tclr_kernels as tk

from . import baselines


class Shape(NamedTuple):
    """Two sets of N rows: M = 2N in the Gram matrix."""

    loss: str
    N: int
    D: int
    dtype: torch.dtype
    tf32: bool = False
    backend: str = "triton"


SHAPES = [
    *(Shape("nt_xent", M // 2, 128, torch.bfloat16) for M in (512, 2048, 8192, 32768, 131072)),
    *(Shape("nt_xent", M // 2, 512, torch.bfloat16) for M in (8192, 32768)),
    Shape("nt_xent", 4096, 1024, torch.bfloat16),
    *(Shape("clip_loss", M // 2, 128, torch.bfloat16) for M in (8192, 32768)),
    *(Shape("nt_xent", 4096, 128, torch.float32, tf32) for tf32 in (False, True)),
    Shape("nt_xent", 16384, 128, torch.bfloat16),
    *(Shape("nt_xent", M // 2, 128, torch.bfloat16, backend="native") for M in (80, 512, 2048, 4096, 8192, 32768)),
    Shape("nt_xent", 4096, 512, torch.bfloat16, backend="native"),
    *(Shape("nt_xent", 1024, 128, torch.float32, tf32, "native") for tf32 in (False, True)),
    *(Shape("nt_xent", M // 2, 128, torch.bfloat16) for M in (80, 4096)),
]


def inputs(shape):
    generator = torch.Generator("cuda").manual_seed(0)
    common, *own = torch.randn(3, shape.N, shape.D, device="cuda", generator=generator)
    return [(common + x).to(shape.dtype).requires_grad_() for x in own]


def check(shape):
    """Raises unless loss and gradient of a slice of the rows agree with the reference."""
    few = [x.detach()[:1024].requires_grad_() for x in inputs(shape)]
    function = getattr(tk, shape.loss)
    found = function(*few, backend=shape.backend)
    grads = torch.autograd.grad(found, few)
    exact = [x.detach().double().requires_grad_() for x in few]
    wanted = function(*exact, backend="reference")
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)
    for g, w in zip(grads, torch.autograd.grad(wanted, exact), strict=True):
        cosine = torch.cosine_similarity(g.double().flatten(), w.flatten(), dim=0)
        assert cosine > 1 - 1e-4, f"{shape}: the gradient points elsewhere, cosine {cosine.item()}"


def microseconds(step, repeats=5):
    """The median device time of a step, captured in a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    times = []
    for _ in range(repeats):
        first.record()
        for _ in range(5):
            graph.replay()
        last.record()
        torch.cuda.synchronize()
        times.append(1000 * first.elapsed_time(last) / 5)
    return statistics.median(times)


def products(shape):
    """The three dense products of materialising, None where they do not fit."""
    M = 2 * shape.N
    if M > 65536:
        return None
    z = torch.randn(M, shape.D, device="cuda", dtype=shape.dtype)
    S, dz = z.new_empty(M, M), torch.empty_like(z)

    def step():
        torch.mm(z, z.T, out=S)
        torch.mm(S, z, out=dz)
        torch.mm(S.T, z, out=dz)

    return microseconds(step)


def row(shape):
    torch.set_float32_matmul_precision("high" if shape.tf32 else "highest")
    check(shape)
    sets = inputs(shape)
    function = getattr(tk, shape.loss)

    def both():
        torch.autograd.grad(function(*sets, backend=shape.backend), sets)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    extra = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = microseconds(lambda: function(*sets, backend=shape.backend))
    dense = products(shape)
    return dict(
        loss=shape.loss,
        backend=shape.backend,
        M=2 * shape.N,
        D=shape.D,
        dtype=str(shape.dtype)[6:] + (" tf32" if shape.tf32 else ""),
        forward_us=round(forward, 1),
        both_us=round(microseconds(both), 1),
        three_products_us="" if dense is None else round(dense, 1),
        extra_MiB=round(extra / 2**20, 1),
    )


def wall_microseconds(step, repeats=50):
    """The median time of a step as its caller sees it, its work on the device included."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def launches(step):
    """Kernels that one step starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def objective_row(B, T=4, D=128):
    """TCLR's own sizes, in the release's form."""
    shapes = (2, B, D), (2, B, T, D), (2, B, T, D)
    generator = torch.Generator("cuda").manual_seed(0)
    sets = [torch.randn(shape, device="cuda", generator=generator, requires_grad=True) for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in sets]

    def total(inputs, **settings):
        return tk.tclr(*inputs, temperature=0.1, form="release", **settings).total

    def ours():
        return torch.autograd.grad(total(sets), sets)

    def release():
        torch.autograd.grad(baselines.release(*sets, 0.1), sets)

    if B <= 256:
        wanted = torch.autograd.grad(total(exact, backend="reference"), exact)
        torch.testing.assert_close(ours(), tuple(w.float() for w in wanted), rtol=1e-3, atol=1e-5)
    ours()
    return dict(
        B=B,
        T=T,
        D=D,
        eager_us=round(wall_microseconds(ours), 1),
        graph_us=round(microseconds(ours), 1),
        launches=launches(ours),
        release_us="" if B > 256 else round(wall_microseconds(release, 5), 1),
    )


def facts():
    """What a row is worth nothing without."""
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return dict(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=triton.__version__,
        commit=commit,
        date=datetime.date.today().isoformat(),
    )


def sanitize():
    """A few small problems of every kernel, for a sanitizer to watch."""
    served = [name for name in ("triton", "native") if tk.available_backends("cuda")[name] is None]
    cases = (
        (4, 0.1, torch.float32, False),
        (77, 0.1, torch.bfloat16, False),
        (77, 0.005, torch.float32, False),
        (77, 0.1, torch.float32, True),
    )
    for N, tau, dtype, tf32 in cases:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        for function, backend in itertools.product((tk.nt_xent, tk.clip_loss), served):
            sets = [torch.randn(N, 136, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]
            function(*sets, temperature=tau, backend=backend).backward()
    sets = [
        torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((2, 9, 24), (2, 9, 4, 24), (2, 9, 4, 24))
    ]
    tk.tclr(*sets, temperature=0.1).total.backward()
    torch.cuda.synchronize()


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def show(row):
    print(" ".join(f"{value!s:>12}" for value in list(row.values())[5:]), flush=True)
    return row


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sanitize", action="store_true", help="only run small problems")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skipped: no CUDA or HIP device")
        return 0
    if options.sanitize:
        sanitize()
        return 0
    options.results.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    shapes = [shape for shape in SHAPES if tk.available_backends("cuda")[shape.backend] is None]
    write(options.results / f"objective-{name}.csv", [show(facts() | objective_row(B)) for B in (8, 40, 256, 4096)])
    write(options.results / f"operation-{name}.csv", [show(facts() | row(shape)) for shape in shapes])
    return 0


if __name__ == "__main__":
    sys.exit(main())
