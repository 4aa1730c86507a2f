"""Bits that differ from layer to layer, as gptqmodel and vLLM read them in config.json.

`dynamic` maps patterns to overrides. The first one that matches a module's name from its
start counts; "+:" may lead it, and "-:" leads those of layers that are not quantized.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lowbit_server.quant.schemes import LayerBits

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_DECODER_LAYER = re.compile(r"\D*\.(\d+)\.")


def overrides(layers: Iterable[LayerBits]) -> dict[str, dict[str, int]]:
    """Return the `dynamic` that gives decoder layers their own bits."""
    return {rf"+:\D*\.{one.layer}\.": {"bits": one.bits} for one in layers}


def bits_of(config: Mapping[str, Any], name: str) -> int:
    """Return the bits of a quantized layer; raises re.error for a pattern that is none."""
    for pattern, values in (config.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:"), name):  # "-:" matches no name
            return values.get("bits", config["bits"])  # type: ignore[no-any-return]
    return config["bits"]  # type: ignore[no-any-return]


def mixed_layers(config: Mapping[str, Any], names: Iterable[str]) -> tuple[LayerBits, ...]:
    """Return the decoder layers that hold other bits than the rest, in order.

    `names` are those of quantized layers. A decoder layer with several counts by its highest.
    """
    found: dict[int, int] = {}
    for name in names:
        if match := _DECODER_LAYER.match(name):
            number = int(match[1])
            found[number] = max(found.get(number, 0), bits_of(config, name))
    return tuple(
        LayerBits.model_validate({"layer": number, "bits": bits})
        for number, bits in sorted(found.items())
        if bits != config["bits"]
    )
