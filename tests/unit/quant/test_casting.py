from __future__ import annotations

import pytest
import torch

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.casting import cast, float_type, type_name
from lowbit_server.store.headers import TensorEntry


def entry(dtype: str, elements: int) -> TensorEntry:
    return TensorEntry(dtype, (elements,), 0, 0)


def test_floats_are_cast_and_integers_kept() -> None:
    assert cast("a", torch.ones(2), torch.bfloat16).dtype == torch.bfloat16
    assert cast("a", torch.ones(2, dtype=torch.int32), torch.bfloat16).dtype == torch.int32
    tensor = torch.ones(2)
    assert cast("a", tensor, torch.float32) is tensor


@pytest.mark.parametrize("value", [70000.0, -70000.0])
def test_values_beyond_fp16_are_refused(value: float) -> None:
    assert cast("a", torch.tensor([65504.0]), torch.float16).item() == 65504
    with pytest.raises(LowbitError, match=r"layer\.weight reaches 70000") as caught:
        cast("layer.weight", torch.tensor([1.0, value]), torch.float16)
    assert caught.value.reason is Reason.INVALID_FIELD


def test_the_type_is_that_of_most_elements() -> None:
    entries = {"a": entry("BF16", 10), "b": entry("F32", 3), "c": entry("I64", 99)}
    assert float_type(entries) == "bf16"
    assert type_name("bf16") == "bfloat16"


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3"])
def test_types_that_cannot_be_served_are_refused(dtype: str) -> None:
    with pytest.raises(LowbitError, match=dtype) as caught:
        float_type({"a": entry("F32", 3), "odd": entry(dtype, 1)})
    assert caught.value.reason is Reason.SOURCE_UNSUPPORTED
    with pytest.raises(LowbitError):
        float_type({"a": entry("I64", 3)})
