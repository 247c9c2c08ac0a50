"""The shapes, sizes and parameter names of the backbones, and the checkpoints that they load."""

import pytest
import torch
from tclr import models, train


@pytest.mark.parametrize("name", ["r3d18", "r2plus1d18", "c3d"])
def test_backbones_turn_16_frames_into_4_time_slices(name):
    net = models.backbone(name, 8).eval()
    with torch.no_grad():
        slices = net(torch.rand(2, 16, 3, 112, 112))
    assert slices.shape == (2, 64, 4) and net.features == 64


def test_backbones_have_the_parameter_names_and_counts_of_torchvision():
    with torch.device("meta"):
        r3d, r21d = models.backbone("r3d18", 64), models.backbone("r2plus1d18", 64)
    assert sum(p.numel() for p in r3d.parameters()) == 33_166_272
    # torchvision's R(2+1)D-18 has 31,300,125 without its classifier. Here, one of its convolutions is not factorised.
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


def test_a_torchvision_checkpoint_is_loaded_and_a_missing_weight_named(tmp_path):
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


def release_weights(embedder, prefix="module."):
    """The weights of an embedder under the names of the official release."""
    names = {"0": "fc1", "1": "bn1", "3": "fc2", "4": "bn2"}
    trunk = embedder.backbone.state_dict().items()
    weights = {f"{prefix}0.{name}": value for name, value in trunk if not name.startswith("inputs.")}
    for name, value in embedder.head.state_dict().items():
        layer, _, what = name.partition(".")
        weights[f"{prefix}1.{names[layer]}.{what}"] = value
    return weights


def test_a_checkpoint_of_the_release_gives_its_embeddings(tmp_path):
    """As in the release, names begin with `module.`, there is a pickled GradScaler, and the first layer has a bias."""
    torch.manual_seed(0)
    theirs = train.Embedder(models.r3d18(8))
    for buffer in theirs.buffers():
        if buffer.dim() and buffer.is_floating_point() and buffer.shape != (3,):
            buffer.uniform_(0.5, 1)
    state = release_weights(theirs)
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


def test_a_checkpoint_with_code_is_an_error(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save(dict(state_dict={}, x=Evil()), tmp_path / "evil.pth")
    with pytest.raises(Exception, match="[Ww]eights"):
        models.load_release(train.Embedder(models.r3d18(8)), tmp_path / "evil.pth")


def test_an_unknown_backbone_is_an_error():
    with pytest.raises(ValueError, match="backbone: found 'vit'"):
        models.backbone("vit", 8)
