"""Imports a GGUF file: dequantizes it into safetensors and makes its tokenizer.

The Llama family is converted directly, tensor by tensor, which needs little memory and
no model code. Every other architecture goes through transformers as a whole.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.describing import GENERATION_FILE
from lowbit_server.quant.casting import FLOAT_TYPES, cast, type_name
from lowbit_server.store.gguf import read_gguf
from lowbit_server.store.sealing import disk_full_is_named
from lowbit_server.store.sources import CONFIG_FILE
from lowbit_server.store.tensors import TensorWriter

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.jobs.report import Reporter
    from lowbit_server.quant.schemes import FloatType
    from lowbit_server.store.gguf import GgufHeader, GgufTensor

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Biases of these layers always come with the architecture; others need a config of their own.
_BIASES = {"qwen2": {"attn_q", "attn_k", "attn_v"}}


def import_gguf(path: Path, staging: Path, kind: FloatType, reporter: Reporter) -> int:
    """Write weights, configs and tokenizer into `staging`; return the number of parameters.

    Raises LowbitError: SOURCE_CORRUPT, SOURCE_UNSUPPORTED, DISK_FULL.
    """
    header = read_gguf(path)
    try:
        if _is_direct(header):
            parameters = _convert(path, header, staging, kind, reporter)
        else:
            parameters = _through_transformers(path, staging, kind, reporter)
        _write_tokenizer(path, staging)
    except LowbitError:
        raise
    except OSError:
        raise
    except Exception as error:  # the libraries raise nearly anything for files they cannot read
        message = f"{path} cannot be read: {type(error).__name__}: {error}"
        raise LowbitError(Reason.SOURCE_CORRUPT, message[:500]) from error
    return parameters


def _is_direct(header: GgufHeader) -> bool:
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if "rope_freqs.weight" in {tensor.name for tensor in header.tensors} or scaling != "none":
        message = "its rotary embedding is scaled: import the safetensors original instead"
        raise LowbitError(Reason.SOURCE_UNSUPPORTED, message)
    return header.architecture in _ARCHITECTURES and all(
        _name(tensor.name, header.architecture) for tensor in header.tensors
    )


def _name(name: str, architecture: str) -> str | None:
    """Return a tensor's name in a Hugging Face checkpoint, None for one that is unknown."""
    if name in _OUTER:
        return _OUTER[name]
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _LAYER:
            return f"model.layers.{layer}.{_LAYER[part]}.weight"
        case ["blk", layer, part, "bias"] if part in _BIASES.get(architecture, ()):
            return f"model.layers.{layer}.{_LAYER[part]}.bias"
    return None


def _convert(
    path: Path, header: GgufHeader, staging: Path, kind: FloatType, reporter: Reporter
) -> int:
    config = _config(header, kind)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    data = np.memmap(path, mode="r", dtype=np.uint8)
    reporter.phase("download", len(header.tensors))
    parameters = 0
    with TensorWriter(staging, len(header.tensors)) as writer:
        for done, tensor in enumerate(header.tensors, 1):
            values = _values(data, tensor)
            part = tensor.name.split(".")[-2]
            if header.architecture == "llama" and part in heads:
                values = _unpermute(values, heads[part])
            name = _name(tensor.name, header.architecture) or ""
            writer.write(name, cast(name, values, FLOAT_TYPES[kind]))
            parameters += values.numel()
            reporter.progress(done, writer.bytes)
    _write_json(staging / CONFIG_FILE, config)
    special = {key: config[key] for key in config if key.endswith("_token_id")}
    _write_json(staging / GENERATION_FILE, special)
    return parameters


def _config(header: GgufHeader, kind: FloatType) -> dict[str, Any]:
    def value(key: str, default: object = None) -> Any:  # noqa: ANN401  (kinds differ by key)
        found = header.metadata.get(f"{header.architecture}.{key}", default)
        if found is None:
            message = f"its metadata has no {header.architecture}.{key}"
            raise LowbitError(Reason.SOURCE_CORRUPT, message)
        return found

    heads, width = value("attention.head_count"), value("embedding_length")
    tokenizer = {
        name: header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    names = {tensor.name: tensor for tensor in header.tensors}
    return {
        "architectures": [_ARCHITECTURES[header.architecture]],
        "model_type": header.architecture,
        "dtype": type_name(kind),
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", width // heads),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": value("rope.freq_base", 10000.0),
        },
        "max_position_embeddings": value("context_length"),
        "vocab_size": names["token_embd.weight"].shape[0],
        # llama.cpp leaves the output product out when it is the embedding.
        "tie_word_embeddings": "output.weight" not in names,
        **{f"{name}_token_id": token for name, token in tokenizer.items() if token is not None},
    }


def _values(data: np.ndarray[Any, np.dtype[np.uint8]], tensor: GgufTensor) -> torch.Tensor:
    """Return a tensor as float32."""
    blocks = data[tensor.begin : tensor.begin + tensor.bytes]
    rows = blocks.reshape(*tensor.shape[:-1], -1)
    values = dequantize(rows, GGMLQuantizationType(tensor.type))
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q or k, (heads * head_dim, in), with each head's halves apart again.

    llama.cpp interleaves the two halves of a head for its own rotary embedding.
    """
    rows = weight.shape[0]
    paired = weight.reshape(heads, rows // heads // 2, 2, *weight.shape[1:])
    return paired.transpose(1, 2).reshape(weight.shape)


def _through_transformers(path: Path, staging: Path, kind: FloatType, reporter: Reporter) -> int:
    from transformers import AutoModelForCausalLM, GgufConfig  # noqa: PLC0415  (slow to import)

    reporter.phase("download")
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=FLOAT_TYPES[kind],
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
    )
    with disk_full_is_named(staging):
        model.save_pretrained(staging, max_shard_size="2GB")
    return int(model.num_parameters())


def _write_tokenizer(path: Path, staging: Path) -> None:
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415  (slow to import)
    from transformers.integrations.gguf import (  # noqa: PLC0415
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    architecture, vocabulary, config = get_gguf_tokenizer(str(path))
    backend, extra = convert_gguf_tokenizer(architecture, vocabulary)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **config, **extra)
    with disk_full_is_named(staging):
        tokenizer.save_pretrained(staging)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with disk_full_is_named(path.parent):
        path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
