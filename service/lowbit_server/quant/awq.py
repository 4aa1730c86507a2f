"""AWQ: scales up the weights of loud inputs before rounding, and their source down.

Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", sections 3.2 (scaling) and 3.3; clipping as in its reference implementation.
Imports torch and transformers: for job processes only.
"""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from lowbit_server.quant import awq_packing
from lowbit_server.quant.awq_packing import AwqLinear
from lowbit_server.quant.calibrated import Calibrated, stacked
from lowbit_server.quant.decoder import DOWN, GATE_UP, OUTPUT, QKV
from lowbit_server.quant.grids import between, check_finite, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from lowbit_server.quant.calibration import Samples
    from lowbit_server.quant.schemes import AwqScheme

# Exponents that are tried, of the inputs' magnitude and of the weights'.
_STEPS = 10
# Shares of a group's range that are tried, from all of it down.
_SHARES = [1 - step / 20 for step in range(11)]
# Rows of a weight, evenly spread, whose errors choose between scales; all would take longer.
_ROWS = 512
# Where each stage's scales go: the layer before it, whose outputs shrink by them.
_BEFORE = {
    QKV: "input_layernorm",
    (OUTPUT,): "self_attn.v_proj",
    GATE_UP: "post_attention_layernorm",
    (DOWN,): "mlp.up_proj",
}


class AwqMethod(Calibrated):
    """Searches scales and clipping on the output error over all calibration tokens."""

    magnitudes = True

    def __init__(self, scheme: AwqScheme, source: Path, samples: Samples, device: str) -> None:
        """Quantize the model of a folder on a device; `samples` show how it is used."""
        super().__init__(source, samples, device)
        self._scheme = scheme

    def quantization_config(self) -> dict[str, Any]:
        """Return what config.json says about it."""
        return awq_packing.quantization_config(self._scheme.group_size)

    def _layer(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layer = self._decoder.layer(number, tensors)
        changed = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        grams = {}
        # The next layer sees what the source's weights give: scales are about the model as
        # it is, not about errors that came before.
        for names, inputs in self._stages(layer):
            gram = inputs.mean()
            scales = rows = self._search(names, changed, gram, inputs.magnitude())
            if names == (OUTPUT,):
                rows = self._heads(scales)[:, 0].flatten()
            scales = _fold(_BEFORE[names], names, scales, rows, changed)
            grams[names] = gram / torch.outer(scales, scales)
        for names, gram in grams.items():
            for linear in names:
                weight = changed.pop(f"{linear}.weight").float()
                rounded = self._round(weight, gram)
                check_finite(f"model.layers.{number}.{linear}.weight", rounded.scales)
                changed |= rounded.tensors(linear)
        return changed

    def _search(
        self, names: Sequence[str], tensors: Mapping[str, Tensor], gram: Tensor, loud: Tensor
    ) -> Tensor:
        """Return scales (in) of a stage's inputs that leave the smallest output error."""
        weight = stacked(names, tensors)
        heavy = weight.abs().mean(dim=0)
        if names == (OUTPUT,):
            # Heads that share values share the rows that make them.
            heads = [self._heads(one) for one in (loud, heavy)]
            loud, heavy = (one.mean(dim=1, keepdim=True).expand_as(one).flatten() for one in heads)
        weight = weight[:: math.ceil(len(weight) / _ROWS)]
        best, smallest = torch.ones_like(loud), torch.inf
        for step, duo in product(range(_STEPS), (False, True)):
            share = step / _STEPS
            scales = loud.clamp(min=1e-4) ** share
            if duo:
                scales /= heavy.clamp(min=1e-4) ** (1 - share)
            scales /= (scales.max() * scales.min()).sqrt()
            change = self._nearest(weight * scales) / scales - weight
            error = float(((change @ gram) * change).sum())
            if error < smallest:
                best, smallest = scales, error
        return best

    def _heads(self, inputs: Tensor) -> Tensor:
        """Return the output layer's inputs (in) as (value heads, heads that share, size)."""
        return inputs.view(self._decoder.value_heads, -1, self._decoder.head_size)

    def _nearest(self, weight: Tensor) -> Tensor:
        """Return a weight (out, in) rounded to nearest in groups, float32."""
        parts = self._parts(weight)
        scales, zeros = self._grid(parts, 1)
        codes = nearest(parts, scales, zeros, awq_packing.BITS)
        return _values(codes, scales, zeros).reshape(-1, len(weight)).T

    def _round(self, weight: Tensor, gram: Tensor) -> AwqLinear:
        """Round a scaled weight (out, in), each group's range cut where its output gains."""
        parts = self._parts(weight)
        groups, size, _ = parts.shape
        # What a group's own error does to the output; that between groups averages out.
        own = gram.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        smallest = torch.full_like(parts[:, 0], torch.inf)
        chosen = torch.ones_like(smallest)
        for share in _SHARES:
            scales, zeros = self._grid(parts, share)
            codes = nearest(parts, scales, zeros, awq_packing.BITS)
            change = _values(codes, scales, zeros) - parts
            error = ((own @ change) * change).sum(dim=1)
            chosen = torch.where(error < smallest, share, chosen)
            smallest = torch.minimum(error, smallest)
        scales, zeros = self._grid(parts, chosen)
        codes = nearest(parts, scales, zeros, awq_packing.BITS)
        return AwqLinear.of(codes.reshape(-1, len(weight)), zeros, scales)

    def _parts(self, weight: Tensor) -> Tensor:
        """Return a weight (out, in) in groups, (groups, size, out)."""
        size = weight.shape[1] if self._scheme.group_size == -1 else self._scheme.group_size
        return weight.T.reshape(-1, size, len(weight))

    def _grid(self, parts: Tensor, share: float | Tensor) -> tuple[Tensor, Tensor]:
        low, high = parts.amin(dim=1) * share, parts.amax(dim=1) * share
        return between(low, high, awq_packing.BITS, sym=not self._scheme.zero_point)


def _values(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return grid points, float32 (groups, size, out)."""
    return (codes - zeros[:, None]) * scales.float()[:, None]


def _fold(
    before: str, names: Sequence[str], scales: Tensor, rows: Tensor, tensors: dict[str, Tensor]
) -> Tensor:
    """Divide the outputs of the layer before by `rows` and multiply the weights' columns.

    Returns the columns' scales (in) as they really are: a norm's weights are stored rounded,
    and the linear layers make up for that.
    """
    source = tensors[f"{before}.weight"]
    if source.dim() == 1:
        stored = (source.float() / rows).to(source.dtype)
        scales = torch.where(stored == 0, scales, source.float() / stored.float())
        tensors[f"{before}.weight"] = stored
    else:
        tensors[f"{before}.weight"] = source.float() / rows[:, None]
        if (bias := tensors.get(f"{before}.bias")) is not None:
            tensors[f"{before}.bias"] = (bias.float() / rows).to(bias.dtype)
    for name in names:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() * scales
    return scales
