"""Which backend runs: the argument, then TCLR_KERNELS_BACKEND, then the first that serves the device."""

import types

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends
from tclr_kernels.backends import reference


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends that ran, of `first`, `second`, and `broken`, which serves nothing."""
    names = []

    def backend(name, reason=None):
        def forward(*arguments):
            names.append(name)
            return reference.gram(*arguments)

        return types.SimpleNamespace(why_not=lambda device: reason, forward=forward)

    known = {"broken": backend("broken", "it has no wings"), "first": backend("first"), "second": backend("second")}
    monkeypatch.setattr(backends, "BACKENDS", known)
    monkeypatch.delenv("TCLR_KERNELS_BACKEND", raising=False)
    return names


def call(**settings):
    return tk.nt_xent(torch.ones(2, 3), torch.ones(2, 3), **settings)


def test_default_is_the_first_that_is_usable(ran):
    call()
    assert ran == ["first"]


def test_environment_goes_before_the_default_and_the_argument_before_both(ran, monkeypatch):
    monkeypatch.setenv("TCLR_KERNELS_BACKEND", "second")
    call()
    call(backend="first")
    assert ran == ["second", "first"]
    monkeypatch.setenv("TCLR_KERNELS_BACKEND", "")
    call()
    assert ran[2:] == ["first"]


def test_unknown_name_is_an_error_that_lists_the_known_ones(ran, monkeypatch):
    with pytest.raises(ValueError, match="backend: found 'cuda', wanted one of 'broken', 'first', 'second'"):
        call(backend="cuda")
    monkeypatch.setenv("TCLR_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="TCLR_KERNELS_BACKEND: found 'cuda'"):
        call()


def test_named_backend_that_is_not_usable_never_falls_back(ran, monkeypatch):
    with pytest.raises(RuntimeError, match="backend='broken' cannot serve tensors on cpu: it has no wings"):
        call(backend="broken")
    monkeypatch.setenv("TCLR_KERNELS_BACKEND", "broken")
    with pytest.raises(RuntimeError, match="TCLR_KERNELS_BACKEND='broken'"):
        call()
    assert ran == []


def test_available_backends_says_why_not(ran):
    assert tk.available_backends("cpu") == {"broken": "it has no wings", "first": None, "second": None}
    assert tk.available_backends() == tk.available_backends(torch.device("cpu"))


def test_the_reference_serves_every_device_and_is_last():
    names = list(backends.BACKENDS)
    assert names[-1] == "reference" and tk.available_backends("meta")["reference"] is None


def test_on_a_gpu_few_rows_go_to_native_and_many_to_triton(monkeypatch):
    def usable(*names):
        reasons = {name: None if name in names else "not here" for name in ("native", "triton", "reference")}
        known = {name: types.SimpleNamespace(why_not=lambda device, r=r: r) for name, r in reasons.items()}
        monkeypatch.setattr(backends, "BACKENDS", known)
        return [backends.choose(None, torch.device("cuda"), *size) for size in ((320, 128), (10**6, 128), (8, 4096))]

    monkeypatch.delenv("TCLR_KERNELS_BACKEND", raising=False)
    for dtype, chosen in (torch.float32, "triton"), (torch.float16, "native"):
        usable("native", "triton", "reference")
        assert backends.choose(None, torch.device("cuda"), 4096, 128, dtype) == chosen
    assert usable("native", "triton", "reference") == ["native", "triton", "triton"]
    assert usable("native", "reference") == ["native"] * 3
    assert usable("triton", "reference") == ["triton"] * 3
    assert usable("reference") == ["reference"] * 3
