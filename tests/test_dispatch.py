"""The choice of the backend: the argument, then TCLR_KERNELS_BACKEND, then the first that works on the device."""

import types

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends, checks
from tclr_kernels.backends import cuda, reference, triton


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends that have run. They are `broken`, which never works, `first` and `second`."""
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


def test_the_default_is_the_first_usable_backend(ran):
    call()
    assert ran == ["first"]


def test_the_argument_overrides_the_environment_which_overrides_the_default(ran, monkeypatch):
    monkeypatch.setenv("TCLR_KERNELS_BACKEND", "second")
    call()
    call(backend="first")
    assert ran == ["second", "first"]
    monkeypatch.setenv("TCLR_KERNELS_BACKEND", "")
    call()
    assert ran[2:] == ["first"]


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones(ran, monkeypatch):
    with pytest.raises(ValueError, match="backend: found 'cuda', wanted one of 'broken', 'first', 'second'"):
        call(backend="cuda")
    monkeypatch.setenv("TCLR_KERNELS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="TCLR_KERNELS_BACKEND: found 'cuda'"):
        call()


def test_a_named_backend_that_cannot_run_is_an_error_without_fallback(ran, monkeypatch):
    with pytest.raises(RuntimeError, match="backend='broken' cannot serve tensors on cpu: it has no wings"):
        call(backend="broken")
    monkeypatch.setenv("TCLR_KERNELS_BACKEND", "broken")
    with pytest.raises(RuntimeError, match="TCLR_KERNELS_BACKEND='broken'"):
        call()
    assert ran == []


def test_available_backends_gives_the_reason_why_a_backend_cannot_run(ran):
    assert tk.available_backends("cpu") == {"broken": "it has no wings", "first": None, "second": None}
    assert tk.available_backends() == tk.available_backends(torch.device("cpu"))


def test_the_reference_runs_on_every_device_and_is_last():
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


# ---- simulated GPUs


@pytest.fixture
def gpu(monkeypatch):
    """Makes PyTorch say that it has a CUDA device of a compute capability, or a HIP device."""

    def install(capability=(9, 0), hip=None):
        cuda.why_not.cache_clear()
        backends._is_hopper.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(triton, "_interpreted", False)
        monkeypatch.setattr(triton, "_missing", None)
        return torch.device("cuda", 0)

    yield install
    cuda.why_not.cache_clear()
    backends._is_hopper.cache_clear()


def test_normalised_half_precision_rows_go_to_native_on_hopper(gpu, monkeypatch):
    usable = types.SimpleNamespace(why_not=lambda device: None)
    monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(("native", "triton", "reference"), usable))
    monkeypatch.delenv("TCLR_KERNELS_BACKEND", raising=False)

    def chosen(device, D, dtype=torch.bfloat16, unit_rows=True):
        return backends.choose(None, device, 10**6, D, dtype, unit_rows)

    monkeypatch.setattr(backends.native, "cuda_targets", lambda: "8.0 9.0a")
    hopper = gpu((9, 0))
    assert [chosen(hopper, D) for D in (64, 65, 256, 257)] == ["triton", "native", "native", "triton"]
    assert chosen(hopper, 128, unit_rows=False) == chosen(hopper, 128, torch.float32) == "triton"
    for other in ((8, 0), (10, 0)):
        assert chosen(gpu(other), 128) == "triton"
    monkeypatch.setattr(backends.native, "cuda_targets", lambda: "8.0 10.0+PTX")  # built without the kernels for Hopper
    assert chosen(gpu((9, 0)), 128) == "triton"


def test_the_reason_names_the_capability_of_a_gpu_that_is_too_old(gpu):
    device = gpu((7, 5))
    assert tk.available_backends(device)["triton"] == "the device has compute capability 7.5: wanted 8.0 or newer"
    assert backends.choose(None, device, 10**6, 128) == "reference"
    with pytest.raises(RuntimeError, match="backend='triton' cannot serve tensors on cuda:0: .* capability 7.5"):
        backends.choose("triton", device)


def test_triton_accepts_new_enough_nvidia_gpus_and_any_amd_gpu(gpu):
    assert triton.why_not(gpu((8, 0))) is None
    assert triton.why_not(gpu((6, 0), hip="6.4")) is None  # AMD's version numbers are not compute capabilities


def test_a_missing_gpu_is_a_reason_against_triton():
    if not torch.cuda.is_available():
        assert tk.available_backends("cuda")["triton"] is not None


@pytest.mark.parametrize("rows", [80, 10**6])
def test_choosing_the_backend_of_a_gpu_causes_no_graph_break(rows, monkeypatch):
    """torch.compile must not trace how a backend looks for files and devices."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    monkeypatch.setattr(triton, "_interpreted", False)
    monkeypatch.delenv("TCLR_KERNELS_BACKEND", raising=False)

    @torch.compile(fullgraph=True, backend="eager")
    def twice(x, named):
        return x + len(backends.choose(named, device, rows, 128, x.dtype))

    torch._dynamo.reset()
    for named in (None, "triton"):
        wanted = backends.choose(named, device, rows, 128, torch.float32)
        assert twice(torch.zeros(()), named) == len(wanted)


def test_a_cpu_temperature_during_the_capture_of_a_cuda_graph_is_an_error(gpu, monkeypatch):
    device = gpu()
    tau = torch.tensor(0.1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert torch.equal(checks.temperature(tau, device), tau)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert checks.temperature(0.1, device) == 0.1 and torch.equal(checks.temperature(tau, torch.device("cpu")), tau)
    with pytest.raises(ValueError, match="temperature: found a tensor on the CPU while a CUDA graph is captured"):
        checks.temperature(tau, device)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("__version__ = '3.6.0'", None),
        ('__version__ = "3.10.0+rocm7.0"', None),
        ("__version__ = '3.5.1'", "Triton 3.5.1 is too old: wanted 3.6 or newer"),
        ("", "Triton of unknown version is too old: wanted 3.6 or newer"),
    ],
)
def test_triton_is_found_by_its_module_and_its_version_is_checked(line, reason, tmp_path, monkeypatch):
    """Some packages that contain the module have another name, such as pytorch-triton."""
    (tmp_path / "__init__.py").write_text(f"# a comment\n{line}\n")
    found = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: found if name == "triton" else None)
    assert triton._unusable() == reason
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert triton._unusable() == "Triton is not installed"
