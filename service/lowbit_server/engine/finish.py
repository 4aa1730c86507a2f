"""When an output ends: the one place of the rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit_server.engine.request import Finish

if TYPE_CHECKING:
    from lowbit_server.engine.request import Running


def finish_reason(running: Running, now: float) -> Finish | None:
    """Return why the output ends with its last token, or None while it goes on.

    An end or stop token says most and wins; where a constraint left nothing but to end, even
    over `min_tokens`. The context wins over max_tokens: a request
    that asked for all the context holds has a max_tokens of just that.
    """
    request, count = running.request, len(running.tokens)
    token = running.tokens[-1]
    if running.complete:
        return Finish.EOS
    if count > request.min_tokens:
        if token in request.eos_token_ids:
            return Finish.EOS
        if token in request.stop_token_ids:
            return Finish.STOP
    if len(request.prompt) + count >= running.context_tokens:
        return Finish.CONTEXT_LIMIT
    if count >= request.max_tokens:
        return Finish.MAX_TOKENS
    if now >= request.ends_by:
        return Finish.TIME_LIMIT
    return None
