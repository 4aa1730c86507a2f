from __future__ import annotations

from typing import Any

import pytest

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.foreign import foreign_scheme, stored_parameters
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
    Scheme,
)
from lowbit_server.store.headers import TensorEntry


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"load_in_8bit": True, "llm_int8_threshold": 5.0}, Int8Scheme(outlier_threshold=5)),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_use_double_quant": True,
            },
            Bnb4BitScheme(quant_type="nf4"),
        ),
        (
            {"load_in_4bit": True},
            Bnb4BitScheme(quant_type="fp4", compute_type="fp32", double_quant=False),
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
            GptqScheme(bits=4, group_size=128, desc_act=False, sym=True),
        ),
        (
            {
                "quant_method": "gptq",
                "bits": 3,
                "group_size": 32,
                "desc_act": False,
                "sym": True,
                "meta": {"quantizer": ["lowbit-server:0.1.0"], "method": "rtn"},
            },
            RtnScheme(bits=3, group_size=32, sym=True),
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
            AwqScheme(group_size=128),
        ),
        (
            {
                "quant_method": "awq",
                "bits": 4,
                "group_size": -1,
                "zero_point": False,
                "version": "GEMM",
                "modules_to_not_convert": ["lm_head"],
            },
            AwqScheme(group_size=-1, zero_point=False),
        ),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "format": "gemm"},
            AwqScheme(group_size=32),
        ),
    ],
)
def test_known_methods_have_a_scheme(config: dict[str, Any], scheme: Scheme) -> None:
    assert foreign_scheme(config, ()) == scheme


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quant_method": "fp8"},
        {"quant_method": "gptq", "bits": 5, "group_size": 128},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"},
        {"quant_method": "awq", "bits": 8, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 16},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "format": "llm-awq"},
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {"+:(": {"bits": 8}}},
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": {".": {"bits": 5}}},
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "dynamic": ["."]},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": ["x"]},
        ["load_in_8bit"],
        None,
    ],
)
def test_what_no_scheme_describes_is_refused(config: Any) -> None:
    with pytest.raises(LowbitError) as caught:
        foreign_scheme(config, ["model.layers.0.q.qweight"])
    assert caught.value.reason is Reason.SOURCE_UNSUPPORTED


def test_packed_weights_count_as_what_they_stand_for() -> None:
    def entry(dtype: str, *shape: int) -> TensorEntry:
        return TensorEntry(dtype, shape, 0, 0)

    norm = {"norm.weight": entry("BF16", 64)}
    packed = {"q.weight": entry("U8", 2048, 1), "q.weight.absmax": entry("U8", 64)}
    assert stored_parameters(norm | packed, {"load_in_4bit": True}) == 64 + 4096
    grouped = {"q.qweight": entry("I32", 8, 64), "q.scales": entry("F16", 1, 64)}
    gptq = {"quant_method": "gptq", "bits": 4}
    assert stored_parameters(norm | grouped, gptq) == 64 + 4096
    mixed = gptq | {"dynamic": {"+:q": {"bits": 8}}}
    assert stored_parameters(norm | grouped, mixed) == 64 + 2048
    assert stored_parameters(norm | grouped, {"quant_method": "awq", "bits": 4}) == 64 + 4096
    rows = {"q.weight": entry("I8", 64, 64), "q.SCB": entry("F32", 64)}
    assert stored_parameters(norm | rows, {"load_in_8bit": True}) == 64 + 4096
