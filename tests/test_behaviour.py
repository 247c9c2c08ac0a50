"""Properties of every backend: invariances, upstream gradients, determinism, memory, torch.compile and autocast."""

import functools
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tclr_kernels as tk
from tclr_kernels import checks

from . import oracle
from .oracle import DTYPES, FURTHER, LOSSES, run, same_bits

PAIRS = "nt_xent", "clip_loss"
KINDS = [name for name in oracle.KINDS if name != "tclr"]


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# ---- invariances


@pytest.mark.parametrize("name", PAIRS)
def test_permuted_rows_permute_losses_and_gradients(name, float64):
    loss = LOSSES[name]
    a, b = loss.inputs((13, 2, 6))
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    out, grads = run(loss.call, [a, b], backend=float64)
    again, again_grads = run(loss.call, [a[order], b[order]], backend=float64)
    close(again.view(2, 13), out.view(2, 13)[:, order])
    close(again_grads, tuple(g[order] for g in grads))


@pytest.mark.parametrize("name", [*PAIRS, "local_local", "global_local"])
def test_swapped_views_swap_gradients(name, float64):
    a, b = LOSSES[name].inputs((5, 4, 6))
    function = getattr(tk, name)
    out, (da, db) = run(function, [a, b], backend=float64)
    again, (second, first) = run(function, [b, a], backend=float64)
    close([again, first, second], [out, da, db])


@pytest.mark.parametrize("name", KINDS)
def test_rotated_rows_have_the_same_loss_and_rotated_gradients(name, float64):
    inputs = LOSSES[name].inputs((5, 3, 6))
    Q = torch.linalg.qr(oracle.correlated([(6, 6)], 0, 3)[0])[0]
    out, grads = run(LOSSES[name].call, inputs, backend=float64)
    again, again_grads = run(LOSSES[name].call, [x @ Q for x in inputs], backend=float64)
    close([again, *again_grads], [out, *(g @ Q for g in grads)])


@pytest.mark.parametrize("name", KINDS)
def test_losses_ignore_the_length_of_rows_and_gradients_are_orthogonal_to_them(name, float64):
    inputs = LOSSES[name].inputs((5, 3, 6))
    lengths = [oracle.some_gradient(x.shape[:-1] + (1,)) * 100 for x in inputs]
    out, grads = run(LOSSES[name].call, inputs, backend=float64)
    again, again_grads = run(LOSSES[name].call, [x * s for x, s in zip(inputs, lengths, strict=True)], backend=float64)
    close([again, *again_grads], [out, *(g / s for g, s in zip(grads, lengths, strict=True))])
    for x, g in zip(inputs, grads, strict=True):
        assert (x * g).sum(-1).abs().max() < 1e-13


# ---- incoming gradients


@pytest.mark.parametrize("name", KINDS[:-1])
def test_strided_expanded_zero_and_scaled_upstream_gradients_are_applied(name, backend):
    loss = LOSSES[name]
    inputs = loss.inputs((7, 3, 9), torch.float32)
    shape = loss.call(*inputs).shape
    dense = oracle.some_gradient(shape).float()
    wanted = run(loss.call, inputs, dense, backend=backend)
    strided = torch.stack([dense, torch.full_like(dense, torch.nan)], -1)[..., 0]
    same_bits(run(loss.call, inputs, strided, backend=backend), wanted)
    ones = run(loss.call, inputs, torch.ones(shape), backend=backend)
    same_bits(run(loss.call, inputs, torch.ones(()).expand(shape), backend=backend), ones)
    _, grads = run(loss.call, inputs, torch.zeros(shape), backend=backend)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    _, grads = run(loss.call, inputs, -8 * dense, backend=backend)
    torch.testing.assert_close(grads, tuple(-8 * g for g in wanted[1]))


# ---- determinism and side effects


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_inputs_are_unchanged_and_runs_repeat_bit_by_bit(name, dtype, backend):
    inputs = LOSSES[name].inputs((9, 4, 21), dtype)
    before = [x.clone() for x in inputs]
    first = run(LOSSES[name].call, inputs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    same_bits(run(LOSSES[name].call, inputs, backend=backend), first)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "name, sizes",
    [
        ("nt_xent", (700, 2, 40)),
        ("local_local", (5000, 4, 8)),
        ("tclr release", (600, 4, 32)),
        ("tclr release total", (600, 4, 32)),
    ],
)
def test_bits_do_not_depend_on_threads(name, sizes, seed, kernels, threads):
    """The cases have one group for several threads, many groups, and sums of over 32768 terms, which ATen splits."""
    inputs = LOSSES[name].inputs(sizes, torch.float32, seed=seed)
    function = functools.partial(LOSSES[name].call, backend=kernels)
    if not name.startswith("tclr"):
        function = functools.partial(function, reduction="sum")
    tau = torch.tensor(0.1)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(lambda tau, *z: function(*z, temperature=tau), [tau, *inputs]))
    same_bits(results[1], results[0])
    same_bits(results[2], results[0])


# ---- memory


@pytest.mark.parametrize("name", ["nt_xent", "clip_loss", "instance_contrastive", "local_local"])
def test_memory_saved_for_backward_is_linear_in_the_rows(name, kernels):
    inputs = [x.requires_grad_() for x in LOSSES[name].inputs((300, 4, 8), torch.float32)]
    numbers = sum(x.numel() for x in inputs)
    M, V = numbers // 8, 4 if name == "instance_contrastive" else 2
    saved = saved_bytes(functools.partial(LOSSES[name].call, backend=kernels), inputs)
    assert 0 < saved <= 4 * (numbers + 4 * V * M)  # the inputs, term, neg and pos of [V, V, N], and room for one more


@pytest.mark.parametrize("name", FURTHER)
def test_memory_saved_for_backward_is_linear_with_labels_and_negatives(name, kernels):
    """A few float64 numbers are saved for each row and set. The matrix would be hundreds."""
    inputs = [x.requires_grad_() for x in LOSSES[name].inputs((300, 4, 8), torch.float32)]
    numbers = sum(x.numel() for x in inputs)
    saved = saved_bytes(functools.partial(LOSSES[name].call, backend=kernels), inputs)
    assert 0 < saved <= 44 * numbers


def saved_bytes(call, inputs):
    """The bytes of the tensors that autograd saves for the backward pass."""
    saved = {}

    def count(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        out = call(*inputs)  # kept alive, so that no two saved tensors get the same address
    assert out.requires_grad
    return sum(saved.values())


PEAK = """
import re, sys, torch, tclr_kernels as tk
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def loss(B):
    a, b = torch.randn(2, B, 16).unbind()
    tk.nt_xent(a.requires_grad_(), b.requires_grad_(), backend=sys.argv[1]).backward()
loss(64)
before = peak()
loss(6144)
print(peak() - before)
"""


def test_the_gram_matrix_is_never_allocated(native):
    """It would take 576 MiB for these 12288 rows."""
    status = subprocess.run([sys.executable, "-c", PEAK, native], capture_output=True, text=True)
    assert status.returncode == 0, status.stderr
    assert float(status.stdout) < 32


# ---- PyTorch's tools


@pytest.mark.parametrize("name", KINDS)
def test_autocast_never_lowers_precision(name, backend):
    inputs = LOSSES[name].inputs((5, 3, 9), torch.float32)
    wanted = run(LOSSES[name].call, inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(LOSSES[name].call, inputs, backend=backend)  # forward and backward
    same_bits(found, wanted)


def test_autocast_promotes_mixed_dtypes(backend):
    a, b = LOSSES["nt_xent"].inputs((5, 2, 9), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, (da, db) = run(tk.nt_xent, [a.bfloat16(), b], backend=backend)
    assert out.dtype == torch.float32 and (da.dtype, db.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, tk.nt_xent(a.bfloat16().float(), b, backend=backend))


LONG = [name for name in FURTHER if name != "sup_con"]  # each takes seconds to trace
TRACED = [pytest.param(name, marks=pytest.mark.full) if name in LONG else name for name in KINDS]


@pytest.mark.parametrize("name", TRACED)
def test_compile_needs_two_graphs_for_any_number_of_rows(name, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lambda *z: LOSSES[name].call(*z, backend=backend).sum(), backend=counter, fullgraph=True)
    for B in (2, 3, 5, 8, 13, 64):
        inputs = LOSSES[name].inputs((B, 3, 6), torch.float32)
        wanted = run(lambda *z: LOSSES[name].call(*z, backend=backend).sum(), inputs)
        torch.testing.assert_close(run(call, inputs), wanted)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("leaves", ["none", "the second", "all, under no_grad"])
@pytest.mark.parametrize("name", ["nt_xent", "tclr release"])
def test_compiled_losses_agree_if_some_inputs_need_no_gradient(name, leaves, backend):
    torch._dynamo.reset()
    inputs = LOSSES[name].inputs((5, 3, 7), torch.float32)
    for k, x in enumerate(inputs):
        x.requires_grad_(leaves != "none" and (k == 1 or leaves != "the second"))
    call = functools.partial(LOSSES[name].call, backend=backend)
    with torch.set_grad_enabled(leaves != "all, under no_grad"):
        found = torch.compile(lambda *z: call(*z), backend="aot_eager", fullgraph=True)(*inputs)
        torch.testing.assert_close(found, call(*inputs))
        assert found.requires_grad == (leaves == "the second")


def test_calls_from_threads_with_their_own_thread_counts_agree(kernels):
    """It runs in another process, since it changes the number of threads permanently."""
    code = f"""
import threading, torch, tclr_kernels as tk
a, b = torch.randn(2, 1500, 32).unbind()
go = threading.Event()
results = []
def work():
    torch.set_num_threads(1)
    go.wait()
    results.append(tk.nt_xent(a, b, backend={kernels!r}).item())
workers = [threading.Thread(target=work) for _ in range(4)]
[w.start() for w in workers]
torch.set_num_threads(8)
go.set()
[w.join() for w in workers]
assert len(results) == 4 and len(set(results)) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", ["highest", "high", "ieee", "tf32"])
def test_both_settings_of_the_float32_precision_are_accepted(how, backend):
    """PyTorch's older getter fails after the newer setting was used, ours must not. TF32 changes nothing on the CPU."""
    inputs = LOSSES["nt_xent"].inputs((5, 2, 3), torch.float32)
    wanted = run(tk.nt_xent, inputs, backend=backend)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        if how in ("highest", "high"):
            torch.set_float32_matmul_precision(how)
        else:
            torch.backends.cuda.matmul.fp32_precision = how
        assert checks.tf32_allowed() == (how in ("high", "tf32"))
        if backend in ("native", "reference"):
            same_bits(run(tk.nt_xent, inputs, backend=backend), wanted)
        compiled = torch.compile(functools.partial(tk.nt_xent, backend=backend), fullgraph=True, backend="eager")
        assert torch.isfinite(compiled(*inputs))
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before
        torch._dynamo.reset()


@pytest.mark.parametrize("tau", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operators_pass_pytorchs_opcheck(dtype, cross, tau, native):
    ops = torch.ops.tclr_kernels
    sets = oracle.correlated([(2, 5, 3)] * 4, 0.5, 0)
    sets = [x.to(dtype) for x in sets]
    tau = (tau, 0.0) if isinstance(tau, torch.Tensor) else (None, tau)
    torch.library.opcheck(ops.gram_forward.default, (sets, *tau, True, cross))
    term, neg, pos = ops.gram_forward(sets, *tau, True, cross)
    for grads in ((term, None, None), (None, neg.where(neg.isfinite(), 0), pos)):
        torch.library.opcheck(ops.gram_backward.default, (sets, *tau, True, cross, neg, pos, *grads))


@pytest.mark.parametrize("dtype, labelled", [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_the_general_operators_pass_pytorchs_opcheck(dtype, labelled, native):
    ops, check = torch.ops.tclr_kernels, torch.library.opcheck
    sets = [x.to(dtype) for x in oracle.correlated([(2, 5, 3)] * 2, 0.5, 0)]
    keys, tau = (torch.tensor([[0, 1, 0, -1, 1]] * 2), (torch.tensor(0.1), 0.0)) if labelled else (None, (None, 0.1))
    of_range = None if keys is None else keys[:, 1:4]
    for rows, columns, first, row_keys in (
        ([], sets, 0, keys),
        ([x[:, 1:4] for x in sets], sets, 1, of_range),
        ([sets[0][:, 1:4]], sets[1:], -1, of_range),
    ):
        settings = rows, columns, *tau, True, False, first, row_keys, keys
        with_mean = first < 0 and keys is None
        check(ops.rectangle.default, (*settings, with_mean))
        neg, pos, *labelled = ops.rectangle(*settings, with_mean)
        anchors = [neg, pos, pos]
        if keys is not None:
            check(ops.pairs.default, (*settings, pos))
            anchors += [labelled[0], pos, pos, labelled[2]]
        check(ops.rectangle_backward.default, (*settings, anchors, [], True, bool(rows)))
        if rows:
            check(ops.rectangle_backward.default, (*settings, anchors, [], False, True))


def test_torch_func_grad_equals_autograd(float64):
    a, b = LOSSES["nt_xent"].inputs((5, 2, 4))
    found = torch.func.grad(lambda a, b: tk.nt_xent(a, b, backend=float64), argnums=(0, 1))(a, b)
    close(found, run(tk.nt_xent, [a, b], backend=float64)[1])
