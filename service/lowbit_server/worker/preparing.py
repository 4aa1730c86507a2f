"""Compiles grammars beside the running step loop."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from lowbit_server.worker.inbox import Item, Prepared, Submission

if TYPE_CHECKING:
    from queue import Queue

    from lowbit_server.grammar.matcher import Vocabulary


class Preparer:
    """Compiles one grammar at a time and puts the news into the inbox.

    The front has checked each of them: they are quick and not too deep.
    """

    def __init__(self, inbox: Queue[Item]) -> None:
        """Make an idle preparer."""
        self._inbox = inbox
        # What waits here is admitted by the front, as is what waits for a slot.
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._log = structlog.get_logger()

    def start(self, submission: Submission, vocabulary: Vocabulary) -> None:
        """Begin with a submission that has a grammar; its news come as Prepared."""
        self._thread.submit(self._run, submission, vocabulary)

    def _run(self, submission: Submission, vocabulary: Vocabulary) -> None:
        request = submission.request
        assert submission.grammar is not None  # noqa: S101
        try:
            request = replace(request, matcher=vocabulary.compile(submission.grammar))
            news = Prepared(submission, request)
        except Exception as error:  # noqa: BLE001  (whatever it is, the request ends)
            self._log.warning("a grammar was not compiled", error=type(error).__name__)
            news = Prepared(submission, request, str(error) or type(error).__name__)
        self._inbox.put(news)
