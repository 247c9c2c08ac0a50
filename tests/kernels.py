"""Compiles the CPU kernels alone, with any flags and any text replaced, and makes them a backend.

As a program, with the path of such a library, it compares the library with the reference. Sanitizers need this, since
their runtime must be loaded when a process starts.
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

# [G, V, N, D], for each way in which rows are divided into tiles
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
    """Builds the library in `folder`. replace: pairs (old, new) of texts; `old` must occur in the sources."""
    source = folder / "csrc"
    shutil.copytree(CSRC, source, dirs_exist_ok=True)
    for old, new in replace:
        hits = [
            path
            for path in (*source.glob("cpu/*.inl"), source / "problem.h", source / "keys.h")
            if old in path.read_text()
        ]
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
    """A backend that calls one library. All memory that the library gets is filled with 0xA5 first.

    slow: a thread that is slowed down, -1 for none. keep: whether backward gets the memory of the forward.
    """

    def __init__(self, library, threads=2, slow=-1):
        self.library = ctypes.CDLL(str(library))
        self.gram = self.library.gram
        self.gram.restype = self.library.rectangle.restype = ctypes.c_int64
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

    def rectangle(self, rows, columns, tau, normalize, cross, first, row_keys, column_keys, mean):
        (G, n, D), shape = (rows or columns)[0].shape, _blocks(rows, columns)
        blocks = [_guarded(shape, torch.float64) for _ in range(2 if row_keys is None else 5)]
        wide = torch.promote_types(columns[0].dtype, torch.float32)
        weighted = _guarded((G, n, D), wide) if mean else None
        settings = tau, normalize, cross, first, row_keys, column_keys
        pointers = [x for x, _ in blocks] + [None] * (5 - len(blocks))
        self._rectangle(rows, columns, settings, 0, pointers, [weighted and weighted[0]])
        outputs = [_intact(*x) for x in blocks] + [columns[0].new_empty(0)] * (5 - len(blocks))
        return *outputs, _intact(*weighted) if mean else columns[0].new_empty(0)

    def pairs(self, rows, columns, tau, normalize, cross, first, row_keys, column_keys, negatives):
        outputs = [_guarded(negatives.shape, torch.float64) for _ in range(2)]
        settings = tau, normalize, cross, first, row_keys, column_keys
        self._rectangle(rows, columns, settings, 1, [negatives.contiguous(), *(x for x, _ in outputs)], [None])
        return tuple(_intact(*x) for x in outputs)

    def rectangle_backward(
        self, rows, columns, tau, normalize, cross, first, row_keys, column_keys, of_rows, of_columns, *wanted
    ):
        wide = torch.promote_types(columns[0].dtype, torch.float32)
        sides = rows or columns, columns
        made = [
            [_guarded(z.shape, wide) for z in side] if need else [] for side, need in zip(sides, wanted, strict=True)
        ]
        side = sides[not wanted[0]]
        along = _guarded((len(side[0]), len(side), side[0].shape[1]), wide)
        blocks = []
        for x in (of_rows, of_columns):
            of_pairs = len(x) == 2
            kept = [*[None] * (7 if of_pairs else 0), *(z.contiguous() for z in x)]
            blocks += kept + [None] * (9 - len(kept))
        others = [x for m, z in zip(made, sides, strict=True) for x in ([d for d, _ in m] or [None] * len(z))]
        settings = tau, normalize, cross, first, row_keys, column_keys
        self._rectangle(rows, columns, settings, 2, blocks, [*others, along[0]])
        return *([_intact(*x).to(columns[0].dtype) for x in m] for m in made), _intact(*along)

    def _rectangle(self, rows, columns, settings, wanted, blocks, others):
        tau, normalize, cross, first, *keys = settings
        symmetric, rows = not rows, rows or columns
        (G, n, D), K = rows[0].shape, columns[0].shape[1]
        sizes = (ctypes.c_int64 * 9)(G, len(rows), n, len(columns), K, D, first, self.threads, self.slow)
        flags = (ctypes.c_int64 * 5)(DTYPES.index(columns[0].dtype), normalize, cross, symmetric, wanted)
        sets = [*rows, *columns]
        strides = (ctypes.c_int64 * (3 * len(sets)))(*(s for z in sets for s in z.stride()))
        keys = [None if k is None else k.contiguous() for k in keys]
        of_keys = (ctypes.c_void_p(None if k is None else k.data_ptr()) for k in keys)
        pointers = _pointers(blocks), _pointers(others)
        arguments = sizes, flags, _pointers(sets), strides, ctypes.c_double(float(tau)), *of_keys, *pointers
        size = self.library.rectangle(*arguments, None)
        memory = _guarded((size,), torch.promote_types(columns[0].dtype, torch.float32))
        self.library.rectangle(*arguments, ctypes.c_void_p(memory[0].data_ptr()))
        _intact(*memory)


def _blocks(rows, columns):
    rows = rows or columns
    return len(rows[0]), len(rows), len(columns), rows[0].shape[1]


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
            continue  # 0.002 is only for float64, whose sums then need a running maximum
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
    rows = [reference.unit_rows(z) if normalize else z for z in exact]
    wanted = reference.gram(rows, tau, False, cross)
    found = kernels.forward(sets, tau, normalize, cross)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).where(x.isfinite(), 0) for x in wanted]
    total = sum((x.where(x.isfinite(), 0) * g).sum() for x, g in zip(wanted, upstream, strict=True))
    wanted_dz = torch.autograd.grad(total, exact, retain_graph=True)
    along = [(z * d).sum(-1).detach() for z, d in zip(rows, torch.autograd.grad(total, rows), strict=True)]
    _, neg, pos = found
    dz, zdz = kernels.backward(sets, tau, normalize, cross, neg, pos, *(g.to(neg.dtype) for g in upstream))
    unit = 2 * torch.finfo(sets[0].dtype).eps if sets[0].element_size() == 2 else 0
    gradients = [_difference(d, w) - unit for d, w in zip(dz, wanted_dz, strict=True)]
    gradients.append(_difference(zdz, torch.stack(along, 1)) - unit)  # the temperature's gradient is the sum of these
    return max(*(_difference(f, w.detach()) for f, w in zip(found, wanted, strict=True)), *gradients)


# [G, A, n, C, K, D, first], for each way in which rows are divided into tiles. first: None if the rows are all columns,
# -1 if they are no columns.
RECTANGLES = {
    "one row a group": (5, 1, 1, 1, 16, 9, -1),
    "ragged": (2, 1, 131, 1, 203, 33, -1),
    "few rows": (1, 1, 3, 1, 700, 17, -1),
    "few columns": (1, 1, 500, 1, 5, 3, -1),
    "many blocks of columns": (1, 1, 2, 1, 7000, 9, -1),
    "no columns": (1, 1, 3, 1, 0, 5, -1),
    "a range": (2, 2, 70, 2, 150, 17, 67),
    "a range, three sets": (1, 3, 5, 3, 9, 133, 0),
    "a small set": (3, 1, 9, 1, 9, 16, None),
    "blocks of a set": (1, 1, 301, 1, 301, 17, None),
    "blocks of two sets": (1, 2, 140, 2, 140, 5, None),
}


def rectangle_deviations(kernels, dtypes=(torch.float64, torch.float32)):
    """As `deviations`, for rectangles, ranges of rows and labels."""
    generator = torch.Generator().manual_seed(0)
    regimes = (0.5, True), (0.5, False), (None, True)
    cases = product(RECTANGLES.items(), dtypes, ("", "classes", "index"), regimes)
    for k, ((name, size), dtype, labels, (tau, normalize)) in enumerate(cases):
        tau = tau or (0.002 if dtype == torch.float64 else 0.01)  # so low that sums need a running maximum
        if torch.finfo(dtype).bits == 16 and k % 4:  # few are enough: only reading differs
            continue
        problem = _Rectangle(size, dtype, labels, tau, normalize, bool(k % 2), generator)
        tolerance = 1e-11 if dtype == torch.float64 else 5e-5 * max(1, 0.1 / tau) * (1 if normalize else size[5])
        for what, deviation in problem.deviations(kernels):
            if deviation > tolerance:
                cross = problem.settings[2]
                yield f"{name}, {dtype}, {labels} {tau=} {normalize=} {cross=}: {what} is off by {deviation:.1e}"


class _Rectangle:
    """One problem, compared with the reference in float64."""

    def __init__(self, size, dtype, labels, tau, normalize, cross, generator):
        G, A, n, C, K, D, first = size
        self.generator = generator
        self.columns = [torch.randn(G, K, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(C)]
        self.rows, start = [], max(0, first or 0)
        if first is not None:
            others = [torch.randn(G, n, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(A)]
            self.rows = others if first < 0 else [z[:, start : start + n] for z in self.columns]
        keys = [None, None]
        if labels:
            keys[1] = torch.arange(K).expand(G, K) - 2
            if labels == "classes":
                keys[1] = torch.randint(-1, 5, (G, K), generator=generator) << 40
            keys[0] = torch.randint(-1, 5, (G, n), generator=generator) << 40 if first == -1 else None
            keys[0] = keys[1][:, start : start + n] if keys[0] is None else keys[0]
        self.settings = tau, normalize, cross and first != -1 and A > 1, 0 if first is None else first, *keys
        self.exact = [[z.double().clone().requires_grad_() for z in side] for side in (self.rows, self.columns)]

    def deviations(self, kernels):
        """Yields (the name of a result, its error)."""
        found = kernels.rectangle(self.rows, self.columns, *self.settings, False)
        wanted = reference.rectangle(*self.exact, *self.settings)
        yield from zip(
            ("neg", "pos", "pos_lse", "spread", "count"), map(_difference, found, _values(wanted)), strict=False
        )
        of_rows, d = self.anchors(found, wanted[:4])
        yield from self.gradients(kernels, of_rows, [], d)
        if self.rows and self.settings[3] < 0:
            yield from self.columns_as_anchors(kernels, of_rows, d)
        elif self.rows:
            yield from self.share(kernels)
        if self.settings[4] is None:
            yield from self.mean(kernels) if self.settings[3] < 0 else ()
        else:
            yield from self.pairs(kernels)

    def anchors(self, found, wanted):
        """The results and upstream gradients that a backward takes, and the reference's gradients of both sides."""
        upstream = [
            torch.randn(x.shape, generator=self.generator, dtype=torch.float64).where(x.isfinite(), 0) for x in wanted
        ]
        total = sum((x.where(x.isfinite(), 0) * g).sum() for x, g in zip(wanted, upstream, strict=True))
        made = [found[0], *upstream[:2]]
        made += [found[2], *upstream[2:], found[4]] if self.settings[4] is not None else []
        return made, self.derivative(total)

    def derivative(self, total):
        total = total + sum(0 * z.sum() for side in self.exact for z in side)
        split = len(self.exact[0])
        d = torch.autograd.grad(total, [z for side in self.exact for z in side])
        return d[:split], d[split:]

    def gradients(self, kernels, of_rows, of_columns, d, only=((True, True), (True, False), (False, True))):
        for wanted in only if self.rows else ((True, False),):
            found = kernels.rectangle_backward(self.rows, self.columns, *self.settings, of_rows, of_columns, *wanted)
            sides = d if self.rows else (d[1], ())
            unit = 2 * torch.finfo(self.columns[0].dtype).eps if self.columns[0].element_size() == 2 else 0
            for side, f, w in zip(("rows", "columns"), found, sides, strict=False):
                yield from ((f"d {side}", _difference(x, y) - unit) for x, y in zip(f, w, strict=False))
            of_tau = [
                (z * g).sum(-1)
                for z, g in zip(self.exact[not (self.rows and wanted[0])], sides[not wanted[0]], strict=True)
            ]
            if not self.settings[1]:
                yield "along", _difference(found[2], torch.stack(of_tau, 1).detach())

    def columns_as_anchors(self, kernels, of_rows, d):
        tau, normalize, cross, first, row_keys, column_keys = self.settings
        settings = tau, normalize, cross, first, column_keys, row_keys
        wanted = reference.rectangle(*self.exact[::-1], *settings)
        of_columns, e = self.anchors(kernels.rectangle(self.columns, self.rows, *settings, False), wanted[:4])
        yield from self.gradients(kernels, [], of_columns, e)
        both = [[x + y for x, y in zip(*side, strict=True)] for side in zip(d, e, strict=True)]
        yield from self.gradients(kernels, of_rows, of_columns, both, [(True, True)])

    def share(self, kernels):
        """The gradient of a range of rows, from the coefficients of all columns as anchors."""
        tau, normalize, cross, first, _, keys = self.settings
        n, settings = self.rows[0].shape[1], (tau, normalize, cross, 0, keys, keys)
        wanted = reference.rectangle([], self.exact[1], *settings)
        of_columns, d = self.anchors(kernels.rectangle([], self.columns, *settings, False), wanted[:4])
        of_rows = [x[..., first : first + n] for x in of_columns]
        own = [x[:, first : first + n] for x in d[1]]
        yield from self.gradients(kernels, of_rows, of_columns, (own, ()), [(True, False)])

    def mean(self, kernels):
        neg, _, _, _, _, mean = kernels.rectangle(self.rows, self.columns, *self.settings, True)
        (r,), (z,) = (map(reference.unit_rows, side) if self.settings[1] else side for side in self.exact)
        weights = torch.softmax(r @ z.mT / self.settings[0], -1)
        yield "neg beside the mean", _difference(neg, reference.rectangle(*self.exact, *self.settings)[0].detach())
        yield "mean", _difference(mean, (weights @ z).detach())

    def pairs(self, kernels):
        negatives = reference.rectangle(*self.exact, *self.settings)[0].detach()
        negatives += torch.randn(negatives.shape, generator=self.generator, dtype=torch.float64)
        negatives.requires_grad_()
        wanted = reference.pairs(*self.exact, *self.settings, negatives)
        sums, slope = kernels.pairs(self.rows, self.columns, *self.settings, negatives.detach())
        yield "pairs", _difference(sums, wanted.detach())
        (g,) = torch.autograd.grad(wanted.sum() + 0 * negatives.nan_to_num(0, 0, 0).sum(), negatives, retain_graph=True)
        yield "slope", _difference(slope, g)
        g_pairs = torch.randn(wanted.shape, generator=self.generator, dtype=torch.float64)
        yield from self.gradients(kernels, [negatives.detach(), g_pairs], [], self.derivative((wanted * g_pairs).sum()))


def _values(tensors):
    return [x.detach() for x in tensors]


def _difference(found, wanted):
    """The largest error, relative to the largest entry. It is infinite if other entries are finite than should be."""
    finite = wanted.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return float("inf")
    error = (found.double() - wanted)[finite].abs()
    return (error.max() / wanted[finite].abs().max().clamp(min=1)).item() if error.numel() else 0.0


if __name__ == "__main__":
    kernels = Kernels(sys.argv[1])
    deviating = [*deviations(kernels, DTYPES), *rectangle_deviations(kernels)]
    print("\n".join(deviating) or "all agree")
    sys.exit(bool(deviating))
