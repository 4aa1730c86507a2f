"""Between the public messages and the service's own dataclasses; only here."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from lowbit.v1 import (
    errors_pb2,
    generation_pb2,
    job_pb2,
    model_pb2,
    quality_pb2,
    runtime_pb2,
)
from lowbit.worker.v1.worker_pb2 import Submit
from lowbit_server.errors import LowbitError, Reason
from lowbit_server.pool.replica import ReplicaState
from lowbit_server.rpc.authentication import cache_salt
from lowbit_server.rpc.schemes import scheme_message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowbit_server.jobs.records import Job
    from lowbit_server.jobs.spec import Failed, Progress
    from lowbit_server.pool.replica import Replica
    from lowbit_server.pool.worker import Worker
    from lowbit_server.quant.quality import Quality
    from lowbit_server.store.manifest import Ancestor, FileEntry, Manifest

_KINDS = {
    "import": job_pb2.JOB_KIND_IMPORT,
    "quantize": job_pb2.JOB_KIND_QUANTIZE,
    "evaluate": job_pb2.JOB_KIND_EVALUATE,
}


def not_implemented(what: str) -> LowbitError:
    """Return the error for a part of the API that this server does not offer yet."""
    return LowbitError(Reason.NOT_IMPLEMENTED, f"{what} is not offered by this server yet")


# Models


def model(
    manifest: Manifest, aliases: Sequence[str], replicas: Sequence[Replica]
) -> model_pb2.Model:
    """Return the message of a model and of where it is live."""
    message = model_pb2.Model(
        name=manifest.name,
        revision=manifest.revision,
        scheme=manifest.scheme.name,
        scheme_options=scheme_message(manifest.scheme),
        architecture=manifest.architecture,
        parameters=manifest.parameters,
        context_tokens=manifest.context_tokens,
        disk_bytes=manifest.disk_bytes,
        files=_files(manifest.files),
        source=manifest.source,
        source_revision=manifest.source_revision,
        source_digest=manifest.source_digest,
        source_files=_files(manifest.source_files),
        calibration_digest=manifest.calibration_digest,
        libraries=[
            model_pb2.Library(name=name, version=version)
            for name, version in manifest.libraries.items()
        ],
        ancestors=[_ancestor(one) for one in manifest.ancestors],
        parent=manifest.parent,
        quality=quality(manifest.quality) if manifest.quality else None,
        aliases=aliases,
        replicas=[
            model_pb2.Replica(
                device=one.device,
                worker=one.worker,
                state=model_pb2.ReplicaState.Value(f"REPLICA_STATE_{one.state}"),
                live_bytes=one.live_bytes,
            )
            for one in replicas
        ],
    )
    message.create_time.FromDatetime(manifest.create_time)
    return message


def quality(report: Quality) -> quality_pb2.QualityReport:
    """Return the message of a quality report."""
    return quality_pb2.QualityReport(**report.model_dump(exclude_none=True))


def _ancestor(one: Ancestor) -> model_pb2.Ancestor:
    return model_pb2.Ancestor(
        name=one.name,
        revision=one.revision,
        scheme=one.scheme.name,
        scheme_options=scheme_message(one.scheme),
        calibration_digest=one.calibration_digest,
        source=one.source,
        source_revision=one.source_revision,
        source_digest=one.source_digest,
        source_files=_files(one.source_files),
        files=_files(one.files),
    )


def _files(entries: Sequence[FileEntry]) -> list[model_pb2.ModelFile]:
    return [model_pb2.ModelFile(**entry.model_dump()) for entry in entries]


def load_progress(replica: Replica) -> model_pb2.LoadResponse:
    """Return how far a replica's load is."""
    return model_pb2.LoadResponse(
        device=replica.device,
        worker=replica.worker,
        phase=model_pb2.LoadPhase.Value(f"LOAD_PHASE_{replica.phase}"),
        fraction=replica.fraction,
        live_bytes=replica.live_bytes,
    )


# Jobs


def job(record: Job) -> job_pb2.Job:
    """Return the message of a job."""
    spec = record.spec
    message = job_pb2.Job(
        id=record.id,
        kind=_KINDS[spec.kind],
        state=job_pb2.JobState.Value(f"JOB_STATE_{record.state}"),
        model=spec.model,
        source=spec.source,
        scheme=spec.scheme.name if spec.kind == "quantize" else "",
        queue_position=record.queue_position,
        progress=_progress(record.progress) if record.progress else None,
        error=_job_error(record.error) if record.error else None,
        request_id=record.request_id,
        sequence=record.sequence,
        quality=quality(record.quality) if record.quality else None,
        trials=[
            quality_pb2.Trial(
                scheme=trial.scheme,
                live_bytes=trial.live_bytes,
                quality=quality(trial.quality) if trial.quality else None,
                verdict=trial.verdict,
            )
            for trial in record.trials
        ],
        resumable=not record.not_resumable,
        device=spec.device,
    )
    for name in ("create_time", "start_time", "end_time"):
        if (moment := getattr(record, name)) is not None:
            getattr(message, name).FromDatetime(moment)
    return message


def _progress(progress: Progress) -> job_pb2.JobProgress:
    message = job_pb2.JobProgress(
        phase=job_pb2.JobPhase.Value(f"JOB_PHASE_{progress.phase.upper()}"),
        done=progress.done,
        total=progress.total,
        bytes=progress.bytes,
        peak_memory_bytes=progress.peak_memory_bytes,
    )
    if progress.eta_s is not None:
        message.eta.FromMilliseconds(round(progress.eta_s * 1000))
    return message


def _job_error(error: Failed) -> job_pb2.JobError:
    reason = errors_pb2.ErrorReason.Value(f"ERROR_REASON_{error.reason}")
    return job_pb2.JobError(reason=reason, message=error.message)


# Runtime


def device(name: str, workers: Sequence[Worker]) -> runtime_pb2.Device:
    """Return the message of a device and its workers."""
    up = [one for one in workers if one.total_bytes]
    return runtime_pb2.Device(
        name=name,
        description=up[0].description if up else "",
        total_bytes=up[0].total_bytes if up else 0,
        free_bytes=up[0].free_bytes if up else 0,
        workers=[
            runtime_pb2.Worker(
                name=one.name,
                state=runtime_pb2.WorkerState.Value(f"WORKER_STATE_{one.state}"),
                pid=one.pid,
                restarts=one.restarts,
                running_requests=one.running,
                resident_bytes=one.resident_bytes,
            )
            for one in workers
        ],
        models=[
            runtime_pb2.LiveModel(
                model=replica.model,
                worker=one.name,
                live_bytes=replica.live_bytes,
                kv_bytes=replica.kv_bytes,
            )
            for one in workers
            for replica in one.replicas.values()
            if replica.state is not ReplicaState.LOADING
        ],
    )


# Generation


def submit(
    request: generation_pb2.GenerateRequest, manifest: Manifest, prompt: Sequence[int]
) -> Submit:
    """Return the worker's command for a validated request, with every default resolved."""
    sampling, stopping = request.sampling, request.stopping

    def given(message: object, field: str, default: float) -> float:
        return getattr(message, field) if message.HasField(field) else default  # type: ignore[attr-defined]

    room = manifest.context_tokens - len(prompt)
    return Submit(
        model=manifest.name,
        prompt=prompt,
        temperature=given(sampling, "temperature", 1.0),
        top_p=given(sampling, "top_p", 1.0),
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=given(sampling, "repetition_penalty", 1.0),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
        # The worker ends an output that reaches the context with CONTEXT_LIMIT.
        max_tokens=stopping.max_tokens if stopping.HasField("max_tokens") else room + 1,
        min_tokens=stopping.min_tokens,
        eos_token_ids=[] if stopping.ignore_eos else manifest.eos_token_ids,
        stop_token_ids=stopping.token_ids,
        time_limit_ms=max(1, stopping.time_limit.ToMilliseconds())
        if stopping.HasField("time_limit")
        else 0,
        logprobs=request.output.logprobs if request.output.HasField("logprobs") else None,
        typical_p=given(sampling, "typical_p", 1.0),
        logit_bias=sampling.logit_bias,
        bad_words=sampling.bad_words,
        n=outputs(request),
        prompt_logprobs=request.output.echo and request.output.HasField("logprobs"),
        deterministic=request.deterministic,
        prompt_lookup_tokens=request.prompt_lookup_tokens,
        cache_salt=cache_salt(request.cache_salt),
        constraint=request.constraint if request.HasField("constraint") else None,
    )


def outputs(request: generation_pb2.GenerateRequest) -> int:
    """Return how many outputs a request asks for."""
    return request.sampling.n if request.sampling.HasField("n") else 1


def submit_score(
    request: generation_pb2.ScoreRequest, manifest: Manifest, prompt: Sequence[int]
) -> Submit:
    """Return the worker's command that scores continuations."""
    longest = max(len(one.ids) for one in request.continuations)
    return Submit(
        model=manifest.name,
        prompt=prompt,
        max_tokens=longest,
        continuations=request.continuations,
        n=1,
        cache_salt=cache_salt(request.cache_salt),
    )
