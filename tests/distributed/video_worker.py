"""Take one step of each video model over three clips, whoever holds them, and write its weights: OUT FLAGS…"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from trainer.engine import open_engine
from trainer.layout import lay_out
from trainer.models.build import build_model
from trainer.models.norms import FrozenBatchNorm
from trainer.parsing import parse_recipe

_LENGTHS = (9, 4, 7)
_KINDS = (("i3d", "group"), ("i3d", "frozen"), ("mobilenet_v3_small", "frozen"), ("mobilenet_v3_small", "group"))


def main(out: str, *flags: str) -> None:
    """Split the clips over the ranks, two passes each at the most and as many on all of them."""
    small = ["--width", "0.02", "--rnn_size", "8", "--rnn_layers", "1", "--optimizer", "sgd", "--gradient_clip", "0"]
    recipe = parse_recipe([*small, *flags], check=False)
    engine = open_engine(recipe)
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randint(0, 256, (n, 24, 24, 3), dtype=torch.uint8, generator=generator) for n in _LENGTHS]
    states = {}
    for architecture, norm in _KINDS:
        model_recipe = parse_recipe([*small, "--model", architecture, "--norm", norm], check=False).model
        torch.manual_seed(1)
        model = build_model(model_recipe, feature_dim=0, num_classes=5)
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm) and module.running_mean is not None:
                module.running_mean.normal_()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        engine.prepare(model, recipe.optimization)
        engine.training(True)
        passes = -(-len(clips) // engine.world_size)
        own = clips[engine.rank :: engine.world_size]
        for number in range(passes):
            # A rank without a clip computes an output frame of weight zero.
            frames, weight = (own[number], 1.0) if number < len(own) else (torch.zeros(4, 24, 24, 3).byte(), 0.0)
            logits = engine.forward(frames, lay_out(np.array([len(frames)]), 4)).logits
            engine.backward(weight * logits.square().sum(), 10.0, is_last=number + 1 == passes)
        engine.end_passes()
        assert engine.update(0.1, 0.0).applied
        state, _ = engine.full_state()
        states |= {f"{architecture}/{norm}/{name}": value for name, value in state.items()}
        if engine.is_main:
            # A weight that did not move would agree with anything.
            still = {name for name, value in before.items() if torch.equal(value, state[name])}
            assert still == {name for name, _ in model.named_buffers()}, still
    if engine.is_main:
        save_file(states, Path(out))
    engine.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
