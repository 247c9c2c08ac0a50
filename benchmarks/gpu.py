"""Device times, of the objective by every backend and of Triton against its plan.

    python -m benchmarks.gpu [--results FOLDER]

Each row is checked first, then timed by events around CUDA-graph replays, the median of several; beside it the three
dense products that materialising would take (S, and the two of the gradient), by cuBLAS, where they fit.
"""

import argparse
import csv
import datetime
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import tclr_kernels as tk


class Shape(NamedTuple):
    """Two sets of N rows: M = 2N in the Gram matrix."""

    loss: str
    N: int
    D: int
    dtype: torch.dtype
    tf32: bool = False


SHAPES = [
    *(Shape("nt_xent", M // 2, 128, torch.bfloat16) for M in (512, 2048, 8192, 32768, 131072)),
    *(Shape("nt_xent", M // 2, 512, torch.bfloat16) for M in (8192, 32768)),
    Shape("nt_xent", 4096, 1024, torch.bfloat16),
    *(Shape("clip_loss", M // 2, 128, torch.bfloat16) for M in (8192, 32768)),
    *(Shape("nt_xent", 4096, 128, torch.float32, tf32) for tf32 in (False, True)),
    Shape("nt_xent", 16384, 128, torch.bfloat16),
]


def inputs(shape):
    generator = torch.Generator("cuda").manual_seed(0)
    common, *own = torch.randn(3, shape.N, shape.D, device="cuda", generator=generator)
    return [(common + x).to(shape.dtype).requires_grad_() for x in own]


def check(shape, backend="triton"):
    """Raises unless loss and gradient of a slice of the rows agree with the reference."""
    few = [x.detach()[:1024].requires_grad_() for x in inputs(shape)]
    function = getattr(tk, shape.loss)
    found = function(*few, backend=backend)
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
    torch.backends.cuda.matmul.allow_tf32 = shape.tf32
    check(shape)
    sets = inputs(shape)
    function = getattr(tk, shape.loss)

    def both():
        torch.autograd.grad(function(*sets, backend="triton"), sets)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    extra = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = microseconds(lambda: function(*sets, backend="triton"))
    dense = products(shape)
    return dict(
        loss=shape.loss,
        M=2 * shape.N,
        D=shape.D,
        dtype=str(shape.dtype)[6:] + (" tf32" if shape.tf32 else ""),
        forward_us=round(forward, 1),
        both_us=round(microseconds(both), 1),
        three_products_us="" if dense is None else round(dense, 1),
        extra_MiB=round(extra / 2**20, 1),
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


def backends():
    return [name for name, reason in tk.available_backends("cuda").items() if name != "reference" and reason is None]


def objective():
    """Prints the objective at its own size, and where it is no longer bound by launches, by every backend."""
    for B in (40, 512, 4096):
        generator = torch.Generator("cuda").manual_seed(0)
        inputs = [
            torch.randn(2, B, *clips, 128, device="cuda", generator=generator, requires_grad=True)
            for clips in ((), (4,), (4,))
        ]
        for backend in backends():

            def step(backend=backend, inputs=inputs):
                total = tk.tclr(*inputs, form="release", backend=backend).total
                torch.autograd.grad(total, inputs)

            step()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(20):
                step()
            torch.cuda.synchronize()
            eager = 1e6 * (time.perf_counter() - start) / 20
            print(f"objective, B = {B}, {backend}: {eager:.1f} us eager, {microseconds(step):.1f} us in a graph")


def sanitize():
    """A few small problems of every kernel, for a sanitizer to watch."""
    for N, tau, dtype in ((4, 0.1, torch.float32), (77, 0.1, torch.bfloat16), (77, 0.005, torch.float32)):
        for function in (tk.nt_xent, tk.clip_loss):
            sets = [torch.randn(N, 24, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]
            for backend in backends():
                function(*sets, temperature=tau, backend=backend).backward()
    inputs = [torch.randn(2, 7, *clips, 24, device="cuda", requires_grad=True) for clips in ((), (3,), (3,))]
    for backend in backends():
        tk.tclr(*inputs, form="release", backend=backend).total.backward()
    torch.cuda.synchronize()


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
    objective()
    made = []
    for shape in SHAPES:
        made.append(facts() | row(shape))
        print(" ".join(f"{value!s:>12}" for value in list(made[-1].values())[5:]), flush=True)
    options.results.mkdir(parents=True, exist_ok=True)
    name = made[0]["device"].lower().replace(" ", "-")
    with open(options.results / f"triton-{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, made[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
