"""The CPU kernels compiled alone, by any flags and with any text replaced, as a backend of their own.

Run as a program with the path of such a library, it checks it against the reference: a sanitizer needs a process that
is started with its runtime.
"""

import ctypes
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch

from tclr_kernels import losses
from tclr_kernels.backends import reference

CSRC = Path(__file__).parents[1] / "csrc"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]  # as in csrc/cpu/gram.h
GUARD = 64

# [G, V, N, D], each a regime of the tiling
SHAPES = {
    "one row": (2, 2, 1, 3),
    "one tile": (2, 2, 7, 16),
    "small groups": (5, 4, 4, 33),
    "three sets, ragged": (1, 3, 31, 133),
    "two blocks a set, ragged": (1, 2, 205, 17),
    "five blocks a set": (1, 2, 801, 3),
}


def compiler():
    return shutil.which("c++") or shutil.which("g++")


def build(folder, flags=(), replace=()):
    """The library, built in `folder`; replace: pairs of a text, which must occur in the sources, and another for it."""
    source = folder / "csrc"
    shutil.copytree(CSRC, source, dirs_exist_ok=True)
    for old, new in replace:
        hits = [path for path in (*source.glob("cpu/*.inl"), source / "problem.h") if old in path.read_text()]
        if not hits:
            raise ValueError(f"nothing to replace: {old!r} is not in the kernels")
        for path in hits:
            path.write_text(path.read_text().replace(old, new))
    library = folder / "kernels.so"
    files = [Path(__file__).with_suffix(".cpp"), source / "cpu/portable.cpp"]
    command = [compiler(), "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", f"-I{source}", *flags, *map(str, files)]
    subprocess.run([*command, "-o", str(library)], check=True, capture_output=True, text=True)
    return library


class Kernels:
    """A kernel backend made of one library, one of its threads slow. Memory is given filled with 0xA5.

    keep: backward gets the memory of the forward before it.
    """

    def __init__(self, library, threads=2, slow=-1):
        self.library = ctypes.CDLL(str(library))
        self.gram = self.library.gram
        self.gram.restype = ctypes.c_int64
        self.threads, self.slow, self.keep, self.kept = threads, slow, False, None

    def forward(self, sets, tau, normalize, cross):
        G, N, _ = sets[0].shape
        V = len(sets)
        dtype = torch.promote_types(sets[0].dtype, torch.float32)
        outputs = [_guarded((G, V, V, N), dtype) for _ in range(3)]
        self._call(sets, tau, normalize, cross, False, [x for x, _ in outputs], [], None)
        return tuple(_intact(*x) for x in outputs)

    def backward(self, sets, tau, normalize, cross, neg, pos, g_term, g_neg, g_pos):
        G, N, D = sets[0].shape
        blocks = [None if x is None else x.contiguous() for x in (neg, pos, g_term, g_neg, g_pos)]
        dz = [_guarded((G, N, D), neg.dtype) for _ in sets]
        zdz = _guarded((G, len(sets), N), neg.dtype)
        self._call(sets, tau, normalize, cross, True, blocks, [x for x, _ in dz], zdz[0])
        return [_intact(*x).to(sets[0].dtype) for x in dz], _intact(*zdz)

    def local_local(self, pos, scale):
        V, _, N = pos.shape
        outputs = _guarded((V, N), pos.dtype), _guarded(pos.shape, pos.dtype)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (pos, outputs[0][0], outputs[1][0])]
        sizes = ctypes.c_int64(V), ctypes.c_int64(N)
        self.library.local_local(*sizes, pointers[0], ctypes.c_double(scale), *pointers[1:])
        return tuple(_intact(*x) for x in outputs)

    def _call(self, sets, tau, normalize, cross, backward, blocks, dz, zdz):
        G, N, D = sets[0].shape
        sizes = (ctypes.c_int64 * 6)(G, len(sets), N, D, self.threads, self.slow)
        flags = (ctypes.c_int64 * 5)(DTYPES.index(sets[0].dtype), normalize, cross, self.keep, backward)
        strides = (ctypes.c_int64 * (3 * len(sets)))(*(s for z in sets for s in z.stride()))
        arguments = (
            *(sizes, flags, _pointers(sets), strides, ctypes.c_double(float(tau))),
            *(_pointers(blocks), _pointers(dz), ctypes.c_void_p(None if zdz is None else zdz.data_ptr())),
        )
        size = self.gram(*arguments, None)
        memory = self.kept if self.keep and backward else None
        memory = memory or _guarded((size,), torch.promote_types(sets[0].dtype, torch.float32))
        self.kept = memory if self.keep else None
        self.gram(*arguments, ctypes.c_void_p(memory[0].data_ptr()))
        _intact(*memory)


def _pointers(tensors):
    return (ctypes.c_void_p * max(1, len(tensors)))(*(None if x is None else x.data_ptr() for x in tensors))


def _guarded(shape, dtype):
    """A tensor in the middle of a buffer of 0xA5, and the buffer."""
    x = torch.empty(shape, dtype=dtype)
    buffer = torch.full((x.nbytes + 2 * GUARD,), 0xA5, dtype=torch.uint8)
    return buffer[GUARD : GUARD + x.nbytes].view(dtype).view(shape), buffer


def _intact(x, buffer):
    assert (buffer[:GUARD] == 0xA5).all() and (buffer[-GUARD:] == 0xA5).all(), "written outside the output"
    return x


def deviations(kernels, dtypes=(torch.float64, torch.float32)):
    """Yields the cases, as text, in which the kernels differ from the reference by more than the dtype's rounding."""
    generator = torch.Generator().manual_seed(0)
    for (name, (G, V, N, D)), dtype, cross, normalize, tau in product(
        SHAPES.items(), dtypes, (False, True), (True, False), (0.5, 0.01, 0.002)
    ):
        if torch.finfo(dtype).bits < 64 and tau < 0.01:
            continue  # 0.002: beyond the fixed offset of float64
        sets = [torch.randn(G, N, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(V)]
        tolerance = 1e-11 if dtype == torch.float64 else 5e-5 * max(1, 0.1 / tau)
        for keep in (False, True) if V * N < 512 else (False,):
            kernels.keep = keep
            if _deviation(kernels, sets, tau, normalize, cross, generator) > tolerance:
                yield f"{name}, {dtype}, cross={cross}, normalize={normalize}, tau={tau}, keep={keep}"
    kernels.keep = False
    for clips, N in product((1, 2, 4), (1, 7, 40)):
        S = torch.randn(2 * clips, 2 * clips, N, generator=generator, dtype=torch.float64) * 30
        pos = S.masked_fill(torch.eye(len(S), dtype=torch.bool)[:, :, None], 0).requires_grad_()
        wanted = losses._local_local_from(pos)
        (3 * wanted.sum()).backward()
        loss, g_pos = kernels.local_local(pos.detach(), 3.0)
        if max(_difference(loss, wanted.detach()), _difference(g_pos, pos.grad)) > 1e-12:
            yield f"local_local, {clips} clips, N = {N}"


def _deviation(kernels, sets, tau, normalize, cross, generator):
    exact = [z.detach().double().clone().requires_grad_() for z in sets]
    wanted = reference.gram(exact, tau, normalize, cross)
    found = kernels.forward(sets, tau, normalize, cross)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).where(x.isfinite(), 0) for x in wanted]
    sum((x.where(x.isfinite(), 0) * g).sum() for x, g in zip(wanted, upstream, strict=True)).backward()
    _, neg, pos = found
    dz, _ = kernels.backward(sets, tau, normalize, cross, neg, pos, *(g.to(neg.dtype) for g in upstream))
    unit = 2 * torch.finfo(sets[0].dtype).eps if sets[0].element_size() == 2 else 0
    gradients = [_difference(d, z.grad) - unit for d, z in zip(dz, exact, strict=True)]
    return max(*(_difference(f, w.detach()) for f, w in zip(found, wanted, strict=True)), *gradients)


def _difference(found, wanted):
    """The largest error, relative to the largest entry; infinite where what is finite is not the same."""
    finite = wanted.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    error = (found.double() - wanted)[finite].abs()
    return (error.max() / wanted[finite].abs().max().clamp(min=1)).item() if error.numel() else 0.0


if __name__ == "__main__":
    deviating = list(deviations(Kernels(sys.argv[1]), DTYPES))
    print("\n".join(deviating) or "all agree")
    sys.exit(bool(deviating))
