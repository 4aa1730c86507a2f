"""What the bits of a quantized model depend on.

Imports torch: for job processes only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lowbit_server import kernels
from lowbit_server.hardware import processor_name
from lowbit_server.jobs.describing import library_versions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lowbit_server.quant.schemes import RequestedScheme
    from lowbit_server.store.manifest import Manifest

# Those of a manifest that only read and write files change no bit.
_LIBRARIES = ("lowbit-server", "torch", "transformers", "bitsandbytes")


def fingerprint(
    scheme: RequestedScheme, device: str, source: Manifest, samples: str
) -> Mapping[str, str]:
    """Return name and value of everything that decides a job's weights, but for threads.

    `samples` is the digest of the calibration samples, empty where there are none.
    """
    versions = library_versions()
    found = {"source": source.revision, "device": device, "processor": _processor(device)}
    found |= {f"scheme.{name}": str(value) for name, value in scheme}
    found |= {"calibration": samples, "kernels": kernels.digest()}
    return found | {name: versions[name] for name in _LIBRARIES if name in versions}


def _processor(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    # Products sum up in another order where another instruction set is used.
    return f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}"
