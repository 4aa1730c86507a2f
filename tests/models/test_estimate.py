"""Estimates against the files that jobs write and the models that are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lowbit.worker.v1 import worker_pb2 as wire
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.models.loading import load
from lowbit_server.pool.worker import Worker
from lowbit_server.quant import footprint
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    FloatScheme,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
)
from lowbit_server.rpc import estimates
from lowbit_server.signals import Changed
from tests.models.quantkit import FAMILIES, SIZES, Store, random_source

if TYPE_CHECKING:
    from pathlib import Path

    from lowbit_server.quant.schemes import Scheme

SCHEMES: list[Scheme] = [
    FloatScheme(type="fp32"),
    FloatScheme(type="fp16"),
    Int8Scheme(),
    Bnb4BitScheme(quant_type="nf4"),
    Bnb4BitScheme(quant_type="fp4", double_quant=False),
    RtnScheme(),
    RtnScheme(bits=2, group_size=32),
    RtnScheme(bits=3),
    RtnScheme(group_size=-1),
    RtnScheme(bits=8),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_within_5_percent(family: str, store: Store, tmp_path: Path) -> None:
    base = store.imported(random_source(tmp_path / "source", **FAMILIES[family]))
    source = footprint.read(store.manifest("base"), base)
    for number, scheme in enumerate(SCHEMES):
        folder = store.quantized(scheme, f"copy-{number}")
        manifest = store.manifest(folder.name)
        model = load(folder, "cpu", 64)
        spec, measured = model.spec, model.live_bytes
        expected = estimates.quantization(source, scheme, 0, ["cpu"])
        (copy,) = expected.devices
        (loaded,) = estimates.load(footprint.read(manifest, folder), ["cpu"], []).devices
        assert expected.disk_bytes == pytest.approx(manifest.disk_bytes, rel=0.05), scheme
        assert copy.live_bytes == pytest.approx(measured, rel=0.05), scheme
        assert loaded.live_bytes == pytest.approx(measured, rel=0.05), scheme
        assert copy.kv_bytes_per_token == loaded.kv_bytes_per_token == spec.token_bytes


def test_gptq_checkpoints_in_fp16_are_held_as_float32(store: Store, tmp_path: Path) -> None:
    store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]), kind="fp16")
    folder = store.quantized(RtnScheme())
    headers = footprint.read(store.manifest("small"), folder)
    model = load(folder, "cpu", 64)
    assert headers.live_bytes("cpu") == pytest.approx(model.live_bytes, rel=0.05)
    assert headers.shape.kv_bytes_per_token("cpu") == 2 * headers.shape.kv_bytes_per_token("cuda:0")


def test_more_calibration_takes_longer_and_more_memory(store: Store, tmp_path: Path) -> None:
    base = store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    source = footprint.read(store.manifest("base"), base)
    few, many = (
        estimates.quantization(source, GptqScheme(), tokens, ["cpu"]).devices[0]
        for tokens in (1 << 10, 1 << 24)
    )
    assert many.duration.ToMilliseconds() > few.duration.ToMilliseconds()
    extra = many.peak_memory_bytes - few.peak_memory_bytes
    # Hidden states and what flows into the widest layer.
    widths = SIZES["hidden_size"] + SIZES["intermediate_size"]
    assert extra >= ((1 << 24) - (1 << 10)) * widths * 2


def test_a_load_by_a_warm_process_imports_no_libraries(store: Store, tmp_path: Path) -> None:
    base = store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    model = footprint.read(store.manifest("base"), base)
    worker = Worker("cpu-0", "cpu", Changed())

    def load_ms() -> int:
        (loaded,) = estimates.load(model, ["cpu"], [worker]).devices
        return loaded.duration.ToMilliseconds()

    assert load_ms() >= 5000
    worker.load("base", base)
    assert load_ms() >= 5000
    worker.handle(wire.AttachResponse(pong=wire.Pong(warm=False)))
    assert load_ms() >= 5000
    worker.handle(wire.AttachResponse(pong=wire.Pong(warm=True)))
    assert load_ms() < 500
    worker.detach()
    assert load_ms() >= 5000


def test_layers_that_a_scheme_cannot_take_are_named(store: Store, tmp_path: Path) -> None:
    sizes = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1}
    base = store.imported(random_source(tmp_path / "source", model_type="llama", **sizes))
    source = footprint.read(store.manifest("base"), base)
    for scheme in (RtnScheme(), GptqScheme(), AwqScheme(), Bnb4BitScheme(quant_type="nf4")):
        with pytest.raises(LowbitError, match="has 192 x 96") as caught:
            estimates.quantization(source, scheme, 0, ["cpu"])
        assert caught.value.violations[0].field == "scheme"
    assert estimates.quantization(source, RtnScheme(group_size=32), 0, ["cpu"]).disk_bytes


def test_the_time_on_a_device_whose_speed_is_unknown_is_left_out(
    store: Store, tmp_path: Path
) -> None:
    base = store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    source = footprint.read(store.manifest("base"), base)
    cpu, cuda = estimates.quantization(source, RtnScheme(), 0, ["cpu", "cuda:0"]).devices
    assert cpu.HasField("duration")
    assert not cuda.HasField("duration")
    assert cuda.live_bytes > cpu.live_bytes  # dequantized there
    assert estimates.load(source, ["cuda:0"], []).devices[0].fits is False


def test_files_that_say_nothing_are_named(store: Store, tmp_path: Path) -> None:
    base = store.imported(random_source(tmp_path / "source", **FAMILIES["llama-tied"]))
    (base / "config.json").write_text("{}")
    with pytest.raises(LowbitError, match="base do not say") as caught:
        footprint.read(store.manifest("base"), base)
    assert caught.value.reason is Reason.ARTIFACT_CORRUPT
