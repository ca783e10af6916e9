"""The head that every model shares: BiLSTM layers over output frames, then a score for each gloss and the blank."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from trainer.layout import TimeLayout
from trainer.models.dropout import ClipDropout


class TemporalHead(nn.Module):
    """BiLSTM and classifier over laid-out frames `[L / stride, inputs]`."""

    def __init__(self, inputs: int, *, rnn_size: int, rnn_layers: int, dropout: float, num_classes: int) -> None:
        super().__init__()
        sizes = [inputs] + [2 * rnn_size] * rnn_layers
        # One module a layer, because dropout between the layers must be ours.
        self.rnn = nn.ModuleList(nn.LSTM(size, rnn_size, bidirectional=True) for size in sizes[:-1])
        self.dropout = nn.ModuleList(ClipDropout(dropout, salt) for salt in range(rnn_layers + 1))
        self.classifier = nn.Linear(sizes[-1], num_classes)
        for lstm in self.rnn:
            for name, parameter in lstm.named_parameters():
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(parameter)
                if name.startswith("bias_ih"):
                    # Forget gates start open (Jozefowicz et al. 2015); gate order is input, forget, cell, output.
                    nn.init.ones_(parameter.data[rnn_size : 2 * rnn_size])

    def forward(self, x: Tensor, layout: TimeLayout) -> Tensor:
        """Return logits `[M, V]`, clip after clip."""
        x = self.dropout[0](x.index_select(0, layout.rnn_positions), layout.row_seeds)
        for lstm, dropout in zip(self.rnn, self.dropout[1:], strict=True):
            # The fused CPU kernel is taken for some batches only and then changes the order of gradient hooks. Its
            # TF32 switch is left alone: to set it, as is the default here, warns of hardware that is not there.
            with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
                x = lstm(PackedSequence(x, layout.rnn_batch_sizes))[0].data
            x = dropout(x, layout.row_seeds)
        return self.classifier(x).index_select(0, layout.dense_order)
