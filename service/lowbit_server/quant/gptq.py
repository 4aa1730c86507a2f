"""GPTQ: rounds column by column and lets the columns that follow make up for the error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1. Imports torch and transformers: for job processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.calibrated import Calibrated, stacked
from lowbit_server.quant.decoder import ACTIVATIONS
from lowbit_server.quant.dynamic import overrides
from lowbit_server.quant.grids import check_finite, fitted
from lowbit_server.quant.packing import PackedLinear, quantization_config

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from lowbit_server.quant.calibration import Samples
    from lowbit_server.quant.schemes import GptqScheme

# Columns whose errors reach the later ones in one product.
_BLOCK = 128


class GptqMethod(Calibrated):
    """Quantizes linear layers that share their input as one, each stage on the last one's."""

    def __init__(self, scheme: GptqScheme, source: Path, samples: Samples, device: str) -> None:
        """Quantize the model of a folder on a device; `samples` show how it is used."""
        super().__init__(source, samples, device)
        self._scheme = scheme
        self._bits = {layer.layer: layer.bits for layer in scheme.layers}
        self._losses: list[float] = []

    @property
    def losses(self) -> tuple[float, ...]:
        """How much each finished layer lost: its linear layers' relative output errors, added."""
        return tuple(self._losses)

    def quantization_config(self) -> dict[str, Any]:
        """Return what config.json says about it."""
        config = quantization_config(self._scheme)
        if self._scheme.layers:
            config["dynamic"] = overrides(self._scheme.layers)
        return config

    def state(self) -> dict[str, Tensor]:
        """Return the hidden states and the losses."""
        return super().state() | {"losses": torch.tensor(self._losses, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from the state behind a block."""
        super().restore(state)
        self._losses = state["losses"].tolist()

    def _layer(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        bits = self._bits.get(number, self._scheme.bits)
        layer = self._decoder.layer(number, tensors)
        converted = dict(tensors)
        loss = 0.0
        for names, inputs in self._stages(layer):
            gram = inputs.mean()
            weight = stacked(names, tensors).to(self._device)
            *whole, lost = quantize(weight, gram, bits, self._scheme)
            loss += lost / _energy(weight, gram)
            rows = [len(converted.pop(f"{linear}.weight")) for linear in names]
            for linear, *parts in zip(
                names, *(torch.split(one, rows, 1) for one in whole), strict=True
            ):
                packed = PackedLinear.of(bits, *parts)
                check_finite(f"model.layers.{number}.{linear}.weight", packed.scales)
                converted |= packed.tensors(linear)
                layer.replace(linear, packed.dequantized(ACTIVATIONS))
        self._losses.append(loss)
        return converted


def _energy(weight: Tensor, gram: Tensor) -> float:
    """Return the mean square of a weight's outputs (out, in) for inputs of a Gram matrix."""
    return float(((weight @ gram) * weight).sum().clamp(min=torch.finfo(torch.float32).tiny))


def quantize(
    weight: Tensor, gram: Tensor, bits: int, scheme: GptqScheme
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Quantize a weight (out, in) whose inputs have the mean X^T X `gram` (in, in).

    Returns codes uint8 (in, out), zero points int32 and scales fp16 (groups, out), and the
    mean square of what the outputs lost, with `damp` counted as noise of the inputs.

    With `desc_act`, columns go in order of falling mean square of their inputs (the
    reference implementation's "act order") on grids that are fixed before ("static
    groups"), so that groups stay runs of neighbouring columns. Without it, each group's
    grid is laid when its turn comes, over weights that have taken up earlier errors.
    Grids are `fitted` to the weights, each as important as its input is loud.
    """
    columns, rows = weight.shape[1], weight.shape[0]
    size = columns if scheme.group_size == -1 else scheme.group_size
    work = weight.float().T.contiguous()
    diagonal = gram.diagonal()
    importance = diagonal + scheme.damp * diagonal.mean()
    # An input that is always zero has no say; its weights round like any others.
    gram = gram + torch.diag((diagonal == 0).float())
    order = torch.arange(columns, device=weight.device)
    scales = torch.empty(columns // size, rows, dtype=torch.float16, device=weight.device)
    zeros = torch.empty(columns // size, rows, dtype=torch.int32, device=weight.device)
    if scheme.desc_act:
        parts = work.reshape(-1, size, rows)
        scales, zeros = fitted(parts, importance.view(-1, size, 1), bits, sym=scheme.sym)
        order = diagonal.argsort(descending=True, stable=True)
        work, gram = work[order], gram[order][:, order]
    factor = inverse_factor(gram, scheme.damp)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=weight.device)
    last, lost = 2**bits - 1, 0.0
    steps, offsets = scales.float(), zeros.float()
    places = order.tolist()
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        part = work[start:end]
        rounded, errors = torch.empty_like(part), torch.empty_like(part)
        within = factor[start:end, start:end]
        pivots = within.diagonal().tolist()
        for index in range(end - start):
            column = start + index
            group = places[column] // size
            if not scheme.desc_act and column % size == 0:
                ahead = work[None, column : column + size]
                loud = importance[None, column : column + size, None]
                laid = fitted(ahead, loud, bits, sym=scheme.sym)
                scales[group], zeros[group] = (one[0] for one in laid)
                steps[group], offsets[group] = scales[group].float(), zeros[group].float()
            step, offset = steps[group], offsets[group]
            value, code, error = part[index], rounded[index], errors[index]
            torch.div(value, step, out=code).round_().add_(offset).clamp_(0, last)
            torch.sub(code, offset, out=error).mul_(step)
            torch.sub(value, error, out=error).div_(pivots[index])
            part[index + 1 :].addr_(within[index, index + 1 :], error, alpha=-1)
        codes[order[start:end]] = rounded.to(torch.uint8)
        lost += float(errors.square().sum())
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes, zeros, scales, lost


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Return the upper triangular U with U^T U = (gram + damp * mean diagonal)^-1, float32.

    With the order of rows and columns turned around, the lower Cholesky factor L of the
    matrix gives it as L^-1 turned around: no inverse is formed. Where `damp` leaves the
    matrix indefinite to float32, it grows tenfold.

    Raises LowbitError(SOURCE_CORRUPT) when the inputs were no finite numbers.
    """
    if not bool(gram.isfinite().all()):
        raise LowbitError(Reason.SOURCE_CORRUPT, "activations of the source overflow")
    mean = float(gram.diagonal().mean())
    while True:
        damped = gram + torch.eye(len(gram), device=gram.device) * (damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            break
        damp *= 10
    unit = torch.eye(len(gram), device=gram.device)
    factor: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
    return factor.flip(0, 1)
