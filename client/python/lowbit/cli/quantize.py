"""Commands that make models smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit import schemes as scheme_names
from lowbit.cli.common import (
    AsJson,
    Device,
    DryRun,
    RequestId,
    Wait,
    connect,
    estimate_row,
    parsed_size,
    print_facts,
    print_json,
    print_table,
    size,
    usage_errors,
)
from lowbit.cli.models import finish_making
from lowbit.cli.progress import follow_job
from lowbit.errors import JobFailedError
from lowbit.v1.quantization_pb2 import (
    Calibration,
    Evaluation,
    ListSchemesResponse,
    QualityGate,
    SchemeAvailability,
    TextFile,
    TextSource,
)


def quantize(  # noqa: PLR0913 - options of one request
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Name or alias of the source model.")],
    target: Annotated[str, typer.Argument(help="Name of the new model.")],
    *,
    scheme: Annotated[str, typer.Option(help=f"One of {', '.join(scheme_names.NAMES)}.")],
    compute_type: Annotated[
        str | None, typer.Option(help="nf4, fp4: type of products: fp32, fp16 or bf16.")
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option(
            "--double-quant/--no-double-quant", help="nf4, fp4: quantize block scales too."
        ),
    ] = None,
    outlier_threshold: Annotated[
        float | None, typer.Option(help="int8: larger activations stay in 16 bit.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="auto: most bytes once live, such as 120MB or 1.5GiB."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="rtn: bits a weight: 2, 3, 4 or 8.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="rtn: weights that share a scale: 32, 64, 128 or -1 for a whole row."),
    ] = None,
    sym: Annotated[
        bool | None,
        typer.Option("--sym/--no-sym", help="rtn: a grid that is symmetric around zero."),
    ] = None,
    calibration_text: Annotated[
        str | None, typer.Option(help="gptq, awq: text or JSON-lines file on the server.")
    ] = None,
    calibration_field: Annotated[
        str, typer.Option(help="gptq, awq: field of each JSON line that holds the text.")
    ] = "",
    calibration_dataset: Annotated[
        str | None,
        typer.Option(help='gptq, awq: hub data set: c4, wikitext2 or "org/name[:config]".'),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="gptq, awq: number of samples.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="gptq, awq: tokens a sample.")
    ] = None,
    calibration_seed: Annotated[
        int | None, typer.Option(help="gptq, awq: seed of the choice of samples.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="gptq, awq: samples are chat messages.")
    ] = False,
    evaluation: Annotated[
        bool, typer.Option(help="Measure quality and speed against the source.")
    ] = True,
    eval_tokens: Annotated[
        int | None, typer.Option(help="Tokens of held-out text to measure on.")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Fail when perplexity rises by more than this share.")
    ] = None,
    max_mean_kl: Annotated[
        float | None, typer.Option(help="Fail when the mean KL divergence is above, nats.")
    ] = None,
    min_top1_agreement: Annotated[
        float | None, typer.Option(help="Fail when the likeliest tokens agree less often.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Fail when it is larger on disk.")] = None,
    keep_artifact: Annotated[
        bool, typer.Option("--keep-artifact", help="Keep what misses a limit; the job still fails.")
    ] = False,
    device: Device = "",
    request_id: RequestId = "",
    dry_run: DryRun = False,
    wait: Wait = True,
    as_json: AsJson = False,
) -> None:
    """Make a smaller copy of a model."""
    gate = QualityGate(
        max_perplexity_increase=max_perplexity_increase,
        max_mean_kl=max_mean_kl,
        min_top1_agreement=min_top1_agreement,
        max_bytes=max_bytes,
        keep_artifact=keep_artifact,
    )
    with usage_errors():
        calibration = Calibration(
            samples=calibration_samples,
            sequence_tokens=calibration_tokens,
            seed=calibration_seed,
            chat_template=chat_template,
            source=_text(calibration_text, calibration_field, calibration_dataset),
        )
    with connect(context) as client:
        with usage_errors():
            job = client.quantize(
                source,
                target,
                scheme_names.scheme(
                    scheme,
                    compute_type=compute_type,
                    double_quant=double_quant,
                    outlier_threshold=outlier_threshold,
                    bits=bits,
                    group_size=group_size,
                    sym=sym,
                    max_live_bytes=None if budget is None else parsed_size(budget),
                ),
                device=device,
                calibration=calibration if calibration.ByteSize() else None,
                evaluation=None if eval_tokens is None else Evaluation(max_tokens=eval_tokens),
                skip_evaluation=not evaluation,
                gate=gate if gate.ByteSize() else None,
                request_id=request_id,
                validate_only=dry_run,
            )
        label = f"quantize {target}"
        if not as_json:
            finish_making(client, job, label, dry_run=dry_run, wait=wait)
            return
        try:
            print_json(follow_job(client, job, label) if wait and not dry_run else job)
        except JobFailedError as error:
            print_json(error.job)
            raise


def estimate(  # noqa: PLR0913 - options of one request
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Name or alias of the source model.")],
    *,
    scheme: Annotated[str, typer.Option(help=f"One of {', '.join(scheme_names.NAMES)}.")],
    bits: Annotated[int | None, typer.Option(help="gptq, rtn: bits a weight.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="gptq, awq, rtn: weights that share a scale.")
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="gptq, awq: number of samples.")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="gptq, awq: tokens a sample.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a smaller copy would take, without making it."""
    with usage_errors():
        wanted = scheme_names.scheme(scheme, bits=bits, group_size=group_size)
        calibration = Calibration(samples=calibration_samples, sequence_tokens=calibration_tokens)
    with connect(context) as client:
        found = client.estimate_quantization(
            source, wanted, calibration=calibration if calibration.ByteSize() else None
        )
    if as_json:
        print_json(found)
        return
    print_facts([("disk", size(found.disk_bytes))])
    columns = ("DEVICE", "LIVE", "KV A TOKEN", "PEAK OF THE JOB", "TIME OF THE JOB")
    print_table(columns, [estimate_row(one) for one in found.devices])


def _text(path: str | None, field: str, dataset: str | None) -> TextSource | None:
    """Return where text comes from; None is the built-in text."""
    if path is not None and dataset is not None:
        raise typer.BadParameter("give a text or a data set, not both")
    if path is not None:
        return TextSource(file=TextFile(path=str(Path(path).absolute()), field=field))
    if field:
        raise typer.BadParameter("a field belongs to a JSON-lines file: give its path")
    return TextSource(dataset=dataset) if dataset is not None else None


def schemes(context: typer.Context, *, as_json: AsJson = False) -> None:
    """List the schemes and whether they can be used here."""
    with connect(context) as client:
        found = client.list_schemes()
    if as_json:
        print_json(ListSchemesResponse(schemes=found))
        return
    rows = [
        (item.name, f"{item.bits_per_weight:g}", place.device, _can(place), item.description)
        for item in found
        for place in item.availability or [SchemeAvailability()]
    ]
    print_table(("NAME", "BITS", "DEVICE", "CAN", "DESCRIPTION"), rows)


def _can(place: SchemeAvailability) -> str:
    verbs = {"quantize": place.can_quantize, "serve": place.can_serve}
    words = " and ".join(verb for verb, can in verbs.items() if can)
    if place.reason:
        return f"{words or 'neither'}: {place.reason}"
    return words
