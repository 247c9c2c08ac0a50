"""The modules give the same results as the functions, and keep their settings."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import tclr_kernels as tk

from .oracle import LOSSES

MODULES = {
    "nt_xent": (tk.NTXentLoss, tk.nt_xent, dict(symmetric=False, reduction="sum")),
    "clip_loss": (tk.CLIPLoss, tk.clip_loss, dict(normalize=False, reduction="none")),
    "info_nce": (tk.InfoNCELoss, tk.info_nce, dict(decoupled=True, reduction="sum")),
    "sup_con": (tk.SupConLoss, tk.sup_con, dict(reduction="none")),
    "instance_contrastive": (tk.InstanceContrastiveLoss, tk.instance_contrastive, dict(reduction="sum")),
    "local_local": (tk.LocalLocalLoss, tk.local_local, dict(symmetric=False, reduction="none")),
    "global_local": (tk.GlobalLocalLoss, tk.global_local, dict(normalize=False)),
    "tclr": (tk.TCLRLoss, tk.tclr, dict(form="release", weights=dict(ll=0.5))),
}
each = pytest.mark.parametrize("name", MODULES)


def inputs_of(name):
    """The arguments of a module's `forward`."""
    if name == "sup_con":
        return [*LOSSES[name].inputs((4, 3, 5), torch.float32), torch.tensor([0, 1, 2, 0, 1, -1, 0, 0])]
    return LOSSES["clip_loss" if name == "info_nce" else name].inputs((4, 3, 5), torch.float32)


def values(out):
    return torch.stack(out) if isinstance(out, tuple) else out


@each
def test_modules_give_the_results_of_their_functions(name, backend):
    module, function, settings = MODULES[name]
    inputs = inputs_of(name)
    for given in ({}, dict(temperature=0.3, **settings)):
        assert torch.equal(
            values(module(backend=backend, **given)(*inputs)), values(function(*inputs, backend=backend, **given))
        )


@each
def test_defaults_are_those_of_the_function(name):
    module, function, _ = MODULES[name]
    settings = defaults(function)
    of_forward = defaults(module.forward)
    built = module()
    kept = {"temperature": built.temperature, **built.settings, **of_forward}
    assert all(kept[key] == value for key, value in settings.items() if key != "weights")
    assert defaults(module.__init__) | of_forward == settings
    assert of_forward.keys() <= {"labels", "negatives", "logit_scale", "shares"}


def defaults(function):
    """{argument: default} of a function."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@each
def test_temperature_is_the_first_positional_argument_of_a_module(name):
    module, _, _ = MODULES[name]
    assert module(0.5).temperature == 0.5 and repr(module(0.5)) == repr(module(temperature=0.5))


@each
def test_pickle_deepcopy_and_repr_keep_the_settings(name):
    module, _, settings = MODULES[name]
    loss = module(temperature=nn.Parameter(torch.tensor(0.3)), **settings)
    inputs = inputs_of(name)
    wanted = values(loss(*inputs))
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(values(other(*inputs)), wanted) and repr(other) == repr(loss)
        assert other.temperature is not loss.temperature
    assert "temperature=learnable" in repr(loss) and "temperature=0.1" in repr(module())
    assert all(f"{key}=" in repr(loss) for key in settings)


@each
def test_temperature_as_parameter_is_learnt_and_saved(name):
    module, _, _ = MODULES[name]
    loss = module(temperature=nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    inputs = inputs_of(name)
    values(loss(*inputs)).sum().backward()
    assert loss.temperature.grad.abs() > 0
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = module(temperature=nn.Parameter(torch.tensor(9.0)))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.temperature, loss.temperature)


@each
def test_temperature_as_tensor_is_saved_as_a_buffer_and_as_float_is_not_saved(name):
    module, _, _ = MODULES[name]
    assert list(module(temperature=torch.tensor(0.3)).state_dict()) == ["temperature"]
    assert not module().state_dict() and not list(module().parameters())


def kept(name):
    """Two modules: one with a temperature parameter of one dimension, as FSDP needs, and one with a fixed tensor."""
    module, _, _ = MODULES[name]
    return module(temperature=nn.Parameter(torch.tensor([0.3]))), module(temperature=torch.tensor([[0.3]]))


@each
def test_a_temperature_of_any_shape_is_copied_moved_and_saved(name):
    inputs = inputs_of(name)
    for loss in kept(name):
        learnt = loss.temperature.requires_grad
        wanted = values(loss(*inputs))
        file = io.BytesIO()
        torch.save(loss.state_dict(), file)
        file.seek(0)
        loaded = MODULES[name][0](temperature=type(loss.temperature)(torch.full_like(loss.temperature, 9.0)))
        loaded.load_state_dict(torch.load(file, weights_only=True))
        moved = copy.deepcopy(loss).to(torch.float64)
        assert moved.temperature.dtype == torch.float64
        for other in (loss, loaded, moved, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            torch.testing.assert_close(values(other(*inputs)), wanted)
            for _ in range(2) if learnt else ():
                values(other(*inputs)).sum().backward()
                assert other.temperature.grad.shape == loss.temperature.shape
            assert f"temperature={'learnable' if learnt else 'tensor'}" in repr(copy.deepcopy(other))


@each
def test_a_temperature_with_the_graph_of_one_step_is_refused(name):
    module, _, _ = MODULES[name]
    s = nn.Parameter(torch.tensor(1.5))
    for tensor, found in ((1 / s.exp(), "computed from"), (s.detach().requires_grad_(), "that requires")):
        with pytest.raises(ValueError, match=f"temperature: found a tensor {found}.*nn.Parameter.*every step"):
            module(temperature=tensor)
    with torch.no_grad():
        assert not module(temperature=1 / s.exp()).temperature.requires_grad


@each
def test_wrong_settings_are_errors_at_construction(name):
    module, _, _ = MODULES[name]
    with pytest.raises(ValueError, match="temperature"):
        module(temperature=-1.0)
    with pytest.raises(ValueError, match="form" if name == "tclr" else "reduction"):
        module(**{"form" if name == "tclr" else "reduction": "other"})


def test_an_unknown_softmax_is_an_error_at_construction():
    with pytest.raises(ValueError, match="softmax: found 'all'"):
        tk.InstanceContrastiveLoss(softmax="all")
