"""Fields of other libraries' quantization_config: read, harmless or refused."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs
from transformers import AwqConfig, BitsAndBytesConfig, GPTQConfig

from lowbit.renamed import REPLACEMENTS
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.foreign_fields import check_fields

# As AutoGPTQ, optimum and AutoAWQ wrote them.
AUTO_GPTQ = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.1,
    "desc_act": True,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
    "is_marlin_format": False,
    "quant_method": "gptq",
}
READ = {
    *("quant_method", "damp_percent", "version", "load_in_8bit", "load_in_4bit"),
    *("llm_int8_threshold", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype"),
    "bnb_4bit_use_double_quant",
}
AUTO_AWQ = {"quant_method": "awq", "zero_point": True, "group_size": 128, "bits": 4}


@pytest.mark.parametrize(
    "config",
    [
        AUTO_GPTQ,
        AUTO_AWQ | {"version": "gemm", "modules_to_not_convert": None},
        AUTO_AWQ | {"do_fuse": True, "fuse_max_seq_len": 512, "exllama_config": {"version": 2}},
        GPTQConfig(bits=4, tokenizer="x").to_dict(),
        AwqConfig(bits=4).to_dict(),
        BitsAndBytesConfig(load_in_4bit=True).to_dict(),
        BitsAndBytesConfig(load_in_8bit=True).to_dict(),
    ],
)
def test_what_the_libraries_write_is_understood(config: dict[str, Any]) -> None:
    check_fields(config)


@pytest.mark.parametrize("old", REPLACEMENTS)
def test_an_old_name_is_read_or_answered(old: str) -> None:
    refused = None
    with capture_logs() as logs:
        try:
            check_fields({old: 7})
        except LowbitError as error:
            refused = error
    answers = [entry["advice"] for entry in logs]
    if refused is not None:
        assert refused.reason is Reason.SOURCE_UNSUPPORTED
        answers.append(refused.message.rpartition("; ")[2])
    assert answers == ([] if old in READ else [REPLACEMENTS[old]])


@pytest.mark.parametrize(
    "change",
    [
        {"is_marlin_format": True},
        {"lm_head": True},
        {"pack_dtype": "int8"},
        {"rotation": "hadamard"},
        {"q_group_size": 64},
    ],
)
def test_what_would_change_the_model_is_refused(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(LowbitError, match=name) as caught:
        check_fields(AUTO_GPTQ | change)
    assert caught.value.reason is Reason.SOURCE_UNSUPPORTED
