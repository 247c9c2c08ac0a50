"""The losses as modules: the same keywords at construction, the tensors in `forward`."""

import torch
from torch import nn

from . import checks, losses


class _Loss(nn.Module):
    """A loss with its settings.

    temperature: a float; an `nn.Parameter` of one element, which is learnt; or a tensor of one element that requires no
    gradient, which becomes a buffer. ValueError for a tensor that requires one and is no Parameter: a module would
    keep the graph of one step for all the others, and an optimizer would not find it.
    """

    function = None

    def __init__(self, temperature, **settings):
        super().__init__()
        temperature = checks.kept_temperature(temperature)
        if isinstance(temperature, torch.Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        if "reduction" in settings:
            checks.one_of("reduction", settings["reduction"], losses.REDUCTIONS)
        self.settings = settings

    def forward(self, *tensors):
        return type(self).function(*tensors, temperature=self.temperature, **self.settings)

    def extra_repr(self):
        temperature = self.temperature
        if isinstance(temperature, torch.Tensor):
            temperature = "learnable" if temperature.requires_grad else "tensor"
        return ", ".join(f"{name}={value}" for name, value in dict(temperature=temperature, **self.settings).items())


class NTXentLoss(_Loss):
    """`nt_xent` as a module: forward(a, b), a, b: [..., N, D]."""

    function = staticmethod(losses.nt_xent)

    def __init__(self, *, temperature=0.1, normalize=True, symmetric=True, reduction="mean", backend=None):
        super().__init__(temperature, normalize=normalize, symmetric=symmetric, reduction=reduction, backend=backend)


class CLIPLoss(_Loss):
    """`clip_loss` as a module: forward(a, b), a, b: [..., N, D]."""

    function = staticmethod(losses.clip_loss)

    def __init__(self, *, temperature=0.1, normalize=True, reduction="mean", backend=None):
        super().__init__(temperature, normalize=normalize, reduction=reduction, backend=backend)


class InstanceContrastiveLoss(_Loss):
    """`instance_contrastive` as a module: forward(views), views: [V, B, D]."""

    function = staticmethod(losses.instance_contrastive)

    def __init__(self, *, temperature=0.1, normalize=True, reduction="mean", backend=None):
        super().__init__(temperature, normalize=normalize, reduction=reduction, backend=backend)


class LocalLocalLoss(_Loss):
    """`local_local` as a module: forward(x1, x2), x1, x2: [B, T, D]."""

    function = staticmethod(losses.local_local)

    def __init__(self, *, temperature=0.1, normalize=True, symmetric=True, reduction="mean", backend=None):
        super().__init__(temperature, normalize=normalize, symmetric=symmetric, reduction=reduction, backend=backend)


class GlobalLocalLoss(_Loss):
    """`global_local` as a module: forward(s, x), s, x: [B, T, D]."""

    function = staticmethod(losses.global_local)

    def __init__(self, *, temperature=0.1, normalize=True, reduction="mean", backend=None):
        super().__init__(temperature, normalize=normalize, reduction=reduction, backend=backend)


class TCLRLoss(_Loss):
    """`tclr` as a module: forward(g, s, x) -> TCLRTerms, g: [V, B, D], s, x: [V, B, T, D]."""

    function = staticmethod(losses.tclr)

    def __init__(self, *, temperature=0.1, form="paper", weights=None, normalize=True, backend=None):
        checks.one_of("form", form, losses.FORMS)
        weights = checks.weights(weights, losses.FORMS[form])
        super().__init__(temperature, form=form, weights=dict(weights), normalize=normalize, backend=backend)
