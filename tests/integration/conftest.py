"""Real server processes with models of the scripted engine."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import psutil
import pytest

from lowbit import Client, ClientOptions, LowbitError
from lowbit.failures import from_rpc
from lowbit.v1 import generation_pb2, job_pb2, runtime_pb2
from lowbit.v1.generation_pb2_grpc import GenerationServiceStub
from lowbit.v1.job_pb2_grpc import JobServiceStub
from lowbit.v1.model_pb2_grpc import ModelServiceStub
from lowbit.v1.quantization_pb2_grpc import QuantizationServiceStub
from lowbit.v1.runtime_pb2_grpc import RuntimeServiceStub
from lowbit_server.testing import ServerProcess, byte_tokenizer, scripted_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

DEADLINE_S = 30.0


class Refusal:
    """What a `refused` block was refused with."""

    error: LowbitError


class Service:
    """A server, clients of it, and a folder that it may import from."""

    def __init__(self, server: ServerProcess, sources: Path) -> None:
        self.server = server
        self.sources = sources
        self.client = Client(server.address)
        # Shows each refusal as it comes; `client` would try again.
        self.once = Client(server.address, ClientOptions(max_attempts=1))
        self.channel = grpc.insecure_channel(server.address)
        self.generation = GenerationServiceStub(self.channel)
        self.models = ModelServiceStub(self.channel)
        self.jobs = JobServiceStub(self.channel)
        self.quantization = QuantizationServiceStub(self.channel)
        self.runtime = RuntimeServiceStub(self.channel)

    def close(self) -> None:
        """Close every connection."""
        self.client.close()
        self.once.close()
        self.channel.close()

    def ready(self) -> bool:
        """Whether every worker takes requests."""
        devices = self.client.devices()
        return all(
            worker.state == runtime_pb2.WORKER_STATE_READY
            for device in devices
            for worker in device.workers
        )

    def import_scripted(self, name: str, *, context_tokens: int = 4096, **script: Any) -> str:
        """Bring a scripted model into the store and return its name."""
        source = scripted_model(self.sources / name, context_tokens=context_tokens, **script)
        job = self.client.import_model(name, path=str(source))
        self.client.wait_job(job.id)
        return name

    def load_scripted(self, name: str, *, replicas: int = 1, **script: Any) -> str:
        """Bring a scripted model into the store, load it and return its name."""
        self.import_scripted(name, **script)
        self.client.load(name, replicas=replicas).wait()
        return name

    def import_float(self, name: str, source: Path) -> str:
        """Bring a folder with weights into the store and return its name."""
        self.client.wait_job(self.client.import_model(name, path=str(source)).id)
        return name

    def generate(
        self, model: str, text: str | bytes, **fields: Any
    ) -> list[generation_pb2.GenerateResponse]:
        """Return all events of a generation; a scripted model repeats its prompt."""
        return list(self.stream(model, text, **fields))

    def stream(self, model: str, text: str | bytes, **fields: Any) -> Any:
        """Start a generation; bytes are sent as the token ids of the byte tokenizer."""
        given = {"token_ids": {"ids": byte_ids(text)}} if isinstance(text, bytes) else {}
        given = given or {"text": text}
        request = generation_pb2.GenerateRequest(model=model, **given, **fields)
        return self.generation.Generate(request, timeout=DEADLINE_S)

    def job_processes(self) -> list[psutil.Process]:
        """Return the job processes that run."""
        found = []
        for child in psutil.Process(self.server.pid).children():
            try:
                if "lowbit_server.jobs.process" in child.cmdline():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return found

    def freeze_job(self, job_id: str) -> job_pb2.Job:
        """Stop the process of a job as soon as there is one, so that the job stays RUNNING."""
        until(self.job_processes)
        for process in self.job_processes():
            process.suspend()
        job = self.client.get_job(job_id)
        assert job.state == job_pb2.JOB_STATE_RUNNING
        return job

    @contextmanager
    def refused(self, code: grpc.StatusCode, reason: str) -> Iterator[Refusal]:
        """Expect the block to be refused with a code and a reason."""
        refusal = Refusal()
        try:
            yield refusal
        except grpc.RpcError as error:
            refusal.error = from_rpc(error)
        except LowbitError as error:
            refusal.error = error
        else:
            pytest.fail(f"{reason} was expected, nothing was refused")
        assert (refusal.error.code, refusal.error.reason) == (code, reason), refusal.error


_SORTED = byte_tokenizer().get_vocab()


def byte_ids(data: bytes) -> list[int]:
    """Return the byte tokenizer's token of each byte; the bytes need not be UTF-8."""
    # GPT-2's alphabet: printable Latin-1 stands for itself, the rest for 256, 257, ...
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    names = {byte: chr(byte) for byte in shown}
    names |= {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [_SORTED[names[byte]] for byte in data]


def until(condition: Callable[[], Any], timeout_s: float = DEADLINE_S) -> Any:
    """Wait until a condition is true and return what it gave."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)  # between two looks at what cannot be awaited
    return found


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """Return `until`, which waits for a condition."""
    return until


@pytest.fixture(scope="session")
def float_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a source folder of a Llama with made-up weights."""

    def make(folder: Path, *, layers: int = 1, hidden: int = 16, fill: bytes = b"") -> Path:
        """Write it; without `fill` the weights are a sparse file of zeros."""
        folder.mkdir(parents=True)
        byte_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text("{}")
        (folder / "config.json").write_text(json.dumps(_llama_config(layers, hidden)))
        shapes = dict(_llama_shapes(layers, hidden))
        header: dict[str, Any] = {}
        at = 0
        for name, shape in shapes.items():
            size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        encoded = json.dumps(header).encode()
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            if fill:
                file.write((fill * (at // len(fill) + 1))[:at])
            file.truncate(8 + len(encoded) + at)
        return folder

    return make


def _llama_config(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }


def _llama_shapes(layers: int, hidden: int) -> Iterable[tuple[str, list[int]]]:
    yield "model.embed_tokens.weight", [256, hidden]
    yield "model.norm.weight", [hidden]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", [hidden]
        yield f"{prefix}.post_attention_layernorm.weight", [hidden]
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", [hidden, hidden]
        for name in ("gate", "up"):
            yield f"{prefix}.mlp.{name}_proj.weight", [2 * hidden, hidden]
        yield f"{prefix}.mlp.down_proj.weight", [hidden, 2 * hidden]


@pytest.fixture(scope="module")
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """One server for the tests of a module; each test brings its own models.

    A module may name SERVER_FLAGS and SERVER_ENVIRONMENT for it.
    """
    folder = tmp_path_factory.mktemp("service")
    sources = folder / "sources"
    sources.mkdir()
    flags = getattr(request.module, "SERVER_FLAGS", ())
    environment = getattr(request.module, "SERVER_ENVIRONMENT", {})
    environment = {"LOWBIT_IMPORT_ROOTS": str(sources)} | environment
    with ServerProcess(folder / "home", *flags, environment=environment) as server:
        service = Service(server, sources)
        until(service.ready)
        yield service
        service.close()
