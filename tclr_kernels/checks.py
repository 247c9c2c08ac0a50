"""Checks of the arguments of public functions. Each error names the argument, what was found and what is wanted."""

import math
import numbers
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

PLAIN = torch.Tensor, torch.nn.Parameter  # without subclasses, which may redefine any operation
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


def embeddings(dims: str, empty: bool = False, /, **tensors: Tensor) -> list[Tensor]:
    """The tensors, checked to be embeddings of one shape, dtype and device.

    dims: the names of the dimensions, such as "... N D", where "..." stands for any number of leading ones.
    empty: whether a tensor may have no rows, as on one of many processes.
    """
    return _alike(dims, tensors, empty)


def _alike(dims: str, tensors: Mapping[str, Tensor], empty: bool = False) -> list[Tensor]:
    names, check_values = dims.split(), _check_values()
    if not check_values and _at_a_glance(names, list(tensors.values())):
        return list(tensors.values())
    for name, x in tensors.items():
        _embedding(name, x, names, check_values, empty)
    (first, a), *others = tensors.items()
    for name, x in others:
        _one_device(first, a, name, x)
        if x.shape != a.shape:
            raise ValueError(f"{first} has shape {list(a.shape)} and {name} {list(x.shape)}: wanted the same shape")
    return saveable(*same_dtype(**tensors))


def _at_a_glance(dims: Sequence[str], tensors: Sequence[object]) -> bool:
    """Whether the tensors pass all checks, found out quickly: all single checks take as long as a small loss."""
    if torch.compiler.is_compiling():
        return False
    shape = dtype = device = None
    for x in tensors:
        if type(x) not in PLAIN or x.layout is not torch.strided or x.is_inference():
            return False
        if shape is None:
            shape, dtype, device = x.shape, x.dtype, x.device
        elif x.shape != shape or x.dtype is not dtype or x.device != device:
            return False
    fits = len(shape) > len(dims) - 2 if dims[0] == "..." else len(shape) == len(dims)
    return fits and 0 not in shape and dtype in DTYPES


def _one_device(first: str, a: Tensor, name: str, x: Tensor) -> None:
    if x.device != a.device:
        raise ValueError(f"{first} is on {a.device} and {name} on {x.device}: wanted one device")


def saveable(*tensors: Tensor) -> list[Tensor]:
    """The tensors, with copies of those made in inference mode, which autograd cannot save for the backward pass.

    torch.compile cannot ask a tensor how it was made; there, PyTorch's own error says what to do.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return list(tensors)
    return [x.clone() if x.is_inference() else x for x in tensors]


def sets(given: Sequence[Tensor]) -> list[Tensor]:
    """The sets of the operation: V >= 1 tensors [G, N, D] of one shape, dtype and device. They may be empty."""
    if isinstance(given, torch.Tensor) or not isinstance(given, Sequence) or not given:
        found = f"a tensor of shape {list(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
        raise TypeError(f"sets: found {found}, wanted a list or tuple of at least one tensor [G, N, D]")
    return _alike("G N D", {f"sets[{a}]": x for a, x in enumerate(given)}, empty=True)


def sides(empty: bool = False, /, **tensors: Tensor) -> list[Tensor]:
    """The sides of a rectangle: rows [..., n, D], and columns [K, D] or [..., K, D] with the same leading dimensions.

    empty: whether there may be no rows or columns, as on one of many processes.
    """
    check_values = _check_values()
    for name, x in tensors.items():
        _embedding(name, x, ["...", "N", "D"], check_values, empty)
    (first, rows), (second, columns) = tensors.items()
    _one_device(first, rows, second, columns)
    if columns.shape[-1] != rows.shape[-1] or (columns.dim() > 2 and columns.shape[:-2] != rows.shape[:-2]):
        leading = list(rows.shape[:-2])
        wanted = f"[K, {rows.shape[-1]}]" + (
            f" or [{', '.join(map(str, leading))}, K, {rows.shape[-1]}]" * bool(leading)
        )
        raise ValueError(
            f"{second}: found shape {list(columns.shape)}, wanted {wanted} beside {first} of shape {list(rows.shape)}"
        )
    return saveable(*same_dtype(**tensors))


def queued(keys: Tensor, queue: Tensor, empty: bool = False) -> Tensor:
    """Checks new rows for a queue [size, D]: they are [..., n, D], of any dtype. empty: as for `embeddings`."""
    _embedding("keys", keys, ["...", "n", "D"], _check_values(), empty)
    _one_device("the queue", queue, "keys", keys)
    if keys.shape[-1] != queue.shape[-1]:
        raise ValueError(f"keys: found shape {list(keys.shape)}, wanted [..., n, {queue.shape[-1]}]")
    return keys


def stacked(name: str, value: Tensor | Sequence[Tensor]) -> Tensor:
    """Views as one tensor [V, ...], from such a tensor or from a list or tuple of V tensors of one shape."""
    views = [x for x in value if isinstance(x, torch.Tensor)] if isinstance(value, (list, tuple)) else []
    if not views:
        return value  # a tensor, or something that the next check refuses
    dims = " ".join(f"d{k}" for k in range(views[0].dim()))
    return torch.stack(_alike(dims, {f"{name}[{k}]": x for k, x in enumerate(value)}))


def pair(name: str, value: object) -> tuple[Any, Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        found = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(f"{name}: found {found}, wanted a pair (negatives of a, negatives of b), where one may be None")
    return value[0], value[1]


def keys(name: str, value: object, beside: Tensor) -> Tensor:
    """Labels of the rows of a tensor [..., N, D], as int64 [..., N]. They may be given as [N], for all groups."""
    shape = beside.shape[:-1]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: found {value!r}, wanted a tensor of {_wanted_keys(shape)}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: found dtype {value.dtype}, wanted {_wanted_keys(shape)}")
    if value.dtype == torch.uint64:  # large values would become negative in int64, which means "no label"
        raise TypeError(f"{name}: found dtype {value.dtype}, wanted int64 or a narrower type of integers")
    if value.shape != shape and value.shape != shape[-1:]:  # torch.compile cannot trace `in` here
        raise ValueError(f"{name}: found shape {list(value.shape)}, wanted {_wanted_keys(shape)}")
    _one_device("the embeddings", beside, name, value)
    return saveable(value.to(torch.int64))[0].expand(shape)


def _wanted_keys(shape: torch.Size) -> str:
    return f"integers of shape {list(shape[-1:])}" + (f" or {list(shape)}" if len(shape) > 1 else "")


def keys_of_both(rows: object, columns: object) -> None:
    if (rows is None) != (columns is None):
        missing = "row_keys" if rows is None else "column_keys"
        raise ValueError(f"{missing}: found None, wanted keys of the rows and of the columns, or of neither")


def span(name: str, value: object, size: int) -> tuple[int, int]:
    """A range of rows, checked to be (o, n) with 0 <= o, 0 <= n and o + n <= size."""
    wanted = f"two integers (o, n) with 0 <= o, 0 <= n and o + n <= N = {size}"
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(isinstance(x, int) and not isinstance(x, bool) for x in value)
    ):
        raise TypeError(f"{name}: found {value!r}, wanted {wanted}")
    o, n = value
    if not (o >= 0 and n >= 0 and o + n <= size):
        raise ValueError(f"{name}: found {value!r}, wanted {wanted}")
    return o, n


def one_for_each_row(name: str, value: object, rows: Tensor) -> Tensor:
    """A tensor, checked to be [..., n], floating-point and on the device of the rows [..., n, D]."""
    wanted = f"a floating-point tensor of shape {list(rows.shape[:-1])}"
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name}: found {value!r}, wanted {wanted}")
    if value.shape != rows.shape[:-1]:
        raise ValueError(f"{name}: found shape {list(value.shape)}, wanted {wanted}")
    _one_device("rows", rows, name, value)
    return saveable(value)[0]


def same_dtype(**tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype. Under autocast they are promoted to one; elsewhere different dtypes are an error."""
    (first, a), *others = tensors.items()
    dtype = a.dtype
    for name, x in others:
        if x.dtype != a.dtype and not torch.is_autocast_enabled(autocast_type(a.device)):
            raise TypeError(f"{first} has dtype {a.dtype} and {name} {x.dtype}: wanted one dtype")
        dtype = torch.promote_types(dtype, x.dtype)
    return [x if x.dtype == dtype else x.to(dtype) for x in tensors.values()]


def autocast_type(device: torch.device) -> str:
    """The device type whose autocast applies: that of the CPU for devices without autocast, such as meta."""
    return device.type if torch.amp.is_autocast_available(device.type) else "cpu"


autocast_type._dynamo_marked_constant = True  # PyTorch 2.11 cannot trace this function; see tf32_allowed below


def tf32_allowed() -> bool:
    """Whether float32 products may use TF32 on CUDA devices, by PyTorch's own settings, old and new.

    (`torch.get_float32_matmul_precision` and `allow_tf32` raise an error if the new setting was used.)
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# This attribute does what torch.compiler.assume_constant_result does, whose import takes two seconds: a compiled
# function keeps the answer. It is compiled again when PyTorch's older setting of the precision changes.
tf32_allowed._dynamo_marked_constant = True


# The dict inside os.environ, whose keys are encoded names. For a variable that is not set, os.environ itself raises and
# catches an error, which takes as long as all checks of an input.
_VARIABLES = getattr(os.environ, "_data", None) if os.name == "posix" else None


def environment(name: str) -> str | None:
    """The value of an environment variable, None where it is not set."""
    if _VARIABLES is not None and not torch.compiler.is_compiling() and name.encode() not in _VARIABLES:
        return None
    return os.environ.get(name)


def _check_values() -> bool:
    return environment("TCLR_KERNELS_CHECK") == "1"


def _embedding(name: str, x: object, dims: Sequence[str], check_values: bool, empty: bool = False) -> None:
    wanted = f"[{', '.join(dims)}]"
    if not isinstance(x, torch.Tensor):
        kind = f"{type(x).__module__}.{type(x).__name__}".removeprefix("builtins.")
        found = "None" if x is None else f"a {kind}"
        raise TypeError(f"{name}: found {found}, wanted a torch.Tensor {wanted}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: found layout {x.layout}, wanted a dense tensor {wanted}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: found dtype {x.dtype}, wanted float64, float32, bfloat16 or float16")
    fixed = [d for d in dims if d != "..."]
    if x.dim() < len(fixed) or ("..." not in dims and x.dim() > len(fixed)):
        raise ValueError(f"{name}: found {x.dim()} dimensions, shape {list(x.shape)}, wanted {wanted}")
    if 0 in x.shape and not (empty and x.shape[-1]):
        raise ValueError(f"{name}: found an empty tensor, shape {list(x.shape)}, wanted every size of {wanted} >= 1")
    if check_values:
        finite = torch.isfinite(x).all(-1)
        if not finite.all():
            row = torch.nonzero(~finite)[0].tolist()
            raise ValueError(f"{name}: found a NaN or Inf in row {row}, wanted finite entries (TCLR_KERNELS_CHECK=1)")


def temperature(value: object, device: torch.device | None = None, name: str = "temperature") -> float | Tensor:
    """The temperature as the losses use it: a float > 0, or a 0-d floating-point tensor. Its value is not read.

    value: a number > 0, or a tensor of one element, of any shape, on the CPU or the device of the inputs.
    name: the name of the argument in errors.
    """
    wanted = "a finite float > 0 or a floating-point tensor of one element"
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: found a tensor of shape {list(value.shape)}, dtype {value.dtype}, wanted {wanted}"
            )
        if device is not None and value.device not in (device, torch.device("cpu")):
            raise ValueError(f"{name}: found a tensor on {value.device}, wanted it on the CPU or {device}")
        if device is not None and device.type == "cuda" and value.device.type == "cpu" and _capturing():
            raise ValueError(
                f"{name}: found a tensor on the CPU while a CUDA graph is captured, which would keep the value it "
                f"has now; wanted a tensor on {device}, which is read at each replay, or a float"
            )
        if _check_values() and not (value > 0).logical_and(value.isfinite()):
            raise ValueError(f"{name}: found {value.item()}, wanted {wanted} (TCLR_KERNELS_CHECK=1)")
        number = saveable(value)[0]
        return number.reshape(()) if number.dim() else number  # autograd gives the gradient the shape of the tensor
    if isinstance(value, Default):  # already a valid number; PyTorch 2.11's compiler cannot trace float() of it
        return DEFAULT
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: found {value!r}, wanted {wanted}")
    try:
        number = float(value)
    except OverflowError:  # a huge integer
        number = math.inf
    # only comparisons: torch.compile can trace these for a float that changes from call to call
    if not 0 < number < math.inf or 1 / number == math.inf:
        raise ValueError(f"{name}: found {value}, wanted {wanted}")
    return number


class Default(float):
    """A default value, which can be told from the same number given by the user."""


DEFAULT = 0.1
TEMPERATURE: float = Default(DEFAULT)


def scaled(given: object, logit_scale: object, device: torch.device) -> float | Tensor:
    """The temperature of a call that takes either a temperature or a logit scale, which is 1 / temperature."""
    if logit_scale is None:
        return temperature(given, device)
    if not isinstance(given, Default):
        raise ValueError(f"logit_scale: found {logit_scale!r} beside temperature {given!r}, wanted one of them")
    scale = temperature(logit_scale, device, "logit_scale")
    if isinstance(scale, torch.Tensor):  # in a wider dtype, since float16 would round the inverse
        scale = scale.to(
            torch.float64 if scale.device.type == "cpu" else torch.promote_types(scale.dtype, torch.float32)
        )
    return 1 / scale


def kept_temperature(value: object) -> float | Tensor:
    """The temperature as a module keeps it. A tensor with the autograd graph of one step is refused."""
    number = temperature(value)
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, Default) else number
    if value.requires_grad and not isinstance(value, torch.nn.Parameter):
        found = "that requires a gradient" if value.is_leaf else "computed from one that requires a gradient"
        raise ValueError(
            f"temperature: found a tensor {found}, wanted a float, an nn.Parameter or a tensor without gradient; "
            "to learn it, pass an nn.Parameter, or compute it at every step and call the function, such as nt_xent"
        )
    return value


def _capturing() -> bool:
    return not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: found {value!r}, wanted an integer >= 1")


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: found {value!r}, wanted one of {', '.join(map(repr, choices))}")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: found {value!r}, wanted True or False")


def weights(given: Mapping[str, float] | None, defaults: dict[str, float]) -> dict[str, float]:
    """The default weights, updated with the given ones."""
    if given is None:
        return defaults
    if not isinstance(given, Mapping):
        raise TypeError(f"weights: found {given!r}, wanted a mapping from {', '.join(map(repr, defaults))} to floats")
    for name, value in given.items():
        if name not in defaults:
            raise ValueError(f"weights: found the key {name!r}, wanted keys among {', '.join(map(repr, defaults))}")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"weights[{name!r}]: found {value!r}, wanted a finite float >= 0")
        if not 0 <= value < math.inf:
            raise ValueError(f"weights[{name!r}]: found {value}, wanted a finite float >= 0")
    return {**defaults, **given}
