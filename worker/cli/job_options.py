"""Options that describe a job, the same for `worker generate` and `worker submit`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from worker.errors import InvalidRequest


def _sampling(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Sampling")


def _chat(text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel="Chat")


PromptArgument = Annotated[str | None, typer.Argument(help="The prompt; with --chat the user's message.")]
PromptTokensOption = Annotated[str | None, typer.Option(help="Token ids instead of a prompt, such as 1,2,3.")]
SpecialOption = Annotated[bool, typer.Option(help="Parse special tokens in a raw prompt.")]
MaxTokensOption = Annotated[int | None, typer.Option(help="Maximum number of tokens; by default up to 2048.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Stop string: the answer ends before it; up to 16.")]
StopTokenOption = Annotated[
    list[int] | None, typer.Option("--stop-token-id", help="Token id that ends the answer; up to 64.")
]
ResponseFormatOption = Annotated[
    str | None,
    typer.Option(
        "--response-format",
        help="""Form of the answer, JSON or a file with it: '{"type": "choice", "choice": ["yes", "no"]}'.""",
        metavar="JSON|FILE",
    ),
]

ChatOption = Annotated[bool, _chat("Apply the model's chat template to the prompt.", "--chat")]
SystemOption = Annotated[str | None, _chat("The system message.")]
ToolsOption = Annotated[Path | None, _chat("JSON file with a list of tools, in OpenAI's form.", metavar="FILE")]
ToolChoiceOption = Annotated[str | None, _chat("auto, none, required, or the name of a function.")]
TemplateOption = Annotated[
    str | None,
    _chat("""Variables of the chat template: '{"enable_thinking": false}'.""", "--template-kwargs", metavar="JSON"),
]

TemperatureOption = Annotated[float | None, _sampling("0 is greedy; 1 is the model's distribution; at most 2.")]
SeedOption = Annotated[int | None, _sampling("Same seed, same answer.")]
TopKOption = Annotated[int | None, _sampling("Keep the k most likely tokens; 0 keeps all.")]
TopPOption = Annotated[float | None, _sampling("Keep the most likely tokens that reach this probability.")]
MinPOption = Annotated[float | None, _sampling("Drop tokens below this share of the best one's probability.")]
RepetitionOption = Annotated[float | None, _sampling("Above 1: make tokens that occurred less likely.")]
FrequencyOption = Annotated[float | None, _sampling("Subtract from a logit per occurrence of its token.")]
PresenceOption = Annotated[float | None, _sampling("Subtract from the logits of tokens that occurred.")]
MinTokensOption = Annotated[int | None, _sampling("Suppress end tokens before this many tokens.")]
IgnoreEosOption = Annotated[bool, _sampling("Continue after end tokens.", "--ignore-eos")]
LogprobsOption = Annotated[int | None, _sampling("Log-probabilities, with 0 to 20 alternatives per token.")]


_SAMPLING_FIELDS = (
    *("max_tokens", "temperature", "seed", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "min_tokens", "logprobs"),
)
"""Job fields whose options have the same names."""


def job_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """The job's fields from the parameters of a command; None where an option is not given.

    Validation rejects a prompt and tokens at once.

    Raises:
        InvalidRequest: there is no prompt.
        BadParameter: a malformed value, or an option that has no effect without --chat.
    """
    prompt, tokens, chat = options["prompt"], options["prompt_tokens"], options["chat"]
    fields = {name: options[name] for name in _SAMPLING_FIELDS}
    fields |= {"stop": options["stop"] or None, "stop_token_ids": options["stop_token_id"] or None}
    fields |= {"ignore_eos": options["ignore_eos"] or None, "special": None if options["special"] else False}
    fields |= {"prompt": None if chat else prompt, "prompt_tokens": tokens and _token_ids(tokens)}
    if (given := options["response_format"]) is not None:
        fields["response_format"] = _json(_text_of(given, "--response-format"), dict, "--response-format")
    chat_options = {name: options[name] for name in ("system", "tools", "tool_choice", "template_kwargs")}
    if not chat:
        for name, value in chat_options.items():
            if value is not None:
                raise typer.BadParameter("has no effect without --chat", param_hint=f"--{name.replace('_', '-')}")
    elif prompt is not None:
        fields |= _chat_fields(prompt, **chat_options)
    if prompt is None and tokens is None:
        text = "missing; pass the user's message" if chat else "missing; pass a PROMPT, or --prompt-tokens 1,2,3"
        raise InvalidRequest.of(("prompt", text, None))
    return fields


def _token_ids(tokens: str) -> list[int]:
    try:
        return [int(part) for part in tokens.split(",")]
    except ValueError:
        problem = f"{tokens!r} is not a list of token ids such as 1,2,3"
        raise typer.BadParameter(problem, param_hint="--prompt-tokens") from None


def _chat_fields(
    prompt: str, system: str | None, tools: Path | None, tool_choice: str | None, template_kwargs: str | None
) -> dict[str, Any]:
    turns = [{"role": "system", "content": system}] if system is not None else []
    known = tool_choice in (None, "auto", "none", "required")
    return {
        "messages": [*turns, {"role": "user", "content": prompt}],
        "tools": None if tools is None else _json(_read(tools, "--tools"), list, "--tools"),
        "tool_choice": tool_choice if known else {"type": "function", "function": {"name": tool_choice}},
        "chat_template_kwargs": None if template_kwargs is None else _json(template_kwargs, dict, "--template-kwargs"),
    }


def _text_of(text: str, option: str) -> str:
    """The text itself if it is a JSON object, else the content of the file that it names."""
    return text if text.lstrip().startswith("{") else _read(Path(text), option)


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} can't be read ({error})", param_hint=option) from None


def _json(text: str, kind: type, option: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"no valid JSON: {error}", param_hint=option) from None
    if not isinstance(value, kind):
        raise typer.BadParameter("must be a JSON " + ("list" if kind is list else "object"), param_hint=option)
    return value
