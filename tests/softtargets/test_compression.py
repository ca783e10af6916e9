"""What is stored of a distribution, and what its compression costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.softtargets.compression import Compression

CLASSES = 50


def draw(frames: int = 40) -> Tensor:
    return (4 * torch.randn(frames, CLASSES, generator=torch.Generator().manual_seed(0))).log_softmax(dim=-1)


def kl(exact: Tensor, stored: Tensor, temperature: float) -> float:
    p, q = ((part.double() / temperature).log_softmax(-1) for part in (exact, stored))
    return float(F.kl_div(q, p, reduction="sum", log_target=True))


def test_float32_is_kept_to_the_bit() -> None:
    one = Compression(dtype="float32")
    assert torch.equal(one.restore(one.compress(draw()), CLASSES), draw())
    assert one.error(draw(), 1.0) == 0.0


@pytest.mark.parametrize("one", [Compression(dtype="float16"), Compression(dtype="float16", top_k=5)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_error_told_is_that_of_what_is_read_back(one: Compression, temperature: float) -> None:
    restored = one.restore(one.compress(draw()), CLASSES)
    assert one.error(draw(), temperature) == pytest.approx(kl(draw(), restored, temperature), rel=1e-9)
    assert one.error(draw(), temperature) > 0


def test_top_k_keeps_the_likeliest_and_the_mass_of_the_rest() -> None:
    one = Compression(dtype="float32", top_k=5)
    restored = one.restore(one.compress(draw()), CLASSES).exp()
    kept = draw().topk(5, dim=-1)
    torch.testing.assert_close(restored.gather(1, kept.indices), kept.values.exp())
    torch.testing.assert_close(restored.sum(dim=-1), torch.ones(40))
    rest = torch.ones_like(restored, dtype=torch.bool).scatter(1, kept.indices, False)
    # What is not kept is alike in every class, and as likely in all as it was.
    for row, mask, exact in zip(restored, rest, draw().exp(), strict=True):
        assert row[mask].std().item() == pytest.approx(0, abs=1e-9)
        assert row[mask].sum().item() == pytest.approx(exact[mask].sum().item(), rel=1e-4)
    # More classes, less error.
    errors = [Compression(dtype="float32", top_k=k).error(draw(), 1.0) for k in (1, 5, 20, 49)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[0]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("top_k", [0, 7])
def test_the_size_told_is_that_of_the_tensors(dtype: str, top_k: int) -> None:
    one = Compression(dtype=dtype, top_k=top_k)  # type: ignore[arg-type]
    size = sum(tensor.nbytes for tensor in one.compress(draw(40)).values())
    assert size == 40 * one.bytes_per_frame(CLASSES)


def test_an_impossible_class_stays_a_number() -> None:
    certain = torch.tensor([[0.0, -1e9, -200000.0]])
    for one in (Compression(dtype="float16"), Compression(dtype="float16", top_k=1)):
        restored = one.restore(one.compress(certain), 3)
        assert bool(restored.isfinite().all())
        assert one.error(certain, 3.0) == pytest.approx(0, abs=1e-6)
