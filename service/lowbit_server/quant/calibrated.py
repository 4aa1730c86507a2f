"""What calibrated methods share: samples that flow through the layers as they are quantized.

Imports torch and transformers: for job processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional

from lowbit_server.quant.decoder import (
    ACTIVATIONS,
    DOWN,
    EMBEDDING,
    GATE_UP,
    OUTPUT,
    QKV,
    Decoder,
    Layer,
)
from lowbit_server.quant.statistics import Gram

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lowbit_server.quant.calibration import Samples
    from lowbit_server.quant.layout import Block

# Enough for products at full speed; little beside the activations of all samples.
_CHUNK_TOKENS = 4096


class Calibrated:
    """Carries the hidden states of all samples, bfloat16 (samples, tokens, hidden)."""

    magnitudes: ClassVar = False
    """Whether a method asks how loud its inputs are."""

    def __init__(self, source: Path, samples: Samples, device: str) -> None:
        """Run `samples` through the model of a folder on a device."""
        self._ids = samples.ids
        self._decoder = Decoder(source, device, samples.ids.shape[1])
        self._device = device
        self._hidden = torch.empty(0, dtype=ACTIVATIONS, device=device)

    def convert(self, block: Block, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield a block's tensors; the hidden states then stand behind it."""
        if not block.linears:
            for name in block.tensors:
                tensor = read(name)
                if name == EMBEDDING:
                    ids = self._ids.to(self._device)
                    self._hidden = functional.embedding(ids, tensor.to(self._device)).to(
                        ACTIVATIONS
                    )
                yield name, tensor
            return
        prefix = f"{block.name}."
        tensors = {name.removeprefix(prefix): read(name) for name in block.tensors}
        with torch.inference_mode():
            converted = self._layer(int(block.name.rpartition(".")[2]), tensors)
        for name, tensor in converted.items():
            yield prefix + name, tensor

    def state(self) -> dict[str, Tensor]:
        """Return the hidden states."""
        return {"hidden": self._hidden}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from the hidden states behind a block."""
        self._hidden = state["hidden"].to(self._device)

    def _layer(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's new tensors by their names inside it, from its old ones."""
        raise NotImplementedError

    def _stages(self, layer: Layer) -> Iterator[tuple[tuple[str, ...], Gram]]:
        """Yield linear layers that share their input, and what flows in, in order.

        Whoever takes a stage may replace its weights before the next, which then sees
        what comes of it. At the end the hidden states stand behind the layer.
        """
        tokens = self._hidden.shape[1]
        chunks = torch.split(self._hidden, max(1, _CHUNK_TOKENS // tokens))
        normed = _each(layer.attention_input, chunks)
        yield QKV, self._gram(normed)
        attended = _each(layer.attention, normed)
        del normed
        yield (OUTPUT,), self._gram(attended)
        _add_projected(layer, OUTPUT, attended, chunks)
        del attended
        yield GATE_UP, self._gram(layer.mlp_input(chunk) for chunk in chunks)
        gated = _each(lambda chunk: layer.mlp(layer.mlp_input(chunk)), chunks)
        yield (DOWN,), self._gram(gated)
        _add_projected(layer, DOWN, gated, chunks)

    def _gram(self, inputs: Iterable[Tensor]) -> Gram:
        gram = Gram(magnitudes=self.magnitudes)
        for part in inputs:
            gram.add(part)
        return gram


def _each(run: Callable[[Tensor], Tensor], chunks: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return what a part of a layer makes of each chunk (samples, tokens, in).

    All are parts of one tensor, whose memory goes back as a whole: the allocator keeps what
    many smaller ones leave, and finds little use for it.
    """
    made: Sequence[Tensor] = ()
    for number, chunk in enumerate(chunks):
        part = run(chunk)
        if not made:
            samples = sum(len(one) for one in chunks)
            made = torch.split(part.new_empty(samples, *part.shape[1:]), len(chunk))
        made[number].copy_(part)
    return made


def _add_projected(
    layer: Layer, name: str, inputs: Sequence[Tensor], chunks: Sequence[Tensor]
) -> None:
    """Add a linear layer's outputs to chunks of the hidden states."""
    for chunk, part in zip(chunks, inputs, strict=True):
        chunk.add_(layer.project(name, part))


def stacked(names: Sequence[str], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the weights of linear layers that share their input as one, float32 (out, in)."""
    return torch.cat([tensors[f"{name}.weight"].float() for name in names])
