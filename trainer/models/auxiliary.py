"""What training alone adds to a model: a classifier of its visual features, a projection onto a teacher's features.

It lies in the head, so that every backend wraps, shards and saves it with the rest, under `head.auxiliary.`; whoever
uses a trained model builds it without, and leaves these weights where they are.
"""

from __future__ import annotations

from torch import Tensor, nn

AUXILIARY = "head.auxiliary."
"""How the names of its weights begin."""

VISUAL = f"{AUXILIARY}visual."
"""Of these, those of the classifier of visual features."""


class Auxiliary(nn.Module):
    """Second outputs of a head: scores of the visual features, and the features that its classifier sees."""

    def __init__(
        self,
        *,
        inputs: int,
        features: int,
        num_classes: int | None = None,
        reveals_features: bool = False,
        teacher_features: int | None = None,
    ) -> None:
        """Take the channels of the head's input and of its classifier's; `num_classes`: classify the former.

        `reveals_features`: return the latter, projected where a teacher's are of another size.
        """
        super().__init__()
        self.reveals_features = reveals_features
        self.visual = nn.Linear(inputs, num_classes) if num_classes else None
        projects = reveals_features and teacher_features not in (None, features)
        self.projection = nn.Linear(features, teacher_features or features) if projects else None

    def forward(self, visual: Tensor, features: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return scores `[M, V]` of `visual` `[M, inputs]`, and `features` `[M, C]` as a teacher's, where asked for."""
        scores = None if self.visual is None else self.visual(visual)
        if not self.reveals_features:
            return scores, None
        return scores, features if self.projection is None else self.projection(features)
