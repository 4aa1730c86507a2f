"""GPTQ and AWQ from the job to the logits, on tiny random models of each family."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.spec import CalibrationSpec, EvaluationSpec
from lowbit_server.models.transformers import place
from lowbit_server.quant.awq import AwqMethod
from lowbit_server.quant.calibrated import Calibrated
from lowbit_server.quant.calibration import Samples
from lowbit_server.quant.layout import blocks, linear_layers
from lowbit_server.quant.schemes import AwqScheme, GptqScheme, LayerBits, RtnScheme
from tests.models.quantkit import FAMILIES, SIZES, Store, dense, random_source, weights

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lowbit_server.quant.schemes import Scheme

TOKENS = 24
CALIBRATION = CalibrationSpec(
    text_inline=tuple(f"Sample {n} says {n * n} and {'so on ' * (n % 7)}." for n in range(80)),
    samples=16,
    sequence_tokens=TOKENS,
)
SCHEMES: list[Scheme] = [
    GptqScheme(bits=2, group_size=32),
    GptqScheme(bits=3),
    GptqScheme(),
    GptqScheme(group_size=-1, sym=True, desc_act=False),
    GptqScheme(bits=8, desc_act=False),
    GptqScheme(layers=(LayerBits(layer=1, bits=8),)),
    AwqScheme(),
    AwqScheme(group_size=32, zero_point=False),
    AwqScheme(group_size=-1),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


class Unchanged(Calibrated):
    """Quantizes nothing: the hidden states must then be the model's own."""

    def _layer(self, number: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for _ in self._stages(self._decoder.layer(number, tensors)):
            pass
        return dict(tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    folder = random_source(tmp_path / "source", **FAMILIES[family])
    tensors = weights(folder)
    ids = torch.randint(0, 250, (5, TOKENS), generator=torch.Generator().manual_seed(0))
    method = Unchanged(folder, Samples(ids, "", ""), "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.inference_mode():
        model(ids)
    for number, block in enumerate(blocks(tensors, linear_layers(folder, tensors))):
        converted = dict(method.convert(block, tensors.__getitem__))
        assert converted.keys() == set(block.tensors)
        if number:
            found, expected = method.state()["hidden"], seen[number - 1]
            # Chunks of another size add up in another order, in bfloat16.
            off = (found.double() - expected.double()).norm() / expected.double().norm()
            assert off < 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=range(len(SCHEMES)))
def test_it_serves_what_the_codes_stand_for(
    scheme: Scheme, family: str, store: Store, tmp_path: Path
) -> None:
    base = store.imported(random_source(tmp_path / "source", **FAMILIES[family]))
    small = store.quantized(scheme, calibration=CALIBRATION)
    ids = torch.arange(1, TOKENS + 1).unsqueeze(0)
    with torch.inference_mode():
        served = place(small, "cpu")(input_ids=ids).logits.double()
        expected = dense(base, small, torch.float64)(ids).logits
        source = AutoModelForCausalLM.from_pretrained(base, dtype="auto")(ids).logits.double()
    # bfloat16 against float64; what quantizing changed is more.
    off = float((served - expected).norm() / expected.norm())
    assert off < 0.05
    if getattr(scheme, "bits", 4) < 8:
        assert float((source - expected).norm() / expected.norm()) > 1.5 * off
    assert store.manifest("small").calibration_digest


@pytest.mark.parametrize("scheme", [GptqScheme(), AwqScheme()], ids=str)
def test_it_loses_less_than_rounding_to_nearest(
    scheme: Scheme, store: Store, tmp_path: Path
) -> None:
    # Layers whose inputs differ in loudness, as those of trained models do.
    source = random_source(tmp_path / "source", **FAMILIES["llama-untied"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    loud = torch.rand(SIZES["hidden_size"], generator=torch.Generator().manual_seed(1)).pow(4)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data = (0.1 + 8 * loud).bfloat16()
        layer.post_attention_layernorm.weight.data = (0.1 + 8 * loud).bfloat16()
    model.save_pretrained(source)
    store.imported(source)
    held_out = EvaluationSpec(
        text_inline=("Another text, which nobody saw. " * 12,), max_tokens=256, window_tokens=32
    )
    for name, one in (("plain", RtnScheme()), ("small", scheme)):
        calibration = CALIBRATION if one is scheme else None
        store.quantized(one, name, evaluation=held_out, calibration=calibration)
    plain, small = store.manifest("plain").quality, store.manifest("small").quality
    assert plain is not None
    assert small is not None
    assert small.mean_kl is not None
    assert plain.mean_kl is not None
    assert small.mean_kl < 0.8 * plain.mean_kl


@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_awq_cancel_out(
    family: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = store.imported(random_source(tmp_path / "source", **FAMILIES[family]))
    # Without rounding, what is folded into one layer must come out of the next.
    kept = {}

    def keep(_: AwqMethod, weight: torch.Tensor, __: torch.Tensor) -> Kept:
        return Kept(weight)

    class Kept:
        def __init__(self, weight: torch.Tensor) -> None:
            self.weight = self.scales = weight

        def tensors(self, name: str) -> dict[str, torch.Tensor]:
            return {f"{name}.weight": self.weight}

    monkeypatch.setattr(AwqMethod, "_round", keep)
    tensors = weights(base)
    ids = torch.randint(0, 250, (8, TOKENS), generator=torch.Generator().manual_seed(0))
    method = AwqMethod(AwqScheme(), base, Samples(ids, "", ""), "cpu")
    for block in blocks(tensors, linear_layers(base, tensors)):
        kept |= dict(method.convert(block, tensors.__getitem__))
    norms = [name for name in tensors if name.endswith("layernorm.weight")]
    assert any(not torch.equal(kept[name], tensors[name]) for name in norms)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto").double()
    with torch.inference_mode():
        expected = model(ids).logits
        model.load_state_dict(
            {name: tensor.double() for name, tensor in kept.items()}, strict=False
        )
        found = model(ids).logits
    # Biases are stored rounded to bfloat16; everything else is exact to float32.
    rounded = any(name.endswith("v_proj.bias") for name in tensors)
    assert (found - expected).norm() / expected.norm() < (3e-3 if rounded else 1e-5)


@pytest.mark.parametrize("scheme", [GptqScheme(group_size=128), AwqScheme(group_size=128)], ids=str)
def test_groups_that_do_not_divide_a_layer_are_refused(
    scheme: Scheme, store: Store, tmp_path: Path
) -> None:
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    with pytest.raises(LowbitError, match=r"down_proj has 128 x 192") as caught:
        store.quantized(scheme, calibration=CALIBRATION)
    assert caught.value.reason is Reason.INVALID_FIELD


def test_a_bias_free_copy_of_the_inputs_is_all_that_is_kept(tmp_path: Path) -> None:
    folder = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    ids = torch.ones(4, TOKENS, dtype=torch.int64)
    method = Unchanged(folder, Samples(ids, "", ""), "cpu")
    tensors = weights(folder)
    first = blocks(tensors, linear_layers(folder, tensors))[0]
    dict(method.convert(first, tensors.__getitem__))
    state = method.state()
    assert state.keys() == {"hidden"}
    expected = functional.embedding(ids, tensors["model.embed_tokens.weight"])
    assert torch.equal(state["hidden"], expected)


@pytest.mark.parametrize(
    ("scheme", "broken"),
    # The scales of AWQ bring a weight of 1e7 back onto a grid.
    [(GptqScheme(), torch.inf), (GptqScheme(), 1e7), (AwqScheme(), torch.inf)],
    ids=lambda one: getattr(one, "name", str(one)),
)
def test_weights_that_no_grid_holds_are_refused_by_name(
    scheme: Scheme, broken: float, store: Store, tmp_path: Path
) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    # The last layer's last product: what flows into every other one stays finite.
    model.model.layers[2].mlp.down_proj.weight.data[3, 5] = broken
    model.save_pretrained(source)
    store.imported(source)
    with pytest.raises(LowbitError, match=r"model\.layers\.2\.mlp\.down_proj\.weight") as caught:
        store.quantized(scheme, calibration=CALIBRATION)
    assert caught.value.reason is Reason.INVALID_FIELD
