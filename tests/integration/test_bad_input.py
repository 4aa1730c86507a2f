"""What a client must not send, each with its code, reason and violations."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import StatusCode

from lowbit import Client, scheme
from lowbit.v1 import errors_pb2, job_pb2, model_pb2
from lowbit.v1 import generation_pb2 as pb
from lowbit.v1 import quantization_pb2 as quant
from lowbit.v1.generation_pb2_grpc import GenerationServiceStub
from lowbit_server.testing import ServerProcess, scripted_model
from tests.models.quantkit import random_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

INVALID = (StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
UNSUPPORTED = (StatusCode.INVALID_ARGUMENT, "SOURCE_UNSUPPORTED")
CORRUPT = (StatusCode.INVALID_ARGUMENT, "SOURCE_CORRUPT")
NOT_ALLOWED = (StatusCode.PERMISSION_DENIED, "SOURCE_NOT_ALLOWED")
CONTEXT_TOKENS = 64
BAD_NAMES = [
    *("", ".", "..", "../up", "a/../b", "a..b", "/etc", "a/b", "a\\b"),
    *("a\x00b", "a\nb", "\x7f", "a b", "é", ".hidden", "-flag", "x" * 129, "x" * 300),
]


@pytest.fixture(scope="module")
def echo(service: Any) -> str:
    """A model that repeats its prompt."""
    return service.load_scripted("echo", step_ms=1, context_tokens=CONTEXT_TOKENS)


@pytest.fixture(scope="module")
def tiny(service: Any, float_source: Callable[..., Path]) -> str:
    """A model with real weights in the store."""
    return service.import_float("tiny", float_source(service.sources / "tiny"))


@pytest.fixture(scope="module")
def narrow(service: Any) -> str:
    """A Llama whose rows no scheme's groups of 64 divide."""
    sizes = {"hidden_size": 96, "num_key_value_heads": 4}
    folder = random_source(service.sources / "narrow", model_type="llama", **sizes)
    return service.import_float("narrow", folder)


@pytest.fixture(autouse=True)
def _still_serves(service: Any, echo: str) -> Iterator[None]:
    """After each bad input the server still answers a good one."""
    yield
    assert service.client.generate(echo, "well", max_tokens=4).text() == "well"


@pytest.fixture
def folder(service: Any, request: pytest.FixtureRequest) -> Path:
    """An empty folder inside the import roots."""
    made: Path = service.sources / f"bad-{abs(hash(request.node.name))}"
    made.mkdir()
    return made


def fields(refusal: Any) -> list[str]:
    assert all(one.description for one in refusal.error.violations)
    return sorted({one.field for one in refusal.error.violations})


def nothing_was_started(service: Any, name: str) -> bool:
    return name not in {job.model for job in service.client.jobs()}


# Names


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_new_model_cannot_have_such_a_name(service: Any, tiny: str, name: str) -> None:
    source = str(service.sources / "echo")
    with service.refused(*INVALID) as refusal:
        service.client.import_model(name, path=source)
    assert fields(refusal) == ["model"]
    with service.refused(*INVALID) as refusal:
        service.client.quantize(tiny, name, "bf16")
    assert fields(refusal) == ["target"]
    with service.refused(*INVALID) as refusal:
        service.client.set_alias(name, tiny)
    assert fields(refusal) == ["alias"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_no_model_can_be_asked_for_by_such_a_name(service: Any, name: str) -> None:
    for call in (service.client.get_model, service.client.unload, service.client.verify_model):
        with service.refused(*INVALID) as refusal:
            call(name)
        assert fields(refusal) == ["model"]
    with service.refused(*INVALID) as refusal:
        service.generate(name, "hello")
    assert fields(refusal) == ["model"]
    with service.refused(*INVALID) as refusal:
        service.client.load(name).wait()
    assert fields(refusal) == ["model"]


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "x" * 128])
def test_these_names_are_good(service: Any, name: str) -> None:
    job = service.client.import_model(name, path=str(service.sources / "echo"), validate_only=True)
    assert job.model == name


# Sources


def test_a_source_outside_the_import_roots(service: Any, tmp_path: Path) -> None:
    scripted_model(tmp_path / "outside")
    outside = [
        str(tmp_path / "outside"),
        f"{service.sources}/../outside",
        "../outside",
        f"{service.sources}-beside",
        "/etc/passwd",
        "/",
        "a\x00b",
    ]
    for path in outside:
        with service.refused(*NOT_ALLOWED):
            service.client.import_model("outside", path=path)
    assert nothing_was_started(service, "outside")


def test_a_source_that_is_not_there(service: Any) -> None:
    for path in ("nothing", str(service.sources / "nothing"), "x" * 4000):
        with service.refused(StatusCode.NOT_FOUND, "SOURCE_NOT_FOUND"):
            service.client.import_model("nothing", path=path)


def test_a_link_that_leaves_the_import_roots(service: Any, folder: Path, tmp_path: Path) -> None:
    scripted_model(tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    with service.refused(*NOT_ALLOWED):
        service.client.import_model("linked", path=str(folder / "link"))
    scripted_model(folder / "inside")
    (folder / "inside" / "tokenizer.json").unlink()
    (folder / "inside" / "tokenizer.json").symlink_to(tmp_path / "outside" / "tokenizer.json")
    with service.refused(*NOT_ALLOWED) as refusal:
        service.client.import_model("linked", path=str(folder / "inside"))
    assert "tokenizer.json" in refusal.error.message
    assert nothing_was_started(service, "linked")


def test_a_text_file_outside_the_import_roots(service: Any, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    source = quant.TextSource(file=quant.TextFile(path=str(tmp_path / "text")))
    with service.refused(*NOT_ALLOWED):
        service.client.quantize(
            tiny, "evaluated", "nf4", evaluation=quant.Evaluation(source=source)
        )
    assert nothing_was_started(service, "evaluated")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_by_name(service: Any, folder: Path, name: str) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / name).write_bytes(pickle.dumps({}))
    for path in (folder, folder / name):
        with service.refused(*UNSUPPORTED) as refusal:
            service.client.import_model("pickled", path=str(path))
        assert name in refusal.error.message
        assert "pickle" in refusal.error.message
    assert nothing_was_started(service, "pickled")


@pytest.mark.parametrize("damage", ["header", "data", "lying length", "lying shape", "empty"])
def test_damaged_safetensors(
    service: Any, folder: Path, float_source: Callable[..., Path], damage: str
) -> None:
    source = float_source(folder / "model")
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [1 << 62, 1 << 62]
    lying = json.dumps(header).encode()
    weights.write_bytes(
        {
            "header": data[: 8 + length // 2],
            "data": data[:-1],
            "lying length": (1 << 63).to_bytes(8, "little") + data[8:],
            "lying shape": len(lying).to_bytes(8, "little") + lying + data[8 + length :],
            "empty": b"",
        }[damage]
    )
    with service.refused(*CORRUPT) as refusal:
        service.client.import_model("damaged", path=str(source))
    assert "model.safetensors" in refusal.error.message
    assert nothing_was_started(service, "damaged")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF\x03\x00\x00\x00",
        b"NOPE\x03\x00\x00\x00" + bytes(16),
        b"GGUF\x03\x00\x00\x00" + b"\xff" * 16,
        b"GGUF\x03\x00\x00\x00" + (1).to_bytes(8, "little") + (1 << 40).to_bytes(8, "little"),
        b"GGUF\x03\x00\x00\x00" + bytes(8) + (1).to_bytes(8, "little") + b"\xff" * 8,
    ],
    ids=["empty", "magic", "no counts", "no gguf", "huge counts", "many keys", "long key"],
)
def test_damaged_gguf(service: Any, folder: Path, content: bytes) -> None:
    (folder / "model.gguf").write_bytes(content)
    with service.refused(*CORRUPT) as refusal:
        service.client.import_model("damaged", path=str(folder / "model.gguf"))
    assert "model.gguf" in refusal.error.message
    assert nothing_was_started(service, "damaged")


def test_a_config_that_asks_for_remote_code(
    service: Any, folder: Path, float_source: Callable[..., Path]
) -> None:
    source = float_source(folder / "model")
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Evil"}
    (source / "config.json").write_text(json.dumps(config))
    with service.refused(*UNSUPPORTED) as refusal:
        service.client.import_model("remote", path=str(source))
    assert "auto_map" in refusal.error.message
    assert nothing_was_started(service, "remote")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"architectures": 3}', "[" * 100_000])
def test_a_config_that_is_none(service: Any, folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(Exception, match=r"config\.json") as caught:
        service.client.import_model("configured", path=str(folder))
    assert getattr(caught.value, "reason", "") in {"SOURCE_CORRUPT", "SOURCE_UNSUPPORTED"}
    assert nothing_was_started(service, "configured")


def test_neither_a_folder_nor_a_gguf_file(service: Any, folder: Path) -> None:
    (folder / "notes.txt").write_text("no model")
    os.mkfifo(folder / "pipe.gguf")
    for name in ("notes.txt", "pipe.gguf", ""):
        with service.refused(*UNSUPPORTED):
            service.client.import_model("none", path=str(folder / name))


# Generation


@pytest.mark.parametrize("length", [CONTEXT_TOKENS, CONTEXT_TOKENS + 1, 100_000])
def test_a_prompt_over_the_context(service: Any, echo: str, length: int) -> None:
    with service.refused(StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED") as refusal:
        service.generate(echo, "x" * length)
    assert refusal.error.metadata["prompt_tokens"] == str(length)
    assert refusal.error.metadata["context_tokens"] == str(CONTEXT_TOKENS)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("sampling", "stopping", "field"),
    [
        ({"temperature": -0.1}, {}, "sampling.temperature"),
        ({"temperature": INFINITY}, {}, "sampling.temperature"),
        ({"top_p": 2}, {}, "sampling.top_p"),
        ({"top_p": 0}, {}, "sampling.top_p"),
        ({"min_p": -1}, {}, "sampling.min_p"),
        ({"repetition_penalty": 0}, {}, "sampling.repetition_penalty"),
        ({"presence_penalty": INFINITY}, {}, "sampling.presence_penalty"),
        ({"n": 0}, {}, "sampling.n"),
        ({"top_k": 2**32 - 1}, {}, "sampling.top_k"),
        *(
            ({name: NAN}, {}, f"sampling.{name}")
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )
        ),
        ({}, {"max_tokens": 0}, "stopping.max_tokens"),
        ({}, {"max_tokens": 10**9}, "stopping.max_tokens"),
        ({}, {"min_tokens": 10**9}, "stopping.min_tokens"),
        ({}, {"strings": ["x"] * 10_000}, "stopping.strings"),
        ({}, {"strings": ["fine", ""]}, "stopping.strings[1]"),
        ({}, {"strings": ["x" * 1025]}, "stopping.strings[0]"),
        ({}, {"token_ids": [0] * 1025}, "stopping.token_ids"),
        ({}, {"token_ids": [256]}, "stopping.token_ids"),
        ({}, {"time_limit": {"seconds": 0}}, "stopping.time_limit"),
        ({}, {"time_limit": {"seconds": -1}}, "stopping.time_limit"),
    ],
)
def test_a_value_out_of_range(
    service: Any, echo: str, sampling: dict[str, Any], stopping: dict[str, Any], field: str
) -> None:
    with service.refused(*INVALID) as refusal:
        service.generate(echo, "hello", sampling=sampling, stopping=stopping)
    assert fields(refusal) == [field]


def test_all_violations_are_reported_at_once(service: Any, echo: str) -> None:
    with service.refused(*INVALID) as refusal:
        service.generate(
            echo,
            "hello",
            sampling={"temperature": -1, "top_p": 2, "min_p": NAN},
            stopping={"max_tokens": 0, "strings": ["x"] * 10_000},
            request_id="no spaces",
        )
    assert fields(refusal) == [
        "request_id",
        "sampling.min_p",
        "sampling.temperature",
        "sampling.top_p",
        "stopping.max_tokens",
        "stopping.strings",
    ]


def test_an_error_is_never_too_long_to_be_sent(service: Any, echo: str) -> None:
    # gRPC drops trailers of more than 8 KiB, so messages and violations have a bound.
    chat = pb.Chat(messages=[pb.ChatMessage(content="x")] * 4096)
    with service.refused(*INVALID) as refusal:
        list(service.generation.Generate(pb.GenerateRequest(model=echo, chat=chat), timeout=30))
    assert fields(refusal)[0] == "chat.messages[0].role"
    assert "4096 violations" in refusal.error.message
    with service.refused(*INVALID):
        service.generate(echo, "hello", stopping={"strings": [""] * 64})
    with service.refused(*NOT_ALLOWED) as refusal:
        service.client.import_model("long", path="/" + "\N{GRINNING FACE}" * 4000)
    assert len(refusal.error.message.encode()) <= 1000


def test_token_ids_outside_the_vocabulary(service: Any, echo: str) -> None:
    for ids in ([256], [0, 2**32 - 1]):
        request = pb.GenerateRequest(model=echo, token_ids=pb.TokenIds(ids=ids))
        with service.refused(*INVALID) as refusal:
            list(service.generation.Generate(request, timeout=30))
        assert fields(refusal) == ["token_ids.ids"]
        with service.refused(*INVALID) as refusal:
            service.client.detokenize(echo, ids)
        assert fields(refusal) == ["token_ids"]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (pb.GenerateRequest(text=""), "text"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids.ids"),
        (pb.GenerateRequest(chat=pb.Chat()), "chat.messages"),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(content="x")])),
            "chat.messages[0].role",
        ),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role=77, content="x")])),
            "chat.messages[0].role",
        ),
    ],
)
def test_an_input_that_is_none(
    service: Any, echo: str, request_: pb.GenerateRequest, field: str
) -> None:
    request_.model = echo
    with service.refused(*INVALID) as refusal:
        list(service.generation.Generate(request_, timeout=30))
    assert fields(refusal) == [field]


# Quantization


def quantize(service: Any, source: str, given: quant.Scheme | None, **options: Any) -> Any:
    request = quant.QuantizeRequest(source=source, target="smaller", scheme=given, **options)
    return service.quantization.Quantize(request, timeout=30)


def int8(threshold: float) -> quant.Scheme:
    return quant.Scheme(int8=quant.Int8Scheme(outlier_threshold=threshold))


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (None, "scheme"),
        (quant.Scheme(), "scheme.kind"),
        (quant.Scheme(float=quant.FloatScheme()), "scheme.float.type"),
        (quant.Scheme(float=quant.FloatScheme(type=9)), "scheme.float.type"),
        (quant.Scheme(bnb_4bit=quant.Bnb4BitScheme()), "scheme.bnb_4bit.quant_type"),
        (int8(-1), "scheme.int8.outlier_threshold"),
        (int8(NAN), "scheme.int8.outlier_threshold"),
        (quant.Scheme(gptq=quant.GptqScheme(bits=5)), "scheme.gptq.bits"),
        (quant.Scheme(gptq=quant.GptqScheme(group_size=48)), "scheme.gptq.group_size"),
        (quant.Scheme(gptq=quant.GptqScheme(damp=1)), "scheme.gptq.damp"),
        (quant.Scheme(awq=quant.AwqScheme(group_size=0)), "scheme.awq.group_size"),
        (quant.Scheme(rtn=quant.RtnScheme(group_size=-2)), "scheme.rtn.group_size"),
    ],
)
def test_a_scheme_that_there_is_not(
    service: Any, tiny: str, given: quant.Scheme | None, field: str
) -> None:
    with service.refused(*INVALID) as refusal:
        quantize(service, tiny, given)
    assert fields(refusal) == [field]
    assert nothing_was_started(service, "smaller")


def test_quantizing_onto_a_name_that_exists(service: Any, tiny: str, echo: str) -> None:
    for target in (tiny, echo):
        with service.refused(StatusCode.ALREADY_EXISTS, "MODEL_EXISTS") as refusal:
            service.client.quantize(tiny, target, "bf16")
        assert refusal.error.metadata["model"] == target
    with service.refused(StatusCode.ALREADY_EXISTS, "MODEL_EXISTS"):
        service.client.import_model(tiny, path=str(service.sources / "echo"))


def test_quantizing_what_cannot_be_quantized(service: Any, tiny: str, echo: str) -> None:
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        quantize(service, "nobody", scheme("nf4"))
    with service.refused(*INVALID) as refusal:
        quantize(service, echo, scheme("nf4"))
    assert fields(refusal) == ["source"]
    with service.refused(StatusCode.NOT_FOUND, "DEVICE_NOT_FOUND"):
        quantize(service, tiny, scheme("nf4"), device="cuda:0")
    with service.refused(*INVALID) as refusal:
        quantize(service, tiny, scheme("nf4"), calibration=quant.Calibration())
    assert fields(refusal) == ["calibration"]
    for name in ("c5", "a/b/c", "org/", "a b/c", "org/name:"):
        source = quant.TextSource(dataset=name)
        with service.refused(*INVALID) as refusal:
            quantize(service, tiny, scheme("int8"), evaluation=quant.Evaluation(source=source))
        assert fields(refusal) == ["evaluation.source.dataset"]


def test_estimates_of_what_cannot_be_made(service: Any, tiny: str, echo: str) -> None:
    def refused(
        field: str, name: str, source: str = tiny, calibration: quant.Calibration | None = None
    ) -> None:
        request = quant.EstimateQuantizationRequest(
            source=source, scheme=scheme(name), calibration=calibration
        )
        with service.refused(*INVALID) as refusal:
            service.quantization.EstimateQuantization(request, timeout=30)
        assert fields(refusal) == [field]

    refused("source", "int8", source=echo)
    refused("scheme", "rtn")  # 16 columns
    refused("calibration", "int8", calibration=quant.Calibration(samples=4))
    beyond = quant.Calibration(sequence_tokens=129)
    refused("calibration.sequence_tokens", "gptq", calibration=beyond)
    unknown = quant.Calibration(source=quant.TextSource(dataset="c5"))
    refused("calibration.source.dataset", "gptq", calibration=unknown)
    with service.refused(StatusCode.PERMISSION_DENIED, "SOURCE_NOT_ALLOWED"):
        outside = quant.TextSource(file=quant.TextFile(path="/etc/hostname"))
        service.client.estimate_quantization(
            tiny, "awq", calibration=quant.Calibration(source=outside)
        )
    with service.refused(*INVALID) as refusal:
        service.client.estimate_load(echo)
    assert fields(refusal) == ["model"]
    with service.refused(StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"):
        service.client.estimate_load("nobody")


def test_importing_as_a_type_that_there_is_not(service: Any) -> None:
    request = model_pb2.ImportModelRequest(
        model="typed", source=model_pb2.ModelSource(path=str(service.sources / "echo")), type=9
    )
    with service.refused(*INVALID) as refusal:
        service.models.ImportModel(request, timeout=30)
    assert fields(refusal) == ["type"]
    with service.refused(*INVALID) as refusal:
        service.models.ImportModel(model_pb2.ImportModelRequest(model="typed"), timeout=30)
    assert fields(refusal) == ["source"]


@pytest.mark.parametrize("name", ["gptq", "awq", "rtn", "nf4", "fp4"])
def test_a_shape_that_a_scheme_cannot_take_is_refused_at_once(
    service: Any, narrow: str, name: str
) -> None:
    with service.refused(*INVALID) as refusal:
        service.client.quantize(narrow, "unborn", name)
    assert fields(refusal) == ["scheme"]
    assert "mlp.gate_proj has 192 x 96" in refusal.error.message
    assert nothing_was_started(service, "unborn")
    if name in {"gptq", "awq", "rtn"}:
        fitting = scheme(name, group_size=32)
        assert service.client.quantize(narrow, "unborn", fitting, validate_only=True).id == ""


def test_every_shape_is_cast_and_taken_in_8_bits(service: Any, narrow: str) -> None:
    for name in ("int8", "fp32"):
        assert service.client.quantize(narrow, "unborn", name, validate_only=True).id == ""


# Sizes


def test_a_message_of_100_megabytes(service: Any, echo: str) -> None:
    unlimited = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(service.server.address, options=unlimited) as channel:
        stub = GenerationServiceStub(channel)
        request = pb.GenerateRequest(model=echo, text="x" * 100_000_000)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request, timeout=30))
        assert caught.value.code() == StatusCode.RESOURCE_EXHAUSTED
        small = pb.GenerateRequest(model=echo, text="fine", stopping=pb.Stopping(max_tokens=4))
        assert "".join(one.delta.text for one in stub.Generate(small, timeout=30)) == "fine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or mount is None or umount is None:
        pytest.skip("only root may mount a small tmpfs")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=8m", "lowbit-test", folder],
        check=False,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run([umount, "--lazy", folder], check=True)


def test_a_full_disk_fails_the_job_and_leaves_nothing(
    small_disk: Path, tmp_path: Path, float_source: Callable[..., Path]
) -> None:
    sources = tmp_path / "sources"
    fits = scripted_model(sources / "fits")
    too_big = float_source(sources / "too-big", layers=3, hidden=352)  # 15 MB
    environment = {"LOWBIT_IMPORT_ROOTS": str(sources)}
    with (
        ServerProcess(small_disk / "home", environment=environment) as server,
        Client(server.address) as client,
    ):
        job = client.import_model("full", path=str(too_big))
        *_, last = client.watch_job(job.id)
        assert last.job.state == job_pb2.JOB_STATE_FAILED
        assert last.job.error.reason == errors_pb2.ERROR_REASON_DISK_FULL, last.job.error
        assert "full" in last.job.error.message
        assert not list((server.home / "staging").iterdir())
        assert not list((server.home / "models").iterdir())
        assert not list(client.models())
        # The room is free again, and the name too.
        client.wait_job(client.import_model("full", path=str(fits)).id)
        assert client.verify_model("full").files
