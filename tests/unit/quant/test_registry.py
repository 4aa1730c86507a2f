from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from functools import partial
from importlib import util
from typing import TYPE_CHECKING, get_args

import pytest

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant import registry
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    FloatScheme,
    FloatType,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
    Scheme,
    ScriptedScheme,
)
from lowbit_server.store.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Callable

USABLE: list[Scheme] = [
    *(FloatScheme(type=kind) for kind in get_args(FloatType)),
    Int8Scheme(),
    Bnb4BitScheme(quant_type="nf4"),
    Bnb4BitScheme(quant_type="fp4"),
    RtnScheme(),
    GptqScheme(),
    AwqScheme(),
]


check = partial(registry.check, gptqmodel=False)


def model(scheme: Scheme, parent: str = "", architecture: str = "LlamaForCausalLM") -> Manifest:
    return Manifest(
        name="model",
        revision="0",
        scheme=scheme,
        architecture=architecture,
        parameters=1,
        context_tokens=1,
        vocab_size=1,
        eos_token_ids=(),
        files=(),
        source="",
        source_digest="",
        parent=parent,
        create_time=datetime.now(UTC),
        libraries={},
    )


def test_every_scheme_is_listed_once() -> None:
    names = [info.name for info in registry.schemes()]
    assert sorted(names) == sorted(scheme.name for scheme in USABLE)


@pytest.mark.parametrize("scheme", USABLE, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_usable_schemes_pass(scheme: Scheme, device: str) -> None:
    check(scheme, model(FloatScheme(type="bf16")), device)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., object] = util.find_spec

    def without(name: str) -> object:
        return None if name == "bitsandbytes" else real(name)

    monkeypatch.setattr(registry, "find_spec", without)
    with pytest.raises(LowbitError, match="pip install bitsandbytes") as caught:
        check(Int8Scheme(), model(FloatScheme(type="bf16")), "cpu")
    assert caught.value.reason is Reason.SCHEME_UNAVAILABLE
    check(FloatScheme(type="fp32"), model(FloatScheme(type="bf16")), "cpu")
    nf4 = next(info for info in registry.schemes() if info.name == "nf4").availability(
        "cpu", gptqmodel=False
    )
    assert (nf4.can_quantize, nf4.can_serve) == (False, False)


@pytest.mark.parametrize("scheme", [GptqScheme(), AwqScheme()], ids=lambda scheme: scheme.name)
def test_other_architectures_need_gptqmodel(scheme: Scheme) -> None:
    opt = model(FloatScheme(type="bf16"), architecture="OPTForCausalLM")
    assert registry.provider(scheme, opt) == "gptqmodel"
    assert registry.provider(scheme, model(FloatScheme(type="bf16"))) == "own"
    assert registry.provider(RtnScheme(), opt) == "own"
    registry.check(scheme, opt, "cpu", gptqmodel=True)
    with pytest.raises(
        LowbitError, match=r"lowbit-server\[gptqmodel\].*LOWBIT_GPTQMODEL_PYTHON"
    ) as caught:
        check(scheme, opt, "cpu")
    assert caught.value.reason is Reason.SCHEME_UNAVAILABLE
    assert caught.value.metadata["architecture"] == "OPTForCausalLM"
    info = next(info for info in registry.schemes() if info.name == scheme.name)
    assert "LOWBIT_GPTQMODEL_PYTHON" in info.availability("cpu", gptqmodel=False).reason
    assert "LOWBIT_GPTQMODEL_PYTHON" not in info.availability("cpu", gptqmodel=True).reason


def test_quantized_sources_are_refused() -> None:
    with pytest.raises(LowbitError, match="use its parent base") as caught:
        check(Int8Scheme(), model(Bnb4BitScheme(quant_type="nf4"), "base"), "cpu")
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.violations[0].field == "source"


def test_scripted_models_are_neither_source_nor_result() -> None:
    with pytest.raises(LowbitError) as caught:
        check(Int8Scheme(), model(ScriptedScheme()), "cpu")
    assert caught.value.reason is Reason.INVALID_FIELD
    with pytest.raises(LowbitError) as caught:
        check(ScriptedScheme(), model(FloatScheme(type="bf16")), "cpu")
    assert caught.value.reason is Reason.INVALID_FIELD


def test_the_front_needs_no_torch() -> None:
    code = (
        "import sys, lowbit_server.quant.registry, lowbit_server.store.sources,"
        " lowbit_server.store.artifacts, lowbit_server.jobs.spec;"
        "print(sorted({'torch', 'transformers', 'numpy', 'bitsandbytes'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
