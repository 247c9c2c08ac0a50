"""Makes this machine look as if it had a GPU, to every Python process that has this folder on its PYTHONPATH.

PyTorch reports a Hopper GPU whose tensors are the CPU's. Triton's just-in-time compiler runs its front end for each new
variant of a kernel; launches do nothing, so results are whatever was in memory. Each variant that is launched goes to
the file REHEARSAL, as a line of step, job and variant, separated by tabs. See test_rehearsal.py.
"""

import contextlib
import hashlib
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

from benchmarks import baselines, rows  # noqa: E402
from tclr_kernels import backends  # noqa: E402
from tests import standin  # noqa: E402

WAIT = torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__float__
LARGE = 10_000_000  # elements; larger tensors are not filled, and larger products not computed, to save time
capturing = forbidden = False  # whether a graph is captured, and whether waiting for the device is an error


class Mode(TorchFunctionMode):
    """Makes functions that ask for a tensor on the GPU return one on the CPU."""

    def __torch_function__(self, function, types, arguments=(), settings=None):
        settings = dict(settings or {})
        if str(settings.get("device", "")).startswith("cuda"):
            settings["device"] = "cpu"
        if function in WAIT and (capturing or forbidden):
            raise RuntimeError(f"{function.__name__} waits for the device")
        if function is torch.Tensor.cuda:
            return arguments[0]
        if function is torch.randn and torch.Size(sizes_of(arguments)).numel() > LARGE:
            settings.pop("generator", None)
            return torch.empty(*arguments, **settings)
        if function is torch.mm and "out" in settings and settings["out"].numel() > LARGE:
            return settings["out"]
        return function(*arguments, **settings)


def sizes_of(arguments):
    return arguments if isinstance(arguments[0], int) else arguments[0]


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


class Event:
    def __init__(self, enable_timing=False):
        pass

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, later):
        return 1000 * (later.time - self.time)


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


@contextlib.contextmanager
def graph(_):
    """Notes that a graph is captured. Compiling is then an error, since a GPU cannot load a kernel during a capture."""
    global capturing
    capturing = True
    try:
        yield
    finally:
        capturing = False


class Profile:
    """In the place of torch.profiler.profile: it has no events."""

    def __init__(self, activities):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def events(self):
        return []

    key_averages = events


def set_sync_debug_mode(mode):
    global forbidden
    forbidden = mode == "error"


def nothing(*arguments, **settings):
    return None


def shapes_are_equal(found, wanted, **_):
    """In the place of torch.testing.assert_close: the values are whatever was in memory."""
    assert_close(tree_map(torch.zeros_like, found), tree_map(torch.zeros_like, wanted))


class Launches:
    """Replaces the stand-in driver's list of launches. It writes each variant that a job launches to a file, once."""

    def __init__(self):
        self.job, self.seen = 0, set()

    def append(self, variant):
        job = os.environ.get("PYTEST_CURRENT_TEST", f"{os.getpid()}.{self.job}").removesuffix(" (call)")
        line = "\t".join((os.environ.get("GPU_STEP", ""), job, variant))
        if line not in self.seen:
            self.seen.add(line)
            with open(os.environ["REHEARSAL"], "a") as file:
                file.write(f"{line}\n")


class Compiler(standin.Compiler):
    """Gives a variant the same name in all processes, and runs the front end if it is not in the cache."""

    def compile(self, fn, key, *others):
        if capturing:
            raise RuntimeError(f"{fn.__name__} is compiled while a graph is captured")
        variant = f"{fn.__name__} {hashlib.sha256(str(key).encode()).hexdigest()[:16]}"
        marker = Path(os.environ["TRITON_CACHE_DIR"], variant)  # an empty file: launches need no binary
        if marker.exists():
            _, device, *_ = others
            fn.device_caches[device][0][key] = kernel = standin._NotCompiled(self.launched, variant)
            return kernel
        kernel = super().compile(fn, key, *others)
        kernel.name = variant
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        return kernel


class Forever:
    """In the place of pytest's monkeypatch: what it sets is never undone."""

    setattr = staticmethod(setattr)


def native_does_nothing(native):
    """Replaces the compiled kernels, which would run on the CPU here and take minutes for a large problem."""

    def forward(sets, tau, normalize, cross):
        return backends.triton._empty_forward(sets, tau, 0.0, normalize, cross)

    def backward(sets, tau, normalize, cross, neg, pos, *gradients):
        dx, zdz = backends.triton._empty_backward(sets, tau, 0.0, normalize, cross, neg, pos, *gradients)
        return list(dx.unbind(0)), zdz

    native.forward, native.backward = forward, backward


def install():
    launches = Launches()
    standin.install(Forever)
    Compiler(launches, whole=False).install(Forever)
    native_does_nothing(backends.native)
    choose, attempted = backends.choose, rows.attempted
    backends.choose = lambda backend, device, *problem, **more: choose(backend, torch.device("cuda"), *problem, **more)

    def counted(*arguments):
        launches.job += 1
        return attempted(*arguments)

    rows.attempted = counted
    release = baselines.release  # it takes minutes on a CPU for many videos
    baselines.release = lambda *sets: release(*(z[:, :8] for z in sets[:3]), sets[3])
    for name in "nt_xent", "clip":  # these take minutes for many rows
        loss = getattr(baselines, name)
        setattr(baselines, name, lambda a, b, tau, loss=loss: loss(*(z[: min(len(z), 64)] for z in (a, b)), tau))
    torch.profiler.profile = Profile
    torch.compile = lambda function, **settings: function  # it would look into PyTorch's own CUDA library
    torch.testing.assert_close = shapes_are_equal
    torch.version.cuda = torch.version.cuda or "13.0"
    torch.Generator = Generator
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30)
    for name, value in dict(
        Event=Event,
        Stream=Stream,
        CUDAGraph=Graph,
        graph=graph,
        stream=contextlib.nullcontext,
        current_stream=Stream,
        set_sync_debug_mode=set_sync_debug_mode,
        is_available=lambda: True,
        is_current_stream_capturing=lambda: capturing,
        get_device_name=lambda: "stand-in",
        get_device_capability=lambda device=None: (9, 0),
        get_device_properties=lambda device=None: properties,
        memory_allocated=lambda: 0,
        max_memory_allocated=lambda: 0,
    ).items():
        setattr(torch.cuda, name, value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, nothing)
    Mode().__enter__()


assert_close = torch.testing.assert_close
install()
