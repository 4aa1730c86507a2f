"""The fused decoder computes what transformers' modules do on the same checkpoint."""

from __future__ import annotations

from ctypes import c_int
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit_server import kernels
from lowbit_server.jobs.spec import CalibrationSpec
from lowbit_server.kernels import products
from lowbit_server.models import attention
from lowbit_server.models.decoder import InterruptedPassError
from lowbit_server.models.fused import FusedModel
from lowbit_server.models.loading import load
from lowbit_server.models.transformers import TransformersModel, place
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    GptqScheme,
    Int8Scheme,
    LayerBits,
    RtnScheme,
)
from tests.models.quantkit import FAMILIES, Store, random_source
from tests.sequences import Sequences

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lowbit_server.quant.schemes import Scheme

CONTEXT = 64
needs_products = pytest.mark.skipif(
    not products.are_there(), reason="this CPU has no products of bfloat16, or no compiler was here"
)
THETA = 10_000.0
SHAPES = FAMILIES | {
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-one-kv-head": {"model_type": "llama", "num_key_value_heads": 1},
    "llama-all-kv-heads": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-3-rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": THETA,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama-linear-rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
    },
    "qwen3-yarn": {
        "model_type": "qwen3",
        "head_dim": 64,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": THETA,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2-some-windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
}
SCHEMES = (
    Int8Scheme(),
    Bnb4BitScheme(quant_type="nf4"),
    Bnb4BitScheme(quant_type="fp4", double_quant=False),
    RtnScheme(bits=8, group_size=32),
    RtnScheme(bits=3, group_size=64, sym=True),
    GptqScheme(group_size=32),
    GptqScheme(group_size=64, layers=(LayerBits(layer=1, bits=8),)),
    GptqScheme(group_size=-1, sym=True),
    AwqScheme(group_size=32),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Keep models this small on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 250, (count,), generator=generator).tolist()


def fused(folder: Path) -> FusedModel:
    model = load(folder, "cpu", CONTEXT)
    assert isinstance(model, FusedModel)
    return model


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def reference(model: Any, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits


@pytest.fixture(params=["compiled", "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Play with the compiled kernels and without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape: str, tmp_path: Path) -> None:
    folder = random_source(tmp_path / "source", torch.float32, **SHAPES[shape])
    model = fused(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    text = tokens(CONTEXT - 1)
    expected = reference(plain, text)
    assert deviation(Sequences(model, 1).feed(text), expected) < 1e-5
    # In chunks, one of them of one token, and then token by token.
    sequences = Sequences(model, 1)
    ends = [5, 6, 20, 45]
    parts = [sequences.feed(text[one:end]) for one, end in zip([0, *ends], ends, strict=False)]
    parts += [sequences.feed([token]) for token in text[ends[-1] :]]
    assert deviation(torch.cat(parts), expected) < 1e-5


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_do_not_see_each_other(shape: str, tmp_path: Path) -> None:
    folder = random_source(tmp_path / "source", torch.float32, **SHAPES[shape])
    model = fused(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    texts = [tokens(length, length) for length in (50, 60, 25, 25)]
    expected = [reference(plain, text) for text in texts]
    sequences = Sequences(model, len(texts))
    for row, length in enumerate((40, 30, 1, 5)):
        sequences.feed(*([],) * row, texts[row][:length])
    # One token each, then some several, then one each again.
    for widths in ((1, 1, 1, 1), (1, 1, 3, 9), (1, 0, 0, 2), (1, 1, 1, 1)):
        pairs = list(zip(sequences.lengths, widths, strict=True))
        found = sequences.feed(
            *[
                text[start : start + width]
                for text, (start, width) in zip(texts, pairs, strict=True)
            ]
        )
        wanted = [
            logits[start : start + width]
            for logits, (start, width) in zip(expected, pairs, strict=True)
        ]
        assert deviation(found, torch.cat(wanted)) < 1e-5


def stepped(model: FusedModel, texts: Sequence[list[int]]) -> torch.Tensor:
    """Return the logits after tokens that come one or a few at a time, after two prompts."""
    sequences = Sequences(model, 2)
    sequences.feed(texts[0][:9], texts[1][:30])
    found = []
    for widths in ((1, 1), (3, 1), (1, 17), (0, 1), (2, 2)):
        spans = [
            text[start : start + width]
            for text, start, width in zip(texts, sequences.lengths, widths, strict=True)
        ]
        found.append(sequences.feed(*spans))
    return torch.cat(found)


@needs_products
@pytest.mark.parametrize("shape", SHAPES)
def test_all_layers_in_one_call_are_as_exact_as_those_of_torch(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_source(tmp_path / "source", torch.bfloat16, **SHAPES[shape])
    model = fused(folder)
    texts = [tokens(60, 1), tokens(60, 2)]
    found = stepped(model, texts)
    monkeypatch.setattr(kernels, "library", lambda: None)
    slow = stepped(fused(folder), texts)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    exact = [reference(plain, text) for text in texts]
    # In the order of `stepped`.
    places = [(0, 9), (1, 30), *((0, at) for at in (10, 11, 12)), (1, 31), (0, 13)]
    places += [*((1, at) for at in range(32, 49)), (1, 49), (0, 14), (0, 15), (1, 50), (1, 51)]
    expected = torch.stack([exact[row][at] for row, at in places])
    assert not torch.equal(found, slow)
    assert deviation(found, expected) < max(1.2 * deviation(slow, expected), 1e-3) < 0.02


@needs_products
@pytest.mark.parametrize("pairs", [0, 1 << 14], ids=["torch's attention", "ours"])
@pytest.mark.parametrize("shape", ["llama-tied", "qwen3-head-norms", "mistral-window"])
def test_prompts_are_read_in_one_pass_with_tokens_of_others(
    shape: str, pairs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_NARROW_PAIRS", pairs)
    folder = random_source(tmp_path / "source", torch.bfloat16, **SHAPES[shape])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    texts = [tokens(60, seed) for seed in range(4)]
    expected = [reference(plain, text) for text in texts]
    sequences = Sequences(fused(folder), 4)
    sequences.feed(texts[0][:9], texts[1][:30])
    found = sequences.feed(texts[0][9:10], texts[1][30:32], texts[2][:50], texts[3][:20])
    wanted = [expected[0][9:10], expected[1][30:32], expected[2][:50], expected[3][:20]]
    assert deviation(found, torch.cat(wanted)) < 0.02
    found = sequences.feed(texts[0][10:11], texts[1][32:33], texts[2][50:51], texts[3][20:40])
    wanted = [expected[0][10:11], expected[1][32:33], expected[2][50:51], expected[3][20:40]]
    assert deviation(found, torch.cat(wanted)) < 0.02


@needs_products
@pytest.mark.parametrize("scheme", SCHEMES, ids=range(len(SCHEMES)))
def test_all_layers_in_one_call_read_quantized_weights(scheme: Scheme, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.imported(random_source(tmp_path / "source", **FAMILIES["qwen2-biases"]))
    calibration = CalibrationSpec(
        text_inline=(" ".join(map(str, range(400))),), samples=4, sequence_tokens=32
    )
    calibrated = isinstance(scheme, GptqScheme | AwqScheme)
    small = store.quantized(scheme, calibration=calibration if calibrated else None)
    model = fused(small)
    assert model._compiled is not None
    text = tokens(CONTEXT - 1)
    sequences = Sequences(model, 1)
    found = [sequences.feed(text[:20]), *(sequences.feed([token]) for token in text[20:])]
    expected = Sequences(TransformersModel(place(small, "cpu"), CONTEXT), 1).feed(text)
    assert deviation(torch.cat(found), expected) < 0.03  # bfloat16, rounded in other places


@needs_products
def test_what_an_interrupted_pass_did_is_done_again(tmp_path: Path) -> None:
    model = fused(random_source(tmp_path / "source", torch.bfloat16, **FAMILIES["llama-tied"]))
    texts = [tokens(20, seed) for seed in range(3)]
    found = []
    for value in (0, 1):
        sequences = Sequences(model, 3)
        sequences.feed(*(text[:10] for text in texts))
        step = [text[10:11] for text in texts]
        if value:
            with pytest.raises(InterruptedPassError):
                sequences.feed(*step, interrupt=c_int(value))
        again = sequences.feed(*step, interrupt=c_int(0))
        found.append(torch.cat([again, sequences.feed(*(text[11:12] for text in texts))]))
    assert torch.equal(*found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=range(len(SCHEMES)))
def test_quantized_weights_are_those_of_the_transformers_path(
    scheme: Scheme, family: str, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    store.imported(random_source(tmp_path / "source", **FAMILIES[family]))
    text = tokens(CONTEXT - 1)
    calibrated = isinstance(scheme, GptqScheme | AwqScheme)
    calibration = CalibrationSpec(
        text_inline=(" ".join(map(str, range(400))),), samples=4, sequence_tokens=32
    )
    small = store.quantized(scheme, calibration=calibration if calibrated else None)
    model = fused(small)
    other = TransformersModel(place(small, "cpu"), CONTEXT)
    found = Sequences(model, 1).feed(text)
    expected = Sequences(other, 1).feed(text)
    assert deviation(found, expected) < 0.03  # bfloat16, rounded in other places
    # Norms of heads lie there once for each head, scales of bitsandbytes' blocks in float32.
    assert model.live_bytes == pytest.approx(other.live_bytes, rel=0.05)


def test_what_is_no_llama_runs_on_transformers(tmp_path: Path) -> None:
    folder = random_source(tmp_path / "source", model_type="gemma2", head_dim=32)
    assert isinstance(load(folder, "cpu", CONTEXT), TransformersModel)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": THETA,
                "factor": 2.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=["activation", "rope"],
)
def test_what_it_does_not_know_runs_on_transformers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = random_source(tmp_path / "source", model_type="llama", **changes)
    assert isinstance(load(folder, "cpu", CONTEXT), TransformersModel)


def test_4_bit_without_its_kernel_runs_on_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    small = store.quantized(Bnb4BitScheme(quant_type="nf4"))
    monkeypatch.setattr(products, "are_there", lambda: False)
    assert isinstance(load(small, "cpu", CONTEXT), TransformersModel)


def test_half_precision_becomes_float32_on_a_cpu(tmp_path: Path) -> None:
    folder = random_source(tmp_path / "source", torch.float16, **FAMILIES["llama-tied"])
    model = fused(folder)
    assert model.spec.dtype is torch.float32
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    text = tokens(20)
    assert deviation(Sequences(model, 1).feed(text), reference(plain, text)) < 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 2}, r"does not fit its architecture: model\.layers\.2"),
        ({"num_hidden_layers": 4}, r"has no model\.layers\.3"),
        ({"intermediate_size": 64}, r"gate_proj\.weight has the shape \(192, 128\)"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_are_named(
    change: dict[str, int], said: str, tmp_path: Path
) -> None:
    folder = random_source(tmp_path / "source", **FAMILIES["llama-untied"])
    config = folder / "config.json"
    text = config.read_text()
    for key, value in change.items():
        old = {"num_hidden_layers": 3, "intermediate_size": 192}[key]
        assert f'"{key}": {old}' in text
        text = text.replace(f'"{key}": {old}', f'"{key}": {value}')
    config.write_text(text)
    with pytest.raises(ValueError, match=said):
        load(folder, "cpu", CONTEXT)
