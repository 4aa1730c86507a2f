"""Names and options of schemes become messages."""

from __future__ import annotations

from typing import Any

import pytest

from lowbit import scheme
from lowbit.schemes import NAMES
from lowbit.v1 import quantization_pb2 as pb


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("fp32", {}, pb.Scheme(float=pb.FloatScheme(type=pb.FLOAT_TYPE_FP32))),
        ("fp16", {}, pb.Scheme(float=pb.FloatScheme(type=pb.FLOAT_TYPE_FP16))),
        ("bf16", {}, pb.Scheme(float=pb.FloatScheme(type=pb.FLOAT_TYPE_BF16))),
        ("int8", {}, pb.Scheme(int8=pb.Int8Scheme())),
        (
            "int8",
            {"outlier_threshold": 0.0},
            pb.Scheme(int8=pb.Int8Scheme(outlier_threshold=0.0)),
        ),
        (
            "nf4",
            {"compute_type": "fp32", "double_quant": False},
            pb.Scheme(
                bnb_4bit=pb.Bnb4BitScheme(
                    quant_type=pb.BNB_QUANT_TYPE_NF4,
                    compute_type=pb.FLOAT_TYPE_FP32,
                    double_quant=False,
                )
            ),
        ),
        (
            "fp4",
            {},
            pb.Scheme(bnb_4bit=pb.Bnb4BitScheme(quant_type=pb.BNB_QUANT_TYPE_FP4)),
        ),
        (
            "gptq",
            {"bits": 3, "group_size": 32, "desc_act": False, "sym": True, "damp": 0.5},
            pb.Scheme(
                gptq=pb.GptqScheme(bits=3, group_size=32, desc_act=False, sym=True, damp=0.5)
            ),
        ),
        ("awq", {"zero_point": False}, pb.Scheme(awq=pb.AwqScheme(zero_point=False))),
        (
            "auto",
            {"max_live_bytes": 2**33},
            pb.Scheme(auto=pb.AutoScheme(max_live_bytes=2**33)),
        ),
        ("rtn", {"group_size": -1}, pb.Scheme(rtn=pb.RtnScheme(group_size=-1))),
    ],
)
def test_scheme(name: str, options: dict[str, Any], expected: pb.Scheme) -> None:
    assert scheme(name, **options) == expected


def test_an_unknown_name_lists_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="unknown scheme 'int3'") as caught:
        scheme("int3")
    assert all(name in str(caught.value) for name in NAMES)


def test_an_option_of_another_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="'int8' has no option bits; it has outlier_threshold"):
        scheme("int8", bits=4)


@pytest.mark.parametrize("budget", [{}, {"max_live_bytes": 0}])
def test_auto_needs_a_budget(budget: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="'auto' needs a budget"):
        scheme("auto", **budget)


def test_an_unknown_type_lists_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="allowed are fp32, fp16, bf16"):
        scheme("nf4", compute_type="int8")
