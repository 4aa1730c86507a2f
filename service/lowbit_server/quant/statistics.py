"""What calibrated methods know about a linear layer's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowbit_server.kernels.gram import add_gram

if TYPE_CHECKING:
    from torch import Tensor

# Half of a symmetric matrix is enough; panels of this many columns leave little of the rest.
_PANEL = 256


class Gram:
    """Sums X^T X of inputs X (tokens, in), float32: bfloat16 sums lose positive definiteness.

    The output error of a weight's change D (out, in) on all of these tokens is
    ||X D^T||^2 = tr(D X^T X D^T), so that no token needs to be kept.
    """

    def __init__(self, *, magnitudes: bool) -> None:
        """Begin with no token; sum the inputs' magnitudes only when asked to."""
        self._sum = self._magnitude = torch.zeros(())
        self._magnitudes = magnitudes
        self._tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs (..., in)."""
        inputs = inputs.reshape(-1, inputs.shape[-1])
        if not self._tokens:
            columns = inputs.shape[1]
            self._sum = torch.zeros(columns, columns, device=inputs.device)
        if not add_gram(inputs, self._sum):
            rows = inputs.float()
            for start in range(0, rows.shape[1], _PANEL):
                panel = slice(start, start + _PANEL)
                self._sum[panel, start:].addmm_(rows[:, panel].T, rows[:, start:])
        if self._magnitudes:
            self._magnitude = self._magnitude + inputs.abs().sum(dim=0, dtype=torch.float32)
        self._tokens += len(inputs)

    def mean(self) -> Tensor:
        """Return X^T X / tokens, float32 (in, in)."""
        upper = self._sum.triu()
        return (upper + upper.triu(1).T) / self._tokens

    def magnitude(self) -> Tensor:
        """Return the mean magnitude of each input, float32 (in)."""
        return self._magnitude / self._tokens
