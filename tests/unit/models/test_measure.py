from __future__ import annotations

import torch
from torch import nn

from lowbit_server.models.measure import live_bytes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.zeros(8, dtype=torch.int8))


def test_tied_weights_count_once_and_buffers_count() -> None:
    assert live_bytes(Tied()) == 10 * 4 * 4 + 8


def test_views_count_their_whole_storage_once() -> None:
    model = Tied()
    model.register_buffer("lower_half", model.table[:4])
    assert live_bytes(model) == 10 * 4 * 4 + 8


def test_the_quantization_state_of_bitsandbytes_counts() -> None:
    bitsandbytes = __import__("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    packed = 64 * 64 // 2
    assert state.absmax.numel() == 64
    known = layer.weight.nbytes + state.absmax.nbytes + state.code.nbytes
    assert known >= packed
    assert live_bytes(nn.Sequential(layer)) >= known
