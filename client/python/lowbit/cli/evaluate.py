"""Commands that measure models against each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.common import AsJson, Device, connect, print_json, print_table, size
from lowbit.cli.progress import follow_job
from lowbit.v1.quality_pb2 import QualityReport
from lowbit.v1.quantization_pb2 import Evaluation, TextFile, TextSource

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lowbit.sync.client import Client
    from lowbit.v1.model_pb2 import Model

MaxTokens = Annotated[int | None, typer.Option(help="Tokens of held-out text to measure on.")]
Window = Annotated[int | None, typer.Option(help="Tokens a window; windows do not overlap.")]
Text = Annotated[Path | None, typer.Option(help="Text file on the server, not the built-in text.")]

# Title, name of the field and how it is written; the base's field has the same name behind base_.
_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("perplexity", "perplexity", "{:.3f}".format),
    ("KL mean", "mean_kl", "{:.4f}".format),
    ("KL median", "median_kl", "{:.4f}".format),
    ("KL p99", "p99_kl", "{:.3f}".format),
    ("KL max", "max_kl", "{:.3f}".format),
    ("top-1", "top1_agreement", "{:.1%}".format),
    ("disk", "disk_bytes", size),
    ("live", "live_bytes", size),
    ("prefill tok/s", "prefill_tokens_per_second", "{:.0f}".format),
    ("decode tok/s", "decode_tokens_per_second", "{:.1f}".format),
)
# A table of several models has no room for these.
_LEFT_OUT = ("median_kl", "max_kl")


def evaluate(  # noqa: PLR0913 - options of one request
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name or alias of a model.", show_default=False)],
    *,
    against: Annotated[str, typer.Option(help="Model to compare with; its parent if empty.")] = "",
    max_tokens: MaxTokens = None,
    window: Window = None,
    text: Text = None,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Measure a model's quality, size and speed against another's."""
    with connect(context) as client:
        report = measure(client, name, against, _evaluation(text, max_tokens, window), device)
    if as_json:
        print_json({"model": name} | report_values(report))
        return
    rows = []
    for title, field, written in _FIGURES:
        base_field = f"base_{field}"
        base = getattr(report, base_field, None)
        rows.append((title, written(getattr(report, field)), "" if base is None else written(base)))
    print_table(("", name, report.base), rows)
    memory = size(report.peak_memory_bytes)
    typer.echo(f"{report.tokens} tokens on {report.device}, peak memory {memory}")


def compare(  # noqa: PLR0913 - options of one request
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help="Models.", show_default=False)],
    *,
    against: Annotated[str, typer.Option(help="Model to compare with; the first parent.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw a picture into this PNG file.")] = None,
    max_tokens: MaxTokens = None,
    window: Window = None,
    text: Text = None,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Put models side by side; measure those that lack a report on the same text and base."""
    draw = _drawing() if plot else None
    evaluation = _evaluation(text, max_tokens, window)
    with connect(context) as client:
        models = [client.get_model(name) for name in dict.fromkeys(names)]
        parents = [model.parent for model in models if model.parent]
        if not against and not parents:
            message = "none of these models has a parent: say what to compare with (--against)"
            raise typer.BadParameter(message)
        base = client.get_model(against or parents[0])
        others = [model for model in models if model.name != base.name]
        reports = _reports(client, others, base, evaluation, device)
    rows = [_base_row(base, next(iter(reports.values())))] if reports else []
    rows += [
        {"model": model.name, "scheme": model.scheme} | report_values(reports[model.name])
        for model in others
    ]
    if as_json:
        print_json({"base": base.name, "models": rows})
    else:
        figures = [one for one in _FIGURES if one[1] not in _LEFT_OUT]
        print_table(
            ("MODEL", "SCHEME", *(title.upper() for title, _, _ in figures)),
            [
                (
                    row["model"],
                    row["scheme"],
                    *(written(row[field]) for _, field, written in figures),
                )
                for row in rows
            ],
        )
    if draw is not None and plot is not None:
        draw(rows, base.name, plot)
        typer.echo(f"drawn into {plot}", err=True)


def measure(
    client: Client, name: str, against: str, evaluation: Evaluation | None, device: str
) -> QualityReport:
    """Evaluate a model, showing progress, and return its report."""
    job = client.evaluate(name, against=against, evaluation=evaluation, device=device)
    return follow_job(client, job, f"evaluate {name}").quality


def report_values(report: QualityReport) -> dict[str, Any]:
    """Return a report's figures as plain numbers."""
    return {field.name: getattr(report, field.name) for field in QualityReport.DESCRIPTOR.fields}


def _reports(
    client: Client,
    models: Sequence[Model],
    base: Model,
    evaluation: Evaluation | None,
    device: str,
) -> dict[str, QualityReport]:
    """Return a report of each model, all with the same base, text and device."""
    found = {
        model.name: model.quality
        for model in models
        if evaluation is None
        and (model.quality.base, model.quality.base_revision) == (base.name, base.revision)
        and device in ("", model.quality.device)
    }
    missing = [model.name for model in models if model.name not in found]
    if len({_conditions(report) for report in found.values()}) > 1 and not missing:
        missing = [models[0].name]
    for name in missing:
        found[name] = measure(client, name, base.name, evaluation, device)
    if missing:
        wanted = _conditions(found[missing[0]])
        for name, report in list(found.items()):
            if _conditions(report) != wanted:
                found[name] = measure(client, name, base.name, evaluation, device)
    return found


def _conditions(report: QualityReport) -> tuple[str, str]:
    return report.text_digest, report.device


def _base_row(base: Model, report: QualityReport) -> dict[str, Any]:
    """Return the base's own figures, which every report carries."""
    values = report_values(report)
    row = {name: values.get(f"base_{name}", value) for name, value in values.items()}
    row |= dict.fromkeys(("mean_kl", "median_kl", "p99_kl", "max_kl"), 0.0)
    row |= {"top1_agreement": 1.0, "base": base.name, "base_revision": base.revision}
    return {"model": base.name, "scheme": base.scheme} | row


def _evaluation(text: Path | None, max_tokens: int | None, window: int | None) -> Evaluation | None:
    given = Evaluation(max_tokens=max_tokens, window_tokens=window)
    if text is not None:
        given.source.CopyFrom(TextSource(file=TextFile(path=str(text.absolute()))))
    return given if given.ByteSize() else None


def _drawing() -> Callable[[list[dict[str, Any]], str, Path], None]:
    """Return what draws, before anything is measured for it."""
    try:
        from lowbit.cli.plot import draw  # noqa: PLC0415 - an optional extra
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        message = f"--plot needs matplotlib: {sys.executable} -m pip install 'lowbit[plot]'"
        raise typer.BadParameter(message) from error
    return draw
