"""Checkpoints that others made in the layouts of GPTQ and AWQ, from import to logits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.models.grouped import PACKED_ROWS, GroupedLinear
from lowbit_server.models.measure import live_bytes
from lowbit_server.models.products import ProductLinear
from lowbit_server.models.transformers import TransformersModel, place
from lowbit_server.quant.awq_packing import AwqLinear, quantization_config
from lowbit_server.quant.dynamic import overrides
from lowbit_server.quant.packing import PackedLinear
from lowbit_server.quant.schemes import AwqScheme, GptqScheme, LayerBits
from tests.models.quantkit import (
    FAMILIES,
    Store,
    config,
    grouped_checkpoint,
    random_source,
    rounded,
    weights,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def deviates(found: Any, expected: Any, tokens: int) -> float:
    ids = torch.arange(1, tokens + 1).unsqueeze(0) % 250
    with torch.inference_mode():
        one, two = found(input_ids=ids).logits.double(), expected(input_ids=ids).logits.double()
    return ((one - two).norm() / two.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "scheme",
    [AwqScheme(group_size=32), AwqScheme(zero_point=False), AwqScheme(group_size=-1)],
    ids=lambda one: f"g{one.group_size}",
)
def test_awq_checkpoints_are_served(
    scheme: AwqScheme, family: str, store: Store, tmp_path: Path
) -> None:
    options = FAMILIES[family] | {"max_position_embeddings": 256}
    source = random_source(tmp_path / "source", **options)
    said = quantization_config(scheme.group_size) | {"zero_point": scheme.zero_point}

    def quantize(_: str, weight: torch.Tensor) -> AwqLinear:
        return AwqLinear.of(*rounded(weight, 4, scheme.group_size, sym=not scheme.zero_point))

    foreign, expected = grouped_checkpoint(source, tmp_path / "foreign", said, quantize)
    folder = store.imported(foreign, "foreign")
    manifest = store.manifest("foreign")
    assert manifest.scheme == scheme
    assert manifest.parameters == sum(tensor.numel() for tensor in weights(source).values())
    model = place(folder, "cpu")
    assert sum(isinstance(one, GroupedLinear | ProductLinear) for one in model.modules()) == 3 * 7
    for tokens in (9, PACKED_ROWS + 30):  # both kernels
        assert deviates(model, expected, tokens) <= 0.03
    TransformersModel(model, 256)  # it passes the engine's own check


def test_layers_may_have_bits_of_their_own(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    layers = (LayerBits(layer=0, bits=8), LayerBits(layer=2, bits=3))
    bits = {f"model.layers.{one.layer}.": one.bits for one in layers}
    said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}

    def quantize(name: str, weight: torch.Tensor) -> PackedLinear:
        found = next((bits[start] for start in bits if name.startswith(start)), 4)
        return PackedLinear.of(found, *rounded(weight, found, 64, sym=False))

    foreign, expected = grouped_checkpoint(
        source, tmp_path / "foreign", said | {"dynamic": overrides(layers)}, quantize
    )
    folder = store.imported(foreign, "foreign")
    manifest = store.manifest("foreign")
    assert manifest.scheme == GptqScheme(desc_act=False, layers=layers)
    assert manifest.parameters == sum(tensor.numel() for tensor in weights(source).values())
    model = place(folder, "cpu")
    assert deviates(model, expected, 9) <= 0.03
    first, second = model.model.layers[0].mlp.up_proj, model.model.layers[1].mlp.up_proj
    assert 1.7 <= live_bytes(first) / live_bytes(second) <= 2  # scales and points are the same


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"version": "gemv"}, "quantization is none that can be served"),
        ({"bits": 8}, "quantization is none that can be served"),
        ({"group_size": 16}, "quantization is none that can be served"),
    ],
    ids=str,
)
def test_awq_of_other_forms_is_refused_before_work(
    change: dict[str, Any], wrong: str, store: Store, tmp_path: Path
) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    text = json.dumps(config(source) | {"quantization_config": quantization_config(64) | change})
    (source / "config.json").write_text(text)
    with pytest.raises(LowbitError, match=wrong) as caught:
        store.imported(source)
    assert caught.value.reason is Reason.SOURCE_UNSUPPORTED
