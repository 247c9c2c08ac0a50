"""The losses. Each one arranges its inputs as sets of rows, calls the operation of `symmetric.py` or `general.py` on
them, and reduces the result.

Throughout, h(u, v) = exp sim(u, v) with sim(u, v) = <u, v> / (|u| |v| tau), or <u, v> / tau with `normalize=False`;
every denominator contains the positive and leaves out only the anchor itself. Inputs are float64, float32, bfloat16 or
float16 with any strides; losses are float32 (float64 for float64 inputs), in nats; gradients have the inputs' dtype.
A row that is exactly zero has similarity 0 and gradient 0. `temperature` is a finite float > 0 or a floating-point
tensor with one element, whatever its shape: it may require a gradient, which has its shape and dtype, and its value is
never read on the host. `logit_scale` is 1 / temperature, and may be given instead of it. Inputs and temperature may be
tensors made in `torch.inference_mode()`. `backend` is one of `available_backends()`, or None for the default. Every
function raises TypeError or ValueError, naming the argument, for a wrong type, shape, dtype or device, and for an
empty tensor.

Three arguments change which candidates are in the denominators:

- `labels`, integers [N] or [..., N]: candidates with the anchor's label are left out, except its positive, which stays
  the same row as without labels. A row with a negative integer has no label.
- `negatives`, [K, D] for all groups or [..., K, D] with the anchors' leading dimensions, or a `NegativeQueue`: more
  candidates for every anchor, whatever the labels. They get a gradient if they require it.
- `decoupled=True`: the positive is left out as well (DCL, https://arxiv.org/abs/2110.06848). The loss may then be
  negative; without any negatives it is 0.

With several processes (docs/processes.md), each passes its share of the rows, with their labels and negatives:

- `group`: None, only this process; "world", all processes, or only this one if torch.distributed is not initialised;
  a ProcessGroup; or a DeviceMesh with one dimension. "mean" and "sum" are then over the rows of all processes, with
  the same bits on each; "none" returns the terms of this process's rows. The gradients of the parameters, averaged
  over the processes as DistributedDataParallel does, are those of a single process with all rows. (So each process's
  rows get the gradient of the sum of the values that all processes return.)
- `shares`: the number of rows of each process. If it is given, the processes need not exchange these numbers.

Without shares, an error on one process becomes an error on all: this process raises its own error, the others a
RuntimeError that names the process. If processes differ in a setting that must be the same, all raise a ValueError.

Source: TCLR, Dave et al., CVIU 2022, https://arxiv.org/abs/2101.07974, section 3, and its official release.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import backends, candidates, checks, distributed, general
from .candidates import Negatives
from .checks import TEMPERATURE
from .distributed import Further, Group, Process, Shares
from .labelled import labelled, supervised
from .objective import objective
from .reduced import reduced
from .symmetric import blocks, divides, ordered_sum, total, traced, widened

Temperature = float | Tensor
Reduction = Literal["mean", "sum", "none"]
Form = Literal["paper", "release"]
Softmax = Literal["pairs", "joint"]

REDUCTIONS = "mean", "sum", "none"
SOFTMAXES = "pairs", "joint"
FORMS = {  # the default weight of each term
    "paper": dict(ic_global=1.0, ic_local=0.0, ll=1.0, gl=1.0),
    "release": dict(ic_global=1.0, ic_local=1.0, ll=1.0, gl=1.0),
}


class TCLRTerms(NamedTuple):
    """What `tclr` returns, as scalar tensors: `total` is the weighted sum of the other four, which are unweighted."""

    total: Tensor
    ic_global: Tensor
    ic_local: Tensor
    ll: Tensor
    gl: Tensor


@distributed.collective
def nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: Temperature = TEMPERATURE,
    *,
    logit_scale: Temperature | None = None,
    normalize: bool = True,
    symmetric: bool = True,
    labels: Tensor | None = None,
    negatives: Negatives | None = None,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    backend: str | None = None,
    group: Group = None,
    shares: Shares = None,
) -> Tensor:
    """NT-Xent: each row is compared with its partner in the other view and with all other rows of both views.

        l_i = -log h(a_i, b_i) / sum_j [ 1[j != i] h(a_i, a_j) + h(a_i, b_j) ]

    a, b: [..., N, D], the two views; leading dimensions are independent groups.
    symmetric: every b_i is an anchor too. (TCLR prints its IC loss with the a_i only.)
    labels, negatives, decoupled: see the docstring of this module; labels[i] is the label of both a_i and b_i.
    reduction: "mean" or "sum" over all groups and anchors; "none": [..., 2N], the terms of a, then those of b
    ([..., N] if not symmetric).
    Source: SimCLR, https://arxiv.org/abs/2002.05709, equation 1; TCLR section 3.1.
    """
    a, b = checks.embeddings("... N D", group is not None, a=a, b=b)
    checks.flag("symmetric", symmetric)
    tau = _tau(temperature, logit_scale, normalize, reduction, a, group)
    anchors_per_row = a.shape[:-2].numel() * (2 if symmetric else 1)  # the processes exchange their numbers of rows
    if _is_plain(reduction, labels, negatives, decoupled, group):
        count = anchors_per_row * a.shape[-2] if reduction == "mean" else 1
        return reduced([a, b], tau, backend, normalize, False, one_sided=not symmetric, count=count)
    further = None
    if negatives is not None:
        further = [candidates.checked_negatives("negatives", negatives, a, group), *([] if symmetric else [None])]
    term = _terms([a, b], tau, normalize, False, backend, labels, further, decoupled, group, not symmetric)
    if reduction == "none":
        term = _own(term, group)
        return (_off_diagonal(term) if symmetric else term).reshape(*a.shape[:-2], -1)
    return _reduce(term, reduction, anchors_per_row * _rows(a, group), group)


@distributed.collective
def clip_loss(
    a: Tensor,
    b: Tensor,
    temperature: Temperature = TEMPERATURE,
    *,
    logit_scale: Temperature | None = None,
    normalize: bool = True,
    labels: Tensor | None = None,
    negatives: tuple[Negatives | None, Negatives | None] = (None, None),
    decoupled: bool = False,
    reduction: Reduction = "mean",
    backend: str | None = None,
    group: Group = None,
    shares: Shares = None,
) -> Tensor:
    """The contrastive loss of CLIP: each row is compared with its partner and all other rows of the other side.

        l_i = -log h(a_i, b_i) / sum_j h(a_i, b_j),    l_(N+i) = -log h(b_i, a_i) / sum_j h(b_i, a_j)

    a, b: [..., N, D]; leading dimensions are independent groups.
    labels, decoupled: see the docstring of this module. negatives: a pair, those for the anchors a and those for b.
    reduction: "mean" or "sum" over all groups and anchors; "none": [..., 2N], the terms of a, then those of b.
    Source: CLIP, https://arxiv.org/abs/2103.00020, figure 3.
    """
    a, b = checks.embeddings("... N D", group is not None, a=a, b=b)
    tau = _tau(temperature, logit_scale, normalize, reduction, a, group)
    of_a, of_b = checks.pair("negatives", negatives)
    anchors_per_row = 2 * a.shape[:-2].numel()
    if _is_plain(reduction, labels, of_a if of_b is None else of_b, decoupled, group):
        count = anchors_per_row * a.shape[-2] if reduction == "mean" else 1
        return reduced([a, b], tau, backend, normalize, True, count=count)
    further = None
    if of_a is not None or of_b is not None:
        further = [candidates.checked_negatives(f"negatives[{k}]", x, a, group) for k, x in enumerate((of_a, of_b))]
        if of_a is of_b:  # its gradient is a sum of two parts, which in float16 could be inf - inf
            rows = further[0].rows
            further = [further[0]._replace(rows=general.at_least_float32(rows), sent_as=rows.dtype)] * 2
    term = _terms([a, b], tau, normalize, True, backend, labels, further, decoupled, group)
    if reduction == "none":
        return _off_diagonal(_own(term, group)).reshape(*a.shape[:-2], -1)
    return _reduce(term, reduction, anchors_per_row * _rows(a, group), group)


@distributed.collective
def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: Temperature = TEMPERATURE,
    *,
    logit_scale: Temperature | None = None,
    normalize: bool = True,
    in_batch: bool = True,
    labels: Tensor | None = None,
    negatives: Negatives | None = None,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    backend: str | None = None,
    group: Group = None,
    shares: Shares = None,
) -> Tensor:
    """InfoNCE in one direction: each query is compared with its key, with the other keys and with further negatives.

        l_i = -log h(q_i, k_i) / ( sum_j h(q_i, k_j) + sum_m h(q_i, n_m) )

    query, key: [..., N, D]; leading dimensions are independent groups.
    in_batch: whether the keys of the other queries are candidates. If False, negatives are required and labels must be
    None; with a queue, this is MoCo's loss.
    labels, negatives, decoupled: see the docstring of this module. If each query has different negatives, `own`
    [N, K, D], make each query a group: info_nce(query[:, None], key[:, None], negatives=own).
    reduction: "mean" or "sum" over all groups and queries; "none": [..., N].
    Source: CPC, https://arxiv.org/abs/1807.03748, equation 4; MoCo, https://arxiv.org/abs/1911.05722, equation 1.
    """
    query, key = checks.embeddings("... N D", group is not None, query=query, key=key)
    checks.flag("in_batch", in_batch)
    tau = _tau(temperature, logit_scale, normalize, reduction, query, group)
    if in_batch and _is_plain(reduction, labels, negatives, decoupled, group):
        count = query.shape[:-1].numel() if reduction == "mean" else 1
        return reduced([query, key], tau, backend, normalize, True, one_sided=True, count=count)
    further = candidates.checked_negatives("negatives", negatives, query, group)
    if in_batch:
        beside = None if further is None else [further, None]
        term = _terms([query, key], tau, normalize, True, backend, labels, beside, decoupled, group, one_sided=True)
    else:
        if further is None:
            raise ValueError("negatives: found None, wanted a tensor or a NegativeQueue beside in_batch=False")
        if labels is not None:
            raise ValueError("labels: found a tensor, wanted None, since in_batch=False leaves out the labelled keys")
        checks.flag("decoupled", decoupled)
        neg, pos = candidates.partners(query, key, further, tau, normalize, backend, group, _half(decoupled))
        term = _rounded(general.cost([neg], pos, decoupled), query)
    if reduction == "none":
        return _own(term, group).reshape(query.shape[:-1])
    return _reduce(term, reduction, query.shape[:-2].numel() * _rows(query, group), group)


@distributed.collective
def sup_con(
    z: Tensor,
    labels: Tensor,
    temperature: Temperature = TEMPERATURE,
    *,
    logit_scale: Temperature | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: str | None = None,
    group: Group = None,
    shares: Shares = None,
) -> Tensor:
    """The supervised contrastive loss: each row is compared with all rows that have its label (the form L_out).

        l_i = -1/|P(i)| sum_(p in P(i)) log h(z_i, z_p) / sum_(j != i) h(z_i, z_j)

    z: [..., M, D], all views of all samples; leading dimensions are independent groups.
    labels: integers [M] or [..., M]. P(i) are the other rows with the label of row i. A row with a negative label has
    no positives, but is a candidate for the other rows.
    reduction: "mean" over the rows of all groups that have positives; "sum"; "none": [..., M], 0 for a row without
    positives.
    Source: Khosla et al., https://arxiv.org/abs/2004.11362, equation 2.
    """
    (z,) = checks.embeddings("... M D", group is not None, z=z)
    tau = _tau(temperature, logit_scale, normalize, reduction, z, group)
    G, M, D = z.shape[:-2].numel(), *z.shape[-2:]
    keys = checks.keys("labels", labels, z).reshape(G, M)
    if _is_plain(reduction, group=group):
        settings = general.Settings(backends.choose(backend, z.device, G * M, D, z.dtype), normalize, first=0)
        of_rows = keys.view(G, M)  # torch.compile refuses the same tensor as two inputs
        count = None if reduction == "mean" else 1.0
        return labelled(settings, tau, (of_rows, keys), [], [z.reshape(G, M, D)], spread=True, count=count)
    outputs = candidates.all_pairs([z.reshape(G, M, D)], tau, normalize, False, backend, keys, group)
    neg, _, pos_lse, spread, count = (x[:, 0, 0] for x in outputs)  # [G, M]
    term = _rounded(supervised(neg, pos_lse, spread, count), z)
    if reduction == "none":
        return _own(term, group).reshape(z.shape[:-1])
    return _reduce(term, reduction, (count > 0).sum().clamp(min=1), group)


@distributed.collective
def instance_contrastive(
    views: Tensor | Sequence[Tensor],
    temperature: Temperature = TEMPERATURE,
    *,
    logit_scale: Temperature | None = None,
    normalize: bool = True,
    softmax: Softmax = "pairs",
    labels: Tensor | None = None,
    negatives: Negatives | None = None,
    decoupled: bool = False,
    reduction: Reduction = "mean",
    backend: str | None = None,
    group: Group = None,
    shares: Shares = None,
) -> Tensor:
    """The instance contrastive loss of V views: NT-Xent over all ordered pairs of views, from one Gram matrix.

        softmax="pairs": l_(a,c,i) = -log h(z_ai, z_ci) / sum_j [ 1[j != i] h(z_ai, z_aj) + h(z_ai, z_cj) ],    a != c
        softmax="joint": l_(a,i)   = -log P / (P + sum_(c, j != i) h(z_ai, z_cj)),    P = sum_(c != a) h(z_ai, z_ci)

    views: [V, B, D], or a list or tuple of V tensors [B, D]; V >= 2.
    softmax: "pairs" has one softmax for each other view, "joint" a single one over all views.
    labels [B], negatives [K, D], decoupled: see the docstring of this module.
    reduction: "mean" or "sum" over the V (V-1) B terms of "pairs" or the V B terms of "joint". "none": for "pairs"
    [V, V, B], where entry [a, c, i] has anchor (a, i) and view c, and is 0 if a = c; for "joint" [V, B].
    Source: TCLR section 3.1; its official release, which computes each pair twice. "joint": the SimCLR of solo-learn.
    """
    (views,) = checks.embeddings("V B D", group is not None, views=checks.stacked("views", views))
    V, B, _ = views.shape
    if V < 2:
        raise ValueError(f"views: found V = {V}, shape {list(views.shape)}, wanted V >= 2")
    checks.one_of("softmax", softmax, SOFTMAXES)
    tau = _tau(temperature, logit_scale, normalize, reduction, views, group)
    terms_per_row = V * (V - 1 if softmax == "pairs" else 1)
    if softmax == "pairs" and _is_plain(reduction, labels, negatives, decoupled, group):
        count = terms_per_row * B if reduction == "mean" else 1
        return reduced([views], tau, backend, normalize, False, count=count)
    sets = views.unsqueeze(1).unbind(0)
    further = None if negatives is None else [candidates.checked_negatives("negatives", negatives, views[0], group)]
    if softmax == "pairs":
        term = _terms(sets, tau, normalize, False, backend, labels, further, decoupled, group)
    else:
        checks.flag("decoupled", decoupled)
        half = _half(decoupled)
        parts = candidates.contrast(sets, tau, normalize, False, backend, labels, further, group, half=half)
        term = _rounded(parts.joint_terms(decoupled), views)
    if reduction == "none":
        return _own(term, group)[0]
    return _reduce(term, reduction, terms_per_row * _rows(views, group), group)


@distributed.collective
def local_local(
    x1: Tensor,
    x2: Tensor,
    temperature: Temperature = TEMPERATURE,
    *,
    logit_scale: Temperature | None = None,
    normalize: bool = True,
    symmetric: bool = True,
    reduction: Reduction = "mean",
    backend: str | None = None,
    group: Group = None,
    shares: Shares = None,
) -> Tensor:
    """The local-local temporal loss: NT-Xent within each video, between the embeddings of its local clips.

        LL_i = -sum_p log h(x1_ip, x2_ip) / sum_q [ 1[q != p] h(x1_ip, x1_iq) + h(x1_ip, x2_iq) ]

    x1, x2: [B, T, D], two views of each video's T local clips.
    symmetric: the mean of the formula and of the same with x1 and x2 exchanged. (The paper prints one direction.)
    reduction: "mean" or "sum" over videos; "none": [B].
    Source: TCLR section 3.2.
    """
    x1, x2 = checks.embeddings("B T D", group is not None, x1=x1, x2=x2)
    checks.flag("symmetric", symmetric)
    tau = _tau(temperature, logit_scale, normalize, reduction, x1, group)
    if _is_plain(reduction, group=group):
        count, factor = len(x1) if reduction == "mean" else 1, 0.5 if symmetric else 1.0
        return reduced([x1, x2], tau, backend, normalize, False, one_sided=not symmetric, factor=factor, count=count)
    _agree(group, x1, backend)
    term = _terms([x1, x2], tau, normalize, False, backend, one_sided=not symmetric)
    return _reduce_videos(term / 2 if symmetric else term, reduction, group)


@distributed.collective
def global_local(
    s: Tensor,
    x: Tensor,
    temperature: Temperature = TEMPERATURE,
    *,
    logit_scale: Temperature | None = None,
    normalize: bool = True,
    reduction: Reduction = "mean",
    backend: str | None = None,
    group: Group = None,
    shares: Shares = None,
) -> Tensor:
    """The global-local temporal loss: CLIP's loss between the time slices of a video's global clip and its local clips.

        GL_i = -sum_k { log h(s_ik, x_ik) / sum_q h(s_ik, x_iq) + log h(x_ik, s_ik) / sum_q h(x_ik, s_iq) }

    s, x: [B, T, D], the T time slices of the global clip and the T local clips.
    reduction: "mean" or "sum" over videos; "none": [B].
    Source: TCLR section 3.3.
    """
    s, x = checks.embeddings("B T D", group is not None, s=s, x=x)
    tau = _tau(temperature, logit_scale, normalize, reduction, s, group)
    if _is_plain(reduction, group=group):
        return reduced([s, x], tau, backend, normalize, True, count=len(s) if reduction == "mean" else 1)
    _agree(group, s, backend)
    term = _terms([s, x], tau, normalize, True, backend)
    return _reduce_videos(term, reduction, group)


@distributed.collective
def tclr(
    g: Tensor | Sequence[Tensor],
    s: Tensor | Sequence[Tensor],
    x: Tensor | Sequence[Tensor],
    temperature: Temperature = TEMPERATURE,
    *,
    logit_scale: Temperature | None = None,
    form: Form = "paper",
    weights: Mapping[str, float] | None = None,
    normalize: bool = True,
    labels: Tensor | None = None,
    backend: str | None = None,
    group: Group = None,
    shares: Shares = None,
) -> TCLRTerms:
    """The TCLR objective: the instance, local-local and global-local losses, and their weighted sum.

        form="paper":   total = IC(g) + mean_i LL_i + mean_(i,v,w) GL_i(s_v, x_w)
        form="release": total = IC(g) + 1/(V^2 B) sum_(a!=c,i) l_(a,c,i)(x) + B/T mean_i LL_i + V^2/2 mean_(i,v,w) GL_i

    where l_(a,c,i) is the term of `instance_contrastive`, with the V T local clips of each video i as its views.
    g: [V, B, D], the global clips; s: [V, B, T, D], their time slices; x: [V, B, T, D], the local clips; V = 2 views.
    Each may be a list or tuple of V tensors instead.
    labels: integers [B], one for each video. In the IC terms, videos with the same label are not negatives.
    weights: floats >= 0 for any of "ic_global", "ic_local", "ll", "gl". A missing one is 1 (ic_local of "paper": 0).
    Returns TCLRTerms. A term whose weight is 0 is not computed, and is returned as 0.
    Source: TCLR section 3; "release": what the calls of `contrastive_loss` in the official code add up to.
    """
    checks.one_of("form", form, FORMS)
    checks.flag("normalize", normalize)
    weights = checks.weights(weights, FORMS[form])
    s, x = checks.embeddings("V B T D", group is not None, s=checks.stacked("s", s), x=checks.stacked("x", x))
    (g,) = checks.embeddings("V B D", group is not None, g=checks.stacked("g", g))
    V, B, T, D = x.shape
    if V != 2:
        raise ValueError(f"x: found V = {V}, shape {list(x.shape)}, wanted V = 2")
    if g.shape != (V, B, D):
        raise ValueError(f"g: found shape {list(g.shape)}, wanted {[V, B, D]} beside x of shape {list(x.shape)}")
    if g.device != x.device:
        raise ValueError(f"g is on {g.device} and x on {x.device}: wanted one device")
    g, s, x = checks.same_dtype(g=g, s=s, x=x)
    tau = checks.scaled(temperature, logit_scale, x.device)
    if isinstance(tau, torch.Tensor) and tau.dtype in (torch.float16, torch.bfloat16):
        tau = tau.float()  # so that the gradients of several terms are added before they are rounded
    keys = None if labels is None else checks.keys("labels", labels, g[0])
    name = backends.choose(backend, x.device, V * B * T, D)
    if group is not None:
        group.agree(g, V * T)
        tau, B = distributed.shared(group, tau, x.device), group.rows

    release = form == "release"
    counts = {  # the sum over a term's anchors is divided by this
        "ic_global": V * B,
        "ic_local": V * V * B,
        "ll": V * T if release else V * B,
        "gl": V * B if release else V * V * B,
    }
    counts, weights = list(counts.values()), [float(weights[k]) for k in counts]
    compose = functools.partial(_compose, backend, normalize, counts, weights)
    offered = any(weights) and hasattr(backends.BACKENDS[name], "objective")
    if group is not None:
        return TCLRTerms(*compose(tau, g, s, x, keys, group))
    if keys is not None or torch.compiler.is_compiling() or not offered:
        return TCLRTerms(*compose(tau, g, s, x, keys))
    scales = [1 / count for count in counts]
    return TCLRTerms(*objective(name, compose, normalize, scales, weights, tau, g, s, x))


def _compose(
    backend: str | None,
    normalize: bool,
    counts: list[int],
    weights: list[float],
    tau: float | Tensor,
    g: Tensor,
    s: Tensor,
    x: Tensor,
    labels: Tensor | None = None,
    process: Process | None = None,
) -> tuple[Tensor, ...]:
    """total, ic_global, ic_local, ll, gl, one call of the operation for each term."""

    def contrast(sets, cross=False):
        return blocks(sets, tau, normalize=normalize, cross=cross, backend=backend)

    def instances(sets):
        """term, neg, pos of sets with a row for each video, with respect to labels and to the other processes."""
        if labels is None and process is None:
            return contrast(sets)
        parts = candidates.contrast(sets, tau, normalize, False, backend, labels, process=process, half=half)
        return [_rounded(y, sets[0]) for y in (parts.terms(False, False), parts.neg, parts.pos)]

    V, B, T, D = x.shape
    # the gradients of several terms are added in float32: in float16, a row of small norm could get inf - inf
    name, half = backends.choose(backend, x.device, V * B * T, D), x.element_size() == 2
    g, s, x = widened(name, g, s, x)
    with_ic_global, with_ic_local, with_ll, with_gl = (w != 0 for w in weights)
    if labels is None and process is None and divides(backend, x, V * B * T):
        inputs = [g.unsqueeze(1)], [x.transpose(1, 2).unsqueeze(2)], [x], [s, x]
        settings = dict(normalize=normalize, backend=backend)
        terms = [
            total(z, tau, count, cross=len(z) == 2, half=half, **settings)
            if weight
            else functools.reduce(torch.add, map(_zero, z))
            for z, count, weight in zip(inputs, counts, weights, strict=True)
        ]
        return _weighted(weights, terms), *terms
    sums = [_zero(g), _zero(x), _zero(x), _zero(s) + _zero(x)]
    if with_ic_global:
        sums[0] = ordered_sum(instances(g.unsqueeze(1).unbind(0))[0])
    if with_ic_local:  # its one Gram matrix holds all that LL needs
        term, _, pos = instances(x.transpose(1, 2).reshape(V * T, 1, B, D).unbind(0))
        sums[1] = ordered_sum(term)
        if with_ll:
            sums[2] = ordered_sum(_local_local_from(pos[0]))
    elif with_ll:
        sums[2] = ordered_sum(contrast(x.unbind(0))[0])
    if with_gl:
        sums[3] = ordered_sum(contrast([*s.unbind(0), *x.unbind(0)], cross=True)[0])
    if process is not None:
        own = False, False, not with_ic_local, True  # whether a sum is over the videos of this process only
        sums = list(traced(distributed.Total, process, torch.stack(sums), own))
    terms = [x * (1 / count) for count, x in zip(counts, sums, strict=True)]
    return _weighted(weights, terms), *terms


def _weighted(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    """The weighted sum of the four terms. Terms of weight 0 are left out where the others depend on every input."""
    all_reached = weights[0] != 0 and weights[3] != 0
    added = [(w, x) for w, x in zip(weights, terms, strict=True) if w != 0 or not all_reached]
    return functools.reduce(torch.add, [x if w == 1 else w * x for w, x in added])


def _tau(
    temperature: Temperature,
    logit_scale: Temperature | None,
    normalize: bool,
    reduction: Reduction,
    like: Tensor,
    process: Process | None,
) -> float | Tensor:
    """The temperature. Also checks the arguments that nearly every loss has."""
    checks.one_of("reduction", reduction, REDUCTIONS)
    checks.flag("normalize", normalize)
    tau = checks.scaled(temperature, logit_scale, like.device)
    return tau if process is None else distributed.shared(process, tau, like.device)


def _is_plain(
    reduction: Reduction,
    labels: Tensor | None = None,
    negatives: object = None,
    decoupled: bool = False,
    group: Process | None = None,
) -> bool:
    """Whether a loss is a scalar that needs nothing beyond the operation of `symmetric.py`."""
    return reduction != "none" and labels is None and negatives is None and decoupled is False and group is None


def _terms(
    sets: Sequence[Tensor],
    tau: float | Tensor,
    normalize: bool,
    cross: bool,
    backend: str | None,
    labels: Tensor | None = None,
    negatives: Sequence[Further | None] | None = None,
    decoupled: bool = False,
    process: Process | None = None,
    one_sided: bool = False,
) -> Tensor:
    """The terms [G, V, V, N] of sets [..., N, D], or [G, N] if `one_sided`: those of the first set against the second.

    negatives: as for `candidates.contrast`.
    """
    if labels is None and negatives is None and decoupled is False and process is None:
        N, D = sets[0].shape[-2:]
        sets = [z if z.dim() == 3 else z.reshape(-1, N, D) for z in sets]
        term = blocks(sets, tau, normalize=normalize, cross=cross, backend=backend)[0]
        return general.first_with_second(term) if one_sided else term
    checks.flag("decoupled", decoupled)
    how = labels, negatives, process, one_sided, _half(decoupled)
    parts = candidates.contrast(sets, tau, normalize, cross, backend, *how)
    return _rounded(parts.terms(cross, decoupled, one_sided), sets[0])


def _half(decoupled: bool) -> bool | None:
    """What `candidates.contrast` takes as `half`.

    Without the positive in the denominator, the rounding error of its similarity counts in full, so that products of
    half precision would not be accurate enough.
    """
    return False if decoupled else None


def _rounded(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of the loss: float32, or float64 for float64 inputs."""
    return x.to(torch.promote_types(like.dtype, torch.float32))


def _off_diagonal(term: Tensor) -> Tensor:
    """The blocks (0, 1) and (1, 0) of two sets: [G, 2, N]"""
    return term.flatten(1, 2)[:, 1:3]


def _reduce(
    term: Tensor, reduction: Reduction, count: int | Tensor, process: Process | None = None, parts: bool = False
) -> Tensor:
    """The sum of all terms, divided by `count` for "mean". Entries that do not count are 0.

    parts: whether `term` has only the terms of this process's rows, or those of all processes.
    """
    total = ordered_sum(term)
    total = total / count if reduction == "mean" else total
    return total if process is None else traced(distributed.Total, process, total[None], (parts,))[0]


def _agree(process: Process | None, videos: Tensor, backend: str | None) -> None:
    """Compares shapes and settings over the processes, for losses that compare rows [B, T, D] within a video only."""
    if process is not None:
        backends.choose(backend, videos.device)  # may raise an error, which the other processes learn about here
        process.agree(videos.transpose(0, 1), 2)


def _reduce_videos(term: Tensor, reduction: Reduction, process: Process | None) -> Tensor:
    """Adds up the terms [B, ...] of each of this process's videos, then reduces over all videos."""
    if reduction == "none":
        return term.flatten(1).sum(1)
    return _reduce(term, reduction, len(term) if process is None else process.rows, process, parts=True)


def _rows(x: Tensor, process: Process | None) -> int:
    """N of x [..., N, D], added up over all processes."""
    return x.shape[-2] if process is None else process.rows


def _own(term: Tensor, process: Process | None) -> Tensor:
    """The terms of this process's anchors, out of those of all anchors [..., N]."""
    return term if process is None else traced(distributed.Own, process, term)


def _local_local_from(pos: Tensor) -> Tensor:
    """The LL terms from the similarities between embeddings of the same video.

        l_ai = log sum_{c != a} exp pos[a,c] - pos[a,mate] = softplus(logsumexp_{c not in {a, mate}} pos - pos[mate])

    pos: [n, n, B], where set a is the clip (v, t) of every video, and its mate the same t in the other view. Returns
    [n, B].
    """
    n = len(pos)
    sets = torch.arange(n, device=pos.device)
    mate = (sets + n // 2) % n
    positive = pos[sets, mate]
    if n == 2:  # T = 1: no negatives
        return positive - positive
    left_out = (sets == sets[:, None]) | (sets == mate[:, None])
    negatives = pos.masked_fill(left_out[:, :, None], -torch.inf).logsumexp(1)
    return -torch.nn.functional.logsigmoid(positive - negatives)


def _zero(x: Tensor) -> Tensor:
    """A zero through which x gets a gradient of zeros. As a sum over no elements, it is 0 even if x is not finite."""
    return x[:0].sum(dtype=torch.promote_types(x.dtype, torch.float32))
