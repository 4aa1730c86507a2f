"""Greedy output of the engine equals `generate` of transformers, token for token."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from lowbit_server.engine.batching import BatchingEngine
from lowbit_server.engine.request import Request
from lowbit_server.models.measure import live_bytes
from lowbit_server.models.transformers import TransformersModel, place
from tests.models.ties import parts_at_a_tie
from tests.sequences import Sequences

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

NEW_TOKENS = 24
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Tied or of the usual size, random weights repeat one token for ever, which shows nothing.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
WINDOW = 16
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=WINDOW),
    "qwen2": transformers.Qwen2Config(**SMALL),
    # Layers with a window between layers without, and one that uses eager attention.
    "gemma3": transformers.Gemma3TextConfig(
        **SMALL | {"num_hidden_layers": 7}, head_dim=16, sliding_window=WINDOW
    ),
    "gemma2": transformers.Gemma2Config(**SMALL, head_dim=16, sliding_window=WINDOW),
}
# Shorter and longer than the window, one of a token, one of more than a chunk.
LENGTHS = (5, 17, 1, 600, 29)


def prompts(vocab: int, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].tolist()


def play(model: TransformersModel, requests: list[list[int]]) -> list[list[int]]:
    """Run all prompts at once; all but the first join while others decode."""
    engine = BatchingEngine(model, max_running=8, kv_cache_bytes=1 << 28)
    for number, prompt in enumerate(requests):
        assert engine.submit(Request(number, prompt, NEW_TOKENS)) == []
    made: list[list[int]] = [[] for _ in requests]
    while engine.status().due is not None:
        for output in engine.step():
            assert not output.error
            made[output.request] += output.token_ids
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep models this small on one thread: waiting for a second costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with random fp32 weights of an architecture."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param])
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, TransformersModel]:
    model = place(folder, "cpu").to(dtype)
    return model, TransformersModel(model, 1024)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_alone_equals_generate(folder: Path, dtype: torch.dtype) -> None:
    model, decoder = load(folder, dtype)
    for prompt in prompts(SMALL["vocab_size"]):
        wanted = generate(model, prompt)
        assert len(set(wanted)) > 3
        (made,) = play(decoder, [prompt])
        # On some CPUs torch's bfloat16 kernels round otherwise for a cache of another layout.
        assert made == wanted or dtype is torch.bfloat16
        parts_at_a_tie(model, prompt, made, wanted)


def test_requests_in_a_batch_equal_generate(folder: Path) -> None:
    model, decoder = load(folder, torch.float32)
    requests = prompts(SMALL["vocab_size"])
    assert play(decoder, requests) == [generate(model, prompt) for prompt in requests]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_weights_run_in_a_batch(kind: str, tmp_path: Path) -> None:
    """The model is compared with itself: `generate` runs the same quantized layers."""
    options: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    torch.manual_seed(7)
    config = transformers.LlamaConfig(**SMALL)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "fp32")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp32",
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(**options),
        device_map="cpu",
    )
    quantized.save_pretrained(tmp_path / kind)

    model = place(tmp_path / kind, "cpu")
    decoder = TransformersModel(model, 1024)
    linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    plain = place(tmp_path / "fp32", "cpu")
    assert live_bytes(model) < live_bytes(plain) - linear
    requests = prompts(SMALL["vocab_size"], lengths=(5, 30, 1))
    made = play(decoder, requests)
    assert made == [generate(model, prompt) for prompt in requests]
    assert made != play(TransformersModel(plain, 1024), requests)


def test_smollm2_alone_equals_generate(smollm2_bf16: Path) -> None:
    model = place(smollm2_bf16, "cpu")
    assert model.dtype is torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_bf16)
    decoder = TransformersModel(model, 2048)
    for text in ("The capital of France is", "def fibonacci(n):", "Once upon a time"):
        prompt = tokenizer(text).input_ids
        assert play(decoder, [prompt]) == [generate(model, prompt)]


def test_smollm2_in_a_batch_stays_close(smollm2_bf16: Path) -> None:
    """The bound on what neighbours change in bf16, where kernels round by batch size."""
    decoder = TransformersModel(place(smollm2_bf16, "cpu"), 2048)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_bf16)
    text = tokenizer(topics["for"] + topics["with"] + topics["import"]).input_ids
    rows, steps = 6, 6
    lengths = [20 + 30 * row for row in range(rows)]
    sequences = [text[40 * row :][: lengths[row] + steps] for row in range(rows)]
    together, alone = (_prefilled(decoder, sequences, lengths) for _ in range(2))
    divergences, deviations = [], []
    for step in range(steps):
        new = [[text[length + step]] for text, length in zip(sequences, lengths, strict=True)]
        found = together.feed(*new)
        wanted = torch.cat([alone.feed(*([],) * row, new[row]) for row in range(rows)])
        deviations += ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).tolist()
        logs, expected = found.log_softmax(-1), wanted.log_softmax(-1)
        divergences += (expected.exp() * (expected - logs)).sum(-1).tolist()
    assert max(deviations) < 0.15
    assert sum(divergences) / len(divergences) < 0.005


def _prefilled(
    decoder: TransformersModel, sequences: list[list[int]], lengths: list[int]
) -> Sequences:
    """Return the first tokens of each sequence, read one by one."""
    found = Sequences(decoder, len(sequences))
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        found.feed(*([],) * row, sequence[:length])
    return found
