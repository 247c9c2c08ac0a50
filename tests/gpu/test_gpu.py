"""The backends on a GPU: python -m pytest tests/gpu. benchmarks/gpu.sh also builds, measures and runs sanitizers."""

import functools

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends

from ..oracle import DTYPES, LOSSES, judge, run, same_bits

if not torch.cuda.is_available():
    pytest.skip("no CUDA or HIP device", allow_module_level=True)


SIZES = [(1, 2, 8), (7, 3, 33), (16, 4, 64), (33, 3, 128), (129, 3, 256), (205, 2, 17), (300, 2, 512), (70, 2, 1024)]
SIZES += [(64, 2, 64), (300, 2, 100), (517, 3, 192), (1000, 2, 128)]  # for Hopper's kernels, as is D = 256 above
HALF = torch.bfloat16, torch.float16


def on_gpu(name, sizes, dtype, **settings):
    return [x.cuda() for x in LOSSES[name].inputs(sizes, dtype, **settings)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", ["nt_xent", "clip_loss", "instance_contrastive"])
def test_sizes_meet_the_accuracy_criteria(name, sizes, dtype, backend):
    judge(LOSSES[name], on_gpu(name, sizes, dtype), 0.1, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3, 4, 16), (40, 4, 128), (5, 17, 48), (3, 65, 64), (2, 130, 72)], ids=str)
@pytest.mark.parametrize("name", ["local_local", "global_local", "tclr", "tclr release"])
def test_videos_meet_the_accuracy_criteria(name, sizes, dtype, backend):
    judge(LOSSES[name], on_gpu(name, sizes, dtype), 0.1, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rho", [0.9, 0.99, 0.999, 1])
@pytest.mark.parametrize("tau", [0.5, 0.1, 0.05, 0.01])
def test_confident_pairs_meet_the_accuracy_criteria(tau, rho, dtype, backend):
    D = 96 if dtype in HALF else 48  # Hopper's kernels are used from 65 features on
    judge(LOSSES["nt_xent"], on_gpu("nt_xent", (133, 2, D), dtype, rho=rho), tau, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tau", [10.0, 0.02, 0.005, 0.001])
def test_extreme_temperatures_meet_the_accuracy_criteria(tau, normalize, dtype, backend):
    D = 72 if dtype in HALF else 24
    inputs = on_gpu("clip_loss", (77, 2, D), dtype, normalize=normalize)
    judge(LOSSES["clip_loss"], inputs, tau, backend, normalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("B", [9, 1500, 5000])
@pytest.mark.parametrize("D", [8, 128])
def test_the_default_backend_is_the_one_chosen_for_the_size(D, B, dtype):
    a, b = on_gpu("nt_xent", (B, 2, D), dtype)
    chosen = backends.choose(None, a.device, 2 * B, D, dtype, unit_rows=True)
    assert torch.equal(tk.nt_xent(a, b), tk.nt_xent(a, b, backend=chosen))


@pytest.mark.parametrize("D", [24, 128, 500])
def test_tf32_is_accurate_if_it_is_allowed(D, backend):
    inputs = on_gpu("nt_xent", (300, 2, D), torch.float32)
    exact = run(tk.nt_xent, [x.double() for x in inputs], backend="reference")
    full = run(tk.nt_xent, inputs, backend=backend)
    torch.set_float32_matmul_precision("high")
    try:
        rounded = run(tk.nt_xent, inputs, backend=backend)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert abs(full[0] - exact[0]) < 1e-5 and abs(rounded[0] - exact[0]) < 1e-4
    for found, wanted in zip(rounded[1], exact[1], strict=True):
        assert torch.cosine_similarity(found.double().flatten(), wanted.flatten(), dim=0) > 1 - 1e-4


@pytest.mark.parametrize("tau", [0.1, 0.005])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_repeat_bit_by_bit(dtype, tau, backend):
    inputs = on_gpu("nt_xent", (1500, 2, 64), dtype)
    first = run(tk.nt_xent, inputs, temperature=tau, backend=backend)
    for _ in range(5):
        same_bits(run(tk.nt_xent, inputs, temperature=tau, backend=backend), first)


def step(a, b, tau, backend):
    loss = tk.nt_xent(a, b, temperature=tau, backend=backend)
    return loss, *torch.autograd.grad(loss, (a, b, tau))


@pytest.mark.parametrize("B", [8, 700])
def test_no_step_synchronises_with_the_host(B, backend):
    a, b = (x.requires_grad_() for x in on_gpu("nt_xent", (B, 2, 64), torch.bfloat16))
    tau = torch.tensor(0.1, device="cuda", requires_grad=True)
    step(a, b, tau, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(a, b, tau, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_replays(step, tau, other):
    """Asserts that a captured step replays the bits of eager steps, with a temperature of 0.1 or `other`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for k in range(100):
        with torch.no_grad():
            tau.fill_(0.1 if k % 2 else other)
        graph.replay()
        if k < 4 or k > 97:
            wanted = step()
            same_bits((captured[0], captured[1:]), (wanted[0], wanted[1:]))


@pytest.mark.parametrize("B", [8, 700])
def test_captured_graphs_replay_the_bits_of_eager_steps(B, backend):
    """The temperatures are on both sides of the limit from which on sums need a running maximum."""
    a, b = (x.requires_grad_() for x in on_gpu("nt_xent", (B, 2, 64), torch.bfloat16))
    tau = torch.tensor(0.1, device="cuda", requires_grad=True)
    check_replays(functools.partial(step, a, b, tau, backend), tau, 0.005)


@pytest.mark.parametrize("B", [8, 300])
def test_compiled_losses_agree_without_a_graph_break(B, backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda a, b: tk.nt_xent(a, b, backend=backend), fullgraph=True)
    inputs = on_gpu("nt_xent", (B, 2, 32), torch.float32)
    torch.testing.assert_close(run(compiled, inputs), run(tk.nt_xent, inputs, backend=backend))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gram_matrices_of_more_than_2_to_the_31_entries_are_accurate(dtype, backend):
    """Of 65,536 losses, some are compared with those computed from their row of similarities in float64."""
    a, b = on_gpu("nt_xent", (32768, 2, 64), dtype)
    found = tk.nt_xent(a, b, reduction="none", backend=backend)
    z = torch.cat([a, b]).double()
    z = z / z.norm(dim=1, keepdim=True)
    for i in (0, 1, 12345, 32767, 32768, 65535):
        s = z @ z[i] / 0.1
        positive = s[(i + 32768) % 65536].clone()
        s[i] = -torch.inf
        assert abs(found[i] - (s.logsumexp(0) - positive)) < 1e-3


@pytest.mark.xdist_group("much memory")
def test_offsets_beyond_2_to_the_31_change_no_bit(backend, much_memory):
    """The last groups are beyond this offset, and must have the losses that they have alone."""
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("takes 40 GiB of memory")
    G, N, D = 2**15 + 3, 33, 1024
    x = torch.randn(2, G, N, D, device="cuda", dtype=torch.float16)
    last = tk.nt_xent(x[0, -2:], x[1, -2:], reduction="none", backend=backend)
    all_groups = tk.nt_xent(x[0], x[1], reduction="none", backend=backend)
    assert torch.equal(all_groups[-2:], last)


def test_memory_stays_below_that_of_the_gram_matrix(backend):
    a, b = (x.requires_grad_() for x in on_gpu("nt_xent", (32768, 2, 128), torch.bfloat16))
    tk.nt_xent(a, b, backend=backend).backward()
    a.grad = b.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tk.nt_xent(a, b, backend=backend).backward()
    assert torch.cuda.max_memory_allocated() - before < 0.3 * 2**30
