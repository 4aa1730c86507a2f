"""`python -m lowbit_server.grammar`: checks grammars for the front, one a line.

Only here do grammars that nobody has looked at meet the library: its recursion has no
bound, so a chain of references ends the process. The front then knows what to think of the
grammar, and starts another.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import sys
import threading
from collections import OrderedDict
from pathlib import Path

from lowbit_server.grammar.matcher import Matcher, Vocabulary
from lowbit_server.grammar.spec import Grammar, GrammarError

VOCABULARIES = 4
"""Tokenizers kept, the most recently used ones."""
EXTRA_BYTES = 256 << 20
"""Memory that one check may need beside what is there already."""
STACK_BYTES = 1 << 20
"""At most an eighth of what a thread of the worker has: what passes here does so there."""
TRIED_TOKENS = 16
"""So many tokens are generated at random: some grammars explode only after a few."""


def main() -> None:
    """Answer until standard input ends.

    A request is a JSON line of folder, revision, size, ends, kind and text. The answers are two: an
    empty line when the model's tokenizer is there, then what is wrong, as JSON; empty when
    nothing is.
    """
    # An interrupt of the terminal is for the front, which lets running requests end first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.stack_size(STACK_BYTES)
    vocabularies: OrderedDict[str, Vocabulary] = OrderedDict()
    for line in sys.stdin:
        request = json.loads(line)
        key = request["revision"]
        vocabulary = vocabularies.pop(key, None) or Vocabulary(
            Path(request["folder"]), request["size"], request["ends"]
        )
        vocabularies[key] = vocabulary
        if len(vocabularies) > VOCABULARIES:
            vocabularies.popitem(last=False)
        error = _load(vocabulary)
        print(flush=True)  # noqa: T201  (the protocol)
        if not error:
            error = _check(vocabulary, Grammar(request["kind"], request["text"]))
        print(json.dumps(error), flush=True)  # noqa: T201  (the protocol)


def _load(vocabulary: Vocabulary) -> str:
    try:
        vocabulary.load()
    except GrammarError as error:
        return str(error)
    return ""


def _check(vocabulary: Vocabulary, grammar: Grammar) -> str:
    """Return what is wrong with a grammar, looked at with a small stack and bounded memory."""
    errors: list[str] = []

    def look() -> None:
        try:
            _try(vocabulary.compile(grammar))
        except GrammarError as error:
            errors.append(str(error))

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + EXTRA_BYTES, hard))
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    return errors[0] if errors else ""


def _try(matcher: Matcher) -> None:
    """Generate some tokens; raise GrammarError where the grammar does not get that far."""
    chance = random.Random(0)  # noqa: S311  (no secret)
    for _ in range(TRIED_TOKENS):
        mask = matcher.mask()
        if mask.must_end:
            break
        allowed = mask.allowed.copy()
        allowed[matcher.vocabulary.ends] = False
        matcher.accept(chance.choice(allowed.nonzero()[0].tolist()))


def _data_bytes() -> int:
    """Return the private memory of this process, bytes, as RLIMIT_DATA counts it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmData:")[2].split()[0]) << 10


if __name__ == "__main__":
    main()
