"""Pretraining in one process: steps, checkpoints, resuming, and the windows of the two views."""

import math
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tclr import checkpoint, models, train
from tclr.clips import ClipPlan, random_starts, random_windows
from tclr.videos import Loaded

import tclr_kernels as tk

from .crowd import wait_for

PLAN = ClipPlan(4, 2)
RECIPE = dict(batch=4, side=8, checkpoint_every=1, schedule="plateau", learn_temperature=True, form="release")


@pytest.fixture(scope="module")
def videos():
    frames = torch.randint(256, (10, 10, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Loaded([f"v{i}" for i in range(10)], list(frames), torch.arange(10) % 2)


def embedder():
    torch.manual_seed(0)
    return train.Embedder(models.TinyResNet3d(2), 8)


def trained(videos, record=lambda **terms: None, file=None, **recipe):
    result = embedder()
    train.pretrain(result, videos, PLAN, train.Recipe(**RECIPE | recipe), record, file=file)
    return result


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


def in_child(target, *arguments):
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments, daemon=True)
    child.start()
    return child


def test_a_run_killed_twenty_times_gets_the_weights_of_an_uninterrupted_run(videos, tmp_path):
    """Each process is killed by SIGKILL at a random moment, and the next one continues from the last checkpoint."""
    file, moments, seen = tmp_path / "last.pt", random.Random(0), []
    trained(videos, steps=1)  # imports modules once that each child would import at its first step
    for _ in range(20):
        before = file.stat().st_mtime_ns if file.exists() else None
        child = in_child(lambda: trained(videos, file=file, steps=300, checkpoint_every=2))
        wait_for(lambda before=before: file.exists() and file.stat().st_mtime_ns != before)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        seen.append(checkpoint.load(file)["done"])
    assert child.exitcode == -signal.SIGKILL and seen == sorted(set(seen)) and seen[-1] < 300
    steps = seen[-1] + 5
    assert same(trained(videos, file=file, steps=steps), trained(videos, steps=steps))


def test_reading_ahead_changes_no_bit(videos):
    recipe = dict(steps=7, accumulate=2, batch=4)
    assert same(trained(videos, readers=3, **recipe), trained(videos, **recipe))


def steps_of(file):
    return checkpoint.load(file)["done"] if file.exists() else 0


def test_sigterm_saves_and_exits_143(videos, tmp_path):
    file = tmp_path / "last.pt"
    sleepy = lambda **terms: time.sleep(0.1)  # noqa: E731
    child = in_child(lambda: trained(videos, sleepy, file, steps=40, checkpoint_every=3))
    wait_for(lambda: steps_of(file) >= 3)
    os.kill(child.pid, signal.SIGTERM)
    child.join(10)
    assert child.exitcode == 143 and 3 < steps_of(file) < 40
    assert same(trained(videos, file=file, steps=40), trained(videos, steps=40))


def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step(monkeypatch):
    """One that follows at once may be the same, repeated by torchrun. Signals that nohup ignores stay ignored."""
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with checkpoint.StopRequest() as stop:
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGHUP)
            assert int(stop) == signal.SIGINT
            monkeypatch.setattr(checkpoint, "INSIST", 0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def once_at(step, parameter, run, factor):
    parameter.register_hook(lambda g: g * factor if run.done == step else g)


@pytest.mark.parametrize(
    "factor, found",
    [
        (math.nan, "the gradient of NAME has a value of nan"),
        (-math.inf, "the gradient of NAME has a value of (nan|-?inf)"),
        (1e35, "the norm of the gradient is too large for its number format"),
    ],
)
@pytest.mark.parametrize("amp, accumulate, which", [("off", 1, 0), ("bf16", 2, 0), ("off", 2, -1)])
def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_change(
    videos, tmp_path, amp, accumulate, which, factor, found
):
    """The last parameter is the temperature."""
    recipe, file = train.Recipe(**RECIPE | dict(steps=6, amp=amp, accumulate=accumulate)), tmp_path / "last.pt"
    run = train.Run(embedder(), videos, PLAN, recipe, "cpu")
    once_at(3, run.parameters[which], run, factor)
    name = "temperature" if which else "backbone.stem.0.weight"
    with pytest.raises(FloatingPointError, match=f"^step 3: {found.replace('NAME', name)}; its batch: v") as error:
        train.carry_on(run, lambda **terms: None, file=file)
    assert error.value.args[0].count("v") >= 4 * accumulate
    kept = checkpoint.load(file)
    weights = dict(run.embedder.named_parameters())  # the statistics of the batches are further
    assert kept["done"] == 3 and all(torch.equal(weights[name], kept["embedder"][name]) for name in weights)


def test_a_gradient_that_no_loss_scale_makes_finite_ends_a_run_in_fp16(videos):
    recipe = train.Recipe(**RECIPE | dict(steps=60, amp="fp16"))
    run = train.Run(embedder(), videos, PLAN, recipe, "cpu")
    run.parameters[0].register_hook(lambda g: g * math.inf)
    with pytest.raises(FloatingPointError, match="^step 31: the gradient of backbone.stem.0.weight has a value of"):
        train.carry_on(run, lambda **terms: None)


@pytest.mark.parametrize("what", ["weight", "statistic", "queue"])
def test_a_state_that_is_not_finite_does_not_replace_a_checkpoint(videos, tmp_path, what):
    recipe, file = train.Recipe(**RECIPE | dict(steps=6, queue=8)), tmp_path / "last.pt"
    run = train.Run(embedder(), videos, PLAN, recipe, "cpu")
    spoilt = {
        "weight": next(run.embedder.head.parameters()),
        "statistic": run.embedder.head[1].running_var,
        "queue": next(run.queue.buffers()),
    }[what]

    def record(step, **terms):
        if step == 3:
            spoilt.data.view(-1)[0] = math.inf

    with pytest.raises(FloatingPointError, match=r"^step 4: \S+ has a value of inf; no checkpoint is written"):
        train.carry_on(run, record, file=file)
    assert steps_of(file) == 3


def test_a_full_disk_is_reported_with_the_name_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(OSError) as error:
        checkpoint.save(tmp_path / "last.pt", done=1)
    assert error.value.filename == str(tmp_path / "last.pt") and not list(tmp_path.iterdir())


def test_an_interrupted_run_has_the_terms_and_weights_of_an_uninterrupted_run(videos, tmp_path):
    whole, parts = [], []
    wanted = trained(videos, lambda **terms: whole.append(terms), steps=7)
    for steps in 3, 7:  # an epoch has two steps, so both runs end within an epoch
        result = trained(videos, lambda **terms: parts.append(terms), tmp_path / "last.pt", steps=steps)
    assert parts == whole and same(result, wanted)
    assert whole[-1]["temperature"] != pytest.approx(0.1, abs=1e-9)


@pytest.mark.parametrize("weights", [None, dict(ic_global=2.0, ll=0.0, gl=0.0)])
def test_a_queue_gives_ic_global_the_embeddings_of_earlier_steps(weights, videos, tmp_path, monkeypatch):
    """ic_global equals NT-Xent with these negatives, and an interrupted run continues bit by bit."""
    seen, original = [], train.Run.objective

    def objective(run, g, s, x):
        before, terms = run.queue(), original(run, g, s, x)
        wanted = tk.tclr(g, s, x, run.loss.temperature, form="release", weights=weights)
        ic = tk.nt_xent(*g, run.loss.temperature, negatives=before)
        torch.testing.assert_close(terms.ic_global, ic)
        weight = (weights or {}).get("ic_global", 1)
        torch.testing.assert_close(terms.total, wanted.total + weight * (ic - wanted.ic_global))
        seen.append(terms.ic_global.item() - wanted.ic_global.item())
        torch.testing.assert_close(run.queue()[: len(before)].norm(dim=1), torch.ones(len(before)))
        return terms

    recipe = dict(queue=20, weights=weights)
    wanted = trained(videos, steps=5, **recipe)
    for steps in 2, 5:
        result = trained(videos, file=tmp_path / "last.pt", steps=steps, **recipe)
    assert same(result, wanted)
    monkeypatch.setattr(train.Run, "objective", objective)
    assert same(trained(videos, steps=5, **recipe), wanted) and all(more > 0 for more in seen)
    with pytest.raises(ValueError, match="recipe.queue: found 21, wanted 20"):
        trained(videos, file=tmp_path / "last.pt", steps=6, **recipe | dict(queue=21))


def test_a_nan_loss_is_an_error_that_names_its_videos(videos):
    result = embedder()
    with torch.no_grad():
        result.head[0].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is nan; its batch: v\d, v\d, v\d, v\d$"):
        train.pretrain(result, videos, PLAN, train.Recipe(**RECIPE), lambda **terms: None)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "last.pt"
    checkpoint.save(file, done=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(file, done=2)
    assert checkpoint.load(file) == dict(done=1) and list(tmp_path.iterdir()) == [file]


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save(dict(done=Path("x")), tmp_path / "last.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        checkpoint.load(tmp_path / "last.pt")


def test_a_folder_with_files_is_refused_without_resume_or_overwrite(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="--resume"):
        checkpoint.claim(tmp_path, resume=False, overwrite=False)
    checkpoint.claim(tmp_path, resume=True, overwrite=False)
    assert (tmp_path / "thesis.txt").exists()


def test_plateau_divides_the_rate_after_9_epochs_without_a_new_minimum():
    plateau, factors = train.Plateau(), []
    for loss in [5.0, 4.0] + [4.5] * 9 + [4.2] * 9 + [3.0]:
        plateau.add(loss)
        plateau.end_epoch(counts=True)
        factors.append(plateau.factor)
    assert factors == [1.0] * 10 + [0.1] * 9 + [0.01] * 2


def test_an_epoch_repeats_no_video_and_ranks_divide_each_batch(videos, monkeypatch):
    recipe = train.Recipe(**RECIPE | dict(batch=4, accumulate=1))
    run = train.Run(embedder(), videos, PLAN, recipe, "cpu")
    whole = []
    for step in range(run.epoch_steps):
        whole.append(run.batch(step, 0))
        monkeypatch.setattr(train, "ranks", lambda: 2)
        shares = []
        for r in range(2):
            monkeypatch.setattr(train, "rank", lambda r=r: r)
            shares += run.batch(step, 0)
        assert sorted(shares) == sorted(whole[-1]) and len(shares) == 4
        monkeypatch.undo()
    assert len(set(sum(whole, []))) == 8


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_each_term_alone_can_be_trained_with_accumulation_and_amp(videos, amp):
    for name in "ic_global", "ll", "gl":
        rows, weights = [], {"ic_global": 0.0, "ll": 0.0, "gl": 0.0, name: 2.0}
        recipe = dict(form="paper", weights=weights, accumulate=2, amp=amp, steps=2, learn_temperature=False)
        trained(videos, lambda rows=rows, **terms: rows.append(terms), **recipe)
        for row in rows:
            assert row["total"] == pytest.approx(2 * row[name], rel=1e-6) and row[name] > 0
            assert all(row[other] == 0 for other in {"ic_global", "ll", "gl"} - {name})


def test_two_processes_keep_the_same_weights(videos, tmp_path):
    """Their parameters stay bitwise equal, but differ from those of one process: each normalises half a batch."""

    def worker(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=2)
        result = trained(videos, steps=3)
        torch.save(dict(result.named_parameters()), tmp_path / f"{rank}.pt")

    children = [in_child(worker, rank) for rank in range(2)]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    start, alone = (dict(net.named_parameters()) for net in (embedder(), trained(videos, steps=3)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], start[name]) for name in first)
    assert not all(torch.equal(first[name], alone[name]) for name in first)


def test_the_loss_is_finite_with_the_augmentation_of_the_release(videos):
    rows = []
    trained(videos, lambda **terms: rows.append(terms), steps=1, augment="release")
    assert math.isfinite(rows[0]["total"])


def test_a_batch_larger_than_the_data_is_refused(videos):
    with pytest.raises(ValueError, match="batch: found 6 videos x accumulate 2 per step, wanted at most 10"):
        train.Run(embedder(), videos, PLAN, train.Recipe(batch=6, accumulate=2), "cpu")


def test_every_weight_decides_whether_local_clips_are_embedded(videos):
    """form="release" compares local clips unless ic_local is 0. The term once got placeholders instead of them."""
    rows = []
    for weights in dict(ic_global=1.0, ll=0.0, gl=0.0), dict(ic_global=1.0, ic_local=1.0, ll=0.0, gl=0.0):
        trained(videos, lambda **terms: rows.append(terms), steps=1, weights=weights)
    assert rows[0] == rows[1] and rows[0]["ic_local"] > 0
    trained(videos, lambda **terms: rows.append(terms), steps=1, weights=dict.fromkeys(("ic_local", "ll", "gl"), 0.0))
    assert rows[2]["ic_local"] == 0 and rows[2]["ic_global"] == rows[0]["ic_global"]


# Independent windows


def starts(plan, latest, count=8_000):
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([random_starts(latest, plan, generator) for _ in range(count)])


@pytest.mark.parametrize("decay, power", [(None, 1), (0.0, 0), (1.0, 1), (3.0, 3)])
def test_the_distance_of_independent_windows_is_distributed_as_documented(decay, power):
    """Without a decay, the starts are independent, so distances decrease linearly, except for distance 0."""
    latest = 9
    drawn = starts(ClipPlan(4, 2, "independent", decay), latest)
    assert drawn.shape == (8_000, 2) and drawn.min() == 0 and drawn.max() == latest
    distances = (drawn[:, 0] - drawn[:, 1]).abs().bincount(minlength=latest + 1) / len(drawn)
    wanted = (1 - torch.arange(latest + 1) / (latest + 1)) ** power
    if decay is None:
        wanted[0] /= 2
    assert torch.allclose(distances, wanted / wanted.sum(), atol=0.015)
    assert (drawn[:, 0] < drawn[:, 1]).sum().item() == pytest.approx((drawn[:, 0] > drawn[:, 1]).sum().item(), rel=0.1)
    for distance in range(3):  # a pair may begin wherever it fits
        first = drawn[(drawn[:, 0] - drawn[:, 1]).abs() == distance].min(1).values
        assert first.unique().tolist() == list(range(latest - distance + 1))


def test_same_windows_take_one_random_start():
    drawn = starts(ClipPlan(4, 2), 9, count=50)
    generator = torch.Generator().manual_seed(0)
    assert drawn.tolist() == [[int(torch.randint(10, (), generator=generator))] for _ in range(50)]
    assert {tuple(random_starts(0, ClipPlan(4, 2, "independent", d), generator)) for d in (None, 0.0, 2.0)} == {(0, 0)}


@pytest.mark.parametrize("windows", ["same", "independent"])
def test_each_view_shows_its_window(windows):
    """Pixels hold the time and the video, and the embedding is their mean, so it shows which frames a view has seen."""

    class Clock(torch.nn.Module):
        head = torch.nn.Identity()

        def forward(self, clips):
            seen = clips[:, :, 0, 0, 0].float()
            return seen.mean(1, keepdim=True), seen.unflatten(1, (2, -1)).mean(2)[:, :, None]

    films = [(100 * i + torch.arange(60, dtype=torch.float))[:, None, None, None].expand(60, 3, 2, 2) for i in range(5)]
    plan = ClipPlan(4, 2, windows)
    drawn = random_windows(films, [4, 1, 3], plan, torch.Generator().manual_seed(3))
    assert len(drawn) == (3 if windows == "same" else 6) and drawn.shape[1:] == (8, 3, 2, 2)
    g, s, x = train.embed(Clock(), drawn, plan, lambda clips, views: torch.cat([clips] * views))
    assert g.shape == (2, 3, 1) and s.shape == x.shape == (2, 3, 2, 1)
    first = drawn[:, 0, 0, 0, 0].unflatten(0, (-1, 3)).expand(2, 3)
    assert torch.equal(first // 100, torch.tensor([4.0, 1, 3]).expand(2, 3))
    assert torch.equal(g[..., 0], first + 3) and torch.equal(x[..., 0], first[..., None] + torch.tensor([1.5, 5.5]))
    assert torch.equal(first[0], first[1]) == (windows == "same")


@pytest.mark.parametrize("form, weights, found", [
    ("paper", None, "ll 1.0, gl 1.0"),
    ("release", None, "ll 1.0, gl 1.0"),
    ("paper", dict(ll=0.0), "ll 0.0, gl 1.0"),
    ("paper", dict(ic_global=1.0, ll=0.5, gl=0.0), "ll 0.5, gl 0.0"),
])  # fmt: skip
def test_ll_and_gl_with_independent_windows_are_an_error(videos, form, weights, found):
    recipe = train.Recipe(**RECIPE | dict(form=form, weights=weights))
    with pytest.raises(
        ValueError, match=rf"^recipe.weights: found {found} beside clips.windows 'independent', wanted 0"
    ):
        train.Run(embedder(), videos, ClipPlan(4, 2, "independent"), recipe, "cpu")


@pytest.mark.parametrize("given, message", [
    (dict(windows="both"), "clips.windows: found 'both', wanted 'same' or 'independent'"),
    (dict(decay=1.0), "clips.decay: found 1.0 beside windows 'same', wanted windows 'independent'"),
    (dict(windows="independent", decay=-1.0), "clips.decay: found -1.0, wanted a finite number of at least 0"),
    (dict(windows="independent", decay=math.nan), "clips.decay: found nan, wanted a finite number of at least 0"),
])  # fmt: skip
def test_errors_name_wrong_clip_settings(given, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        ClipPlan(4, 2, **given)


@pytest.mark.parametrize("weights", [train.IC_ONLY, dict(ic_global=1.0, ic_local=1.0, ll=0.0, gl=0.0)])
def test_independent_windows_are_trained_on_and_recorded(videos, tmp_path, weights):
    result, rows, plan = embedder(), [], ClipPlan(4, 2, "independent", 2.0)
    recipe = train.Recipe(**RECIPE | dict(steps=2, form="paper", weights=weights, readers=2))
    train.pretrain(result, videos, plan, recipe, lambda **terms: rows.append(terms), file=tmp_path / "last.pt")
    assert len(rows) == 2 and all(math.isfinite(row["total"]) and row["ic_global"] > 0 for row in rows)
    kept = checkpoint.load(tmp_path / "last.pt")["settings"]["clips"]
    assert kept == dict(frames=4, stride=2, windows="independent", decay=2.0)


def test_bfloat16_on_a_cpu_gives_a_convolution_the_same_gradient_whatever_memory_held_before():
    convolution = torch.nn.Conv3d(16, 16, 3, padding=1)
    clips = torch.randn(4, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for _ in range(40):
        for _ in range(2):
            torch.full((1 << 16,), torch.inf)  # memory that later allocations find
        convolution.zero_grad()
        with train.reduced_precision("cpu", "bf16"):
            out = convolution(clips) @ torch.ones(8, 8)
        assert out.dtype == torch.bfloat16  # the product is computed in it
        out.float().sum().backward()
        gradients.append(convolution.weight.grad.clone())
    assert torch.stack(gradients).isfinite().all() and all(torch.equal(gradients[0], each) for each in gradients)
