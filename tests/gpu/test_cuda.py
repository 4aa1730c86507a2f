"""The same engine on a GPU. Nobody of the project has one: these tests are for those who do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lowbit import Client
from lowbit_server.testing import ServerProcess, byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("scheme", ["bf16", "int8", "nf4"])
def test_a_model_is_quantized_loaded_and_run_on_cuda(scheme: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(source)
    byte_tokenizer().save(str(source / "tokenizer.json"))
    environment = {"LOWBIT_IMPORT_ROOTS": str(tmp_path)}
    server = ServerProcess(tmp_path / "home", "--device", "cuda:0", environment=environment)
    with server, Client(server.address) as client:
        client.wait_job(client.import_model("m", path=str(source)).id)
        client.wait_job(client.quantize("m", "small", scheme).id)
        client.load("small", device="cuda:0").wait()
        stream = client.generate(
            "small", "hello", max_tokens=16, temperature=0, ignore_eos=True, token_ids_output=True
        )
        found = [token for chunk in stream for token in chunk.token_ids]
        model = AutoModelForCausalLM.from_pretrained(
            server.home / "models" / "small", dtype="auto", device_map="cuda:0"
        )
        ids = torch.tensor([byte_tokenizer().encode("hello").ids], device="cuda:0")
        expected = model.generate(
            ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0
        )
        assert found == expected[0, ids.shape[1] :].tolist()
        assert client.unload("small").freed_bytes > 0
