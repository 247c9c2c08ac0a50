"""The losses in plain PyTorch: of each the fastest form found, the usual form, and the form of TCLR's official code."""

import torch
import torch.nn.functional as F


def nt_xent(a, b, tau):
    """NT-Xent in the fastest plain PyTorch found: scaled once as rows, masked in place, one fused cross-entropy."""
    z = F.normalize(torch.cat([a, b])) * tau**-0.5
    S = torch.mm(z, z.T).fill_diagonal_(-torch.inf)
    N = len(a)
    partner = torch.arange(2 * N, device=S.device).roll(N)
    return F.cross_entropy(S, partner)


def nt_xent_masked(a, b, tau):
    """NT-Xent as it is usually written: positives and negatives picked by boolean masks, and concatenated again."""
    z = torch.cat([F.normalize(a), F.normalize(b)])
    S = z @ z.T
    M = len(S)
    labels = torch.arange(len(a)).repeat(2)
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(M, dtype=torch.bool)
    same = same[~itself].view(M, -1)
    S = S[~itself].view(M, -1)
    logits = torch.cat([S[same].view(M, 1), S[~same].view(M, -1)], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(M, dtype=torch.long))


def nt_xent_exponentials(a, b, tau):
    """NT-Xent in the form of solo-learn: exponentials first, positives and negatives summed by 0/1 matrices."""
    z = torch.cat([F.normalize(a), F.normalize(b)])
    index = torch.arange(len(a)).repeat(2)
    same = (index[:, None] == index[None, :]).to(z.dtype).fill_diagonal_(0)
    other = (index[:, None] != index[None, :]).to(z.dtype)
    e = torch.exp(torch.einsum("if,jf->ij", z, z) / tau)
    positive, negative = (e * same).sum(1), (e * other).sum(1)
    return -torch.log(positive / (positive + negative)).mean()


def clip(a, b, tau):
    """CLIP's loss: one product, its transpose for the other direction."""
    S = (F.normalize(a) * (1 / tau)) @ F.normalize(b).T
    own = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(S, own) + F.cross_entropy(S.T, own)) / 2


def log_sum_exp(rows, columns, tau):
    """The mean log-sum-exp of the rows' similarities to the columns: one product, of rows scaled beforehand."""
    return ((F.normalize(rows) * (1 / tau)) @ F.normalize(columns).T).logsumexp(1).mean()


def classes(M):
    """Labels of M rows: 0, 1, 2 and so on, again from 0 after 100 classes, or after M / 2 if that is less."""
    return torch.arange(M) % min(100, M // 2)


def sup_con(z, tau):
    """Supervised contrast in the fastest plain PyTorch found: the sum of a class gives the positives of all its rows.

    The log-sum-exp is the fused cross-entropy with any target, plus the similarity of this target.
    """
    labels = classes(len(z))
    z = F.normalize(z) * tau**-0.5
    S = torch.mm(z, z.T).fill_diagonal_(-torch.inf)
    sums = torch.zeros(int(labels.max()) + 1, z.shape[1]).index_add(0, labels, z)
    positives = (z * (sums[labels] - z)).sum(1) / (labels.bincount()[labels] - 1)
    other = torch.arange(len(z)).roll(1)
    return F.cross_entropy(S, other) + ((z * z[other]).sum(1) - positives).mean()


def sup_con_masked(z, tau):
    """Supervised contrast as its authors write it: a mask of the positives, and the logarithm of every candidate."""
    labels = classes(len(z))
    z = F.normalize(z)
    S = torch.matmul(z, z.T) / tau
    S = S - S.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z))
    mask = (labels[:, None] == labels).float() * others
    log_prob = S - torch.log((S.exp() * others).sum(1, keepdim=True))
    return -((mask * log_prob).sum(1) / mask.sum(1)).mean()


def dcl(a, b, tau):
    """Decoupled contrast in the fastest plain PyTorch found: one matrix, a row and its partner masked in place.

    The log-sum-exp is computed as in `sup_con`.
    """
    z = F.normalize(torch.cat([a, b])) * tau**-0.5
    row = torch.arange(len(z))
    partner, other = row.roll(len(a)), row.roll(1)
    S = torch.mm(z, z.T).fill_diagonal_(-torch.inf)
    S[row, partner] = -torch.inf
    return F.cross_entropy(S, other) + (z * (z[other] - z[partner])).sum(1).mean()


def dcl_blocks(a, b, tau):
    """Decoupled contrast as its authors write it: two blocks beside each other, masked by adding, for each view."""

    def one(a, b):
        cross = a @ b.T
        blocks = torch.cat([a @ a.T, cross], 1) / tau + torch.eye(len(a)).repeat(1, 2) * -1e9
        return (blocks.logsumexp(1) - cross.diagonal() / tau).mean()

    a, b = F.normalize(a), F.normalize(b)
    return (one(a, b) + one(b, a)) / 2


def moco(q, k, queue, tau):
    """MoCo in the fastest plain PyTorch found: the positive, and the queue's log-sum-exp as in `sup_con`.

    The queue is copied, since the step's keys will replace some of its rows before the backward.
    """
    q, queue = F.normalize(q) * (1 / tau), F.normalize(queue.clone())
    positive = (q * F.normalize(k)).sum(1)
    first = torch.zeros(len(q), dtype=torch.long)
    negatives = F.cross_entropy(q @ queue.T, first, reduction="none") + q @ queue[0]
    return F.softplus(negatives - positive).mean()


def moco_concatenated(q, k, queue, tau):
    """MoCo as its authors write it: the positive as a first column."""
    q, k, queue = F.normalize(q), F.normalize(k), F.normalize(queue.clone()).T
    positive = torch.einsum("nc,nc->n", q, k)[:, None]
    logits = torch.cat([positive, torch.einsum("nc,ck->nk", q, queue)], 1) / tau
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def clip_linear(a, b, tau):
    """CLIP's loss by PyTorch's fused linear cross-entropy, in both directions."""
    a, b, own = F.normalize(a) * (1 / tau), F.normalize(b), torch.arange(len(a))
    return (F.linear_cross_entropy(a, b, own) + F.linear_cross_entropy(b, a, own)) / 2


def views_in_pairs(z, tau):
    """NT-Xent over all pairs of views, one call for each pair."""
    V = len(z)
    pairs = [nt_xent(z[a], z[c], tau) for a in range(V) for c in range(a)]
    return sum(pairs) / len(pairs)


def views(z, tau):
    """NT-Xent over all pairs of views from one Gram matrix, with the log-sum-exp of every block."""
    V, B, D = z.shape
    rows = F.normalize(z, dim=-1).reshape(V * B, D) * tau**-0.5
    S = torch.mm(rows, rows.T).view(V, B, V, B)
    pos = S.diagonal(dim1=1, dim2=3)  # [V, V, B]
    itself = (torch.eye(V)[:, None, :, None] * torch.eye(B)[None, :, None, :]).bool()
    lse = S.masked_fill(itself, -torch.inf).logsumexp(3).transpose(1, 2)  # [V, V, B], c != a with its positive
    own = lse.diagonal(dim1=0, dim2=1).T[:, None]
    terms = torch.logaddexp(own, lse) - pos
    return terms.masked_fill(torch.eye(V, dtype=torch.bool)[:, :, None], 0).sum() / (V * (V - 1) * B)


def local_local(x1, x2, tau):
    """The local-local loss with all videos in one batched product."""
    T = x1.shape[1]
    z = F.normalize(torch.cat([x1, x2], 1), dim=-1) * tau**-0.5
    S = torch.bmm(z, z.mT)
    pos = S.diagonal(T, 1, 2)
    lse = S.masked_fill(torch.eye(2 * T, dtype=torch.bool), -torch.inf).logsumexp(2)
    return (lse.sum() - 2 * pos.sum()) / (2 * len(x1))


def local_local_loop(x1, x2, tau):
    """The local-local loss as a loop over the videos."""
    return sum(nt_xent(a, b, tau) for a, b in zip(x1, x2, strict=True)) * x1.shape[1] / len(x1)


def global_local(s, x, tau):
    """The global-local loss with all videos in one batched product."""
    S = torch.bmm(F.normalize(s, dim=-1) * (1 / tau), F.normalize(x, dim=-1).mT)
    pos = S.diagonal(dim1=1, dim2=2)
    return (S.logsumexp(2).sum() + S.logsumexp(1).sum() - 2 * pos.sum()) / len(s)


def global_local_loop(s, x, tau):
    """The global-local loss as a loop over the videos."""
    return sum(clip(a, b, tau) for a, b in zip(s, x, strict=True)) * 2 * s.shape[1] / len(s)


def pairwise(zi, zj, tau):
    """NT-Xent of two views as TCLR's official code computes it: a mask built on the host, a sum divided by 2B."""
    B = len(zi)
    z = torch.cat([zj, zi])
    S = torch.tensordot(z.unsqueeze(1), z.T.unsqueeze(0), dims=2)
    negative = (~(torch.eye(2 * B) + torch.eye(2 * B).roll(B, 0)).bool()).to(z.device)
    positives = torch.cat([torch.diag(S, B), torch.diag(S, -B)]).view(2 * B, 1)
    logits = torch.cat([positives, S[negative].view(2 * B, -1)], dim=1) / tau
    return F.cross_entropy(logits, torch.zeros(2 * B).long().to(z.device), reduction="sum") / (2 * B)


def slices_against_clips(s, x, tau):
    """The global-local loss of two views as TCLR's official code computes it: both directions in a batch of T x T."""
    B, T, _ = s.shape
    S = torch.bmm(s, x.permute(0, 2, 1))
    logits = torch.cat([S, S.permute(0, 2, 1)]).reshape(-1, T) / tau
    return F.cross_entropy(logits, torch.tensor(list(range(T)) * (2 * B)).to(s.device), reduction="sum") / (2 * B)


def release(g, s, x, tau):
    """The whole objective as TCLR's official code computes it: a call for each pair of sets, each video and so on."""
    g, s, x = (F.normalize(z, dim=-1) for z in (g, s, x))
    V, B, T, _ = x.shape
    sets = [x[v, :, t] for v in range(V) for t in range(T)]
    ic_global = pairwise(g[0], g[1], tau)
    ic_local = sum(pairwise(a, c, tau) for i, a in enumerate(sets) for j, c in enumerate(sets) if i != j) / V**2
    ll = sum(pairwise(x[0, i], x[1, i], tau) for i in range(B))
    gl = sum(slices_against_clips(s[v], x[w], tau) for v in range(V) for w in range(V))
    return ic_global + ic_local + ll + gl


def release_batched(g, s, x, tau):
    """The same objective in the fewest plain PyTorch calls found: a Gram matrix for each term, videos in batches."""
    V, B, T, D = x.shape
    clips = x.transpose(1, 2).reshape(V * T, B, D)
    pairs = V * T * (V * T - 1) / V**2
    gl = sum(global_local(s[v], x[w], tau) for v in range(V) for w in range(V)) / 2
    return nt_xent(g[0], g[1], tau) + pairs * views(clips, tau) + B / T * local_local(x[0], x[1], tau) + gl
