"""What a job process is told and what it reports: JSON on disk and on a pipe."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from lowbit_server.errors import Reason
from lowbit_server.quant.quality import Quality
from lowbit_server.quant.schemes import FloatType, Provider, RequestedScheme


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextSpec(_Record):
    """Where text comes from; with nothing set, it is the built-in one."""

    text_path: str | None = None
    """Local text file, already checked against the import roots."""
    text_field: str = ""
    """Field of each JSON line that holds the text; empty for plain text."""
    text_inline: tuple[str, ...] = ()
    dataset: str = ""
    """Name of a hub data set, such as "wikitext2"."""


class CalibrationSpec(TextSpec):
    """The text that calibrated methods see and how samples are drawn from it."""

    samples: int = 128
    sequence_tokens: int = 512
    seed: int = 0
    chat_template: bool = False


class EvaluationSpec(TextSpec):
    """Held-out text and how it is cut; windows do not overlap."""

    max_tokens: int = 4096
    window_tokens: int = 512


class GateSpec(_Record):
    """Limits that a result must keep; None is no limit."""

    max_perplexity_increase: float | None = None
    """Largest perplexity divided by the source's, less one."""
    max_mean_kl: float | None = None
    """Largest mean KL divergence from the source, nats."""
    min_top1_agreement: float | None = None
    """Smallest share of positions where the likeliest token is the source's."""
    max_bytes: int | None = None
    """Largest size on disk, bytes."""
    keep_artifact: bool = False
    """Publishes the artefact though a limit is missed."""

    @property
    def needs_quality(self) -> bool:
        """Whether a limit speaks of what an evaluation measures."""
        quality = (self.max_perplexity_increase, self.max_mean_kl, self.min_top1_agreement)
        return any(limit is not None for limit in quality)


class ImportSpec(_Record):
    """Brings a model into the store."""

    kind: Literal["import"] = "import"
    model: str
    path: str | None = None
    """Resolved local folder or GGUF file, already checked against the import roots."""
    hub_id: str | None = None
    type: FloatType | None = None

    @property
    def needs_hub(self) -> bool:
        """Whether it comes from the hub."""
        return self.hub_id is not None

    @property
    def device(self) -> str:
        """Empty: an import works on no device."""
        return ""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the models of the store that it reads."""
        return ()

    @property
    def source(self) -> str:
        """What it reads, as it was given."""
        return self.path or self.hub_id or ""


class QuantizeSpec(_Record):
    """Makes a smaller copy of a model."""

    kind: Literal["quantize"] = "quantize"
    model: str
    """Name of the new model."""
    source: str
    """Name of the model in the store that it is made from."""
    scheme: RequestedScheme
    device: str
    provider: Provider = "own"
    calibration: CalibrationSpec | None = None
    """None for schemes that use no calibration text."""
    evaluation: EvaluationSpec | None = None
    """None measures nothing."""
    gate: GateSpec | None = None

    @property
    def needs_hub(self) -> bool:
        """Whether a text of it is a hub data set."""
        return any(text and text.dataset for text in (self.calibration, self.evaluation))

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the models of the store that it reads."""
        return (self.source,)


class EvaluateSpec(_Record):
    """Measures a model against another; makes none."""

    kind: Literal["evaluate"] = "evaluate"
    model: str
    against: str
    """Name of the model that it is compared with."""
    device: str
    evaluation: EvaluationSpec

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the models of the store that it reads."""
        return (self.model, self.against)

    @property
    def needs_hub(self) -> bool:
        """Whether its text is a hub data set."""
        return bool(self.evaluation.dataset)

    @property
    def source(self) -> str:
        """What it is compared with."""
        return self.against


JobSpec: TypeAlias = Annotated[
    ImportSpec | QuantizeSpec | EvaluateSpec, Field(discriminator="kind")
]
JOB_SPEC: TypeAdapter[ImportSpec | QuantizeSpec | EvaluateSpec] = TypeAdapter(JobSpec)

Phase: TypeAlias = Literal["download", "calibrate", "quantize", "save", "evaluate"]


class Progress(_Record):
    """How far a job is."""

    kind: Literal["progress"] = "progress"
    phase: Phase
    done: int = 0
    """Units of the phase that are done: layers, files or text windows."""
    total: int = 0
    """Units in all; 0 while unknown."""
    bytes: int = 0
    """Bytes read or written in this phase."""
    eta_s: float | None = None
    peak_memory_bytes: int = 0


class Trial(_Record):
    """One candidate of scheme `auto`."""

    scheme: str
    """Its name and options, such as "gptq bits=4 group_size=64"."""
    live_bytes: int = 0
    """Measured; estimated where it was not made, 0 where it cannot be."""
    quality: Quality | None = None
    """None where it was not made."""
    verdict: str
    """Why it was chosen or not."""


class Tried(_Record):
    """What scheme `auto` has tried so far."""

    kind: Literal["tried"] = "tried"
    trials: tuple[Trial, ...]


class Failed(_Record):
    """The job cannot be done."""

    kind: Literal["failed"] = "failed"
    reason: Reason
    message: str


class Staged(_Record):
    """The artefact stands complete and synced in the staging folder."""

    kind: Literal["staged"] = "staged"


class Measured(_Record):
    """An evaluation is done; there is no artefact."""

    kind: Literal["measured"] = "measured"
    quality: Quality


Result: TypeAlias = Failed | Staged | Measured
"""How a job's process ends."""
JobReport: TypeAlias = Annotated[Progress | Tried | Result, Field(discriminator="kind")]
JOB_REPORT: TypeAdapter[Progress | Tried | Result] = TypeAdapter(JobReport)
