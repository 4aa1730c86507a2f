"""Reads scenarios: YAML whose schema is proto/lowbit/conformance/v1/conformance.proto."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from google.protobuf import descriptor_pool, json_format, struct_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.message_factory import GetMessageClass
from grpc_tools import protoc

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SCENARIOS = Path(__file__).parent / "scenarios"
SCHEMA = "lowbit/conformance/v1/conformance.proto"


@cache
def _suite() -> Any:
    """Return the class of Suite, made from the schema as it is now."""
    struct = struct_pb2.DESCRIPTOR  # what the schema imports must be in the pool
    pool = descriptor_pool.Default()
    with tempfile.NamedTemporaryFile(suffix=".binpb") as out:
        include = Path(protoc.__file__).parent / "_proto"
        arguments = [f"-I{ROOT / 'proto'}", f"-I{include}", f"--descriptor_set_out={out.name}"]
        assert protoc.main(["protoc", *arguments, SCHEMA]) == 0, struct.name
        (file,) = FileDescriptorSet.FromString(Path(out.name).read_bytes()).file
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("lowbit.conformance.v1.Suite"))


def load(file: Path) -> Any:
    """Return a suite; raise ParseError for what the schema does not know."""
    return json_format.ParseDict(yaml.safe_load(file.read_text()), _suite()())


def suites() -> Iterator[Path]:
    """Yield the files of all suites."""
    return iter(sorted(SCENARIOS.glob("*.yaml")))


def plain(value: Any) -> Any:
    """Return a Struct or Value as Python values, whole numbers as int, long texts written out."""
    if isinstance(value, struct_pb2.Struct | struct_pb2.Value):
        return plain(json_format.MessageToDict(value))
    if isinstance(value, dict):
        if list(value) == ["$repeat"]:
            text, times = value["$repeat"]
            return text * int(times)
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
