from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.headers import PREFIX_BYTES, read_header
from lowbit_server.store.sources import shards
from lowbit_server.store.tensors import ALIGNMENT_BYTES, DTYPE_NAMES, TensorReader, TensorWriter

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, tensors: dict[str, torch.Tensor], **options: int) -> TensorWriter:
    expected_tensors = options.pop("expected_tensors", len(tensors))
    with TensorWriter(folder, expected_tensors, **options) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return writer


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_type_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(6).reshape(2, 3).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 3).to(dtype),
        "transposed": torch.arange(6).reshape(2, 3).to(dtype).T,
        "ünï \U0001f600": torch.ones(1).to(dtype),
    }
    writer = write(tmp_path, tensors)
    read = load_file(tmp_path / "model.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        # Bytes, because eight-bit floats cannot be compared.
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].float(), tensor.float())
    assert writer.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.full((100,), float(number)) for number in range(20)}
    write(tmp_path, tensors, max_shard_bytes=12_000)
    files = shards(tmp_path)
    assert len(files) > 1
    assert all(file.stat().st_size <= 12_000 for file in files)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 20 * 400
    read: dict[str, torch.Tensor] = {}
    for file in files:
        read |= load_file(file)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_that_can_begins_in_line(tmp_path: Path) -> None:
    tensors = {f"{number}.flag": torch.tensor(number, dtype=torch.uint8) for number in range(3)}
    tensors |= {f"{number}.weight": torch.full((8, 16), number) for number in range(3)}
    write(tmp_path, dict(sorted(tensors.items())))
    file = tmp_path / "model.safetensors"
    data = PREFIX_BYTES + int.from_bytes(file.read_bytes()[:PREFIX_BYTES], "little")
    entries = json.loads(file.read_bytes()[PREFIX_BYTES:data])
    starts = [entries[f"{number}.weight"]["data_offsets"][0] for number in range(3)]
    assert [(data + start) % ALIGNMENT_BYTES for start in starts] == [0, 0, 0]
    read = load_file(file)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_bigger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(16), "b": torch.ones(4992), "c": torch.zeros(16)}
    write(tmp_path, tensors, max_shard_bytes=10_000)
    assert [set(read_header(file)) for file in shards(tmp_path)] == [{"a"}, {"b"}, {"c"}]


def test_more_tensors_than_expected_begin_a_shard(tmp_path: Path) -> None:
    tensors = {f"{'long' * 50}.{number}": torch.tensor(number) for number in range(200)}
    write(tmp_path, tensors, expected_tensors=1)
    assert len(shards(tmp_path)) > 1
    with TensorReader(shards(tmp_path)) as reader:
        assert reader.entries.keys() == tensors.keys()
        assert all(torch.equal(reader.tensor(name), tensors[name]) for name in tensors)


def test_after_an_error_nothing_looks_like_a_model(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path, 2)
    with suppress(KeyError), writer:
        writer.write("a", torch.zeros(16))
        raise KeyError
    assert [file.suffix for file in tmp_path.iterdir()] == [".part"]


def test_the_reader_checks_headers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(LowbitError) as caught:
        TensorReader([tmp_path / "model.safetensors"])
    assert caught.value.reason is Reason.SOURCE_CORRUPT
