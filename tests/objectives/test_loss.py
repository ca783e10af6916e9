"""The loss of a cell: its terms written out, sums that add up over any cells, and what each gradient reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.batch import MicroBatch, make_labels
from trainer.distillation import Answer, Distillation
from trainer.layout import lay_out
from trainer.loss import CellLoss, StepLoss
from trainer.models.temporal_head import Outputs
from trainer.objectives.distillation import align_features
from trainer.recipe import DistillationRecipe, ObjectiveRecipe

CLASSES, CHANNELS, STRIDE = 6, 4, 4
FRAMES, GLOSSES, WEIGHTS = (21, 9, 33), ([1, 2], [3], [4, 5, 1]), (0.5, 1.0, 0.25)
OUTPUTS = [-(-frames // STRIDE) for frames in FRAMES]
VAC = ObjectiveRecipe(visual_ctc_weight=0.8, alignment_weight=2.5, alignment_temperature=4.0)


class Told:
    """A teacher that says what it was told, of the clips that it is asked about."""

    where, fingerprint, protocol, total_stride, num_features = "told", "told", "plain", STRIDE, CHANNELS
    wer: float | None = None

    def answer(self, cell: MicroBatch, *, made_up: bool) -> Answer:
        logits, features = (draw(seed, columns).split(OUTPUTS) for seed, columns in ((8, CLASSES), (9, CHANNELS)))
        return Answer(
            log_probs=torch.cat([logits[clip] for clip in cell.clips]).log_softmax(dim=-1),
            features=torch.cat([features[clip] for clip in cell.clips]),
        )


def draw(seed: int, columns: int) -> Tensor:
    return 2 * torch.randn(sum(OUTPUTS), columns, generator=torch.Generator().manual_seed(seed))


def made() -> Outputs:
    """What a model makes of all clips."""
    return Outputs(
        *(draw(seed, columns).requires_grad_() for seed, columns in ((1, CLASSES), (2, CLASSES), (3, CHANNELS)))
    )


def cell_of(*clips: int) -> MicroBatch:
    return MicroBatch(
        features=torch.zeros(sum(FRAMES[clip] for clip in clips), 3),
        layout=lay_out(np.array([FRAMES[clip] for clip in clips]), STRIDE),
        labels=make_labels([np.array(GLOSSES[clip]) for clip in clips], np.array([WEIGHTS[clip] for clip in clips])),
        partner_labels=None,
        clips=clips,
    )


def loss_of(loss: StepLoss, outputs: Outputs, *clips: int, per_frame: float = 0.3) -> CellLoss:
    part = outputs.each(lambda rows: torch.cat([rows.split(OUTPUTS)[clip] for clip in clips]))
    cell = cell_of(*clips)
    return loss(part, cell, loss.distillation.targets(cell), per_frame=per_frame)


def taught(blank_weight: float = 1.0) -> StepLoss:
    recipe = DistillationRecipe(teacher="told", feature_weight=0.7, distill_blank_weight=blank_weight)
    return StepLoss(objective=VAC, distillation=Distillation(Told(), recipe, total_stride=STRIDE))


def kl(target: Tensor, found: Tensor, temperature: float) -> Tensor:
    """Each frame's divergence, in float64 and by torch's own."""
    p, q = (F.log_softmax(one.detach().double() / temperature, dim=-1) for one in (target, found))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1)


def ctc(logits: Tensor) -> Tensor:
    losses = [
        F.ctc_loss(
            part.log_softmax(-1)[:, None], torch.tensor([glosses]), (len(part),), (len(glosses),), reduction="sum"
        )
        for part, glosses in zip(logits.detach().double().split(OUTPUTS), GLOSSES, strict=True)
    ]
    return (torch.tensor(WEIGHTS).double() * torch.stack(losses)).sum()


def test_visual_ctc_and_alignment_are_what_is_written_out() -> None:
    outputs = made()
    found = loss_of(StepLoss(objective=VAC), outputs, 0, 1, 2)
    assert outputs.visual is not None
    expected = {
        "ctc_loss": ctc(outputs.logits),
        "visual_ctc_loss": ctc(outputs.visual),
        "alignment_loss": 0.3 * 4.0**2 * kl(outputs.logits[:, 1:], outputs.visual[:, 1:], 4.0).sum(),
    }
    assert found.terms.keys() == expected.keys() == set(StepLoss(objective=VAC).names)
    for name, value in expected.items():
        assert found.terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    total = expected["ctc_loss"] + 0.8 * expected["visual_ctc_loss"] + 2.5 * expected["alignment_loss"]
    assert found.total.item() == pytest.approx(total.item(), rel=1e-5)


def test_features_are_compared_by_their_angle_and_blank_frames_count_as_in_the_divergence() -> None:
    outputs = made()
    assert outputs.features is not None
    theirs = Told().answer(cell_of(0, 1, 2), made_up=False)
    assert theirs.features is not None
    distances = 1 - F.cosine_similarity(outputs.features.detach().double(), theirs.features.double())
    is_blank = theirs.log_probs.argmax(dim=-1) == 0
    assert 0 < is_blank.sum() < len(is_blank)
    for weight in (1.0, 0.25, 0.0):
        expected = 0.3 * (distances * torch.where(is_blank, weight, 1.0)).sum()
        found = loss_of(taught(weight), outputs, 0, 1, 2).terms["feature_loss"]
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cut_into_any_cells_losses_and_gradients_add_up() -> None:
    whole, cut, loss = made(), made(), taught(0.3)
    expected = loss_of(loss, whole, 0, 1, 2)
    expected.total.backward()
    parts = [loss_of(loss, cut, 1), loss_of(loss, cut, 2, 0)]
    for part in parts:
        part.total.backward()
    assert set(loss.names) == expected.terms.keys()
    assert len(loss.names) == 5
    for name, value in expected.terms.items():
        assert value.item() > 0.1
        assert sum(part.terms[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-6), name
    for one, other in zip(whole, cut, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)


def test_alignment_moves_the_visual_classifier_alone() -> None:
    outputs = made()
    alone = StepLoss(objective=ObjectiveRecipe(alignment_weight=3.0))
    loss_of(alone, outputs, 0, 1, 2).total.backward()
    plain = made()
    loss_of(StepLoss(objective=ObjectiveRecipe()), plain, 0, 1, 2).total.backward()
    assert outputs.visual is not None
    assert outputs.visual.grad is not None
    assert outputs.logits.grad is not None
    assert plain.logits.grad is not None
    assert outputs.visual.grad.abs().max() > 0.01
    torch.testing.assert_close(outputs.logits.grad, plain.logits.grad, rtol=0, atol=0)


def test_the_silent_frame_of_a_rank_without_a_clip_adds_nothing_and_reaches_every_weight() -> None:
    parts = [torch.randn(1, columns).requires_grad_() for columns in (CLASSES, CLASSES, CHANNELS)]
    silent = MicroBatch(
        features=torch.zeros(4, 3),
        layout=lay_out(np.array([4]), STRIDE),
        labels=make_labels([np.array([1])], np.array([0.0])),
        partner_labels=None,
        clips=(),
    )
    loss = taught()
    found = loss(Outputs(*parts), silent, loss.distillation.targets(silent), per_frame=0.3)
    found.total.backward()
    assert found.total.item() == 0
    for part in parts:
        # A backend whose ranks send gradients layer by layer waits for one that has none.
        assert part.grad is not None
        assert not part.grad.any()


def test_a_teachers_features_of_another_stride_are_laid_over_the_students_frames() -> None:
    fine = torch.arange(5 + 2.0)[:, None].repeat(1, 2)
    # Of 9 and 3 input frames at stride 2: 5 and 2 frames, under 3 and 1 of stride 4.
    assert align_features(fine, (9, 3), stride=2, to_stride=4)[:, 0].tolist() == [0.5, 2.5, 4.0, 5.5]
    coarse = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    assert align_features(coarse, (9, 3), stride=4, to_stride=2)[:, 0].tolist() == [10, 10, 20, 20, 30, 40, 40]
    assert align_features(coarse, (9, 3), stride=4, to_stride=4) is coarse
