"""Write the table-like parts of an SDK: verbs, classes of errors and options.

    python client/generate.py LANG OUT_DIR            write the files
    python client/generate.py LANG OUT_DIR --check    exit 1 when a file is not up to date

`contract.toml` is the table and says what its keys mean. Each `LANG/templates/NAME.j2`
becomes OUT_DIR/NAME. A template gets the rows of the table that its language does not
write by hand, as `verbs`, `errors` and `options`: the classes `Verb`, `Error` and `Option`
below, whose properties add what the schema says. Beside Jinja's there are the filters

    pascal, camel             GetModel and getModel, from get_model or GET_MODEL
    doc                       a text with names in backquotes as the language spells them
    lower_first, upper_first  a text with another first letter
    comment(PREFIX)           a text in lines that each begin with PREFIX
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from lowbit.v1 import generation_pb2, job_pb2, model_pb2, quantization_pb2, runtime_pb2
from lowbit.v1.errors_pb2 import ErrorReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

CLIENT = Path(__file__).parent
TABLE = CLIENT / "contract.toml"

METHODS: dict[str, MethodDescriptor] = {
    f"{service.name}.{method.name}": method
    for file in (generation_pb2, job_pb2, model_pb2, quantization_pb2, runtime_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every RPC of the schema."""

REASONS = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.DESCRIPTOR.values_by_name} - {
    "UNSPECIFIED"
}
CODES = {code.name for code in grpc.StatusCode} - {"OK"}
SCALARS: dict[int, str] = {
    getattr(FieldDescriptor, name): name.removeprefix("TYPE_").lower()
    for name in vars(FieldDescriptor)
    if name.startswith("TYPE_")
}

Language: TypeAlias = Literal["typescript", "go", "java", "rust"]


class ContractError(Exception):
    """The table is wrong; the message has a line for each fault."""


class Spelling(BaseModel):
    """How doc comments of a language spell names of the contract."""

    model_config = ConfigDict(extra="forbid")

    names: Literal["snake", "camel", "pascal"]
    errors: str
    quotes: str

    def name(self, name: str) -> str:
        """Spell the name of a verb, an option or a field."""
        if self.names != "snake":
            name = pascal(name) if self.names == "pascal" else camel(name)
        return self.quotes.replace("%", name)

    def error(self, name: str) -> str:
        """Spell the name of a class of errors."""
        return self.quotes.replace("%", self.errors.replace("%", name))


class Row(BaseModel):
    """What every row of the table has."""

    model_config = ConfigDict(extra="forbid")

    name: str
    doc: str
    by_hand: bool | list[Language] = False

    def is_generated(self, language: Language) -> bool:
        """Return whether a template of the language gets the row."""
        return language not in self.by_hand if isinstance(self.by_hand, list) else not self.by_hand


@dataclass(frozen=True)
class Value:
    """A field of a message, and its type."""

    name: str
    type: str
    """Name of the message or enum, or the schema's name of a scalar, such as "uint64"."""
    is_message: bool
    is_repeated: bool

    @classmethod
    def of(cls, field: FieldDescriptor) -> Self:
        """Describe a field of the schema."""
        named = field.message_type or field.enum_type
        type_ = named.name if named else SCALARS[field.type]
        return cls(field.name, type_, field.message_type is not None, field.is_repeated)


class Verb(Row):
    """A verb of the client."""

    rpc: str
    kind: Literal["unary", "starter", "pages", "stream"] = "unary"
    gives: str = "response"
    again: bool = True
    timeout: Literal["call", "slow", "stream", "none"] = "call"
    takes: list[str] | None = None
    short: str | None = None
    unless: str | None = None
    resumes: dict[str, str] | None = None

    @property
    def method(self) -> str:
        """Name of the RPC, such as "GetModel"."""
        return METHODS[self.rpc].name

    @property
    def service(self) -> str:
        """Name of its service, such as "ModelService"."""
        return self.rpc.partition(".")[0]

    @property
    def request(self) -> str:
        """Name of the request's message."""
        return METHODS[self.rpc].input_type.name

    @property
    def response(self) -> str:
        """Name of the message of its response, or of each."""
        return METHODS[self.rpc].output_type.name

    @property
    def value(self) -> Value | None:
        """The field of the response that it gives; of `pages` the items."""
        fields = METHODS[self.rpc].output_type.fields_by_name
        return Value.of(fields[self.gives]) if self.gives in fields else None

    @property
    def arguments(self) -> list[Value] | None:
        """The fields that it takes in place of the request."""
        fields = METHODS[self.rpc].input_type.fields_by_name
        return None if self.takes is None else [Value.of(fields[name]) for name in self.takes]

    @property
    def short_argument(self) -> Value | None:
        """The field of the short form."""
        fields = METHODS[self.rpc].input_type.fields_by_name
        return Value.of(fields[self.short]) if self.short else None

    @field_validator("rpc")
    @classmethod
    def _is_known(cls, rpc: str) -> str:
        if rpc not in METHODS:
            raise ValueError(f"{rpc} is no RPC of the schema")
        return rpc

    @model_validator(mode="after")
    def _fits_the_schema(self) -> Self:
        request, response = METHODS[self.rpc].input_type, METHODS[self.rpc].output_type
        if (self.kind == "stream") != METHODS[self.rpc].server_streaming:
            raise ValueError(f"kind {self.kind} is not that of {self.rpc}")
        if self.gives not in ("response", "nothing"):
            _have(response, [self.gives])
        _have(request, [*(self.takes or ()), *(self.resumes or ())])
        _have(request, [name for name in (self.short, self.unless) if name])
        _have(response, (self.resumes or {}).values())
        if self.kind == "starter":
            _have(request, ["request_id"])
        if self.kind == "pages":
            _have(request, ["page_token"])
            _have(response, ["next_page_token"])
        elif self.resumes is not None and self.kind != "stream":
            raise ValueError("resumes is for streams")
        if self.kind != "starter" and self.unless is not None:
            raise ValueError("unless is for starters")
        if self.takes and len(self.takes) == 1:
            self.short = self.takes[0]
        return self


def _have(message: Descriptor, names: Iterable[str]) -> None:
    for name in names:
        if name not in message.fields_by_name:
            raise ValueError(f"{message.name} has no field {name}")


class Error(Row):
    """A class of errors."""

    parent: str | None = None
    reasons: list[str] = []
    codes: list[str] = []

    @property
    def own_reasons(self) -> list[str]:
        """Reasons that lead to this class where the code alone would lead to another."""
        return self.reasons if self.parent and not self.codes else []

    @model_validator(mode="after")
    def _fits_the_schema(self) -> Self:
        for reason in self.reasons:
            if reason not in REASONS:
                raise ValueError(f"{reason} is no ErrorReason of the schema")
        for code in self.codes:
            if code not in CODES:
                raise ValueError(f"{code} is no code of gRPC")
        return self


class Option(Row):
    """An option that is a number."""

    type: Literal["duration", "count", "bytes"]
    default: int | float | None = None
    least: int | None = None

    @property
    def milliseconds(self) -> int:
        """The default of a duration."""
        return round((self.default or 0) * 1000)

    @property
    def default_text(self) -> str:
        """The default as prose has it: "30 s", "64 MiB", "4" or "none"."""
        if self.default is None:
            return "none"
        if self.type == "bytes":
            return f"{self.default / 2**20:g} MiB"
        return f"{self.default} s" if self.type == "duration" else str(self.default)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.type == "duration":
            if self.least is not None:
                raise ValueError("a duration has no least: it must be above 0")
            if self.default is not None and self.default <= 0:
                raise ValueError("the default must be above 0")
            return self
        if self.least is None:
            raise ValueError(f"{self.type} needs least")
        if not isinstance(self.default, int) or self.default < self.least:
            raise ValueError(f"the default must be a whole number of at least {self.least}")
        return self


class Contract(BaseModel):
    """The whole table."""

    model_config = ConfigDict(extra="forbid")

    languages: dict[Language, Spelling]
    verbs: list[Verb]
    errors: list[Error]
    options: list[Option]

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        for kind, rows in (("verb", self.verbs), ("error", self.errors), ("option", self.options)):
            _once(kind, (row.name for row in rows))
        _all_once("RPC", METHODS, (verb.rpc for verb in self.verbs))
        _all_once("reason", REASONS, (name for error in self.errors for name in error.reasons))
        _once("code", (code for error in self.errors for code in error.codes))
        above: set[str] = set()
        for error in self.errors:
            if error.parent is None and above:
                raise ValueError(f"error {error.name} needs a parent; only the first has none")
            if error.parent is not None and error.parent not in above:
                raise ValueError(f"error {error.name}: no error {error.parent} stands above it")
            above.add(error.name)
        return self


def _once(kind: str, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"{kind} {name} has {count} rows")


def _all_once(kind: str, known: Iterable[str], names: Iterable[str]) -> None:
    names = list(names)
    _once(kind, names)
    if missing := sorted(set(known) - set(names)):
        raise ValueError(f"{kind} {missing[0]} has no row")


def read(data: dict[str, Any]) -> Contract:
    """Return the table of parsed TOML; raise ContractError when it is wrong."""
    try:
        return Contract.model_validate(data)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            place = [str(part) for part in fault["loc"]]
            if len(place) > 1 and place[1].isdigit():
                row = data[place[0]][int(place[1])]
                place[:2] = [f"{place[0].removesuffix('s')} {row.get('name', place[1])}"]
            lines.append(": ".join([*place, fault["msg"].removeprefix("Value error, ")]))
        raise ContractError("\n".join(lines)) from error


def load() -> Contract:
    """Return the table of contract.toml."""
    return read(tomllib.loads(TABLE.read_text()))


def pascal(name: str) -> str:
    """Return GetModel for get_model or GET_MODEL."""
    return "".join(word.capitalize() for word in name.split("_"))


def camel(name: str) -> str:
    """Return getModel for get_model or GET_MODEL."""
    return lower_first(pascal(name))


def lower_first(text: str) -> str:
    """Return the text with a small first letter."""
    return text[:1].lower() + text[1:]


def upper_first(text: str) -> str:
    """Return the text with a capital first letter."""
    return text[:1].upper() + text[1:]


def comment(text: str, prefix: str, width: int = 100) -> str:
    """Return the text in lines that each begin with the prefix."""
    return textwrap.fill(
        text, width, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False
    )


def render(contract: Contract, language: Language) -> dict[str, str]:
    """Return the text of each file of a language, by its name."""
    spelling = contract.languages[language]
    errors = {f"{error.name}Error": error.name for error in contract.errors}

    def spelled(found: re.Match[str]) -> str:
        name = found[1]
        return spelling.error(errors[name]) if name in errors else spelling.name(name)

    folder = CLIENT / language / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - it writes programs, not HTML
    )
    environment.filters |= {
        "pascal": pascal,
        "camel": camel,
        "lower_first": lower_first,
        "upper_first": upper_first,
        "comment": comment,
        "doc": lambda text: re.sub(r"`(\w+)`", spelled, text),
    }
    tables: dict[str, Sequence[Row]] = {
        "verbs": contract.verbs,
        "errors": contract.errors,
        "options": contract.options,
    }
    rows = {
        name: [row for row in table if row.is_generated(language)] for name, table in tables.items()
    }
    return {
        name.removesuffix(".j2"): environment.get_template(name).render(rows)
        for name in environment.list_templates(extensions=["j2"])
    }


def main() -> None:
    """Write or check the files of one language."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("language", metavar="LANG", choices=["typescript", "go", "java", "rust"])
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    try:
        files = render(load(), args.language)
    except ContractError as error:
        sys.exit(f"{TABLE}: {error}")
    for name, text in files.items():
        path: Path = args.out / name
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(f"{path} is stale; run make generate")


if __name__ == "__main__":
    main()
