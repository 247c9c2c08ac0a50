"""Compiles the source of the CUDA kernels for the CPU, where it runs block after block, and makes it a backend.

Its operators use the same binding as on a GPU. As a program, with the path of such a library, it compares the library
with the reference. Sanitizers need this, since their runtime must be loaded when a process starts.
"""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import unittest.mock
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

import tclr_kernels as tk
from tclr_kernels import backends, general
from tclr_kernels.backends import native

from . import kernels
from .kernels import CSRC

TORCH = Path(torch.__file__).parent
# TORCH_TARGET_VERSION is the oldest supported PyTorch, as in setup.py
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-DTCLR_HOST_EXECUTOR", "-DTCLR_HOPPER"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{TORCH}/include"]

# [G, V, N, D], for each way in which rows are divided into blocks
SHAPES = {
    "one row": (2, 2, 1, 3),
    "small groups": (3, 4, 4, 33),
    "one tile, parts": (1, 5, 31, 8),
    "two blocks a set, ragged": (1, 2, 41, 70),
    "two panels of features, two blocks": (1, 2, 33, 300),
    "more lanes than a warp's": (1, 34, 2, 4),
    "as many rows as tensor cores take": (1, 2, 70, 5),
}
# the same for the kernels on tensor cores, which take 64 rows and more
ON_TENSOR_CORES = {
    "two blocks a set, ragged": (1, 2, 70, 72),
    "a part of several sets": (1, 24, 64, 8),
    "two groups, two whole blocks a set": (2, 2, 128, 16),
    "two chunks of features": (1, 2, 66, 136),
}


class OnHopper(NamedTuple):
    """A problem [G, V, N, D] for a Hopper GPU with `processors` multiprocessors. in_memory: tau is a tensor."""

    G: int
    V: int
    N: int
    D: int
    processors: int
    dtype: torch.dtype = torch.bfloat16
    cross: bool = False
    tau: float = 0.1
    in_memory: bool = False


ON_HOPPER = {
    "a ragged set is a super-block": OnHopper(1, 3, 300, 100, 3),
    "super-blocks of one block, parts": OnHopper(1, 2, 200, 64, 64, torch.float16),
    "two groups, three chunks, cross": OnHopper(2, 2, 130, 137, 2, torch.float16, cross=True),
    "odd sets, cross": OnHopper(1, 3, 70, 64, 3, cross=True, tau=0.05, in_memory=True),
    "four chunks, whole blocks": OnHopper(1, 2, 256, 256, 1, tau=0.02),
    "more multiprocessors than blocks, cross": OnHopper(1, 2, 77, 136, 132, cross=True),
    "more multiprocessors than blocks, odd sets, cross": OnHopper(1, 3, 129, 66, 132, cross=True),
    "left to tensor cores, parts": OnHopper(1, 2, 70, 72, 8, tau=0.01, in_memory=True),
}


class Case(NamedTuple):
    """A rectangle of A sets of n rows and C sets of K columns.

    first: the place of the rows among the columns, or -1 if they are no columns. With n = K, all columns are rows.
    classes: the number of labels, 0 for none. share: the rows also get the gradient that they have as candidates of all
    columns. pairs: whether `pair_sum` is tested instead.
    """

    G: int
    A: int
    n: int
    C: int
    K: int
    D: int
    first: int = -1
    classes: int = 0
    cross: bool = False
    share: bool = False
    pairs: bool = False


RECTANGLES = {
    "one row, groups": Case(3, 1, 1, 1, 16, 9),
    "few rows, parts of the columns": Case(1, 1, 3, 1, 700, 5),
    "two panels of features": Case(1, 1, 33, 2, 35, 260, classes=5),
    "a range of sets": Case(2, 2, 4, 2, 11, 6, first=3),
    "a range, cross": Case(1, 3, 20, 3, 40, 7, first=15, classes=4, cross=True),
    "a range's share": Case(1, 2, 9, 2, 50, 6, first=30, share=True),
    "a range's share, keys": Case(2, 2, 9, 2, 50, 6, first=30, classes=3, share=True),
    "the rows themselves": Case(1, 2, 40, 2, 40, 6, first=0, classes=9),
    "pairs": Case(2, 1, 7, 1, 70, 6, classes=3, pairs=True),
    "pairs of the rows themselves": Case(1, 2, 40, 2, 40, 6, first=0, classes=9, pairs=True),
}
RECTANGLES_ON_TENSOR_CORES = {
    "ragged": Case(1, 1, 70, 1, 130, 72),
    "few rows, parts of the columns": Case(1, 1, 8, 1, 520, 64),
    "few rows, keys": Case(1, 1, 8, 1, 520, 64, classes=40),
    "a range of sets": Case(1, 2, 66, 2, 100, 16, first=30),
    "a range, cross, two chunks": Case(1, 3, 40, 3, 130, 136, first=29, classes=3, cross=True),
    "a range's share": Case(1, 2, 33, 2, 140, 16, first=40, share=True),
    "a range's share, keys": Case(1, 1, 64, 1, 130, 16, first=40, classes=30, share=True),
    "the rows themselves": Case(1, 2, 70, 2, 70, 80, first=0, classes=30),
}
# [B, T, D]
OBJECTIVES = {"one video": (1, 3, 5), "one clip": (4, 1, 5), "ragged": (7, 3, 33), "two tiles": (33, 2, 8)}
WEIGHTS = None, dict(ic_local=0, ll=0.5, gl=2)


UNITS = "bind.cpp", "kernels.cu", "rectangle.cu"  # the translation units


def build(folder, flags=("-O2",), replace=(), built=None):
    """Builds the library in `folder`. replace: pairs (old, new) of texts; `old` must occur in the kernels.

    built: the folder of another build, whose object files are used where nothing is replaced.
    """
    source = folder / "csrc"
    shutil.copytree(CSRC, source, dirs_exist_ok=True)
    changed = set()
    for old, new in replace:
        hits = [path for path in (source / "cuda").iterdir() if old in path.read_text()]
        if not hits:
            raise ValueError(f"nothing to replace: {old!r} is not in the kernels")
        for path in hits:
            path.write_text(path.read_text().replace(old, new))
            changed.add(path.name)
    objects = {unit: (built or folder) / f"{Path(unit).stem}.o" for unit in UNITS}
    for unit in UNITS:
        if built is None or changed & included(source / "cuda" / unit):
            objects[unit] = folder / f"{Path(unit).stem}.o"
            compile = [kernels.compiler(), *FLAGS, *flags, "-x", "c++", "-c", str(source / "cuda" / unit)]
            _run([*compile, "-o", str(objects[unit])])
    library = folder / "cuda_on_host.so"
    link = [kernels.compiler(), "-shared", *flags, *map(str, objects.values()), f"-L{TORCH}/lib"]
    _run([*link, "-ltorch_cpu", "-lc10", "-o", str(library)])
    return library


def included(file):
    """The names of a source file and of all files of its folder that it includes."""
    names = re.findall(r'#include "([\w.]+)"', file.read_text())
    return {file.name}.union(*(included(file.parent / name) for name in names))


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


FUNCTIONS = {  # of a backend -> the operator, and the number of arguments before the temperature
    "forward": ("gram_forward", 1),
    "backward": ("gram_backward", 1),
    **{name: (name, 1) for name in ("reduced", "reduced_backward")},
    **{name: (name, 2) for name in ("rectangle", "pairs", "rectangle_backward")},
    **{name: (name, 3) for name in ("objective", "objective_backward")},
}


class Host:
    """A backend that calls one such library.

    executor: the library's functions for tests. launches() is the number of launches so far, run_downwards(bool) sets
    the order of threads. be_hopper(processors) simulates a Hopper GPU with that many multiprocessors; 0 ends this.
    """

    loaded = 0

    def __init__(self, library):
        Host.loaded += 1
        os.environ["TCLR_HOST_LIBRARY"] = name = f"tclr_kernels_on_host_{Host.loaded}"
        torch.ops.load_library(str(library))
        native.register_fakes(name)
        self.ops = getattr(torch.ops, name)
        self.executor = ctypes.CDLL(str(library))
        for name, (operator, before) in FUNCTIONS.items():
            setattr(self, name, functools.partial(self._call, getattr(self.ops, operator), before))

    def why_not(self, device):
        return None if device.type == "cpu" else "it runs on the host"

    def _call(self, operator, before, *arguments):
        """Calls an operator. before: the number of arguments before the temperature."""
        tf32 = [native.tf32_allowed()] if before < 3 else []  # the objective has no such argument
        return operator(*arguments[:before], *native._split(arguments[before]), *arguments[before + 1 :], *tf32)


def deviations(host, dtypes=(torch.float64, torch.float32)):
    """Yields the cases, as text, in which the kernels differ from the reference by more than the dtype's rounding."""
    generator = torch.Generator().manual_seed(0)
    for (name, (B, T, D)), weights in product(OBJECTIVES.items(), WEIGHTS):
        inputs = [torch.randn(2, B, *clips, D, generator=generator, dtype=torch.float64) for clips in ((), (T,), (T,))]
        for dtype, tolerance in (torch.float64, 1e-11), (torch.float32, 5e-6):
            if not _objective_deviation(host, inputs, weights, dtype) <= tolerance:
                yield f"objective, {name}, weights {weights}, {dtype}"
    for (name, (G, V, N, D)), dtype, cross, (normalize, tau) in product(
        SHAPES.items(), dtypes, (False, True), ((True, 0.5), (True, 0.01), (False, 1.0))
    ):
        if V > 32 and (cross or tau < 1):
            continue  # it has a thousand blocks, so that one case is enough
        sets = [torch.randn(G, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(V)]
        tolerance = 1e-11 if dtype == torch.float64 else 5e-5 * max(1, 0.1 / tau)
        if kernels._deviation(host, sets, tau, normalize, cross, generator) > tolerance:
            yield f"{name}, {dtype}, cross={cross}, normalize={normalize}, tau={tau}"


def deviations_on_tensor_cores(host):
    """As `deviations`, for the kernels on tensor cores. In half of the cases, threads run in reverse order."""
    generator = torch.Generator().manual_seed(0)
    for (name, (G, V, N, D)), (dtype, rounded), cross, (normalize, tau) in product(
        ON_TENSOR_CORES.items(),
        ((torch.float16, 1e-3), (torch.bfloat16, 1e-3), (torch.float32, 4e-3)),
        (False, True),
        ((True, 0.02), (False, 1.0)),
    ):
        if (normalize or dtype == torch.bfloat16) and (V > 2 or N == 128):
            continue  # these are slow, so that fewer cases must do
        sets = [torch.randn(G, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(V)]
        tolerance = 1e-5 if dtype.itemsize == 2 and not normalize else rounded
        host.executor.run_downwards(cross)
        with unittest.mock.patch.object(native, "tf32_allowed", lambda: True):
            if kernels._deviation(host, sets, tau, normalize, cross, generator) > tolerance:
                yield f"{name}, {dtype}, cross={cross}, normalize={normalize}, tau={tau}"
    host.executor.run_downwards(False)


def deviations_on_hopper(host):
    """As `deviations`, for the kernels for Hopper. An error that ends a launch is a deviation, too."""
    generator = torch.Generator().manual_seed(0)
    for k, (name, case) in enumerate(ON_HOPPER.items()):
        shape = case.G, case.N, case.D
        sets = [torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for _ in range(case.V)]
        sets[0][0, 5], sets[1][0, 6] = 0, sets[0][0, 7]
        tau = torch.tensor(case.tau, dtype=torch.float64) if case.in_memory else case.tau
        host.executor.be_hopper(case.processors)
        host.executor.run_downwards(k % 2)
        try:
            if (error := kernels._deviation(host, sets, tau, True, case.cross, generator)) > 1e-3:
                yield f"{name}: {error:.0e}"
        except RuntimeError as error:
            yield f"{name}: {error}"
    host.executor.be_hopper(0)
    host.executor.run_downwards(False)


def rectangle_deviations(host, dtypes=(torch.float64, torch.float32)):
    """As `deviations`, for rectangles."""
    for (name, case), dtype, (normalize, tau) in product(
        RECTANGLES.items(), dtypes, ((True, 0.5), (True, 0.01), (False, 1.0))
    ):
        tolerance = 1e-11 if dtype == torch.float64 else 5e-5 * max(1, 0.1 / tau)
        if (error := _rectangle_deviation(host, case, dtype, normalize, tau)) > tolerance:
            yield f"{name}, {dtype}, normalize={normalize}, tau={tau}: {error:.0e}"


def rectangle_deviations_on_tensor_cores(host):
    """As `deviations_on_tensor_cores`, for rectangles."""
    for k, ((name, case), (dtype, half, rounded), (normalize, tau)) in enumerate(
        product(
            RECTANGLES_ON_TENSOR_CORES.items(),
            (
                (torch.float16, False, 1e-3),
                (torch.bfloat16, False, 1e-3),
                (torch.float32, False, 4e-3),
                (torch.float32, True, 1e-3),
            ),
            ((True, 0.05), (False, 1.0)),
        )
    ):
        if (normalize or half or dtype == torch.bfloat16) and case.G * case.A * case.n * case.K > 10000:
            continue  # these are slow, so that fewer cases must do
        tolerance = 1e-5 if dtype.itemsize == 2 and not normalize else rounded
        host.executor.run_downwards(k % 2 == 0)
        with unittest.mock.patch.object(native, "tf32_allowed", lambda half=half: not half):
            if (error := _rectangle_deviation(host, case, dtype, normalize, tau, half)) > tolerance:
                yield f"{name}, {dtype}, half={half}, normalize={normalize}, tau={tau}: {error:.0e}"
    host.executor.run_downwards(False)


def rectangle_inputs(case, dtype, normalize):
    """The rows, the columns and the keys of a case, as `general.rectangle` takes them."""
    generator = torch.Generator().manual_seed(0)
    length = 1 if normalize else 2 * case.D**-0.25
    centre = torch.randn(1, 1, case.D, generator=generator)
    rows, columns = (
        [(length * (torch.randn(case.G, N, case.D, generator=generator) + centre) / 2**0.5).to(dtype) for _ in range(V)]
        for V, N in ((case.A, case.n), (case.C, case.K))
    )
    keys = [torch.randint(-1, case.classes, (case.G, N), generator=generator) for N in (case.n, case.K)]
    if case.first >= 0:
        keys[0] = keys[1][:, case.first : case.first + case.n]
        rows = [x[:, case.first : case.first + case.n].clone() for x in columns] if case.n < case.K else []
    return rows, columns, tuple(keys) if case.classes else general.NO_KEYS


def rectangle_results(name, case, inputs, normalize, tau, half=False):
    """The outputs and gradients of a case on a backend. For a case with `share`, it is the gradient alone."""
    settings = general.Settings(name, normalize, case.cross, case.first, half)
    rows, columns, keys = inputs
    return (_share if case.share else _outputs)(settings, tau, keys, rows, columns, case.pairs)


def _rectangle_deviation(host, case, dtype, normalize, tau, half=False):
    """The largest error of the results of a case. half: whether the rows are bfloat16 that was converted to `dtype`"""
    rows, columns, keys = rectangle_inputs(case, dtype, normalize)
    if half:
        rows, columns = ([x.bfloat16().to(dtype) for x in side] for side in (rows, columns))
    exact = [x.double() for x in rows], [x.double() for x in columns], keys
    with unittest.mock.patch.dict(backends.BACKENDS, host=host):
        found = rectangle_results("host", case, (rows, columns, keys), normalize, tau, half)
    wanted = rectangle_results("reference", case, exact, normalize, tau)
    unit = 2 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
    return max(kernels._difference(f, w) - unit for f, w in zip(found, wanted, strict=True))


def _upstream(outputs):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).where(x.isfinite(), 0) for x in outputs]


def _outputs(settings, tau, keys, rows, columns, pairs):
    """The outputs, the gradients of both sides, and again those of the rows, computed without those of the columns."""
    outputs, gradients = [], []
    for alone in (False, True) if rows else (False,):
        wanted = [torch.tensor(tau, dtype=torch.float64), *rows, *([] if alone else columns)]
        wanted = [x.detach().requires_grad_() for x in wanted]
        sides = wanted[1 : 1 + len(rows)], columns if alone else wanted[1 + len(rows) :]
        outputs = list(general.rectangle(settings, wanted[0], keys, *sides)[:4])
        if pairs:
            negatives = outputs[0].detach().clamp(min=-1).requires_grad_()
            outputs = [general.pairs(settings, wanted[0], keys, negatives, *sides)]
            wanted.append(negatives)
        total = sum((x.where(x.isfinite(), 0) * g).sum() for x, g in zip(outputs, _upstream(outputs), strict=True))
        d_tau, *d_sets = torch.autograd.grad(total, wanted)
        size = sum(
            (x.norm(dim=-1) * d.norm(dim=-1)).sum() for x, d in zip(wanted[1:], d_sets, strict=True) if x.dim() == 3
        )
        gradients += [d_tau * tau / size, *d_sets]  # tau's gradient is compared relative to its summands
    return [x.detach() for x in (*outputs, *gradients)]


def _share(settings, tau, keys, rows, columns, _):
    """The gradients of rows that are a range of the columns, all of which are anchors."""
    of_columns = keys[1], keys[1]
    first, n = settings.first, rows[0].shape[1]
    if settings.name == "reference":
        columns = [x.detach().requires_grad_() for x in columns]
    outputs = general.rectangle(settings._replace(first=0), tau, of_columns, [], columns)
    *outputs, count = outputs if len(outputs) == 5 else (*outputs, None)
    upstream = _upstream(outputs)
    if settings.name == "reference":
        total = sum((x.where(x.isfinite(), 0) * g).sum() for x, g in zip(outputs, upstream, strict=True))
        return [d[:, first : first + n] for d in torch.autograd.grad(total, columns)]
    anchors = [outputs[0], *upstream[:2]]
    if keys[0] is not None:
        anchors += [outputs[2], *upstream[2:], count]
    own = [x[..., first : first + n] for x in anchors]
    backward = backends.BACKENDS[settings.name].rectangle_backward
    return backward(rows, columns, tau, *settings[1:4], *keys, own, anchors, True, False, settings.half)[0]


def _objective_deviation(host, inputs, weights, dtype=torch.float64):
    """The largest error of the five terms and of the total's four gradients."""
    results = []
    for name, type in ("host", dtype), ("reference", torch.float64):
        with unittest.mock.patch.dict(backends.BACKENDS, host=host):
            leaves = [z.to(type, copy=True).requires_grad_() for z in (torch.tensor(0.3), *inputs)]
            terms = tk.tclr(*leaves[1:], temperature=leaves[0], form="release", weights=weights, backend=name)
            made = torch.stack(terms).detach(), *torch.autograd.grad(3 * terms.total, leaves)
            results.append([x.double() for x in made])
    return max(map(kernels._difference, *results))


if __name__ == "__main__":
    host = Host(sys.argv[1])
    deviating = [*deviations(host), *deviations_on_tensor_cores(host), *deviations_on_hopper(host)]
    deviating += [*rectangle_deviations(host), *rectangle_deviations_on_tensor_cores(host)]
    print("\n".join(deviating) or "all agree")
    sys.exit(bool(deviating))
