"""The schemes: how weights are stored, with their options.

Imports no torch, so that the front can validate and list schemes. The method of a
scheme (`lowbit_server.quant.methods`) runs in a job process only.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

FloatType: TypeAlias = Literal["fp32", "fp16", "bf16"]
Provider: TypeAlias = Literal["own", "gptqmodel"]
"""Whose code quantizes: ours, or gptqmodel in an environment of its own."""


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FloatScheme(_Options):
    """Plain floating-point weights."""

    kind: Literal["float"] = "float"
    type: FloatType

    @property
    def name(self) -> str:
        """The scheme's name."""
        return self.type


class Int8Scheme(_Options):
    """LLM.int8 (Dettmers et al. 2022): 8-bit weights, outlier columns in 16 bit."""

    kind: Literal["int8"] = "int8"
    outlier_threshold: float = 6.0

    @property
    def name(self) -> str:
        """The scheme's name."""
        return "int8"


class Bnb4BitScheme(_Options):
    """4-bit block-wise quantization of bitsandbytes; blocks of 64 weights."""

    kind: Literal["bnb_4bit"] = "bnb_4bit"
    quant_type: Literal["nf4", "fp4"]
    compute_type: FloatType = "bf16"
    double_quant: bool = True

    @property
    def name(self) -> str:
        """The scheme's name."""
        return self.quant_type


class LayerBits(_Options):
    """Bits of one decoder layer's weights."""

    layer: int
    """Number of the decoder layer, from 0."""
    bits: Literal[2, 3, 4, 8]


class GptqScheme(_Options):
    """GPTQ (Frantar et al. 2023)."""

    kind: Literal["gptq"] = "gptq"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = 64
    desc_act: bool = True
    sym: bool = False
    damp: float = 0.01
    layers: tuple[LayerBits, ...] = ()
    """Decoder layers that are stored with other bits."""

    @property
    def name(self) -> str:
        """The scheme's name."""
        return "gptq"


class AwqScheme(_Options):
    """AWQ (Lin et al. 2024), 4 bit."""

    kind: Literal["awq"] = "awq"
    group_size: Literal[-1, 32, 64, 128] = 64
    zero_point: bool = True

    @property
    def name(self) -> str:
        """The scheme's name."""
        return "awq"


class RtnScheme(_Options):
    """Round to nearest in the GPTQ layout, without calibration."""

    kind: Literal["rtn"] = "rtn"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = 64
    sym: bool = False

    @property
    def name(self) -> str:
        """The scheme's name."""
        return "rtn"


class ScriptedScheme(_Options):
    """No weights: the scripted engine that tests use."""

    kind: Literal["scripted"] = "scripted"

    @property
    def name(self) -> str:
        """The scheme's name."""
        return "scripted"


class AutoScheme(_Options):
    """A wish, which no model is stored in: the least loss that fits a budget."""

    kind: Literal["auto"] = "auto"
    max_live_bytes: int
    """Most bytes that the model may take once live."""

    @property
    def name(self) -> str:
        """The scheme's name."""
        return "auto"


Scheme: TypeAlias = Annotated[
    FloatScheme | Int8Scheme | Bnb4BitScheme | GptqScheme | AwqScheme | RtnScheme | ScriptedScheme,
    Field(discriminator="kind"),
]
RequestedScheme: TypeAlias = Annotated[Scheme | AutoScheme, Field(discriminator="kind")]
"""What a job may be asked for."""


def describe(scheme: Scheme) -> str:
    """Return a scheme's name and what its size depends on, such as "gptq bits=4 group_size=64"."""
    words = [scheme.name]
    words += [f"{name}={value}" for name, value in scheme if name in {"bits", "group_size"}]
    if isinstance(scheme, GptqScheme) and scheme.layers:
        layers = ",".join(f"{one.layer}:{one.bits}" for one in scheme.layers)
        words.append(f"layers={layers}")
    return " ".join(words)
