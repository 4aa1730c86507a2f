"""Quantizes with gptqmodel, for benchmarks/quantize.py; runs in an environment of its own.

METHOD OPTIONS FOLDER SAMPLES.json RESULT. Says on stdout which phase begins.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Quantize a folder with token ids (samples, tokens), 4 bit in groups of 64."""
    method, options, folder, samples, result = sys.argv[1:]
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # it prints banners and bars

    def phase(name: str) -> None:
        reports.write(json.dumps({"phase": name}) + "\n")
        reports.flush()

    os.nice(10)  # as our own job process
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(len(os.sched_getaffinity(0)))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from gptqmodel import GPTQModel  # noqa: PLC0415  (it reads the environment)
    from gptqmodel.quantization import AWQConfig, GPTQConfig  # noqa: PLC0415

    kind = {"gptq": GPTQConfig, "awq": AWQConfig}[method]
    rows = [
        {"input_ids": row, "attention_mask": [1] * len(row)}
        for row in json.loads(Path(samples).read_text())
    ]
    Path(result).mkdir()
    os.chdir(result)  # it writes logs wherever it runs
    config = kind(bits=4, group_size=64, sym=False, **json.loads(options))
    model = GPTQModel.load(folder, config, device="cpu")
    phase("quantize")
    model.quantize(rows, batch_size=8)
    phase("save")
    model.save(result)


if __name__ == "__main__":
    main()
