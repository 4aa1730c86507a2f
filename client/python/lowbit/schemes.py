"""Makes a Scheme message from a name and options."""

from __future__ import annotations

from lowbit.renamed import replacement
from lowbit.v1.quantization_pb2 import (
    BNB_QUANT_TYPE_FP4,
    BNB_QUANT_TYPE_NF4,
    FLOAT_TYPE_BF16,
    FLOAT_TYPE_FP16,
    FLOAT_TYPE_FP32,
    AutoScheme,
    AwqScheme,
    Bnb4BitScheme,
    FloatScheme,
    FloatType,
    GptqScheme,
    Int8Scheme,
    RtnScheme,
    Scheme,
)

FLOAT_TYPES: dict[str, FloatType.ValueType] = {
    "fp32": FLOAT_TYPE_FP32,
    "fp16": FLOAT_TYPE_FP16,
    "bf16": FLOAT_TYPE_BF16,
}
"""Names of the floating-point types."""

_OPTIONS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "fp16": (),
    "bf16": (),
    "int8": ("outlier_threshold",),
    "nf4": ("compute_type", "double_quant"),
    "fp4": ("compute_type", "double_quant"),
    "gptq": ("bits", "group_size", "desc_act", "sym", "damp"),
    "awq": ("group_size", "zero_point"),
    "rtn": ("bits", "group_size", "sym"),
    "auto": ("max_live_bytes",),
}

NAMES: tuple[str, ...] = tuple(_OPTIONS)
"""Names that `scheme` knows."""


def float_type(name: str) -> FloatType.ValueType:
    """Return the FloatType of "fp32", "fp16" or "bf16".

    Raises:
        ValueError: for any other name; the message lists the allowed ones.

    """
    if name not in FLOAT_TYPES:
        message = f"unknown type {name!r}; allowed are {', '.join(FLOAT_TYPES)}"
        raise ValueError(message)
    return FLOAT_TYPES[name]


def scheme(  # noqa: PLR0913 - the options of all schemes
    name: str,
    *,
    outlier_threshold: float | None = None,
    compute_type: str | None = None,
    double_quant: bool | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    desc_act: bool | None = None,
    sym: bool | None = None,
    damp: float | None = None,
    zero_point: bool | None = None,
    max_live_bytes: int | None = None,
    **others: object,
) -> Scheme:
    """Return the Scheme of a name with its options; None keeps the server's default.

    Args:
        name: one of NAMES.
        outlier_threshold: int8: activations of at least this magnitude stay in 16 bit.
        compute_type: nf4, fp4: type that products are computed in, such as "bf16".
        double_quant: nf4, fp4: whether the block scales are quantized too.
        bits: gptq, rtn: bits a weight.
        group_size: gptq, awq, rtn: weights that share a scale; -1 is a whole channel.
        desc_act: gptq: whether columns go in order of falling activation.
        sym: gptq, rtn: whether the grid is symmetric around zero.
        damp: gptq: share of the mean Hessian diagonal that is added.
        zero_point: awq: whether the grid has a zero point.
        max_live_bytes: auto: most bytes that the model may take once live; required.
        others: refused; names of older libraries are answered with what to use instead.

    Raises:
        ValueError: for an unknown name, or an option that the scheme does not have;
            the message lists the allowed ones or names the replacement. For auto
            without a budget.

    """
    _check(
        name,
        **others,
        outlier_threshold=outlier_threshold,
        compute_type=compute_type,
        double_quant=double_quant,
        bits=bits,
        group_size=group_size,
        desc_act=desc_act,
        sym=sym,
        damp=damp,
        zero_point=zero_point,
        max_live_bytes=max_live_bytes,
    )
    match name:
        case "int8":
            return Scheme(int8=Int8Scheme(outlier_threshold=outlier_threshold))
        case "nf4" | "fp4":
            bnb = Bnb4BitScheme(
                quant_type=BNB_QUANT_TYPE_NF4 if name == "nf4" else BNB_QUANT_TYPE_FP4,
                double_quant=double_quant,
            )
            if compute_type is not None:
                bnb.compute_type = float_type(compute_type)
            return Scheme(bnb_4bit=bnb)
        case "gptq":
            gptq = GptqScheme(
                bits=bits, group_size=group_size, desc_act=desc_act, sym=sym, damp=damp
            )
            return Scheme(gptq=gptq)
        case "awq":
            return Scheme(awq=AwqScheme(group_size=group_size, zero_point=zero_point))
        case "rtn":
            return Scheme(rtn=RtnScheme(bits=bits, group_size=group_size, sym=sym))
        case "auto":
            if max_live_bytes is None or max_live_bytes < 1:
                message = "scheme 'auto' needs a budget: max_live_bytes, --budget in the shell"
                raise ValueError(message)
            return Scheme(auto=AutoScheme(max_live_bytes=max_live_bytes))
        case _:
            return Scheme(float=FloatScheme(type=float_type(name)))


def _check(name: str, **options: object) -> None:
    known = {option for allowed in _OPTIONS.values() for option in allowed}
    for old in (name, *(option for option in options if option not in known)):
        if advice := replacement(old):
            message = f"{old!r} is a name of another library: {advice}"
            raise ValueError(message)
    if name not in _OPTIONS:
        message = f"unknown scheme {name!r}; allowed are {', '.join(NAMES)}"
        raise ValueError(message)
    unknown = [
        option
        for option, value in options.items()
        if option not in _OPTIONS[name] and (value is not None or option not in known)
    ]
    if unknown:
        allowed = ", ".join(_OPTIONS[name]) or "none"
        message = f"scheme {name!r} has no option {', '.join(unknown)}; it has {allowed}"
        raise ValueError(message)
