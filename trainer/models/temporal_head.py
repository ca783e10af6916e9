"""The head that every model shares: BiLSTM layers over output frames, then a score for each gloss and the blank."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trainer.layout import TimeLayout
from trainer.models.auxiliary import Auxiliary
from trainer.models.dropout import ClipDropout


class Outputs(NamedTuple):
    """What a model makes of a micro-batch, clip after clip; a tuple, since backends look for tensors in those."""

    logits: Tensor
    """Scores of the blank and the glosses, `[M, V]`."""
    visual: Tensor | None = None
    """The same from the visual features alone, without context, where the head has a classifier of these."""
    features: Tensor | None = None
    """What the classifier sees, `[M, C]`, before dropout, in the size of a teacher's; where the head reveals it."""

    def each(self, function: Callable[[Tensor], Tensor]) -> Outputs:
        """Map all that is there."""
        visual, features = (None if part is None else function(part) for part in (self.visual, self.features))
        return Outputs(function(self.logits), visual, features)


class TemporalHead(nn.Module):
    """BiLSTM and classifier over laid-out frames `[L / stride, inputs]`."""

    def __init__(self, inputs: int, *, rnn_size: int, rnn_layers: int, dropout: float, num_classes: int) -> None:
        super().__init__()
        sizes = [inputs] + [2 * rnn_size] * rnn_layers
        # One module a layer, because dropout between the layers must be ours.
        self.rnn = nn.ModuleList(nn.LSTM(size, rnn_size, bidirectional=True) for size in sizes[:-1])
        self.dropout = nn.ModuleList(ClipDropout(dropout, salt) for salt in range(rnn_layers + 1))
        self.classifier = nn.Linear(sizes[-1], num_classes)
        self.auxiliary: Auxiliary | None = None
        self._inputs, self._num_classes = inputs, num_classes
        for lstm in self.rnn:
            for name, parameter in lstm.named_parameters():
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(parameter)
                if name.startswith("bias_ih"):
                    # Forget gates start open (Jozefowicz et al. 2015); gate order is input, forget, cell, output.
                    nn.init.ones_(parameter.data[rnn_size : 2 * rnn_size])

    @property
    def num_features(self) -> int:
        """Return the channels that the classifier sees."""
        return self.classifier.in_features

    def add_auxiliary(
        self, *, visual: bool = False, reveals_features: bool = False, teacher_features: int | None = None
    ) -> None:
        """Add second outputs, whose weights are drawn now; asked for nothing, add none."""
        if visual or reveals_features:
            self.auxiliary = Auxiliary(
                inputs=self._inputs,
                features=self.num_features,
                num_classes=self._num_classes if visual else None,
                reveals_features=reveals_features,
                teacher_features=teacher_features,
            )

    def forward(self, x: Tensor, layout: TimeLayout) -> Outputs:
        """Return scores, and what `add_auxiliary` asked for, clip after clip."""
        x = self.dropout[0](x.index_select(0, layout.rnn_positions), layout.row_seeds)
        visual, features = x, x
        for lstm, dropout in zip(self.rnn, self.dropout[1:], strict=True):
            # The fused CPU kernel is taken for some batches only and then changes the order of gradient hooks. Its
            # TF32 switch is left alone: to set it, as is the default here, warns of hardware that is not there.
            with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
                features = lstm(PackedSequence(x, layout.rnn_batch_sizes))[0].data
            x = dropout(features, layout.row_seeds)
        found = Outputs(
            self.classifier(x), *((None, None) if self.auxiliary is None else self.auxiliary(visual, features))
        )
        return found.each(lambda rows: rows.index_select(0, layout.dense_order))
