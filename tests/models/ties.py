"""Greedy texts in bfloat16: where the best two logits are neighbours, any rounding decides.

Logits of two programs in bfloat16 differ from float32's by 0.1 in the mean, one step between
neighbours of 16 to 32 (`test_fused_greedy.py` compares ours with transformers' own). So which of
two is greater can be either's word where they are up to two steps apart.
"""

from __future__ import annotations

import math
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
    _, exponent = math.frexp(max(ours, theirs))
    assert abs(ours - theirs) <= 2 * math.ldexp(torch.finfo(torch.bfloat16).eps, exponent - 1)
    return True
