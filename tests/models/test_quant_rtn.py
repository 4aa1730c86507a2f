"""Round to nearest from the job to the logits, on tiny random models and a real one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.spec import EvaluationSpec
from lowbit_server.models.grouped import PACKED_ROWS, GroupedLinear
from lowbit_server.models.products import ProductLinear
from lowbit_server.models.transformers import TransformersModel, place
from lowbit_server.quant.packing import PackedLinear
from lowbit_server.quant.schemes import GptqScheme, RtnScheme
from lowbit_server.store.tensors import TensorWriter
from tests.models.quantkit import FAMILIES, Store, config, random_source, same, weights

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("qweight", "qzeros", "scales", "g_idx")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def reference(source: Path, small: Path, bits: int) -> Any:
    """Return the source's model with its weights replaced by what the codes stand for."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    tensors = weights(small)
    names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(names) == 3 * 7
    for name in names:
        layer = PackedLinear(bits, *(tensors[f"{name}.{key}"] for key in KEYS))
        weight = model.get_submodule(name).weight
        exact = layer.dequantized(torch.float64)
        # All of it is where it belongs: no weight is further off than half a step.
        steps = layer.scales.double()[layer.g_idx.long()].T
        assert bool(((weight.double() - exact).abs() <= steps * 0.501).all())
        weight.data = exact.to(weight.dtype)
    return model


def logits(model: Any, tokens: int) -> torch.Tensor:
    ids = torch.arange(1, tokens + 1).unsqueeze(0) % 250
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids).logits
    return found.double()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "scheme",
    [
        RtnScheme(bits=2, group_size=32),
        RtnScheme(bits=3),
        RtnScheme(),
        RtnScheme(group_size=32, sym=True),
        RtnScheme(group_size=-1),
        RtnScheme(bits=8),
    ],
    ids=lambda one: f"{one.bits}-{one.group_size}",
)
def test_it_serves_what_the_codes_stand_for(
    scheme: RtnScheme, family: str, store: Store, tmp_path: Path
) -> None:
    options = FAMILIES[family] | {"max_position_embeddings": 256}
    base = store.imported(random_source(tmp_path / "source", **options))
    small = store.quantized(scheme)
    model = place(small, "cpu")
    packed = [one for one in model.modules() if isinstance(one, GroupedLinear | ProductLinear)]
    assert len(packed) == 3 * 7
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == FAMILIES[family]["tie_word_embeddings"]
    expected = reference(base, small, scheme.bits)
    for tokens in (9, PACKED_ROWS + 30):  # both kernels
        wanted, found = logits(expected, tokens), logits(model, tokens)
        deviation = ((found - wanted).norm() / wanted.norm()).item()
        # The same weights in the same modules; only the kernels round differently.
        assert deviation <= 0.03
    TransformersModel(model, 256)  # it passes the engine's own check


def test_the_artefact_is_a_gptq_checkpoint(store: Store, tmp_path: Path) -> None:
    base = store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    scheme = RtnScheme(bits=3, group_size=32, sym=True)
    small = store.quantized(scheme)
    found = config(small)
    assert found["dtype"] == "bfloat16"
    quantization = found["quantization_config"]
    assert quantization.pop("meta")["method"] == "rtn"
    assert quantization == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 3,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
    }
    tensors, source = weights(small), weights(base)
    up = {key: tensors[f"model.layers.0.mlp.up_proj.{key}"] for key in KEYS}
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in up.items()} == {
        "qweight": (torch.int32, (128 * 3 // 32, 192)),
        "qzeros": (torch.int32, (4, 192 * 3 // 32)),
        "scales": (torch.float16, (4, 192)),
        "g_idx": (torch.int32, (128,)),
    }
    kept = {name for name in source if "_proj" not in name}
    assert same({name: tensors[name] for name in kept}, {name: source[name] for name in kept})
    manifest = store.manifest("small")
    assert (manifest.scheme, manifest.parent) == (scheme, "base")
    assert manifest.parameters == store.manifest("base").parameters


def test_it_is_itself_when_imported_again(store: Store, tmp_path: Path) -> None:
    store.imported(random_source(tmp_path / "source", **FAMILIES["qwen2-biases"]))
    small = store.quantized(RtnScheme())
    again = store.imported(small, "again")
    assert store.manifest("again").scheme == RtnScheme()
    assert store.manifest("again").parameters == store.manifest("base").parameters
    assert torch.equal(logits(place(again, "cpu"), 9), logits(place(small, "cpu"), 9))


def test_gptq_checkpoints_of_others_are_served(store: Store, tmp_path: Path) -> None:
    """Columns in activation order, fp16 and biases that the architecture lacks."""
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-untied"]))
    small = store.quantized(RtnScheme(group_size=32))
    expected = logits(place(small, "cpu"), 9)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in ("config.json", "tokenizer.json"):
        (foreign / file).write_text((small / file).read_text().replace('"rtn"', '"other"'))
    tensors = weights(small)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(1))
    with TensorWriter(foreign, len(tensors) + 1) as writer:
        for name, tensor in tensors.items():
            changed = tensor
            if name.endswith("0.self_attn.q_proj.g_idx"):  # the same groups under other numbers
                changed = order.argsort()[tensor.long()].to(torch.int32)
            elif name.endswith(("0.self_attn.q_proj.scales", "0.self_attn.q_proj.qzeros")):
                changed = tensor[order]
            writer.write(name, changed)
        writer.write("model.layers.0.self_attn.q_proj.bias", torch.zeros(128).half())
    folder = store.imported(foreign, "foreign")
    assert isinstance(store.manifest("foreign").scheme, GptqScheme)
    model = place(folder, "cpu")
    assert model.model.layers[0].self_attn.q_proj.order is not None
    deviation = (logits(model, 9) - expected).norm() / expected.norm()
    assert deviation.item() <= 0.03


def test_a_folder_that_does_not_fit_is_refused(store: Store, tmp_path: Path) -> None:
    store.imported(random_source(tmp_path / "source", **FAMILIES["qwen2-biases"]))
    tensors = weights(store.quantized(RtnScheme()))
    changes: list[tuple[str, dict[str, torch.Tensor], set[str]]] = [
        ("no .*up_proj.scales", {}, {"model.layers.1.mlp.up_proj.scales"}),
        ("no .*q_proj.bias", {}, {"model.layers.1.self_attn.q_proj.bias"}),
        ("model.norm.weight", {}, {"model.norm.weight"}),
        ("model.extra.weight", {"model.extra.weight": torch.ones(3)}, set()),
        ("size mismatch", {"model.norm.weight": torch.ones(3)}, set()),
        ("no layer", {"model.other.qweight": torch.ones(3)}, set()),
        ("was expected", {"model.layers.0.mlp.up_proj.g_idx": torch.ones(3)}, set()),
    ]
    for number, (message, extra, without) in enumerate(changes):
        if message == "no layer":
            extra |= {f"model.other.{key}": torch.ones(3) for key in KEYS}
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text((store.models / "small/config.json").read_text())
        with TensorWriter(folder, len(tensors) + len(extra)) as writer:
            for name, tensor in (tensors | extra).items():
                if name not in without:
                    writer.write(name, tensor)
        with pytest.raises(ValueError, match=message):
            place(folder, "cpu")


@pytest.mark.parametrize(
    ("sizes", "scheme", "layer"),
    [
        ({"hidden_size": 96}, RtnScheme(), r"q_proj has 96 x 96"),
        ({"intermediate_size": 208}, RtnScheme(group_size=32), r"gate_proj has 208 x 128"),
        ({}, RtnScheme(group_size=128), r"down_proj has 128 x 192"),
    ],
)
def test_shapes_are_refused_before_work(
    sizes: dict[str, Any], scheme: RtnScheme, layer: str, store: Store, tmp_path: Path
) -> None:
    store.imported(random_source(tmp_path / "source", model_type="llama", **sizes))
    with pytest.raises(LowbitError, match=layer) as caught:
        store.quantized(scheme)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert list((store.models / "small").iterdir()) == []


def test_a_real_model_keeps_its_sense(smollm2_bf16: Path, store: Store) -> None:
    (store.models / "base").symlink_to(smollm2_bf16)
    spec = EvaluationSpec(max_tokens=1024, window_tokens=512)
    store.quantized(RtnScheme(), evaluation=spec)
    quality = store.manifest("small").quality
    assert quality is not None
    print(quality)  # noqa: T201  (shown when a bound is missed)
    assert quality.tokens == 2 * 511
    assert quality.perplexity < 1.6 * quality.base_perplexity
    assert 0.1 < quality.mean_kl < 0.5
    assert quality.top1_agreement > 0.6
