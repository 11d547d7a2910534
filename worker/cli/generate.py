"""`worker generate`: answer one prompt without a server. Read next: local_job.py."""

import typer

from worker.cli import job_options as options
from worker.cli.console import BackendOption, ContextOption, JsonLines, JsonOption, ModelArgument, Terminal, wake_for
from worker.errors import InvalidRequest


def generate(
    model: ModelArgument,
    prompt: options.PromptArgument = None,
    prompt_tokens: options.PromptTokensOption = None,
    special: options.SpecialOption = True,
    max_tokens: options.MaxTokensOption = None,
    stop: options.StopOption = None,
    stop_token_id: options.StopTokenOption = None,
    response_format: options.ResponseFormatOption = None,
    chat: options.ChatOption = False,
    system: options.SystemOption = None,
    tools: options.ToolsOption = None,
    tool_choice: options.ToolChoiceOption = None,
    template_kwargs: options.TemplateOption = None,
    temperature: options.TemperatureOption = None,
    seed: options.SeedOption = None,
    top_k: options.TopKOption = None,
    top_p: options.TopPOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.RepetitionOption = None,
    frequency_penalty: options.FrequencyOption = None,
    presence_penalty: options.PresenceOption = None,
    min_tokens: options.MinTokensOption = None,
    ignore_eos: options.IgnoreEosOption = False,
    logprobs: options.LogprobsOption = None,
    context: ContextOption = None,
    backend: BackendOption = None,
    json: JsonOption = False,
) -> None:
    """Answer one prompt and stream the answer.

    Pass a PROMPT (raw, or with --chat a user message) or --prompt-tokens. The text goes to stdout,
    statistics to stderr. Reasoning is dimmed, or goes to stderr if stdout is no terminal; a tool
    call is a line of its own. With --json each line is an event: started, token…, then end or
    error.
    """
    given = locals()  # the parameters by name
    try:
        fields = options.job_fields(given)
    except InvalidRequest as error:
        (JsonLines() if json else Terminal()).failed(error)
        raise typer.Exit(error.exit_code) from None
    flags = {"engine.backend": backend, "model.context": context}
    wake_for(flags)
    from worker.cli.local_job import answer_one  # noqa: PLC0415  # imported while the CUDA context is created

    answer_one(model, fields, flags, json=json)
