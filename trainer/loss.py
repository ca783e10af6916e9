"""The loss of a step: CTC, what a teacher adds, and what an auxiliary classifier of the visual features adds.

Every term is a sum over clips or over frames of a micro-batch, and all of them are divided by the one denominator of
the global batch; a sum over frames is brought to it by `StepShare.per_frame`. No term needs another rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trainer.data.batch import MicroBatch
from trainer.data.vocabulary import BLANK
from trainer.distillation import Distillation, Targets, Undistilled
from trainer.models.recognizer import Recognizer
from trainer.models.temporal_head import Outputs
from trainer.objectives.ctc import ctc_objective
from trainer.objectives.distillation import divergence_sum, soften
from trainer.recipe import ObjectiveRecipe

CTC_LOSS, VISUAL_CTC_LOSS, ALIGNMENT_LOSS = "ctc_loss", "visual_ctc_loss", "alignment_loss"


@dataclass(frozen=True, kw_only=True)
class CellLoss:
    """The loss sum of a micro-batch."""

    total: Tensor
    """What is differentiated."""
    terms: dict[str, Tensor]
    """Its terms before they are weighted, without a gradient; by the names that metrics give them."""


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """The loss that a recipe describes."""

    objective: ObjectiveRecipe
    """Weights of the terms that need no teacher."""
    distillation: Distillation | Undistilled = field(default_factory=Undistilled)
    """The teacher's part."""

    @property
    def names(self) -> tuple[str, ...]:
        """Name the terms that are worth a metric of their own, the same on every rank: none where CTC is the loss."""
        found = [
            *self.distillation.term_names,
            *([VISUAL_CTC_LOSS] if self.objective.visual_ctc_weight else []),
            *([ALIGNMENT_LOSS] if self.objective.alignment_weight else []),
        ]
        return (CTC_LOSS, *found) if found else ()

    def equip(self, model: Recognizer) -> None:
        """Add to a fresh model the outputs that this loss needs beside logits; their weights are drawn now."""
        model.head.add_auxiliary(
            visual=self.objective.classifies_visually,
            reveals_features=self.distillation.compares_features,
            teacher_features=self.distillation.num_features,
        )

    def __call__(self, outputs: Outputs, cell: MicroBatch, targets: Targets | None, *, per_frame: float) -> CellLoss:
        """Return the loss of a cell; `targets` of its clips by the teacher, `per_frame` of the step's share."""
        labels = self.distillation.labels(cell, targets)

        def ctc(logits: Tensor) -> Tensor:
            lengths, smoothing = cell.layout.output_lengths, self.objective.label_smoothing
            return ctc_objective(logits, lengths, labels, cell.partner_labels, smoothing)

        terms = [(CTC_LOSS, self.distillation.ctc_weight, ctc(outputs.logits))]
        terms += self.distillation.terms(outputs, targets, per_frame)
        if self.objective.classifies_visually:
            assert outputs.visual is not None, "the model was built without its auxiliary classifier"
            if self.objective.visual_ctc_weight:
                terms.append((VISUAL_CTC_LOSS, float(self.objective.visual_ctc_weight), ctc(outputs.visual)))
            if self.objective.alignment_weight:
                divergence = self._alignment(outputs.logits, outputs.visual) * (per_frame if cell.clips else 0.0)
                terms.append((ALIGNMENT_LOSS, float(self.objective.alignment_weight), divergence))
        total = terms[0][1] * terms[0][2]
        for _, weight, value in terms[1:]:
            total = total + weight * value
        return CellLoss(total=total, terms={name: value.detach() for name, _, value in terms})

    def _alignment(self, logits: Tensor, visual: Tensor) -> Tensor:
        """Return T^2 times the sum over frames of KL(model || auxiliary classifier); the model is what is learnt from.

        So it is in the code of Min et al. 2021: the gradient reaches the visual features alone, and the distributions
        are those of the glosses, without the blank, which would else be nearly all that there is to agree on.
        """
        temperature = float(self.objective.alignment_temperature)
        model, classifier = logits.detach()[:, BLANK + 1 :], visual[:, BLANK + 1 :]
        return temperature**2 * divergence_sum(classifier, soften(model, temperature), temperature=temperature)
