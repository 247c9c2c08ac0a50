"""Losses that inductor, torch.compile's default, has compiled have the values and gradients of eager mode.

Generating code takes seconds for each case, so most cases run only with --full.
"""

import functools

import pytest
import torch
from torch import nn

import tclr_kernels as tk

from .conftest import USABLE
from .oracle import LOSSES, run, tclr_terms

NAMES = [name for name in LOSSES if not name.endswith("total")]  # when compiled, the total is the sum of the same terms
full = pytest.mark.full
WORST = ("nt_xent", "reference", False, "float")  # its compiled gradient was once wrong by a tenth
CASES = [
    pytest.param(*case, marks=() if case == WORST else full, id=f"{name}-{backend}-{size}-{tau}")
    for name in NAMES
    for backend in USABLE
    for dynamic, size in ((False, "static"), (True, "dynamic"))
    for tau in ("float", "learnt")
    for case in [(name, backend, dynamic, tau)]
]


def agree(call, inputs, compiled=None, **settings):
    """Asserts that a compiled call agrees with eager mode. Returns the compiled call, to be called with other sizes."""
    compiled = compiled or torch.compile(call, fullgraph=True, **settings)
    (out, grads), (want, want_grads) = run(compiled, inputs), run(call, inputs)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(grads, want_grads, strict=True):
        assert grad.shape == wanted.shape and grad.dtype == wanted.dtype
        eps = 4 * torch.finfo(wanted.dtype).eps
        torch.testing.assert_close(grad, wanted, rtol=1e-5 + eps, atol=(1e-6 + eps) * wanted.abs().max().item())
    return compiled


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name, backend, dynamic, tau", CASES)
def test_every_compiled_loss_agrees_with_eager_mode(name, backend, dynamic, tau):
    def call(*z):
        settings, z = (dict(temperature=z[0]), z[1:]) if tau == "learnt" else ({}, z)
        return LOSSES[name].call(*z, backend=backend, **settings)

    compiled = None
    for B in (5, 8, 33) if dynamic else (8,):
        inputs = LOSSES[name].inputs((B, 3, 7), torch.float32)
        inputs = [torch.tensor([0.25]), *inputs] if tau == "learnt" else inputs
        compiled = agree(call, inputs, compiled, dynamic=dynamic)


def test_the_compiled_total_of_the_objective_agrees_on_the_reference():
    """It once failed to compile, since inductor could not compare boolean masks."""
    call = functools.partial(LOSSES["tclr total"].call, backend="reference")
    agree(call, LOSSES["tclr"].inputs((8, 4, 16), torch.float32))


@full
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["nt_xent", "tclr release"])
def test_compiled_losses_agree_in_other_dtypes(name, dtype, backend):
    agree(functools.partial(LOSSES[name].call, backend=backend), LOSSES[name].inputs((8, 3, 7), dtype))


@full
@pytest.mark.parametrize("sizes", [(1, 1, 4), (2, 2, 1), (1, 5, 3), (40, 4, 128)], ids=str)
@pytest.mark.parametrize("name", ["nt_xent", "clip_loss", "instance_contrastive", "local_local"])
def test_compiled_losses_agree_at_other_sizes(name, sizes, backend):
    if name == "instance_contrastive":
        sizes = sizes[0], max(sizes[1], 2), sizes[2]
    agree(functools.partial(LOSSES[name].call, backend=backend), LOSSES[name].inputs(sizes, torch.float32))


@full
@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tclr")])
def test_compiled_losses_agree_with_other_reductions_and_unnormalised_rows(name, backend):
    inputs = LOSSES[name].inputs((8, 3, 7), torch.float32)
    for settings in (dict(reduction="mean"), dict(reduction="sum", normalize=False)):
        agree(functools.partial(LOSSES[name].call, backend=backend, **settings), inputs)


@full
def test_the_compiled_objective_agrees_with_other_weights(backend):
    inputs = LOSSES["tclr"].inputs((8, 3, 7), torch.float32)
    for weights in (dict(ic_local=2.0, ll=0), dict(ic_global=0, gl=0), dict(ic_local=0.5, ll=0.25)):
        agree(functools.partial(tclr_terms, form="release", weights=weights, backend=backend), inputs)


@full
def test_compiled_losses_agree_if_the_temperature_changes_at_every_call(backend):
    """Then torch.compile treats the temperature as a symbol."""
    inputs = LOSSES["nt_xent"].inputs((8, 2, 7), torch.float32)
    compiled = torch.compile(lambda tau, *z: tk.nt_xent(*z, temperature=tau, backend=backend), fullgraph=True)
    for tau in (0.5, 0.4, 0.3, 0.2):
        agree(
            functools.partial(tk.nt_xent, temperature=tau, backend=backend),
            inputs,
            functools.partial(compiled, tau),
        )


@full
def test_a_network_compiled_with_its_loss_gets_the_gradients_of_eager_mode(backend):
    torch.manual_seed(0)
    net, loss = nn.Linear(7, 6), tk.NTXentLoss(temperature=nn.Parameter(torch.tensor([0.3])), backend=backend)
    parameters = [*net.parameters(), *loss.parameters()]

    def call(x):
        z = nn.functional.normalize(net(x).relu(), dim=-1)
        return loss(*z.chunk(2))

    x = torch.randn(16, 7)
    wanted = torch.autograd.grad(call(x), parameters)
    found = torch.autograd.grad(torch.compile(call, fullgraph=True)(x), parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@full
def test_a_second_derivative_of_a_compiled_loss_is_an_error(backend):
    a, b = (x.requires_grad_() for x in LOSSES["nt_xent"].inputs((5, 2, 4), torch.float32))
    out = torch.compile(functools.partial(tk.nt_xent, backend=backend))(a, b)
    (slope,) = torch.autograd.grad(out, a, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward|second derivative"):
        slope.sum().backward()


@full
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiled_general_operation_agrees_with_eager_mode(dynamic, backend):
    keys = torch.tensor([0, 1, 0, 2, -1, 1, -1, 3])

    def call(tau, a, b, columns):
        settings = dict(temperature=tau, backend=backend)
        labelled = tk.gram([a[None], b[None]], keys=keys, **settings)
        some = tk.gram([a[None], b[None]], rows=(2, 4), **settings)
        others = tk.rectangle(a, columns, **settings)
        pairs = tk.pair_sum(others, a, row_keys=keys, **settings)
        return torch.stack([labelled.term.sum(), labelled.spread.sum(), some.term.sum(), others.sum(), pairs.sum()])

    agree(call, [torch.tensor(0.2), *(torch.randn(n, 5) for n in (8, 8, 20))], dynamic=dynamic)


@full
def test_a_compiled_rectangle_agrees_if_the_columns_need_no_gradient(backend):
    columns = torch.randn(20, 5)
    agree(lambda rows: tk.rectangle(rows, columns, backend=backend), [torch.randn(8, 5)])


WITHOUT_GRADIENT = {
    "nt_xent": lambda a, b, keys, **settings: tk.nt_xent(a, b, **settings),
    "labels": lambda a, b, keys, **settings: tk.nt_xent(a, b, labels=keys, **settings),
    "decoupled": lambda a, b, keys, **settings: tk.clip_loss(a, b, decoupled=True, **settings),
    "negatives": lambda a, b, keys, **settings: tk.info_nce(a, b, negatives=a, in_batch=False, **settings),
    "sup_con": lambda a, b, keys, **settings: tk.sup_con(a, keys, **settings),
    "range": lambda a, b, keys, **settings: tk.gram([a[None]], rows=(1, 3), **settings).neg,
    "rectangle": lambda a, b, keys, **settings: tk.rectangle(a, b, **settings),
    "pair_sum": lambda a, b, keys, **settings: tk.pair_sum(a[:, 0], b, row_keys=keys, **settings),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_compiled_losses_agree_without_gradients(name, grad, backend):
    """As in an evaluation, no input requires a gradient, or gradients are turned off."""
    a, b = torch.randn(2, 6, 4, requires_grad=not grad).unbind()
    call = functools.partial(WITHOUT_GRADIENT[name], keys=torch.arange(6) // 2, backend=backend)
    with torch.set_grad_enabled(grad):
        found = torch.compile(call, backend="aot_eager", fullgraph=True)(a, b)
        torch.testing.assert_close(found, call(a, b))
