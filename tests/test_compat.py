"""The drop-ins equal their formulas and, with --full, the libraries that they replace."""

import copy
import functools
import importlib
import inspect
import itertools
import pickle
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks import dropins, peers
from tclr_kernels import compat

from .ranks import Error

PAGE = Path(__file__).parents[1] / "docs" / "drop-ins.md"
CLOSE = dict(rtol=1e-12, atol=1e-12)


def leaves(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def same(ours, wanted, inputs):
    """Asserts that two functions of the inputs have the same values and gradients."""
    values = [call(*inputs) for call in (ours, wanted)]
    torch.testing.assert_close(*values, **CLOSE)
    gradients = [torch.autograd.grad(y, inputs, allow_unused=True, materialize_grads=True) for y in values]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


# ---- the formulas, from the whole matrix of similarities


def similarities(a, b, tau, normalize=True):
    return (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T if normalize else a @ b.T) / tau


def off_diagonal(S):
    return S.masked_fill(torch.eye(*S.shape, dtype=torch.bool), -torch.inf)


def nt_xent(a, b, tau):
    z = torch.cat([a, b])
    partner = torch.arange(len(z)).roll(len(a))
    return F.cross_entropy(off_diagonal(similarities(z, z, tau)), partner)


def clip(a, b, scale):
    S, own = scale * a @ b.T, torch.arange(len(a))
    return (F.cross_entropy(S, own) + F.cross_entropy(S.T, own)) / 2


def dcl(a, b, tau, weights=None, two_logarithms=False):
    def one(a, b):
        same_view, other = off_diagonal(similarities(a, a, tau)), similarities(a, b, tau)
        w = weights(F.normalize(a, dim=1), F.normalize(b, dim=1)) if weights else 1
        parts = [same_view, off_diagonal(other)]
        negatives = [x.logsumexp(1) for x in (parts if two_logarithms else [torch.cat(parts, 1)])]
        return (sum(negatives) - w * other.diagonal()).mean()

    return (one(a, b) + one(b, a)) / 2


def mises_fisher(a, b, sigma=0.5):
    return 2 - len(a) * torch.softmax((a * b).sum(1).detach() / sigma, 0)


def positives(keys, others=None):
    if others is None:
        return (keys[:, None] == keys).fill_diagonal_(False)
    return keys[:, None] == others


def sup_con_terms(S, positive):
    """The loss of each row, and which rows have positives. S is -inf for pairs that are no candidates."""
    log_p = S.log_softmax(1).masked_fill(~positive, 0)
    count = positive.sum(1)
    return -log_p.sum(1) / count.clamp(min=1), count > 0


def simclr_of_solo(z, indexes, tau):
    S = off_diagonal(similarities(z, z, tau))
    return (S.logsumexp(1) - S.masked_fill(~positives(indexes), -torch.inf).logsumexp(1)).mean()


def pml_nt_xent(S, positive, negative):
    """The mean over all positive pairs, computed one by one. The candidates are the pair and the row's negatives."""
    terms = [
        torch.cat([S[i, p][None], S[i][negative[i]]]).logsumexp(0) - S[i, p] for i, p in positive.nonzero().tolist()
    ]
    return torch.stack(terms).mean()


def ranking(q, d, *hard, scale, normalize=True, directions=("query_to_doc",), joint=True):
    """joint: a single softmax over the candidates of all directions, otherwise the mean of one loss for each."""
    N, documents = len(q), torch.cat([d, *hard])
    at_scale = functools.partial(similarities, tau=1 / scale, normalize=normalize)
    of_same_query = torch.eye(N, dtype=torch.bool).repeat(1, 1 + len(hard))
    matrices = {
        "query_to_doc": at_scale(q, documents),
        "query_to_query": off_diagonal(at_scale(q, q)),
        "doc_to_query": at_scale(d, q),
        "doc_to_doc": at_scale(d, documents).masked_fill(of_same_query, -torch.inf),
    }
    chosen = [matrices[name] for name in directions]
    positive = matrices["query_to_doc"].diagonal()
    logs = [torch.cat(chosen, 1).logsumexp(1)] if joint else [x.logsumexp(1) for x in chosen]
    return (sum(logs) / len(logs) - positive).mean()


# ---- each drop-in against its formula


@pytest.mark.parametrize("N, tau", [(1, 0.5), (2, 0.1), (9, 1.0), (17, 0.07)])
def test_lightlys_losses_equal_their_formulas(N, tau):
    views = leaves((N, 6), (N, 6))
    labels = torch.tensor([k % 3 - 1.0 for k in range(N)])
    same(compat.lightly.NTXentLoss(tau), lambda a, b: nt_xent(a, b, tau), views)
    for rescale in (True, False):
        loss = compat.lightly.SupConLoss(tau, rescale=rescale)
        factor = tau if rescale else 1
        same(loss, lambda a, b, f=factor: f * nt_xent(a, b, tau), views)

        def wanted(a, b, f=factor):
            z = torch.cat([a, b])
            return f * sup_con_terms(off_diagonal(similarities(z, z, tau)), positives(labels.repeat(2)))[0].mean()

        same(lambda a, b, loss=loss: loss(a, b, labels), wanted, views)
    if N > 1:
        for two in (False, True):
            for weights in (None, mises_fisher, lambda a, b: ((a - b) ** 2).sum(1)):
                loss = compat.lightly.DCLLoss(tau, weights, two_logarithms=two)
                same(loss, functools.partial(dcl, tau=tau, weights=weights, two_logarithms=two), views)
            loss = compat.lightly.DCLWLoss(tau, 0.3, two_logarithms=two)
            weights = functools.partial(mises_fisher, sigma=0.3)
            same(loss, functools.partial(dcl, tau=tau, weights=weights, two_logarithms=two), views)


def test_the_weights_of_lightlys_dcl_may_be_one_number():
    views = leaves((5, 6), (5, 6))
    for weights in (lambda a, b: 0.3, lambda a, b: a.sum().sigmoid(), lambda a, b: (a * b).sum().view(1, 1)):
        same(compat.lightly.DCLLoss(0.2, weights), functools.partial(dcl, tau=0.2, weights=weights), views)


def test_the_two_forms_of_lightlys_dcl_differ():
    views = leaves((9, 6), (9, 6))
    now, before = (compat.lightly.DCLLoss(0.1, two_logarithms=two)(*views) for two in (False, True))
    assert before > now + 1


@pytest.mark.parametrize("N", [1, 3, 4, 8, 11])
def test_lightlys_memory_bank_gives_the_negatives_of_earlier_steps(N):
    loss = compat.lightly.NTXentLoss(0.2, memory_bank_size=(8, 6)).double()
    loss.memory_bank.bank.copy_(F.normalize(loss.memory_bank.bank, dim=1))  # of length one in float64 too
    bank, place = loss.memory_bank.bank.clone(), 0

    def wanted(a, b):
        positive = similarities(a, b, 0.2).diagonal()[:, None]
        return F.cross_entropy(torch.cat([positive, similarities(a, bank, 0.2)], 1), torch.zeros(N, dtype=torch.long))

    for step in range(6):
        views = leaves((N, 6), (N, 6), seed=step)
        same(loss, wanted, views)
        n = min(N, 8 - place)  # rows beyond the end are dropped
        bank[place : place + n] = F.normalize(views[1].detach(), dim=1)[:n]
        place = (place + n) % 8
        torch.testing.assert_close(loss.memory_bank.bank, bank, **CLOSE)
    loss(views[0].detach(), views[1])  # without gradients, the bank stays as it is
    with torch.no_grad():
        loss(*views)
    torch.testing.assert_close(loss.memory_bank.bank, bank, **CLOSE)
    assert not loss.state_dict()  # as in lightly


@pytest.mark.parametrize("scale", [1.0, 100.0, torch.tensor(14.3, dtype=torch.float64), torch.tensor([5.0])])
def test_open_clips_loss_equals_its_formula(scale):
    images, texts = leaves((9, 6), (9, 6))
    images, texts = (F.normalize(x.detach(), dim=1).requires_grad_() for x in (images, texts))
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    inputs = [images, texts, bias]
    if isinstance(scale, torch.Tensor):
        scale = scale.clone().requires_grad_()
        inputs.append(scale)
    loss = compat.open_clip.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)

    def ours(images, texts, bias, scale=scale):
        as_dict = loss(images, texts, logit_scale=scale, logit_bias=bias, output_dict=True)
        assert list(as_dict) == ["contrastive_loss"]
        return as_dict["contrastive_loss"]

    same(ours, lambda a, b, bias, scale=scale: clip(a, b, scale) + 0 * bias, inputs)
    same(lambda a, b: loss(a, b, 2.0), lambda a, b: clip(a, b, 2.0), inputs[:2])


INDEXES = {
    "two views": torch.arange(6).repeat(2),
    "three views": torch.arange(4).repeat(3),
    "classes": torch.tensor([0, 0, -1, 1, -1, 0, 2, 2, 1, -1, 0, 0]),
}


@pytest.mark.parametrize("indexes", INDEXES.values(), ids=INDEXES)
def test_solo_learns_loss_equals_its_formula(indexes):
    same(
        lambda z: compat.solo.simclr_loss_func(z, indexes, 0.2),
        lambda z: simclr_of_solo(z, indexes, 0.2),
        leaves((12, 6)),
    )


KEYS = torch.tensor([-5, 0, 0, 3, -5, 0, 7, 3, -5, 8, 9])  # the last three have no partner
LABELLINGS = {
    "integers": KEYS,
    "floats": KEYS.double() + 0.5,
    "float16": KEYS.half(),
    "bytes": KEYS.to(torch.int8),
    "truth": KEYS > 0,
}


@pytest.mark.parametrize("labels", LABELLINGS.values(), ids=LABELLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_pytorch_metric_learnings_losses_equal_their_formulas(labels, normalize):
    (z,) = leaves((11, 6))
    distance = None if normalize else DotProductSimilarity()
    nt_xent, supervised = (
        getattr(compat.metric_learning, name)(0.2, distance=distance) for name in ("NTXentLoss", "SupConLoss")
    )
    positive = positives(labels)

    def of_pairs(z):
        S = similarities(z, z, 0.2, normalize)
        return pml_nt_xent(S, positive, labels[:, None] != labels)

    def of_rows(z):
        terms, some = sup_con_terms(off_diagonal(similarities(z, z, 0.2, normalize)), positive)
        return terms[some].mean()

    same(lambda z: nt_xent(z, labels), of_pairs, [z])
    same(lambda z: supervised(z, labels), of_rows, [z])


@pytest.mark.parametrize("case", ["others", "same rows", "no labels", "labels of the rows", "equal labels"])
def test_pytorch_metric_learnings_losses_with_references_equal_their_formulas(case):
    z, r = leaves((6, 5), (9, 5) if case == "others" else (6, 5))
    labels = torch.tensor([0, 1, -1, 1, 2, 0])
    given = {
        "others": torch.tensor([0, 1, 1, -1, 3, 0, 0, 5, 1]),
        "same rows": labels.clone(),
        "no labels": None,
        "labels of the rows": labels,  # the same object: row i of the references is no candidate of row i
        "equal labels": labels.clone(),
    }[case]
    r = z if case == "same rows" else r
    of_others = labels if given is None else given
    positive, negative = positives(labels, of_others), labels[:, None] != of_others
    left_out = of_others is labels
    if left_out:
        positive = positive.fill_diagonal_(False)

    def of_rows(z, r=r):
        S = similarities(z, r, 0.2)
        terms, some = sup_con_terms(off_diagonal(S) if left_out else S, positive)
        return terms[some].mean()

    inputs = [z] if r is z else [z, r]
    nt_xent, supervised = compat.metric_learning.NTXentLoss(0.2), compat.metric_learning.SupConLoss(0.2)
    same(
        lambda z, r=r: nt_xent(z, labels, ref_emb=r, ref_labels=given),
        lambda z, r=r: pml_nt_xent(similarities(z, r, 0.2), positive, negative),
        inputs,
    )
    same(lambda z, r=r: supervised(z, labels, ref_emb=r, ref_labels=given), of_rows, inputs)


@pytest.mark.parametrize("others", [torch.float64, torch.float16, torch.int8, torch.bool])
def test_pytorch_metric_learnings_labels_of_two_dtypes_are_compared_as_numbers(others):
    (z, r), labels = leaves((5, 4), (5, 4)), torch.tensor([0, 1, 0, 1, 3])
    loss, of_others = compat.metric_learning.SupConLoss(0.2), torch.tensor([1, 0, 0, 1, 1])
    wanted = loss(z, labels, ref_emb=r, ref_labels=of_others)
    assert torch.equal(loss(z, labels, ref_emb=r, ref_labels=of_others.to(others)), wanted)
    assert torch.equal(loss(z, labels.double(), ref_emb=r, ref_labels=of_others.to(others)), wanted)


@pytest.mark.parametrize("labels", [[], [0], [0, 0, 0], [1, 2, 3]])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_pytorch_metric_learnings_losses_without_pairs_are_zero(name, labels):
    (z,) = leaves((len(labels), 4))
    loss = getattr(compat.metric_learning, name)()(z, torch.tensor(labels))
    loss.backward()
    assert loss == 0 and not z.grad.any()


def test_pytorch_metric_learnings_settings_are_attributes_that_may_change():
    (z,), labels, distance = leaves((6, 5)), torch.tensor([0, 1, 0, 1, 2, 2]), CosineSimilarity()
    loss = compat.metric_learning.SupConLoss(0.5, distance=distance, embedding_reg_weight=2)
    assert loss.distance is distance and loss.reducer is None and loss.embedding_reg_weight == 2
    assert loss.embedding_regularizer is None and not loss.collect_stats
    loss.temperature, loss.distance, loss.reducer = 0.2, DotProductSimilarity(), MeanReducer()
    same(
        lambda z: loss(z, labels),
        lambda z: sup_con_terms(off_diagonal(similarities(z, z, 0.2, False)), positives(labels))[0].mean(),
        [z],
    )
    assert loss(z, labels, ref_emb=z[:0], ref_labels=labels[:0]) == 0
    loss.distance = Distance()
    with pytest.raises(NotImplementedError, match="distance: found"):
        loss(z, labels)


def sup_contrast(features, mask, tau, anchors, base=0.07):
    B, V = features.shape[:2]
    z = features.flatten(2).transpose(0, 1).reshape(B * V, -1)
    S = off_diagonal(similarities(z[:anchors], z, tau, False))
    candidates = S.isfinite()
    mask = mask.double().repeat(anchors // B, V).where(candidates, 0)
    count = mask.sum(1)
    terms = -(mask * S.log_softmax(1).where(candidates, 0)).sum(1) / count.where(~(count < 1e-6), 1)
    return tau / base * terms.mean()


@pytest.mark.parametrize("V", [1, 2, 3])
@pytest.mark.parametrize("mode", ["all", "one"])
def test_sup_contrasts_loss_equals_its_formula(mode, V):
    (features,) = leaves((5, V, 2, 3))
    anchors = 5 if mode == "one" else 5 * V
    loss = compat.sup_contrast.SupConLoss(0.5, mode, 0.2)
    labels = torch.tensor([3.0, -1.0, 3.0, 0.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(5, 5, generator=generator) * (torch.rand(5, 5, generator=generator) > 0.4)
    weights[4] = 0  # a row without positives
    masks = {
        "none": (dict(), torch.eye(5)),
        "labels": (dict(labels=labels), labels[:, None] == labels),
        "column": (dict(labels=labels[:, None].long()), labels[:, None] == labels),
        "mask": (dict(mask=labels[:, None] == labels), labels[:, None] == labels),
        "weights": (dict(mask=weights), weights),
        "tiny weights": (dict(mask=1e-8 * weights), 1e-8 * weights),
        "negative weights": (dict(mask=weights - 0.5), weights - 0.5),
    }
    for given, mask in masks.values():
        same(lambda x, g=given: loss(x, **g), lambda x, m=mask: sup_contrast(x, m, 0.5, anchors, 0.2), [features])


def test_the_base_temperature_of_sup_contrast_may_be_learnt():
    features, base = leaves((4, 2, 3), (1,))
    labels = torch.tensor([0, 1, 0, 2])
    same(
        lambda x, base: compat.sup_contrast.SupConLoss(0.5, base_temperature=base.exp())(x, labels),
        lambda x, base: sup_contrast(x, labels[:, None] == labels, 0.5, 8, base.exp()[0]),
        [features, base],
    )


def test_a_nan_in_a_mask_is_not_hidden():
    mask = torch.eye(4)
    mask[1, 2] = torch.nan
    assert compat.sup_contrast.SupConLoss()(torch.ones(4, 2, 3), mask=mask).isnan()


def test_a_label_that_is_nan_equals_no_other():
    z, labels = leaves((5, 6))[0], torch.tensor([0, torch.nan, 0, torch.nan, 1])
    positive = positives(torch.tensor([0, 1, 0, 2, 3]))
    same(
        lambda z: compat.sup_contrast.SupConLoss(0.5)(z[:, None], labels),
        lambda z: sup_con_terms(off_diagonal(similarities(z, z, 0.5, False)), positive)[0].mean() * 0.5 / 0.07,
        [z],
    )


def moco(q, k, queue, T):
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / T
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def test_mocos_loss_equals_its_formula_and_fills_its_queue():
    torch.manual_seed(0)
    loss = compat.moco.MoCoLoss(6, 12, 0.2).double()
    torch.manual_seed(0)
    torch.testing.assert_close(loss.queue.float(), F.normalize(torch.randn(6, 12), dim=0))
    for step in range(5):
        q, k = (F.normalize(x.detach(), dim=1).requires_grad_() for x in leaves((4, 6), (4, 6), seed=step))
        queue = loss.queue.clone()
        same(loss, lambda q, k, queue=queue: moco(q, k, queue, 0.2), [q, k])
        queue[:, 4 * step % 12 : 4 * step % 12 + 4] = k.detach().T
        torch.testing.assert_close(loss.queue, queue, **CLOSE)
        assert loss.queue_ptr.tolist() == [4 * (step + 1) % 12]
    again = compat.moco.MoCoLoss(6, 12)
    again.load_state_dict(loss.state_dict())
    assert {name: list(x.shape) for name, x in again.state_dict().items()} == {"queue": [6, 12], "queue_ptr": [1]}
    torch.testing.assert_close(again.queue, loss.queue.float())


class Encoder(nn.Module):
    """A small network that has BatchNorm and ends in `fc`, as a ResNet does."""

    def __init__(self, num_classes):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(5), nn.Linear(5, num_classes)

    def forward(self, x):
        return self.fc(self.norm(x))


@pytest.mark.parametrize("mlp", [False, True])
def test_mocos_model_gives_the_logits_gradients_and_updates_of_its_formula(mlp):
    torch.manual_seed(0)
    model = compat.moco.MoCo(Encoder, dim=6, K=12, m=0.9, T=0.2, mlp=mlp).double()
    assert isinstance(model.encoder_q.fc, nn.Sequential if mlp else nn.Linear)
    for step in range(3):
        with torch.no_grad():
            for p in model.encoder_q.parameters():
                p.add_(0.1 * torch.randn_like(p))
        before, (x, y) = copy.deepcopy(model), leaves((4, 5), (4, 5), seed=step)
        logits, labels = model(im_q=x, im_k=y)
        assert logits.shape == (4, 2) and not labels.any()
        parameters = list(model.encoder_q.parameters())
        found = torch.autograd.grad(F.cross_entropy(logits, labels), parameters)

        of_k = zip(before.encoder_q.parameters(), before.encoder_k.parameters(), strict=True)
        for p, slow in of_k:
            slow.data = 0.9 * slow.data + 0.1 * p.data
        q, k = (F.normalize(net(z), dim=1) for net, z in ((before.encoder_q, x), (before.encoder_k, y)))
        wanted = moco(q, k.detach(), before.queue, 0.2)
        torch.testing.assert_close(F.cross_entropy(logits, labels), wanted, **CLOSE)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, list(before.encoder_q.parameters())), **CLOSE)
        torch.testing.assert_close(model.queue[:, 4 * step : 4 * step + 4], k.detach().T, **CLOSE)
    assert not any(p.requires_grad for p in model.encoder_k.parameters())


OTHERS = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *some) for n in range(4) for some in itertools.combinations(OTHERS, n)]


def encode(features):
    return {"sentence_embedding": features["rows"]}


def of_columns(loss):
    return lambda *columns: loss([{"rows": x} for x in columns], None)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
def test_multiple_negatives_ranking_equals_its_formula(directions, count):
    Loss = compat.sentence_transformers.MultipleNegativesRankingLoss
    cos_sim, dot_score = compat.sentence_transformers.cos_sim, compat.sentence_transformers.dot_score
    for N, similarity in ((1, cos_sim), (7, cos_sim), (7, dot_score)):
        columns = leaves(*[(N, 5)] * count)
        settings = dict(scale=3.0, normalize=similarity is cos_sim, directions=directions)
        loss = Loss(encode, 3.0, similarity, directions=directions)
        same(of_columns(loss), functools.partial(ranking, **settings), columns)
        if not {"query_to_query", "doc_to_doc"} & set(directions):
            loss = Loss(encode, 3.0, similarity, directions=directions, partition_mode="per_direction")
            same(of_columns(loss), functools.partial(ranking, **settings, joint=False), columns)
    assert loss.get_config_dict()["scale"] == 3.0 and loss.temperature == 1 / 3


@pytest.mark.parametrize("mode", ["joint", "per_direction"])
def test_a_direction_that_is_given_twice_counts_once(mode):
    Loss, columns = compat.sentence_transformers.MultipleNegativesRankingLoss, leaves((5, 4), (5, 4))
    twice, once = (Loss(encode, 3.0, directions=("query_to_doc",) * k, partition_mode=mode) for k in (2, 1))
    assert torch.equal(of_columns(twice)(*columns), of_columns(once)(*columns))


# ---- what goes wrong


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


class Distance:
    p, power, normalize_embeddings = 2, 1, True


class CosineSimilarity(Distance):
    pass


class DotProductSimilarity(Distance):
    normalize_embeddings = False


class MeanReducer:
    pass


C = compat
RANKING = C.sentence_transformers.MultipleNegativesRankingLoss
FAULTS = {  # a call, its error, and what the message names: the argument, what was found, what is wanted
    "lightly, temperature": (lambda: C.lightly.NTXentLoss(1e-9), ValueError, "temperature: found 1e-09, wanted"),
    "lightly, negative": (lambda: C.lightly.DCLLoss(-1.0), ValueError, "temperature: found -1.0, wanted"),
    "lightly, no number": (lambda: C.lightly.SupConLoss("0.1"), TypeError, "temperature: found '0.1', wanted"),
    "lightly, rows": (lambda: C.lightly.NTXentLoss()(x(4, 3), x(5, 3)), ValueError, r"out0 .*\[4, 3\] .*out1 \[5, 3\]"),
    "lightly, dimensions": (lambda: C.lightly.DCLLoss()(x(2, 4, 3), x(2, 4, 3)), ValueError, "out0: found 3 dim"),
    "lightly, labels": (lambda: C.lightly.SupConLoss()(x(4, 3), x(4, 3), x(8)), ValueError, r"labels: found .*\[8\]"),
    "lightly, no labels": (lambda: C.lightly.SupConLoss()(x(4, 3), x(4, 3), [1]), TypeError, r"labels: found \[1\]"),
    "lightly, size": (lambda: C.lightly.NTXentLoss(memory_bank_size=64), ValueError, "memory_bank_size: found 64, wa"),
    "lightly, sizes": (lambda: C.lightly.NTXentLoss(memory_bank_size=(4, -1)), ValueError, r"memory_bank_size: found"),
    "lightly, bank": (
        lambda: C.lightly.NTXentLoss(memory_bank_size=(4, 5))(x(4, 3), x(4, 3)),
        ValueError,
        r"memory_bank: found rows of D = 5, wanted D = 3",
    ),
    "lightly, size of numbers": (lambda: C.lightly.NTXentLoss(memory_bank_size=8.0), ValueError, "memory_bank_size: f"),
    "lightly, weights of a part": (
        lambda: C.lightly.DCLLoss(weight_fn=lambda a, b: a[1:, 0])(x(4, 3), x(4, 3)),
        ValueError,
        r"weight_fn: returned shape \[3\], wanted \[4\]",
    ),
    "lightly, no weights": (
        lambda: C.lightly.DCLLoss(weight_fn=lambda a, b: None)(x(4, 3), x(4, 3)),
        TypeError,
        "weight_fn: returned None",
    ),
    "lightly, complex labels": (
        lambda: C.lightly.SupConLoss()(x(4, 3), x(4, 3), x(4, dtype=torch.complex64)),
        TypeError,
        "labels: found dtype torch.complex64",
    ),
    "lightly, weights": (lambda: C.lightly.DCLLoss(weight_fn=3), TypeError, "weight_fn: found 3, wanted None or"),
    "open_clip, horovod": (lambda: C.open_clip.ClipLoss(use_horovod=True), NotImplementedError, "use_horovod: found T"),
    "open_clip, processes": (
        lambda: C.open_clip.ClipLoss(True, True, world_size=2)(x(4, 3), x(4, 3), 1.0),
        ValueError,
        "world_size: found 2, wanted 1",
    ),
    "open_clip, rows": (lambda: C.open_clip.ClipLoss()(x(4, 3), x(4, 2), 1.0), ValueError, "image_features .*text_fea"),
    "open_clip, dtypes": (
        lambda: C.open_clip.ClipLoss()(x(4, 3), x(4, 3, dtype=torch.float64), 1.0),
        TypeError,
        "image_features has dtype torch.float32 and text_features",
    ),
    "open_clip, no scale": (lambda: C.open_clip.ClipLoss()(x(4, 3), x(4, 3), None), TypeError, "logit_scale: found N"),
    "open_clip, scales": (
        lambda: C.open_clip.ClipLoss()(x(4, 3), x(4, 3), torch.ones(4, 1)),
        ValueError,
        r"logit_scale: found .*\[4, 1\]",
    ),
    "open_clip, biases": (
        lambda: C.open_clip.ClipLoss()(x(4, 3), x(4, 3), 1.0, torch.ones(4, 4)),
        ValueError,
        r"logit_bias: found .*\[4, 4\]",
    ),
    "open_clip, no bias": (
        lambda: C.open_clip.ClipLoss()(x(4, 3), x(4, 3), 1.0, "0"),
        ValueError,
        "logit_bias: found '0'",
    ),
    "solo-learn, indexes": (lambda: C.solo.simclr_loss_func(x(4, 3), x(2)), ValueError, r"indexes: found shape \[2\]"),
    "solo-learn, z": (lambda: C.solo.simclr_loss_func(x(2, 4, 3), x(4)), ValueError, "z: found 3 dimensions"),
    "metric learning, nothing": (lambda: C.metric_learning.NTXentLoss()(x(4, 3)), ValueError, "labels: found None"),
    "metric learning, labels": (lambda: C.metric_learning.SupConLoss()(x(4, 3), x(3)), ValueError, "labels: found sh"),
    "metric learning, empty": (
        lambda: C.metric_learning.NTXentLoss()(x(0, 3), x(2)),
        ValueError,
        r"labels: found shape \[2\], wanted \[0\]",
    ),
    "metric learning, references": (
        lambda: C.metric_learning.SupConLoss()(x(4, 3), x(4), ref_emb=x(5, 3)),
        ValueError,
        r"ref_labels: found shape \[4\], wanted \[5\]",
    ),
    "metric learning, width": (
        lambda: C.metric_learning.NTXentLoss()(x(4, 3), x(4), ref_emb=x(5, 2), ref_labels=x(5)),
        ValueError,
        r"ref_emb: found shape \[5, 2\]",
    ),
    "metric learning, miner": (
        lambda: C.metric_learning.NTXentLoss()(x(4, 3), x(4), (x(1), x(1), x(1))),
        NotImplementedError,
        "indices_tuple: found .*tuple",
    ),
    "metric learning, distance": (
        lambda: C.metric_learning.NTXentLoss(distance=Distance()),
        NotImplementedError,
        "distance: found .*Distance",
    ),
    "metric learning, reducer": (
        lambda: C.metric_learning.SupConLoss(reducer=Distance()),
        NotImplementedError,
        "reducer: found .*Distance",
    ),
    "metric learning, regularizer": (
        lambda: C.metric_learning.SupConLoss(embedding_regularizer=Distance()),
        NotImplementedError,
        "embedding_regularizer: found .*Distance",
    ),
    "metric learning, statistics": (
        lambda: C.metric_learning.SupConLoss(collect_stats=True),
        NotImplementedError,
        "collect_stats: found True",
    ),
    "SupContrast, both": (
        lambda: C.sup_contrast.SupConLoss()(x(4, 2, 3), x(4), x(4, 4)),
        ValueError,
        "labels, mask: found both",
    ),
    "SupContrast, dimensions": (lambda: C.sup_contrast.SupConLoss()(x(4, 3)), ValueError, r"features: .*\[4, 3\]"),
    "SupContrast, labels": (lambda: C.sup_contrast.SupConLoss()(x(4, 2, 3), x(3)), ValueError, "labels: found shape"),
    "SupContrast, mask": (
        lambda: C.sup_contrast.SupConLoss()(x(4, 2, 3), mask=x(4, 3)),
        ValueError,
        r"mask: found shape \[4, 3\], wanted \[4, 4\]",
    ),
    "SupContrast, list": (lambda: C.sup_contrast.SupConLoss()([x(4, 3)]), TypeError, "features: found a list"),
    "SupContrast, empty": (lambda: C.sup_contrast.SupConLoss()(x(0, 2, 3)), ValueError, r"features: .*\[0, 2, 3\]"),
    "SupContrast, label list": (
        lambda: C.sup_contrast.SupConLoss()(x(2, 2, 3), [0, 1]),
        TypeError,
        r"labels: found \[0, 1\]",
    ),
    "SupContrast, mask list": (
        lambda: C.sup_contrast.SupConLoss()(x(1, 2, 3), mask=[[1]]),
        TypeError,
        "mask: found a list",
    ),
    "SupContrast, base": (lambda: C.sup_contrast.SupConLoss(0.1, "all", 0), ValueError, "base_temperature: found 0"),
    "SupContrast, mode": (lambda: C.sup_contrast.SupConLoss(contrast_mode="two"), ValueError, "contrast_mode: found"),
    "MoCo, keys": (lambda: C.moco.MoCoLoss(3, 8)(x(3, 3), x(3, 3)), ValueError, "K: found 8, wanted a multiple of .*3"),
    "MoCo, temperature": (lambda: C.moco.MoCoLoss(3, 8, -1.0), ValueError, "T: found -1.0"),
    "MoCo, empty": (
        lambda: C.moco.MoCo(lambda num_classes: nn.Identity(), 3, 8)(x(0, 3), x(0, 3)),
        ValueError,
        "K: found 8, wanted a multiple of .*0",
    ),
    "MoCo, width": (lambda: C.moco.MoCoLoss(4, 8)(x(2, 3), x(2, 3)), ValueError, "queue: found .* D = 4, wanted D = 3"),
    "MoCo, size": (lambda: C.moco.MoCoLoss(4, 0), ValueError, "K: found 0"),
    "ranking, scale": (lambda: RANKING(encode, 0.0), ValueError, "scale: found 0.0"),
    "ranking, text": (lambda: RANKING(encode, "20"), TypeError, "scale: found '20'"),
    "ranking, scales": (lambda: RANKING(encode, torch.ones(2)), ValueError, r"scale: found .*\[2\]"),
    "ranking, no directions": (lambda: RANKING(encode, directions=None), ValueError, "directions: found None"),
    "ranking, strength": (lambda: RANKING(encode, hardness_strength="5"), ValueError, "hardness_strength: found '5'"),
    "ranking, similarity": (
        lambda: RANKING(encode, similarity_fct=torch.cdist),
        NotImplementedError,
        "similarity_fct: found .*cdist",
    ),
    "ranking, directions": (lambda: RANKING(encode, directions=("doc_to_doc",)), ValueError, "directions: found"),
    "ranking, partition": (lambda: RANKING(encode, partition_mode="both"), ValueError, "partition_mode: found 'both'"),
    "ranking, no positives": (
        lambda: RANKING(encode, directions=("query_to_doc", "doc_to_doc"), partition_mode="per_direction"),
        ValueError,
        "partition_mode: found 'per_direction'",
    ),
    "ranking, hardness": (
        lambda: RANKING(encode, hardness_mode="all_negatives", hardness_strength=5.0),
        NotImplementedError,
        "hardness_mode: found 'all_negatives'",
    ),
    "ranking, columns": (lambda: RANKING(encode)([{"rows": x(4, 3)}], None), ValueError, "embeddings: found 1 tensors"),
}


@pytest.mark.parametrize("call, error, message", FAULTS.values(), ids=FAULTS)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_settings_equal_to_the_defaults_are_accepted():
    C.metric_learning.NTXentLoss(distance=CosineSimilarity(), reducer=MeanReducer())
    z, labels = leaves((5, 3))[0], torch.tensor([0, 0, 1, 1, 2])
    terms, _ = sup_con_terms(off_diagonal(similarities(z, z, 0.1)), positives(labels))
    same(lambda z: C.metric_learning.SupConLoss(reducer=MeanReducer())(z, labels), lambda z: terms.mean(), [z])
    RANKING(encode, hardness_mode="all_negatives")


def test_open_clip_settings_with_a_wrong_gradient_warn_at_construction():
    with pytest.warns(UserWarning, match="gather_with_grad=False is ignored"):
        C.open_clip.ClipLoss(world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        C.open_clip.ClipLoss(gather_with_grad=True, world_size=2)
        C.open_clip.ClipLoss()


EVERY = {
    "lightly.NTXentLoss": lambda a, b: C.lightly.NTXentLoss()(a, b),
    "lightly.NTXentLoss, bank": lambda a, b: C.lightly.NTXentLoss(memory_bank_size=(8, 6))(a, b),
    "lightly.DCLLoss": lambda a, b: C.lightly.DCLLoss()(a, b),
    "lightly.DCLWLoss": lambda a, b: C.lightly.DCLWLoss()(a, b),
    "lightly.SupConLoss": lambda a, b: C.lightly.SupConLoss()(a, b, LABELS[: len(a)]),
    "open_clip.ClipLoss": lambda a, b: C.open_clip.ClipLoss()(a, b, 3.0),
    "metric_learning.NTXentLoss": lambda a, b: C.metric_learning.NTXentLoss()(
        a, LABELS[: len(a)], ref_emb=b, ref_labels=LABELS[: len(a)]
    ),
    "metric_learning.SupConLoss": lambda a, b: C.metric_learning.SupConLoss()(
        a, LABELS[: len(a)], ref_emb=b, ref_labels=LABELS[: len(a)]
    ),
    "solo.simclr_loss_func": lambda a, b: C.solo.simclr_loss_func(torch.cat([a, b]), LABELS[: len(a)].repeat(2)),
    "sup_contrast.SupConLoss": lambda a, b: C.sup_contrast.SupConLoss(0.5)(torch.stack([a, b], 1), LABELS[: len(a)]),
    "sup_contrast.SupConLoss, mask": lambda a, b: C.sup_contrast.SupConLoss(0.5)(
        torch.stack([a, b], 1), mask=LABELS[: len(a), None] == LABELS[: len(a)]
    ),
    "moco.MoCoLoss": lambda a, b: C.moco.MoCoLoss(6, 8)(a, b),
    "ranking": lambda a, b: of_columns(RANKING(encode))(a, b),
    "ranking, hard": lambda a, b: of_columns(RANKING(encode))(a, b, b.flip(0)),
    "ranking, all": lambda a, b: of_columns(RANKING(encode, directions=DIRECTIONS[-1]))(a, b),
}
LABELS = torch.tensor([0, 1, 0, 2, 1, 2, 3, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", EVERY)
def test_losses_have_the_dtype_of_the_rows_and_float32_under_autocast(name, dtype):
    call, views = EVERY[name], [x.detach().to(dtype).requires_grad_() for x in leaves((8, 6), (8, 6))]
    widened = name.startswith(("lightly.SupCon", "sup_contrast"))  # whose masks are float32 in the originals
    for autocast, wanted in ((False, torch.float32 if widened else dtype), (True, torch.float32)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.float16 if dtype == torch.float16 else torch.bfloat16, enabled=autocast):
            loss = call(*views)
        assert loss.dtype == wanted and loss.shape == ()
        gradients = torch.autograd.grad(loss, views)
        assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)
    torch.manual_seed(0)
    exact = call(*(x.double() for x in views))
    torch.testing.assert_close(loss.double(), exact.double(), rtol=2e-2, atol=2e-2)


AT = {  # losses of a temperature
    "lightly.NTXentLoss": lambda t: C.lightly.NTXentLoss(t),
    "lightly.NTXentLoss, bank": lambda t: C.lightly.NTXentLoss(t, (8, 6)),
    "lightly.DCLLoss": lambda t: C.lightly.DCLLoss(t),
    "lightly.SupConLoss": lambda t: lambda a, b: C.lightly.SupConLoss(t)(a, b, LABELS),
    "open_clip.ClipLoss": lambda t: lambda a, b: C.open_clip.ClipLoss()(a, b, t),
    "metric_learning.NTXentLoss": lambda t: lambda a, b: C.metric_learning.NTXentLoss(t)(a, LABELS),
    "metric_learning.SupConLoss": lambda t: lambda a, b: C.metric_learning.SupConLoss(t)(a, LABELS),
    "solo.simclr_loss_func": lambda t: lambda a, b: C.solo.simclr_loss_func(torch.cat([a, b]), LABELS.repeat(2), t),
    "sup_contrast.SupConLoss": lambda t: lambda a, b: C.sup_contrast.SupConLoss(t)(torch.stack([a, b], 1), LABELS),
    "sup_contrast.SupConLoss, mask": lambda t: (
        lambda a, b: C.sup_contrast.SupConLoss(t)(torch.stack([a, b], 1), mask=torch.ones(8, 8))
    ),
    "moco.MoCoLoss": lambda t: C.moco.MoCoLoss(6, 8, t),
    "moco.MoCo": lambda t: (
        lambda a, b: F.cross_entropy(*C.moco.MoCo(lambda num_classes: nn.Identity(), 6, 8, T=t)(a, b))
    ),
    "ranking": lambda t: of_columns(RANKING(encode, t)),
    "ranking, hard": lambda t: lambda a, b: of_columns(RANKING(encode, t))(a, b, b.flip(0)),
    "ranking, all": lambda t: of_columns(RANKING(encode, t, directions=DIRECTIONS[-1])),
}


@pytest.mark.parametrize("make", AT.values(), ids=AT)
def test_a_temperature_may_be_a_tensor_of_any_shape_and_integers(make):
    views = leaves((8, 6), (8, 6), dtype=torch.float32)
    kinds = 2.0, torch.tensor(2.0), torch.tensor([2.0]), torch.tensor([[2.0]]), torch.tensor(2)
    values = []
    for temperature in kinds:
        torch.manual_seed(0)
        values.append(make(temperature)(*views))
    for value in values:
        torch.testing.assert_close(value, values[0])


KEPT = {  # losses with a state, which are made before the call is compiled
    "lightly.NTXentLoss, bank": C.lightly.NTXentLoss(memory_bank_size=(8, 6)),
    "moco.MoCoLoss": C.moco.MoCoLoss(6, 8),
}


@pytest.mark.rotating(5)
@pytest.mark.parametrize("name", EVERY)
def test_drop_ins_compile_without_a_graph_break_and_agree_with_eager_mode(name):
    views = leaves((8, 6), (8, 6), dtype=torch.float32)
    call = KEPT.get(name, EVERY[name])
    values = [f(*views) for f in (copy.deepcopy(call), torch.compile(call, backend="aot_eager", fullgraph=True))]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*[torch.autograd.grad(y, views, allow_unused=True) for y in values])


@pytest.mark.full
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", EVERY)
def test_drop_ins_compiled_by_inductor_agree_with_eager_mode_at_two_sizes(name, dynamic):
    torch._dynamo.reset()
    eager, call = (copy.deepcopy(KEPT.get(name, EVERY[name])) for _ in range(2))
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic)
    for N in (8, 4, 8):
        views = leaves((N, 6), (N, 6), dtype=torch.float32, seed=N)
        values = [f(*views) for f in (eager, compiled)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*[torch.autograd.grad(y, views, allow_unused=True) for y in values])


def test_a_second_derivative_is_an_error():
    (z,) = leaves((8, 6))
    (g,) = torch.autograd.grad(C.sup_contrast.SupConLoss()(z.view(4, 2, 6)), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="a second derivative .*set TCLR_KERNELS_BACKEND=reference"):
        g.sum().backward()


def test_copied_and_pickled_modules_give_the_same_loss():
    for loss in (C.lightly.DCLWLoss(), C.lightly.NTXentLoss(memory_bank_size=(8, 6)), C.moco.MoCoLoss(6, 8)):
        views = leaves((8, 6), (8, 6), dtype=torch.float32)
        again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
        assert torch.equal(loss(*views), again(*views))


def test_importing_the_drop_ins_imports_no_other_library():
    names = "lightly", "open_clip", "pytorch_metric_learning", "solo", "sentence_transformers", "moco"
    code = f"import sys, tclr_kernels.compat; print([x for x in sys.modules if x.split('.')[0] in {names}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# ---- several processes

MANY = {  # the loss of this rank's rows a, b with labels n. gather: whether other ranks take part
    "lightly.NTXentLoss": lambda a, b, n, gather: C.lightly.NTXentLoss(0.2, gather_distributed=gather)(a, b),
    "lightly.DCLLoss": lambda a, b, n, gather: C.lightly.DCLLoss(
        0.2, lambda a, b: ((a - b) ** 2).sum(1), gather, two_logarithms=True
    )(a, b),
    "lightly.SupConLoss": lambda a, b, n, gather: C.lightly.SupConLoss(0.2, gather)(a, b, n),
    "lightly.SupConLoss, no labels": lambda a, b, n, gather: C.lightly.SupConLoss(0.2, gather)(a, b),
    "open_clip.ClipLoss": lambda a, b, n, gather: C.open_clip.ClipLoss(True, world_size=4 if gather else 1)(a, b, 3.0),
    "open_clip.ClipLoss, gathering": lambda a, b, n, gather: C.open_clip.ClipLoss(
        gather_with_grad=True, rank=dist.get_rank() if gather else 0, world_size=4 if gather else 1
    )(a, b, torch.tensor(3.0)),
    "solo.simclr_loss_func": lambda a, b, n, gather: C.solo.simclr_loss_func(torch.cat([a, b]), n.repeat(2), 0.2),
    "ranking": lambda a, b, n, gather: of_columns(RANKING(encode, gather_across_devices=gather))(a, b),
    "ranking, hard": lambda a, b, n, gather: of_columns(RANKING(encode, gather_across_devices=gather))(a, b, b.flip(1)),
    "ranking, all": lambda a, b, n, gather: of_columns(
        RANKING(encode, gather_across_devices=gather, directions=DIRECTIONS[-1])
    )(a, b, b.flip(1)),
}
SHARES = [2, 3, 1, 3]


def everything():
    return leaves((9, 6), (9, 6)), torch.tensor([-1.0, 0.5, 0.5, -1.0, 2, 0.5, 3, 2, 3])


def of_rank(group, name):
    """The value of a loss on this rank, and the gradients of this rank's rows."""
    views, labels = everything()
    first = sum(SHARES[: dist.get_rank()])
    own = slice(first, first + SHARES[dist.get_rank()])
    views = [x[own].detach().requires_grad_() for x in views]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = MANY[name](*views, labels[own], True)
    return value.item(), [g.numpy() for g in torch.autograd.grad(value, views)]


@pytest.mark.parametrize("name", MANY)
def test_many_processes_have_the_value_and_the_gradient_of_one(name, pool):
    views, labels = everything()
    value = MANY[name](*views, labels, False)
    found = pool.run(4, of_rank, name)
    assert not any(isinstance(x, Error) for x in found), found
    for rank_value, _ in found:
        assert rank_value == pytest.approx(value.item(), rel=1e-12)
    for k, wanted in enumerate(torch.autograd.grad(value, views)):
        together = torch.cat([torch.from_numpy(gradients[k]) for _, gradients in found])
        torch.testing.assert_close(together / 4, wanted, **CLOSE)


FAULTS_OF_ONE = {  # a call on one process and, if there is a fault, its error
    "rows": (
        lambda a, b, fault: C.lightly.SupConLoss(0.5, True)(a[:, fault:], b, a[:, 0]),
        "ValueError: out0 has shape",
    ),
    "labels": (lambda a, b, fault: C.lightly.SupConLoss(0.5, True)(a, b, a[fault:, 0]), "ValueError: labels: found sh"),
    "weights": (
        lambda a, b, fault: C.lightly.DCLLoss(0.5, lambda a, b: a[fault:, 0], True)(a, b),
        "ValueError: weight_fn: returned shape",
    ),
    "scale": (
        lambda a, b, fault: C.open_clip.ClipLoss(True, True, world_size=4)(a, b, None if fault else 1.0),
        "TypeError: logit_scale: found None",
    ),
    "bias": (
        lambda a, b, fault: C.open_clip.ClipLoss(True, True, world_size=4)(a, b, 1.0, torch.ones(1 + fault)),
        "ValueError: logit_bias: found",
    ),
}


def a_fault_of_one_rank(group, name):
    FAULTS_OF_ONE[name][0](torch.randn(4, 6), torch.randn(4, 6), int(dist.get_rank() == 2))


@pytest.mark.parametrize("name", FAULTS_OF_ONE)
def test_an_error_of_one_process_is_raised_on_all(name, pool):
    found = pool.run(4, a_fault_of_one_rank, name)
    assert all(isinstance(x, Error) for x in found)
    assert found[2].startswith(FAULTS_OF_ONE[name][1])
    assert all("rank 2 of 4 raised an error" in found[r] for r in (0, 1, 3))


def queues_of_rank(group):
    r, (q, k) = dist.get_rank(), leaves((8, 6), (8, 6), dtype=torch.float32)
    own = slice(2 * r, 2 * r + 2)
    torch.manual_seed(0)
    bank = C.lightly.NTXentLoss(memory_bank_size=(12, 6), gather_distributed=True)
    queue = C.moco.MoCoLoss(6, 16)
    values = bank(q[own], k[own]).item(), queue(q[own], k[own]).item()
    torch.manual_seed(0)
    model = C.moco.MoCo(Encoder, 6, 16).eval()  # in evaluation mode, shuffling the batch changes nothing
    logits, _ = model(q[own][:, 1:], k[own][:, 1:])
    return values, bank.memory_bank.bank.numpy(), queue.queue.numpy(), logits.detach().numpy(), model.queue.numpy()


def test_queues_take_the_keys_of_all_processes(pool):
    (q, k), found = leaves((8, 6), (8, 6), dtype=torch.float32), pool.run(4, queues_of_rank)
    assert not any(isinstance(x, Error) for x in found), found
    torch.manual_seed(0)
    bank, queue = C.lightly.NTXentLoss(memory_bank_size=(12, 6)), C.moco.MoCoLoss(6, 16)
    wanted = bank(q, k).item(), queue(q, k).item()
    torch.manual_seed(0)
    model = C.moco.MoCo(Encoder, 6, 16).eval()
    logits, _ = model(q[:, 1:], k[:, 1:])
    for name, mean in enumerate(wanted):
        assert sum(x[0][name] for x in found) / 4 == pytest.approx(mean, rel=1e-5)
    for found_bank, found_queue, _, of_model in (x[1:] for x in found):
        torch.testing.assert_close(torch.from_numpy(found_bank), bank.memory_bank.bank)
        torch.testing.assert_close(torch.from_numpy(found_queue), queue.queue)
        torch.testing.assert_close(torch.from_numpy(of_model), model.queue)
    torch.testing.assert_close(torch.cat([torch.from_numpy(x[3]) for x in found]), logits.detach())


# ---- the libraries themselves


def library(name):
    """A module of an installed library. Packages that its losses do not need are replaced by stand-ins."""
    try:
        return LIBRARIES[name]()
    except ModuleNotFoundError as error:
        pytest.skip(f"make test-all installs it: {error}")


def installed_lightly():
    peers.lightly(0.1)
    dcl, ntx = (importlib.import_module(f"lightly.loss.{name}") for name in ("dcl_loss", "ntx_ent_loss"))
    loss = sys.modules["lightly.loss"]
    loss.NTXentLoss, loss.DCLLoss, loss.DCLWLoss = ntx.NTXentLoss, dcl.DCLLoss, dcl.DCLWLoss
    loss.weights = dcl.negative_mises_fisher_weights
    return loss


def installed_open_clip():
    peers.open_clip(0.1)
    return sys.modules["open_clip.loss"]


def installed_sentence_transformers():
    module = types.ModuleType("sentence_transformers.losses")
    module.MultipleNegativesRankingLoss = peers.ranking()
    return sys.modules.setdefault(module.__name__, module)


LIBRARIES = {
    "lightly": installed_lightly,
    "open_clip": installed_open_clip,
    "pytorch_metric_learning": lambda: importlib.import_module("pytorch_metric_learning.losses"),
    "sentence_transformers": installed_sentence_transformers,
}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("N, D", [(2, 1), (3, 5), (16, 8), (65, 16)])
@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5, 1, 10])
def test_lightlys_losses_equal_the_installed_library(tau, N, D):
    theirs, views = library("lightly"), leaves((N, D), (N, D))
    for gather in (False, True):
        same(C.lightly.NTXentLoss(tau, 0, gather), theirs.NTXentLoss(tau, 0, gather), views)
        for weights in (None, theirs.weights, C.lightly.negative_mises_fisher_weights, lambda a, b: (a * b).sum(1)):
            same(C.lightly.DCLLoss(tau, weights, gather), theirs.DCLLoss(tau, weights, gather), views)
        for sigma in (0.1, 0.5, 5.0):
            same(C.lightly.DCLWLoss(tau, sigma, gather), theirs.DCLWLoss(tau, sigma, gather), views)


@pytest.mark.full
@pytest.mark.parametrize("N", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("size", [1, 7, 16, 33])
def test_lightlys_memory_bank_equals_the_installed_library(size, N):
    torch.manual_seed(0)
    ours = C.lightly.NTXentLoss(0.2, (size, 6))
    torch.manual_seed(0)
    theirs = library("lightly").NTXentLoss(0.2, (size, 6))
    assert torch.equal(ours.memory_bank.bank, theirs.memory_bank.bank)
    for loss in (ours, theirs):
        loss.double().memory_bank.bank.copy_(F.normalize(loss.memory_bank.bank, dim=1))
    for step in range(8):
        same(ours, theirs, leaves((N, 6), (N, 6), seed=step))
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank, **CLOSE)
        assert torch.equal(ours.memory_bank.bank_ptr, theirs.memory_bank.bank_ptr)


@pytest.mark.full
@pytest.mark.parametrize("bias", [None, 0.0, -10.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 14.3, 100.0])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_open_clips_loss_equals_the_installed_library(flags, scale, bias):
    theirs, ours = (module.ClipLoss(*flags) for module in (library("open_clip"), C.open_clip))
    for N in (1, 2, 40):
        image, text = (F.normalize(x.detach(), dim=1).requires_grad_() for x in leaves((N, 8), (N, 8)))
        learnt = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        same(lambda a, b: ours(a, b, scale, bias), lambda a, b: theirs(a, b, scale, bias), [image, text])
        if bias is None:
            same(ours, theirs, [image, text, learnt])
        else:
            same(ours, theirs, [image, text, learnt, torch.tensor(bias, dtype=torch.float64, requires_grad=True)])
        as_dict = (loss(image, text, learnt, output_dict=True) for loss in (ours, theirs))
        torch.testing.assert_close(*as_dict, **CLOSE)


def labels_of(kind, N):
    generator = torch.Generator().manual_seed(N)
    return {
        "pairs": torch.arange(N) // 2,
        "few": torch.randint(-1, 3, (N,), generator=generator),
        "many": torch.randint(0, N, (N,), generator=generator),
        "one": torch.zeros(N, dtype=torch.long),
        "apart": torch.arange(N),
        "floats": torch.randint(-1, 3, (N,), generator=generator) / 2,
    }[kind]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["pairs", "few", "many", "one", "apart", "floats"])
@pytest.mark.parametrize("references", ["none", "others", "the same labels", "a copy", "no labels", "one"])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_pytorch_metric_learnings_losses_equal_the_installed_library(name, references, kind):
    losses = library("pytorch_metric_learning")
    distances, reducers = (importlib.import_module(f"pytorch_metric_learning.{x}") for x in ("distances", "reducers"))
    settings = [
        dict(),
        dict(temperature=0.5, distance=distances.CosineSimilarity()),
        dict(temperature=2.0, distance=distances.DotProductSimilarity(normalize_embeddings=False)),
        dict(distance=distances.DotProductSimilarity(), reducer=reducers.MeanReducer()),
    ]
    if name == "SupConLoss":
        settings.append(dict(reducer=reducers.AvgNonZeroReducer()))
    for N, given in itertools.product((1, 2, 3, 12), settings):
        K = {"others": N + 3, "one": 1}.get(references, N)
        labels = labels_of(kind, N)
        of_others = {"the same labels": labels, "a copy": labels.clone()}.get(references)
        if references in ("others", "one"):
            of_others = labels_of(kind, K)
        calls = [
            functools.partial(labelled, getattr(module, name)(**given), labels, of_others)
            for module in (C.metric_learning, losses)
        ]
        same(*calls, leaves((N, 6), (K, 6)) if references != "none" else leaves((N, 6)))


def labelled(loss, labels, of_others, z, r=None):
    return loss(z, labels) if r is None else loss(z, labels, ref_emb=r, ref_labels=of_others)


@pytest.mark.full
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_pytorch_metric_learnings_wrappers_take_the_drop_ins(name):
    losses, labels = library("pytorch_metric_learning"), torch.tensor([0, 1, 0, 2, 1])
    ours, theirs = (getattr(module, name)(0.2) for module in (C.metric_learning, losses))
    both = [losses.SelfSupervisedLoss(loss) for loss in (ours, theirs)]
    same(*both, leaves((5, 6), (5, 6)))
    both = [losses.MultipleLosses([loss, loss]) for loss in (ours, theirs)]
    same(*[lambda z, f=loss: f(z, labels) for loss in both], leaves((5, 6)))


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
def test_multiple_negatives_ranking_equals_the_installed_library(scale, directions, count):
    Theirs = library("sentence_transformers").MultipleNegativesRankingLoss
    similarities = C.sentence_transformers.cos_sim, C.sentence_transformers.dot_score
    modes = ["joint"] if {"query_to_query", "doc_to_doc"} & set(directions) else ["joint", "per_direction"]
    for N, similarity, mode, gather in itertools.product((1, 2, 9), similarities, modes, (False, True)):
        settings = dict(scale=scale, similarity_fct=similarity, directions=directions, partition_mode=mode)
        columns = leaves(*[(N, 5)] * count)
        ours, theirs = RANKING(None, **settings, gather_across_devices=gather), Theirs(None, **settings)
        same(
            lambda *columns, f=ours: f.compute_loss_from_embeddings(list(columns), None),
            lambda *columns, f=theirs: f.compute_loss_from_embeddings(list(columns), None),
            columns,
        )


SIGNATURES = {  # of each library, the losses that are in an installed package
    "lightly": ("lightly", ["NTXentLoss", "DCLLoss", "DCLWLoss"]),
    "open_clip": ("open_clip", ["ClipLoss"]),
    "pytorch_metric_learning": ("metric_learning", ["NTXentLoss", "SupConLoss"]),
    "sentence_transformers": ("sentence_transformers", ["MultipleNegativesRankingLoss"]),
}


@pytest.mark.full
@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_have_the_names_order_and_defaults_of_the_installed_library(name):
    theirs, (ours, losses) = library(name), SIGNATURES[name]
    for loss, method in itertools.product(losses, ("__init__", "forward")):
        found, wanted = (
            [
                (p.name, p.kind, p.default if not callable(p.default) else p.default.__name__)
                for p in inspect.signature(getattr(getattr(module, loss), method)).parameters.values()
                if p.name not in ("two_logarithms", "similarity_fct", "labels")  # ours alone, and two functions
            ]
            for module in (getattr(C, ours), theirs)
        )
        assert found == wanted


# ---- the page

EXAMPLE = re.compile(r"```diff\n-([^\n]*)\n\+([^\n]*)\n```\n\n```python\n(.*?)```", re.DOTALL)
SETUP, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
EXAMPLES = EXAMPLE.findall(PAGE.read_text())


def run_example(line, code):
    names = {}
    exec("\n".join([SETUP, line, code]), names)
    return names["loss"]


@pytest.mark.parametrize("before, after, code", EXAMPLES, ids=[x[1].split()[1] for x in EXAMPLES])
def test_the_examples_of_the_drop_ins_page_run(before, after, code):
    assert run_example(after, code).isfinite()
    assert before.partition("import")[2] == after.partition("import")[2]


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("before, after, code", EXAMPLES, ids=[x[1].split()[1] for x in EXAMPLES])
def test_the_examples_of_the_drop_ins_page_equal_the_installed_library(before, after, code):
    name = before.split()[1].split(".")[0]
    if name not in LIBRARIES:
        pytest.skip(f"{name} is in no package index, or only an older one")
    library(name)
    torch.testing.assert_close(run_example(after, code), run_example(before, code))


def test_the_drop_ins_page_has_an_example_of_each_library():
    assert [x[1].split()[1].split(".")[2] for x in EXAMPLES] == [
        *("lightly", "open_clip", "metric_learning", "solo", "sup_contrast", "moco", "sentence_transformers")
    ]


def test_the_table_of_the_drop_ins_page_shows_the_committed_rows():
    assert dropins.page(PAGE.read_text(), dropins.committed()) == PAGE.read_text()
