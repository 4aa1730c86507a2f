"""Text of data sets on the Hugging Face hub.

The hub keeps each public data set as Parquet files too, in one layout whatever form it came
in, on the branch `refs/convert/parquet`. Reading those takes pyarrow and nothing of the
`datasets` package, which would bring a dozen others and runs code of older data sets.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit_server.errors import LowbitError, Reason, invalid

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = {
    "c4": "allenai/c4:en",
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1",
}
"""Names that papers use, and what the hub calls them."""
_PATTERN = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", re.ASCII)
_REVISION = "refs/convert/parquet"
_CONFIG = "default"
_FIELD = "text"
_BATCH_ROWS = 256


def check_name(field: str, name: str) -> None:
    """Raise INVALID_FIELD for what cannot be the name of a data set."""
    if name not in NAMES and _PATTERN.fullmatch(name) is None:
        known = ", ".join(NAMES)
        raise invalid(field, f'a data set is named {known}, "org/name" or "org/name:config"')


def rows(name: str, field: str, splits: tuple[str, ...]) -> Iterator[object]:
    """Yield a field of the rows of a data set, from the first file of its first split there.

    `field` is "text" when empty. Files are fetched into the hub library's own cache and are
    found there without a network later.

    Raises LowbitError: SOURCE_NOT_FOUND when there is no such data set, split or way to the
    hub; SOURCE_CORRUPT when the file cannot be read or lacks the field.
    """
    repository, _, config = NAMES.get(name, name).partition(":")
    file = _fetch(name, repository, config or _CONFIG, splits)
    import pyarrow as pa  # noqa: PLC0415  (only data sets pay for it)
    from pyarrow import parquet  # noqa: PLC0415

    column = field or _FIELD
    try:
        with parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                found = ", ".join(table.schema_arrow.names)
                message = f"data set {name} has no field {column!r}; it has {found}"
                raise LowbitError(Reason.SOURCE_CORRUPT, message)
            for batch in table.iter_batches(_BATCH_ROWS, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        message = f"data set {name} cannot be read: {error}"
        raise LowbitError(Reason.SOURCE_CORRUPT, message[:500]) from error


def _fetch(name: str, repository: str, config: str, splits: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    try:
        for split in splits:
            # Of a data set beyond 5 GB the hub converts a part, which it names so.
            wanted = [f"{config}/{prefix}{split}/0000.parquet" for prefix in ("", "partial-")]
            folder = Path(
                snapshot_download(
                    repository, repo_type="dataset", revision=_REVISION, allow_patterns=wanted
                )
            )
            for file in wanted:
                if (folder / file).is_file():
                    return folder / file
    except Exception as error:  # HTTP, connection, naming and cache errors share no root
        message = f"data set {name} cannot be fetched from the hub: {type(error).__name__}: {error}"
        raise LowbitError(Reason.SOURCE_NOT_FOUND, message[:500]) from error
    message = f'data set {name} has no {" or ".join(splits)} in {config!r}; ask for "name:config"'
    raise LowbitError(Reason.SOURCE_NOT_FOUND, message)
