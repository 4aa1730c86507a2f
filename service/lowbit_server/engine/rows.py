"""What has a row of the KV cache: outputs that decode, and a prompt that is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.engine.request import Request, Running
    from lowbit_server.engine.sampler import RowSampler
    from lowbit_server.engine.scoring import Scoring


@dataclass(slots=True, eq=False)
class Row:
    """An output with a row of the KV cache, which holds its first `length` tokens."""

    running: Running
    sampler: RowSampler
    length: int = 0


@dataclass(slots=True, eq=False)
class Prefill:
    """A prompt that is being read; its row of the KV cache holds the first `length` tokens."""

    outputs: list[Running]
    """Those that have not ended yet; all of one request."""
    length: int = 0
    scoring: Scoring | None = None
    """Set once the prompt of a request with continuations is read."""
    scored_chunks: int = 0

    @property
    def request(self) -> Request:
        """The request of the prompt."""
        return self.outputs[0].request

    @property
    def prompt_left(self) -> Sequence[int]:
        """Tokens of the prompt that are not in the cache yet."""
        return self.request.prompt[self.length :]
