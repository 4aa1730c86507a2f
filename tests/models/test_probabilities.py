"""Log-probabilities and scores of real weights through a server, against transformers."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit import Client
from lowbit_server.testing import ServerProcess
from tests.models.quantkit import random_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from lowbit import Chunk

MODEL = "random"
PROMPT = [11, 200, 3, 77, 140, 9, 9, 250]
CONTEXT_TOKENS = 1600
# Both compute in float32, in another order.
TOLERANCE = 1e-4
HOT = 3.0
"""A temperature at which many tokens are likely."""


@pytest.fixture(scope="module", params=["llama", "olmo2"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in fp32 whose distributions are far from flat.

    One that the fused decoder runs, and one that transformers' modules run.
    """
    folder = tmp_path_factory.mktemp("probabilities") / "source"
    random_source(
        folder,
        torch.float32,
        model_type=request.param,
        initializer_range=0.3,
        max_position_embeddings=CONTEXT_TOKENS,
    )
    return folder


@pytest.fixture(scope="module")
def client(source: Path) -> Iterator[Client]:
    """A client of a server that has it live."""
    environment = {"LOWBIT_IMPORT_ROOTS": str(source.parent)}
    with (
        ServerProcess(source.parent / "home", environment=environment) as server,
        Client(server.address) as client,
    ):
        client.wait_job(client.import_model(MODEL, path=str(source)).id)
        client.load(MODEL).wait()
        yield client


@pytest.fixture(scope="module")
def reference(source: Path) -> Any:
    """The same weights in transformers."""
    return AutoModelForCausalLM.from_pretrained(source, local_files_only=True)


def tokens_of(chunks: Iterable[Chunk]) -> list[int]:
    """Return the ids of all tokens of chunks."""
    return [token for chunk in chunks for token in chunk.token_ids]


def distributions(reference: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Return the float64 log-softmax after each token."""
    with torch.inference_mode():
        return reference(torch.tensor([list(tokens)])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_those_of_the_models_own_logits(
    client: Client, reference: Any, temperature: float
) -> None:
    stream = client.generate(
        MODEL,
        token_ids=PROMPT,
        max_tokens=12,
        ignore_eos=True,
        temperature=temperature,
        top_k=3,
        repetition_penalty=1.5,
        logit_bias={40: 4.0},
        seed=3,
        logprobs=5,
    )
    chunks = list(stream)
    made = tokens_of(chunks)
    logprobs = [one for chunk in chunks for one in chunk.logprobs]
    top = [one for chunk in chunks for one in chunk.top_logprobs]
    assert len(made) == len(logprobs) == len(top) == 12
    wanted = distributions(reference, [*PROMPT, *made])[len(PROMPT) - 1 :]
    for position, token in enumerate(made):
        assert logprobs[position] == pytest.approx(wanted[position, token].item(), abs=TOLERANCE)
        best = wanted[position].topk(5)
        assert list(top[position]) == best.indices.tolist()
        assert list(top[position].values()) == pytest.approx(best.values.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("length", [2, 600])
def test_the_echo_has_the_prompts(client: Client, reference: Any, length: int) -> None:
    prompt = [(token * 7) % 256 for token in range(length)]
    stream = client.generate(
        MODEL, token_ids=prompt, max_tokens=2, ignore_eos=True, temperature=0, logprobs=2, echo=True
    )
    chunks = list(stream)
    tokens = tokens_of(chunks)
    logprobs = [one for chunk in chunks for one in chunk.logprobs]
    assert tokens[:length] == prompt
    assert logprobs[0] is None
    wanted = distributions(reference, tokens)
    chosen = wanted[:-1].gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert logprobs[1:] == pytest.approx(chosen.tolist(), abs=TOLERANCE)


def test_scores_are_the_log_probabilities_of_continuations(client: Client, reference: Any) -> None:
    with torch.inference_mode():
        greedy = reference.generate(
            torch.tensor([PROMPT]), max_new_tokens=5, do_sample=False, eos_token_id=None
        )[0, len(PROMPT) :].tolist()
    long = [(token * 5) % 256 for token in range(700)]
    continuations = [greedy, [*greedy[:4], (greedy[4] + 1) % 256], [8], [1, 2, 3], long]
    response = client.score(MODEL, token_ids=PROMPT, continuations=continuations)
    for score, continuation in zip(response.scores, continuations, strict=True):
        wanted = distributions(reference, [*PROMPT, *continuation])[len(PROMPT) - 1 : -1]
        chosen = wanted.gather(-1, torch.tensor(continuation)[:, None])[:, 0]
        assert list(score.token_logprobs) == pytest.approx(chosen.tolist(), abs=TOLERANCE)
        assert score.logprob == pytest.approx(chosen.sum().item(), abs=TOLERANCE * len(chosen))
        assert score.is_greedy == (wanted.argmax(-1).tolist() == continuation)
    assert [score.is_greedy for score in response.scores[:2]] == [True, False]


def test_scoring_leaves_streams_that_run_alone(client: Client) -> None:
    options: Any = {"max_tokens": 60, "ignore_eos": True, "temperature": 1.0, "seed": 8}

    def made(*, beside: bool) -> list[int]:
        stream = client.generate(MODEL, token_ids=PROMPT, token_ids_output=True, **options)
        found = list(next(stream).token_ids)
        if beside:
            client.score(MODEL, token_ids=PROMPT[:3], continuations=[[1, 2, 3, 4]] * 20)
        return found + tokens_of(stream)

    assert made(beside=True) == made(beside=False)


def test_outputs_of_a_seed_are_the_same_each_time_and_the_first_is_that_of_one(
    client: Client,
) -> None:
    def outputs(n: int | None, seed: int) -> list[list[int]]:
        stream = client.generate(
            MODEL,
            token_ids=PROMPT,
            max_tokens=10,
            ignore_eos=True,
            temperature=2.0,
            seed=seed,
            n=n,
            token_ids_output=True,
        )
        found: dict[int, list[int]] = {}
        for chunk in stream:
            found.setdefault(chunk.output_index, []).extend(chunk.token_ids)
        assert stream.usage is not None
        assert stream.usage.output_tokens == 10 * (n or 1)
        return [found[index] for index in sorted(found)]

    four = outputs(4, seed=1)
    assert len({tuple(one) for one in four}) == 4
    assert outputs(4, seed=1) == four
    assert outputs(None, seed=1) == four[:1]
    assert outputs(2, seed=1) == four[:2]


def test_bad_words_and_bias_steer_the_text(client: Client) -> None:
    options: Any = {"max_tokens": 6, "ignore_eos": True, "temperature": 0, "token_ids_output": True}

    def made(**more: Any) -> list[int]:
        stream = client.generate(MODEL, token_ids=PROMPT, **options, **more)
        return tokens_of(stream)

    plain = made()
    pair = tuple(plain[1:3])
    steered = made(bad_words=[pair])
    assert steered[:2] == plain[:2]
    assert steered[2] != plain[2]
    assert pair not in pairwise(steered)
    assert made(logit_bias={123: 500.0}) == [123] * 6
    assert plain[0] not in made(logit_bias={plain[0]: -500.0})


def first_tokens(client: Client, **sampling: Any) -> set[int]:
    """Return which tokens 64 outputs begin with."""
    found = set()
    for seed in range(4):
        stream = client.generate(
            MODEL,
            token_ids=PROMPT,
            max_tokens=1,
            ignore_eos=True,
            token_ids_output=True,
            temperature=HOT,
            n=16,
            seed=seed,
            **sampling,
        )
        found.update(tokens_of(stream))
    return found


def first_of(order: torch.Tensor, logprobs: torch.Tensor, mass: float) -> set[int]:
    """Return the fewest tokens of an order that reach a probability."""
    share = logprobs[order].exp()
    return {*order[share.cumsum(0) - share < mass].tolist()}


def most_typical(logprobs: torch.Tensor, mass: float) -> set[int]:
    """Return the tokens that typical sampling keeps (Meister et al. 2023, section 4)."""
    entropy = -(logprobs.exp() * logprobs).sum()
    return first_of((-logprobs - entropy).abs().argsort(), logprobs, mass)


def nucleus(logprobs: torch.Tensor, mass: float) -> set[int]:
    """Return the fewest tokens that reach a probability (Holtzman et al. 2020)."""
    return first_of(logprobs.argsort(descending=True), logprobs, mass)


def likely(logprobs: torch.Tensor, share: float) -> set[int]:
    """Return the tokens at least so many times as likely as the likeliest."""
    return {*(logprobs >= logprobs.max() + math.log(share)).nonzero()[:, 0].tolist()}


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 4}, lambda found: {*found.topk(4).indices.tolist()}),
        ({"top_p": 0.4}, lambda found: nucleus(found, 0.4)),
        ({"min_p": 0.4}, lambda found: likely(found, 0.4)),
        ({"typical_p": 0.3}, lambda found: most_typical(found, 0.3)),
    ],
)
def test_only_what_a_setting_keeps_is_drawn(
    client: Client, reference: Any, sampling: dict[str, Any], kept: Callable[[Any], set[int]]
) -> None:
    allowed = kept((distributions(reference, PROMPT)[-1] / HOT).log_softmax(-1))
    drawn = first_tokens(client, **sampling)
    assert drawn <= allowed
    assert len(drawn) > 1
    assert not first_tokens(client) <= allowed


@pytest.mark.parametrize(
    "penalties",
    [
        {"presence_penalty": -2.0},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 0.8},
        {"presence_penalty": -1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    ],
)
def test_penalties_are_those_of_a_loop_over_the_models_logits(
    client: Client, reference: Any, penalties: dict[str, float]
) -> None:
    # So that a few tokens would come again and again.
    favoured = {40: 31.0, 41: 30.5, 42: 30.0, 43: 29.5}
    made: list[int] = []
    for _ in range(24):
        with torch.no_grad():
            logits = reference(torch.tensor([PROMPT + made])).logits[0, -1].double()
        for token, bias in favoured.items():
            logits[token] += bias
        for token in {*PROMPT, *made}:
            factor = penalties.get("repetition_penalty", 1.0)
            logits[token] *= factor if logits[token] < 0 else 1 / factor
        for token in {*made}:
            logits[token] -= penalties.get("presence_penalty", 0.0)
            logits[token] -= penalties.get("frequency_penalty", 0.0) * made.count(token)
        made.append(int(logits.argmax()))
    options: Any = {"max_tokens": 24, "ignore_eos": True, "temperature": 0}
    options |= {"token_ids": PROMPT, "token_ids_output": True, "logit_bias": favoured}
    stream = client.generate(MODEL, **options, **penalties)
    assert tokens_of(stream) == made
    plain = client.generate(MODEL, **options)
    assert tokens_of(plain) != made
