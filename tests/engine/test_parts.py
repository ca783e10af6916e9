"""Parts of the engine: gradients that are sent in chunks, and the loss scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.engine import open_engine
from trainer.engine.precision import LossScale, NoLossScale, make_loss_scale
from trainer.engine.replicated import FlatGradients
from trainer.errors import TrainingFailedError
from trainer.parsing import parse_recipe


def test_gradients_lie_in_one_buffer_and_add_up() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    gradients = FlatGradients(list(model.parameters()), world_size=1, chunk_bytes=16)
    for _ in range(2):
        model(torch.ones(5, 3)).sum().backward()
    twice = gradients.buffer.clone()
    assert twice.numel() == sum(p.numel() for p in model.parameters())
    gradients.zero()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    model(torch.ones(5, 3)).sum().backward()
    torch.testing.assert_close(2 * gradients.buffer, twice)
    # The last parameters come first, as the backward pass computes them.
    last = list(model.parameters())[-1]
    assert last.grad is not None
    assert last.grad.data_ptr() == gradients.buffer.data_ptr()


def test_a_scale_halves_at_an_overflow_and_doubles_after_a_run_of_good_steps() -> None:
    ours, theirs = LossScale(growth_interval=3), torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflows in [True, False, False, True, False, False, False, False, False, False, True]:
        (theirs.scale(weight.sum()) * (float("inf") if overflows else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(overflowed=overflows)
        assert ours.value == theirs.get_scale()


def test_the_state_of_a_scale_goes_into_a_checkpoint_and_back() -> None:
    scale = LossScale(value=8.0, good_steps=3)
    other = LossScale()
    other.restore(scale.state())
    assert other == scale
    assert not scale.collapsed
    assert LossScale(value=0.5).collapsed


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_no_other_precision_scales(precision: str) -> None:
    scale = make_loss_scale(precision)  # type: ignore[arg-type]
    assert isinstance(scale, NoLossScale)
    scale.update(overflowed=True)
    assert scale.value == 1.0
    assert scale.state() == {}


def test_a_model_that_does_not_fit_ends_the_run_in_one_line(tmp_path: Path) -> None:
    class Endless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # 2^44 weights that take no memory themselves; their gradients would take 64 TiB.
            self.weight = nn.Parameter(torch.zeros(1).expand(1 << 44))

    recipe = parse_recipe(["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "run")])
    engine = open_engine(recipe)
    with pytest.raises(TrainingFailedError, match=r"not fit into the memory of rank 0 under data parallel") as ended:
        engine.prepare(Endless(), recipe.optimization)
    assert ended.value.local
