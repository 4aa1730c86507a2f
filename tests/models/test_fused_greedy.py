"""Greedy text of the fused decoder in the engine equals that of transformers."""

from __future__ import annotations

from functools import partial
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lowbit_server import kernels
from lowbit_server.engine.batching import BatchingEngine
from lowbit_server.engine.request import Request
from lowbit_server.models.fused import FusedModel
from lowbit_server.models.loading import load
from lowbit_server.models.measure import prompt_logits
from tests.models.ties import parts_at_a_tie

if TYPE_CHECKING:
    from pathlib import Path

NEW_TOKENS = 8
PROMPTS = 50


def prompts(folder: Path) -> list[list[int]]:
    """Return beginnings of texts of 4 to 53 tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = sorted(topics.values(), key=len)[-PROMPTS:]
    found = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [ids[: 4 + number] for number, ids in enumerate(found)]


def play(model: FusedModel, requests: list[list[int]], at_once: int) -> list[list[int]]:
    engine = BatchingEngine(model, max_running=at_once, kv_cache_bytes=1 << 28)
    for number, prompt in enumerate(requests):
        engine.submit(Request(number, prompt, NEW_TOKENS))
    made: list[list[int]] = [[] for _ in requests]
    while engine.status().due is not None:
        for output in engine.step():
            assert not output.error
            made[output.request] += output.token_ids
    return made


@pytest.fixture(scope="module")
def fp32(smollm2_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of SmolLM2 with float32 weights."""
    folder = tmp_path_factory.mktemp("smollm2") / "fp32"
    AutoModelForCausalLM.from_pretrained(smollm2_bf16, dtype=torch.float32).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((smollm2_bf16 / "tokenizer.json").read_bytes())
    return folder


def generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
    )
    return made[0, len(prompt) :].tolist()


def test_float32_text_is_the_same_alone_and_in_a_batch(fp32: Path) -> None:
    model = load(fp32, "cpu", 1024)
    assert isinstance(model, FusedModel)
    reference = AutoModelForCausalLM.from_pretrained(fp32)
    wanted = [generate(reference, prompt) for prompt in prompts(fp32)]
    assert play(model, prompts(fp32), at_once=16) == wanted
    assert play(model, prompts(fp32)[::5], at_once=1) == wanted[::5]


def test_bfloat16_text_parts_at_ties_only(smollm2_bf16: Path, fp32: Path) -> None:
    """Logits have eight bits: where the best two are neighbours, any rounding decides.

    Those of transformers itself change there with how its prompt is cut into passes, and with
    them its texts part from float32's: about as many as part here.
    """
    model = load(smollm2_bf16, "cpu", 1024)
    assert isinstance(model, FusedModel)
    reference = AutoModelForCausalLM.from_pretrained(smollm2_bf16, dtype=torch.bfloat16)
    exact = AutoModelForCausalLM.from_pretrained(fp32)
    requests = prompts(smollm2_bf16)
    wanted = [generate(reference, prompt) for prompt in requests]
    parted = sum(
        map(partial(parts_at_a_tie, reference), requests, play(model, requests, 1), wanted)
    )
    theirs = sum(
        generate(exact, prompt) != text for prompt, text in zip(requests, wanted, strict=True)
    )
    assert parted <= 1.5 * theirs


def test_bfloat16_logits_are_as_near_to_float32s_as_transformers_own(smollm2_bf16: Path) -> None:
    dtypes = torch.float32, torch.bfloat16
    exact, reference = (
        AutoModelForCausalLM.from_pretrained(smollm2_bf16, dtype=dtype) for dtype in dtypes
    )
    model = load(smollm2_bf16, "cpu", 1024)
    errors = []
    for prompt in prompts(smollm2_bf16)[::3]:
        with torch.inference_mode():
            wanted, theirs = (
                one(torch.tensor([prompt])).logits[0].float() for one in (exact, reference)
            )
        found = torch.cat([*prompt_logits(model, prompt)]).float()
        errors.append([(one - wanted).abs().mean() for one in (found, theirs)])
    ours, theirs = torch.tensor(errors).mean(0)
    assert ours <= 1.05 * theirs


def test_prompts_in_bfloat16_are_read_bit_for_bit(
    smollm2_bf16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's products, that is; those of short prompts sum in another order."""
    monkeypatch.setattr(kernels, "library", lambda: None)
    model = load(smollm2_bf16, "cpu", 1024)
    reference = AutoModelForCausalLM.from_pretrained(smollm2_bf16, dtype=torch.bfloat16)
    for prompt in prompts(smollm2_bf16)[::7]:
        with torch.inference_mode():
            wanted = reference(torch.tensor([prompt])).logits[0]
        assert torch.equal(next(prompt_logits(model, prompt)), wanted)
