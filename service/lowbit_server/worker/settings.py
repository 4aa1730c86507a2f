"""What the command line tells a worker."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything a worker is told at start."""

    socket: str
    device: str
    threads: int
    max_running: int
    kv_cache_bytes: int


def parse(arguments: Sequence[str]) -> Settings:
    """Return the settings; a bad argument ends the process with a message."""
    parser = ArgumentParser("lowbit-worker", description="Runs models for a Lowbit front.")
    parser.add_argument("--socket", required=True, help="path of the unix socket to serve on")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads of torch")
    parser.add_argument("--max-running", type=_positive, default=64, help="slots of a model")
    parser.add_argument(
        "--kv-cache-bytes",
        type=_natural,
        default=1 << 30,
        help="KV cache of a model; 0 takes half of the memory that is free",
    )
    return Settings(**vars(parser.parse_args(arguments)))


def _positive(text: str) -> int:
    if (value := _natural(text)) < 1:
        raise ValueError(text)
    return value


def _natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError(text)
    return value
