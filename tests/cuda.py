"""The CUDA kernels' own source, compiled for the host and run there block after block, as a backend on CPU tensors.

Its operators come through the same binding as on a GPU. Run as a program with the path of such a library, it checks it
against the reference: a sanitizer needs a process that is started with its runtime.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import unittest.mock
from itertools import product
from pathlib import Path

import torch

import tclr_kernels as tk
from tclr_kernels import backends
from tclr_kernels.backends import native

from . import kernels
from .kernels import CSRC

TORCH = Path(torch.__file__).parent
# the least PyTorch that the binding shall load into; as in setup.py
FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-DTCLR_HOST_EXECUTOR"]
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{TORCH}/include"]

# [G, V, N, D], each a regime of the blocks
SHAPES = {
    "one row": (2, 2, 1, 3),
    "small groups": (3, 4, 4, 33),
    "one tile, parts": (1, 5, 31, 8),
    "two blocks a set, ragged": (1, 2, 41, 70),
    "two panels of features, two blocks": (1, 2, 33, 300),
    "more lanes than a warp's": (1, 34, 2, 4),
    "as many rows as tensor cores take": (1, 2, 70, 5),
}
# ... and of those on tensor cores, of 64 rows and more
ON_TENSOR_CORES = {
    "two blocks a set, ragged": (1, 2, 70, 72),
    "a part of several sets": (1, 24, 64, 8),
    "two groups, two whole blocks a set": (2, 2, 128, 16),
    "two chunks of features": (1, 2, 66, 136),
}
# [B, T, D]
OBJECTIVES = {"one video": (1, 3, 5), "one clip": (4, 1, 5), "ragged": (7, 3, 33), "two tiles": (33, 2, 8)}
WEIGHTS = None, dict(ic_local=0, ll=0.5, gl=2)


UNITS = "bind.cpp", "kernels.cu", "rectangle.cu"  # what is compiled by itself


def build(folder, flags=("-O2",), replace=(), built=None):
    """The library, built in `folder`; replace: pairs of a text, which must occur in the kernels, and another for it.

    built: the folder of another build, whose objects serve where nothing is replaced.
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
    """The names of a source and of what it includes of its folder."""
    names = re.findall(r'#include "([\w.]+)"', file.read_text())
    return {file.name}.union(*(included(file.parent / name) for name in names))


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


class Host:
    """A backend of one such library. executor: `launches()`, `run_downwards(bool)`."""

    loaded = 0

    def __init__(self, library):
        Host.loaded += 1
        os.environ["TCLR_HOST_LIBRARY"] = name = f"tclr_kernels_on_host_{Host.loaded}"
        torch.ops.load_library(str(library))
        native.register_fakes(name)
        self.ops = getattr(torch.ops, name)
        self.executor = ctypes.CDLL(str(library))

    def why_not(self, device):
        return None if device.type == "cpu" else "it runs on the host"

    def forward(self, sets, tau, *rest):
        return self.ops.gram_forward(sets, *native._split(tau), *rest, native.tf32_allowed())

    def backward(self, sets, tau, *rest):
        return self.ops.gram_backward(sets, *native._split(tau), *rest, native.tf32_allowed())

    def rectangle(self, rows, columns, tau, *rest):
        return self.ops.rectangle(rows, columns, *native._split(tau), *rest, native.tf32_allowed())

    def pairs(self, rows, columns, tau, *rest):
        return self.ops.pairs(rows, columns, *native._split(tau), *rest, native.tf32_allowed())

    def rectangle_backward(self, rows, columns, tau, *rest):
        return self.ops.rectangle_backward(rows, columns, *native._split(tau), *rest, native.tf32_allowed())

    def objective(self, g, s, x, tau, *rest):
        return self.ops.objective(g, s, x, *native._split(tau), *rest)

    def objective_backward(self, g, s, x, tau, *rest):
        return self.ops.objective_backward(g, s, x, *native._split(tau), *rest)


def deviations(host, dtypes=(torch.float64, torch.float32)):
    """Yields the cases, as text, in which the kernels differ from the reference by more than the dtype's rounding."""
    generator = torch.Generator().manual_seed(0)
    for (name, (B, T, D)), weights in product(OBJECTIVES.items(), WEIGHTS):
        inputs = [torch.randn(2, B, *clips, D, generator=generator, dtype=torch.float64) for clips in ((), (T,), (T,))]
        if _objective_deviation(host, inputs, weights) > 1e-11:
            yield f"objective, {name}, weights {weights}"
    for (name, (G, V, N, D)), dtype, cross, (normalize, tau) in product(
        SHAPES.items(), dtypes, (False, True), ((True, 0.5), (True, 0.01), (False, 1.0))
    ):
        if V > 32 and (cross or tau < 1):
            continue  # a thousand blocks, for one loop's sake
        sets = [torch.randn(G, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(V)]
        tolerance = 1e-11 if dtype == torch.float64 else 5e-5 * max(1, 0.1 / tau)
        if kernels._deviation(host, sets, tau, normalize, cross, generator) > tolerance:
            yield f"{name}, {dtype}, cross={cross}, normalize={normalize}, tau={tau}"


def deviations_on_tensor_cores(host):
    """The same for the kernels on tensor cores; threads run upwards in half of the cases, downwards in the others."""
    generator = torch.Generator().manual_seed(0)
    for (name, (G, V, N, D)), (dtype, rounded), cross, (normalize, tau) in product(
        ON_TENSOR_CORES.items(),
        ((torch.float16, 1e-3), (torch.bfloat16, 1e-3), (torch.float32, 4e-3)),
        (False, True),
        ((True, 0.02), (False, 1.0)),
    ):
        if (normalize or dtype == torch.bfloat16) and (V > 2 or N == 128):
            continue  # for one loop's sake
        sets = [torch.randn(G, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(V)]
        tolerance = 1e-5 if dtype.itemsize == 2 and not normalize else rounded
        host.executor.run_downwards(cross)
        with unittest.mock.patch.object(native, "tf32_allowed", lambda: True):
            if kernels._deviation(host, sets, tau, normalize, cross, generator) > tolerance:
                yield f"{name}, {dtype}, cross={cross}, normalize={normalize}, tau={tau}"
    host.executor.run_downwards(False)


def _objective_deviation(host, inputs, weights):
    """The largest error of the five terms and of the total's four gradients."""
    results = []
    for name in "host", "reference":
        with unittest.mock.patch.dict(backends.BACKENDS, host=host):
            leaves = [z.clone().requires_grad_() for z in (torch.tensor(0.3, dtype=torch.float64), *inputs)]
            terms = tk.tclr(*leaves[1:], temperature=leaves[0], form="release", weights=weights, backend=name)
            results.append([torch.stack(terms).detach(), *torch.autograd.grad(3 * terms.total, leaves)])
    return max(map(kernels._difference, *results))


if __name__ == "__main__":
    host = Host(sys.argv[1])
    deviating = [*deviations(host), *deviations_on_tensor_cores(host)]
    print("\n".join(deviating) or "all agree")
    sys.exit(bool(deviating))
