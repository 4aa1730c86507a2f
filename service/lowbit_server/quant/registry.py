"""Which schemes there are and where each can be used. Imports none of their libraries."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason, invalid
from lowbit_server.quant.schemes import FloatScheme, ScriptedScheme

if TYPE_CHECKING:
    from lowbit_server.quant.schemes import Provider, Scheme
    from lowbit_server.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Availability:
    """Whether a scheme can be used on a device, and why not."""

    can_quantize: bool
    can_serve: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SchemeInfo:
    """What a scheme is and needs."""

    name: str
    description: str
    bits_per_weight: float
    """Stored bits a quantized weight with default options, scales included."""
    calibrated: bool = False
    packages: tuple[str, ...] = ()
    """Packages that quantizing and serving import."""

    def availability(self, device: str, *, gptqmodel: bool) -> Availability:
        """Return whether models can be quantized with it and served on a device here.

        `gptqmodel` says whether there is an environment with that library.
        """
        others = "" if gptqmodel or not self.calibrated else _OTHERS
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            reason = f"{self.name} on {device} needs: pip install {' '.join(missing)}"
            return Availability(can_quantize=False, can_serve=False, reason=reason)
        return Availability(can_quantize=True, can_serve=True, reason=others)


OWN_ARCHITECTURES = frozenset(
    f"{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
)
"""What our own GPTQ and AWQ know; they follow the activations through each layer."""
_OTHERS = (
    "architectures other than Llama, Mistral, Qwen2, Qwen3 and SmolLM3 need gptqmodel: "
    "pip install 'lowbit-server[gptqmodel]' in an environment of its own, and set "
    "LOWBIT_GPTQMODEL_PYTHON to that environment's Python"
)
_BITSANDBYTES = ("bitsandbytes", "accelerate")
# One 8-bit scale for 64 weights and one 32-bit scale for 256 of those (QLoRA, section 3).
_BNB_4BIT_BITS = 4 + 8 / 64 + 32 / (64 * 256)
# One 16-bit scale and one zero point for 64 weights.
_GROUPED_4BIT_BITS = 4 + (16 + 4) / 64

_SCHEMES = (
    SchemeInfo("fp32", "IEEE 32-bit floating point", 32),
    SchemeInfo("fp16", "IEEE 16-bit floating point", 16),
    SchemeInfo("bf16", "bfloat16", 16),
    SchemeInfo(
        "int8",
        "LLM.int8: 8-bit rows, outlier columns in 16 bit (Dettmers et al. 2022)",
        8,
        packages=_BITSANDBYTES,
    ),
    SchemeInfo(
        "nf4",
        "4-bit NormalFloat in blocks of 64 (QLoRA, Dettmers et al. 2023)",
        _BNB_4BIT_BITS,
        packages=_BITSANDBYTES,
    ),
    SchemeInfo(
        "fp4", "4-bit floating point in blocks of 64", _BNB_4BIT_BITS, packages=_BITSANDBYTES
    ),
    SchemeInfo(
        "gptq",
        "GPTQ: second-order rounding (Frantar et al. 2023)",
        _GROUPED_4BIT_BITS,
        calibrated=True,
    ),
    SchemeInfo(
        "awq",
        "AWQ: activation-aware scaling (Lin et al. 2024)",
        _GROUPED_4BIT_BITS,
        calibrated=True,
    ),
    SchemeInfo("rtn", "round to nearest in the GPTQ layout", _GROUPED_4BIT_BITS),
)


def schemes() -> tuple[SchemeInfo, ...]:
    """Return every scheme that the API knows."""
    return _SCHEMES


def follows(source: Manifest) -> bool:
    """Return whether our own calibrated methods know a model's architecture."""
    return source.architecture in OWN_ARCHITECTURES


def is_calibrated(scheme: Scheme) -> bool:
    """Return whether a scheme uses calibration text."""
    return any(info.calibrated for info in _SCHEMES if info.name == scheme.name)


def provider(scheme: Scheme, source: Manifest) -> Provider:
    """Return whose code quantizes a model with a scheme."""
    return "own" if not is_calibrated(scheme) or follows(source) else "gptqmodel"


def check(scheme: Scheme, source: Manifest, device: str, *, gptqmodel: bool) -> None:
    """Check, before any work, that a model can be quantized with a scheme on a device.

    `gptqmodel` says whether there is an environment with that library.

    Raises LowbitError: SCHEME_UNAVAILABLE that says what to install, INVALID_FIELD for a
    source that is quantized already.
    """
    info = next((info for info in _SCHEMES if info.name == scheme.name), None)
    if info is None:
        raise invalid("scheme", f"{scheme.name} is no scheme to quantize with")
    found = info.availability(device, gptqmodel=gptqmodel)
    other = provider(scheme, source) == "gptqmodel"
    if not (gptqmodel if other else found.can_quantize):
        metadata = {"scheme": scheme.name, "device": device}
        if other:
            metadata["architecture"] = source.architecture
        raise LowbitError(Reason.SCHEME_UNAVAILABLE, found.reason, metadata=metadata)
    check_source(source)


def check_source(source: Manifest) -> None:
    """Raise INVALID_FIELD for a model that has no weights or is quantized already."""
    if isinstance(source.scheme, ScriptedScheme):
        raise invalid("source", f"{source.name} is a scripted test model without weights")
    if not isinstance(source.scheme, FloatScheme):
        parent = f": use its parent {source.parent}" if source.parent else ""
        raise invalid(
            "source", f"{source.name} is quantized already ({source.scheme.name}){parent}"
        )
