"""A stand-in for Triton's GPU driver, so that Triton's own just-in-time compiler runs on a machine without a GPU.

A call does everything that it does on a GPU: the launcher specialises the arguments (an int equal to 1 becomes a
constant, and it is noted whether an int or a pointer is divisible by 16), and each new variant of a kernel is compiled,
by Triton's front end alone or down to a cubin. Only the launch itself does nothing, so no value is computed.
"""

import collections
import contextlib
import functools
import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tclr_kernels import backends, symmetric
from tclr_kernels.triton import large, sets, wide

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}  # compute capability -> KiB of shared memory per thread block
TABLES = {80: "ampere", 89: "compact", 90: "hopper", 100: "blackwell"}  # compute capability -> table in tiles.py
PROCESSORS = 132


class Driver:
    """The functions of a driver that Triton calls. The names of launched kernels are added to `launched`."""

    numbers = itertools.count(1000)  # a new device number each time, so that Triton finds no kernel of another test

    def __init__(self, capability):
        self.capability, self.number, self.launched = capability, next(self.numbers), []
        self.utils, self.launcher_cls = self, functools.partial(_Launcher, self.launched)

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device=0):
        return divmod(self.capability, 10)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_properties(self, device):
        return dict(
            max_shared_mem=SHARED_KIB[self.capability] * 1024,
            multiprocessor_count=PROCESSORS,
            max_num_regs=65536,
            warpSize=32,
        )

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, largest number of threads

    def unload_module(self, module):
        pass


class _Launcher:
    def __init__(self, launched, source, metadata):
        self.launched, self.name = launched, source.fn.__name__

    def __call__(self, *arguments):
        metadata, enter, _ = arguments[6:9]
        if enter is not None:
            enter(metadata)
        self.launched.append(self.name)


class _NotCompiled:
    """Stands for a compiled kernel where only the front end has run."""

    packed_metadata = function = None

    def __init__(self, launched, name):
        self.launched, self.name = launched, name

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        self.launched.append(self.name)


class Compiler:
    """Compiles, and counts the variants of each kernel. whole: down to a cubin, otherwise only by the front end."""

    def __init__(self, launched, whole):
        self.launched, self.whole = launched, whole
        self.variants, self.kernels = collections.Counter(), []
        self.to_the_end = JITFunction._do_compile

    def install(self, monkeypatch):
        compiler = self
        monkeypatch.setattr(JITFunction, "_do_compile", lambda fn, *arguments: compiler.compile(fn, *arguments))

    def compile(self, fn, key, signature, device, constants, options, attributes, *others):
        self.variants[fn.__name__] += 1
        if self.whole:
            kernel = self.to_the_end(fn, key, signature, device, constants, options, attributes, *others)
            self.kernels.append(kernel)
            return kernel
        cache, _, target, backend, _ = fn.device_caches[device]
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source = ASTSource(fn, signature, constants, attributes)
        functions = backend.get_codegen_implementation(options)
        source.make_ir(target, options, functions, backend.get_module_map(), context)
        cache[key] = kernel = _NotCompiled(self.launched, fn.__name__)
        return kernel


class Device:
    """Gives a test the launches, the variants compiled so far, and the ATen operations of a call."""

    def __init__(self, driver, compiler):
        self.launched, self.compiler = driver.launched, compiler

    @property
    def variants(self):
        return self.compiler.variants

    @contextlib.contextmanager
    def counted(self):
        """The launches and the ATen operations of what runs within, as two lists of names."""
        before = len(self.launched)
        launches, operations = [], _Operations()
        with operations:
            yield launches, operations.names
        launches += self.launched[before:]


NO_KERNEL = """
    view _unsafe_view _reshape_alias as_strided expand select slice diagonal unfold squeeze unsqueeze permute transpose
    t mT unbind split split_with_sizes detach alias lift_fresh promote_types empty empty_like empty_strided new_empty
    new_empty_strided
"""


class _Operations(TorchDispatchMode):
    """ATen operations that start a kernel of their own on a GPU; views and empty tensors do not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        namespace, name = function.name().split("::")
        name = name.split(".")[0]
        if namespace == backends.triton.NAMESPACE:
            with self:  # the implementation is called directly, since the dispatcher would call this method again
                implementation = getattr(backends.triton, f"_{name.removeprefix('gram_')}")
                return implementation(*arguments, **(settings or {}))
        result = function(*arguments, **(settings or {}))
        if namespace == "aten" and name not in NO_KERNEL.split() and result is not arguments[0]:
            self.names.append(name)
        return result


def _product(left, right, dtype, out=None):
    """In the place of a matrix product: allocates the result only, since values do not matter here."""
    return left.new_empty(len(left), left.shape[1], right.shape[2], dtype=dtype) if out is None else out


def install(monkeypatch, capability=90, whole=False):
    """Makes CPU tensors those of a GPU for the Triton backend, until monkeypatch undoes it; returns the Device."""
    standin = Driver(capability)
    compiler = Compiler(standin.launched, whole)
    monkeypatch.setattr(driver, "_active", standin)
    monkeypatch.setattr(large, "table_of", lambda x: (TABLES[capability], PROCESSORS))
    monkeypatch.setattr(backends.triton, "why_not", lambda device: None)
    monkeypatch.setattr(symmetric, "ORDERED", ["cpu"])
    monkeypatch.setattr(sets, "_held", {})
    monkeypatch.setattr(wide, "product", _product)
    compiler.install(monkeypatch)
    return Device(standin, compiler)
