"""Which tokens may come next, by llguidance (docs/adr/0013)."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from lowbit_server.grammar.spec import GrammarError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor
    from pathlib import Path

    from numpy.typing import NDArray

    from lowbit_server.grammar.spec import Grammar

# An ambiguous grammar must not hold up a batch: of a mask's items the library's default allows
# five times as many, and took 0.7 s for them here, not 0.1.
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    step_max_items=10_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# A small model may like blanks so much that it never comes to an end.
BLANKS = r"[\x20\x0A\x0D\x09]{1,32}"
MASK_THREADS = 2
"""Masks take some 50 us each and are wanted by the end of a forward pass."""
MESSAGE_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Mask:
    """What may come next: `allowed` (vocabulary,), end tokens among them where it `may_end`.

    It `must_end` where only they are.
    """

    allowed: NDArray[np.bool_]
    may_end: bool
    must_end: bool


class Vocabulary:
    """The tokens of one model as grammars see them; made at the first use, in 0.2 s."""

    def __init__(self, folder: Path, size: int, ends: Sequence[int]) -> None:
        """Describe a model's folder, the width of its logits and its end tokens."""
        self._folder = folder
        self.size = size
        self.ends = sorted(token for token in ends if token < size)
        self.pool: Executor = ThreadPoolExecutor(MASK_THREADS, "masks")

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        if not self.ends:
            message = "the model has no end-of-sequence token to end the output with"
            raise GrammarError(message)
        # The text: a name might be looked for elsewhere.
        text = (self._folder / "tokenizer.json").read_text(encoding="utf-8")
        try:
            return LLTokenizer(text, n_vocab=self.size, eos_token=self.ends)
        except ValueError:  # more tokens than logits: the others are never asked for
            return LLTokenizer(text, eos_token=self.ends)

    def load(self) -> None:
        """Read the tokenizer now; raise GrammarError where it is of no kind known here."""
        try:
            _ = self._tokenizer
        except (OSError, ValueError) as error:
            message = f"the model's tokenizer cannot be constrained: {_tidy(str(error))}"
            raise GrammarError(message) from error

    def compile(self, grammar: Grammar) -> Matcher:
        """Return a matcher at its beginning; raise GrammarError where there can be none.

        Releases the interpreter's lock. A deep grammar needs a deep stack, which the
        library does not guard: check it first (see `checker`).
        """
        self.load()
        try:
            source = _source(grammar)
        except ValueError as error:
            raise GrammarError(_tidy(str(error))) from error
        found = LLMatcher(self._tokenizer, source, log_level=0, limits=LIMITS)
        return Matcher(found, self)


class Matcher:
    """Follows one output through its grammar. For one thread at a time."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        """Wrap the library's matcher; raise GrammarError where the grammar was bad."""
        self._matcher = matcher
        self.vocabulary = vocabulary
        self._check()

    def copy(self) -> Matcher:
        """Return another one in the same state."""
        return Matcher(self._matcher.deep_copy(), self.vocabulary)

    def mask(self) -> Mask:
        """Return what may come next; raise GrammarError when nothing may.

        Releases the interpreter's lock.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        vocabulary = self.vocabulary
        allowed = np.unpackbits(bits, bitorder="little")[: vocabulary.size].view(np.bool_)
        ends = np.count_nonzero(allowed[vocabulary.ends])
        return Mask(allowed, bool(ends), bool(ends == np.count_nonzero(allowed)))

    def accept(self, token: int) -> None:
        """Go on to the next position; raise GrammarError where the token is not allowed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if error := self._matcher.get_error():
            raise GrammarError(_tidy(error))


def _source(grammar: Grammar) -> str:
    """Return the library's form of a grammar; raise ValueError for what is no JSON."""
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(
                grammar.text,
                defaults={"whitespace_pattern": BLANKS},
                # A schema may not switch off its own keywords.
                overrides={"lenient": False},
            )
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "grammar":
            return LLMatcher.grammar_from_lark(grammar.text)
        case "choice":
            # One terminal, not a rule of alternatives: of those there may be few at a time.
            options = " | ".join(json.dumps(option) for option in json.loads(grammar.text))
            return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {options}")
        case kind:
            message = f"{kind} is not offered by this worker"
            raise GrammarError(message)


def _tidy(message: str) -> str:
    """Return the library's message in one short line; of a bad pattern, where it is bad."""
    if message.startswith("NoExtension"):
        return "no text satisfies it that the model can write"
    if "doesn't satisfy the grammar" in message:
        # Where one text is left the library allows its tokens unseen.
        return "the model has no tokens for the text that it demands"
    # The regex library's own block: the pattern, a caret below the place, what is wrong.
    if found := re.search(r"regex parse error:\n.*\n {4}( *)\^+\nerror: (.*)", message):
        return f"the pattern is bad at its character {len(found[1]) + 1}: {found[2]}"
    line = " ".join(message.replace("<non-verbose/>", "").split())
    return line[:MESSAGE_CHARACTERS]
