"""Imports of folders and GGUF files, held against what transformers itself reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.schemes import Bnb4BitScheme, FloatScheme, GptqScheme
from lowbit_server.store.sources import shards
from tests.models.quantkit import FAMILIES, SIZES, Store, config, random_source, same, weights

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_folders_come_over_as_they_are(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["qwen2-biases"])
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        (source / name).write_text("{}")
    for name in ("README.md", "pytorch_model.bin", "modeling.py", "vocab.json"):
        (source / name).write_text("")
    result = store.imported(source)
    assert same(weights(result), weights(source))
    assert {file.name for file in result.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "lowbit.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
    }
    manifest = store.manifest("base")
    model = AutoModelForCausalLM.from_pretrained(result, dtype="auto")
    assert manifest.architecture == type(model).__name__
    assert manifest.parameters == model.num_parameters()
    assert (manifest.context_tokens, manifest.vocab_size) == (64, 256)
    assert manifest.scheme == FloatScheme(type="bf16")
    assert manifest.source == str(source)


def test_the_source_digest_follows_the_source(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    store.imported(source, "one")
    store.imported(source, "two")
    (source / "generation_config.json").write_text("{}")
    store.imported(source, "three")
    digests = [store.manifest(name).source_digest for name in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]
    assert store.manifest("one").revision == store.manifest("two").revision


def test_weights_are_cast_when_asked(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", torch.float32, **FAMILIES["llama-untied"])
    result = store.imported(source, kind="bf16")
    expected = {name: tensor.bfloat16() for name, tensor in weights(source).items()}
    assert same(weights(result), expected)
    assert config(result)["dtype"] == "bfloat16"
    assert store.manifest("base").scheme == FloatScheme(type="bf16")


def test_sharded_folders_are_read(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "plain", **FAMILIES["llama-untied"])
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    assert len(shards(tmp_path / "sharded")) > 2
    (source / "tokenizer.json").rename(tmp_path / "sharded" / "tokenizer.json")
    assert same(weights(store.imported(tmp_path / "sharded")), weights(source))


@pytest.mark.parametrize(
    ("generation", "own", "expected"),
    [
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, (5, 6)),
        ({"eos_token_id": 5}, {}, (5,)),
        ({}, {"eos_token_id": 7}, (7,)),
        (None, {"eos_token_id": None}, (256,)),
    ],
)
def test_end_tokens_are_found(
    generation: dict[str, Any] | None,
    own: dict[str, Any],
    expected: tuple[int, ...],
    store: Store,
    tmp_path: Path,
) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    (source / "config.json").write_text(json.dumps(config(source) | {"eos_token_id": None} | own))
    (source / "generation_config.json").unlink()
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    store.imported(source)
    assert store.manifest("base").eos_token_ids == expected


def test_a_missing_fast_tokenizer_is_made(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    vocabulary = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    (source / "tokenizer.json").unlink()
    with pytest.raises(LowbitError) as caught:
        store.imported(source, "none")
    assert caught.value.reason is Reason.SOURCE_UNSUPPORTED
    (source / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": 256}))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    result = store.imported(source)
    made = Tokenizer.from_file(str(result / "tokenizer.json"))
    assert made.decode(made.encode("héllo wörld").ids) == "héllo wörld"
    assert not (result / "vocab.json").exists()


def test_foreign_quantization_is_described(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", quantization_config=settings)
    model.save_pretrained(tmp_path / "foreign")
    (source / "tokenizer.json").rename(tmp_path / "foreign" / "tokenizer.json")
    result = store.imported(tmp_path / "foreign")
    manifest = store.manifest("base")
    scheme = Bnb4BitScheme(quant_type="nf4", compute_type="fp32", double_quant=False)
    assert manifest.scheme == scheme
    assert manifest.parameters == AutoModelForCausalLM.from_pretrained(source).num_parameters()
    assert same(weights(result), weights(tmp_path / "foreign"))
    AutoModelForCausalLM.from_pretrained(result, dtype="auto")
    with pytest.raises(LowbitError) as caught:
        store.imported(tmp_path / "foreign", "cast", "fp32")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_gptq_folders_are_described_and_odd_ones_refused(store: Store, tmp_path: Path) -> None:
    source = random_source(tmp_path / "source", **FAMILIES["llama-tied"])
    save_file({"q.qweight": torch.zeros(16, 128, dtype=torch.int32)}, source / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}
    text = config(source)
    (source / "config.json").write_text(json.dumps(text | {"quantization_config": settings}))
    store.imported(source)
    assert store.manifest("base").scheme == GptqScheme(desc_act=False)
    assert store.manifest("base").parameters == 128 * 128
    odd = {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(text | odd))
    with pytest.raises(LowbitError, match="fp8") as caught:
        store.imported(source, "odd")
    assert caught.value.reason is Reason.SOURCE_UNSUPPORTED


def test_a_real_gguf_is_what_transformers_reads(
    smollm2_gguf: Path, smollm2_bf16: Path, store: Store
) -> None:
    result = store.imported(smollm2_gguf)
    assert same(weights(result), weights(smollm2_bf16))
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (result / name).read_text() == (smollm2_bf16 / name).read_text()
    ours, theirs = (
        AutoConfig.from_pretrained(folder).to_dict() for folder in (result, smollm2_bf16)
    )
    for key in ("_name_or_path", "_model_name_or_path", "transformers_version", "unk_token_id"):
        ours.pop(key, None)
        theirs.pop(key, None)
    assert ours == theirs
    manifest = store.manifest("base")
    assert (manifest.architecture, manifest.eos_token_ids) == ("LlamaForCausalLM", (2,))
    assert (manifest.context_tokens, manifest.vocab_size) == (8192, 49152)
    assert manifest.parameters == 134_515_008
    ids = AutoTokenizer.from_pretrained(result)("The capital of France is")["input_ids"]
    assert (
        ids == AutoTokenizer.from_pretrained(smollm2_bf16)("The capital of France is")["input_ids"]
    )


ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
}


def write_gguf(path: Path, source: Path) -> None:
    """Write a folder's model the way llama.cpp's converter does."""
    settings = config(source)
    kind = settings["model_type"]
    heads = {"q_proj": settings["num_attention_heads"], "k_proj": settings["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    if kind == "qwen3":
        writer.add_key_length(settings["head_dim"])
    writer.add_rope_freq_base(settings["rope_parameters"]["rope_theta"])
    if kind == "starcoder2":
        writer.add_layer_norm_eps(settings["norm_epsilon"])
    else:
        writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    vocabulary = Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    writer.add_tokenizer_model("gpt2")
    # A merge must have a token to make, so the last byte gives up its place for one.
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_token_list([*tokens[:-1], "ab"])
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(7)
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], settings["num_hidden_layers"])
    for name, tensor in weights(source).items():
        values = tensor.float().numpy()
        part = name.split(".")[-2]
        if kind == "llama" and part in heads:
            rows = values.reshape(heads[part], 2, -1, values.shape[1])
            values = np.ascontiguousarray(rows.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gguf_architectures_come_back(kind: str, head: str, store: Store, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model_type": kind, "tie_word_embeddings": head == "tied"}
    if kind == "qwen3":
        options["head_dim"] = 2 * SIZES["hidden_size"] // SIZES["num_attention_heads"]
    source = random_source(tmp_path / "source", torch.float32, **options)
    write_gguf(tmp_path / "model.gguf", source)
    result = store.imported(tmp_path / "model.gguf", kind="fp32")
    assert same(weights(result), weights(source))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (result, source)]
    with torch.inference_mode():
        ours, theirs = (model(torch.arange(40).unsqueeze(0)).logits for model in models)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert store.manifest("base").eos_token_ids == (7,)
    assert store.manifest("base").vocab_size == 256


def test_gguf_with_scaled_rotation_is_refused(store: Store, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("rope_freqs.weight", np.ones(16, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LowbitError, match="rotary") as caught:
        store.imported(tmp_path / "model.gguf")
    assert caught.value.reason is Reason.SOURCE_UNSUPPORTED


def test_gguf_without_the_needed_keys_is_corrupt(store: Store, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LowbitError, match="attention") as caught:
        store.imported(tmp_path / "model.gguf")
    assert caught.value.reason is Reason.SOURCE_CORRUPT
