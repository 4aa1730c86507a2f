"""Which fields of a `quantization_config` are understood; others may change every number.

The libraries that write such files swallow what they do not know. Here a field is read, or
known to change nothing once the weights are stored, or refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from lowbit.renamed import replacement
from lowbit_server.errors import LowbitError, Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

log = structlog.get_logger()

_READ = {
    *("quant_method", "bits", "group_size", "sym", "desc_act", "damp_percent", "zero_point"),
    *("checkpoint_format", "format", "version", "meta", "dynamic"),
    *("load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit", "llm_int8_threshold"),
    *("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant"),
}
# How the weights came about, and hints for loaders; the tensors say which layers are quantized.
_RECORDS = {
    *("static_groups", "true_sequential", "act_group_aware", "dataset", "tokenizer", "quantizer"),
    *("model_seqlen", "model_name_or_path", "model_file_base_name", "batch_size", "pad_token_id"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "hyb_act"),
    *("modules_in_block_to_quantize", "modules_to_not_convert", "llm_int8_skip_modules"),
    *("cache_block_outputs", "max_input_length", "llm_int8_enable_fp32_cpu_offload"),
    *("use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "backend"),
    *("do_fuse", "fuse_max_seq_len", "modules_to_fuse"),
}
# Fields that change nothing with these values only.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "bnb_4bit_quant_storage": ("uint8", None),
    "llm_int8_has_fp16_weight": (False,),
    "is_marlin_format": (False,),
    "lm_head": (False,),
    "pack_dtype": ("int32",),
}


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuse what is not understood; what an older library wanted at run time is logged.

    Raises LowbitError(SOURCE_UNSUPPORTED) that names the field and, if there is one, its
    replacement.
    """
    for name, value in config.items():
        advice = replacement(name)
        if name in _RECORDS:
            if advice and value not in (None, False):
                log.info("field of quantization_config has no effect", field=name, advice=advice)
        elif name not in _READ and value not in _HARMLESS.get(name, ()):
            message = f"quantization_config has {name} = {value!r}, which is not understood"
            message = f"{message}; {advice}" if advice else message
            raise LowbitError(Reason.SOURCE_UNSUPPORTED, message[:500])
