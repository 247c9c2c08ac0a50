"""The drop-ins of `tclr_kernels.compat` against their originals; `make .venv/.peers` installs these.

`python -m benchmarks.dropins` measures times and peak memory, and writes them to benchmarks/results/dropins-*.csv.

A step is a loss and its gradient, float32, D = 128. Both sides of a case take turns in one run. Rows: embeddings that
the loss is given. Originals that are in no package index are written here in the operations of their repositories.
"""

import argparse
import functools
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tclr_kernels import compat

from . import baselines, measure, peers, rows

PAGE = rows.ROOT / "docs" / "drop-ins.md"
SIZES = 80, 1024, 4096
D, QUEUE = 128, 10240  # a multiple of the number of keys, as MoCo requires
COLUMNS = (
    *("drop_in", "rows", "status", "original_ms", "ours_ms", "ratio", "runs", "original_mb", "ours_mb"),
    *("cpu", "threads", "isa", "torch", "tclr_kernels", "commit", "date"),
)


class Case(NamedTuple):
    """Functions that make the original loss and ours, and their inputs for a number of rows."""

    original: object
    ours: object
    inputs: object
    sizes: tuple = SIZES

    def step(self, side, size):
        loss, (leaves, more) = getattr(self, side)(), self.inputs(size)
        return lambda: torch.autograd.grad(loss(*leaves, *more), leaves, allow_unused=True)


def leaves(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def two_views(size):
    return leaves((size // 2, D), (size // 2, D)), []


def unit_views(size):
    return [F.normalize(x.detach(), dim=1).requires_grad_() for x in two_views(size)[0]], []


def scaled_views(size):
    return [*unit_views(size)[0], torch.tensor(14.3, requires_grad=True)], []


def indexed(size):
    """Two views below each other, and the index of each row's sample."""
    return leaves((size, D)), [torch.arange(size // 2).repeat(2)]


def classes(size):
    return leaves((size, D)), [baselines.classes(size)]


def labelled_views(size):
    """[N, 2, D], and labels [N]"""
    z = F.normalize(leaves((size // 2, 2, D))[0].detach(), dim=2)
    return [z.requires_grad_()], [baselines.classes(size // 2)]


def columns(count):
    """Queries, documents and hard negatives: `count` tensors of the same length."""
    return lambda size: (leaves(*[(size // count, D)] * count), [])


def original(adapter, module, name, **settings):
    """A function that makes a loss of an installed library."""

    def make():
        adapter(0.1)
        return getattr(__import__(module, fromlist=[name]), name)(**settings)

    return make


def ours(module, name, **settings):
    return lambda: getattr(getattr(compat, module), name)(**settings)


def of_columns(maker):
    """The loss of sentence-transformers, of a list of embeddings."""
    return lambda: lambda *columns: maker(None).compute_loss_from_embeddings(list(columns), None)


def simclr_of_solo(z, indexes, temperature=0.1):
    """solo-learn's: masks of the positives and of the negatives over all exponentials."""
    z = F.normalize(z, dim=-1)
    exponentials = torch.exp(torch.einsum("if,jf->ij", z, z) / temperature)
    indexes = indexes[None]
    positive = (indexes.t() == indexes).fill_diagonal_(False)
    p, n = (torch.sum(exponentials * mask, 1) for mask in (positive, indexes.t() != indexes))
    return -torch.mean(torch.log(p / (p + n)))


def sup_con_of_its_authors(features, labels, temperature=0.07):
    """SupContrast's: a mask of the positives and one of all others, and the logarithm of every candidate."""
    views = features.shape[1]
    z = torch.cat(torch.unbind(features, 1))
    S = torch.div(torch.matmul(z, z.T), temperature)
    S = S - S.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z))
    mask = torch.eq(labels[:, None], labels[None]).float().repeat(views, views) * others
    log_prob = S - torch.log((torch.exp(S) * others).sum(1, keepdim=True))
    count = mask.sum(1)
    return -((mask * log_prob).sum(1) / torch.where(count < 1e-6, 1, count)).mean()


class MoCoOfItsAuthors:
    """MoCo's: the positive as a first column beside those of a copy of the queue, which is [D, K]."""

    def __init__(self):
        self.queue, self.place = F.normalize(torch.randn(D, QUEUE), dim=0), 0

    def __call__(self, q, k):
        k = k.detach()
        positive = torch.einsum("nc,nc->n", q, k)[:, None]
        logits = torch.cat([positive, torch.einsum("nc,ck->nk", q, self.queue.clone())], 1)
        logits /= 0.07
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))
        self.queue[:, self.place : self.place + len(k)] = k.T
        self.place = (self.place + len(k)) % QUEUE
        return loss


def moco():
    loss = compat.moco.MoCoLoss(D, QUEUE)
    return lambda q, k: loss(q, k.detach())


def lightly(name, **settings):
    module = "lightly.loss.dcl_loss" if name.startswith("DCL") else "lightly.loss.ntx_ent_loss"
    return original(peers.lightly, module, name, **settings), ours("lightly", name, **settings)


def metric_learning(name):
    return (
        original(lambda tau: None, "pytorch_metric_learning.losses", name),
        ours("metric_learning", name),
    )


def ranking(**settings):
    def of_original(model):
        return peers.ranking()(model, **settings)

    def of_ours(model):
        return compat.sentence_transformers.MultipleNegativesRankingLoss(model, **settings)

    return of_columns(of_original), of_columns(of_ours)


ALL_DIRECTIONS = "query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"
BANK = dict(memory_bank_size=(QUEUE, D))
CASES = {
    "lightly NTXentLoss": Case(*lightly("NTXentLoss"), two_views),
    "lightly NTXentLoss, memory bank": Case(*lightly("NTXentLoss", **BANK), two_views),
    "lightly DCLLoss": Case(*lightly("DCLLoss"), two_views),
    "lightly DCLWLoss": Case(*lightly("DCLWLoss"), two_views),
    "open_clip ClipLoss": Case(
        original(peers.open_clip, "open_clip.loss", "ClipLoss"), ours("open_clip", "ClipLoss"), scaled_views
    ),
    # its matrix has a row for every positive pair and a column for every negative one: 4 GiB at 1,024 rows
    "pytorch-metric-learning NTXentLoss": Case(*metric_learning("NTXentLoss"), indexed, sizes=(80, 128, 256)),
    "pytorch-metric-learning SupConLoss": Case(*metric_learning("SupConLoss"), classes),
    "solo-learn simclr_loss_func": Case(lambda: simclr_of_solo, lambda: compat.solo.simclr_loss_func, indexed),
    "SupContrast SupConLoss": Case(lambda: sup_con_of_its_authors, ours("sup_contrast", "SupConLoss"), labelled_views),
    "MoCo": Case(MoCoOfItsAuthors, moco, unit_views),
    "sentence-transformers MultipleNegativesRankingLoss": Case(*ranking(), columns(2)),
    "the same, a hard negative": Case(*ranking(), columns(3)),
    "the same, all directions": Case(*ranking(directions=ALL_DIRECTIONS), columns(2)),
}


def timed(name, size, seconds):
    steps = {side: CASES[name].step(side, size) for side in ("original", "ours")}
    times = measure.interleaved(steps, {side: measure.once(step)[0] for side, step in steps.items()}, seconds)
    middle = {side: 1e3 * statistics.median(taken) for side, taken in times.items()}
    row = {f"{side}_ms": f"{x:.4g}" for side, x in middle.items()}
    row |= {"ratio": f"{middle['original'] / middle['ours']:.3g}", "runs": len(times["ours"])}
    return row | {f"{side}_mb": memory(name, side, size) for side in steps}


def memory(name, side, size):
    """MiB that a step takes beyond its inputs, in a process of its own; empty where the system cannot say."""
    command = [sys.executable, "-m", "benchmarks.dropins", "memory", name, side, str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    return f"{float(done.stdout.split()[-1]):.4g}" if done.returncode == 0 else ""


def memory_here(name, side, size):
    """The same, in this process."""
    CASES[name].step(side, 80)()  # loads libraries and starts threads
    step = CASES[name].step(side, size)
    return measure.peak_of(step)


def committed():
    """The file of the page's table: the first there is, or the one that this machine would write."""
    return next(iter(sorted(rows.RESULTS.glob("dropins-*.csv"))), rows.default_path("dropins"))


def with_others(old, made):
    """Rows that were just measured, in the place of older ones, and the older rows of other cases, in their order."""
    all_rows = {(row["drop_in"], int(row["rows"])): row for row in [*old, *made]}
    return [all_rows[name, size] for name, case in CASES.items() for size in case.sizes if (name, size) in all_rows]


def table(path):
    """The lines of the page's table."""
    yield "| drop-in | rows | original | here | times as fast | original, MiB | here, MiB |"
    yield "|---|---|---|---|---|---|---|"
    made = rows.read(path)
    if not made:
        yield "| not measured | | | | | | |"
    for row in made:
        if row["status"] != "ok":
            yield f"| {row['drop_in']} | {int(row['rows']):,} | {row['status']} | | | | |"
            continue
        cells = f"{row['original_ms']} ms", f"{row['ours_ms']} ms", row["ratio"], row["original_mb"], row["ours_mb"]
        yield f"| {row['drop_in']} | {int(row['rows']):,} | {' | '.join(cells)} |"


def page(text, path):
    before, begin, rest = text.partition("<!-- dropins:begin -->\n")
    _, end, after = rest.partition("<!-- dropins:end -->")
    return before + begin + "\n".join(table(path)) + "\n" + end + after


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dropins", description=__doc__)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="only these drop-ins")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to time each case and size")
    parser.add_argument(
        "--out",
        type=Path,
        default=rows.default_path("dropins"),
        help="the CSV whose rows of these drop-ins are replaced",
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("page", help="write the table of the committed rows into docs/drop-ins.md")
    single = commands.add_parser("memory", help="what one step takes, in MiB")
    single.add_argument("name", choices=CASES)
    single.add_argument("side", choices=("original", "ours"))
    single.add_argument("size", type=int)
    options = parser.parse_args()
    if options.command == "memory":
        print(memory_here(options.name, options.side, options.size))
    elif options.command == "page":
        PAGE.write_text(page(PAGE.read_text(), committed()))
    else:
        here = rows.here()
        made = (
            dict(drop_in=name, rows=size) | here | rows.attempted(functools.partial(timed, name, size, options.seconds))
            for name in options.case
            for size in CASES[name].sizes
        )
        rows.write(options.out, COLUMNS, with_others(rows.read(options.out), made))
        print("\n".join(table(options.out)))


if __name__ == "__main__":
    main()
