"""Video models: a clip's output is its own under every norm, every weight learns, and I3D is the published network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.layout import lay_out
from trainer.models.i3d import I3DTeacher, same_padding
from trainer.models.inception import MIXED_BLOCKS
from trainer.models.mobilenet import MobileNetStudent
from trainer.models.norms import FrameGroupNorm, FrozenBatchNorm, Norm
from trainer.models.recognizer import Recognizer
from trainer.randomness import clip_keys

CLASSES = 7
NORMS: tuple[Norm, ...] = ("frozen", "group")


def make_i3d(norm: Norm, **options: Any) -> Recognizer:
    """Build a narrow I3D."""
    values: dict[str, Any] = {"width": 0.1, "rnn_size": 6, "rnn_layers": 1, "dropout": 0.0, **options}
    return I3DTeacher(num_classes=CLASSES, norm=norm, **values)


def make_mobilenet(norm: Norm, **options: Any) -> Recognizer:
    """Build a narrow student."""
    values: dict[str, Any] = {"width": 0.25, "rnn_size": 6, "dropout": 0.0, **options}
    return MobileNetStudent(architecture="mobilenet_v3_small", num_classes=CLASSES, norm=norm, **values)


def settle(model: Recognizer) -> Recognizer:
    """Give the model the biases and statistics of a trained one, since fresh ones would hide a leak."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean += 0.3 * torch.randn_like(module.running_mean)
                module.running_var *= torch.empty_like(module.running_var).uniform_(0.5, 2.0)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


KINDS = [
    pytest.param(make, norm, id=f"{make.__name__[5:]}-{norm}") for make in (make_i3d, make_mobilenet) for norm in NORMS
]
Make = Callable[..., Recognizer]


def draw_clips(lengths: list[int], size: tuple[int, int] = (32, 32), seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n, *size, 3), dtype=torch.uint8, generator=generator) for n in lengths]


def score(model: Recognizer, clips: list[Tensor], keys: np.ndarray | None = None) -> list[Tensor]:
    """Return the logits of each clip, all of them in one micro-batch."""
    layout = lay_out(np.array([len(clip) for clip in clips]), model.total_stride, keys)
    return list(model(torch.cat(clips), layout).split(list(layout.output_lengths)))


# A clip's output is its own.


@pytest.mark.parametrize(("make", "norm"), KINDS)
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_clip_scores_the_same_alone_and_in_any_batch(make: Make, norm: Norm, stride: int) -> None:
    model = settle(make(norm, total_stride=stride))
    # In training mode, which is where BatchNorm would mix clips.
    model.train()
    clips = draw_clips([9, 1, 6, 3, 8, 2, 5])
    with torch.no_grad():
        together = score(model, clips)
        backwards = score(model, clips[::-1])[::-1]
        for clip, one, other in zip(clips, together, backwards, strict=True):
            [alone] = score(model, [clip])
            assert alone.shape == (-(-len(clip) // stride), CLASSES)
            torch.testing.assert_close(one, alone, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(other, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("make", "norm"), KINDS)
def test_the_gradient_of_a_step_is_the_sum_over_its_micro_batches(make: Make, norm: Norm) -> None:
    model = settle(make(norm))
    model.train()
    clips = draw_clips([5, 9, 2])

    def gradient(cells: list[list[Tensor]]) -> dict[str, Tensor]:
        model.zero_grad()
        for cell in cells:
            torch.stack([logits[:, 1:3].square().sum() for logits in score(model, cell)]).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = {name: value.clone() for name, value in model.named_buffers()}
    whole, parts = gradient([clips]), gradient([[clips[2]], [clips[0], clips[1]]])
    assert whole.keys() == dict(model.named_parameters()).keys()
    for name, value in whole.items():
        assert value.any(), name
        torch.testing.assert_close(parts[name], value, atol=1e-4 * float(value.abs().max()), rtol=1e-3)
    # No statistic moved: nothing of a model depends on the order of its passes.
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("make", "norm"), KINDS)
def test_a_cell_of_silence_alone_is_finite_and_teaches_nothing(make: Make, norm: Norm) -> None:
    model = settle(make(norm))
    [logits] = score(model, [torch.zeros(4, 32, 32, 3, dtype=torch.uint8)])
    (0.0 * logits.sum()).backward()
    assert torch.isfinite(logits).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize(("make", "norm"), KINDS)
def test_dropout_belongs_to_the_clip(make: Make, norm: Norm) -> None:
    model = settle(make(norm, dropout=0.5))
    clips, keys = draw_clips([5, 8]), clip_keys(["a", "b"])
    with torch.no_grad():
        together = score(model, clips, keys)
        [alone] = score(model, clips[1:], keys[1:])
        torch.testing.assert_close(alone, together[1], atol=2e-5, rtol=1e-4)
        assert (alone - score(model, clips)[1]).abs().max() > 1e-3


# Blocks, devices, frame sizes.


@pytest.mark.parametrize(("make", "norm"), KINDS)
def test_every_weight_is_in_one_block_and_the_pass_calls_each_once_in_order(make: Make, norm: Norm) -> None:
    model = make(norm)
    blocks = model.blocks()
    inside = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert sorted(inside) == sorted(id(parameter) for parameter in model.parameters())
    called: list[int] = []
    for place, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, place=place: called.append(place))
    score(model, draw_clips([3, 5]))
    assert called == list(range(len(blocks)))


@pytest.mark.parametrize("make", [make_i3d, make_mobilenet])
@pytest.mark.parametrize("size", [(33, 47), (64, 40), (1, 1)])
def test_frames_of_any_size_are_taken(make: Make, size: tuple[int, int]) -> None:
    model = settle(make("group"))
    clips = draw_clips([5, 3], size)
    with torch.no_grad():
        together = score(model, clips)
        [alone] = score(model, clips[1:])
    torch.testing.assert_close(together[1], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("make", "norm"), KINDS)
def test_bfloat16_leaves_the_weights_as_they_are(make: Make, norm: Norm) -> None:
    model = settle(make(norm))
    clips = draw_clips([5, 8])
    with torch.no_grad():
        exact = torch.cat(score(model, clips))
        with torch.autocast("cpu", torch.bfloat16):
            rough = torch.cat(score(model, clips)).float()
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(("make", "norm"), KINDS)
def test_a_model_is_rebuilt_from_its_own_state(make: Make, norm: Norm) -> None:
    source, target = settle(make(norm)), make(norm)
    target.load_state_dict(source.state_dict())
    clips = draw_clips([5])
    assert torch.equal(score(source, clips)[0], score(target, clips)[0])


# Norms.


def test_frozen_statistics_are_used_and_kept_in_training() -> None:
    norm = FrozenBatchNorm(4).train()
    assert norm.running_mean is not None
    norm.running_mean += 2.0
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(norm(x), (x - 2.0) / (1.0 + norm.eps) ** 0.5)
    assert not norm.training
    assert torch.equal(norm.running_mean, torch.full((4,), 2.0))


def test_group_statistics_are_those_of_a_frame() -> None:
    norm = FrameGroupNorm(32)
    volume = torch.randn(1, 32, 6, 5, 5)
    reference = nn.GroupNorm(2, 32, eps=norm.eps)
    frames = reference(volume[0].transpose(0, 1))
    torch.testing.assert_close(norm(volume)[0].transpose(0, 1), frames)
    torch.testing.assert_close(norm(volume[0].transpose(0, 1)), frames)


@pytest.mark.parametrize(("channels", "groups"), [(16, 1), (24, 3), (64, 4), (72, 9), (832, 52)])
def test_groups_hold_sixteen_channels_or_eight(channels: int, groups: int) -> None:
    assert FrameGroupNorm(channels).num_groups == groups


# I3D is the published network.


def test_i3d_without_its_classifier_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = I3DTeacher(num_classes=1296)
    assert sum(p.numel() for p in model.backbone.parameters()) == 12_287_264


class Port:
    """The published network, clip by clip: every layer pads its own input, as the PyTorch port does."""

    def __init__(self, model: I3DTeacher) -> None:
        self.weights = model.backbone.state_dict()

    def __call__(self, clip: Tensor, strides: tuple[int, int]) -> Tensor:
        x = (clip.float() / 127.5 - 1).permute(3, 0, 1, 2).unsqueeze(0)
        x = self.pool(self.unit("Conv3d_1a_7x7", x, (strides[0], 2, 2)), (1, 3, 3), (1, 2, 2))
        x = self.unit("Conv3d_2c_3x3", self.unit("Conv3d_2b_1x1", x))
        x = self.pool(x, (1, 3, 3), (1, 2, 2))
        for name in MIXED_BLOCKS:
            if name == "Mixed_4b":
                x = self.pool(x, (3, 3, 3), (strides[1], 2, 2))
            if name == "Mixed_5b":
                x = self.pool(x, (1, 2, 2), (1, 2, 2))
            b1 = self.unit(f"{name}.b1b", self.unit(f"{name}.b1a", x))
            b2 = self.unit(f"{name}.b2b", self.unit(f"{name}.b2a", x))
            b3 = self.unit(f"{name}.b3b", self.pool(x, (3, 3, 3), (1, 1, 1)))
            x = torch.cat([self.unit(f"{name}.b0", x), b1, b2, b3], dim=1)
        return x

    def unit(self, name: str, x: Tensor, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
        weight = self.weights[f"{name}.conv3d.weight"]
        x = F.conv3d(self.pad(x, tuple(weight.shape[2:]), stride), weight, stride=stride)
        mean, var, gain, bias = (
            self.weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, mean, var, gain, bias, eps=1e-3))

    def pool(self, x: Tensor, kernel: tuple[int, ...], stride: tuple[int, int, int]) -> Tensor:
        return F.max_pool3d(self.pad(x, kernel, stride), kernel, stride)

    @staticmethod
    def pad(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, int, int]) -> Tensor:
        sides: list[int] = []
        for size, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
            total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
            sides += [total // 2, total - total // 2]
        return F.pad(x, sides)


@pytest.mark.parametrize(("total_stride", "strides"), [(1, (1, 1)), (2, (2, 1)), (4, (2, 2))])
@pytest.mark.parametrize("size", [(32, 32), (45, 38)])
def test_i3d_on_packed_clips_is_the_published_network_on_each(
    total_stride: int, strides: tuple[int, int], size: tuple[int, int]
) -> None:
    model = settle(make_i3d("frozen", total_stride=total_stride))
    assert isinstance(model, I3DTeacher)
    port = Port(model)
    # Where a length does not divide by the stride, the port shifts its first convolution by a frame; ours does not.
    clips = draw_clips([8, 4, 12], size)
    seen: list[Tensor] = []
    model.mean.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        score(model, clips)
        layout = lay_out(np.array([len(clip) for clip in clips]), total_stride)
        inside = seen[0][:, :, layout.masks[total_stride][:, 0] > 0]
        expected = torch.cat([port(clip, strides) for clip in clips], dim=2)
    torch.testing.assert_close(inside, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_gives_an_output_for_every_stride(kernel: int, stride: int) -> None:
    for size in range(1, 20):
        before, behind = same_padding(size, kernel, stride)
        assert behind - before in (0, 1)
        assert (size + before + behind - kernel) // stride + 1 == -(-size // stride)


# The student is torchvision's network.


@pytest.mark.parametrize(
    ("architecture", "published", "classifier"),
    # Features out, hidden and classes of the classifiers that are left out.
    [("mobilenet_v3_small", 2_542_856, (576, 1024)), ("mobilenet_v3_large", 5_483_032, (960, 1280))],
)
def test_mobilenet_without_its_classifier_has_the_published_number_of_parameters(
    architecture: str, published: int, classifier: tuple[int, int]
) -> None:
    inputs, hidden = classifier
    with torch.device("meta"):
        model = MobileNetStudent(architecture=architecture, num_classes=9, norm="frozen")
    without = published - (inputs + 1) * hidden - (hidden + 1) * 1000
    assert sum(p.numel() for p in model.backbone.parameters()) == without


def test_mobilenet_features_are_torchvisions_own() -> None:
    from trainer.models.vision import import_models

    torch.manual_seed(0)
    reference = import_models().mobilenet_v3_small().eval()
    model = MobileNetStudent(architecture="mobilenet_v3_small", num_classes=CLASSES, norm="frozen")
    with torch.no_grad():
        for value in reference.state_dict().values():
            if value.ndim == 1:
                value += torch.rand_like(value)
    model.backbone.load_state_dict({k: v for k, v in reference.state_dict().items() if k.startswith("features.")})
    [clip] = draw_clips([3], (64, 48))
    seen: list[Tensor] = []
    model.blocks()[-3].register_forward_hook(lambda _, inputs, output: seen.append(output))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        score(model, [clip])
        expected = reference.features(((clip / 255 - mean) / std).permute(0, 3, 1, 2))
    torch.testing.assert_close(seen[0], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
