"""Writes the logits of checkpoints as transformers and its official back ends make them.

Runs in an environment of its own: FOLDER TOKENS.json, the output beside the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Run each folder on the token ids."""
    tokens = torch.tensor([json.loads(Path(sys.argv[1]).read_text())])
    for folder in map(Path, sys.argv[2:]):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu")
        kinds = {type(one).__name__ for one in model.model.layers[0].modules()}
        with torch.inference_mode():
            logits = model(input_ids=tokens).logits[0].float()
        linears = ", ".join(sorted(kind for kind in kinds if "Linear" in kind))
        save_file({"logits": logits}, folder.with_suffix(".logits"), {"linears": linears})


if __name__ == "__main__":
    main()
