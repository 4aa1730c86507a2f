"""From logits to the tokens of a step."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

from lowbit_server.engine.logprobs import AskedLogprobs
from lowbit_server.engine.sampler import RowSampler, sample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from lowbit_server.engine.request import Output, Running
    from lowbit_server.engine.residents import Residents
    from lowbit_server.engine.roster import Roster
    from lowbit_server.engine.rows import Row
    from lowbit_server.models.decoder import ModelSpec

NOT_NUMBERS = "the model's logits are not numbers"


class Chooser:
    """Samples tokens and hands them to their outputs."""

    def __init__(self, spec: ModelSpec, roster: Roster, residents: Residents) -> None:
        """Choose for the outputs of an engine."""
        self._spec = spec
        self._roster = roster
        self._residents = residents

    def choose(self, drafts: Mapping[Row, Sequence[int]], logits: Tensor) -> list[Output]:
        """Sample each row's next token, and on while its draft says the same.

        So what is made does not depend on drafts. `logits` (tokens, vocabulary) are those
        after a row's last token and after each one of its draft, row by row.
        """
        lengths = [1 + len(draft) for draft in drafts.values()]
        pending = dict(zip(drafts, accumulate(lengths, initial=0), strict=False))
        made: dict[Row, list[Output]] = {row: [] for row in drafts}
        while pending:
            picked = logits if len(pending) == len(logits) else logits[[*pending.values()]]
            outputs = self._sample([*pending], picked.float())
            going = {}
            for (row, place), output in zip(pending.items(), outputs, strict=True):
                draft, depth = drafts[row], len(made[row])
                made[row].append(output)
                ended = output.finish or output.error
                if not ended and depth < len(draft) and output.token_ids[0] == draft[depth]:
                    row.length += 1
                    going[row] = place + 1
            pending = going
        return [_joined(parts) for parts in made.values()]

    def _sample(self, rows: Sequence[Row], logits: Tensor) -> list[Output]:
        """Sample one token a row; rows whose logits are not numbers fail and are wiped."""
        broken = logits.amax(-1).isnan().tolist()
        if any(broken):
            for row in (row for row, bad in zip(rows, broken, strict=True) if bad):
                self._residents.wipe(row)
            # They are sampled with the rest, from anything that can be sampled.
            logits = logits.nan_to_num()
        asked = AskedLogprobs(logits, [row.request.logprobs for row in rows])
        samplers = [self._sampler(row.running) for row in rows]
        chosen = sample(logits, samplers)
        logprobs = asked.of(chosen)
        now = time.monotonic()
        return [
            self._roster.fail(row.running, NOT_NUMBERS)
            if bad
            else self._roster.fail(row.running, sampler.refusal, refused=True)
            if sampler.refusal
            else self._roster.extend(row.running, token, now, logprob)
            for row, sampler, token, logprob, bad in zip(
                rows, samplers, chosen, logprobs, broken, strict=True
            )
        ]

    def _sampler(self, running: Running) -> RowSampler:
        if running.sampler is None:
            running.sampler = RowSampler(running, self._spec.vocab_size, self._spec.device)
        return running.sampler


def _joined(parts: Sequence[Output]) -> Output:
    """Return what one step made of an output, token after token, as one."""
    first, last = parts[0], parts[-1]
    if first is last:
        return first
    return replace(
        first,
        token_ids=tuple(token for one in parts for token in one.token_ids),
        logprobs=tuple(found for one in parts for found in one.logprobs),
        finish=last.finish,
        error=last.error,
        refused=last.refused,
    )
