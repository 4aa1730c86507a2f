"""Each old name is answered with its replacement wherever a person can type it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from lowbit import scheme
from lowbit.renamed import REPLACEMENTS, replacement
from lowbit.schemes import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.client.fake import FakeServer

ROWS = pytest.mark.parametrize(("old", "advice"), REPLACEMENTS.items())
OPTIONS = (
    *("outlier_threshold", "compute_type", "double_quant", "bits", "group_size", "desc_act"),
    *("sym", "damp", "zero_point"),
)
# Where else a replacement may point: fields of requests.
FIELDS = ("scheme", "device", "type", "source", "samples", "sequence_tokens")


@ROWS
def test_it_is_no_name_of_ours_and_names_one(old: str, advice: str) -> None:
    assert old not in NAMES
    assert old not in OPTIONS
    for name in re.findall(r'"(\w+)"', advice):
        assert name in NAMES
    verb, _, rest = advice.partition(" ")
    assert verb in {"use", "leave"}
    assert verb == "leave" or re.match(r"\w+", rest)[0] in (*OPTIONS, *FIELDS)  # type: ignore[index]


@ROWS
def test_the_sdk_answers_it_as_a_scheme_and_as_an_option(old: str, advice: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{old!r} is a name of another")) as caught:
        scheme(old)
    assert advice in str(caught.value)
    for value in (True, None):
        with pytest.raises(ValueError, match=re.escape(advice)):
            scheme("gptq", **{old: value})


@ROWS
def test_the_command_line_answers_it(
    old: str, advice: str, server: FakeServer, run: Callable[..., tuple[int, str, str]]
) -> None:
    dashed = old.replace("_", "-")
    code, out, err = run("quantize", "a", "b", "--scheme", dashed)
    assert (code, out) == (2, "")
    assert advice in err
    code, out, err = run("quantize", "a", "b", "--scheme", "nf4", f"--{dashed}", "1")
    assert (code, out) == (2, "")
    assert advice in err
    assert server.seen == []


def test_spelling_does_not_matter() -> None:
    assert replacement("Auto-GPTQ") == replacement("auto_gptq") == 'use scheme "gptq"'
    assert replacement("--load-in-8bit") == 'use scheme "int8"'
    assert replacement("something_else") is None


def test_an_option_that_nobody_knows_is_refused_too() -> None:
    with pytest.raises(ValueError, match="'nf4' has no option colour; it has compute_type"):
        scheme("nf4", colour="red")
