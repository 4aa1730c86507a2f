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
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from lowbit_server.jobs.spec import CalibrationSpec, EvaluationSpec
from lowbit_server.quant.registry import is_calibrated
from lowbit_server.quant.schemes import (
    AwqScheme,
    Bnb4BitScheme,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
)
from lowbit_server.quant.text import evaluation_text
from tests.models.quantkit import Store, dense

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
    "rtn-3": RtnScheme(bits=3),
    "rtn-4": RtnScheme(),
    "rtn-4-sym": RtnScheme(sym=True),
    "rtn-8-sym": RtnScheme(bits=8, sym=True),
    "gptq-3": GptqScheme(bits=3),
    "gptq-4": GptqScheme(),
    "gptq-4-sym": GptqScheme(sym=True),
    "gptq-8-sym": GptqScheme(bits=8, sym=True),
    "awq-4": AwqScheme(),
}
# Its CPU build has kernels for 4 bits only, and for GPTQ's layout only symmetric ones.
VLLM = ("rtn-4-sym", "gptq-4-sym", "awq-4")


@dataclass(frozen=True, slots=True)
class Row:
    """What one peer made of one artefact."""

    artefact: str
    peer: str
    passed: bool
    result: str


def artefact(store: Store, name: str) -> Path:
    """Quantize with one scheme and return the folder."""
    scheme = SCHEMES[name]
    calibration = None
    if is_calibrated(scheme):
        calibration = CalibrationSpec(samples=16, sequence_tokens=256)
    return store.quantized(scheme, name, calibration=calibration)


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


def check_text(name: str, expected: list[int], file: Path) -> Row:
    """Compare greedy tokens of vLLM with the reference."""
    found = json.loads(file.read_text())
    pairs = enumerate(zip(expected, found, strict=True))
    equal = next((place for place, (one, two) in pairs if one != two), len(expected))
    text = f"{equal} of {len(expected)} greedy tokens alike from the start"
    return Row(name, "vllm", equal >= MIN_EQUAL_TOKENS, text)


def failed(name: str, peer: str, run: subprocess.CompletedProcess[str]) -> Row:
    """Describe a peer that could not load an artefact."""
    lines = [line for line in run.stderr.splitlines() if "Error" in line]
    # The first is the cause; vLLM's parent process adds others.
    return Row(name, peer, passed=False, result=(lines or ["no output"])[0][-200:])


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
    parser.add_argument("--only", nargs="*", choices=SCHEMES, help="artefacts; default: all")
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
        for name in options.only or SCHEMES:
            folder = artefact(store, name)
            model = dense(options.base, folder, torch.bfloat16)
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
                file = folder.with_suffix(".greedy")
                rows.append(
                    check_text(name, text[0, PROMPT_TOKENS:].tolist(), file)
                    if file.exists()
                    else failed(name, "vllm", run)
                )
            for row in rows[-2 if name in VLLM else -1 :]:
                said = "passed" if row.passed else "FAILED"
                print(f"| {row.artefact} | {row.peer} | {said} | {row.result} |", flush=True)
    finally:
        shutil.rmtree(home)
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
