"""Pretraining without labels, as in the paper.

All random choices of a step (its videos, windows and augmentations) depend only on the seed and on the step's number.
So a resumed run makes the same choices as an uninterrupted one, even in the middle of an epoch. They do not depend on
the number of processes either: all processes draw for the whole batch, and read and augment their own part.
"""

import dataclasses
import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

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
# The settings that must not change when a run is resumed, since a checkpoint's state or step number depends on them.
FIXED = "net.", "clips.", "data.dataset", "data.split", "data.train", "recipe.optimizer", "recipe.batch"
FIXED += "recipe.accumulate", "recipe.learn_temperature", "recipe.queue", "recipe.seed"
# the values of settings that older checkpoints do not have
EARLIER = {"clips.windows": "same", "clips.decay": None, "recipe.queue": 0}
OBJECTIVE = "recipe.weights", "recipe.form", "recipe.temperature"
LEAST = dict(steps=0, epochs=0, batch=1, accumulate=1, lr=0, warmup=0, weight_decay=0, side=1, readers=0)
LEAST |= dict(checkpoint_every=1, queue=0)
LEAST_SCALE = 2.0**-14  # the smallest loss scale of fp16, 2**30 times below the initial one
VARIABLES = [f"TCLR_KERNELS_{name}" for name in ("AUTOTUNE", "BACKEND", "CHECK", "ISA")]  # results depend on them
WARM = 0.01, 0.05, 0.1, 0.5, 1.0  # the factors of the learning rate in the release's first five epochs


@dataclass(frozen=True)
class Recipe:
    """The settings of a pretraining. `weights` and `form` are those of `tclr_kernels.tclr`.

    steps: the number of steps, or 0 for `epochs` epochs. schedule: "cosine" has a warm-up of `warmup` steps; "plateau"
    is that of the release, with five epochs of warm-up, after which the rate is divided by 10 whenever the mean loss
    has no new minimum for 9 epochs. accumulate: batches in a step; the losses compare rows of the same batch only.
    learn_temperature: `temperature` is its initial value. queue: the number of earlier global clips whose embeddings
    are further negatives of ic_global. readers: threads that decode the next batch during a step; 0 for videos in
    memory.
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
    """Backbone and head: clips [N, F, 3, H, W] -> (embeddings [N, D], the backbone's features of slices [N, T, C]).

    `head` also turns the features of time slices into embeddings [N, T, D].
    """

    def __init__(self, backbone, dim=128):
        super().__init__()
        self.backbone = backbone
        self.head = Projector(backbone.features, dim)

    def forward(self, clips):
        slices = self.backbone(clips).transpose(1, 2)
        return self.head(slices.mean(1)), slices


def pretrain(embedder, videos, plan: ClipPlan, recipe: Recipe, record, progress=iter, *, file=None, device="cpu"):
    """Trains `embedder` in place. videos: a set of videos, see videos.py; record(step=, total=, ...) follows each step.

    file: the checkpoint. It is read if it exists, and written every `checkpoint_every` steps, at the end, and on
    SIGTERM, SIGINT or SIGHUP, after which the process exits with status 128 + the signal's number. If a setting differs
    from the checkpoint's, the new one is used, or a ValueError that names it is raised if it must not change.

    A loss or gradient that is not finite raises FloatingPointError with the names of the videos, before the weights are
    changed. With fp16 such a gradient halves the loss scale, and is an error only once the scale is below LEAST_SCALE.

    In a process group of torch.distributed, each process calls this with the same arguments, and trains on its share of
    every batch. Their losses compare the rows of the whole batch, so the result differs from that of one process by
    rounding only. The first process writes the files. A signal to any process, or an error in one, ends all of them.
    """
    run = Run(embedder, videos, plan, recipe, device)
    processes.same(**{"a checkpoint file": bool(file)})
    if file and (state := checkpoint.newest(file)):
        run.restore(state)
    carry_on(run, record, progress, file=file)


def carry_on(run, record, progress=iter, *, file=None):
    """Runs the remaining steps of a run, as `pretrain` describes."""
    run.embedder.train()
    with checkpoint.StopRequest() if file else nullcontext(0) as stop:
        for step in progress(range(run.done, run.steps)):
            terms = run.step()
            with processes.telling():
                record(step=step, **terms)
            stopped = max(processes.exchange(int(stop)))  # if any process got a signal, all end at the same step
            finished = run.done == run.steps
            if file and (stopped or finished or run.done % run.recipe.checkpoint_every == 0):
                with processes.together():
                    run.check_finite()
                    if rank() == 0:
                        checkpoint.save(file, **run.state())
            if stopped:
                raise SystemExit(128 + stopped)  # as a shell reports a process that the signal ended
    run.embedder.eval()


class Run:
    """The state of a pretraining, which a checkpoint holds. more: further settings to store, such as net=Net()."""

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
        """Raises ValueError, in all processes, if they were started with different settings or videos."""
        settings = {name: value for name, value in flat(self.settings).items() if name != "data.root"}
        device = torch.device(self.device)
        here = dict(device=device.type, torch=torch.__version__, tclr_kernels=tk.__version__)
        here |= {name: os.environ.get(name) for name in VARIABLES}
        here |= dict(backend=backends.choose(self.recipe.backend, device))  # one process may lack the compiled kernels
        processes.same(**settings, **here, videos=f"{len(self.videos)}, {listing_digest(self.videos)[:8]}")

    def step(self):
        """Makes one step of the optimizer. Returns the terms, averaged over its batches, and the learning rate."""
        lr = self.optimizer.param_groups[0]["lr"] = self.recipe.lr * self.factor()
        self.optimizer.zero_grad()
        batches = [self.backward(part) for part in range(self.recipe.accumulate)]
        if self.recipe.learn_temperature:  # the network's gradients are averaged already, see `averaging`
            processes.average([self.loss.temperature.grad], 1 / ranks())
        sums = self.checked_terms(batches)
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
        """The terms of one batch. Accumulates their gradients, which are averaged after the last batch of a step."""
        recipe = self.recipe
        with processes.telling():
            windows, generator = self.taken(part)
            windows = windows.to(self.device)
        share_findings(self.videos)
        augment = AUGMENTS[recipe.augment](recipe.side, generator, share=(self.share, recipe.batch))
        with self.views.no_sync() if part + 1 < recipe.accumulate and ranks() > 1 else nullcontext():
            with reduced_precision(torch.device(self.device).type, recipe.amp):
                g, s, x = self.views(windows, self.plan, augment, self.local)
            terms = self.objective(g.float(), s.float(), x.float())
            self.scaler.scale(terms.total / recipe.accumulate).backward()
        return {name: term.detach() for name, term in terms._asdict().items()}

    def checked_terms(self, batches):
        """The terms of a step, averaged over its batches. Raises FloatingPointError if the step must not be taken.

        They are copied to the host once in a step, together with the norm of the gradient. They should be the same in
        every process; to be safe, all use those of the first process, and check those of all processes.
        """
        norm = nn.utils.get_total_norm([each.grad for each in self.parameters if each.grad is not None])
        own = torch.stack([norm, *(term for terms in batches for term in terms.values())]).tolist()
        found = processes.exchange(own)
        terms = [each[1:] for each in found]
        size, accumulate = len(batches[0]), self.recipe.accumulate
        for part in range(accumulate):
            if bad := [each[part * size] for each in terms if not math.isfinite(each[part * size])]:
                self.refuse_step(f"the loss is {bad[0]}", [part])
        if not all(math.isfinite(norm) for norm, *_ in found) and not self.scaler_skips():
            self.refuse_step(self.worst_gradient(), range(accumulate))
        return {name: sum(terms[0][at::size]) / accumulate for at, name in enumerate(batches[0])}

    def refuse_step(self, reason, parts):
        names = ", ".join(self.videos.names[i] for part in parts for i in self.whole_batch(self.done, part))
        raise FloatingPointError(f"step {self.done}: {reason}; its batch: {names}")

    def scaler_skips(self):
        """Whether the loss scaler leaves out a step with a gradient that is not finite, as a smaller scale may help."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= LEAST_SCALE

    def worst_gradient(self):
        """Describes a gradient that is not finite."""
        for name, each in [*self.embedder.named_parameters(), *self.loss.named_parameters()]:
            if each.grad is not None and (bad := not_finite(each.grad)):
                return f"the gradient of {name} has a value of {bad}"
        return "the norm of the gradient is too large for its number format"

    def check_finite(self):
        """Raises FloatingPointError if a weight or statistic is not finite, before it replaces a good checkpoint."""
        for part in filter(None, (self.embedder, self.loss, self.queue)):
            for name, value in part.state_dict().items():
                if bad := not_finite(value):
                    raise FloatingPointError(f"step {self.done}: {name} has a value of {bad}; no checkpoint is written")

    def objective(self, g, s, x):
        """The terms of a batch. With a queue, earlier global clips are further negatives of ic_global."""
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
        """The result of `read` for a batch of this step, which was read ahead if there are readers."""
        if not self.ahead:
            return self.read(self.done, part)
        following = divmod(self.done * self.recipe.accumulate + part + 1, self.recipe.accumulate)
        return self.ahead.take(self.read, (self.done, part), following if following[0] < self.steps else None)

    def read(self, step, part, threads=None):
        """The windows of this process's share of a batch, and the random generator for the batch's augmentations."""
        generator = drawn(self.recipe.seed, "step", step, part, 0)
        chosen = self.whole_batch(step, part)
        return random_windows(self.videos, chosen, self.plan, generator, threads, self.share), generator

    def batch(self, step, part):
        """The videos of this process's share of a batch."""
        return self.whole_batch(step, part)[self.share.start : self.share.stop]

    def whole_batch(self, step, part):
        """The videos of a batch: a part of the epoch's random order. An incomplete last batch is left out."""
        recipe = self.recipe
        epoch, within = divmod(step, self.epoch_steps)
        order = torch.randperm(len(self.videos), generator=drawn(recipe.seed, "epoch", epoch))
        start = (within * recipe.accumulate + part) * recipe.batch
        return order[start : start + recipe.batch].tolist()

    @property
    def share(self):
        """The positions in a batch of the videos of this process."""
        return shares(self.recipe.batch)[rank()]

    def factor(self):
        """The factor of the learning rate at this step."""
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
        """Loads a checkpoint's state and keeps the current settings. Raises ValueError, naming what does not fit it."""
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
            group.update(given)  # load_state_dict has replaced settings, such as the weight decay
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        vars(self.plateau).update(state["plateau"])
        before, now = flat(settings), flat(self.settings)
        if any(before.get(name, now[name]) != now[name] for name in OBJECTIVE):
            self.plateau.restart()

    def refuse(self, settings, state):
        """Raises ValueError, naming every setting that differs from the checkpoint's although it must not change."""
        before, now = EARLIER | flat(settings), flat(self.settings)
        fixed = FIXED + ("recipe.temperature",) * self.recipe.learn_temperature
        names = [name for name in before.keys() & now.keys() if before[name] != now[name] and name.startswith(fixed)]
        found = [f"{name}: found {now[name]!r}, wanted {before[name]!r}" for name in sorted(names)]
        if not found and state.get("videos", listing_digest(self.videos)) != listing_digest(self.videos):
            found = [f"data: found {len(self.videos)} videos that are not those of the checkpoint, or not in its order"]
        if not found and state["done"] > self.steps:
            found = [f"recipe.steps: found {self.steps}, wanted at least the {state['done']} that are done"]
        if found:
            raise ValueError("; ".join(found) + ", to resume from the checkpoint; any other value needs a new run")


@dataclass
class Plateau:
    """Divides the learning rate by 10 when the mean loss of an epoch has had no new minimum for `patience` epochs."""

    patience: int = 9
    factor: float = 1.0
    best: float = math.inf
    stale: int = 0
    losses: list = field(default_factory=list)

    def add(self, loss):
        self.losses.append(loss)

    def restart(self):
        """Forgets earlier losses, since those of another objective cannot be compared with them."""
        self.best, self.stale, self.losses = math.inf, 0, []

    def end_epoch(self, counts):
        """counts: False during the warm-up, whose epochs update the minimum but do not count as stale."""
        mean, self.losses = sum(self.losses) / len(self.losses), []
        self.stale = 0 if mean < self.best or not counts else self.stale + 1
        self.best = min(self.best, mean)
        if self.stale == self.patience:
            self.factor, self.stale = self.factor / 10, 0


class Ahead:
    """Reads the next batch in threads during a step."""

    def __init__(self, readers):
        self.one, self.readers, self.coming = ThreadPoolExecutor(1), ThreadPoolExecutor(readers), {}

    def take(self, read, this, following):
        """Returns read(*this, threads), which the previous call has started, and starts read(*following, threads)."""
        found = self.coming.pop(this, None) or self.one.submit(read, *this, self.readers)
        if following:
            self.coming[following] = self.one.submit(read, *following, self.readers)
        return found.result()


def check(recipe, plan, device):
    """Raises ValueError, naming a wrong setting, or RuntimeError if the backend cannot run on the device.

    It is called before a run's folder is touched.
    """
    for name, least in LEAST.items():
        if not getattr(recipe, name) >= least:  # also true for NaN
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
    """The weight of each term, with the defaults of the recipe's form."""
    return FORMS.get(recipe.form, {}) | (recipe.weights or {})


@contextmanager
def reduced_precision(device, amp):
    """Autocast to the dtype of `amp`, a key of AMP or "off". On CPUs, bfloat16 leaves convolutions in float32."""
    with torch.autocast(device, AMP.get(amp), enabled=amp != "off"):
        with Float32Convolutions() if (device, amp) == ("cpu", "bf16") else nullcontext():
            yield


class Float32Convolutions(TorchFunctionMode):
    """Computes convolutions in float32 under autocast.

    On CPUs with instructions for bfloat16, the gradient that oneDNN computes for a 3D convolution of two frames has
    numbers from memory that was never written (PyTorch 2.13, AMD EPYC with AVX-512).
    """

    def __torch_function__(self, function, types, arguments=(), settings=None):
        if function not in (F.conv2d, F.conv3d):
            return function(*arguments, **settings or {})
        rows, *others = arguments
        with torch.autocast("cpu", enabled=False):
            return function(rows.float(), *others, **settings or {})


def not_finite(tensor):
    """A value of a tensor that is not finite, as text; "" if there is none."""
    bad = tensor[~tensor.isfinite()]
    return str(bad[0].item()) if len(bad) else ""


def flat(settings):
    """{"recipe.lr": 1e-3, ...} of {"recipe": {"lr": 1e-3, ...}, ...}"""
    return {f"{part}.{name}": value for part, values in settings.items() for name, value in values.items()}


def listing_digest(videos):
    """A hash of the videos, their labels and their order, on which the batches of all steps depend."""
    listed = [dataclasses.astuple(entry) for entry in getattr(videos, "entries", [])] or list(videos.names)
    return hashlib.sha256(repr((listed, videos.classes)).encode()).hexdigest()


def length(recipe, videos):
    """The number of steps of an epoch, and of the whole pretraining."""
    epoch = len(videos) // (recipe.batch * recipe.accumulate)
    if epoch == 0:
        found = f"{recipe.batch} videos" + f" x accumulate {recipe.accumulate}" * (recipe.accumulate > 1)
        raise ValueError(f"recipe.batch: found {found} per step, wanted at most {len(videos)}, all videos of this part")
    return epoch, recipe.steps or recipe.epochs * epoch


def drawn(seed, *what):
    """A generator of random numbers that depend on the arguments only."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def embed(embedder, windows, plan, augment, *, local=True):
    """Two views of each video: g: [2, B, D] global clips; s: [2, B, T, D] their slices; x: [2, B, T, D] local clips.

    windows: uint8, a result of `random_windows`: [B, window, 3, H, W], where two augmentations of a window are the two
    views, or [2 B, ...] with a window for each view if plan.windows is "independent". If `local` is False, s and x are
    placeholders for losses that do not use them.
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
    """The positions in a batch of each process's videos: consecutive ranges in the order of ranks."""
    ends = [number * batch // ranks() for number in range(ranks() + 1)]
    return [range(first, last) for first, last in zip(ends, ends[1:], strict=False)]


class Views(nn.Module):
    """`embed` as a module, which DistributedDataParallel requires."""

    def __init__(self, embedder, embed):
        super().__init__()
        self.embedder, self.embed = embedder, embed
        # PyTorch warns if find_unused_parameters, which `averaging` sets, finds none.
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, windows, plan, augment, local):
        return self.embed(self.embedder, windows, plan, augment, local=local)


def averaging(module, device):
    """The module, with gradients that are averaged over the processes in the backward.

    All processes start with the weights of the first one. find_unused_parameters is needed for networks that leave some
    parameters unused. Also, PyTorch then does not regroup the gradients after the first step. The order of summation in
    an all-reduce depends on the groups, so a resumed run would otherwise get other bits than an uninterrupted one.
    """
    if ranks() == 1:
        return module
    ids = None
    if (device := torch.device(device)).type == "cuda":
        ids = [torch.cuda.current_device() if device.index is None else device.index]
    module = DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)
    module.broadcast_buffers = False  # each step averages them; the argument's name depends on the PyTorch version
    return module


def synchronised(embedder, device):
    """The network, on GPUs with batch normalisation over all processes, which PyTorch does not have for CPUs."""
    if ranks() > 1 and torch.device(device).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(embedder)
    return embedder


def where(device):
    """What the results of a run depend on in addition to its settings: {name: value} for config.yaml."""
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
