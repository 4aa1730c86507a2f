"""Every scheme on tiny random models, held against what transformers itself makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.spec import EvaluationSpec
from lowbit_server.models.transformers import place
from lowbit_server.quant.schemes import Bnb4BitScheme, FloatScheme, Int8Scheme
from tests.models.quantkit import FAMILIES, Store, config, random_source, same, weights

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.quant.schemes import FloatType, Scheme

BNB: dict[str, tuple[Scheme, dict[str, Any]]] = {
    "int8": (Int8Scheme(outlier_threshold=4), {"load_in_8bit": True, "llm_int8_threshold": 4.0}),
    "nf4": (
        Bnb4BitScheme(quant_type="nf4"),
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_use_double_quant": True,
        },
    ),
    "fp4": (
        Bnb4BitScheme(quant_type="fp4", compute_type="fp32", double_quant=False),
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"},
    ),
}
IDS = torch.arange(1, 33).unsqueeze(0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options)
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", BNB)
def test_artefacts_are_those_of_transformers(
    name: str, family: str, store: Store, tmp_path: Path
) -> None:
    scheme, options = BNB[name]
    source = random_source(tmp_path / "source", **FAMILIES[family])
    base = store.imported(source)
    result = store.quantized(scheme)
    # Saved before any forward: on a CPU bitsandbytes repacks weights in place then.
    reference = tmp_path / "reference"
    AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", quantization_config=BitsAndBytesConfig(**options)
    ).save_pretrained(reference)
    assert same(weights(result), weights(reference))
    assert config(result)["quantization_config"] == config(reference)["quantization_config"]
    assert config(result)["dtype"] == "bfloat16"
    assert torch.equal(logits(result), logits(reference))
    assert not torch.equal(logits(result), logits(base))


@pytest.mark.parametrize("name", BNB)
def test_the_manifest_tells_where_it_comes_from(name: str, store: Store, tmp_path: Path) -> None:
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    store.quantized(BNB[name][0])
    base, small = store.manifest("base"), store.manifest("small")
    assert small.scheme == BNB[name][0]
    assert (small.parent, small.source, small.source_digest) == ("base", "base", base.revision)
    assert small.parameters == base.parameters
    assert small.eos_token_ids == base.eos_token_ids
    assert small.revision != base.revision
    assert small.disk_bytes < base.disk_bytes
    assert small.quality is None
    assert small.libraries["bitsandbytes"]


def test_progress_counts_layers(store: Store, tmp_path: Path) -> None:
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    store.quantized(Int8Scheme())
    done = [report for report in store.progress if report.phase == "quantize"][-1]
    # Three decoder layers and what belongs to none.
    assert (done.done, done.total, done.eta_s) == (4, 4, 0)
    saved = [report for report in store.progress if report.phase == "save"][-1]
    assert (saved.done, saved.total) == (4, 4)
    assert 0 < saved.bytes <= store.manifest("small").disk_bytes
    assert done.bytes > saved.bytes  # one file for each layer
    assert store.progress[-1].phase == "save"


@pytest.mark.parametrize("kind", ["fp32", "fp16", "bf16"])
def test_floats_are_cast(kind: FloatType, store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["qwen2-biases"])
    store.imported(source)
    result = store.quantized(FloatScheme(type=kind))
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[kind]
    expected = {name: tensor.to(dtype) for name, tensor in weights(source).items()}
    assert same(weights(result), expected)
    assert "quantization_config" not in config(result)
    assert logits(result).dtype == dtype


def test_values_beyond_fp16_are_refused_by_name(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = -1e6
    model.save_pretrained(source)
    store.imported(source)
    for scheme in (FloatScheme(type="fp16"), Int8Scheme()):
        with pytest.raises(LowbitError, match=r"layers\.1\.mlp\.up_proj") as caught:
            store.quantized(scheme, scheme.name)
        assert caught.value.reason is Reason.INVALID_FIELD


@pytest.mark.parametrize(
    ("sizes", "layer"),
    [
        ({"hidden_size": 96}, r"q_proj has 96 x 96"),
        ({"intermediate_size": 208}, r"gate_proj has 208 x 128"),
    ],
)
def test_shapes_are_refused_before_work(
    sizes: dict[str, Any], layer: str, store: Store, tmp_path: Path
) -> None:
    store.imported(random_source(tmp_path / "source", model_type="llama", **sizes))
    with pytest.raises(LowbitError, match=layer) as caught:
        store.quantized(Bnb4BitScheme(quant_type="nf4"))
    assert caught.value.reason is Reason.INVALID_FIELD
    assert list((store.models / "small").iterdir()) == []
    store.quantized(Int8Scheme(), "int8")


def test_quantized_models_are_refused(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    store.imported(source, "float")
    store.imported(source)
    store.quantized(Int8Scheme())
    (store.models / "base").rename(store.models / "original")
    (store.models / "small").rename(store.models / "base")
    with pytest.raises(LowbitError, match="use its parent base") as caught:
        store.quantized(Int8Scheme(), "again")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_a_checkpoint_that_lacks_a_layer_is_refused(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    folder = store.imported(source)
    text = (folder / "config.json").read_text()
    assert '"num_hidden_layers": 3' in text
    (folder / "config.json").write_text(
        text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4')
    )
    with pytest.raises(LowbitError, match=r"no model\.layers\.3") as caught:
        store.quantized(Int8Scheme())
    assert caught.value.reason is Reason.SOURCE_UNSUPPORTED


def test_quality_is_measured_on_request(store: Store, tmp_path: Path) -> None:
    base = store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    spec = EvaluationSpec(text_inline=("some words that are held out " * 9,), window_tokens=60)
    small = store.quantized(Bnb4BitScheme(quant_type="nf4"), evaluation=spec)
    quality = store.manifest("small").quality
    assert quality is not None
    ids = Tokenizer.from_file(str(base / "tokenizer.json")).encode(spec.text_inline[0]).ids
    windows = [ids[at : at + 60] for at in range(0, len(ids), 60)]
    assert quality.tokens == sum(len(window) - 1 for window in windows)
    for folder, found in ((base, quality.base_perplexity), (small, quality.perplexity)):
        model = place(folder, "cpu")
        nll = 0.0
        for window in windows:
            with torch.inference_mode():
                scores = model(torch.tensor([window])).logits[0, :-1].double().log_softmax(1)
            nll -= float(scores[range(len(window) - 1), window[1:]].sum())
        # Plain modules run on kernels of torch and bitsandbytes, which round otherwise.
        assert found == pytest.approx(torch.tensor(nll / quality.tokens).exp().item(), rel=1e-3)
    done = [report for report in store.progress if report.phase == "evaluate"][-1]
    assert (done.done, done.total) == (len(windows), len(windows))


def test_fp16_is_evaluated_in_fp32_on_a_cpu(store: Store, tmp_path: Path) -> None:
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    folder = store.quantized(FloatScheme(type="fp16"))
    model = place(folder, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    loaded = model.get_parameter("model.norm.weight")
    assert torch.equal(loaded, weights(folder)["model.norm.weight"].float())


def test_a_real_model_is_what_transformers_makes(
    smollm2_bf16: Path, store: Store, tmp_path: Path
) -> None:
    scheme, options = BNB["nf4"]
    (store.models / "base").symlink_to(smollm2_bf16)
    result = store.quantized(scheme)
    reference = tmp_path / "reference"
    AutoModelForCausalLM.from_pretrained(
        smollm2_bf16, dtype="auto", quantization_config=BitsAndBytesConfig(**options)
    ).save_pretrained(reference)
    assert same(weights(result), weights(reference))
    assert torch.equal(logits(result), logits(reference))
