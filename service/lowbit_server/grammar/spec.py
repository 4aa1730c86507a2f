"""What an output may be, as the request says it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.v1.generation_pb2 import OutputConstraint


class GrammarError(ValueError):
    """A grammar that cannot be used, or that has nothing more to offer; says why."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """One constraint: a JSON schema, a regular expression, Lark rules or a list of texts."""

    kind: str
    """Name of the field of `lowbit.v1.OutputConstraint`."""
    text: str
    """Its value; of a choice, a JSON list of strings."""


def grammar_of(message: OutputConstraint) -> Grammar | None:
    """Return the grammar of a message; None where it has none."""
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "choice":
        return Grammar(kind, json.dumps([*message.choice.options], ensure_ascii=False))
    return Grammar(kind, getattr(message, kind))
