"""Between the public messages of schemes and gates and the service's own dataclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from lowbit.v1 import quantization_pb2
from lowbit_server.jobs.spec import GateSpec
from lowbit_server.quant.schemes import (
    AutoScheme,
    AwqScheme,
    Bnb4BitScheme,
    FloatScheme,
    GptqScheme,
    Int8Scheme,
    LayerBits,
    RtnScheme,
    ScriptedScheme,
)

if TYPE_CHECKING:
    from lowbit_server.quant.schemes import FloatType, RequestedScheme, Scheme

_FLOATS: dict[quantization_pb2.FloatType.ValueType, FloatType] = {
    quantization_pb2.FLOAT_TYPE_FP32: "fp32",
    quantization_pb2.FLOAT_TYPE_FP16: "fp16",
    quantization_pb2.FLOAT_TYPE_BF16: "bf16",
}


def float_type(value: quantization_pb2.FloatType.ValueType) -> FloatType | None:
    """Return the type's name; None when it is not set."""
    return _FLOATS.get(value)


def requested(message: quantization_pb2.Scheme) -> RequestedScheme:
    """Return the scheme with every default resolved; the message has been validated."""
    kind = message.WhichOneof("kind")
    match kind:
        case "float":
            return FloatScheme(type=_FLOATS[message.float.type])
        case "int8":
            return Int8Scheme(**_given(message.int8, "outlier_threshold"))
        case "bnb_4bit":
            options = message.bnb_4bit
            nf4 = options.quant_type == quantization_pb2.BNB_QUANT_TYPE_NF4
            return Bnb4BitScheme(
                quant_type="nf4" if nf4 else "fp4",
                compute_type=float_type(options.compute_type) or "bf16",
                **_given(options, "double_quant"),
            )
        case "gptq":
            fields = ("bits", "group_size", "desc_act", "sym", "damp")
            layers = tuple(
                LayerBits.model_validate({"layer": one.layer, "bits": one.bits})
                for one in message.gptq.layers
            )
            return GptqScheme(**_given(message.gptq, *fields), layers=layers)
        case "awq":
            return AwqScheme(**_given(message.awq, "group_size", "zero_point"))
        case "rtn":
            return RtnScheme(**_given(message.rtn, "bits", "group_size", "sym"))
        case "auto":
            return AutoScheme(max_live_bytes=message.auto.max_live_bytes)
        case None:
            raise AssertionError  # required by the message's own rules
        case _:
            assert_never(kind)


def _given(message: object, *fields: str) -> dict[str, object]:
    return {name: getattr(message, name) for name in fields if message.HasField(name)}  # type: ignore[attr-defined]


def gate(message: quantization_pb2.QualityGate) -> GateSpec:
    """Return the limits that are set."""
    fields = ("max_perplexity_increase", "max_mean_kl", "min_top1_agreement", "max_bytes")
    return GateSpec(**_given(message, *fields), keep_artifact=message.keep_artifact)


def scheme_message(value: Scheme) -> quantization_pb2.Scheme | None:
    """Return the message of a scheme; a scripted model has none."""
    floats = {name: number for number, name in _FLOATS.items()}
    match value:
        case FloatScheme():
            return quantization_pb2.Scheme(
                float=quantization_pb2.FloatScheme(type=floats[value.type])
            )
        case Bnb4BitScheme():
            return quantization_pb2.Scheme(
                bnb_4bit=quantization_pb2.Bnb4BitScheme(
                    quant_type=quantization_pb2.BnbQuantType.Value(
                        f"BNB_QUANT_TYPE_{value.quant_type.upper()}"
                    ),
                    compute_type=floats[value.compute_type],
                    double_quant=value.double_quant,
                )
            )
        case Int8Scheme():
            options = value.model_dump(exclude={"kind"})
            return quantization_pb2.Scheme(int8=quantization_pb2.Int8Scheme(**options))
        case GptqScheme():
            options = value.model_dump(exclude={"kind"})
            return quantization_pb2.Scheme(gptq=quantization_pb2.GptqScheme(**options))
        case AwqScheme():
            options = value.model_dump(exclude={"kind"})
            return quantization_pb2.Scheme(awq=quantization_pb2.AwqScheme(**options))
        case RtnScheme():
            options = value.model_dump(exclude={"kind"})
            return quantization_pb2.Scheme(rtn=quantization_pb2.RtnScheme(**options))
        case ScriptedScheme():
            return None
        case _:
            assert_never(value)
