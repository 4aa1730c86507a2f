"""What the transformers path accepts, refuses and notices."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from lowbit_server.models import blocks, rows
from lowbit_server.models.decoder import LayerShape
from lowbit_server.models.transformers import TransformersModel, UnsupportedModelError, place
from tests.sequences import Sequences

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lowbit_server.models.decoder import Span

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SMALL | {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


def build(config: transformers.PreTrainedConfig) -> Any:
    torch.manual_seed(3)
    rows.register_masks()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_it_learns_the_shape_of_the_state() -> None:
    spec = TransformersModel(build(transformers.LlamaConfig(**LLAMA)), 100).spec
    assert spec.layers == (LayerShape(heads=2, key_dim=8, value_dim=8),) * 2
    assert (spec.context_tokens, spec.vocab_size) == (100, 64)
    assert spec.dtype is torch.float32
    assert spec.token_bytes == 2 * 2 * (8 + 8) * 4


def test_the_context_stays_where_rotary_angles_are_constant() -> None:
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = build(transformers.LlamaConfig(**LLAMA, rope_parameters=rope))
    assert TransformersModel(model, 128).spec.context_tokens == 32


@pytest.mark.parametrize(
    "config",
    [
        # State that is not keys and values, positions that cannot be set, own masks.
        transformers.MambaConfig(**SMALL),
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
        transformers.FalconConfig(**SMALL),
        transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    ],
)
def test_what_cannot_run_in_rows_is_refused(config: transformers.PreTrainedConfig) -> None:
    with pytest.raises(UnsupportedModelError, match="is not supported"):
        TransformersModel(build(config), 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_logits_in_a_batch_are_noticed(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = build(transformers.LlamaConfig(**LLAMA)).to(dtype)
    TransformersModel(model, 128)

    class Careless(blocks.Rows):
        """Lets all rows begin where the first one begins."""

        def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
            super().__init__([replace(span, start=spans[0].start) for span in spans], device)

    monkeypatch.setattr(blocks, "Rows", Careless)
    with pytest.raises(UnsupportedModelError, match="logits in a batch are off"):
        TransformersModel(model, 128)


def test_a_model_of_nan_is_refused() -> None:
    model = build(transformers.LlamaConfig(**LLAMA))
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(UnsupportedModelError, match="off by nan"):
        TransformersModel(model, 128)


def test_rows_see_only_their_own_tokens() -> None:
    model = TransformersModel(build(transformers.LlamaConfig(**LLAMA)), 128)
    texts = [[1, 2, 3, 4, 5, 8], [6, 7, 9]]
    together = Sequences(model, 2)
    for row, text in enumerate(texts):
        together.feed(*([],) * row, text[:-1])
    found = together.feed(*[text[-1:] for text in texts])
    for row, text in enumerate(texts):
        torch.testing.assert_close(found[row], Sequences(model, 1).feed(text)[-1])


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = build(transformers.LlamaConfig(**LLAMA))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        place(tmp_path, "cpu")


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**LLAMA).to_dict()
    config |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "own.py").write_text("raise SystemExit('code was run')")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="own"):
        place(tmp_path, "cpu")
