"""Whether a result keeps the limits that were set for it. A plain decision, no torch."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason

if TYPE_CHECKING:
    from lowbit_server.jobs.spec import GateSpec
    from lowbit_server.quant.quality import Quality


def check(gate: GateSpec, quality: Quality | None, disk_bytes: int) -> None:
    """Raise QUALITY_GATE_FAILED that names every missed limit with what was measured.

    A limit on something that was not measured is missed.
    """
    measured: dict[str, float | None] = {"max_bytes": disk_bytes}
    if quality is not None:
        measured |= {
            "max_perplexity_increase": quality.perplexity / quality.base_perplexity - 1,
            "max_mean_kl": quality.mean_kl,
            "min_top1_agreement": quality.top1_agreement,
        }
    missed = []
    for name, limit in gate.model_dump(exclude_none=True, exclude={"keep_artifact"}).items():
        found = measured.get(name)
        keeps = operator.ge if name.startswith("min_") else operator.le
        # Written so that a NaN keeps no limit.
        if found is None or not keeps(found, limit):
            shown = "nothing was measured" if found is None else f"measured {found:.6g}"
            missed.append(f"{name} {limit:.6g}: {shown}")
    if missed:
        raise LowbitError(Reason.QUALITY_GATE_FAILED, "; ".join(missed))
