"""Checks the installed package here, in less than a minute: python -m tclr_kernels.selftest [--device cpu]"""

import argparse
import contextlib
import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import tclr_kernels as tk

from .backends import missing
from .info import devices


def _halves(z: Tensor) -> Tensor:
    """Labels, each of which two neighbouring rows share: 0, 0, 1, 1, ..."""
    return torch.arange(len(z), device=z.device) // 2


Check = Callable[[str, str], None]  # called with a backend and a device
Shapes = list[tuple[int, ...]]
# name -> (function of the tensors, their shapes for B rows or videos of width D)
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[int, int], Shapes]]] = {
    "nt_xent": (tk.nt_xent, lambda B, D: [(B, D), (B, D)]),
    "clip_loss": (tk.clip_loss, lambda B, D: [(B, D), (B, D)]),
    "info_nce": (
        lambda q, k, n, **s: tk.info_nce(q, k, negatives=n, in_batch=False, **s),
        lambda B, D: [(B, D), (B, D), (2 * B + 1, D)],
    ),
    "nt_xent with labels and negatives": (
        lambda a, b, n, **s: tk.nt_xent(a, b, labels=_halves(a), negatives=n, **s),
        lambda B, D: [(B, D), (B, D), (2 * B + 1, D)],
    ),
    "sup_con": (lambda z, **s: tk.sup_con(z, _halves(z), **s), lambda B, D: [(B + 1, D)]),
    "instance_contrastive": (tk.instance_contrastive, lambda B, D: [(5, B, D)]),
    "local_local": (tk.local_local, lambda B, D: [(B, 4, D), (B, 4, D)]),
    "global_local": (tk.global_local, lambda B, D: [(B, 4, D), (B, 4, D)]),
    "tclr": (lambda *t, **k: tk.tclr(*t, **k).total, lambda B, D: [(2, B, D), (2, B, 4, D), (2, B, 4, D)]),
    "tclr release": (
        lambda *t, **k: tk.tclr(*t, form="release", **k).total,
        lambda B, D: [(2, B, D), (2, B, 4, D), (2, B, 4, D)],
    ),
}
SIZES = (2, 1), (3, 16), (17, 33), (257, 64)  # (B, D): from a part of a tile to several tiles, the last one not full
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class Failed(Exception):
    """A check failed; the message is one line."""


def expect(holds: bool | Tensor, message: str) -> None:
    if not holds:
        raise Failed(message)


def raises(
    kinds: type[Exception] | tuple[type[Exception], ...],
    words: Sequence[str],
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Expects an error of one of the given types, whose message contains all the words."""
    try:
        function(*args, **kwargs)
    except kinds as error:
        missing = [word for word in words if word not in str(error)]
        expect(not missing, f"the error message does not contain {missing}: {error}")
    else:
        raise Failed(f"expected an error whose message contains {words}, got none")


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable within a `with` block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def views(shapes: Shapes, dtype: torch.dtype, device: str, scale: float = 1.0, noise: float = 1.0) -> list[Tensor]:
    """Random tensors, the same on every run. Tensors of one shape are correlated, as views of the same videos are."""
    made = []
    for i, shape in enumerate(shapes):
        common = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        own = torch.randn(shape, generator=torch.Generator().manual_seed(i + 1), dtype=torch.float64)
        made.append((scale * (common + noise * own)).to(device, dtype))
    return made


def run(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], **settings: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of the inputs, and its gradients."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*inputs, **settings)
    return loss.detach(), torch.autograd.grad(loss.sum(), inputs)


def compare(name: str, inputs: Sequence[Tensor], settings: dict[str, Any], backend: str) -> None:
    """Expects the loss and gradients that the reference computes in float64 from the same rounded inputs."""
    function, dtype, tau = LOSSES[name][0], inputs[0].dtype, settings.get("temperature", 0.1)
    loss, grads = run(function, inputs, backend=backend, **settings)
    want, want_grads = run(function, [x.double() for x in inputs], backend="reference", **settings)
    exact = dtype == torch.float64
    allowed = (1e-11 if exact else 1e-5 * max(1, 0.1 / tau)) * want.abs().clamp(min=1)
    where = f"{name} {list(inputs[0].shape)} {str(dtype)[6:]} {settings}"
    expect(bool(((loss.double() - want).abs() <= allowed).all()), f"{where}: loss {loss} should be {want}")
    for got, wanted in zip(grads, want_grads, strict=True):
        finfo, largest = torch.finfo(dtype), wanted.abs().max()
        allowed = (TOLERANCE[dtype] * max(1, 0.01 / tau) + finfo.eps) * largest + finfo.smallest_normal * finfo.eps
        worst = (got.double() - wanted).abs().max()
        expect(bool(worst <= allowed), f"{where}: gradient off by {worst:.1e}, its largest entry is {largest:.1e}")


def parity(dtype: torch.dtype, backend: str, device: str) -> None:
    """Every loss agrees with the reference at small and large sizes, and nt_xent at high and low temperatures."""
    for name, (B, D) in itertools.product(LOSSES, SIZES):
        shapes = LOSSES[name][1](B if B < 100 or name in ("nt_xent", "clip_loss") else 40, D)
        compare(name, views(shapes, dtype, device), {}, backend)
    for tau in (1.0, 0.05, 0.01):
        shapes = LOSSES["nt_xent"][1](31, 64)
        compare("nt_xent", views(shapes, dtype, device, noise=0.3), dict(temperature=tau), backend)


def gradcheck(backend: str, device: str) -> None:
    """The gradients of the inputs and of the temperature equal finite differences."""
    for name, (function, shapes) in LOSSES.items():
        inputs = [x.requires_grad_() for x in views(shapes(3, 5), torch.float64, device)]
        tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        call = functools.partial(_with_temperature, function, backend)
        holds = torch.autograd.gradcheck(call, (tau, *inputs), raise_exception=False, fast_mode=True)
        expect(holds, f"{name}: the gradients differ from finite differences")


def _with_temperature(function: Callable[..., Tensor], backend: str, tau: Tensor, *inputs: Tensor) -> Tensor:
    return function(*inputs, temperature=tau, backend=backend)


def zero_row(backend: str, device: str) -> None:
    """A row of zeros has gradient 0, and everything else stays finite."""
    for dtype in (torch.float32, torch.float16):
        a, b = views([(6, 16)] * 2, dtype, device)
        a[2] = 0
        loss, (da, db) = run(tk.nt_xent, [a, b], backend=backend)
        expect(bool((da[2] == 0).all()), f"{dtype}: the zero row's gradient is {da[2].abs().max()}")
        expect(bool(torch.isfinite(torch.cat([da, db])).all() and torch.isfinite(loss)), f"{dtype}: not finite")


def scales(backend: str, device: str) -> None:
    """Rows scaled by 1e-38 to 1e37 give the same loss."""
    for scale in (1e-38, 1e-30, 1e-19, 1e19, 1e30, 1e37):
        inputs = views([(9, 16)] * 2, torch.float32, device, scale)
        loss = tk.nt_xent(*inputs, backend=backend).double()
        want = tk.nt_xent(*[x.double() for x in inputs], backend="reference")
        expect(abs(loss - want) < 1e-5, f"scale {scale:g}: loss {loss:.6f} should be {want:.6f}")
        if 1e-30 <= scale <= 1e30:
            compare("nt_xent", inputs, {}, backend)


def nan(backend: str, device: str) -> None:
    """NaN and Inf affect only the loss and gradients of their own video. TCLR_KERNELS_CHECK=1 names the row."""
    for bad in (math.nan, math.inf):
        x1, x2 = views([(3, 4, 8)] * 2, torch.float32, device)
        x1[1, 2, 3] = bad
        loss, (d1, d2) = run(tk.local_local, [x1, x2], backend=backend, reduction="none")
        expect(loss.isnan().tolist() == [False, True, False], f"{bad}: loss of each video {loss.tolist()}")
        finite = [bool(torch.isfinite(torch.stack([d1[i], d2[i]])).all()) for i in range(3)]
        expect(finite == [True, False, True], f"{bad}: finite gradients of each video {finite}")
        with environment("TCLR_KERNELS_CHECK", "1"):
            raises(ValueError, ["x1", "[1, 2]"], tk.local_local, x1, x2, backend=backend)


def dtypes(backend: str, device: str) -> None:
    """The loss is float32 (float64 for float64 inputs); gradients have the dtype of the inputs."""
    for dtype in TOLERANCE:
        loss, grads = run(tk.nt_xent, views([(5, 8)] * 2, dtype, device), backend=backend)
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        expect(loss.dtype == wanted and grads[0].dtype == dtype, f"{dtype}: loss {loss.dtype}, grad {grads[0].dtype}")


def temperature(backend: str, device: str) -> None:
    """A temperature that is a tensor gives the same loss, and has a gradient; a wrong one is an error that names it."""
    a, b = views([(5, 8)] * 2, torch.float32, device)
    tau = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    loss = tk.nt_xent(a, b, temperature=tau, backend=backend)
    loss.backward()
    expect(loss.dtype == torch.float32, f"a float64 temperature made the loss {loss.dtype}")
    expect(abs(loss - tk.nt_xent(a, b, temperature=0.25, backend=backend)) < 1e-6, "tensor and float differ")
    expect(tau.grad.dtype == torch.float64 and abs(tau.grad) > 0, f"gradient of the temperature: {tau.grad}")
    for wrong in (0.0, -0.1, math.nan, math.inf, "0.1", None, True, torch.ones(2)):
        raises((ValueError, TypeError), ["temperature"], tk.nt_xent, a, b, temperature=wrong, backend=backend)


def empty(backend: str, device: str) -> None:
    """B = 0, T = 0 and D = 0 are errors that name the argument."""
    for shape in ((0, 8), (3, 0)):
        raises(ValueError, ["a"], tk.nt_xent, *views([shape] * 2, torch.float32, device), backend=backend)
    for shape in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
        x = torch.zeros(shape, device=device)
        raises(ValueError, ["x1"], tk.local_local, x, x, backend=backend)


def one_row(backend: str, device: str) -> None:
    """With B = 1, loss and gradients are exactly 0."""
    for function, dtype in itertools.product((tk.nt_xent, tk.clip_loss), TOLERANCE):
        loss, grads = run(function, views([(1, 8)] * 2, dtype, device), backend=backend)
        expect(loss == 0 and all((g == 0).all() for g in grads), f"{function.__name__} {dtype}: loss {loss}")


def misuse(backend: str, device: str) -> None:
    """Different dtypes, devices, shapes or types are errors that name both arguments."""
    a, b = views([(5, 8)] * 2, torch.float32, device)
    for wrong, words in (
        (b.double(), ["float32", "float64"]),
        (b.to("meta"), ["meta", str(a.device)]),
        (b[:4], ["[5, 8]", "[4, 8]"]),
        (b[None, None], ["b"]),
        (b.long(), ["b", "int64"]),
        (b.to(torch.complex64), ["b", "complex64"]),
        (b.to_sparse(), ["b", "sparse"]),
        (b.tolist(), ["b", "list"]),
        (None, ["b", "None"]),
    ):
        raises((ValueError, TypeError), words, tk.nt_xent, a, wrong, backend=backend)


def deterministic(backend: str, device: str) -> None:
    """Every run gives the same bits, and on the CPU any number of threads does."""
    inputs = views([(300, 64)] * 2, torch.float32, device)
    threads = torch.get_num_threads()
    first = run(tk.nt_xent, inputs, backend=backend)
    try:
        for count in {threads, 1, 3}:
            torch.set_num_threads(count)
            again = run(tk.nt_xent, inputs, backend=backend)
            same = torch.equal(first[0], again[0]) and all(map(torch.equal, first[1], again[1]))
            expect(same or (backend == "reference" and count != threads), f"the bits differ with {count} threads")
    finally:
        torch.set_num_threads(threads)


def second_derivative(backend: str, device: str) -> None:
    """Second derivatives are exact with the reference, and an error that names it with other backends."""
    a, b = (x.requires_grad_() for x in views([(4, 3)] * 2, torch.float64, device))
    call = functools.partial(tk.nt_xent, temperature=0.5, backend=backend)
    if backend == "reference":
        message = "the second derivatives differ from finite differences"
        expect(torch.autograd.gradgradcheck(call, (a, b), raise_exception=False, fast_mode=True), message)
        return
    (grad,) = torch.autograd.grad(call(a, b), a, create_graph=True)
    raises(RuntimeError, ["reference"], grad.sum().backward)


CHECKS: dict[str, Check] = {
    **{f"results in {str(dtype)[6:]}": functools.partial(parity, dtype) for dtype in TOLERANCE},
    "gradcheck": gradcheck,
    "row of zeros": zero_row,
    "tiny and huge rows": scales,
    "NaN and Inf": nan,
    "dtypes": dtypes,
    "temperature": temperature,
    "empty inputs": empty,
    "a single row": one_row,
    "wrong arguments": misuse,
    "deterministic": deterministic,
    "second derivative": second_derivative,
}


def outcome(check: Check, backend: str, device: str) -> str | None:
    """None if the check passes, else a line that says what failed."""
    try:
        check(backend, device)
    except Failed as failed:
        return str(failed)
    except Exception as error:  # one failing check must not stop the others
        return f"{type(error).__name__}: {error}"
    return None


def targets(wanted: Iterable[str]) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """The (device, backend) pairs to check on these devices, and lines about the backends that cannot run there.

    Of these lines, the second list is about backends that this installation should have.
    """
    usable, unusable, absent = [], [], []
    for device in wanted:
        due = missing(torch.device(device))
        for backend, reason in tk.available_backends(device).items():
            if reason is None:
                usable.append((device, backend))
            else:
                (absent if backend in due else unusable).append(f"{backend} on {device}: {reason}")
    return usable, unusable, absent


def colour(text: str, code: int) -> str:
    plain = not sys.stdout.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\033[{code}m{text}\033[0m"


def cell(reason: str | None, width: int) -> str:
    return colour(f"{'ok' if reason is None else 'FAIL':<{width}}", 32 if reason is None else 31)


def table(usable: Sequence[tuple[str, str]]) -> list[str]:
    """Prints a row for each check, with a column for each (device, backend). Returns the failures, a line each."""
    width = max(len(f"{device}/{backend}") for device, backend in usable) + 2
    print(f"{'':<24}" + "".join(f"{f'{device}/{backend}':<{width}}" for device, backend in usable))
    failures = []
    for name, check in CHECKS.items():
        print(f"{name:<24}", end="", flush=True)
        for device, backend in usable:
            reason = outcome(check, backend, device)
            print(cell(reason, width), end="", flush=True)
            failures += [] if reason is None else [f"{name}, {backend} on {device}: {reason}"]
        print()
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tclr_kernels.selftest", description=__doc__.split(":")[0])
    parser.add_argument(
        "--device", action="append", help="check this device; default: the CPU, and CUDA if there is a GPU"
    )
    parser.add_argument(
        "--allow-reference", action="store_true", help="do not fail if kernels are missing and the reference is used"
    )
    options = parser.parse_args(arguments)
    start = time.monotonic()
    usable, unusable, absent = targets(options.device or [d for d in devices() if d in ("cpu", "cuda")])
    failures = table(usable)
    for line in unusable:
        print(f"not checked: {line}")
    for line in absent:
        print(colour(f"missing: {line}", 33 if options.allow_reference else 31))
    if absent and not options.allow_reference:
        failures.append("kernels that should be installed are missing (--allow-reference accepts this)")
    for line in failures:
        print(colour(line, 31))
    verdict = f"{len(failures)} failed" if failures else "all good"
    print(f"{verdict}: tclr-kernels {tk.__version__}, torch {torch.__version__}, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
