"""Train as `trainer.train` does, with numbers that overflow where the environment says.

LOSS_SCALE, GROWTH_INTERVAL: of the dynamic loss scale. OVERFLOW=gradient: every gradient is infinite; OVERFLOW=loss:
the loss of one micro-batch on rank RANK_OF_IT is.
"""

from __future__ import annotations

import os
from typing import Any

import torch

import trainer.engine.engine
import trainer.loss
import trainer.train
from trainer.engine.precision import LossScale, make_loss_scale
from trainer.exits import exit_on_input_error


def main() -> int:
    """Patch the loss scale and the objective, then train."""

    def scaled(precision: Any) -> LossScale:
        scale = make_loss_scale(precision)
        if scale.is_dynamic:
            scale.value = float(os.environ.get("LOSS_SCALE", scale.value))
            scale.growth_interval = int(os.environ.get("GROWTH_INTERVAL", scale.growth_interval))
        return scale

    trainer.engine.engine.make_loss_scale = scaled
    objective, calls = trainer.loss.ctc_objective, [0]

    def overflowing(*args: Any) -> torch.Tensor:
        calls[0] += 1
        loss = objective(*args)
        kind = os.environ.get("OVERFLOW")
        if kind == "gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        if kind == "loss" and calls[0] == 2 and os.environ["RANK"] == os.environ["RANK_OF_IT"]:
            loss = loss * float("nan")
        return loss

    trainer.loss.ctc_objective = overflowing
    return trainer.train.main()


if __name__ == "__main__":
    exit_on_input_error(main)
