"""What the losses promise beyond their formulas: special rows, dtypes, temperatures, errors, derivatives."""

import functools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import tclr_kernels as tk

from . import oracle
from .oracle import DTYPES, KINDS, LOSSES, run

sup_con = functools.partial(tk.sup_con, labels=torch.tensor([0, 1, 0, 1, -1]))
TAKES = {  # function -> {name of an input: its shape}
    tk.nt_xent: dict(a=(5, 8), b=(5, 8)),
    tk.clip_loss: dict(a=(5, 8), b=(5, 8)),
    tk.info_nce: dict(query=(5, 8), key=(5, 8)),
    sup_con: dict(z=(5, 8)),
    tk.instance_contrastive: dict(views=(3, 5, 8)),
    tk.local_local: dict(x1=(5, 4, 8), x2=(5, 4, 8)),
    tk.global_local: dict(s=(5, 4, 8), x=(5, 4, 8)),
    tk.tclr: dict(g=(2, 5, 8), s=(2, 5, 4, 8), x=(2, 5, 4, 8)),
}
ARGUMENTS = [(function, name) for function, takes in TAKES.items() for name in takes]


def tensors(function):
    return {name: torch.randn(shape) for name, shape in TAKES[function].items()}


@pytest.fixture
def pair():
    return LOSSES["nt_xent"].inputs((5, 2, 8), torch.float32)


# ---- zero rows, and rows of any length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_zero_row_has_similarity_zero_and_gradient_zero(name, dtype, backend):
    inputs = LOSSES[name].inputs((5, 4, 6), dtype)
    for x in inputs:
        x.flatten(0, -2)[1] = 0
    exact = [x.double() for x in inputs]
    out, grads = run(LOSSES[name].call, inputs, backend=backend)
    wanted, want_grads = run(lambda *z: LOSSES[name].eager(*map(or_zero, z), 0.1, oracle.without_positive), exact)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    for g, want in zip(grads, want_grads, strict=True):
        assert torch.equal(g.flatten(0, -2)[1], torch.zeros(6, dtype=dtype))
        assert oracle.error(g, want) <= 2 * oracle.GRADIENT[dtype] * want.abs().max()


def or_zero(x):
    """Unit rows. A zero row stays zero and gets no gradient."""
    zero = (x == 0).all(-1, keepdim=True)
    return oracle.unit(x.masked_fill(zero, 1)).masked_fill(zero, 0)


def test_if_all_rows_are_zero_all_candidates_are_equally_likely_and_the_gradient_is_zero(backend):
    a = torch.zeros(5, 8)
    out, grads = run(tk.nt_xent, [a, a], backend=backend)
    assert out.item() == pytest.approx(math.log(9)) and all(torch.equal(g, a) for g in grads)


@pytest.mark.parametrize(
    "dtype, scale",
    [
        *((torch.float32, scale) for scale in (1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37)),
        *((torch.bfloat16, scale) for scale in (1e-38, 1e-20, 1e20, 1e37)),
        *((torch.float16, scale) for scale in (1e-6, 1e-3, 1e3, 1e4)),
        *((torch.float64, scale) for scale in (1e-307, 1e-160, 1e160, 1e306)),
    ],
)
@pytest.mark.parametrize("name", KINDS)
def test_extremely_short_and_long_rows_have_accurate_losses_and_gradients(name, dtype, scale, backend, request):
    if dtype == torch.float64:
        request.getfixturevalue("float64")
    inputs = LOSSES[name].inputs((5, 4, 16), dtype, scale=scale)
    exponent = -math.floor(math.log2(scale))
    near_one = [torch.ldexp(x.double(), torch.tensor(exponent)) for x in inputs]
    out, grads = run(LOSSES[name].call, inputs, backend=backend)
    want, want_grads = run(lambda *z: LOSSES[name].textbook(z, 0.1, how=oracle.without_positive), near_one)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    for g, want in zip(grads, want_grads, strict=True):
        wanted = torch.ldexp(want, torch.tensor(exponent)).to(dtype).double()
        largest = wanted[wanted.isfinite()].abs().max()
        # Near the largest number of the dtype, one of the two, or a summand of it, may have been rounded to infinity.
        # So all values beyond `top` count as equal.
        top = (0.4 if name in oracle.SEVERAL_CALLS else 0.98) * torch.finfo(dtype).max
        found, wanted = (x.double().clamp(-top, top) for x in (g, wanted))
        assert oracle.error(found, wanted) <= 2 * oracle.GRADIENT[dtype] * largest + torch.finfo(dtype).smallest_normal


# ---- NaN and infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["local_local", "global_local", "nt_xent", "clip_loss"])
def test_nan_stays_within_its_group(name, dtype, bad, backend):
    inputs = oracle.correlated([(4, 3, 6)] * 2, 0.5, 0)
    clean = [x.to(dtype) for x in inputs]
    inputs = [x.clone() for x in clean]
    inputs[1][2, 1, 3] = bad
    others = torch.tensor([0, 1, 3])
    out, grads = run(LOSSES[name].call, inputs, backend=backend)
    want, want_grads = run(LOSSES[name].call, clean, backend=backend)
    assert torch.equal(out[others], want[others]) and out[2].isnan().any()
    for g, w in zip(grads, want_grads, strict=True):
        assert torch.equal(g[others], w[others]) and g[2].isnan().any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", KINDS)
def test_nan_and_infinity_reach_the_loss_and_the_gradient(name, bad, backend):
    inputs = LOSSES[name].inputs((5, 4, 6), torch.float32)
    inputs[-1].view(-1)[7] = bad
    for normalize in (True, False) if math.isnan(bad) else (True,):
        out, grads = run(LOSSES[name].call, inputs, normalize=normalize, backend=backend)
        assert not out.isfinite().all() and grads[-1].isnan().any()


@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_tclr_kernels_check_names_the_row_that_is_not_finite(function, name, backend, monkeypatch):
    given = tensors(function)
    row = [size - 1 for size in given[name].shape[:-1]]
    given[name][tuple(row)][2] = math.nan
    function(**given, backend=backend)
    monkeypatch.setenv("TCLR_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=f"{name}: .*row {row}".replace("[", r"\[").replace("]", r"\]")):
        function(**given, backend=backend)


# ---- dtypes and the temperature


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_loss_is_float32_or_float64_and_gradients_have_the_dtype_of_the_input(name, dtype, backend):
    out, grads = run(LOSSES[name].call, LOSSES[name].inputs((3, 2, 4), dtype), backend=backend)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(g.dtype == dtype for g in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_temperature_may_be_a_tensor_of_any_dtype(name, dtype, backend):
    inputs = LOSSES[name].inputs((5, 3, 8), torch.float32)
    tau = torch.tensor(0.25, dtype=dtype)
    out, (d_tau,) = run(lambda tau: LOSSES[name].call(*inputs, temperature=tau, backend=backend), [tau])
    exact = [x.double() for x in inputs]
    want, (d_want,) = run(lambda tau: LOSSES[name].textbook(exact, tau), [tau.double()])
    assert out.dtype == torch.float32 and d_tau.dtype == dtype
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_tau.double(), d_want, rtol=1e-5 + torch.finfo(dtype).eps, atol=1e-5)
    found = LOSSES[name].call(*inputs, temperature=0.25, backend=backend)
    torch.testing.assert_close(out, found, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_a_float16_temperature_is_rounded_once(backend):
    """All four terms of the objective have one, and labels make native compute them by separate calls."""
    for seed in (22, 27, 31, 48):  # of 60, those whose gradient was wrong when each term's was rounded
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(shape, generator=generator) for shape in ((2, 5, 8), (2, 5, 3, 8), (2, 5, 3, 8))]
        found, want = (
            torch.autograd.grad(
                tk.tclr(*inputs, tau, form="release", labels=torch.arange(5), backend=backend).total, tau
            )[0].double()
            for tau in (torch.tensor(0.25, dtype=dtype, requires_grad=True) for dtype in (torch.float16, torch.float64))
        )
        assert abs(found - want) <= 0.51 * torch.finfo(torch.float16).eps * abs(want)


@pytest.mark.parametrize(
    "wrong",
    [0.0, 0, -0.1, math.nan, math.inf, "0.1", None, True, 1j, [0.1], torch.ones(2), torch.ones(0), torch.tensor(1)],
    ids=repr,
)
@pytest.mark.parametrize("function", TAKES)
def test_errors_name_a_wrong_temperature(function, wrong, backend):
    with pytest.raises((ValueError, TypeError), match="temperature: found"):
        function(**tensors(function), temperature=wrong, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_temperature_may_be_any_tensor_of_one_element(name, shape, dtype, backend):
    """FSDP needs parameters of at least one dimension. The gradient has the tensor's shape and dtype."""
    inputs = LOSSES[name].inputs((5, 3, 8), torch.float32)
    want, want_grads = run(temperature_first(name, backend), [torch.tensor(0.25, dtype=dtype), *inputs])
    out, grads = run(temperature_first(name, backend), [torch.full(shape, 0.25, dtype=dtype), *inputs])
    assert torch.equal(out, want) and grads[0].shape == shape and grads[0].dtype == dtype
    assert all(torch.equal(g, w.expand_as(g)) for g, w in zip(grads, want_grads, strict=True))


def same(found, wanted):
    assert all(map(torch.equal, found, wanted))


def temperature_first(name, backend):
    return lambda tau, *z: LOSSES[name].call(*z, temperature=tau, backend=backend)


def test_one_element_of_a_larger_tensor_may_be_the_temperature(pair, backend):
    table = torch.tensor([[0.1, 0.2], [0.3, 0.4]], requires_grad=True)
    tk.nt_xent(*pair, temperature=table[:1, 1:], backend=backend).backward()
    _, (d_tau,) = run(lambda tau: tk.nt_xent(*pair, temperature=tau, backend=backend), [torch.tensor(0.2)])
    assert torch.equal(table.grad, torch.tensor([[0, d_tau], [0, 0]]))


@pytest.mark.parametrize(
    "value",
    [10**400, 5e-324, np.float32(np.inf), Fraction(1, 10**400)],
    ids=["a large integer", "5e-324", "float32 inf", "a small fraction"],
)
def test_errors_name_a_temperature_beyond_the_range_of_a_float(value, pair):
    with pytest.raises(ValueError, match="temperature: found"):
        tk.nt_xent(*pair, temperature=value)


def test_temperature_on_another_device_is_an_error(pair, backend):
    with pytest.raises(ValueError, match="temperature: found a tensor on meta"):
        tk.nt_xent(*pair, temperature=torch.tensor(0.1, device="meta"), backend=backend)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_tclr_kernels_check_refuses_a_temperature_tensor_with_a_wrong_value(wrong, pair, backend, monkeypatch):
    tk.nt_xent(*pair, temperature=torch.tensor(wrong), backend=backend)
    monkeypatch.setenv("TCLR_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="temperature: found"):
        tk.nt_xent(*pair, temperature=torch.tensor(wrong), backend=backend)


# ---- tensors made in inference mode


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", ["the last", "all but the temperature", "the temperature"])
@pytest.mark.parametrize("name", KINDS)
def test_inference_tensors_are_accepted_as_inputs(name, frozen, dtype, backend):
    """An example is the output of a frozen network. Autograd itself cannot save such tensors."""
    call, inputs = temperature_first(name, backend), LOSSES[name].inputs((5, 3, 8), dtype)
    inputs = [torch.tensor(0.25, dtype=dtype), *inputs]
    n = len(inputs)
    which = {"the last": [n - 1], "all but the temperature": range(1, n), "the temperature": [0]}[frozen]
    learnt = [k for k in range(n) if k not in which]

    def loss(*z):
        with torch.inference_mode():
            made = [x.clone() for x in inputs]
        return call(*(made[k] if k in which else z[learnt.index(k)] for k in range(n)))

    out, grads = run(loss, [inputs[k] for k in learnt])
    want, want_grads = run(call, inputs)
    assert torch.equal(out, want)
    # if further negatives need no gradient, that of the rows is computed in another way
    equal = torch.testing.assert_close if name in oracle.SEVERAL_CALLS and frozen != "the temperature" else same
    equal(list(grads), [want_grads[k] for k in learnt])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("name", KINDS)
def test_inference_tensors_are_accepted_without_gradients(name, mode, backend):
    with torch.inference_mode():
        made = [torch.tensor([0.25]), *LOSSES[name].inputs((5, 3, 8), torch.float32)]
    plain = [torch.tensor([0.25]), *LOSSES[name].inputs((5, 3, 8), torch.float32)]
    leaves = [x.requires_grad_() for x in plain]
    call = temperature_first(name, backend)
    with mode():
        out = call(*made)
        assert not out.requires_grad
        assert torch.equal(out, call(*leaves)) and torch.equal(out, call(made[0], *leaves[1:]))
    assert torch.equal(call(*made), out)


# ---- nothing, and one row


@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_errors_name_an_empty_input(function, name, backend):
    shapes = TAKES[function]
    for dimension in range(len(shapes[name])):
        given = tensors(function)
        shape = [0 if d == dimension else size for d, size in enumerate(shapes[name])]
        given[name] = torch.zeros(shape)
        with pytest.raises(ValueError, match=rf"\b{name}: found an empty tensor"):
            function(**given, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["nt_xent", "clip_loss", "instance_contrastive", "sup_con", "local_local", "global_local"]
)
def test_one_row_has_loss_and_gradient_exactly_zero(name, dtype, backend):
    """The losses within videos have T = 1 clip, the others B = 1 row."""
    sizes = (4, 1, 8) if name.endswith("local") else (1, 3, 8)
    for tau in (0.1, 0.01):
        out, grads = run(LOSSES[name].call, LOSSES[name].inputs(sizes, dtype, 0), temperature=tau, backend=backend)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in (out, *grads))


def test_one_video_of_one_clip_has_loss_and_gradient_exactly_zero(backend):
    for form in ("tclr", "tclr release"):
        out, grads = run(LOSSES[form].call, LOSSES[form].inputs((1, 1, 8), torch.float32), backend=backend)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in (out, *grads))


# ---- misuse


WRONG = {
    "list": (lambda x: x.tolist(), ["list", "Tensor"]),
    "None": (lambda x: None, ["None", "Tensor"]),
    "numpy": (lambda x: np.ones(x.shape), ["numpy", "Tensor"]),
    "integers": (lambda x: x.long(), ["int64", "float32"]),
    "complex": (lambda x: x.to(torch.complex64), ["complex64", "float32"]),
    "sparse": (lambda x: x.to_sparse(), ["sparse", "dense"]),
    "one dimension": (lambda x: x.flatten(), ["1 dim", "["]),
}
SIZES = {  # how one input differs from the others
    "another size": (lambda x: x[..., :-1], []),
    "another dtype": (lambda x: x.double(), ["float64", "float32"]),
    "another device": (lambda x: x.to("meta"), ["meta", "cpu"]),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("function, name", ARGUMENTS)
def test_errors_name_a_wrong_input_in_one_line(function, name, wrong, backend):
    make, words = WRONG[wrong]
    given = tensors(function)
    given[name] = make(given[name])
    named(function, given, backend, [f"{name}: found", "wanted", *words])


@pytest.mark.parametrize("wrong", SIZES)
@pytest.mark.parametrize("function, name", [(f, name) for f, name in ARGUMENTS if len(TAKES[f]) > 1])
def test_errors_name_inputs_that_differ_in_one_line(function, name, wrong, backend):
    make, words = SIZES[wrong]
    given = tensors(function)
    shape = list(given[name].shape)
    given[name] = make(given[name])
    words = words or [str(shape), str(list(given[name].shape))]
    named(function, given, backend, [name, "wanted" if wrong == "another size" else "and", *words])


def test_errors_name_a_wrong_number_of_dimensions_or_views(backend):
    x = torch.randn(3, 4, 2, 8)
    for function in (tk.local_local, tk.global_local):
        with pytest.raises(ValueError, match="4 dimensions"):
            function(x, x, backend=backend)
    for views in (1, 3):
        x = torch.randn(views, 3, 4, 8)
        with pytest.raises(ValueError, match=f"x: found V = {views}"):
            tk.tclr(x[:, :, 0], x, x, backend=backend)
    with pytest.raises(ValueError, match="views: found V = 1"):
        tk.instance_contrastive(torch.randn(1, 3, 8), backend=backend)


@pytest.mark.parametrize("function, setting", [*((f, "reduction") for f in list(TAKES)[:-1]), (tk.tclr, "form")])
def test_errors_name_an_unknown_setting(function, setting, backend):
    with pytest.raises(ValueError, match=f"{setting}: found 'other', wanted one of"):
        function(**tensors(function), **{setting: "other"}, backend=backend)


def named(function, given, backend, words):
    with pytest.raises((ValueError, TypeError)) as raised:
        function(**given, backend=backend)
    message = str(raised.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_meta_tensors_give_the_shape_or_an_error_that_names_the_backend(backend):
    a = torch.empty(5, 8, device="meta")
    assert tk.nt_xent(a, a, reduction="none").shape == (10,)
    with pytest.raises(TypeError, match="float32 and b torch.float16"):
        tk.nt_xent(a, a.half())
    if tk.available_backends("meta")[backend] is not None:
        with pytest.raises(RuntimeError, match=f"backend='{backend}' .* meta"):
            tk.nt_xent(a, a, backend=backend)


# ---- higher derivatives and transforms (test_behaviour.py has determinism)


@pytest.mark.parametrize("name", KINDS)
def test_reference_has_second_derivatives(name):
    inputs = [x.requires_grad_() for x in LOSSES[name].inputs((3, 2, 2))]
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    weigh = oracle.some_gradient(LOSSES[name].call(*inputs).shape)

    def call(tau, *z):
        return (LOSSES[name].call(*z, temperature=tau, backend="reference") * weigh).sum()

    assert torch.autograd.gradgradcheck(call, (tau, *inputs))


@pytest.mark.parametrize("name", KINDS)
def test_second_derivatives_on_other_backends_are_an_error_that_names_the_reference(name, kernels):
    inputs = [x.requires_grad_() for x in LOSSES[name].inputs((3, 2, 4), torch.float32)]
    loss = LOSSES[name].call(*inputs, backend=kernels).sum()
    grads = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivative.*backend="reference"'):
        torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)


def test_forward_mode_and_vmap_on_other_backends_are_errors_that_name_the_reference(kernels, pair):
    def loss(a):
        return tk.nt_xent(a, pair[1], backend=kernels)

    with pytest.raises(NotImplementedError, match='forward mode.*backend="reference"'):
        torch.func.jvp(loss, (pair[0],), (pair[0],))
    with pytest.raises(NotImplementedError, match='vmap.*backend="reference"'):
        torch.vmap(loss)(torch.stack([pair[0]] * 3))
    with pytest.raises(NotImplementedError, match='vmap.*backend="reference"'):
        torch.vmap(torch.func.grad(loss))(torch.stack([pair[0]] * 3))
    with pytest.raises(NotImplementedError, match='backend="reference"'):
        torch.func.hessian(loss)(pair[0])


def test_forward_mode_and_vmap_work_with_the_reference(pair):
    def loss(a):
        return tk.nt_xent(a, pair[1], backend="reference")

    a, (da, _) = pair[0], run(tk.nt_xent, pair, backend="reference")[1]
    _, slope = torch.func.jvp(loss, (a,), (torch.ones_like(a),))
    torch.testing.assert_close(slope, da.sum())
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(a[None])[0], da)


def test_a_zero_row_has_gradient_zero_beside_a_row_that_is_not_finite(backend):
    a, b = oracle.correlated([(4, 8)] * 2, 0.5, 0)
    a[0], a[1, 0] = 0, math.nan
    _, (grad, _) = run(tk.nt_xent, [a.float(), b.float()], backend=backend)
    assert not grad[0].any() and grad[1].isnan().all()


@pytest.mark.parametrize(
    "settings, name",
    [
        (dict(weights=[1, 1]), "weights"),
        (dict(form=["paper"]), "form"),
        (dict(backend=["native"]), "backend"),
        (dict(normalize=None), "normalize"),
        (dict(normalize="no"), "normalize"),
        (dict(temperature=1e-320), "temperature"),
    ],
)
def test_errors_name_settings_of_a_wrong_type_or_value(settings, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: found .* wanted"):
        tk.tclr(*LOSSES["tclr"].inputs((2, 2, 3)), **settings)
