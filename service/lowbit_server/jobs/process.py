"""The process of one job: reads its spec, fills the staging folder, reports on stdout.

It never publishes, so the front may kill it at any moment. It ends by itself when the
front goes away, which closes its stdin.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import logging
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from lowbit_server import logs
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.jobs.context import Context
from lowbit_server.jobs.report import Reporter, peak_memory_bytes
from lowbit_server.jobs.spec import JOB_SPEC, EvaluateSpec, Failed, ImportSpec, Staged
from lowbit_server.quant.schemes import AutoScheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.jobs.spec import JobSpec, Measured, Result

log = structlog.get_logger()

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# Serving goes first: the loops of workers and the front keep the default, 0.
_NICENESS = 10
_ORPHANED = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return 0 when it is staged or measured, 1 when it failed."""
    options = _options(arguments)
    # Libraries print banners and bars. What they write to stdout goes to stderr; only
    # reports take the pipe.
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logs.configure("info")
    os.nice(_NICENESS)
    threading.Thread(target=_end_with_front, name="stdin", daemon=True).start()
    reporter = Reporter(reports)
    result = _attempt(options, reporter)
    reporter.send(result)
    return 1 if isinstance(result, Failed) else 0


def _attempt(options: argparse.Namespace, reporter: Reporter) -> Result:
    try:
        with options.spec.open("rb") as file:
            # Where a killed server has just been started again, the process before this
            # one may not have noticed yet: the two must not write into the same folders.
            fcntl.flock(file, fcntl.LOCK_EX)
            shutil.rmtree(options.staging, ignore_errors=True)
            return _work(JOB_SPEC.validate_json(file.read()), options, reporter)
    except LowbitError as error:
        log.warning("job failed", reason=error.reason, error=error.message)
        return Failed(reason=error.reason, message=error.message)
    except OSError as error:
        log.exception("job failed")
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        return Failed(reason=Reason.DISK_FULL if full else Reason.INTERNAL, message=str(error))
    except MemoryError:
        log.exception("job failed")
        return Failed(reason=Reason.INTERNAL, message="the job ran out of memory")
    except Exception as error:
        log.exception("job failed")
        message = f"{type(error).__name__}: {error}"
        return Failed(reason=Reason.INTERNAL, message=message[:500])


def _work(spec: JobSpec, options: argparse.Namespace, reporter: Reporter) -> Staged | Measured:
    bound = log.bind(job=options.staging.name, kind=spec.kind, model=spec.model)
    bound.info("job started")
    _prepare(spec, options.threads)
    context = Context(
        staging=options.staging,
        checkpoint=options.checkpoint,
        models=options.models,
        roots=tuple(options.root),
        scripted=options.scripted,
        reporter=reporter,
        cache=options.cache,
        cache_bytes=options.cache_bytes,
    )
    result = _run(spec, context)
    bound.info(f"job {result.kind}", peak_memory_bytes=peak_memory_bytes())
    return result


def _run(spec: JobSpec, context: Context) -> Staged | Measured:
    # Imported here, because they import torch: 3 s that a malformed spec need not take.
    if isinstance(spec, ImportSpec):
        from lowbit_server.jobs.importing import import_model  # noqa: PLC0415

        import_model(spec, context)
        return Staged()
    if isinstance(spec, EvaluateSpec):
        from lowbit_server.jobs.evaluating import evaluate_model  # noqa: PLC0415

        return evaluate_model(spec, context)
    if isinstance(spec.scheme, AutoScheme):
        from lowbit_server.jobs.auto import quantize_within_budget  # noqa: PLC0415

        quantize_within_budget(spec, context)
        return Staged()
    from lowbit_server.jobs.quantizing import quantize_model  # noqa: PLC0415

    quantize_model(spec, context)
    return Staged()


def _prepare(spec: JobSpec, threads: int | None) -> None:
    # Must be set before the libraries are imported. Only what comes from the hub may use it.
    if not spec.needs_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ |= _QUIET
    # LLM.int8 on a CPU says at every product that it casts.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if threads is not None:
        import torch  # noqa: PLC0415

        torch.set_num_threads(threads)


def _end_with_front() -> None:
    try:
        while os.read(0, 4096):
            pass
    finally:
        os._exit(_ORPHANED)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lowbit_server.jobs.process", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="JSON file with the job's spec")
    parser.add_argument("--staging", type=Path, required=True, help="folder that the job fills")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to go on from")
    parser.add_argument("--models", type=Path, required=True, help="folder of the store's models")
    parser.add_argument("--cache", type=Path, required=True, help="folder of evaluations' cache")
    parser.add_argument("--cache-bytes", type=int, default=0, help="what they may keep there")
    parser.add_argument("--root", type=Path, action="append", default=[], help="import root")
    parser.add_argument("--scripted", action="store_true", help="takes scripted test models")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
