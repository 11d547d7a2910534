"""`worker generate`: answer one prompt without a server. Read next: local_job.py."""

from typing import Annotated, Any

import typer

from worker.cli.console import BackendOption, ContextOption, JsonOption, ModelArgument, wake_for


def _sampling(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="Sampling")


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; with --chat the user's message.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    prompt_tokens: Annotated[str | None, typer.Option(help="Token ids instead of a prompt, such as 1,2,3.")] = None,
    special: Annotated[bool, typer.Option(help="Parse special tokens in a raw prompt.")] = True,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum number of tokens; 2048 by default.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string: the answer ends before it; up to 16.")] = None,
    temperature: Annotated[float | None, _sampling("0 is greedy; 1 is the model's distribution; at most 2.")] = None,
    seed: Annotated[int | None, _sampling("Same seed, same answer.")] = None,
    top_k: Annotated[int | None, _sampling("Keep the k most likely tokens; 0 keeps all.")] = None,
    top_p: Annotated[float | None, _sampling("Keep the most likely tokens that reach this probability.")] = None,
    min_p: Annotated[float | None, _sampling("Drop tokens below this share of the best one's probability.")] = None,
    repetition_penalty: Annotated[float | None, _sampling("Above 1: make tokens that occurred less likely.")] = None,
    frequency_penalty: Annotated[float | None, _sampling("Subtract from a logit per occurrence of its token.")] = None,
    presence_penalty: Annotated[float | None, _sampling("Subtract from the logits of tokens that occurred.")] = None,
    min_tokens: Annotated[int | None, _sampling("Suppress end tokens before this many tokens.")] = None,
    ignore_eos: Annotated[bool, _sampling("Continue after end tokens.", "--ignore-eos")] = False,
    logprobs: Annotated[int | None, _sampling("Log-probabilities, with 0 to 20 alternatives per token.")] = None,
    context: ContextOption = None,
    backend: BackendOption = None,
    json: JsonOption = False,
) -> None:
    """Answer one prompt and stream the answer.

    Pass a PROMPT (raw, or with --chat a user message) or --prompt-tokens. The text goes to stdout,
    statistics to stderr. With --json each line is an event: started, token…, then end or error.
    """
    fields = {
        "temperature": temperature, "seed": seed, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty, "min_tokens": min_tokens, "logprobs": logprobs,
        "max_tokens": max_tokens, "stop": stop or None, "ignore_eos": ignore_eos, "special": special,
        **_prompt_fields(prompt, chat, system, prompt_tokens),
    }  # fmt: skip
    flags = {"engine.backend": backend, "model.context": context}
    wake_for(flags)
    from worker.cli.local_job import answer_one  # noqa: PLC0415  # imported while the CUDA context is created

    answer_one(model, fields, flags, json=json)


def _prompt_fields(prompt: str | None, chat: bool, system: str | None, tokens: str | None) -> dict[str, Any]:
    """Return the job's prompt, messages or prompt_tokens; validation rejects none or several."""
    fields: dict[str, Any] = {"prompt": None if chat else prompt}
    if chat and prompt is not None:
        turns = [{"role": "system", "content": system}] if system is not None else []
        fields["messages"] = [*turns, {"role": "user", "content": prompt}]
    if tokens is not None:
        try:
            fields["prompt_tokens"] = [int(part) for part in tokens.split(",")]
        except ValueError:
            problem = f"{tokens!r} is not a list of token ids such as 1,2,3"
            raise typer.BadParameter(problem, param_hint="--prompt-tokens") from None
    return fields
