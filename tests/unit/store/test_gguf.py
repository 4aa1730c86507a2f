from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.gguf import GgufTensor, read_gguf

if TYPE_CHECKING:
    from pathlib import Path

RULES = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # one file, written anew
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "bc", "é"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor(
        "second", np.zeros((2, 34), dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_a_file_is_read(tmp_path: Path, valid: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(valid)
    header = read_gguf(path)
    assert header.architecture == "llama"
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "bc", "é"]
    assert header.metadata["numbers"] == [1, 2, 3]
    first, second = header.tensors
    assert (first.name, first.shape, first.bytes) == ("first", (2, 3), 24)
    assert (second.name, second.shape, second.bytes) == ("second", (2, 32), 68)
    content = np.frombuffer(valid[first.begin : first.begin + first.bytes], dtype=np.float32)
    assert content.tolist() == [0, 1, 2, 3, 4, 5]


def judged(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        header = read_gguf(path)
    except LowbitError as error:
        assert error.reason is Reason.SOURCE_CORRUPT  # noqa: PT017  (either end is right)
        return False
    assert all(tensor.begin + tensor.bytes <= len(content) for tensor in header.tensors)
    return True


@RULES
@given(data=st.data())
def test_truncated_files_are_refused(tmp_path: Path, valid: bytes, data: st.DataObject) -> None:
    # The writer pads the last tensor; what is cut must reach into the tensor itself.
    end = max(tensor.begin + tensor.bytes for tensor in _tensors(tmp_path, valid))
    assert not judged(tmp_path / "model.gguf", valid[: data.draw(st.integers(0, end - 1))])


@RULES
@given(data=st.data())
def test_changed_bytes_never_leave_the_file(
    tmp_path: Path, valid: bytes, data: st.DataObject
) -> None:
    changed = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    judged(tmp_path / "model.gguf", bytes(changed))


def _tensors(folder: Path, content: bytes) -> tuple[GgufTensor, ...]:
    path = folder / "whole.gguf"
    path.write_bytes(content)
    return read_gguf(path).tensors


def start(version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


ARCHITECTURE = pair("general.architecture", 8, struct.pack("<Q", 1) + b"x")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "too short"),
        (b"GGML" + bytes(40), "does not start"),
        (b"GGUF", "leave the header"),
        (start(version=1), "version is 1"),
        (start(version=3 << 24), "version is"),
        (start(tensors=2**60), "do not fit"),
        (start(pairs=2**60), "do not fit"),
        (start(), "names no architecture"),
        (start(pairs=1) + pair("a", 8, struct.pack("<Q", 2**63)), "leave the header"),
        (start(pairs=1) + pair("a", 9, struct.pack("<IQ", 4, 2**60)), "leaves the header"),
        (start(pairs=1) + pair("a", 77, bytes(8)), "unknown type 77"),
        (start(pairs=2) + 2 * ARCHITECTURE, "twice"),
        (start(pairs=2) + ARCHITECTURE + pair("general.alignment", 4, bytes(4)), "alignment"),
        (
            start(pairs=1) + pair("a", 9, struct.pack("<IQ", 9, 1) * 20_000),
            "no valid GGUF",
        ),
        (
            start(tensors=1, pairs=1) + ARCHITECTURE + struct.pack("<QI", 0, 9) + bytes(99),
            "9 dimensions",
        ),
        (
            start(tensors=1, pairs=1) + ARCHITECTURE + struct.pack("<QIQIQ", 0, 1, 4, 0, 2**62),
            "after the end",
        ),
        (
            start(tensors=1, pairs=1) + ARCHITECTURE + struct.pack("<QIQIQ", 0, 1, 4, 999, 0),
            "no valid GGUF",
        ),
        (
            start(tensors=1, pairs=1) + ARCHITECTURE + struct.pack("<QIQIQ", 0, 1, 31, 8, 0),
            "no multiple of 32",
        ),
    ],
)
def test_lies_are_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(LowbitError, match=says) as caught:
        read_gguf(path)
    assert caught.value.reason is Reason.SOURCE_CORRUPT
    assert str(path) in caught.value.message
