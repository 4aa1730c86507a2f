"""Loads artefacts in transformers and vLLM and compares what they compute with our own codes.

`make interop` builds the environments of both peers and runs this; docs/interop.md has the
result. Every artefact is made from SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from lowbit_server.jobs.spec import CalibrationSpec, EvaluationSpec
from lowbit_server.models.transformers import place
from lowbit_server.quant.awq_packing import AwqLinear, quantization_config
from lowbit_server.quant.dynamic import overrides
from lowbit_server.quant.foreign import grouped_bits
from lowbit_server.quant.packing import PackedLinear
from lowbit_server.quant.registry import is_calibrated
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    GptqScheme,
    Int8Scheme,
    LayerBits,
    RtnScheme,
)
from lowbit_server.quant.text import evaluation_text
from tests.models.quantkit import Store, config, grouped_checkpoint, rounded, weights

if TYPE_CHECKING:
    from lowbit_server.quant.schemes import Scheme

PEERS = Path(__file__).parent
# The peers round in other places: sums in another order, scales in fp16 or bf16. Between two
# sets of kernels for plain bf16 weights the mean KL divergence is 0.002 here.
MAX_MEAN_KL = 0.01
# LLM.int8 of bitsandbytes also quantizes the activations, which we do not (docs/adr/0007).
MAX_MEAN_KL_INT8 = 0.1
PROMPT_TOKENS = 32
GREEDY_TOKENS = 24
# Where the two likeliest tokens are about as likely, rounding decides, and texts part.
MIN_EQUAL_TOKENS = 8

SCHEMES: dict[str, Scheme] = {
    "int8": Int8Scheme(),
    "nf4": Bnb4BitScheme(quant_type="nf4"),
    "fp4": Bnb4BitScheme(quant_type="fp4"),
    "rtn-2": RtnScheme(bits=2, group_size=32),
    "rtn-3": RtnScheme(bits=3),
    "rtn-4": RtnScheme(),
    "rtn-4-sym": RtnScheme(sym=True),
    "rtn-8-sym": RtnScheme(bits=8, sym=True),
    "gptq-4": GptqScheme(),
    "gptq-4-sym": GptqScheme(sym=True),
    "awq-4": AwqScheme(),
}
MIXED = tuple(LayerBits(layer=number, bits=8) for number in (0, 29))
VLLM = ("rtn-4-sym", "rtn-8-sym", "gptq-4-sym", "awq-4", "awq-rounded", "mixed-sym")


@dataclass(frozen=True, slots=True)
class Row:
    """What one peer made of one artefact."""

    artefact: str
    peer: str
    passed: bool
    result: str


def artefacts(store: Store) -> dict[str, Path]:
    """Make an artefact of each scheme that has a method, and two by rounding."""
    made = {}
    for name, scheme in SCHEMES.items():
        calibration = None
        if is_calibrated(scheme):
            calibration = CalibrationSpec(samples=16, sequence_tokens=256)
        made[name] = store.quantized(scheme, name, calibration=calibration)
    base = store.models / "base"

    def awq(_: str, weight: torch.Tensor) -> AwqLinear:
        return AwqLinear.of(*rounded(weight, 4, 64, sym=False))

    def mixed(name: str, weight: torch.Tensor) -> PackedLinear:
        bits = grouped_bits(said, name)
        return PackedLinear.of(bits, *rounded(weight, bits, 64, sym=True))

    said = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 64}
    said |= {"sym": True, "desc_act": False, "dynamic": overrides(MIXED)}
    folder = store.models / "awq-rounded"
    made["awq-rounded"], _ = grouped_checkpoint(base, folder, quantization_config(64), awq)
    made["mixed-sym"], _ = grouped_checkpoint(base, store.models / "mixed-sym", said, mixed)
    return made


def reference(base: Path, folder: Path) -> Any:
    """Return a model whose weights are dequantized by our own definition of the layouts."""
    said = config(folder)["quantization_config"]
    if said.get("quant_method") not in {"gptq", "awq"}:
        return place(folder, "cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    tensors = weights(folder)
    state = {name: tensor for name, tensor in tensors.items() if name.endswith((".weight", "bias"))}
    for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
        kind = AwqLinear if said["quant_method"] == "awq" else PackedLinear
        parts = [tensors[f"{name}.{key}"] for key in kind.keys]
        layer = AwqLinear(*parts) if kind is AwqLinear else None
        layer = layer or PackedLinear(grouped_bits(said, name), *parts)
        state[f"{name}.weight"] = layer.dequantized(torch.bfloat16)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:  # tied
        raise ValueError(f"{folder.name}: missing {missing}, unexpected {unexpected}")
    return model


def check_logits(name: str, expected: torch.Tensor, file: Path) -> Row:
    """Compare logits (tokens, vocabulary) of transformers with the reference."""
    with safe_open(file, "pt") as opened:
        found, linears = opened.get_tensor("logits"), opened.metadata()["linears"]
    base, own = expected.log_softmax(-1), found.log_softmax(-1)
    mean_kl = (base.exp() * (base - own)).sum(-1).mean().item()
    same = (base.argmax(-1) == own.argmax(-1)).double().mean().item()
    deviation = ((found - expected).norm() / expected.norm()).item()
    passed = mean_kl <= (MAX_MEAN_KL_INT8 if name == "int8" else MAX_MEAN_KL)
    text = f"mean KL {mean_kl:.5f}, norm {deviation:.4f}, top-1 {same:.3f} ({linears})"
    return Row(name, "transformers", passed, text)


def check_text(name: str, expected: list[int], output: str) -> Row:
    """Compare greedy tokens of vLLM with the reference."""
    found = json.loads(output.splitlines()[-1])
    pairs = enumerate(zip(expected, found, strict=True))
    equal = next((place for place, (one, two) in pairs if one != two), len(expected))
    text = f"{equal} of {len(expected)} greedy tokens alike from the start"
    return Row(name, "vllm", equal >= MIN_EQUAL_TOKENS, text)


def failed(name: str, peer: str, run: subprocess.CompletedProcess[str]) -> Row:
    """Describe a peer that could not load an artefact."""
    lines = [line for line in run.stderr.splitlines() if "Error" in line]
    return Row(name, peer, passed=False, result=(lines or ["no output"])[-1][:200])


def peer(python: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of this folder in a peer's environment."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "GPTQMODEL_CPU_WORKERS": "2",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [str(python), str(PEERS / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def main() -> None:
    """Print a table and fail when a peer computes something else."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="SmolLM2 in bf16, imported")
    parser.add_argument("--transformers", type=Path, required=True, help="Python with gptqmodel")
    parser.add_argument("--vllm", type=Path, required=True, help="Python with vllm-cpu")
    parser.add_argument("--only", nargs="*", help="artefacts; default: all")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="interop-"))
    rows = []
    try:
        store = Store(home)
        (store.models / "base").symlink_to(options.base.resolve())
        tokenizer = Tokenizer.from_file(str(options.base / "tokenizer.json"))
        ids = tokenizer.encode(evaluation_text(EvaluationSpec()), add_special_tokens=False).ids
        (home / "long.json").write_text(json.dumps(ids[:512]))
        (home / "short.json").write_text(json.dumps(ids[:PROMPT_TOKENS]))
        for name, folder in artefacts(store).items():
            if options.only and name not in options.only:
                continue
            model = reference(options.base, folder)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([ids[:512]])).logits[0].float()
                start = torch.tensor([ids[:PROMPT_TOKENS]])
                text = model.generate(
                    start, do_sample=False, max_new_tokens=GREEDY_TOKENS, eos_token_id=None
                )
            run = peer(options.transformers, "peer_transformers.py", home / "long.json", folder)
            file = folder.with_suffix(".logits")
            rows.append(
                check_logits(name, logits, file)
                if file.exists()
                else failed(name, "transformers", run)
            )
            if name in VLLM:
                arguments = folder, home / "short.json", GREEDY_TOKENS
                run = peer(options.vllm, "peer_vllm.py", *arguments)
                rows.append(
                    failed(name, "vllm", run)
                    if run.returncode
                    else check_text(name, text[0, PROMPT_TOKENS:].tolist(), run.stdout)
                )
            for row in rows[-2 if name in VLLM else -1 :]:
                said = "passed" if row.passed else "FAILED"
                print(f"| {row.artefact} | {row.peer} | {said} | {row.result} |", flush=True)
    finally:
        shutil.rmtree(home)
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
