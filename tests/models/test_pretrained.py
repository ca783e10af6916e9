"""Published weights: the shared Kinetics and ImageNet checkpoints load whole, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.errors import InputError
from trainer.models.i3d import I3DTeacher
from trainer.models.mobilenet import MobileNetStudent
from trainer.models.norms import Norm
from trainer.models.pretrained import load_backbone, read_weights
from trainer.models.recognizer import Recognizer
from trainer.models.teacher import FeatureTeacher
from trainer.models.vision import import_models

# From Carreira & Zisserman 2017 after Szegedy et al. 2015, table 1: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool.
PUBLISHED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def kinetics_shapes() -> dict[str, tuple[int, ...]]:
    """List names and shapes of the PyTorch port's Kinetics-400 checkpoint."""
    convolutions = {"Conv3d_1a_7x7": (64, 3, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (192, 64, 3)}
    inputs = 192
    for name, (a, b, c, d, e, f) in PUBLISHED.items():
        convolutions |= {
            f"{name}.b0": (a, inputs, 1),
            f"{name}.b1a": (b, inputs, 1),
            f"{name}.b1b": (c, b, 3),
            f"{name}.b2a": (d, inputs, 1),
            f"{name}.b2b": (e, d, 3),
            f"{name}.b3b": (f, inputs, 1),
        }
        inputs = a + c + e + f
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (outputs, channels, kernel) in convolutions.items():
        shapes[f"{name}.conv3d.weight"] = (outputs, channels, kernel, kernel, kernel)
        shapes |= {f"{name}.bn.{part}": (outputs,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.bn.num_batches_tracked"] = ()
    return shapes | {"logits.conv3d.weight": (400, 1024, 1, 1, 1), "logits.conv3d.bias": (400,)}


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Make up values of a checkpoint."""
    torch.manual_seed(3)
    return {
        name: torch.tensor(7) if name.endswith("num_batches_tracked") else torch.rand(shape)
        for name, shape in shapes.items()
    }


def check_loaded(model: Recognizer, weights: dict[str, Tensor], *, left_out: set[str]) -> None:
    """Check that the backbone holds exactly these weights and nothing else."""
    backbone = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
    assert {f"backbone.{name}" for name in weights.keys() - left_out} == backbone.keys()
    for name, value in backbone.items():
        assert torch.equal(value, weights[name.removeprefix("backbone.")]), name


@pytest.fixture(scope="module")
def kinetics() -> dict[str, Tensor]:
    return draw(kinetics_shapes())


def test_the_list_of_layers_has_the_published_number_of_parameters(kinetics: dict[str, Tensor]) -> None:
    learned = [v for k, v in kinetics.items() if ".running_" not in k and not k.endswith("num_batches_tracked")]
    # 12.3 M and a classifier of 400 actions.
    assert sum(value.numel() for value in learned) == 12_287_264 + 400 * 1025


@pytest.mark.parametrize("kind", [".pt", ".safetensors", "state_dict", "module"])
def test_a_kinetics_checkpoint_loads_with_nothing_missing_but_the_classifier(
    kinetics: dict[str, Tensor], kind: str, tmp_path: Path
) -> None:
    path = tmp_path / ("rgb_imagenet.safetensors" if kind == ".safetensors" else "rgb_imagenet.pt")
    if kind == ".safetensors":
        save_file(kinetics, path)
    elif kind == "state_dict":
        torch.save({"state_dict": kinetics, "epoch": 3}, path)
    else:
        torch.save({f"module.{k}" if kind == "module" else k: v for k, v in kinetics.items()}, path)
    model = I3DTeacher(num_classes=9, norm="frozen", rnn_size=8)
    fresh = {name: value.clone() for name, value in model.head.state_dict().items()}
    said = load_backbone(model, read_weights(path), architecture="i3d", where=str(path))
    check_loaded(model, kinetics, left_out={"logits.conv3d.weight", "logits.conv3d.bias"})
    assert "342 tensors loaded" in said
    assert "left out: 2 tensors of its classifier" in said
    assert all(torch.equal(value, fresh[name]) for name, value in model.head.state_dict().items())


def test_a_fine_tuned_classifier_and_missing_counts_do_no_harm(kinetics: dict[str, Tensor]) -> None:
    weights = {k: v for k, v in kinetics.items() if not k.endswith("num_batches_tracked")}
    weights["logits.conv3d.weight"] = torch.rand(2000, 1024, 1, 1, 1)
    model = I3DTeacher(num_classes=9, norm="frozen", rnn_size=8)
    load_backbone(model, weights, architecture="i3d", where="wlasl.pt")
    assert torch.equal(
        model.backbone.state_dict()["Mixed_4c.b2b.bn.running_var"], weights["Mixed_4c.b2b.bn.running_var"]
    )


def test_group_norm_says_that_it_leaves_the_statistics_out(kinetics: dict[str, Tensor]) -> None:
    model = I3DTeacher(num_classes=9, norm="group", rnn_size=8)
    said = load_backbone(model, kinetics, architecture="i3d", where="k.pt")
    statistics = {k for k in kinetics if ".running_" in k or k.endswith("num_batches_tracked")}
    check_loaded(model, kinetics, left_out={"logits.conv3d.weight", "logits.conv3d.bias"} | statistics)
    assert f"{len(statistics)} statistics of BatchNorm" in said


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "mobilenet_v3_large"])
@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_torchvisions_checkpoint_loads_into_its_student(architecture: str, norm: Norm, tmp_path: Path) -> None:
    published: nn.Module = getattr(import_models(), architecture)()
    torch.save(published.state_dict(), tmp_path / "published.pth")
    weights = read_weights(tmp_path / "published.pth")
    model = MobileNetStudent(architecture=architecture, num_classes=9, norm=norm, rnn_size=8)
    said = load_backbone(model, weights, architecture=architecture, where="published.pth")
    left_out = {name for name in weights if name.startswith("classifier.")}
    if norm == "group":
        left_out |= {k for k in weights if ".running_" in k or k.endswith("num_batches_tracked")}
    check_loaded(model, weights, left_out=left_out)
    assert "4 tensors of its classifier" in said


# What is refused.


def other_architectures(kinetics: dict[str, Tensor]) -> dict[str, tuple[dict[str, Tensor], str]]:
    some = dict(kinetics)
    some.pop("Mixed_5c.b0.conv3d.weight")
    wide = dict(kinetics)
    wide["Mixed_3b.b0.conv3d.weight"] = torch.rand(72, 192, 1, 1, 1)
    return {
        "mobilenet": (import_models().mobilenet_v3_small().state_dict(), "has in excess features.0.0.weight"),
        "incomplete": (some, "lacks Mixed_5c.b0.conv3d.weight"),
        "wider": (wide, "holds Mixed_3b.b0.conv3d.weight [72, 192, 1, 1, 1] instead of [64, 192, 1, 1, 1]"),
    }


@pytest.mark.parametrize("name", ["mobilenet", "incomplete", "wider"])
def test_a_checkpoint_of_another_architecture_is_one_error_and_changes_nothing(
    kinetics: dict[str, Tensor], name: str
) -> None:
    weights, reason = other_architectures(kinetics)[name]
    model = I3DTeacher(num_classes=9, norm="frozen", rnn_size=8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match="another architecture than i3d") as caught:
        load_backbone(model, weights, architecture="i3d", where="other.pt")
    assert len(caught.value.problems) == 1
    assert reason in caught.value.problems[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_of_features_has_no_backbone_to_load(kinetics: dict[str, Tensor]) -> None:
    model = FeatureTeacher(feature_dim=5, num_classes=3, width=0.02, rnn_size=4)
    with pytest.raises(InputError, match=r"k\.pt: is a file of weights, and teacher has no published backbone"):
        load_backbone(model, kinetics, architecture="teacher", where="k.pt")


class Payload:
    """Something that a state dict does not hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pt", b""),
        ("text.pt", b"not a checkpoint"),
        ("model.onnx", b"\x08\x0a\x12\x07pytorch"),
        ("cut.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{"),
        ("code.pt", Payload()),
        ("list.pt", [torch.ones(1)]),
        ("numbers.pt", {"epoch": 3}),
        ("nothing.pt", {}),
    ],
)
def test_a_file_that_holds_no_state_dict_is_refused(
    name: str, content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match="expected a state dict") as caught:
        read_weights(path)
    assert str(path) in caught.value.problems[0]
    assert "weights_only" not in caught.value.problems[0], "advice that would run what is in the file"
    assert not (tmp_path / "touched").exists()


def test_a_truncated_checkpoint_is_refused(kinetics: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"logits.conv3d.bias": kinetics["logits.conv3d.bias"]}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cut\.pt: expected a state dict"):
        read_weights(path)
