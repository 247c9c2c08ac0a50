"""Pretraining without labels: the paper's algorithm.

What a step draws (its videos, windows and augmentations) is a function of the seed and of the step's number alone: a
run that goes on from a checkpoint, in the middle of an epoch too, draws what the uninterrupted one would have. Nor does
it depend on how many processes share each batch: all draw for the whole batch, and read and augment their own part.
"""

import dataclasses
import hashlib
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tclr_kernels as tk
from tclr_kernels import backends
from tclr_kernels.losses import FORMS

from . import checkpoint, processes
from .augment import Augment, ReleaseAugment
from .clips import ClipPlan, random_windows
from .models import Projector
from .processes import rank, ranks
from .videos import share_findings

IC_ONLY = dict(ic_global=1.0, ll=0.0, gl=0.0)
AUGMENTS = {"demo": Augment, "release": ReleaseAugment}
AMP = {"fp16": torch.float16, "bf16": torch.bfloat16}
# What a checkpoint's state, or the meaning of its number of steps, hangs on: the rest may change as a run goes on.
FIXED = "net.", "clips.", "data.dataset", "data.split", "data.train", "recipe.optimizer", "recipe.batch"
FIXED += "recipe.accumulate", "recipe.learn_temperature", "recipe.queue", "recipe.seed"
# of checkpoints that were written before these settings
EARLIER = {"clips.windows": "same", "clips.decay": None, "recipe.queue": 0}
OBJECTIVE = "recipe.weights", "recipe.form", "recipe.temperature"
LEAST = dict(steps=0, epochs=0, batch=1, accumulate=1, lr=0, warmup=0, weight_decay=0, side=1, readers=0)
LEAST |= dict(checkpoint_every=1, queue=0)
WARM = 0.01, 0.05, 0.1, 0.5, 1.0  # the release's factors of the learning rate, an epoch each


@dataclass(frozen=True)
class Recipe:
    """How to pretrain; `weights` are those of `tclr_kernels.tclr`, `form` too.

    steps: how many, or 0 for `epochs` times the steps of an epoch. schedule: "cosine" warms up over `warmup` steps;
    "plateau" is the release's, five epochs of warm-up, then a tenth after 9 epochs without a new best mean loss.
    accumulate: batches a step, each contrasted within itself. learn_temperature: `temperature` is where it starts.
    queue: how many embeddings of earlier global clips are further negatives of ic_global.
    readers: threads that decode the next batch while one is trained on; 0 for videos in memory.
    """

    steps: int = 150
    epochs: int = 0
    batch: int = 64
    accumulate: int = 1
    optimizer: Literal["adamw", "adam"] = "adamw"
    lr: float = 2e-3
    schedule: Literal["cosine", "plateau"] = "cosine"
    warmup: int = 10
    weight_decay: float = 1e-4
    temperature: float = 0.1
    learn_temperature: bool = False
    weights: dict[str, float] | None = None
    form: Literal["paper", "release"] = "paper"
    queue: int = 0
    backend: str | None = None
    augment: Literal["demo", "release"] = "demo"
    side: int = 32
    amp: Literal["off", "fp16", "bf16"] = "off"
    compile: bool = False
    readers: int = 0
    checkpoint_every: int = 100
    seed: int = 0


class Embedder(nn.Module):
    """Backbone and shared head: clips [N, F, 3, H, W] -> time-pooled [N, D] and, on demand, time slices [N, T, D]."""

    def __init__(self, backbone, dim=128):
        super().__init__()
        self.backbone = backbone
        self.head = Projector(backbone.features, dim)

    def forward(self, clips):
        slices = self.backbone(clips).transpose(1, 2)
        return self.head(slices.mean(1)), slices


def pretrain(embedder, videos, plan: ClipPlan, recipe: Recipe, record, progress=iter, *, file=None, device="cpu"):
    """Trains `embedder` in place. videos: the protocol of videos.py; record(step=, total=, ...) follows each step.

    file: the checkpoint, read if it is there and written every `checkpoint_every` steps, at the end and on SIGTERM,
    after which the process exits with 143. A setting that differs from the checkpoint's is applied, or refused by a
    ValueError that names it. A loss that is not finite raises FloatingPointError with the videos' names.

    In a process group of torch.distributed each process calls this with the same arguments and trains on its share of
    every batch. Their losses contrast the whole batch, so the run is that of one process up to rounding. The first one
    writes; a signal to any of them, and an error of any, ends all.
    """
    run = Run(embedder, videos, plan, recipe, device)
    if file and (state := checkpoint.newest(file)):
        run.restore(state)
    carry_on(run, record, progress, file=file)


def carry_on(run, record, progress=iter, *, file=None):
    """Takes the steps that are left of a run, as `pretrain` describes."""
    run.embedder.train()
    with checkpoint.StopRequest() if file else nullcontext(False) as stop:
        for step in progress(range(run.done, run.steps)):
            terms = run.step()
            with processes.telling():
                record(step=step, **terms)
            stopped = any(processes.exchange(bool(stop)))  # all save and leave at the same step, whoever got the signal
            finished = run.done == run.steps
            if file and (stopped or finished or run.done % run.recipe.checkpoint_every == 0):
                with processes.together():
                    if rank() == 0:
                        checkpoint.save(file, **run.state())
            if stopped:
                raise SystemExit(checkpoint.STOPPED)
    run.embedder.eval()


class Run:
    """A pretraining at some step: everything that a checkpoint holds; `more` are settings to keep, such as net=Net()"""

    def __init__(self, embedder, videos, plan, recipe, device, **more):
        self.plan, self.recipe, self.videos, self.device = plan, recipe, videos, device
        self.settings = {name: dataclasses.asdict(each) for name, each in dict(more, clips=plan, recipe=recipe).items()}
        with processes.telling():
            check(recipe, plan, device)
            self.epoch_steps, self.steps = length(recipe, videos)
            self.embedder = synchronised(embedder, device).to(device)
        self.compare()
        self.done = 0
        self.ahead = Ahead(recipe.readers) if recipe.readers else None
        temperature = nn.Parameter(torch.tensor(recipe.temperature)) if recipe.learn_temperature else recipe.temperature
        self.group = "world" if ranks() > 1 else None
        settings = dict(form=recipe.form, weights=recipe.weights, backend=recipe.backend, group=self.group)
        self.queue = None
        if recipe.queue:
            settings["weights"] = {**(recipe.weights or {}), "ic_global": 0.0}  # `objective` adds that term
            dim = embedder.head[-1].num_features
            self.queue = tk.NegativeQueue(recipe.queue, dim).to(device)
            self.queue.enqueue(torch.randn(recipe.queue, dim, generator=drawn(recipe.seed, "queue")).to(device))
        self.loss = tk.TCLRLoss(temperature=temperature, **settings).to(device)
        self.parameters = [*embedder.parameters(), *self.loss.parameters()]
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
        self.optimizer = kind(self.parameters, recipe.lr, weight_decay=recipe.weight_decay)
        self.plateau = Plateau()
        self.scaler = torch.amp.GradScaler(torch.device(device).type, enabled=recipe.amp == "fp16")
        self.local = any(weight for name, weight in weights(recipe).items() if name != "ic_global")
        self.embed = torch.compile(embed) if recipe.compile else embed
        self.views = averaging(Views(self.embedder, self.embed).to(device), device)

    def compare(self):
        """Raises ValueError, in all processes, where they were not started alike."""
        settings = {name: value for name, value in flat(self.settings).items() if name != "data.root"}
        here = dict(device=torch.device(self.device).type, torch=torch.__version__, tclr_kernels=tk.__version__)
        here |= dict(TCLR_KERNELS_CHECK=os.environ.get("TCLR_KERNELS_CHECK"))
        processes.same(**settings, **here, videos=f"{len(self.videos)}, {listing_digest(self.videos)[:8]}")

    def step(self):
        """One step of the optimizer; returns the terms, averaged over its batches."""
        lr = self.optimizer.param_groups[0]["lr"] = self.recipe.lr * self.factor()
        self.optimizer.zero_grad()
        batches = [self.backward(part) for part in range(self.recipe.accumulate)]
        sums = self.judged(batches)
        if self.recipe.learn_temperature:  # the network's gradients are averaged already, see `averaging`
            processes.average([self.loss.temperature.grad], 1 / ranks())
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        statistics = [each for each in self.embedder.buffers() if each.is_floating_point()]  # of batch normalisation
        processes.average(statistics, len(self.share) / self.recipe.batch)
        if self.recipe.learn_temperature:
            self.loss.temperature.data.clamp_(min=0.01)
            sums["temperature"] = self.loss.temperature.item()
        self.plateau.add(sums["total"])
        self.done += 1
        if self.done % self.epoch_steps == 0:
            self.plateau.end_epoch(counts=self.done // self.epoch_steps > len(WARM))
        return dict(sums, lr=lr)

    def backward(self, part):
        """The terms of one batch, their gradients added to what is there, and at the step's last averaged."""
        recipe = self.recipe
        with processes.telling():
            windows, generator = self.taken(part)
            windows = windows.to(self.device)
        share_findings(self.videos)
        augment = AUGMENTS[recipe.augment](recipe.side, generator, share=(self.share, recipe.batch))
        with self.views.no_sync() if part + 1 < recipe.accumulate and ranks() > 1 else nullcontext():
            with torch.autocast(torch.device(self.device).type, AMP.get(recipe.amp), enabled=recipe.amp != "off"):
                g, s, x = self.views(windows, self.plan, augment, self.local)
            terms = self.objective(g.float(), s.float(), x.float())
            self.scaler.scale(terms.total / recipe.accumulate).backward()
        return {name: term.detach() for name, term in terms._asdict().items()}

    def judged(self, batches):
        """The terms of a step, averaged over its batches; FloatingPointError where one is not finite.

        They are read once a step. Every process has the same; nonetheless each takes those of the first, and looks for
        numbers that are not finite in those of all.
        """
        own = torch.stack([torch.stack([*terms.values()]) for terms in batches]).tolist()
        found = processes.exchange(own)
        for part in range(self.recipe.accumulate):
            totals = [each[part][0] for each in found]
            if bad := [total for total in totals if not math.isfinite(total)]:
                names = ", ".join(self.videos.names[i] for i in self.whole_batch(self.done, part))
                raise FloatingPointError(f"step {self.done}: the loss is {bad[0]}; its batch: {names}")
        sums = Counter()
        for values in found[0]:
            for name, value in zip(batches[0], values, strict=True):
                sums[name] += value / self.recipe.accumulate
        return sums

    def objective(self, g, s, x):
        """The terms of a batch; with a queue, ic_global has the earlier global clips as further negatives."""
        spread = dict(shares=[len(each) for each in shares(self.recipe.batch)]) if self.group else {}
        terms = self.loss(g, s, x, **spread)
        if self.queue is None:
            return terms
        spread |= dict(group=self.group)
        ic = tk.nt_xent(*g, self.loss.temperature, negatives=self.queue, backend=self.recipe.backend, **spread)
        self.queue.enqueue(g, **spread)
        weight = (self.recipe.weights or {}).get("ic_global", 1.0)
        return terms._replace(total=terms.total + weight * ic, ic_global=ic)

    def taken(self, part):
        """What `read` gives for a batch of this step, read ahead where there are readers."""
        if not self.ahead:
            return self.read(self.done, part)
        following = divmod(self.done * self.recipe.accumulate + part + 1, self.recipe.accumulate)
        return self.ahead.take(self.read, (self.done, part), following if following[0] < self.steps else None)

    def read(self, step, part, threads=None):
        """The windows of this process's share of a batch, and the generator that draws the batch's augmentations."""
        generator = drawn(self.recipe.seed, "step", step, part, 0)
        chosen = self.whole_batch(step, part)
        return random_windows(self.videos, chosen, self.plan, generator, threads, self.share), generator

    def batch(self, step, part):
        """The videos of this process's share of a batch."""
        return self.whole_batch(step, part)[self.share.start : self.share.stop]

    def whole_batch(self, step, part):
        """The videos of a batch: an epoch's random order, cut; its remainder is left out."""
        recipe = self.recipe
        epoch, within = divmod(step, self.epoch_steps)
        order = torch.randperm(len(self.videos), generator=drawn(recipe.seed, "epoch", epoch))
        start = (within * recipe.accumulate + part) * recipe.batch
        return order[start : start + recipe.batch].tolist()

    @property
    def share(self):
        """The places in a batch of the videos that are this process's."""
        return shares(self.recipe.batch)[rank()]

    def factor(self):
        """Of the learning rate, at this step."""
        if self.recipe.schedule == "cosine":
            return warm_cosine(self.done, self.recipe.warmup, self.steps)
        epoch = self.done // self.epoch_steps
        return WARM[epoch] if epoch < len(WARM) else self.plateau.factor

    def state(self):
        parts = self.embedder, self.loss, self.optimizer, self.scaler
        names = "embedder", "loss", "optimizer", "scaler"
        states = {name: part.state_dict() for name, part in zip(names, parts, strict=True)}
        states |= {"queue": self.queue.state_dict()} if self.queue else {}
        kept = dict(settings=self.settings, videos=listing_digest(self.videos), classes=self.videos.classes)
        return dict(done=self.done, plateau=vars(self.plateau).copy(), **kept, **states)

    def restore(self, state):
        """Takes a checkpoint's state under the settings of now; one that cannot be applied is a ValueError by name."""
        settings = state.get("settings", {})
        self.refuse(settings, state)
        self.done = state["done"]
        try:
            self.embedder.load_state_dict(state["embedder"])
        except RuntimeError as error:
            raise ValueError(f"net: found another network than the checkpoint's: {error}") from None
        if self.recipe.learn_temperature:
            self.loss.load_state_dict(state["loss"])
        if self.queue:
            self.queue.load_state_dict(state["queue"])
        now = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, now, strict=True):
            group.update(given)  # load_state_dict brings the checkpoint's weight decay back
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        vars(self.plateau).update(state["plateau"])
        before, now = flat(settings), flat(self.settings)
        if any(before.get(name, now[name]) != now[name] for name in OBJECTIVE):
            self.plateau.restart()

    def refuse(self, settings, state):
        """Raises ValueError that names every setting that differs from the checkpoint's and cannot change."""
        before, now = EARLIER | flat(settings), flat(self.settings)
        fixed = FIXED + ("recipe.temperature",) * self.recipe.learn_temperature
        names = [name for name in before.keys() & now.keys() if before[name] != now[name] and name.startswith(fixed)]
        found = [f"{name}: found {now[name]!r}, wanted {before[name]!r}" for name in sorted(names)]
        if not found and state.get("videos", listing_digest(self.videos)) != listing_digest(self.videos):
            found = [f"data: found {len(self.videos)} videos that are not those of the checkpoint, or not in its order"]
        if not found and state["done"] > self.steps:
            found = [f"recipe.steps: found {self.steps}, wanted at least the {state['done']} that are done"]
        if found:
            raise ValueError("; ".join(found) + ", to go on from the checkpoint: a changed one needs a new run")


@dataclass
class Plateau:
    """A tenth of the learning rate after `patience` epochs without a new best mean loss."""

    patience: int = 9
    factor: float = 1.0
    best: float = math.inf
    stale: int = 0
    losses: list = field(default_factory=list)

    def add(self, loss):
        self.losses.append(loss)

    def restart(self):
        """Forgets the losses there were, which those of another objective cannot be compared with."""
        self.best, self.stale, self.losses = math.inf, 0, []

    def end_epoch(self, counts):
        """`counts` is False during the warm-up, whose epochs are remembered but not held against the rate."""
        mean, self.losses = sum(self.losses) / len(self.losses), []
        self.stale = 0 if mean < self.best or not counts else self.stale + 1
        self.best = min(self.best, mean)
        if self.stale == self.patience:
            self.factor, self.stale = self.factor / 10, 0


class Ahead:
    """Reads the batch that follows while one is trained on."""

    def __init__(self, readers):
        self.one, self.readers, self.coming = ThreadPoolExecutor(1), ThreadPoolExecutor(readers), {}

    def take(self, read, this, following):
        """read(*this, threads), begun at the call before; begins read(*following, threads)."""
        found = self.coming.pop(this, None) or self.one.submit(read, *this, self.readers)
        if following:
            self.coming[following] = self.one.submit(read, *following, self.readers)
        return found.result()


def check(recipe, plan, device):
    """Raises ValueError, or RuntimeError for a backend that does not serve the device, that names a key of the recipe.

    Found out here, before a run's folder is touched, and not at the first step.
    """
    for name, least in LEAST.items():
        if not getattr(recipe, name) >= least:  # so that NaN is refused too
            raise ValueError(f"recipe.{name}: found {getattr(recipe, name)}, wanted at least {least}")
    aligned = {name: value for name, value in weights(recipe).items() if name in ("ll", "gl")}
    if plan.windows == "independent" and any(aligned.values()):
        found = ", ".join(f"{name} {weight}" for name, weight in aligned.items())
        raise ValueError(
            f"recipe.weights: found {found} beside clips.windows 'independent', wanted 0 for both: "
            "they compare clips of the same frames"
        )
    if recipe.batch < ranks():
        raise ValueError(f"recipe.batch: found {recipe.batch} videos for {ranks()} processes, wanted one each at least")
    backends.choose(recipe.backend, torch.device(device))


def weights(recipe):
    """The weight of each term, those that the recipe leaves to its form's defaults too."""
    return FORMS.get(recipe.form, {}) | (recipe.weights or {})


def flat(settings):
    """{"recipe.lr": 1e-3, ...} of {"recipe": {"lr": 1e-3, ...}, ...}"""
    return {f"{part}.{name}": value for part, values in settings.items() for name, value in values.items()}


def listing_digest(videos):
    """Stands for which videos there are, their labels and their order, on which what a step draws depends."""
    listed = [dataclasses.astuple(entry) for entry in getattr(videos, "entries", [])] or list(videos.names)
    return hashlib.sha256(repr((listed, videos.classes)).encode()).hexdigest()


def length(recipe, videos):
    """Steps of an epoch, and of the whole pretraining."""
    epoch = len(videos) // (recipe.batch * recipe.accumulate)
    if epoch == 0:
        wanted = f"wanted at most the {len(videos)} videos there are"
        raise ValueError(f"batch: found {recipe.batch} x {recipe.accumulate} a step, {wanted}")
    return epoch, recipe.steps or recipe.epochs * epoch


def drawn(seed, *what):
    """A generator of random numbers that depends on nothing but its arguments."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def embed(embedder, windows, plan, augment, *, local=True):
    """Two views of each video: g: [2, B, D] global clips; s: [2, B, T, D] their slices; x: [2, B, T, D] local clips.

    windows: uint8, as `random_windows` gives them: [B, window, 3, H, W], of which two augmentations are the two views,
    or, where plan.windows is "independent", [2 B, ...], each view's own. Without `local`, s and x are stand-ins for
    losses that do not read them.
    """
    B, T = len(windows) // plan.windows_drawn, plan.local_clips
    views = 2 // plan.windows_drawn
    whole, chunks = plan.cut(windows)
    g, slices = embedder(augment(whole, views=views))
    g = g.unflatten(0, (2, B))
    if not local:
        unread = g.detach()[:, :, None].expand(-1, -1, T, -1)
        return g, unread, unread
    s = embedder.head(slices).unflatten(0, (2, B))
    x, _ = embedder(augment(chunks, views=views))
    return g, s, x.unflatten(0, (2, B, T))


def shares(batch):
    """The places in a batch of each process's videos, as ranges: joined in the order of processes, the batch."""
    ends = [number * batch // ranks() for number in range(ranks() + 1)]
    return [range(first, last) for first, last in zip(ends, ends[1:], strict=False)]


class Views(nn.Module):
    """`embed` as a module, as DistributedDataParallel wants it."""

    def __init__(self, embedder, embed):
        super().__init__()
        self.embedder, self.embed = embedder, embed
        self.unused = nn.Parameter(torch.zeros(()))  # there always is one, of which `averaging` is not to warn

    def forward(self, windows, plan, augment, local):
        return self.embed(self.embedder, windows, plan, augment, local=local)


def averaging(module, device):
    """The module, whose parameters' gradients are averaged over the processes in its backward.

    The first process's weights are those of all from the start. find_unused_parameters: for networks that leave some
    unused, and because PyTorch then never regroups the gradients after the first step. An all-reduce adds by a number's
    place in its group, so that only thus a run that was interrupted keeps the bits of one that was not.
    """
    if ranks() == 1:
        return module
    ids = None
    if (device := torch.device(device)).type == "cuda":
        ids = [torch.cuda.current_device() if device.index is None else device.index]
    module = DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)
    module.broadcast_buffers = False  # every step averages them; as an argument, its name depends on PyTorch's version
    return module


def synchronised(embedder, device):
    """The network; on GPUs its batch normalisation is over the batches of all processes. PyTorch has none for CPUs."""
    if ranks() > 1 and torch.device(device).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(embedder)
    return embedder


def where(device):
    """Of what a run's figures depend on beside its settings: {name: value} for config.yaml."""
    if ranks() == 1:
        return dict(device=device)
    kind = torch.device(device).type
    statistics = "of all processes" if kind == "cuda" else "of each process's share of a batch"
    return dict(device=kind, processes=ranks(), batch_statistics=statistics)


def warm_cosine(step, warmup, steps):
    """The learning rate's factor: a linear rise over `warmup` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
