"""Greedy texts in bfloat16: where the best two logits are neighbours, any rounding decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def parts_at_a_tie(
    reference: Any, prompt: Sequence[int], made: Sequence[int], wanted: Sequence[int]
) -> bool:
    """Whether a text parts from the reference's; assert that it does so at neighbours only."""
    pairs = enumerate(zip(made, wanted, strict=False))
    place = next((at for at, pair in pairs if len({*pair}) > 1), None)
    if place is None:
        assert len(made) == len(wanted)
        return False
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *wanted[:place]]])
        logits = reference(ids).logits[0, -1].float()
    ours, theirs = float(logits[made[place]]), float(logits[wanted[place]])
    assert abs(ours - theirs) <= max(ours, theirs) * torch.finfo(torch.bfloat16).eps
    return True
