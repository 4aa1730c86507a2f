"""The demo's steps against a fake server, and its handling of the process."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, TypeAlias

import grpc
import pytest

from lowbit.cli import demo as demo_module
from lowbit.cli import main
from lowbit.cli import server as server_module
from lowbit.cli.server import DemoError, DemoServer
from lowbit.v1 import model_pb2 as model
from lowbit.v1 import quality_pb2
from lowbit.v1 import quantization_pb2 as quantization
from lowbit.v1 import runtime_pb2 as runtime
from lowbit.v1.job_pb2 import JOB_STATE_SUCCEEDED, Job, WatchJobResponse
from tests.unit.client.fake import events, refuse

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.client.fake import FakeServer

# A stand-in for lowbit-server: notes how it was started, says where to call, waits.
PROGRAM = """\
#!{python}
import json, os, pathlib, signal, sys
home = pathlib.Path(sys.argv[sys.argv.index("--home") + 1])
variables = {{k: v for k, v in os.environ.items() if k.startswith("LOWBIT_")}}
(home / "started.json").write_text(json.dumps([sys.argv[1:], variables, os.getpid()]))
print("a line of the log", file=sys.stderr, flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
{before}
(home / "address.new").write_text("{address}\\n")
(home / "address.new").rename(home / "address")
while True:
    signal.pause()
"""

Install: TypeAlias = "Callable[..., None]"


@pytest.fixture
def install(server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a stand-in where the demo looks for `lowbit-server`."""

    def make(*, code: int = 0, before: str = "") -> None:
        program = tmp_path / "bin" / "lowbit-server"
        program.parent.mkdir()
        text = PROGRAM.format(
            python=sys.executable, address=server.address, code=code, before=before
        )
        program.write_text(text)
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program.with_name("python")))

    return make


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def script(server: FakeServer) -> None:
    """Let the fake server answer everything that the demo asks."""
    quality = quality_pb2.QualityReport(perplexity=17.5, base_perplexity=13.5, mean_kl=0.25)
    done = WatchJobResponse(sequence=1, job=Job(id="j", state=JOB_STATE_SUCCEEDED))
    device = runtime.Device(
        workers=[runtime.Worker(state=runtime.WORKER_STATE_READY)],
        models=[runtime.LiveModel(model="smollm2-nf4", live_bytes=100)],
    )
    server.on = {
        "GetServerInfo": lambda *_: runtime.GetServerInfoResponse(version="9.9"),
        "ImportModel": lambda *_: model.ImportModelResponse(job=Job(id="j")),
        "Quantize": lambda *_: quantization.QuantizeResponse(job=Job(id="j")),
        "WatchJob": lambda *_: iter([done]),
        "WatchRuntime": lambda *_: iter([runtime.WatchRuntimeResponse(devices=[device])]),
        "Load": lambda *_: iter([model.LoadResponse(phase=model.LOAD_PHASE_LIVE)]),
        "ListDevices": lambda *_: runtime.ListDevicesResponse(devices=[device]),
        "GetModel": lambda request, _: model.GetModelResponse(
            model=model.Model(name=request.model, disk_bytes=2048, quality=quality)
        ),
        "Generate": lambda *_: events("Pa", "r", "is"),
        "Unload": lambda *_: model.UnloadResponse(freed_bytes=100),
    }


def run_demo(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_whole_demo(  # noqa: PLR0913 - one run shows it all
    server: FakeServer,
    install: Install,
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install()
    script(server)
    monkeypatch.setenv("LOWBIT_ADDRESS", "elsewhere:1")
    gguf = tmp_path / "models" / "small.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    figures = tmp_path / "figures.json"
    options = ["--gguf", str(gguf), "--home", str(home), "--json", str(figures)]
    assert run_demo(*options) == 0

    arguments, variables, pid = json.loads((home / "started.json").read_text())
    assert arguments == ["--home", str(home), "--listen", "127.0.0.1:0"]
    assert variables == {"LOWBIT_IMPORT_ROOTS": str(gguf.parent)}
    assert not alive(pid)

    (source,) = server.requests("ImportModel")
    assert (source.model, source.source.path) == ("smollm2", str(gguf))
    targets = [(item.target, item.evaluation.max_tokens) for item in server.requests("Quantize")]
    names = ["smollm2", "smollm2-int8", "smollm2-nf4", "smollm2-gptq"]
    assert targets == [(name, 2048) for name in names[1:]]
    calibrated = [item for item in server.requests("Quantize") if item.HasField("calibration")]
    assert [item.target for item in calibrated] == ["smollm2-gptq"]
    for method, times in (("Load", 1), ("Generate", 2), ("Unload", 1)):
        assert [item.model for item in server.requests(method)] == names * times

    document = json.loads(figures.read_text())
    assert document["version"] == "9.9"
    nf4 = document["models"][2]
    assert nf4 == {
        "model": "smollm2-nf4",
        "scheme": "nf4",
        "disk_bytes": 2048,
        "live_bytes": 100,
        "perplexity": 17.5,
        "mean_kl": 0.25,
        "tokens_per_second": 1.0,
        "time_to_first_token_s": 0.005,
        "answer": "Paris",
        "finish_reason": "EOS",
    }
    assert [item["perplexity"] for item in document["models"]] == [13.5, 17.5, 17.5, 17.5]
    out = capfd.readouterr().out
    assert out.count("Paris\n") == 4
    assert "17.50" in out


def test_a_failure_kills_the_server_and_is_one_line(
    server: FakeServer,
    install: Install,
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    install()
    script(server)
    server.on["ImportModel"] = lambda _, context: refuse(
        context, grpc.StatusCode.INVALID_ARGUMENT, "SOURCE_CORRUPT", message="truncated"
    )
    gguf = tmp_path / "small.gguf"
    gguf.write_bytes(b"GGUF")
    assert run_demo("--gguf", str(gguf), "--home", str(home)) == 1
    assert capfd.readouterr().err == "lowbit: error: SOURCE_CORRUPT: truncated\n"
    assert not alive(json.loads((home / "started.json").read_text())[2])


def test_a_server_that_dies_shows_its_log(
    install: Install, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    install(before="sys.exit(3)")
    with DemoServer(home, home) as demo, pytest.raises(DemoError, match="ended with code 3"):
        demo.address()
    assert "a line of the log" in capfd.readouterr().err


def test_a_server_that_stops_badly_is_an_error(
    install: Install, home: Path, server: FakeServer
) -> None:
    install(code=4)
    with DemoServer(home, home) as demo:
        assert demo.address() == server.address
        with pytest.raises(DemoError, match="ended with code 4"):
            demo.stop()


def test_an_old_address_is_not_believed(install: Install, home: Path, server: FakeServer) -> None:
    install()
    (home / "address").write_text("127.0.0.1:1\n")
    with DemoServer(home, home) as demo:
        assert demo.address() == server.address


def test_leaving_kills_the_server(install: Install, home: Path) -> None:
    install()
    with DemoServer(home, home) as demo:
        demo.address()
        pid = json.loads((home / "started.json").read_text())[2]
        assert alive(pid)
    assert not alive(pid)


def test_a_missing_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DemoError, match="lowbit-server is not installed"):
        server_module.find_server()


def test_a_missing_model_file_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_demo("--gguf", str(tmp_path / "none.gguf")) == 1
    assert "there is no file" in capfd.readouterr().err


def test_the_packaged_model_is_found() -> None:
    assert demo_module._packaged_model().suffix == ".gguf"
