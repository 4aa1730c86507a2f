from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.headers import DTYPE_BITS, MAX_HEADER_BYTES, read_header

if TYPE_CHECKING:
    from pathlib import Path

RULES = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # one file, written anew
)


def encoded(header: object, data: bytes = b"", padding: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * padding
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@st.composite
def files(draw: st.DrawFn) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    at = 0
    for name in draw(st.lists(st.text(max_size=8), unique=True, max_size=5)):
        dtype = draw(st.sampled_from(["BOOL", "U8", "I16", "F16", "BF16", "F32", "I64"]))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = DTYPE_BITS[dtype] // 8
        for number in shape:
            size *= number
        if name != "__metadata__":
            header[name] = entry(shape, at, at + size, dtype)
            at += size
    return encoded(header, bytes(at), draw(st.integers(0, 16)))


def outcome(path: Path, content: bytes) -> dict[str, Any] | None:
    """Return what the check accepts; whatever it accepts, the format's own reader must too."""
    path.write_bytes(content)
    try:
        header = read_header(path)
    except LowbitError as error:
        assert error.reason is Reason.SOURCE_CORRUPT  # noqa: PT017  (either end is right)
        return None
    read: dict[str, Any] = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    assert {name: list(found.shape) for name, found in header.items()} == {
        name: value["shape"] for name, value in read.items()
    }
    assert {name: found.bytes for name, found in header.items()} == {
        name: len(value["data"]) for name, value in read.items()
    }
    return dict(header)


@RULES
@given(content=files())
def test_valid_files_are_read(tmp_path: Path, content: bytes) -> None:
    assert outcome(tmp_path / "model", content) is not None


@RULES
@given(content=files(), data=st.data())
def test_truncated_files_are_refused(tmp_path: Path, content: bytes, data: st.DataObject) -> None:
    length = data.draw(st.integers(0, len(content) - 1))
    assert outcome(tmp_path / "model", content[:length]) is None


@RULES
@given(content=files(), data=st.data())
def test_changed_bytes_never_pass_wrongly(
    tmp_path: Path, content: bytes, data: st.DataObject
) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    outcome(tmp_path / "model", bytes(changed))


@RULES
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_judged(tmp_path: Path, header: object) -> None:
    outcome(tmp_path / "model", encoded(header))


HUGE = 2**62


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not fit"),
        (b"\x08\0\0\0", "does not fit"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "does not fit"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "does not fit"),
        (encoded(b"[]"), "does not start"),
        (encoded(b" {}"), "does not start"),
        (encoded(b"{"), "no valid safetensors"),
        (encoded(b'{"a":' + b"[" * 100_000), "no valid safetensors"),
        (encoded(b'{"a":' + b"9" * 5000 + b"}"), "no valid safetensors"),
        (encoded(b"\xff\xfe{}"), "no valid safetensors"),
        (encoded({"__metadata__": {"a": 1}}), "map of strings"),
        (encoded({"a": []}), "malformed"),
        (encoded({"a": entry([1], 0, 4) | {"more": 1}}, bytes(4)), "malformed"),
        (encoded({"a": entry([True], 0, 4)}, bytes(4)), "malformed"),
        (encoded({"a": entry([-1], 0, 4)}, bytes(4)), "malformed"),
        (encoded({"a": entry([1], 0, 4, "Q7")}, bytes(4)), "unknown type"),
        (encoded({"a": entry([2], 0, 4)}, bytes(4)), "does not have 4 bytes"),
        (encoded({"a": entry([HUGE, 4], 0, 0)}), "impossible shape"),
        (encoded({"a": entry([HUGE, HUGE, 0], 0, 0)}), "impossible shape"),
        (encoded({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)), "4 was expected"),
        (encoded({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "4 was expected"),
        (encoded({"a": entry([1], 0, 4)}, bytes(5)), "end at 4"),
        (encoded({"a": entry([1], 0, 4)}, bytes(3)), "end at 4"),
        (encoded(b'{"a":%(e)s,"a":%(e)s}' % {b"e": b"{}"}), "twice"),
    ],
)
def test_lies_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(LowbitError, match=says) as caught:
        read_header(path)
    assert caught.value.reason is Reason.SOURCE_CORRUPT
    assert str(path) in caught.value.message
