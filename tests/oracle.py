"""Independent implementations that the tests compare with: the printed formulas, and eager PyTorch."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

import tclr_kernels as tk

DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16

# ---- the printed formulas, term by term


def sim(u, v, tau, normalize=True):
    """Similarity of two rows."""
    return u @ v / (u.norm() * v.norm() if normalize else 1) / tau


def nt_xent_loops(a, b, sim):
    """-log h(a_i, b_i) / sum_j [1[j != i] h(a_i, a_j) + h(a_i, b_j)], for every i. a, b: [N, D]"""
    losses = []
    for i, u in enumerate(a):
        denominator = sum(sim(u, b[j]).exp() + (sim(u, a[j]).exp() if j != i else 0) for j in range(len(a)))
        losses.append(-(sim(u, b[i]).exp() / denominator).log())
    return torch.stack(losses)


def clip_loops(a, b, sim):
    """-log h(a_i, b_i) / sum_j h(a_i, b_j), for every i. a, b: [N, D]"""
    return torch.stack([-(sim(u, b[i]).exp() / sum(sim(u, v).exp() for v in b)).log() for i, u in enumerate(a)])


def local_local_loops(x1, x2, sim, symmetric=True):
    """LL of every video. x1, x2: [B, T, D]"""
    one = torch.stack([nt_xent_loops(a, b, sim).sum() for a, b in zip(x1, x2, strict=True)])
    return (one + local_local_loops(x2, x1, sim, False)) / 2 if symmetric else one


def global_local_loops(s, x, sim):
    """GL of every video. s, x: [B, T, D]"""
    return torch.stack([clip_loops(a, b, sim).sum() + clip_loops(b, a, sim).sum() for a, b in zip(s, x, strict=True)])


def both_ways(loops, a, b, sim):
    return torch.cat([loops(a, b, sim), loops(b, a, sim)])


def views_loops(views, sim):
    """NT-Xent of every ordered pair of views, [V, V, B]; 0 for a view with itself."""
    V, B, _ = views.shape
    pairs = [nt_xent_loops(views[a], views[c], sim) * (a != c) for a in range(V) for c in range(V)]
    return torch.stack(pairs).view(V, V, B)


def paper_loops(g, s, x, sim):
    """(ic_global, ic_local, ll, gl) of the paper. g: [V, B, D]; s, x: [V, B, T, D]"""
    ic = both_ways(nt_xent_loops, *g, sim).mean()
    ll = local_local_loops(*x, sim).mean()
    gl = torch.stack([global_local_loops(one, other, sim).mean() for one in s for other in x]).mean()
    return ic, 0 * ic, ll, gl


def release_loops(g, s, x, sim):
    """The official release's objective, call by call: an NT-Xent of two sets is the mean over both directions."""

    def nt_xent(a, b):
        return both_ways(nt_xent_loops, a, b, sim).mean()

    V, B, T, _ = x.shape
    clips = [x[v, :, t] for v in range(V) for t in range(T)]
    ic_local = sum(nt_xent(a, c) for k, a in enumerate(clips) for m, c in enumerate(clips) if m != k) / V**2
    ll = sum(nt_xent(x[0, i], x[1, i]) for i in range(B))
    gl = sum(global_local_loops(one, other, sim).sum() for one in s for other in x) / (2 * B)
    return nt_xent(*g), ic_local, ll, gl


def among_loops(a, b, sim, labels=None, further=(), own=True, in_batch=True, decoupled=False):
    """-log h(a_i, b_i) / sum of h over its candidates, for every i: [N]. a, b: [N, D]

    Candidates are the rows of b if `in_batch`, the rows of a if `own`, the further rows, and the positive unless
    `decoupled`. Rows with the label of row i are left out. Without negatives, the loss is 0.
    """
    losses = []
    for i, u in enumerate(a):
        other = [j for j in range(len(a)) if j != i and (labels is None or not labels[j] == labels[i] >= 0)]
        rows = [b[j] for j in other if in_batch] + [a[j] for j in other if own] + list(further)
        positive, negatives = sim(u, b[i]).exp(), sum(sim(u, v).exp() for v in rows)
        losses.append(-(positive / (negatives + (not decoupled) * positive)).log() if rows else 0 * positive)
    return torch.stack(losses)


def sup_con_loops(z, labels, sim):
    """-1/|P| sum_p log h(z_i, z_p) / sum_(j != i) h(z_i, z_j), for every i; 0 without positives. z: [M, D]"""
    losses = []
    for i, u in enumerate(z):
        total = sum(sim(u, z[j]).exp() for j in range(len(z)) if j != i)
        same = [j for j in range(len(z)) if j != i and labels[j] == labels[i] >= 0]
        terms = [-(sim(u, z[j]).exp() / total).log() for j in same]
        losses.append(sum(terms) / len(same) if same else 0 * sim(u, u))
    return torch.stack(losses)


def joint_loops(views, sim, labels=None, further=(), decoupled=False):
    """-log P / (P + N), P the sum of h over a row's other views, N over the rows with another label: [V, B]"""
    V, B, _ = views.shape
    losses = []
    for a, i in ((a, i) for a in range(V) for i in range(B)):
        other = [j for j in range(B) if j != i and (labels is None or not labels[j] == labels[i] >= 0)]
        rows = [views[c, j] for c in range(V) for j in other] + list(further)
        positive = sum(sim(views[a, i], views[c, i]).exp() for c in range(V) if c != a)
        negatives = sum(sim(views[a, i], v).exp() for v in rows)
        losses.append(-(positive / (negatives + (not decoupled) * positive)).log() if rows else 0 * positive)
    return torch.stack(losses).view(V, B)


# ---- the same formulas in eager PyTorch, where candidate i is the positive of row i


def cross_entropy(candidates):
    """Cross-entropy as textbooks write it, where candidate i is the positive of row i. candidates: [..., N, K]"""
    N, K = candidates.shape[-2:]
    flat = candidates.reshape(-1, K)
    labels = torch.arange(N, device=flat.device).repeat(len(flat) // N)
    return F.cross_entropy(flat, labels, reduction="none").view(candidates.shape[:-1])


def without_positive(candidates):
    """Cross-entropy as softplus(negatives - positive), which stays exact for confident pairs."""
    N, K = candidates.shape[-2:]
    positive = candidates.diagonal(dim1=-2, dim2=-1)
    negatives = candidates.masked_fill(torch.eye(N, K, dtype=torch.bool, device=positive.device), -1e300)
    return -F.logsigmoid(positive - negatives.logsumexp(-1))


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def float16_unit(x):
    """Unit rows rounded to float16, with the gradient of the exact unit rows."""
    exact = unit(x)
    return exact + (exact.half().to(exact) - exact).detach()


def nt_xent_eager(a, b, tau, how, symmetric=True):
    own = (a @ a.mT / tau).masked_fill(torch.eye(a.shape[-2], dtype=torch.bool, device=a.device), -torch.inf)
    one = how(torch.cat([a @ b.mT / tau, own], -1))
    return torch.cat([one, nt_xent_eager(b, a, tau, how, False)], -1) if symmetric else one


def clip_eager(a, b, tau, how):
    return torch.cat([how(a @ b.mT / tau), how(b @ a.mT / tau)], -1)


def views_eager(views, tau, how):
    """[V, V, B], 0 for a view with itself."""
    V, B, _ = views.shape
    S = torch.einsum("aid,cjd->acij", views, views) / tau
    own = S.diagonal().permute(2, 0, 1).masked_fill(torch.eye(B, dtype=torch.bool, device=S.device), -torch.inf)
    losses = how(torch.cat([S, own[:, None].expand_as(S)], -1))
    return losses.masked_fill(torch.eye(V, dtype=torch.bool, device=S.device)[:, :, None], 0)


def twos(N):
    """Labels of classes of two rows each. With more rows, no loss would be close to zero."""
    return torch.arange(N) // 2


def among_eager(a, b, q, tau, how, labels=None, own=True, in_batch=True):
    """The loss of a_i and b_i with the candidates b, q and, if `own`, a. Rows with the label of row i are left out."""
    itself = torch.eye(len(a), dtype=torch.bool, device=a.device)
    alike = itself if labels is None else labels[:, None] == labels
    blocks = [(a @ b.mT / tau).masked_fill(alike & ~itself if in_batch else ~itself, -torch.inf), a @ q.mT / tau]
    if own:
        blocks.append((a @ a.mT / tau).masked_fill(alike, -torch.inf))
    return how(torch.cat(blocks, -1))


def nt_xent_further_eager(a, b, q, tau, how):
    return torch.cat([among_eager(*z, q, tau, how, twos(len(a))) for z in ((a, b), (b, a))])


def clip_decoupled_eager(a, b, q, r, tau, how):
    """`how` is not used: without the positive in the sum, both forms are log-sum-exp minus positive."""

    def decoupled(candidates):
        itself = torch.eye(*candidates.shape, dtype=torch.bool)
        return candidates.masked_fill(itself, -torch.inf).logsumexp(-1) - candidates.diagonal()

    return torch.cat([among_eager(*z, tau, decoupled, own=False) for z in ((a, b, q), (b, a, r))])


def moco_eager(q, k, queue, tau, how):
    return among_eager(q, k, queue, tau, how, own=False, in_batch=False)


def sup_con_eager(z, tau, how):
    """As the reference (`without_positive`), it adds log-sum-exp and spread separately, so that both are exact."""
    labels = twos(len(z))
    S = z @ z.mT / tau
    itself = torch.eye(len(z), dtype=torch.bool)
    positive = (labels[:, None] == labels) & (labels >= 0) & ~itself
    count = positive.sum(-1)
    pos_lse = S.masked_fill(~positive, -torch.inf).masked_fill((count == 0)[:, None], 0).logsumexp(-1)
    mean = S.masked_fill(~positive, 0).sum(-1) / count.clamp(min=1)
    if how is cross_entropy:
        term = S.masked_fill(itself, -torch.inf).logsumexp(-1) - mean
    else:
        several = positive & (count > 1)[:, None]
        spread = S.masked_fill(~several, -torch.inf).masked_fill((count < 2)[:, None], 0).logsumexp(-1)
        spread = spread - S.masked_fill(~several, 0).sum(-1) / count.clamp(min=1)
        neg = S.masked_fill(positive | itself, -1e300).logsumexp(-1)
        term = -F.logsigmoid(pos_lse - neg) + spread.masked_fill(count < 2, 0)
    return term.masked_fill(count == 0, 0)


def joint_eager(views, q, tau, how):
    V, B, D = views.shape
    z = views.reshape(V * B, D)
    index, itself = torch.arange(B).repeat(V), torch.eye(V * B, dtype=torch.bool)
    S = z @ z.mT / tau
    alike = index[:, None] == index
    positive = S.masked_fill(~alike | itself, -torch.inf).logsumexp(-1)
    others = torch.cat([S.masked_fill(alike, -torch.inf), z @ q.mT / tau], -1)
    if how is cross_entropy:
        term = torch.cat([others, S.masked_fill(~alike | itself, -torch.inf)], -1).logsumexp(-1) - positive
    else:
        term = -F.logsigmoid(positive - others.logsumexp(-1))
    return term.view(V, B)


def local_local_eager(x1, x2, tau, how, symmetric=True):
    return nt_xent_eager(x1, x2, tau, how, symmetric).sum(-1) / (2 if symmetric else 1)


def global_local_eager(s, x, tau, how):
    return clip_eager(s, x, tau, how).sum(-1)


def tclr_eager(g, s, x, tau, how, form="paper"):
    """[total, ic_global, ic_local, ll, gl]"""
    V, B, T, D = x.shape
    release = form == "release"
    clips = x.transpose(1, 2).reshape(V * T, B, D)
    ic = nt_xent_eager(g[0], g[1], tau, how).mean()
    ic_local = views_eager(clips, tau, how).sum() / (V * V * B) if release else 0 * ic
    ll = local_local_eager(x[0], x[1], tau, how).mean() * (B / T if release else 1)
    pairs = [global_local_eager(s[v], x[w], tau, how).mean() for v in range(V) for w in range(V)]
    gl = torch.stack(pairs).mean() * (V * V / 2 if release else 1)
    return torch.stack([ic + ic_local + ll + gl, ic, ic_local, ll, gl])


def tclr_terms(*tensors, **settings):
    """`tk.tclr` as one tensor: [total, ic_global, ic_local, ll, gl]"""
    return torch.stack(list(tk.tclr(*tensors, **settings)))


def only_total(function):
    """The function's first output alone, the total. A backend may compute the gradient of the total in one call."""
    return lambda *z, **settings: function(*z, **settings)[:1]


def tclr_total(*tensors, **settings):
    return tk.tclr(*tensors, **settings).total[None]


# ---- the table of losses


class Loss(NamedTuple):
    """A loss with no reduction, its eager formula, and its inputs' shapes for B rows or videos of T clips."""

    call: Callable
    eager: Callable
    shapes: Callable
    stacked: bool = False  # the first dimension of an input counts views

    def textbook(self, inputs, tau, normalize=True, how=cross_entropy, rows=unit):
        return self.eager(*(rows(x) if normalize else x for x in inputs), tau, how)

    def inputs(self, sizes, dtype=torch.float64, rho=0.5, scale=1.0, seed=0, normalize=True):
        """Random tensors whose matched rows have cosine rho; without `normalize`, rows of length about 1."""
        shapes = self.shapes(*sizes)
        scale = scale if normalize else scale / math.sqrt(shapes[0][-1])
        return [(scale * x).to(dtype) for x in correlated(shapes, rho, seed, self.stacked)]


def correlated(shapes, rho, seed, stacked=False):
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    common = {shape: randn(shape[stacked:]) for shape in shapes}
    return [math.sqrt(rho) * common[shape] + math.sqrt(1 - rho) * randn(shape) for shape in shapes]


def unreduced(function, **settings):
    return functools.partial(function, reduction="none", **settings)


def rows(B, T, D):
    return [(B, D), (B, D)]


def videos(B, T, D):
    return [(B, T, D), (B, T, D)]


def clips(B, T, D):
    return [(2, B, D), (2, B, T, D), (2, B, T, D)]


def nt_xent_further(a, b, q, **settings):
    return tk.nt_xent(a, b, labels=twos(len(a)), negatives=q, **settings)


def clip_decoupled(a, b, q, r, **settings):
    return tk.clip_loss(a, b, negatives=(q, r), decoupled=True, **settings)


def moco(q, k, queue, **settings):
    return tk.info_nce(q, k, negatives=queue, in_batch=False, **settings)


def sup_con(z, **settings):
    return tk.sup_con(z, twos(len(z)), **settings)


def joint(views, q, **settings):
    return tk.instance_contrastive(views, negatives=q, softmax="joint", **settings)


one_way = dict(symmetric=False)
LOSSES = {
    "nt_xent": Loss(unreduced(tk.nt_xent), nt_xent_eager, rows),
    "nt_xent one way": Loss(unreduced(tk.nt_xent, **one_way), functools.partial(nt_xent_eager, **one_way), rows),
    "clip_loss": Loss(unreduced(tk.clip_loss), clip_eager, rows),
    "instance_contrastive": Loss(unreduced(tk.instance_contrastive), views_eager, lambda B, T, D: [(T, B, D)], True),
    "nt_xent further": Loss(
        unreduced(nt_xent_further), nt_xent_further_eager, lambda B, T, D: [*rows(B, T, D), (B + T, D)]
    ),
    "clip_loss decoupled": Loss(
        unreduced(clip_decoupled), clip_decoupled_eager, lambda B, T, D: [*rows(B, T, D), (B + T, D), (B + T + 1, D)]
    ),
    "moco": Loss(unreduced(moco), moco_eager, lambda B, T, D: [*rows(B, T, D), (B + T, D)]),
    "sup_con": Loss(unreduced(sup_con), sup_con_eager, lambda B, T, D: [(2 * B, D)]),
    "views joint": Loss(unreduced(joint), joint_eager, lambda B, T, D: [(max(T, 2), B, D), (B + T, D)]),
    "local_local": Loss(unreduced(tk.local_local), local_local_eager, videos),
    "local_local one way": Loss(
        unreduced(tk.local_local, **one_way), functools.partial(local_local_eager, **one_way), videos
    ),
    "global_local": Loss(unreduced(tk.global_local), global_local_eager, videos),
    "tclr": Loss(tclr_terms, tclr_eager, clips, True),
    "tclr release": Loss(
        functools.partial(tclr_terms, form="release"), functools.partial(tclr_eager, form="release"), clips, True
    ),
}
FURTHER = "nt_xent further", "clip_loss decoupled", "moco", "sup_con", "views joint"
# losses that call the operation several times, so that gradients are added
SEVERAL_CALLS = tuple(name for name in FURTHER if name != "sup_con")
for form in "tclr", "tclr release":
    settings = dict(form=form.removeprefix("tclr").strip() or "paper")
    eager = only_total(functools.partial(tclr_eager, **settings))
    LOSSES[f"{form} total"] = Loss(functools.partial(tclr_total, **settings), eager, clips, True)
KINDS = [name for name in LOSSES if not name.endswith("one way") and name != "tclr total"]


# ---- values, gradients, and the criteria of correctness


def run(call, inputs, upstream=None, **settings):
    """The output and the gradients of the inputs. upstream: the gradient of the output; None means ones."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = call(*inputs, **settings)
    upstream = torch.ones_like(out) if upstream is None else upstream.to(out)
    return out.detach(), torch.autograd.grad(out, inputs, upstream)


def some_gradient(shape, seed=1):
    """An upstream gradient in which no two entries are alike: between 1/2 and 3/2."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def ulp(x, dtype):
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(x)) if x > 0 else 0.0


def differences(found, wanted):
    """Absolute differences; an infinity or NaN equals only itself."""
    found, wanted = found.double(), wanted.double()
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    return (found - wanted).abs().masked_fill(same, 0).nan_to_num(math.inf, math.inf)


def error(found, wanted):
    """The largest difference."""
    return differences(found, wanted).max().item()


def same_bits(found, wanted):
    (out, grads), (want, want_grads) = found, wanted
    assert torch.equal(out, want)
    assert all(torch.equal(g, w) for g, w in zip(grads, want_grads, strict=True))


def rms(found, wanted):
    """The root of the mean squared difference, which varies less than the largest difference."""
    off = differences(found, wanted)
    return (off / off.max().clamp(min=1e-300)).square().mean().sqrt().item() * off.max().item()


FLOAT16_UNIT_ROWS = ("triton", "cuda-on-host")  # backends that round many half-precision unit rows to float16
GRADIENT = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def loss_bound(dtype, carried, D):
    """The absolute error that a loss may have at 1 / tau = 10. carried: whether unit rows are rounded to float16.

    If so, the product of two rows has the error of D roundings of numbers of about D^-1/2, each of up to 2^-12 of it.
    Their sum decreases with the square root of D; with 64 features, errors of 1.1e-3 have been seen.
    """
    if dtype == torch.float64:
        return 1e-12
    few = 64 <= D < 128  # rows with fewer features are not rounded to float16
    return 1e-3 * (math.sqrt(128 / D) if few else 1) if carried else 1e-5


def judge(loss, inputs, tau, backend, normalize=True):
    """Asserts the accuracy criteria of a loss and its gradients, compared with float64 on the same rounded inputs.

    The error has an absolute limit, and a limit relative to the error of eager PyTorch. A gradient must also have the
    right direction. For a backend that rounds unit rows to float16, eager PyTorch gets rounded rows, too.
    """
    dtype = inputs[0].dtype
    rounds = backend in FLOAT16_UNIT_ROWS or (inputs[0].is_cuda and backend == "native")
    carried = normalize and dtype.itemsize == 2 and rounds
    wide = torch.promote_types(dtype, torch.float32)
    exact = [x.double() for x in inputs]
    formula = functools.partial(loss.textbook, tau=tau, normalize=normalize)
    weights = some_gradient(formula(exact).shape)
    want, want_grads = run(lambda *z: formula(z, how=without_positive), exact, weights)
    rows = float16_unit if carried else unit
    base, base_grads = run(lambda *z: formula(z, rows=rows), [x.to(wide) for x in inputs], weights)
    out, grads = run(loss.call, inputs, weights, temperature=tau, normalize=normalize, backend=backend)

    assert out.dtype == wide and all(g.dtype == dtype for g in grads)
    reach = max(1 if normalize else x.norm(dim=-1).max().item() ** 2 for x in exact) / tau  # no similarity is larger
    bound = loss_bound(dtype, carried, inputs[0].shape[-1]) * max(1, 0.1 * reach)
    off = (differences(out, want) / want.abs().clamp(min=1)).max().item()
    assert off <= bound, f"a loss is off by {off:.1e}, the limit is {bound:.1e}"
    relative(out, want, base, wide, 0, "the loss")
    for k, (found, wanted, eager) in enumerate(zip(grads, want_grads, base_grads, strict=True)):
        judge_gradient(found, wanted, eager, reach, f"the gradient of input {k}")


def judge_gradient(found, wanted, eager, reach, where):
    dtype = found.dtype
    tiny = torch.finfo(dtype).smallest_normal
    rounded = wanted.to(dtype).double()  # infinite beyond the range of the dtype
    finite = rounded.isfinite()
    largest = rounded[finite].abs().max().item() if finite.any() else 0.0
    bound = GRADIENT[dtype] * max(1, 0.01 * reach) * largest + ulp(largest, dtype) + tiny
    off = error(found, rounded)
    assert off <= bound, f"{where} is off by {off:.2e}, the limit is {bound:.2e}"
    if not finite.all():
        return
    relative(found, rounded, eager, dtype, tiny, where)
    if largest > tiny:
        assert found.abs().max() > 0, f"{where} is zero, its largest entry should be {largest:.1e}"
        cosine = F.cosine_similarity(found.double().flatten() / largest, rounded.flatten() / largest, dim=0).item()
        assert cosine >= 1 - 1e-4, f"{where} has another direction: the cosine is {cosine}"


def relative(found, wanted, eager, dtype, tiny, where):
    """Asserts an error of at most three times that of eager PyTorch, plus two units in the last place."""
    if dtype == torch.float64:  # the reference has the same errors
        return
    limit = 3 * rms(eager, wanted) + 2 * ulp(wanted.abs().max().item(), dtype) + tiny
    off = rms(found, wanted)
    assert off <= limit, f"{where} is off by {off:.2e} (rms), more than three times eager PyTorch: {limit:.2e}"
