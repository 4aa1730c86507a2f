"""What a method is: it turns one block's tensors into those of a scheme.

A method sees whole blocks in order, so that one with calibration can carry the
activations from layer to layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from lowbit_server.quant.layout import Block


class Method(Protocol):
    """Quantizes a model block by block."""

    def convert(
        self, block: Block, read: Callable[[str], torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield names and tensors of a block; `read` returns one of the source's.

        Blocks come in order, each once, and are read to the end.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """Return what the next block needs besides its own tensors, such as activations."""

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on behind the block after which `state` was taken."""

    def quantization_config(self) -> dict[str, Any] | None:
        """Return what config.json says about it, as transformers writes it."""


class Stateless:
    """The state of a method that takes each block for itself."""

    def state(self) -> dict[str, torch.Tensor]:
        """Return nothing."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Have nothing to go on from."""
