"""Names of older libraries and what to write instead.

Bitsandbytes through transformers, AutoGPTQ, AutoAWQ and gptqmodel have named the same things
differently. Nobody should have to guess, and nothing that was asked for is dropped in silence.
"""

from __future__ import annotations

from types import MappingProxyType

_KERNELS = "leave it out: the server chooses kernels by device when a model is loaded"
_CONTEXT = "leave it out: a model is always loaded for its whole context"
_ALL = "leave it out: every linear layer is quantized, the output embedding stays as it is"
_SEQUENTIAL = "leave it out: layers are always quantized one after the other"

REPLACEMENTS = MappingProxyType(
    {
        # libraries, typed as schemes
        "autoawq": 'use scheme "awq"',
        "auto_awq": 'use scheme "awq"',
        "auto_gptq": 'use scheme "gptq"',
        "autogptq": 'use scheme "gptq"',
        "gptqmodel": 'use scheme "gptq" or "awq"',
        "bitsandbytes": 'use scheme "int8", "nf4" or "fp4"',
        "bnb": 'use scheme "int8", "nf4" or "fp4"',
        "llm_int8": 'use scheme "int8"',
        "float32": 'use scheme "fp32"',
        "float16": 'use scheme "fp16"',
        "bfloat16": 'use scheme "bf16"',
        # transformers and bitsandbytes
        "quantization_config": "use scheme with its options",
        "quant_method": "use scheme",
        "torch_dtype": 'use type of the import, or scheme "bf16", "fp16" or "fp32"',
        "device_map": "use device",
        "load_in_8bit": 'use scheme "int8"',
        "load_in_4bit": 'use scheme "nf4" or "fp4"',
        "bnb_4bit_quant_type": 'use scheme "nf4" or "fp4"',
        "bnb_4bit_compute_dtype": 'use compute_type of scheme "nf4" or "fp4"',
        "bnb_4bit_use_double_quant": 'use double_quant of scheme "nf4" or "fp4"',
        "bnb_4bit_quant_storage": "leave it out: two codes are stored in each byte",
        "llm_int8_threshold": 'use outlier_threshold of scheme "int8"',
        "llm_int8_skip_modules": _ALL,
        "llm_int8_has_fp16_weight": "leave it out: weights are always stored in 8 bit",
        "llm_int8_enable_fp32_cpu_offload": "leave it out: a model is on one device",
        "modules_to_not_convert": _ALL,
        # GPTQ
        "wbits": "use bits",
        "w_bit": "use bits",
        "groupsize": "use group_size",
        "q_group_size": "use group_size",
        "act_order": "use desc_act",
        "percdamp": "use damp",
        "damp_percent": "use damp",
        "static_groups": "leave it out: groups keep their columns with desc_act too",
        "act_group_aware": "use desc_act: groups keep their columns with it",
        "true_sequential": _SEQUENTIAL,
        "cache_block_outputs": _SEQUENTIAL,
        "use_exllama": _KERNELS,
        "disable_exllama": _KERNELS,
        "exllama_config": _KERNELS,
        "use_marlin": _KERNELS,
        "use_triton": _KERNELS,
        "use_cuda_fp16": _KERNELS,
        "backend": _KERNELS,
        "max_input_length": _CONTEXT,
        # AWQ
        "version": "leave it out: awq is stored in the GEMM layout",
        "do_fuse": _KERNELS,
        "fuse_layers": _KERNELS,
        "modules_to_fuse": _KERNELS,
        "fuse_max_seq_len": _CONTEXT,
        "max_seq_len": _CONTEXT,
        # calibration
        "dataset": "use source of calibration",
        "calib_data": "use source of calibration",
        "nsamples": "use samples of calibration",
        "n_samples": "use samples of calibration",
        "max_calib_samples": "use samples of calibration",
        "model_seqlen": "use sequence_tokens of calibration",
        "seqlen": "use sequence_tokens of calibration",
        "max_calib_seq_len": "use sequence_tokens of calibration",
        "batch_size": "leave it out: the server chooses it",
        "tokenizer": "leave it out: a model brings its tokenizer",
        "trust_remote_code": "leave it out: code of models is never run",
    }
)
"""Old names in lower case with underscores, and the advice for each."""


def replacement(name: str) -> str | None:
    """Return what to write instead of an old name, however it is spelled; None if unknown."""
    return REPLACEMENTS.get(name.strip().lstrip("-").replace("-", "_").lower())
