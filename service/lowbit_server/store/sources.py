"""What may be imported: checks of paths, formats and headers before any weight is read.

The front checks at the call and the job checks again, because files may change between.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowbit_server.errors import LowbitError, Reason
from lowbit_server.store.gguf import read_gguf
from lowbit_server.store.headers import TensorEntry, read_header

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
CALIBRATION_FILE = "calibration.json"
"""What a calibrated model remembers of its text: an `overlap.sketch`."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCRIPTED_TYPE = "lowbit_scripted"

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
# Indexes of the largest public models have about 10 MB.
_MAX_JSON_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Source:
    """Something that can be imported."""

    kind: Literal["folder", "gguf", "scripted"]
    path: Path
    """Resolved folder or GGUF file."""
    architecture: str
    weights: tuple[Path, ...]
    """Weight files in order."""
    bytes: int
    """Size of the weight files."""


def inspect(path: str, roots: Sequence[Path], *, scripted: bool) -> Source:
    """Return what is at a path, absolute or relative to a root.

    Only safetensors folders and GGUF files inside the roots are taken; scripted test
    models only where `scripted` says so.

    Raises LowbitError: SOURCE_NOT_ALLOWED, SOURCE_NOT_FOUND, SOURCE_UNSUPPORTED,
    SOURCE_CORRUPT.
    """
    located = locate(path, roots)
    if located.is_dir():
        return _folder(located, [root.resolve() for root in roots], scripted=scripted)
    if not located.is_file():
        raise _unsupported(f"{path} is neither a folder nor a file")
    if located.suffix in _PICKLES:
        raise _pickled(located)
    if located.suffix != ".gguf":
        raise _unsupported(f"{path} is neither a folder nor a .gguf file")
    header = read_gguf(located)
    return Source("gguf", located, header.architecture, (located,), located.stat().st_size)


def locate(path: str, roots: Sequence[Path]) -> Path:
    """Return the resolved path of something that exists inside one of the roots.

    Raises LowbitError: SOURCE_NOT_ALLOWED, SOURCE_NOT_FOUND.
    """
    if "\0" in path:
        raise _not_allowed(path)
    given = Path(path)
    resolved_roots = [root.resolve() for root in roots]
    candidates = [given] if given.is_absolute() else [root / given for root in resolved_roots]
    try:
        resolved = [candidate.resolve() for candidate in candidates]
        allowed = [found for found in resolved if _inside(found, resolved_roots)]
        if not allowed:
            raise _not_allowed(path)
        existing = [found for found in allowed if found.exists()]
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        message = f"{path} cannot be read: {error}"
        raise LowbitError(Reason.SOURCE_NOT_FOUND, message) from error
    if not existing:
        raise LowbitError(
            Reason.SOURCE_NOT_FOUND, f"nothing is at {path}", metadata={"source": path}
        )
    return existing[0]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises LowbitError(SOURCE_CORRUPT) when it is none or too big.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise _corrupt(f"{path} has more than {_MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _corrupt(f"{path} is no valid JSON") from error
    if not isinstance(value, dict):
        raise _corrupt(f"{path} is no JSON object")
    return value


def read_headers(weights: Sequence[Path]) -> dict[Path, dict[str, TensorEntry]]:
    """Return the checked headers of shards; raises SOURCE_CORRUPT, also for a name in two."""
    headers = {path: read_header(path) for path in weights}
    owners: dict[str, Path] = {}
    for path, header in headers.items():
        for name in header:
            if name in owners:
                raise _corrupt(f"tensor {name!r} is in {owners[name].name} and in {path.name}")
            owners[name] = path
    return headers


def shards(folder: Path) -> tuple[Path, ...]:
    """Return a folder's safetensors files and check an index against them.

    Raises LowbitError: SOURCE_UNSUPPORTED when there are none, SOURCE_CORRUPT.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        read_headers([single])
        return (single,)
    if index.exists():
        return _indexed(folder, index)
    for file in sorted(folder.iterdir()):
        if file.suffix in _PICKLES:
            raise _pickled(file)
        if file.suffix == ".gguf":
            raise _unsupported(f"{folder} holds {file.name}: give the path of that file")
    raise _unsupported(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _folder(folder: Path, roots: Sequence[Path], *, scripted: bool) -> Source:
    for file in folder.iterdir():
        if not _inside(file.resolve(), roots):
            raise _not_allowed(str(file))
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise _unsupported(f"{folder} has no {CONFIG_FILE}")
    config = read_json(config_file)
    if "auto_map" in config:
        raise _unsupported(f"{config_file} asks for code of its own (auto_map), which is never run")
    if config.get("model_type") == SCRIPTED_TYPE:
        return _scripted(folder, allowed=scripted)
    match config.get("architectures"):
        case [str(architecture), *_]:
            pass
        case _:
            raise _unsupported(f"{config_file} names no architecture")
    weights = shards(folder)
    total = sum(file.stat().st_size for file in weights)
    return Source("folder", folder, architecture, weights, total)


def _scripted(folder: Path, *, allowed: bool) -> Source:
    if not allowed:
        raise _unsupported(f"{folder} is a scripted test model, which this server does not take")
    if not (folder / TOKENIZER_FILE).is_file():
        raise _unsupported(f"{folder} has no {TOKENIZER_FILE}")
    return Source("scripted", folder, SCRIPTED_TYPE, (), 0)


def _indexed(folder: Path, index: Path) -> tuple[Path, ...]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _corrupt(f"{index} has no weight_map")
    files = {}
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise _corrupt(f"{index} names {name!r}, which is no file of its folder")
        files[name] = folder / name
        if files[name].suffix in _PICKLES:
            raise _pickled(files[name])
        if not files[name].is_file():
            raise _corrupt(f"{index} names {name}, which is missing")
    headers = read_headers([files[name] for name in sorted(files)])
    for tensor, name in weight_map.items():
        if tensor not in headers[files[name]]:
            raise _corrupt(f"{index} says that {tensor!r} is in {name}, which it is not")
    return tuple(headers)


def _inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _not_allowed(path: str) -> LowbitError:
    return LowbitError(
        Reason.SOURCE_NOT_ALLOWED,
        f"{path!r} is outside the import roots of this server",
        metadata={"source": path[:256]},
    )


def _pickled(path: Path) -> LowbitError:
    return _unsupported(
        f"{path} holds pickled weights, which can run code when read: convert them to safetensors"
    )


def _unsupported(message: str) -> LowbitError:
    return LowbitError(Reason.SOURCE_UNSUPPORTED, message)


def _corrupt(message: str) -> LowbitError:
    return LowbitError(Reason.SOURCE_CORRUPT, message)
