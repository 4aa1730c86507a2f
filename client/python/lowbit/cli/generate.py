"""The commands that generate text and score it."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lowbit.cli.common import (
    AsJson,
    connect,
    enum_name,
    print_json,
    print_table,
    to_dict,
    usage_errors,
)
from lowbit.v1.generation_pb2 import FinishReason, Timings, Usage

if TYPE_CHECKING:
    from lowbit.sync.stream import GenerateStream

CacheSalt = Annotated[
    str, typer.Option(help="Share cached beginnings of prompts with calls of this salt only.")
]


def generate(  # noqa: PLR0913 - the field's standard options
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name or alias of a loaded model.")],
    prompt: Annotated[str, typer.Argument(help="The prompt.", show_default=False)],
    *,
    chat: Annotated[bool, typer.Option("--chat", help="Ask as a user in a chat.")] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="At most this many tokens.")] = None,
    min_tokens: Annotated[int | None, typer.Option(help="No end before this many.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus mass; 1 is off.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Likeliest tokens kept; 0 is off.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Relative floor; 0 is off.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="0 is off.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="0 is off.")] = None,
    typical_p: Annotated[float | None, typer.Option(help="Typical mass; 1 is off.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End at this string; may be repeated.")
    ] = None,
    stop_token_id: Annotated[
        list[int] | None, typer.Option(help="End at this token; may be repeated.")
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on past the model's own end.")
    ] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt first.")] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits whatever else runs; slower.")
    ] = False,
    prompt_lookup_tokens: Annotated[
        int | None, typer.Option(help="Drafted a step from earlier text, at most 16; 0 is off.")
    ] = None,
    cache_salt: CacheSalt = "",
    json_schema: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File of a JSON schema of the output."),
    ] = None,
    regex: Annotated[str | None, typer.Option(help="The whole output matches it.")] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File of Lark rules of the output."),
    ] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="The output is one of these; may be repeated.")
    ] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds; then it ends.")] = None,
    request_id: Annotated[str, typer.Option(help="Name in the server's log.")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text, usage and timings at the end.")
    ] = False,
) -> None:
    """Continue a prompt, or answer it with --chat; prints text as it is made."""
    with connect(context) as client:
        with usage_errors():
            stream = client.generate(
                model,
                None if chat or system is not None else prompt,
                messages=_messages(prompt, system) if chat or system is not None else None,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                typical_p=typical_p,
                seed=seed,
                stop=stop or (),
                stop_token_ids=stop_token_id or (),
                ignore_eos=ignore_eos or None,
                echo=echo or None,
                deterministic=deterministic or None,
                prompt_lookup_tokens=prompt_lookup_tokens,
                cache_salt=cache_salt,
                json_schema=_text(json_schema),
                regex=regex,
                grammar=_text(grammar),
                choice=choice,
                time_limit=time_limit,
                request_id=request_id,
            )
        with stream:
            if as_json:
                stream.text()
                print_json(_document(stream))
            else:
                print_stream(stream)


def score(  # noqa: PLR0913 - arguments and options
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name or alias of a loaded model.")],
    prompt: Annotated[str, typer.Argument(help="The prompt.", show_default=False)],
    continuations: Annotated[list[str], typer.Argument(help="What may follow it.")],
    *,
    cache_salt: CacheSalt = "",
    as_json: AsJson = False,
) -> None:
    """Say how likely texts are to follow a prompt: natural log-probabilities."""
    with connect(context) as client:
        ids = [
            client.tokenize(model, text, add_special_tokens=False).token_ids
            for text in continuations
        ]
        response = client.score(model, prompt, continuations=ids, cache_salt=cache_salt)
    if as_json:
        print_json(response)
        return
    print_table(
        ("CONTINUATION", "TOKENS", "LOG-PROBABILITY", "PER TOKEN", "GREEDY"),
        (
            (
                escape(repr(text)),
                str(len(found.token_logprobs)),
                f"{found.logprob:.3f}",
                f"{found.logprob / len(found.token_logprobs):.3f}",
                "yes" if found.is_greedy else "no",
            )
            for text, found in zip(continuations, response.scores, strict=True)
        ),
    )


def print_stream(stream: GenerateStream) -> None:
    """Print text as it comes, and end the line however the stream ends."""
    try:
        for chunk in stream:
            typer.echo(chunk.text, nl=False)
    finally:
        typer.echo()


def _text(file: Path | None) -> str | None:
    """Return what a file holds; raise ValueError where it is no UTF-8."""
    return None if file is None else file.read_text(encoding="utf-8")


def _messages(prompt: str, system: str | None) -> list[tuple[str, str]]:
    first = [] if system is None else [("system", system)]
    return [*first, ("user", prompt)]


def _document(stream: GenerateStream) -> dict[str, object]:
    reason = enum_name(FinishReason.DESCRIPTOR, stream.finish_reason or 0, "FINISH_REASON_")
    return {
        "text": stream.partial_text,
        "finish_reason": reason.upper(),
        "usage": to_dict(stream.usage or Usage()),
        "timings": to_dict(stream.timings or Timings()),
    }
