"""Makes parts of request messages from plain Python values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import uuid4

from google.protobuf.duration_pb2 import Duration

from lowbit.v1.generation_pb2 import Chat, ChatMessage, Choice, OutputConstraint, Role
from lowbit.v1.model_pb2 import ModelSource

if TYPE_CHECKING:
    from lowbit.v1.generation_pb2 import GenerateRequest, ScoreRequest, TokenizeRequest

Message: TypeAlias = ChatMessage | Mapping[str, str] | tuple[str, str]
"""One chat message: a proto, {"role": …, "content": …} or (role, content)."""

_ROLES = {name.removeprefix("ROLE_").lower(): value for name, value in Role.items() if value != 0}


def chat_message(message: Message) -> ChatMessage:
    """Return the proto of one chat message.

    Raises:
        ValueError: for an unknown role, or a mapping with other keys.

    """
    if isinstance(message, ChatMessage):
        return message
    if isinstance(message, Mapping):
        if set(message) != {"role", "content"}:
            text = f"a chat message has role and content, not {', '.join(sorted(message))}"
            raise ValueError(text)
        message = (message["role"], message["content"])
    role, content = message
    if role not in _ROLES:
        text = f"unknown role {role!r}; allowed are {', '.join(_ROLES)}"
        raise ValueError(text)
    return ChatMessage(role=_ROLES[role], content=content)


def chat(messages: Iterable[Message] | None) -> Chat | None:
    """Return the proto of a chat; None for None."""
    if messages is None:
        return None
    return Chat(messages=map(chat_message, messages))


def constraint(
    *,
    json_schema: Mapping[str, object] | str | None,
    regex: str | None,
    grammar: str | None,
    choice: Iterable[str] | None,
) -> OutputConstraint | None:
    """Return the proto of what an output may be; None where all are None.

    Raises:
        ValueError: for more than one of them, or a schema that is no JSON value.

    """
    if isinstance(json_schema, Mapping):
        json_schema = json.dumps(json_schema, allow_nan=False)
    if isinstance(choice, str):
        text = "choice takes a list of strings"
        raise ValueError(text)  # noqa: TRY004  (as for all that fits no field)
    options = None if choice is None else Choice(options=choice)
    kinds = {"json_schema": json_schema, "regex": regex, "grammar": grammar, "choice": options}
    given: dict[str, Any] = {kind: value for kind, value in kinds.items() if value is not None}
    if len(given) > 1:
        text = f"give one of json_schema, regex, grammar and choice, not {', '.join(given)}"
        raise ValueError(text)
    return OutputConstraint(**given) if given else None


def duration(seconds: float | None) -> Duration | None:
    """Return a Duration of so many seconds; None for None."""
    if seconds is None:
        return None
    result = Duration()
    result.FromNanoseconds(round(seconds * 1e9))
    return result


def exactly_one(**given: object) -> None:
    """Raise ValueError unless exactly one argument is not None."""
    if sum(value is not None for value in given.values()) != 1:
        text = f"give exactly one of {', '.join(given)}"
        raise ValueError(text)


def strings(value: str | Iterable[str]) -> list[str]:
    """Return a list of strings; a single string is a list of one."""
    return [value] if isinstance(value, str) else list(value)


def set_text(request: GenerateRequest | TokenizeRequest | ScoreRequest, text: str | None) -> None:
    """Set a request's text input, unless it is None."""
    if text is not None:
        request.text = text


def model_source(path: str | None, hub_id: str | None) -> ModelSource:
    """Return the proto of where a model comes from; raise ValueError unless one is given."""
    exactly_one(path=path, hub_id=hub_id)
    return ModelSource(path=path) if path is not None else ModelSource(hub_id=hub_id or "")


def new_request_id(*, unless: bool = False) -> str:
    """Return a fresh request id; with `unless`, an empty one."""
    return "" if unless else uuid4().hex
