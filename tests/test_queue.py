"""The queue of negatives is a ring buffer, and losses keep a copy of the rows that they have used."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tclr_kernels as tk

from . import oracle
from .oracle import run


def batches(*sizes, D=3):
    return [oracle.correlated([(n, D)], 0, n + k)[0].float() for k, n in enumerate(sizes)]


def filled(size=5, D=3, **settings):
    queue = tk.NegativeQueue(size, D, **settings)
    queue.enqueue(batches(size, D=D)[0])
    return queue


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def test_new_rows_replace_the_oldest():
    queue = tk.NegativeQueue(5, 3)
    first = queue()
    a, b, c = batches(2, 2, 4)
    queue.enqueue(a)
    torch.testing.assert_close(queue(), torch.cat([unit(a), first[2:]]))
    queue.enqueue(b)
    queue.enqueue(c)
    torch.testing.assert_close(queue(), unit(torch.stack([c[1], c[2], c[3], b[1], c[0]])))
    assert queue.position == 3


@pytest.mark.parametrize("sizes", [(12,), (3, 12), (5,), (4, 5), (1, 1, 25)], ids=str)
def test_a_batch_larger_than_the_queue_leaves_its_last_rows(sizes):
    """The queue has the same bits as after enqueueing the rows one at a time."""
    torch.manual_seed(0)
    queue = tk.NegativeQueue(5, 3)
    other = copy.deepcopy(queue)
    for batch in batches(*sizes):
        queue.enqueue(batch)
        for row in batch:
            other.enqueue(row[None])
    assert torch.equal(queue.rows, other.rows) and torch.equal(queue.position, other.position)


def test_a_new_queue_holds_random_unit_rows():
    torch.manual_seed(0)
    queue = tk.NegativeQueue(100, 8)
    torch.testing.assert_close(queue.rows.norm(dim=1), torch.ones(100))
    assert queue.rows.mean(0).abs().max() < 0.2 and not torch.equal(queue.rows, tk.NegativeQueue(100, 8).rows)


def test_rows_are_normalised_unless_normalize_is_false():
    (a,) = batches(4)
    queue = tk.NegativeQueue(4, 3, normalize=False)
    queue.enqueue(a)
    assert torch.equal(queue.rows, a)
    queue = tk.NegativeQueue(4, 3)
    queue.enqueue(torch.cat([1e-30 * a[:2], 0 * a[2:]]))
    torch.testing.assert_close(queue.rows, torch.cat([unit(a[:2]), 0 * a[2:]]))


LOSSES = {
    "nt_xent": lambda a, b, queue, **s: tk.nt_xent(a, b, negatives=queue, **s),
    "clip_loss": lambda a, b, queue, **s: tk.clip_loss(a, b, negatives=(queue, None), **s),
    "info_nce": lambda a, b, queue, **s: tk.info_nce(a, b, negatives=queue, in_batch=False, **s),
    "instance_contrastive": lambda a, b, queue, **s: tk.instance_contrastive([a, b], negatives=queue, **s),
    "its rows": lambda a, b, queue, **s: tk.nt_xent(a, b, negatives=queue(), **s),
}
each = pytest.mark.parametrize("name", LOSSES)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "its rows"])
def test_a_loss_converts_the_queues_rows_to_the_dtype_of_the_anchors(name, dtype, backend):
    a, b = (x.to(dtype) for x in batches(4, 4))
    queue = filled()
    found = run(lambda a, b: LOSSES[name](a, b, queue, backend=backend), [a, b])
    oracle.same_bits(found, run(lambda a, b: LOSSES[name](a, b, queue.rows.to(dtype), backend=backend), [a, b]))


@each
def test_enqueueing_between_loss_and_backward_changes_no_gradient(name, backend):
    leaves = [x.requires_grad_() for x in batches(4, 4)]
    queue = filled()
    loss = LOSSES[name](*leaves, queue, backend=backend)
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    queue.enqueue(leaves[0])
    again = torch.autograd.grad(loss, leaves)
    assert all(map(torch.equal, again, wanted))
    assert not queue.rows.requires_grad


@each
def test_a_loss_is_the_same_with_and_without_gradients(name, backend):
    a, b = batches(4, 4)
    queue = filled()
    with torch.no_grad():
        without = LOSSES[name](a, b, queue, backend=backend)
    assert torch.equal(without, LOSSES[name](a.requires_grad_(), b, queue, backend=backend))


def test_a_queue_continues_from_its_saved_state_bit_by_bit(backend):
    def steps(queue, data):
        return [tk.info_nce(x, x.flip(0), negatives=enqueued(queue, x), in_batch=False, backend=backend) for x in data]

    def enqueued(queue, x):
        queue.enqueue(x)
        return queue

    data = batches(2, 4, 3, 2, 6, 1)
    torch.manual_seed(0)
    queue = tk.NegativeQueue(7, 3)
    steps(queue, data[:3])
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    other = tk.NegativeQueue(7, 3)
    other.load_state_dict(torch.load(file, weights_only=True))
    for copied in (other, copy.deepcopy(queue), pickle.loads(pickle.dumps(queue))):
        assert repr(copied) == repr(queue) == "NegativeQueue(size=7, dim=3, normalize=True)"
    assert all(map(torch.equal, steps(queue, data[3:]), steps(other, data[3:])))
    assert torch.equal(queue.rows, other.rows)


def test_a_queue_in_a_model_is_moved_cast_and_saved_but_has_no_parameters():
    model = nn.Sequential(nn.Linear(3, 3))
    model.queue = filled()
    assert not list(model.queue.parameters()) and set(model.state_dict()) >= {"queue.rows", "queue.position"}
    queue = model.to(torch.bfloat16).queue
    assert queue.rows.dtype == torch.bfloat16 and queue.position.dtype == torch.int64
    queue.enqueue(batches(2)[0])
    torch.testing.assert_close(queue.rows[:2].float(), unit(batches(2)[0]), rtol=1e-2, atol=1e-2)


def test_keys_may_have_any_dtype_leading_dimensions_and_a_graph():
    (a,) = batches(6)
    queues = [tk.NegativeQueue(6, 3, normalize=False) for _ in range(4)]
    with torch.inference_mode():
        inference = a.clone()
    for queue, keys in zip(queues, (a.double(), a.view(2, 3, 3), (a * 1).requires_grad_(), inference), strict=True):
        queue.enqueue(keys)
        assert torch.equal(queue.rows, a) and not queue.rows.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queues[0].enqueue(a)
    assert torch.equal(queues[0].rows, a)


def test_no_value_is_read_from_the_device():
    """Meta tensors have no values, so reading one would raise an error."""
    queue = tk.NegativeQueue(5, 3).to("meta")
    queue.enqueue(torch.ones(7, 3, device="meta"))
    a = torch.ones(4, 3, device="meta")
    assert tk.info_nce(a, a, negatives=queue, in_batch=False).shape == ()
    assert tk.sup_con(a, torch.zeros(4, dtype=torch.int64, device="meta")).shape == ()


def test_a_step_that_enqueues_compiles_without_a_graph_break(backend):
    queue = filled()
    other = copy.deepcopy(queue)

    def step(a, b, queue):
        loss = tk.info_nce(a, b, negatives=queue, in_batch=False, backend=backend)
        queue.enqueue(b)
        return loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    for a, b in zip(batches(4, 4, 4), batches(4, 4, 4)[::-1], strict=True):
        (out, grads), (want, want_grads) = (
            run(lambda a, b, f=f, q=q: f(a, b, q), [a, b]) for f, q in ((compiled, queue), (step, other))
        )
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(grads, want_grads)
        torch.testing.assert_close(queue.rows, other.rows)
        assert torch.equal(queue.position, other.position)


KEYS = {
    "another width": (torch.ones(4, 2), r"keys: found shape \[4, 2\], wanted \[..., n, 3\]"),
    "one dimension": (torch.ones(3), "keys: found 1 dimensions"),
    "empty": (torch.ones(0, 3), "keys: found an empty tensor"),
    "integers": (torch.ones(4, 3, dtype=torch.int64), "keys: found dtype torch.int64"),
    "a list": ([[1.0, 2.0, 3.0]], "keys: found a list"),
    "another device": (torch.ones(4, 3, device="meta"), "the queue is on cpu and keys on meta"),
}


@pytest.mark.parametrize("wrong", KEYS)
def test_wrong_keys_are_an_error_and_leave_the_queue_unchanged(wrong):
    queue = filled()
    before = copy.deepcopy(queue.state_dict())
    keys, message = KEYS[wrong]
    with pytest.raises((TypeError, ValueError), match=message):
        queue.enqueue(keys)
    assert all(torch.equal(x, before[name]) for name, x in queue.state_dict().items())


def test_tclr_kernels_check_names_the_key_that_is_not_finite(monkeypatch):
    monkeypatch.setenv("TCLR_KERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=r"keys: found a NaN or Inf in row \[1\]"):
        filled().enqueue(torch.tensor([[1.0, 2, 3], [1, torch.nan, 3]]))


@pytest.mark.parametrize(
    "arguments, name", [((0, 3), "size"), ((5, 0), "dim"), ((5.0, 3), "size"), ((True, 3), "size")]
)
def test_errors_name_wrong_sizes(arguments, name):
    with pytest.raises(ValueError, match=f"{name}: found .*, wanted an integer >= 1"):
        tk.NegativeQueue(*arguments)
    with pytest.raises(TypeError, match="normalize: found 1"):
        tk.NegativeQueue(5, 3, normalize=1)
