"""Device times of the GPU backends: python -m benchmarks.gpu [--results FOLDER]

Every row is written as soon as it is measured. If a row fails, its column `status` has the error, and the next one is
measured.

Each result is checked before it is timed. Device times are medians of replays of a CUDA graph, by events. The rows of
the operation also have the time of an eager call by the host's clock, and the time that cuBLAS takes for the three
matrix products of the usual form (S, and two in the gradient), if these fit the memory. The rows of the whole objective
also have the number of launches, and the time of TCLR's official code.
"""

import argparse
import concurrent.futures
import datetime
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import tclr_kernels as tk

from . import baselines, rows


class Shape(NamedTuple):
    """Two sets of N rows: M = 2N in the Gram matrix. K: the negatives of a queue, for losses that take them"""

    loss: str
    N: int
    D: int
    dtype: torch.dtype
    tf32: bool = False
    backend: str = "triton"
    K: int = 0


HALF, BOTH = torch.bfloat16, ("triton", "native")
SHAPES = [
    shape._replace(backend=backend)
    for backends, shapes in (
        (BOTH, [Shape("nt_xent", M // 2, 128, HALF) for M in (80, 512, 2048, 8192, 32768, 131072)]),
        (BOTH, [Shape("nt_xent", M // 2, D, HALF) for D in (64, 256) for M in (8192, 32768)]),
        (BOTH, [Shape("nt_xent", 1024, 512, HALF), Shape("nt_xent", 4096, 512, HALF)]),
        (("triton",), [Shape("nt_xent", 16384, 512, HALF), Shape("nt_xent", 4096, 1024, HALF)]),
        (("triton",), [Shape("nt_xent", 4096, 192, HALF), Shape("nt_xent", 4096, 384, HALF)]),  # not powers of two
        (BOTH, [Shape("clip_loss", M // 2, 128, HALF) for M in (8192, 32768)]),
        (BOTH, [Shape("nt_xent", M // 2, 128, torch.float32) for M in (80, 2048, 8192)]),
        (("triton",), [Shape("clip_loss", 4096, 512, HALF), Shape("nt_xent", 4096, 128, torch.float32, tf32=True)]),
        (("triton",), [Shape("nt_xent", 4096, D, torch.float32, tf32) for D in (256, 512) for tf32 in (False, True)]),
        # the operation of general.py: a queue with and without labels, and sup_con, with all pairs of a class positive
        (BOTH, [Shape("info_nce", 4096, 128, HALF, K=65536), Shape("sup_con", 4096, 128, HALF)]),
        (("triton",), [Shape("labelled", 4096, 128, HALF, K=16384), Shape("sup_con", 4096, 128, torch.float32)]),
    )
    for shape in shapes
    for backend in backends
]
COMPILED = [("nt_xent", 8192), ("nt_xent", 32768)]  # (loss, M) with D = 128 that are also timed by torch.compile
PLAIN = {"nt_xent": baselines.nt_xent, "clip_loss": baselines.clip}  # in PyTorch, the fastest form found
CLASSES = 32  # of the losses that have labels


VIDEOS = 8, 40, 256, 4096  # of the whole objective
PLACE = "device", "torch", "triton", "commit", "date"
OPERATION = *PLACE, "loss", "backend", "M", "K", "D", "dtype", "status"
OPERATION += "forward_us", "both_us", "eager_us", "three_products_us", "extra_MiB"
OPERATION += "pytorch_us", "pytorch_eager_us", "compile_us", "pytorch_MiB"
OBJECTIVE = *PLACE, "B", "T", "D", "status", "eager_us", "graph_us", "launches", "release_us"
SPAWN = multiprocessing.get_context("spawn")  # a process that is forked cannot use a GPU
SECONDS_PER_ROW = 60  # at most


def inputs(shape):
    """Two sets that require a gradient and, where there is a queue, one that does not."""
    generator = torch.Generator("cuda").manual_seed(0)
    common, *own = torch.randn(3, shape.N, shape.D, device="cuda", generator=generator)
    sets = [(common + x).to(shape.dtype).requires_grad_() for x in own]
    queue = [torch.randn(shape.K, shape.D, device="cuda", generator=generator).to(shape.dtype)] if shape.K else []
    return sets + queue


def loss_of(shape, sets, **settings):
    a, b, *queue = sets
    settings = dict(settings, backend=shape.backend)
    if shape.loss == "sup_con":
        return tk.sup_con(torch.cat([a, b]), classes(len(a)).repeat(2), **settings)
    if shape.loss == "labelled":
        return tk.info_nce(a, b, labels=classes(len(a)), negatives=queue[0], **settings)
    return getattr(tk, shape.loss)(a, b, **settings, **({"negatives": queue[0]} if queue else {}))


def classes(count):
    return torch.arange(count, device="cuda") % CLASSES


def with_gradient(shape, sets):
    """The loss that a shape describes, and its gradient."""
    torch.set_float32_matmul_precision("high" if shape.tf32 else "highest")
    loss = loss_of(shape, sets)
    return loss, torch.autograd.grad(loss, sets[:2])


def slice_of(sets):
    return [x.detach()[:1024].requires_grad_(x.requires_grad) for x in sets]


def check(shape, sets):
    """Raises unless loss and gradient of a slice of the rows agree with the reference."""
    few = slice_of(sets)
    found, grads = with_gradient(shape, few)
    doubled = [x.detach().double().requires_grad_(x.requires_grad) for x in few]
    wanted, exact = with_gradient(shape._replace(backend="reference"), doubled)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)
    for g, w in zip(grads, exact, strict=True):
        cosine = torch.cosine_similarity(g.double().flatten(), w.flatten(), dim=0)
        same = torch.ones_like(cosine)
        torch.testing.assert_close(cosine, same, rtol=0, atol=1e-4, msg="the gradient points elsewhere: {}".format)


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
    """The time of the three matrix products of the usual form, or None if they do not fit the memory."""
    columns = shape.N + shape.K if shape.K else 2 * shape.N
    rows = rows_of(shape)
    if rows * columns > 2**32:
        return None
    r, z = (torch.randn(size, shape.D, device="cuda", dtype=shape.dtype) for size in (rows, columns))
    S, dr, dz = z.new_empty(rows, columns), torch.empty_like(r), torch.empty_like(z)

    def step():
        torch.mm(r, z.T, out=S)
        torch.mm(S, z, out=dr)
        torch.mm(S.T, r, out=dz)

    return microseconds(step)


def plain(shape, sets):
    """Times and memory of the same loss and gradient in plain PyTorch and by torch.compile, in some rows only.

    They are measured once, with the rows of the Triton backend.
    """
    rows = rows_of(shape)
    if shape.loss not in PLAIN or shape.backend != "triton" or rows > 32768 or shape.tf32:
        return {}

    def step(loss=PLAIN[shape.loss]):
        return torch.autograd.grad(loss(*sets, 0.1), sets)

    extra = extra_memory(step)
    made = dict(
        pytorch_us=round(microseconds(step), 1),
        pytorch_eager_us=round(wall_microseconds(step, 20), 1),
        pytorch_MiB=round(extra / 2**20, 1),
    )
    if (shape.loss, rows) in COMPILED and shape.D == 128 and shape.dtype == HALF:
        torch.compiler.reset()
        compiled = torch.compile(PLAIN[shape.loss], dynamic=False)
        made["compile_us"] = round(microseconds(lambda: step(compiled)), 1)
    return made


def extra_memory(step):
    """Bytes that a step takes beyond what there was before it."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def rows_of(shape):
    """The number of rows of the similarity matrix: those of both sets, or of one set if there is a queue."""
    return shape.N if shape.K else 2 * shape.N


def row(shape):
    sets = inputs(shape)
    check(shape, sets)

    def both():
        with_gradient(shape, sets)

    extra = extra_memory(both)
    with torch.no_grad():
        forward = microseconds(lambda: loss_of(shape, sets))
    dense = products(shape)
    return dict(
        forward_us=round(forward, 1),
        both_us=round(microseconds(both), 1),
        eager_us=round(wall_microseconds(both, 20), 1),
        three_products_us="" if dense is None else round(dense, 1),
        extra_MiB=round(extra / 2**20, 1),
        **plain(shape, sets),
    )


def name_of(shape):
    """The columns that say which row it is."""
    dtype = str(shape.dtype)[6:] + (" tf32" if shape.tf32 else "")
    return dict(loss=shape.loss, backend=shape.backend, M=rows_of(shape), K=shape.K, D=shape.D, dtype=dtype)


def wall_microseconds(step, repeats=50):
    """The median time of a step as its caller sees it, its work on the device included; about two seconds at most."""
    times = []
    while len(times) < repeats and sum(times) < 2e6:
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


def videos(B, T=4, D=128):
    """The tensors g, s, x of TCLR's own sizes."""
    shapes = (2, B, D), (2, B, T, D), (2, B, T, D)
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, device="cuda", generator=generator, requires_grad=True) for shape in shapes]


def objective(sets, **settings):
    """The gradient of the whole objective, in the release's form."""
    torch.set_float32_matmul_precision("highest")
    return torch.autograd.grad(tk.tclr(*sets, temperature=0.1, form="release", **settings).total, sets)


def objective_row(B):
    sets = videos(B)

    def ours():
        return objective(sets)

    def release():
        torch.autograd.grad(baselines.release(*sets, 0.1), sets)

    if B <= 256:
        wanted = objective([x.detach().double().requires_grad_() for x in sets], backend="reference")
        torch.testing.assert_close(ours(), tuple(w.float() for w in wanted), rtol=1e-3, atol=1e-5)
    ours()
    return dict(
        eager_us=round(wall_microseconds(ours), 1),
        graph_us=round(microseconds(ours), 1),
        launches=launches(ours),
        release_us="" if B > 256 else round(wall_microseconds(release, 5), 1),
    )


def facts():
    """Where a row was measured, and with what. The variable COMMIT names the commit if git does not know it."""
    return dict(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=tk.backends.triton.version(),
        commit=os.environ.get("COMMIT") or rows.commit(),
        date=datetime.date.today().isoformat(),
    )


SMALL = [  # problems of every kernel, for a sanitizer to watch
    Shape(loss, N, 136, dtype, tf32, backend)
    for N, dtype, tf32 in ((4, torch.float32, False), (77, torch.bfloat16, False), (77, torch.float32, True))
    for loss, backend in itertools.product(("nt_xent", "clip_loss"), ("triton", "native"))
]
SMALL += [
    Shape(loss, N, 136, dtype, backend=backend, K=K)
    for loss, K in (("info_nce", 95), ("labelled", 95), ("sup_con", 0))
    for N, dtype in ((40, torch.float32), (77, torch.bfloat16))
    for backend in ("triton", "native")
]


def small(shape):
    """A small problem at a usual temperature, and at one that takes the kernels' other way through the exponentials."""
    sets = inputs(shape)
    with_gradient(shape, sets)
    loss_of(shape, sets, temperature=0.005).backward()
    return {}


def small_objective():
    objective(videos(9, 4, 24))
    return {}


def compile_row(shape):
    """Has Triton compile what the row of a shape will need."""
    sets = inputs(shape)
    with_gradient(shape, slice_of(sets))
    with_gradient(shape, sets)
    with torch.no_grad():
        loss_of(shape, sets)
    return {}


def compile_objective(B):
    objective(videos(B))
    return {}


def served(shapes):
    return [shape for shape in shapes if tk.available_backends("cuda")[shape.backend] is None]


def small_problems():
    return [*((small, shape) for shape in served(SMALL)), (small_objective,)]


def sanitize():
    """The small problems, in this process. Returns how many failed."""
    return sum(failed(job, attempt(*job)) for job in small_problems())


def compile_all(processes):
    """Fills Triton's cache, by several processes at once, with the kernels of all rows and small problems.

    Returns how many problems failed.
    """
    jobs = [(compile_row, shape) for shape in served(SHAPES)]
    jobs += [*((compile_objective, B) for B in VIDEOS), *small_problems()]
    with concurrent.futures.ProcessPoolExecutor(processes, SPAWN) as pool:
        made = [pool.submit(attempt, *job) for job in jobs]
        return sum(failed(job, future.result()) for job, future in zip(jobs, made, strict=True))


def failed(job, result):
    """Whether a problem failed. Prints the error."""
    status = result[0]["status"]
    if status != "ok":
        print(job[0].__name__, *job[1:], status, flush=True)
    return status != "ok"


def attempt(make, *arguments):
    """The row that a function makes, and whether the device still answers after it."""
    made = rows.attempted(finished, make, *arguments)
    return made, made["status"] == "ok" or rows.attempted(recover)["status"] == "ok"


def finished(make, *arguments):
    """The row, once the device has done all that was asked of it: an error there is this row's."""
    made = make(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made


def recover():
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return {}


class Worker:
    """A process that makes rows one after another. A new one takes its place when a row breaks it or takes too long."""

    process = None

    def row(self, *job):
        """The row that the function of a job makes, or its error."""
        if self.process is None:
            self.start()
        self.connection.send(job)
        try:
            if not self.connection.poll(SECONDS_PER_ROW):
                raise TimeoutError(f"no answer within {SECONDS_PER_ROW} s")
            made, usable = self.connection.recv()
        except (EOFError, OSError) as error:  # a TimeoutError is an OSError
            made, usable = {"status": rows.reason(error)}, False
        if not usable:
            self.stop()
        return made

    def start(self):
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that `recv` fails when the process ends

    def stop(self):
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process = None


def serve(connection):
    while True:
        connection.send(attempt(*connection.recv()))


def times(folder):
    """Writes the rows of the objective and of the operation. Returns how many failed."""
    place, worker, usable = facts(), Worker(), tk.available_backends("cuda")
    device = place["device"].lower().replace(" ", "-")
    statuses = []

    def report(add, made):
        add(made)
        statuses.append(made["status"])
        print(" ".join(f"{value!s:>12}" for name, value in made.items() if name not in PLACE), flush=True)

    with rows.writing(folder / f"objective-{device}.csv", OBJECTIVE) as add:
        for B in VIDEOS:
            report(add, place | dict(B=B, T=4, D=128) | worker.row(objective_row, B))
    with rows.writing(folder / f"operation-{device}.csv", OPERATION) as add:
        for shape in SHAPES:
            missing = usable[shape.backend]
            made = worker.row(row, shape) if missing is None else {"status": f"error: {missing}"}
            report(add, place | name_of(shape) | made)
    return sum(status != "ok" for status in statuses)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="the folder of the rows")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--compile", type=int, metavar="PROCESSES", help="only fill Triton's cache, for the other runs"
    )
    instead.add_argument("--sanitize", action="store_true", help="only run small problems")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("skipped: no CUDA or HIP device")
        return 0
    if options.sanitize:
        failures = sanitize()
    elif options.compile:
        failures = compile_all(options.compile)
    else:
        failures = times(options.results)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
