"""Chooses the scheme of a copy: makes candidates in turn until one keeps budget and gate.

Each candidate has a checkpoint of its own. What was measured of those that were found
wanting is kept too, so a job that goes on makes none of them again, and as every choice
follows from those figures, it ends where an undisturbed one would.
"""

from __future__ import annotations

import dataclasses
import gc
import shutil
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.fingerprint import fingerprint
from lowbit_server.jobs.quantizing import describe, gather, make, measured
from lowbit_server.jobs.spec import Trial, Tried
from lowbit_server.jobs.trials import Made, TrialLog
from lowbit_server.quant import footprint, gate, ladder, registry, schemes
from lowbit_server.quant.footprint import Size
from lowbit_server.quant.schemes import AutoScheme, GptqScheme

if TYPE_CHECKING:
    from lowbit_server.jobs.context import Context
    from lowbit_server.jobs.quantizing import Inputs
    from lowbit_server.jobs.spec import QuantizeSpec
    from lowbit_server.quant.ladder import Candidate
    from lowbit_server.quant.quality import Quality
    from lowbit_server.quant.schemes import Scheme

CHOSEN = "chosen"


def quantize_within_budget(spec: QuantizeSpec, context: Context) -> None:
    """Fill the staging folder with the first candidate that keeps budget and gate.

    Raises LowbitError: QUALITY_GATE_FAILED that names what was tried, and those of
    `quantize_model`.
    """
    inputs = gather(spec, context)
    search = _Search(spec, inputs, context)
    while (candidate := search.next()) is not None:
        if candidate.refusal:
            search.refuse(candidate)
        elif search.take(candidate.scheme):
            return
    raise search.failure()


class _Search:
    """What one job has tried, and what it tries next."""

    def __init__(self, spec: QuantizeSpec, inputs: Inputs, context: Context) -> None:
        assert isinstance(spec.scheme, AutoScheme)  # noqa: S101  (see `jobs.process`)
        assert inputs.windows is not None  # noqa: S101  (the front asks for an evaluation)
        self._spec = spec
        self._inputs = inputs
        self._context = context
        self._headers = footprint.read(inputs.parent, inputs.source)
        disk_bytes = spec.gate.max_bytes if spec.gate is not None else None
        self._limits = ladder.Limits(spec.scheme.max_live_bytes, disk_bytes)
        samples = inputs.samples.digest if inputs.samples else ""
        depends_on = dict(fingerprint(spec.scheme, spec.device, inputs.parent, samples))
        depends_on["evaluation"] = inputs.windows.digest
        self._log = TrialLog(context.checkpoint, depends_on)
        self._known = {made.scheme: made for made in self._log}
        self._trials: dict[Scheme, Trial] = {}
        self._sizes: dict[Scheme, Size] = {}
        self._losses: dict[int, tuple[float, ...]] = {}

    def next(self) -> Candidate | None:
        """Return the next candidate that was not tried; None when there is none left."""
        found = ladder.candidates(
            self._size,
            self._limits,
            calibrated=registry.follows(self._inputs.parent),
            losses=self._losses,
        )
        return next((one for one in found if one.scheme not in self._trials), None)

    def refuse(self, candidate: Candidate) -> None:
        """Note a candidate that is not worth making."""
        self._trials[candidate.scheme] = Trial(
            scheme=schemes.describe(candidate.scheme),
            live_bytes=candidate.size.live_bytes if candidate.size else 0,
            verdict=f"not made: {candidate.refusal}",
        )

    def take(self, scheme: Scheme) -> bool:
        """Make and measure a candidate; return whether it is the one and stands staged."""
        if (known := self._known.get(scheme)) is not None:
            self._note(known)
            return False
        number = len(self._log)
        own = self._context.checkpoint / f"candidate-{number:02}"
        context = dataclasses.replace(self._context, checkpoint=own)
        samples = self._inputs.samples if registry.is_calibrated(scheme) else None
        inputs = dataclasses.replace(self._inputs, samples=samples)
        made = make(scheme, self._spec, inputs, context)
        quality = measured(made, self._spec, self._inputs, context)
        assert quality is not None  # noqa: S101  (there is an evaluation)
        gc.collect()  # a model that was measured is a web of references
        size = Size(quality.live_bytes, made.disk_bytes)
        flaw = self._flaw(size, quality)
        trial = Trial(
            scheme=schemes.describe(scheme),
            live_bytes=size.live_bytes,
            quality=quality,
            verdict=flaw or CHOSEN,
        )
        found = Made(scheme=scheme, trial=trial, disk_bytes=size.disk_bytes, losses=made.losses)
        self._note(found)
        if not flaw:
            describe(made, scheme, self._spec, self._inputs, quality, context)
            self._report()
            return True
        self._log.add(found)
        self._report()
        shutil.rmtree(own, ignore_errors=True)
        shutil.rmtree(context.staging)
        return False

    def failure(self) -> LowbitError:
        """Return what the job fails with when no candidate is left."""
        self._report()
        tried = "; ".join(
            f"{trial.scheme}: {trial.verdict}" for trial in self._trials.values() if trial.quality
        )
        if any(trial.quality and _GATE in trial.verdict for trial in self._trials.values()):
            message = f"no scheme within the budget keeps the gate: {tried}"
            return LowbitError(Reason.QUALITY_GATE_FAILED, message)
        message = f"no scheme fits the budget of {self._limits.live_bytes} bytes: {tried}"
        return LowbitError(Reason.INSUFFICIENT_DEVICE_MEMORY, message)

    def _size(self, scheme: Scheme) -> Size:
        """Return what a copy takes: measured where it was made, else estimated."""
        if (found := self._sizes.get(scheme)) is not None:
            return found
        device = self._spec.device
        registry.check(scheme, self._inputs.parent, device, gptqmodel=False)
        return self._headers.copied(scheme).size(device)

    def _flaw(self, size: Size, quality: Quality) -> str:
        """Return why a candidate is not the one; empty where it is."""
        if exceeded := self._limits.exceeded(size):
            return exceeded
        if self._spec.gate is not None:
            try:
                gate.check(self._spec.gate, quality, size.disk_bytes)
            except LowbitError as error:
                return f"{_GATE}: {error.message}"
        return ""

    def _note(self, made: Made) -> None:
        self._trials[made.scheme] = made.trial
        self._sizes[made.scheme] = Size(made.trial.live_bytes, made.disk_bytes)
        if isinstance(made.scheme, GptqScheme) and not made.scheme.layers:
            self._losses[made.scheme.bits] = made.losses

    def _report(self) -> None:
        self._context.reporter.send(Tried(trials=tuple(self._trials.values())))


_GATE = "misses the gate"
