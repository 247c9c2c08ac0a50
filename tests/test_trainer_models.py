"""The shapes, sizes and parameter names of the backbones, and the checkpoints that they load."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

from tclr import models, train  # noqa: E402


@pytest.mark.parametrize("name", ["r3d18", "r2plus1d18", "c3d"])
def test_time_is_kept(name):
    net = models.backbone(name, 8).eval()
    with torch.no_grad():
        slices = net(torch.rand(2, 16, 3, 112, 112))
    assert slices.shape == (2, 64, 4) and net.features == 64


def test_parameters_and_names():
    with torch.device("meta"):
        r3d, r21d = models.backbone("r3d18", 64), models.backbone("r2plus1d18", 64)
    assert sum(p.numel() for p in r3d.parameters()) == 33_166_272
    # torchvision's R(2+1)D-18 has 31,300,125 without its classifier; its separated convolution gives way to a whole one
    middle = 256 * 512 * 27 // (256 * 9 + 3 * 512)
    separated = 256 * middle * 9 + 2 * middle + middle * 512 * 3
    assert sum(p.numel() for p in r21d.parameters()) == 31_300_125 - separated + 256 * 512 * 27
    names = dict(r3d.named_parameters())
    assert names["layer4.0.conv1.0.weight"].shape == (512, 256, 3, 3, 3) and r3d.layer4[0].conv1[0].dilation == (
        2,
        1,
        1,
    )
    assert names["layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1, 1)
    assert dict(r21d.named_parameters())["layer3.1.conv2.0.3.weight"].shape[2:] == (3, 1, 1)


def test_torchvision_checkpoint(tmp_path):
    torch.manual_seed(0)
    theirs = {k: torch.rand_like(v) for k, v in models.r3d18(8).state_dict().items() if v.is_floating_point()}
    theirs = {k: v for k, v in theirs.items() if not k.startswith("inputs")} | {"fc.weight": torch.rand(400, 64)}
    theirs |= {k: v for k, v in models.r3d18(8).state_dict().items() if k.endswith("tracked")}
    torch.save(theirs, tmp_path / "tv.pth")
    net = models.r3d18(8)
    assert models.load_torchvision(net, tmp_path / "tv.pth") == []
    assert torch.equal(net.layer4[1].conv2[0].weight, theirs["layer4.1.conv2.0.weight"])
    assert net.inputs.mean[0] == pytest.approx(0.43216)
    del theirs["layer2.0.conv1.0.weight"]
    torch.save(theirs, tmp_path / "tv.pth")
    with pytest.raises(ValueError, match="found no layer2.0.conv1.0.weight, wanted the weights of a VideoResNet"):
        models.load_torchvision(net, tmp_path / "tv.pth")
    with pytest.raises(ValueError, match=r"of shape \[8.*\], wanted \[4.*\]; see net.backbone and net.width"):
        models.load_torchvision(models.r3d18(4), tmp_path / "tv.pth")


def test_release_checkpoint(tmp_path):
    """Written as the release writes it: `module.`, a pickled GradScaler beside, a bias in the head's first layer."""
    torch.manual_seed(0)
    theirs = train.Embedder(models.r3d18(8))
    for buffer in theirs.buffers():
        if buffer.dim() and buffer.is_floating_point() and buffer.shape != (3,):
            buffer.uniform_(0.5, 1)
    names = {"0": "fc1", "1": "bn1", "3": "fc2", "4": "bn2"}
    state = {f"module.0.{k}": v for k, v in theirs.backbone.state_dict().items() if not k.startswith("inputs")}
    for key, value in theirs.head.state_dict().items():
        layer, _, what = key.partition(".")
        state[f"module.1.{names[layer]}.{what}"] = value
    state["module.1.fc1.bias"] = torch.rand(64)
    with_bias = state["module.1.bn1.running_mean"] + state["module.1.fc1.bias"]
    state["module.1.bn1.running_mean"] = with_bias
    scaler = torch.amp.GradScaler("cpu")
    torch.save(dict(epoch=3, state_dict=state, amp_scaler=scaler), tmp_path / "release.pth")

    ours = train.Embedder(models.r3d18(8))
    assert models.load_release(ours, tmp_path / "release.pth") == []
    assert ours.backbone.inputs.channels.tolist() == [2, 1, 0]
    clips = torch.rand(2, 8, 3, 32, 32)
    with torch.no_grad():
        for found, wanted in zip(ours.eval()(clips.flip(2)), theirs.eval()(clips), strict=True):
            assert torch.allclose(found, wanted, atol=1e-5)


def test_no_code_runs_from_a_checkpoint(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save(dict(state_dict={}, x=Evil()), tmp_path / "evil.pth")
    with pytest.raises(Exception, match="[Ww]eights"):
        models.load_release(train.Embedder(models.r3d18(8)), tmp_path / "evil.pth")


def test_unknown_backbone():
    with pytest.raises(ValueError, match="backbone: found 'vit'"):
        models.backbone("vit", 8)
