"""The losses as modules: settings are given when a module is made, and what changes at every step to `forward`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import checks, distributed, losses
from .candidates import Negatives
from .checks import TEMPERATURE
from .distributed import Group, Shares
from .losses import Form, Reduction, Softmax, TCLRTerms, Temperature

CHOICES = dict(reduction=losses.REDUCTIONS, softmax=losses.SOFTMAXES)


class _Loss(nn.Module):
    """A loss with its settings.

    temperature: a float; an `nn.Parameter` of one element, which is learnt; or a tensor of one element without
    gradient, which becomes a buffer. Any other tensor that requires a gradient is a ValueError: the module would keep
    the autograd graph of one step for all later ones, and the optimizer would not find the tensor.
    group: "world" is looked up at each call, so a module can be made before the process group, and can be pickled.

    `forward` also takes labels, negatives, shares, and `logit_scale` if no temperature was given here.
    """

    temperature: Temperature
    settings: dict[str, Any]
    _function: ClassVar[Callable[..., Any]]

    def __init__(self, temperature: Temperature, **settings: Any) -> None:
        super().__init__()
        temperature = checks.kept_temperature(temperature)
        if isinstance(temperature, torch.Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        for name, choices in CHOICES.items():
            if name in settings:
                checks.one_of(name, settings[name], choices)
        distributed.check_group(settings["group"])
        self.settings = settings

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Loss":
        group = self.settings["group"]
        memo[id(group)] = group  # copies of the module share the group, since PyTorch cannot copy a ProcessGroup
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _loss(self, *tensors: Tensor | Sequence[Tensor], **changing: Any) -> Any:
        return type(self)._function(*tensors, temperature=self.temperature, **changing, **self.settings)

    def extra_repr(self) -> str:
        temperature = self.temperature
        if isinstance(temperature, torch.Tensor):
            temperature = "learnable" if temperature.requires_grad else "tensor"
        return ", ".join(f"{name}={value}" for name, value in dict(temperature=temperature, **self.settings).items())


class NTXentLoss(_Loss):
    """`nt_xent` as a module: forward(a, b), a, b: [..., N, D]."""

    _function = staticmethod(losses.nt_xent)

    def __init__(
        self,
        temperature: Temperature = TEMPERATURE,
        *,
        normalize: bool = True,
        symmetric: bool = True,
        decoupled: bool = False,
        reduction: Reduction = "mean",
        backend: str | None = None,
        group: Group = None,
    ) -> None:
        super().__init__(
            temperature,
            normalize=normalize,
            symmetric=symmetric,
            decoupled=decoupled,
            reduction=reduction,
            backend=backend,
            group=group,
        )

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        *,
        labels: Tensor | None = None,
        negatives: Negatives | None = None,
        logit_scale: Temperature | None = None,
        shares: Shares = None,
    ) -> Tensor:
        return self._loss(a, b, labels=labels, negatives=negatives, logit_scale=logit_scale, shares=shares)


class CLIPLoss(_Loss):
    """`clip_loss` as a module: forward(a, b), a, b: [..., N, D]."""

    _function = staticmethod(losses.clip_loss)

    def __init__(
        self,
        temperature: Temperature = TEMPERATURE,
        *,
        normalize: bool = True,
        decoupled: bool = False,
        reduction: Reduction = "mean",
        backend: str | None = None,
        group: Group = None,
    ) -> None:
        super().__init__(
            temperature, normalize=normalize, decoupled=decoupled, reduction=reduction, backend=backend, group=group
        )

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        *,
        labels: Tensor | None = None,
        negatives: tuple[Negatives | None, Negatives | None] = (None, None),
        logit_scale: Temperature | None = None,
        shares: Shares = None,
    ) -> Tensor:
        return self._loss(a, b, labels=labels, negatives=negatives, logit_scale=logit_scale, shares=shares)


class InfoNCELoss(_Loss):
    """`info_nce` as a module: forward(query, key), query, key: [..., N, D]."""

    _function = staticmethod(losses.info_nce)

    def __init__(
        self,
        temperature: Temperature = TEMPERATURE,
        *,
        normalize: bool = True,
        in_batch: bool = True,
        decoupled: bool = False,
        reduction: Reduction = "mean",
        backend: str | None = None,
        group: Group = None,
    ) -> None:
        super().__init__(
            temperature,
            normalize=normalize,
            in_batch=in_batch,
            decoupled=decoupled,
            reduction=reduction,
            backend=backend,
            group=group,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        *,
        labels: Tensor | None = None,
        negatives: Negatives | None = None,
        logit_scale: Temperature | None = None,
        shares: Shares = None,
    ) -> Tensor:
        return self._loss(query, key, labels=labels, negatives=negatives, logit_scale=logit_scale, shares=shares)


class SupConLoss(_Loss):
    """`sup_con` as a module: forward(z, labels), z: [..., M, D], labels: [M] or [..., M]."""

    _function = staticmethod(losses.sup_con)

    def __init__(
        self,
        temperature: Temperature = TEMPERATURE,
        *,
        normalize: bool = True,
        reduction: Reduction = "mean",
        backend: str | None = None,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, normalize=normalize, reduction=reduction, backend=backend, group=group)

    def forward(
        self,
        z: Tensor,
        labels: Tensor,
        *,
        logit_scale: Temperature | None = None,
        shares: Shares = None,
    ) -> Tensor:
        return self._loss(z, labels, logit_scale=logit_scale, shares=shares)


class InstanceContrastiveLoss(_Loss):
    """`instance_contrastive` as a module: forward(views), views: [V, B, D], or V tensors."""

    _function = staticmethod(losses.instance_contrastive)

    def __init__(
        self,
        temperature: Temperature = TEMPERATURE,
        *,
        normalize: bool = True,
        softmax: Softmax = "pairs",
        decoupled: bool = False,
        reduction: Reduction = "mean",
        backend: str | None = None,
        group: Group = None,
    ) -> None:
        super().__init__(
            temperature,
            normalize=normalize,
            softmax=softmax,
            decoupled=decoupled,
            reduction=reduction,
            backend=backend,
            group=group,
        )

    def forward(
        self,
        views: Tensor | Sequence[Tensor],
        *,
        labels: Tensor | None = None,
        negatives: Negatives | None = None,
        logit_scale: Temperature | None = None,
        shares: Shares = None,
    ) -> Tensor:
        return self._loss(views, labels=labels, negatives=negatives, logit_scale=logit_scale, shares=shares)


class LocalLocalLoss(_Loss):
    """`local_local` as a module: forward(x1, x2), x1, x2: [B, T, D]."""

    _function = staticmethod(losses.local_local)

    def __init__(
        self,
        temperature: Temperature = TEMPERATURE,
        *,
        normalize: bool = True,
        symmetric: bool = True,
        reduction: Reduction = "mean",
        backend: str | None = None,
        group: Group = None,
    ) -> None:
        super().__init__(
            temperature, normalize=normalize, symmetric=symmetric, reduction=reduction, backend=backend, group=group
        )

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        *,
        logit_scale: Temperature | None = None,
        shares: Shares = None,
    ) -> Tensor:
        return self._loss(x1, x2, logit_scale=logit_scale, shares=shares)


class GlobalLocalLoss(_Loss):
    """`global_local` as a module: forward(s, x), s, x: [B, T, D]."""

    _function = staticmethod(losses.global_local)

    def __init__(
        self,
        temperature: Temperature = TEMPERATURE,
        *,
        normalize: bool = True,
        reduction: Reduction = "mean",
        backend: str | None = None,
        group: Group = None,
    ) -> None:
        super().__init__(temperature, normalize=normalize, reduction=reduction, backend=backend, group=group)

    def forward(
        self,
        s: Tensor,
        x: Tensor,
        *,
        logit_scale: Temperature | None = None,
        shares: Shares = None,
    ) -> Tensor:
        return self._loss(s, x, logit_scale=logit_scale, shares=shares)


class TCLRLoss(_Loss):
    """`tclr` as a module: forward(g, s, x) -> TCLRTerms, g: [V, B, D], s, x: [V, B, T, D]."""

    _function = staticmethod(losses.tclr)

    def __init__(
        self,
        temperature: Temperature = TEMPERATURE,
        *,
        form: Form = "paper",
        weights: Mapping[str, float] | None = None,
        normalize: bool = True,
        backend: str | None = None,
        group: Group = None,
    ) -> None:
        checks.one_of("form", form, losses.FORMS)
        weights = checks.weights(weights, losses.FORMS[form])
        super().__init__(
            temperature, form=form, weights=dict(weights), normalize=normalize, backend=backend, group=group
        )

    def forward(
        self,
        g: Tensor | Sequence[Tensor],
        s: Tensor | Sequence[Tensor],
        x: Tensor | Sequence[Tensor],
        *,
        labels: Tensor | None = None,
        logit_scale: Temperature | None = None,
        shares: Shares = None,
    ) -> TCLRTerms:
        return self._loss(g, s, x, labels=labels, logit_scale=logit_scale, shares=shares)
