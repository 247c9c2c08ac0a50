"""Backbones from clips [N, F, 3, H, W] to features of time slices [N, C, T], and the head that all embeddings share.

R3D-18 and R(2+1)D-18 have torchvision's parameter names, so that checkpoints of torchvision and of the official release
can be loaded. Their last stage has a stride in space only, and a dilation in time instead, so that 16 frames give 4
time slices. `width` is the number of channels of the first stage.
"""

import argparse
import pathlib
import types
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from . import checkpoint

WRAPPERS = "state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "embedder"
TORCHVISION_MEAN, TORCHVISION_STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


class Block(nn.Module):
    """Two 3x3x3 convolutions around a shortcut. [N, C, F, H, W] -> [N, C', F', H', W']"""

    def __init__(self, wide_in, wide, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(wide_in, wide, 3, stride, 1, bias=False),
            nn.BatchNorm3d(wide),
            nn.ReLU(),
            nn.Conv3d(wide, wide, 3, 1, 1, bias=False),
            nn.BatchNorm3d(wide),
        )
        self.shortcut = nn.Identity()
        if wide_in != wide or stride != (1, 1, 1):
            self.shortcut = nn.Sequential(nn.Conv3d(wide_in, wide, 1, stride, bias=False), nn.BatchNorm3d(wide))

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


class TinyResNet3d(nn.Module):
    """Clips [N, F, 3, H, W] -> time slices [N, C, F / 2].

    It uses the differences of neighbouring frames. With RGB, it would learn to distinguish videos by their background.
    """

    def __init__(self, width=16):
        super().__init__()
        self.features = 4 * width
        self.stem = nn.Sequential(nn.Conv3d(3, width, 3, (1, 2, 2), 1, bias=False), nn.BatchNorm3d(width), nn.ReLU())
        self.stages = nn.Sequential(
            Block(width, width, (1, 1, 1)),
            Block(width, 2 * width, (2, 2, 2)),
            Block(2 * width, 4 * width, (1, 2, 2)),
        )

    def forward(self, clips):
        moves = (clips[:, 1:] - clips[:, :-1]).transpose(1, 2)
        return self.stages(self.stem(moves)).mean((3, 4))


class Inputs(nn.Module):
    """Converts RGB clips in [0, 1] to the inputs that a network was trained with: [N, 3, F, H, W].

    The order of the colours, their mean and their deviation are buffers, so a checkpoint contains them.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("channels", torch.arange(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))

    def forward(self, clips):
        clips = clips.transpose(1, 2)[:, self.channels]
        return (clips - self.mean[:, None, None, None]) / self.std[:, None, None, None]


def conv3x3x3(wide_in, wide, middle, stride=(1, 1, 1), dilation=1):
    """R3D's convolution. With a dilation, it has no stride in time and keeps all frames."""
    pad = (dilation, 1, 1)
    return nn.Conv3d(wide_in, wide, 3, stride, pad, (dilation, 1, 1), bias=False)


def conv2plus1d(wide_in, wide, middle, stride=(1, 1, 1), dilation=1):
    """R(2+1)D's convolution: first in space, then in time. With a dilation, it is that of R3D, as in the release."""
    if dilation > 1:
        return conv3x3x3(wide_in, wide, middle, stride, dilation)
    return nn.Sequential(
        nn.Conv3d(wide_in, middle, (1, 3, 3), (1, *stride[1:]), (0, 1, 1), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, wide, (3, 1, 1), (stride[0], 1, 1), (1, 0, 0), bias=False),
    )


class BasicBlock(nn.Module):
    """torchvision's residual block: conv1, conv2, downsample."""

    def __init__(self, conv, wide_in, wide, stride, dilation):
        super().__init__()
        middle = wide_in * wide * 27 // (wide_in * 9 + 3 * wide)
        relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Sequential(conv(wide_in, wide, middle, stride, dilation), nn.BatchNorm3d(wide), relu)
        self.conv2 = nn.Sequential(conv(wide, wide, middle), nn.BatchNorm3d(wide))
        self.downsample = None
        if wide_in != wide:
            shortcut = nn.Conv3d(wide_in, wide, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(wide))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.conv2(self.conv1(x)) + shortcut)


class VideoResNet(nn.Module):
    """Two blocks in each of four stages. [N, 16, 3, 112, 112] -> [N, 8 width, 4]"""

    def __init__(self, stem, conv, width):
        super().__init__()
        self.features, self.inputs, self.stem = 8 * width, Inputs(), stem
        for stage in range(4):
            wide = width << stage
            wide_in = wide if stage == 0 else wide // 2
            stride = [(1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 2, 2)][stage]
            first = BasicBlock(conv, wide_in, wide, stride, 2 if stage == 3 else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(first, BasicBlock(conv, wide, wide, (1, 1, 1), 1)))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, clips):
        x = self.stem(self.inputs(clips))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((3, 4))


def r3d18(width=64):
    conv = nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
    return VideoResNet(nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU(inplace=True)), conv3x3x3, width)


def r2plus1d18(width=64):
    middle = 45 * width // 64
    stem = nn.Sequential(
        nn.Conv3d(3, middle, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, width, (3, 1, 1), 1, (1, 0, 0), bias=False),
        nn.BatchNorm3d(width),
        nn.ReLU(inplace=True),
    )
    return VideoResNet(stem, conv2plus1d, width)


class C3D(nn.Module):
    """C3D: eight 3x3x3 convolutions. [N, 16, 3, 112, 112] -> [N, 8 width, 4]. The last two poolings keep time.

    Unlike the original of 2015, it has a batch normalisation after each convolution, without which it hardly trains.
    """

    def __init__(self, width=64):
        super().__init__()
        self.features, self.inputs = 8 * width, Inputs()
        names = "1", "2", "3a", "3b", "4a", "4b", "5a", "5b"
        widths = [width * factor for factor in (1, 2, 4, 4, 8, 8, 8, 8)]
        pools = {"1": (1, 2, 2), "2": (2, 2, 2), "3b": (2, 2, 2), "4b": (1, 2, 2), "5b": (1, 2, 2)}
        self.layers, wide_in = nn.Sequential(), 3
        for name, wide in zip(names, widths, strict=True):
            self.layers.add_module(f"conv{name}", nn.Conv3d(wide_in, wide, 3, 1, 1, bias=False))
            self.layers.add_module(f"bn{name}", nn.BatchNorm3d(wide))
            self.layers.add_module(f"relu{name}", nn.ReLU(inplace=True))
            if name in pools:
                self.layers.add_module(f"pool{name}", nn.MaxPool3d(pools[name], ceil_mode=True))
            wide_in = wide

    def forward(self, clips):
        return self.layers(self.inputs(clips)).mean((3, 4))


class Projector(nn.Sequential):
    """The head that all embeddings share: [..., features] -> [..., dim]. Its outputs are normalised in the losses."""

    def __init__(self, features, dim=128):
        super().__init__(
            nn.Linear(features, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(),
            nn.Linear(features, dim, bias=False),
            nn.BatchNorm1d(dim),
        )

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


BACKBONES = {"tiny": TinyResNet3d, "r3d18": r3d18, "r2plus1d18": r2plus1d18, "c3d": C3D}


def backbone(name, width):
    """A backbone by its name in BACKBONES."""
    if name not in BACKBONES:
        raise ValueError(f"backbone: found {name!r}, wanted one of {', '.join(BACKBONES)}")
    return BACKBONES[name](width)


def load_torchvision(model, path):
    """Loads a checkpoint of torchvision's video ResNets without its classifier, and sets the normalisation of inputs.

    Returns the names of parameters that it does not have: for R(2+1)D-18, `layer4.0.conv1.0`, which is not a (2+1)D
    convolution here.
    """
    weights = unprefixed(read_weights(path), first_name(model), path)
    weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    weights.setdefault("inputs.mean", torch.tensor(TORCHVISION_MEAN))  # a file of `tclr export` has other values
    weights.setdefault("inputs.std", torch.tensor(TORCHVISION_STD))
    return _load(model, weights, path, may_lack=("inputs.", "layer4.0.conv1.0."))


def load_release(embedder, path):
    """Loads a checkpoint of the official release: backbone `0.*` and head `1.*`, or the same after `module.`.

    It was trained on frames in the order blue, green, red. The bias of its first linear layer, which this head does not
    have, is subtracted from the running mean of the batch normalisation that follows it.
    """
    weights = unprefixed(read_weights(path), f"0.{first_name(embedder.backbone)}", path)
    trunk = {name[2:]: value for name, value in weights.items() if name.startswith("0.") and name[2:5] != "fc."}
    missing = _load(embedder.backbone, trunk, path, may_lack=("inputs.",))
    embedder.backbone.inputs.channels.copy_(torch.tensor([2, 1, 0]))
    order = {"fc1": "0", "bn1": "1", "fc2": "3", "bn2": "4"}
    head = {}
    for name, value in weights.items():
        if name.startswith("1."):
            layer, _, what = name[2:].partition(".")
            head[f"{order.get(layer, layer)}.{what}"] = value
    if {"0.bias", "1.running_mean"} <= head.keys():
        head["1.running_mean"] = head["1.running_mean"] - head.pop("0.bias")
    return missing + _load(embedder.head, head, path)


def first_name(module):
    return next(name for name, _ in module.named_parameters())


def read_weights(path):
    """The weights {name: tensor} in a checkpoint, either at its top level or in "model", "state_dict" and so on.

    The checkpoint may also contain options, paths and numbers. Raises ValueError if it contains an object of any other
    class, without loading it.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with torch.serialization.safe_globals([*_grad_scaler(), *_plain_values()]):
        weights = _unwrapped(checkpoint.load(path), path)
    if not weights:
        raise ValueError(f"{path}: found no tensors by name, wanted a state dict")
    return {name.replace("_orig_mod.", ""): value for name, value in weights.items()}  # torch.compile adds this prefix


def _read_safetensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: found no safetensors: {error}") from None


def _unwrapped(found, path, depth=6):
    """The state dict in a checkpoint, or {} if there is none. Raises ValueError if there are several candidates."""
    if not isinstance(found, Mapping) or depth == 0:
        return {}
    inner = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Mapping)}
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and torch.is_tensor(value)}
    known = {name: value for name, value in inner.items() if name in WRAPPERS}
    for some in (known,) if tensors else (known, inner):
        found = {name: each for name, value in some.items() if (each := _unwrapped(value, path, depth - 1))}
        if len(found) > 1:
            raise ValueError(f"{path}: found weights below {', '.join(found)}, wanted one of them alone")
        if found:
            return next(iter(found.values()))
    return tensors


def unprefixed(weights, anchor, path):
    """The weights without the prefix before `anchor`, such as `module.` or `model.backbone.`. Others are left out."""
    prefixes = {name[: -len(anchor)] for name in weights if f".{name}".endswith(f".{anchor}")} or {""}
    if len(prefixes) > 1 and "" not in prefixes:
        names = ", ".join(sorted(prefix + anchor for prefix in prefixes))
        raise ValueError(f"{path}: found {names}: wanted the weights of one network alone")
    prefix = "" if "" in prefixes else prefixes.pop()
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def _plain_values():
    """Classes of plain values that checkpoints contain in addition to weights. Loading them runs no code of the file.

    Some are listed again under the names with which other versions of Python and NumPy, or Windows, pickle them.
    """
    scalar, rebuilt = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    paths = [pathlib.PosixPath, pathlib.PurePosixPath, (pathlib.PurePosixPath, "pathlib._local.PosixPath")]
    paths += [(pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")]
    numbers = [np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "?bhilqBHILQefdU")]
    for module in "numpy.core.multiarray", "numpy._core.multiarray":
        numbers += [(scalar, f"{module}.scalar"), (rebuilt, f"{module}._reconstruct")]
    builtin = [bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, slice, range]
    return [argparse.Namespace, types.SimpleNamespace, *builtin, *paths, *numbers]


def _grad_scaler():
    """The classes in the pickled GradScaler of the release's checkpoints, under their old and new names."""
    old, new = "torch.cuda.amp.grad_scaler", torch.amp.grad_scaler
    parts = new.GradScaler, new.OptState, new._refresh_per_optimizer_state
    return [
        (lambda factory=None: {}, "collections.defaultdict"),
        *parts,
        *((part, f"{old}.{part.__name__}") for part in parts),
    ]


def _load(module, weights, path, may_lack=()):
    """Copies weights by name. Raises ValueError, naming them, for weights that are unknown, or missing but required."""
    for name, value in module.state_dict().items():
        if name in weights and weights[name].shape != value.shape:
            found, wanted = list(weights[name].shape), list(value.shape)
            raise ValueError(f"{path}: found {name} of shape {found}, wanted {wanted}; see net.backbone and net.width")
    missing, unknown = module.load_state_dict(weights, strict=False)
    lacking = [name for name in missing if not name.startswith(may_lack or ("\0",))]
    unknown = [name for name in unknown if not name.startswith(may_lack or ("\0",))]
    if lacking or unknown:
        found = [f"{what} {', '.join(some[:3])}" for what, some in (("no", lacking), ("also", unknown)) if some]
        raise ValueError(f"{path}: found {' and '.join(found)}, wanted the weights of a {type(module).__name__}")
    return [name for name in missing if not name.startswith("inputs.")]
