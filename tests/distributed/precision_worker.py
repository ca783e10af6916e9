"""Train as `trainer.train` does, on a machine where rank 1's torch has no fp16 kernel for a layer."""

from __future__ import annotations

import os
from typing import Any

import torch

import trainer.train
from trainer.exits import exit_on_input_error


def main() -> int:
    """Let linear layers refuse fp16 as torch does where it has no kernel, then train."""
    linear = torch.nn.functional.linear

    def without_half(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return linear(*args, **kwargs)

    if os.environ["RANK"] == "1":
        torch.nn.functional.linear = without_half
    return trainer.train.main()


if __name__ == "__main__":
    exit_on_input_error(main)
