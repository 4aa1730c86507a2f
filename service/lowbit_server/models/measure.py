"""How many bytes a model's weights take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def live_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all storages that weights, buffers and quantization state use.

    Tied weights count once. bitsandbytes keeps scales and code books in attributes of
    its parameters and layers and repacks weights at the first forward pass: measure
    after that.
    """
    storages = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    todo: list[object] = [*model.modules(), *model.parameters(), *model.buffers()]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        if _holds_state(item):
            todo += vars(item).values()


def _holds_state(item: object) -> bool:
    """Whether an object may hold tensors that torch does not know of."""
    owned = type(item).__module__.startswith("bitsandbytes")
    return hasattr(item, "__dict__") and (owned or isinstance(item, torch.nn.Parameter))
