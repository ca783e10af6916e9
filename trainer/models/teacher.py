"""The teacher over per-frame features: embedded streams, inception network in time, BiLSTM, CTC head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from trainer.layout import TimeLayout
from trainer.models.features import FeatureRecognizer
from trainer.models.inception import Inception, scale_channels
from trainer.models.temporal_head import TemporalHead


class FeatureTeacher(FeatureRecognizer):
    """Map clips of features to gloss logits; about 25 M parameters at D = 6516 and 1,296 classes.

    A clip's logits depend on that clip alone: not on its padding (there is none), not on its batch.
    """

    def __init__(
        self,
        *,
        feature_dim: int,
        num_classes: int,
        total_stride: int = 4,
        width: float = 1.0,
        rnn_size: int = 512,
        rnn_layers: int = 2,
        dropout: float = 0.3,
        streams: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        embedding = scale_channels(512, width)
        super().__init__(feature_dim=feature_dim, channels=embedding, total_stride=total_stride, streams=streams)
        self.inception = Inception(embedding, total_stride, width)
        self.head = TemporalHead(
            self.inception.channels + embedding,
            rnn_size=rnn_size,
            rnn_layers=rnn_layers,
            dropout=dropout,
            num_classes=num_classes,
        )

    def blocks(self) -> list[nn.Module]:
        """Return the embedding, the blocks of the inception network and the head."""
        return [self.embed, *self.inception.blocks(), self.head]

    def in_time(self, x: Tensor, layout: TimeLayout) -> Tensor:
        """Return what the inception network makes of embedded frames."""
        return self.inception(x, layout)
