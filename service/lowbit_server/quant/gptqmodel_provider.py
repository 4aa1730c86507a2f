"""Quantizes with gptqmodel what our own GPTQ and AWQ do not know.

The library patches transformers when it is imported and pins what it needs: it runs in a
job process whose environment is its own. Its work cannot be resumed: cancelling a job ends
its process, and the next one begins anew.
"""

from __future__ import annotations

import os
import sys
from contextlib import chdir
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.quant.schemes import AwqScheme

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from lowbit_server.quant.schemes import GptqScheme


def quantize(
    scheme: GptqScheme | AwqScheme,
    source: Path,
    samples: torch.Tensor,
    result: Path,
    progress: Callable[[int], None],
) -> None:
    """Write the quantized model of a folder to another, as gptqmodel saves it.

    Both paths are absolute. `samples` are token ids, int64 (samples, tokens); `progress` gets
    the number of decoder layers that are done.

    Raises LowbitError(SCHEME_UNAVAILABLE) where gptqmodel is missing.
    """
    if find_spec("gptqmodel") is None:
        message = f"{sys.executable} has no gptqmodel: pip install 'lowbit-server[gptqmodel]' there"
        raise LowbitError(Reason.SCHEME_UNAVAILABLE, message)
    # More workers than processors make it fail; so does finding it out by itself on two.
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(len(os.sched_getaffinity(0)))
    from gptqmodel import GPTQModel  # noqa: PLC0415  (it patches what is imported before)

    class Progress:
        """Called by the library; its return value is looked at."""

        def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
            if submodule_finalized:
                progress(layer_idx + 1)

    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in samples.tolist()]
    result.mkdir()
    with chdir(result):  # it writes logs into whatever folder it runs in
        model = GPTQModel.load(str(source), _config(scheme), device="cpu")
        model.layer_callback = Progress()
        model.quantize(rows, batch_size=1)
        model.save(str(result))


def _config(scheme: GptqScheme | AwqScheme) -> object:
    from gptqmodel.quantization import AWQConfig, GPTQConfig  # noqa: PLC0415

    if isinstance(scheme, AwqScheme):
        return AWQConfig(bits=4, group_size=scheme.group_size, sym=not scheme.zero_point)
    return GPTQConfig(
        bits=scheme.bits,
        group_size=scheme.group_size,
        sym=scheme.sym,
        desc_act=scheme.desc_act,
        # As our own method: columns keep their places, and their groups.
        static_groups=scheme.desc_act,
        damp_percent=scheme.damp,
    )
