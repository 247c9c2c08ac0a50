"""The trainer on several processes gives the run of a single one, and all of them make the same decisions."""

import csv
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

for needed in "av", "jsonargparse", "safetensors", "tensorboard":
    pytest.importorskip(needed, reason=f"the trainer needs {needed}: pip install .[train]")

from tclr import annotations, checkpoint, cli, config, evaluate, models, motions, processes, train  # noqa: E402
from tclr import features as features_of  # noqa: E402
from tclr import videos as videos_of  # noqa: E402
from tclr.clips import ClipPlan  # noqa: E402
from tclr.videos import Loaded  # noqa: E402

from .crowd import Crowd, wait_for  # noqa: E402
from .test_trainer import steps_of  # noqa: E402

FULL = pytest.mark.full
PLAN = ClipPlan(4, 2)
RECIPE = dict(batch=7, side=8, steps=20, learn_temperature=True, form="release")


@pytest.fixture(scope="module")
def videos():
    frames = torch.randint(256, (14, 12, 3, 10, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Loaded([f"v{i}" for i in range(14)], list(frames), torch.arange(14) % 2)


class WholeBatchNorm(nn.Module):
    """Batch normalisation over all processes. It stands in for SyncBatchNorm, which does not run on the CPU."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.running_mean, self.running_var = (
            nn.Parameter(norm.weight.detach()), nn.Parameter(norm.bias.detach()), norm.running_mean, norm.running_var
        )  # fmt: skip
        self.num_features = norm.num_features

    def forward(self, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        others = [d for d in range(x.dim()) if d != 1]
        count = x.new_tensor([x.numel() / x.shape[1]], dtype=torch.float64)
        sums = torch.cat([count, x.double().sum(others), x.double().square().sum(others)])
        if processes.ranks() > 1:
            sums = Sum.apply(sums)
        mean, square = (sums[1:] / sums[0]).chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), 0.1)
            self.running_var.lerp_(var.float(), 0.1)
        x = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return (x.float() * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype).float()


class Sum(torch.autograd.Function):
    """The sum over the processes. Its gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx, x):
        return reduced(x)

    @staticmethod
    def backward(ctx, g):
        return reduced(g)


def reduced(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


def replaced(module, kind):
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, kind(child))
        else:
            replaced(child, kind)
    return module


def group_norm(norm):
    """Normalisation of each clip alone. In the projector, nothing is normalised."""
    if isinstance(norm, nn.BatchNorm1d):
        same = nn.Identity()
        same.num_features = norm.num_features
        return same
    return nn.GroupNorm(1, norm.num_features)


NORMS = {"batch": lambda norm: norm, "group": group_norm, "whole batch": WholeBatchNorm}


def embedder(norm="group"):
    """A small network. Its biases do not start at 0, since then their relative errors would be large."""
    torch.manual_seed(0)
    net = replaced(train.Embedder(models.TinyResNet3d(2), 8), NORMS[norm])
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return net


def trained(videos, norm="group", file=None, watch=lambda run: None, plan=PLAN, **recipe):
    """A network's state after a pretraining, and the recorded terms. watch(run) is called after every step."""
    net, rows = embedder(norm), []
    run = train.Run(net, videos, plan, train.Recipe(**RECIPE | recipe), "cpu")
    if file and (state := checkpoint.newest(file)):
        run.restore(state)

    def record(**terms):
        rows.append(terms | dict(lr=run.optimizer.param_groups[0]["lr"]))
        watch(run)

    train.carry_on(run, record, file=file)
    return {name: value.clone() for name, value in net.state_dict().items()}, rows


def farthest(found, wanted):
    """The largest relative error (of norms) of the tensors in a state dict."""
    assert found.keys() == wanted.keys()
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm().clamp(1e-30)).item() for name in wanted)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The same run


CASES = [
    (norm, P, schedule, accumulate, dict(batch=batch, **more))
    for norm, P, schedule, accumulate, (batch, more) in itertools.product(
        ("group", "whole batch"), (2, 3), ("plateau", "cosine"), (1, 2),
        [(7, {}), (5, dict(augment="release", queue=9)), (6, dict(form="paper", weights=train.IC_ONLY))],
    )
]  # fmt: skip


def one_run(videos, monkeypatch, norm, accumulate, schedule, recipe):
    """A function that calls trained() with these settings. The plateau's patience is a single epoch."""
    monkeypatch.setattr(train, "Plateau", partial(train.Plateau, patience=1))
    recipe = dict(accumulate=accumulate, schedule=schedule) | recipe
    return lambda: trained(videos, norm, **recipe)


@pytest.mark.rotating(24)
@pytest.mark.parametrize("norm, P, schedule, accumulate, recipe", CASES)
def test_twenty_steps_give_the_weights_of_one_process(
    videos, tmp_path, monkeypatch, norm, P, schedule, accumulate, recipe
):
    run = one_run(videos, monkeypatch, norm, accumulate, schedule, recipe)
    wanted, rows = run()
    if (schedule, recipe["batch"], accumulate) == ("plateau", 7, 1):
        assert rows[-1]["lr"] < max(row["lr"] for row in rows)  # otherwise the schedule decided nothing
    for net, found in Crowd(P, run, tmp_path).results():
        assert farthest(net, wanted) <= 1e-5
        for row, one in zip(found, rows, strict=True):
            assert row["lr"] == one["lr"] and row["total"] == pytest.approx(one["total"], rel=1e-4)


@pytest.mark.parametrize("before, after", [(2, 3), *(pytest.param(*case, marks=FULL) for case in ((2, 1), (1, 2)))])
def test_a_run_goes_on_with_another_number_of_processes(videos, tmp_path, before, after):
    file, recipe = tmp_path / "last.pt", dict(batch=5, queue=9, accumulate=2, schedule="plateau")
    wanted, rows = trained(videos, **recipe)
    Crowd(before, lambda: trained(videos, file=file, steps=8, **recipe) and None, tmp_path).results()
    assert steps_of(file) == 8
    for net, found in Crowd(after, lambda: trained(videos, file=file, **recipe), tmp_path).results():
        assert farthest(net, wanted) <= 1e-5 and len(found) == 12
        assert [row["lr"] for row in found] == [row["lr"] for row in rows[8:]]


def state_of(run):
    """Notes what must have the same bits in all processes."""
    run.seen.append([value.clone() for part in (run.embedder, run.loss) for value in part.state_dict().values()])
    run.seen[-1] += [run.optimizer.param_groups[0]["lr"], run.scaler.get_scale()]


def precise(videos, amp, norm):
    """The states after each step. With fp16, process 1 has an infinite gradient in step 20 and in step 30."""
    seen, limits = [], []

    def watch(run):
        run.seen = seen
        state_of(run)
        if not limits and amp == "fp16" and processes.rank() == 1:
            for step, parameter in (20, next(run.embedder.parameters())), (30, run.loss.temperature):
                parameter.register_hook(lambda g, step=step: g * (math.inf if run.done == step else 1))
                limits.append(parameter)

    trained(videos, norm, watch=watch, steps=50, amp=amp, batch=5, schedule="plateau", queue=9)
    return seen


@pytest.mark.parametrize("P", [2, pytest.param(3, marks=FULL)])
@pytest.mark.parametrize("amp", ["fp16", pytest.param("bf16", marks=FULL), "off"])
def test_processes_keep_the_same_bits_in_every_precision(videos, tmp_path, amp, P):
    first, *others = Crowd(P, partial(precise, videos, amp, "batch"), tmp_path).results()
    assert len(first) == 50
    for seen in others:
        for mine, theirs in zip(first, seen, strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.as_tensor(value).isfinite().all() for state in first for value in state)
    scales = [state[-1] for state in first]
    if amp == "fp16":  # the initial scale is far too large, so early steps also halve it
        assert [step for step in range(15, 50) if scales[step] == scales[step - 1] / 2] == [20, 30]


# The same decisions


@pytest.mark.parametrize("augment", ["demo", "release"])
@pytest.mark.parametrize("plan", [PLAN, ClipPlan(4, 2, "independent"), ClipPlan(4, 2, "independent", 1.0)])
@pytest.mark.parametrize("P", [2, 3, 7])
def test_the_shares_of_the_processes_form_the_batch_of_one_process(videos, monkeypatch, augment, plan, P):
    """Videos, windows and augmentations have the same bits. No process opens videos of another."""
    recipe = train.Recipe(batch=7, side=8, weights=train.IC_ONLY, augment=augment)
    run, reads, opened = train.Run(embedder(), videos, plan, recipe, "cpu"), [], []
    monkeypatch.setattr(Loaded, "read", lambda videos, i, at, read=Loaded.read: reads.append(i) or read(videos, i, at))
    monkeypatch.setattr(Loaded, "length", lambda videos, i: opened.append(i) or 12 - i % 3)
    one = augmented(run, augment)
    monkeypatch.setattr(train, "ranks", lambda: P)
    parts, chosen = [], []
    for r in range(P):
        monkeypatch.setattr(train, "rank", lambda r=r: r)
        reads.clear()
        opened.clear()
        parts.append(augmented(run, augment))
        assert reads == opened == run.batch(1, 0) and len(reads) in (7 // P, 7 // P + 1)
        chosen += reads
    assert chosen == run.whole_batch(1, 0)
    for whole, *some in zip(one, *parts, strict=True):  # the windows, then the views of global and of local clips
        views = plan.windows_drawn if whole is one[0] else 2
        assert torch.equal(torch.cat([part.unflatten(0, (views, -1)) for part in some], 1).flatten(0, 1), whole)


def augmented(run, augment):
    windows, generator = run.read(1, 0)
    augment = train.AUGMENTS[augment](8, generator, share=(run.share, run.recipe.batch))
    return windows, *(augment(clips, views=2 // run.plan.windows_drawn) for clips in run.plan.cut(windows))


@pytest.mark.parametrize("what, victim", [
    ("SIGTERM", 2), ("SIGINT", 1), *(pytest.param(*case, marks=FULL) for case in (("SIGTERM", 0), ("SIGHUP", 1))),
])  # fmt: skip
def test_a_signal_to_one_process_saves_once_and_ends_all(videos, tmp_path, what, victim):
    file, saves = tmp_path / "last.pt", tmp_path / "saves"

    def slow():
        save = checkpoint.save
        checkpoint.save = lambda path, **state: (note(saves, processes.rank(), state["done"]), save(path, **state))
        trained(videos, file=file, watch=lambda run: time.sleep(0.05), steps=100, checkpoint_every=4)

    crowd = Crowd(3, slow, tmp_path)
    wait_for(lambda: steps_of(file) >= 4)
    os.kill(crowd.children[victim].pid, getattr(signal, what))
    assert crowd.ended(60) == [128 + getattr(signal, what)] * 3
    written = [line.split() for line in saves.read_text().splitlines()]
    done = [int(steps) for _, steps in written]
    assert {rank for rank, _ in written} == {"0"} and done == sorted(set(done)) and done[-1] == steps_of(file) < 100
    steps = steps_of(file) + 5
    resumed, whole = (
        Crowd(3, lambda file=file: trained(videos, file=file, steps=steps)[0], tmp_path).results()
        for file in (file, None)
    )  # an epoch has two steps
    assert all(same(net, whole[0]) for net in resumed + whole)


def test_processes_save_and_end_when_their_agent_is_killed(videos, tmp_path, monkeypatch):
    file = tmp_path / "last.pt"

    @processes.group()
    def slow():
        trained(videos, file=file, watch=lambda run: time.sleep(0.05), steps=1000, checkpoint_every=4)

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    agent = multiprocessing.get_context("fork").Process(target=lambda: Crowd(2, slow, tmp_path).ended())
    agent.start()
    wait_for(lambda: steps_of(file) >= 4)
    agent.kill()
    agent.join()
    wait_for(lambda: len(list(tmp_path.glob("crowd-*/?.txt"))) == 2, 60)
    assert all("SystemExit: 143" in end.read_text() for end in tmp_path.glob("crowd-*/?.txt"))


def note(path, *words):
    with path.open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def once(owner, name, fault):
    """After three steps, makes owner.name() return fault(its result)."""
    function = getattr(owner, name)

    def faulty(*arguments, **more):
        result = function(*arguments, **more)
        return fault(result) if steps[0] == 3 else result

    setattr(owner, name, faulty)


def fail(error):
    def fault(result):
        raise error

    return fault


def no_number(terms):
    return terms._replace(total=terms.total * math.nan)


steps = [0]  # the number of steps that are done
spoilt = []  # the numbers of parameters whose gradient is NaN
FAULTS = {  # fault in the fourth step -> (its process, a function that plants it, the error)
    "reading": (1, lambda: once(Loaded, "read", fail(OSError("no disk"))), "OSError: no disk"),
    "forward": (2, lambda: once(train, "embed", fail(MemoryError("full"))), "MemoryError: full"),
    "saving": (0, lambda: once(checkpoint, "save", fail(OSError("full"))), "OSError: full"),
    "recording": (0, lambda: steps.append("record"), "OSError: no record"),
    "loss": (1, lambda: once(train.Run, "objective", no_number), "step 3: the loss is nan"),
    "gradient": (1, lambda: spoilt.append(0), "step 3: the gradient of backbone.stem.0.weight has a value of nan"),
    "temperature": (1, lambda: spoilt.append(-1), "step 3: the gradient of temperature has a value of nan"),
}


def faulty(videos, file, fault):
    """Trains with a fault in step 3 of one process. The checkpoint is written after every step."""
    number, plant, _ = FAULTS[fault]
    if processes.rank() == number:
        plant()

    def watch(run):
        steps[0] = run.done
        if "record" in steps and run.done == 3:
            raise OSError("no record")
        if run.done == 3:
            for number in spoilt:
                run.parameters[number].register_hook(lambda g: g * math.nan)

    trained(videos, file=file, watch=watch, steps=6, checkpoint_every=1)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_in_one_process_ends_all(videos, tmp_path, fault):
    file, (number, _, message) = tmp_path / "last.pt", FAULTS[fault]
    crowd = Crowd(3, lambda: faulty(videos, file, fault), tmp_path)
    assert crowd.ended(60) == [1] * 3
    said = crowd.messages()
    assert message in said[number]
    if fault in ("loss", "gradient", "temperature"):
        assert len({text.splitlines()[-1] for text in said}) == 1 and said[0].count("v") >= 7
    elif fault != "forward":  # then the others get an error from gloo
        name = message.split(":")[0]
        wanted = f"Elsewhere: process {number} of 3 ended with {name}: see its own message"
        assert all(wanted in text for rank, text in enumerate(said) if rank != number), said
    assert steps_of(file) == (2 if fault == "recording" else 3)


def test_processes_with_different_settings_or_videos_are_refused(videos, tmp_path):
    fewer = Loaded(videos.names[:9], videos.frames[:9], videos.labels[:9])
    cases = {
        "recipe.lr: found 0.001 in process 0 and 0.002 in process 1, wanted the same in all 2": (videos, 1e-3, 2e-3),
        "videos: found '14, ": (videos, 1e-3, 1e-3),
    }
    for message, (given, *rates) in cases.items():

        def start(given=given, rates=rates):
            rank = processes.rank()
            trained(fewer if rank and rates[0] == rates[1] else given, lr=rates[rank])

        crowd = Crowd(2, start, tmp_path)
        assert crowd.ended() == [1, 1] and all(f"ValueError: {message}" in text for text in crowd.messages())


def test_processes_with_different_surroundings_are_refused(videos, dataset, tmp_path):
    """Each case changes something in process 1 only."""
    pretrained(1, tmp_path, *options(dataset, tmp_path / "evaluated", 1))

    def version():
        if processes.rank():
            torch.__version__ = "other"
        cli.main(["retrieval", f"--run={tmp_path / 'evaluated'}", *EVALUATION])

    def files():
        if processes.rank():
            features_of.files = lambda videos: [[each.path, 0] for each in videos.entries]
        cli.main(["retrieval", f"--run={tmp_path / 'evaluated'}", *EVALUATION])

    def one_file():
        file = None if processes.rank() else tmp_path / "last.pt"
        train.pretrain(embedder(), videos, PLAN, train.Recipe(**RECIPE), lambda **terms: None, file=file)

    def variable():
        if processes.rank():
            os.environ["TCLR_KERNELS_ISA"] = "portable"
        trained(videos)

    def kernels():
        if processes.rank():
            train.backends.choose = lambda *arguments: "other"
        trained(videos)

    def decoder():
        if processes.rank():
            videos_of.Files.__init__.__kwdefaults__["decoder"] = "other"
        cli.main(options(dataset, tmp_path / "run", 2))

    cases = {
        version: f"torch: found '{torch.__version__}' in process 0 and 'other' in process 1",
        files: "sizes of the video files: found ",
        one_file: "a checkpoint file: found True in process 0 and False in process 1",
        variable: "TCLR_KERNELS_ISA: found None in process 0 and 'portable' in process 1",
        kernels: "backend: found 'native' in process 0 and 'other' in process 1",
        decoder: f"decoder: found '{videos_of.decode.DECODER}' in process 0 and 'other' in process 1",
    }
    for start, message in cases.items():
        crowd = Crowd(2, start, tmp_path)
        assert crowd.ended(20) == [1, 1]
        assert all(f"ValueError: {message}" in text for text in crowd.messages())
        assert all("in process 1, wanted the same in all 2" in text for text in crowd.messages())


def address(monkeypatch, **more):
    """Sets the variables of a job whose processes find each other by an address. Returns the port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), **more).items():
        monkeypatch.setenv(name, value)
    return port


def test_groups_one_after_another_in_the_same_processes(tmp_path, monkeypatch):
    """A thread that wants Python's global lock gets it only if the thread that has it sleeps."""

    def thrice():
        sys.setswitchinterval(1000)
        found = []
        for _ in range(3):
            with processes.group(30):
                module = train.averaging(nn.Linear(1, 1), "cpu")
                found.append(processes.exchange(int(os.environ["RANK"])))
            del module  # and with it the group
        return found

    address(monkeypatch)
    assert Crowd(2, thrice, tmp_path, together=False).results(60) == [[[0, 1]] * 3] * 2


def test_a_lost_process_is_reported_in_plain_words(tmp_path, monkeypatch):
    def lose():
        with processes.group(30):
            if processes.rank() == 1:
                os._exit(3)
            processes.exchange(None)

    address(monkeypatch)
    crowd = Crowd(2, lose, tmp_path, together=False)
    assert crowd.ended(60) == [1, 3]
    wanted = "Elsewhere: another process ended, or did not answer within the timeout of 30 s: see its own message"
    assert wanted in crowd.messages()[0]


def test_a_program_may_pretrain_twice_in_a_folder_and_be_restarted(dataset, tmp_path, monkeypatch):
    """The first run has 1 step, the second one 2. The program is restarted within the second one, or after its end."""
    store = dist.HashStore()
    monkeypatch.setattr(processes, "agents_store", lambda timeout=None: store)
    out = tmp_path / "run"

    def program(stop=None):
        monkeypatch.setattr(processes.Job, "runs", itertools.count())
        for steps in 1, 2:
            with monkeypatch.context() as within:
                if steps == stop:
                    within.setattr(train.Run, "step", lambda run: signal.raise_signal(signal.SIGTERM) or {})
                cli.main(options(dataset, out, steps, "--overwrite=true", f"--net.dim={8 * steps}"))

    with pytest.raises(SystemExit):
        program(stop=2)
    for _ in range(2):
        program()
        assert steps_of(out / "last.pt") == 2
        assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()] == [0, 1]


def test_two_jobs_do_not_write_to_one_folder(dataset, tmp_path):
    out = tmp_path / "run"
    pretrained(1, tmp_path, *options(dataset, out, 1))
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with checkpoint.alone(out):
        for given in "--resume=true", "--overwrite=true":
            crowd = Crowd(2, lambda given=given: cli.main(options(dataset, out, 2, given)), tmp_path)
            assert crowd.ended(30) == [1, 1]
            assert f"SystemExit: {out}: another process pretrains in this folder now" in crowd.messages()[0]
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    pretrained(1, tmp_path, *options(dataset, out, 2, "--resume=true"))


def test_an_error_while_files_are_closed_ends_all(dataset, tmp_path):
    def start():
        if processes.rank() == 0:
            cli.Log.__exit__ = lambda *_: fail(OSError("no space"))(None)
        cli.main(options(dataset, tmp_path / "run", 1))

    crowd = Crowd(2, start, tmp_path)
    assert crowd.ended(30) == [1, 1] and "OSError: no space" in crowd.messages()[0]
    assert "Elsewhere: process 0 of 2 ended with OSError: see its own message" in crowd.messages()[1]


def test_commands_with_different_arguments_are_refused(dataset, tmp_path):
    out = tmp_path / "run"
    pretrained(1, tmp_path, *options(dataset, out, 2))
    before = (out / "last.pt").read_bytes()
    cases = {
        "overwrite: found True in process 0 and False in process 1": [
            options(dataset, out, 2, given) for given in ("--overwrite=true", "--resume=true")
        ],
        "evaluation.clips: found 2 in process 0 and 3 in process 1": [
            ["retrieval", f"--run={out}", *EVALUATION, f"--evaluation.clips={clips}"] for clips in (2, 3)
        ],
    }
    for message, given in cases.items():
        crowd = Crowd(2, lambda given=given: cli.main(given[processes.rank()]), tmp_path)
        assert crowd.ended(30) == [1, 1]
        assert all(f"ValueError: {message}, wanted the same in all 2" in text for text in crowd.messages())
    assert (out / "last.pt").read_bytes() == before and not (out / "retrieval.json").exists()


def test_a_batch_smaller_than_the_number_of_processes_is_refused(videos, tmp_path):
    crowd = Crowd(3, lambda: trained(videos, batch=2), tmp_path)
    assert crowd.ended() == [1] * 3
    wanted = "ValueError: recipe.batch: found 2 videos for 3 processes, wanted one each at least"
    assert all(wanted in text for text in crowd.messages())


def test_the_newest_checkpoint_on_any_disk_is_taken(tmp_path):
    """Each process has its own disk."""
    for rank, done in ((1, 4), (2, 9)):
        (tmp_path / f"disk{rank}").mkdir()
        checkpoint.save(tmp_path / f"disk{rank}" / "last.pt", done=done, weights=torch.full((3,), rank))

    def found():
        disk = tmp_path / f"disk{processes.rank()}"
        return checkpoint.newest(disk / "last.pt"), checkpoint.newest(disk / "other.pt")

    for state, other in Crowd(4, found, tmp_path).results():
        assert state["done"] == 9 and state["weights"].tolist() == [2, 2, 2] and other is None


@pytest.mark.parametrize("P", [3, pytest.param(2, marks=FULL)])
def test_features_have_the_bits_of_one_process(videos, tmp_path, P):
    net = embedder("batch").eval()
    many = Loaded([f"v{i}" for i in range(49)], [videos.frames[i % 14].roll(i, 0) for i in range(49)], None)

    def features(count):
        some = Loaded(many.names[:count], many.frames[:count], None)
        describe = evaluate.backbone_features(net.backbone)
        return evaluate.clip_features(describe, some, clips=2, frames=4, stride=2, side=8)

    one = features(49), features(5)
    for found in Crowd(P, lambda: (features(49), features(5)), tmp_path).results():
        assert torch.equal(found[0], one[0]) and torch.equal(found[1], one[1])


# Kills


def kill_and_go_on(videos, folder, P, kills, seed, longest):
    """Starts a run `kills` times, each continuing the previous one, and kills a random process by SIGKILL or SIGTERM.

    Returns the recipe, and for each kill the steps that were done, the signal and the process.
    """
    file, moments, seen = folder / "last.pt", random.Random(seed), []
    recipe = dict(steps=5000, checkpoint_every=3, batch=5, queue=9, schedule="plateau")
    for _ in range(kills):
        before = file.stat().st_mtime_ns if file.exists() else None
        crowd = Crowd(P, lambda: trained(videos, "batch", file=file, **recipe) and None, folder)
        wait_for(lambda before=before: file.exists() and file.stat().st_mtime_ns != before)
        time.sleep(moments.uniform(0, longest))
        what, victim = moments.choice([signal.SIGKILL, signal.SIGTERM]), moments.randrange(P)
        os.kill(crowd.children[victim].pid, what)
        codes = crowd.ended(60)
        wanted = [143] * P if what == signal.SIGTERM else [-9 if rank == victim else 1 for rank in range(P)]
        assert codes == wanted, (what, victim, codes, crowd.messages())
        seen.append((steps_of(file), what.name, victim))
    return recipe, seen


@pytest.mark.parametrize("P, kills", [(3, 3), pytest.param(2, 20, marks=FULL),
                                      pytest.param(3, 20, marks=FULL)])  # fmt: skip
def test_runs_with_random_kills_end_with_the_weights_of_an_uninterrupted_run(videos, tmp_path, P, kills):
    recipe, seen = kill_and_go_on(videos, tmp_path, P, kills, seed=P, longest=0.2)
    print(seen)
    done = [steps for steps, *_ in seen]
    assert done == sorted(set(done))
    recipe["steps"] = done[-1] + 4
    ends = [
        Crowd(P, lambda file=file: trained(videos, "batch", file=file, **recipe)[0], tmp_path).results()
        for file in (tmp_path / "last.pt", None)
    ]
    assert all(same(net, ends[0][0]) for net in itertools.chain(*ends))


# The program


BAD = "ZoomIn/v_ZoomIn_g02_c01.avi", "SpinLeft/v_SpinLeft_g03_c01.avi", "SlideUp/v_SlideUp_g02_c01.avi"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """20 videos to train on, of which 3 cannot be read, and 10 to test on."""
    root = tmp_path_factory.mktemp("data") / "ucf101"
    motions.write_dataset(root, groups=3, test_groups=1, takes=1, frames=34, side=40, seed=0)
    for name in BAD:
        (root / "UCF-101" / name).write_bytes(b"<html>Not found</html>")
    return root


def options(dataset, out, steps, *more):
    given = f"--config={Path(cli.__file__).parent}/configs/demo.yaml --out={out} --data.root={dataset} --net.width=2"
    recipe = dict(steps=steps, batch=7, side=16, checkpoint_every=2, schedule="plateau", readers=2, queue=9)
    return ["pretrain", *given.split(), *(f"--recipe.{name}={value}" for name, value in recipe.items()), *more]


def pretrained(P, folder, *more, limit=60):
    """The output of `tclr` in each of P processes, none of which may fail."""

    def start():
        sys.stdout = open(folder / f"said-{processes.rank()}.txt", "w")  # noqa: SIM115
        cli.main(list(more))
        sys.stdout.close()

    Crowd(P, start, folder).results(limit)
    return [(folder / f"said-{rank}.txt").read_text() for rank in range(P)]


DECAY = "--clips.windows=independent", "--clips.decay=1", "--recipe.weights={ic_global: 1, ll: 0, gl: 0}"


@pytest.mark.parametrize("more", [(), DECAY])
def test_bad_videos_are_replaced_and_counted_as_by_one_process(dataset, tmp_path, more):
    """Each process reads its own videos. Unreadable ones are listed once, and counted over all processes."""
    found = {}
    for P in 1, 3:
        first, *others = pretrained(P, tmp_path, *options(dataset, tmp_path / f"run{P}", 6), *more)
        assert not any(others)
        with open(tmp_path / f"run{P}/bad_videos.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len({row["video"] for row in rows}) == len(rows)
        found[P] = {row["video"]: row["reason"] for row in rows}, first.splitlines()[-1]
    assert len(found[1][0]) == 3 and found[1] == found[3]
    assert found[1][1].startswith("reading: 3 unreadable, 8 replaced, 42 decoded; bad_videos.csv lists")
    settings = (tmp_path / "run3/config.yaml").read_text()
    assert "\nprocesses: 3\nbatch_statistics: of each process's share of a batch\n" in settings
    assert "processes" not in (tmp_path / "run1/config.yaml").read_text()


@contextmanager
def no_space():
    """No file may become longer than 40 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("full", ["first", "written before"])
def test_a_list_of_bad_videos_that_cannot_be_written_ends_all(dataset, tmp_path, full):
    """Another process found the unreadable video. An existing list stays complete, and is extended later."""
    path = tmp_path / "bad_videos.csv"
    if full == "written before":
        path.write_text("video,reason\r\nearlier,why\r\n")
    before = path.read_text() if path.exists() else None
    listing = annotations.read("ucf101", dataset, "train", 1)

    def meet(full):
        found = videos_of.Files(listing, bad_videos=path if processes.rank() == 0 else None)
        if processes.rank() == 1:
            found.length(found.names.index(f"UCF-101/{BAD[0]}"))
        with no_space() if full and processes.rank() == 0 else nullcontext():
            videos_of.share_findings(found)
        dist.barrier()

    crowd = Crowd(3, lambda: meet(True), tmp_path)
    assert crowd.ended() == [1, 1, 1] and "OSError: [Errno 27]" in crowd.messages()[0]
    wanted = "Elsewhere: process 0 of 3 ended with OSError: see its own message"
    assert all(wanted in text for text in crowd.messages()[1:])
    assert (path.read_text() if path.exists() else None) == before
    Crowd(3, lambda: meet(False), tmp_path).results()
    with path.open(newline="") as file:
        listed = [row["video"] for row in csv.DictReader(file)]
    assert listed == ["earlier"] * bool(before) + [f"UCF-101/{BAD[0]}"]


EVALUATION = [f"--evaluation.{what}" for what in ("clips=2", "frames=8", "stride=3", "side=32")]


@pytest.mark.parametrize("commands", [
    ["retrieval"], pytest.param(["retrieval", "linear", "multiclip", "confusion"], marks=FULL),
])  # fmt: skip
def test_evaluations_are_those_of_one_process(dataset, tmp_path, commands):
    run = tmp_path / "run"
    pretrained(2, tmp_path, *options(dataset, run, 2))
    figures, caches = {}, {}
    for P in 1, 3:
        for command in commands:
            pretrained(P, tmp_path, command, f"--run={run}", *EVALUATION)
            figures[P, command] = json.loads((run / f"{command}.json").read_text())
            assert figures[P, command] == figures[1, command]
        caches[P] = {path.name: path.read_bytes() for path in (run / "features").iterdir()}
        for path in (run / "features").iterdir():
            path.unlink()
    assert caches[1] == caches[3]
    lines = (run / "results.csv").read_text().splitlines()[1:]
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_restarted_processes_meet_despite_what_killed_ones_left(tmp_path, monkeypatch):
    """The store of torchrun's agents still has the offer of an earlier process 0, which the others answer first."""
    port = address(monkeypatch, TORCHELASTIC_USE_AGENT_STORE="True")

    def meet():
        rank = processes.rank()
        if rank == 0:
            server = dist.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
            server.set("tclr/old/received", "names of before")
            server.set("tclr/offer", "old")
            server.wait(["tclr/old/1", "tclr/old/2"])  # the others have answered the old offer
        part = processes.met(processes.agents_store(30), 30)
        part.set(str(rank), "here")
        found = [part.get(str(other)).decode() for other in range(3)]
        dist.barrier()
        return found

    assert Crowd(3, meet, tmp_path).results() == [["here"] * 3] * 3


def test_a_restart_resumes_even_if_overwriting_was_requested(dataset, tmp_path):
    """The processes have different counts of restarts, as on two machines."""
    for given in "--overwrite=true", "--resume=false":
        out = tmp_path / given
        pretrained(2, tmp_path, *options(dataset, out, 2, given))

        def restart(given=given, out=out):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(processes.rank())
            cli.main(options(dataset, out, 3, given))

        first = (out / "metrics.jsonl").read_text()
        Crowd(2, restart, tmp_path).results()
        assert (out / "metrics.jsonl").read_text().startswith(first)
        assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()] == [0, 1, 2]
        assert steps_of(out / "last.pt") == 3
    with pytest.raises(SystemExit, match="is not empty"):
        cli.main(options(dataset, out, 3))


def test_an_older_run_on_another_machines_disk_is_refused_or_overwritten(dataset, tmp_path):
    """Without --overwrite it is refused. With it, the new run starts from the beginning."""
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    disks[1].mkdir()
    (disks[1] / "last.pt").write_bytes(b"an older run's")
    crowd = Crowd(2, lambda: cli.main(options(dataset, disks[processes.rank()], 2)), tmp_path)
    assert crowd.ended() == [1, 1] and "disk1 is not empty" in crowd.messages()[1] and not disks[0].exists()
    more = "--overwrite=true", "--recipe.lr=0.01"
    Crowd(2, lambda: cli.main(options(dataset, disks[processes.rank()], 2, *more)), tmp_path).results()
    assert steps_of(disks[0] / "last.pt") == 2 and not list(disks[1].iterdir())


def torchrun(P, restarts, *arguments):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={P}"]
    program += [f"--max-restarts={restarts}", "--monitor-interval=0.1", "-m", "tclr.cli", *arguments]
    return subprocess.Popen(program, env=os.environ | dict(PYTHONPATH=str(Path(__file__).parents[1] / "python")))


def workers(agent):
    """{rank: process id} of the processes that an agent of torchrun has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "stat").read_text().rpartition(")")[2].split()[1] == str(agent.pid):
                variables = dict(each.split("=", 1) for each in (folder / "environ").read_text().split("\0") if each)
                found[int(variables["RANK"])] = int(folder.name)
        except (OSError, KeyError, ValueError):
            continue  # it has just ended, or does not belong to the run
    return found


@pytest.mark.full
@pytest.mark.parametrize("P, kills", [(2, 2), (3, 20)])
def test_torchrun_restarts_a_run_from_its_last_checkpoint(dataset, tmp_path, P, kills):
    """With --overwrite it overwrites an earlier run once, even if the first start is killed before it could do so."""
    out, moments, file = tmp_path / "run", random.Random(P), tmp_path / "run/last.pt"
    pretrained(1, tmp_path, *options(dataset, out, 2, "--recipe.lr=0.01"))
    steps, seen = 20 + 20 * kills, []
    agent = torchrun(P, kills + 1, *options(dataset, out, steps, "--overwrite=true"))
    try:
        wait_for(lambda: workers(agent), 120)
        os.kill(workers(agent).popitem()[1], signal.SIGKILL)
        for _ in range(kills):
            before = file.stat().st_mtime_ns
            wait_for(lambda before=before: file.exists() and file.stat().st_mtime_ns != before, 120)
            time.sleep(moments.uniform(0, 0.3))
            seen.append((moments.choice([signal.SIGKILL, signal.SIGTERM]), moments.randrange(P)))
            os.kill(workers(agent)[seen[-1][1]], seen[-1][0])
        assert agent.wait(300) == 0
    finally:
        agent.kill()
    print(seen)
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()] == list(range(steps))
    pretrained(P, tmp_path, *options(dataset, tmp_path / "whole", steps), limit=300)
    whole, interrupted = (checkpoint.load(path) for path in (tmp_path / "whole/last.pt", file))
    assert same(whole["embedder"], interrupted["embedder"]) and whole["plateau"] == interrupted["plateau"]


def test_commands_for_a_single_process_refuse_several(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("finetune", "classify", "report"):
        with pytest.raises(SystemExit, match=f"{command}: found 2 processes, wanted one: start it without torchrun"):
            cli.main([command, f"--run={tmp_path}"])


class Card:
    def __init__(self, uuid):
        self.uuid = uuid


@pytest.mark.parametrize("name, cards, wanted", [
    ("auto", [["a", "b"], ["a", "b"]], ["cuda:0", "cuda:1"]),
    ("cuda", [["a", "b"], ["a", "b"]], ["cuda:0", "cuda:1"]),
    ("cuda", [["a"], ["b"]], ["cuda:0", "cuda:0"]),  # each process sees only its own GPU, as under SLURM
    ("cuda", [["a"], ["a"]], "device: found processes 0 and 1 on one GPU"),
    ("cuda:0", [["a", "b"], ["a", "b"]], "device: found processes 0 and 1 on one GPU"),
    ("auto", [["a"], []], "device: found 'cuda' in process 0 and 'cpu' in process 1, wanted the same in all 2"),
    ("cpu", [["a"], ["a"]], ["cpu", "cpu"]),
])  # fmt: skip
def test_each_process_has_a_gpu_of_its_own(tmp_path, name, cards, wanted):
    def start():
        mine, chosen = cards[processes.rank()], []
        torch.cuda.is_available, torch.cuda.device_count = lambda: bool(mine), lambda: len(mine)
        torch.cuda.get_device_properties = lambda device: Card(mine[torch.device(device).index])
        torch.cuda.set_device = chosen.append
        device = config.device(name)
        assert chosen == ([device] if device != "cpu" else [])
        return device

    crowd = Crowd(2, start, tmp_path)
    if isinstance(wanted, list):
        assert crowd.results() == wanted
    else:
        assert crowd.ended() == [1, 1] and all(f"ValueError: {wanted}" in text for text in crowd.messages())
