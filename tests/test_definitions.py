"""The losses equal the formulas of the paper, of the official code and of textbooks, to 1e-12 in float64."""

import functools
import math

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends

from . import oracle
from .oracle import LOSSES

TAU = 0.3
LOOPS = {
    "nt_xent": functools.partial(oracle.both_ways, oracle.nt_xent_loops),
    "nt_xent one way": oracle.nt_xent_loops,
    "clip_loss": functools.partial(oracle.both_ways, oracle.clip_loops),
    "instance_contrastive": oracle.views_loops,
    "nt_xent further": lambda a, b, q, sim: oracle.both_ways(
        functools.partial(oracle.among_loops, labels=oracle.twos(len(a)), further=q), a, b, sim
    ),
    "clip_loss decoupled": lambda a, b, q, r, sim: torch.cat(
        [oracle.among_loops(*z, sim, further=x, own=False, decoupled=True) for *z, x in ((a, b, q), (b, a, r))]
    ),
    "moco": lambda q, k, queue, sim: oracle.among_loops(q, k, sim, further=queue, own=False, in_batch=False),
    "sup_con": lambda z, sim: oracle.sup_con_loops(z, oracle.twos(len(z)), sim),
    "views joint": lambda views, q, sim: oracle.joint_loops(views, sim, further=q),
    "local_local": oracle.local_local_loops,
    "local_local one way": functools.partial(oracle.local_local_loops, symmetric=False),
    "global_local": oracle.global_local_loops,
    "tclr": lambda *z, sim: total_first(oracle.paper_loops(*z, sim)),
    "tclr release": lambda *z, sim: total_first(oracle.release_loops(*z, sim)),
}
LOOPS |= {f"{form} total": oracle.only_total(LOOPS[form]) for form in ("tclr", "tclr release")}
REDUCED = [name for name in LOSSES if not name.startswith("tclr")]


def total_first(terms):
    return torch.stack([sum(terms), *terms])


def agree(found, wanted):
    (out, grads), (want, want_grads) = found, wanted
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, want_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_their_printed_formulas(name, normalize, float64):
    loss = LOSSES[name]
    inputs = loss.inputs((4, 3, 5), normalize=normalize)
    sim = functools.partial(oracle.sim, tau=TAU, normalize=normalize)
    wanted = oracle.run(functools.partial(LOOPS[name], sim=sim), inputs)
    agree(oracle.run(lambda *z: loss.textbook(z, TAU, normalize), inputs), wanted)
    agree(oracle.run(loss.call, inputs, temperature=TAU, normalize=normalize, backend=float64), wanted)


@pytest.mark.parametrize("name", REDUCED)
def test_mean_and_sum_equal_those_of_reduction_none(name, backend):
    loss = LOSSES[name]
    inputs = loss.inputs((4, 3, 5), torch.float32)
    each = loss.call(*inputs, backend=backend)
    count = 3 * 2 * 4 if name == "instance_contrastive" else each.numel()  # V (V - 1) B
    mean = loss.call(*inputs, reduction="mean", backend=backend)
    torch.testing.assert_close(loss.call(*inputs, reduction="sum", backend=backend), each.sum())
    torch.testing.assert_close(mean, each.sum() / count)
    if hasattr(tk, name) and name != "sup_con":  # which needs labels
        assert torch.equal(getattr(tk, name)(*inputs, backend=backend), mean)


@pytest.mark.parametrize("name", ["nt_xent", "nt_xent one way", "clip_loss"])
def test_leading_dimensions_are_independent_groups(name, backend):
    a, b = oracle.correlated([(2, 3, 5, 4)] * 2, 0.5, 0)
    call = functools.partial(LOSSES[name].call, backend=backend)
    each = torch.stack([torch.stack([call(a[i, j], b[i, j]) for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(call(a, b), each)
    torch.testing.assert_close(call(a, b, reduction="mean"), each.mean())


def test_collapsed_embeddings_have_the_loss_of_the_official_code(backend):
    B, T = 40, 4
    g, s, x = torch.ones(2, B, 8), torch.ones(2, B, T, 8), torch.ones(2, B, T, 8)
    wanted = [math.log(2 * B - 1), 14 * math.log(2 * B - 1), B * math.log(7), 16 * math.log(4)]
    found = torch.stack(tk.tclr(g, s, x, form="release", backend=backend))
    torch.testing.assert_close(found, torch.tensor([sum(wanted), *wanted]), rtol=1e-6, atol=0)
    assert found.tolist() == pytest.approx([165.5588, 4.3694, 61.1723, 77.8364, 22.1807], abs=1e-4)


@pytest.fixture
def calls(backend, monkeypatch):
    """A list to which every call of the backend's operation appends (number of sets, cross)."""
    made = []
    module = backends.BACKENDS[backend]
    owner = module if "objective" in vars(module) else type(module)
    monkeypatch.delattr(owner, "objective", raising=False)
    name = "gram" if backend == "reference" else "forward"
    original = getattr(module, name)

    def counted(sets, tau, normalize, cross, *count):
        made.append((len(sets), cross))
        return original(sets, tau, normalize, cross, *count)

    monkeypatch.setattr(module, name, counted)
    return made


WORK = {"ic_global": [(2, False)], "ic_local": [(6, False)], "ll": [(2, False)], "gl": [(4, True)]}


@pytest.mark.parametrize("form", ["paper", "release"])
@pytest.mark.parametrize("left_out", WORK)
def test_a_term_of_weight_zero_is_not_computed_and_returned_as_zero(left_out, form, calls, backend):
    inputs = LOSSES["tclr"].inputs((4, 3, 5), torch.float32)
    full = tk.tclr(*inputs, form=form, weights=dict(ic_local=2.0), backend=backend)
    calls.clear()
    terms = tk.tclr(*inputs, form=form, weights={"ic_local": 2.0, left_out: 0}, backend=backend)
    names = [name for name in WORK if name != left_out]
    # LL is read from ic_local's Gram matrix, except with Triton, where that takes more launches than computing LL
    apart = left_out == "ic_local" or backend == "triton"
    assert calls == [call for name in names if name != "ll" or apart for call in WORK[name]]
    assert getattr(terms, left_out) == 0
    for name in names:
        torch.testing.assert_close(getattr(terms, name), getattr(full, name))
    weights = dict(ic_global=1, ic_local=2, ll=1, gl=1)
    torch.testing.assert_close(terms.total, sum(weights[name] * getattr(full, name) for name in names))


def test_weights_scale_the_total_but_not_the_returned_terms(float64):
    weights = dict(ic_global=0.5, ic_local=3.0, ll=2.0, gl=0.25)
    inputs = LOSSES["tclr"].inputs((4, 3, 5))
    sim = functools.partial(oracle.sim, tau=TAU)
    ic, _, ll, gl = oracle.paper_loops(*inputs, sim)
    _, ic_local, _, _ = oracle.release_loops(*inputs, sim)
    wanted = [0.5 * ic + 3 * ic_local + 2 * ll + 0.25 * gl, ic, ic_local, ll, gl]
    found = tk.tclr(*inputs, temperature=TAU, weights=weights, backend=float64)
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["paper", "release"])
def test_an_input_of_weight_zero_gets_a_zero_gradient_even_if_it_is_not_finite(form, backend):
    g, s, x = (z.requires_grad_() for z in LOSSES["tclr"].inputs((4, 3, 5), torch.float32))
    with torch.no_grad():
        s.fill_(math.nan)
        x[0, 0] = math.inf
    terms = tk.tclr(g, s, x, form=form, weights=dict(ic_local=0, ll=0, gl=0), backend=backend)
    terms.total.backward()
    torch.testing.assert_close(terms.total, tk.nt_xent(*g.detach(), backend=backend))
    assert g.grad.abs().max() > 0
    assert torch.equal(s.grad, torch.zeros_like(s)) and torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("weights", [dict(lg=1.0), dict(ll=-1), dict(ll=math.nan), dict(gl=math.inf), dict(gl="1")])
def test_errors_name_wrong_weights(weights):
    with pytest.raises((ValueError, TypeError), match=f"weights.*{next(iter(weights))}"):
        tk.tclr(*LOSSES["tclr"].inputs((2, 2, 3)), weights=weights)
