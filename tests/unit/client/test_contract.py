"""The table that SDKs are generated from agrees with its prose, Python's SDK and the schema."""

from __future__ import annotations

import copy
import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

import lowbit
from client import generate
from lowbit import failures
from lowbit_server.errors import CODES

if TYPE_CHECKING:
    from collections.abc import Callable

CONTRACT = generate.load()
README = (generate.CLIENT / "README.md").read_text()


def rows(header: str) -> list[list[str]]:
    """The cells of a table of the README, from its first header on."""
    lines = README[README.index(f"\n| {header} |") :].strip().splitlines()[2:]
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_verbs_are_those_of_the_readme() -> None:
    told = {}
    for names, rpcs, _, again in rows("verb"):
        for name, rpc in zip(re.findall(r"\w+", names), rpcs.split(), strict=False):
            told[name] = (rpc.strip(","), again)
    del told["wait_job"]  # made of other verbs

    def again(verb: generate.Verb) -> str:
        if verb.kind == "starter":
            return "yes, by `request_id`"
        if verb.resumes is not None:
            return "yes, resumes"
        return "yes" if verb.again else "no"

    assert {verb.name: (verb.method, again(verb)) for verb in CONTRACT.verbs} == told


def test_the_errors_are_those_of_the_readme() -> None:
    told = {}
    parent = None
    for name, reasons, codes in rows("class"):
        kind = re.sub(r"\W", "", name).removesuffix("Error")
        if not name.startswith("·"):
            parent = kind
        only_words = re.fullmatch(r"[A-Z_, ]*", codes) is not None
        told[kind] = (
            "Lowbit" if parent == kind != "Lowbit" else parent if parent != kind else None,
            [] if kind == "JobFailed" else re.findall(r"[A-Z_]+", reasons),
            re.findall(r"[A-Z_]+", codes) if only_words else [],
        )
    assert {one.name: (one.parent, one.reasons, one.codes) for one in CONTRACT.errors} == told


def test_the_options_are_those_of_the_readme() -> None:
    told = {}
    for names, defaults, _ in rows("option"):
        told.update(zip(re.findall(r"\w+", names), defaults.split(", "), strict=True))
    for by_hand in ("tls", "token", "traceparent"):
        del told[by_hand]
    assert {option.name: option.default_text for option in CONTRACT.options} == told


def test_python_has_the_verbs() -> None:
    with lowbit.Client("127.0.0.1:1") as client:
        assert [verb.name for verb in CONTRACT.verbs if not hasattr(client, verb.name)] == []


def test_python_has_the_errors() -> None:
    def classes(root: type) -> dict[str, str | None]:
        found = {}
        for child in root.__subclasses__():
            found |= {child.__name__: root.__name__} | classes(child)
        return found

    table = {f"{error.name}Error": error for error in CONTRACT.errors}
    assert {"LowbitError": None} | classes(lowbit.LowbitError) == {
        name: error.parent and f"{error.parent}Error" for name, error in table.items()
    }
    assert {reason: kind.__name__ for reason, kind in failures._BY_REASON.items()} == {
        reason: name for name, error in table.items() for reason in error.own_reasons
    }
    assert {code.name: kind.__name__ for code, kind in failures._BY_CODE.items()} == {
        code: name for name, error in table.items() for code in error.codes
    }


def test_python_has_the_options() -> None:
    options = lowbit.ClientOptions()
    defaults = {
        option.name: getattr(options, option.name + "_s" * (option.type == "duration"))
        for option in CONTRACT.options
    }
    assert defaults == {option.name: option.default for option in CONTRACT.options}


def test_the_class_of_a_reason_is_that_of_its_code_or_one_below() -> None:
    of_code = {code: error.name for error in CONTRACT.errors for code in error.codes}
    for error in CONTRACT.errors:
        for reason in error.reasons if error.name not in ("Lowbit", "WorkerLost") else ():
            assert of_code[CODES[reason].name] in (error.name, error.parent)


def verb(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in data["verbs"] if row["name"] == name)


def error(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in data["errors"] if row["name"] == name)


def option(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in data["options"] if row["name"] == name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda data: verb(data, "info").update(rpc="RuntimeService.Inform"),
            "verb info: rpc: RuntimeService.Inform is no RPC of the schema",
        ),
        (
            lambda data: verb(data, "info").update(rpc="JobService.GetJob"),
            "RPC JobService.GetJob has 2 rows",
        ),
        (
            lambda data: data["verbs"].remove(verb(data, "info")),
            "RPC RuntimeService.GetServerInfo has no row",
        ),
        (lambda data: verb(data, "info").update(name="devices"), "verb devices has 2 rows"),
        (
            lambda data: verb(data, "get_job").update(gives="jobs"),
            "verb get_job: GetJobResponse has no field jobs",
        ),
        (
            lambda data: verb(data, "get_job").update(takes=["name"]),
            "verb get_job: GetJobRequest has no field name",
        ),
        (
            lambda data: verb(data, "load").update(kind="unary"),
            "verb load: kind unary is not that of ModelService.Load",
        ),
        (
            lambda data: verb(data, "watch_job").update(resumes={"after_sequence": "number"}),
            "verb watch_job: WatchJobResponse has no field number",
        ),
        (
            lambda data: verb(data, "info").update(timeout="long"),
            "verb info: timeout: Input should be 'call', 'slow', 'stream' or 'none'",
        ),
        (
            lambda data: verb(data, "info").update(by_hand=["pascal"]),
            "verb info: by_hand: ",
        ),
        (
            lambda data: verb(data, "info").update(retries=3),
            "verb info: retries: Extra inputs are not permitted",
        ),
        (
            lambda data: error(data, "QueueFull").update(parent="Full"),
            "error QueueFull: no error Full stands above it",
        ),
        (
            lambda data: error(data, "QueueFull").pop("parent"),
            "error QueueFull needs a parent; only the first has none",
        ),
        (
            lambda data: error(data, "QueueFull").update(reasons=["FULL"]),
            "error QueueFull: FULL is no ErrorReason of the schema",
        ),
        (
            lambda data: error(data, "QueueFull").update(reasons=[]),
            "reason QUEUE_FULL has no row",
        ),
        (
            lambda data: error(data, "QueueFull").update(reasons=["DISK_FULL"]),
            "reason DISK_FULL has 2 rows",
        ),
        (
            lambda data: error(data, "Internal").update(codes=["BROKEN"]),
            "error Internal: BROKEN is no code of gRPC",
        ),
        (
            lambda data: error(data, "Internal").update(codes=["DATA_LOSS"]),
            "code DATA_LOSS has 2 rows",
        ),
        (
            lambda data: option(data, "max_attempts").update(default=0),
            "option max_attempts: the default must be a whole number of at least 1",
        ),
        (
            lambda data: option(data, "max_attempts").pop("least"),
            "option max_attempts: count needs least",
        ),
        (
            lambda data: option(data, "call_timeout").update(default=0),
            "option call_timeout: the default must be above 0",
        ),
    ],
)
def test_what_is_wrong_with_the_table_is_told(
    spoil: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = copy.deepcopy(tomllib.loads(generate.TABLE.read_text()))
    spoil(data)
    with pytest.raises(generate.ContractError, match=f"^{re.escape(message)}"):
        generate.read(data)


def test_doc_comments_spell_names_as_their_language_does() -> None:
    spelled = {
        language: (spelling.name("get_model"), spelling.error("NotFound"))
        for language, spelling in CONTRACT.languages.items()
    }
    assert spelled == {
        "typescript": ("`getModel`", "`NotFoundError`"),
        "go": ("GetModel", "ErrNotFound"),
        "java": ("{@code getModel}", "{@code NotFoundException}"),
        "rust": ("`get_model`", "`NotFound`"),
    }
