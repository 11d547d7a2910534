"""Requests of the Responses API: fields, and their translation to the fields of a job.

An unknown field is refused by name. A field of OpenAI's schema that would change the answer and is
not supported is refused as well; one that has no effect on an answer is ignored.
Read `responses_events.py` next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AliasChoices, Discriminator, Field, Tag, model_validator

from worker.gateway.request import ApiModel, SamplingFields, contradiction
from worker.gateway.response_format import job_format
from worker.jobs.fields import LIST_TAG, MAP_TAG, TEXT_TAG, JsonMap, ShortText, Text, one_of

FIELD_NAMES = {
    "max_tokens": "max_output_tokens",
    r"messages(?!\[)": "input",
    r"response_format\.json_schema": "text.format",
}
"""Names of fields by patterns of those of the job, where they differ."""
ItemStatus = Literal["in_progress", "completed", "incomplete"]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Ignored = Any
"""A field of OpenAI's schema without effect."""


Async = Annotated[Any, Field(validation_alias=AliasChoices("async", "async_"), serialization_alias="async")]
"""Without effect. The openai package dumps it as `async_`."""


class Item(ApiModel):
    """Base class of what a request contains. Items of responses can be passed back unchanged."""


class TextPart(Item):
    """Text of a message; `annotations` and `logprobs` are those of an earlier response."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: Text = ""
    refusal: Text = ""
    annotations: Ignored = None
    logprobs: Ignored = None
    prompt_cache_breakpoint: Ignored = None


TextOrParts = Annotated[
    Annotated[Text, TEXT_TAG] | Annotated[list[TextPart], LIST_TAG], one_of("text or a list of text parts")
]


class MessageItem(Item):
    """A message of any role. Assistant messages are those of earlier responses."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: TextOrParts
    id: Ignored = None
    status: ItemStatus | None = None
    phase: Ignored = None


class FunctionCallItem(Item):
    """A call of an earlier response."""

    type: Literal["function_call"]
    call_id: ShortText
    name: ShortText
    arguments: Text
    id: Ignored = None
    status: ItemStatus | None = None
    namespace: Ignored = None
    caller: Ignored = None
    async_: Async = None


class FunctionCallOutputItem(Item):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: ShortText
    output: TextOrParts
    id: Ignored = None
    name: Ignored = None
    status: ItemStatus | None = None
    namespace: Ignored = None
    caller: Ignored = None


class ReasoningText(Item):
    """A piece of reasoning or of its summary."""

    type: Literal["reasoning_text", "summary_text"]
    text: Text


class ReasoningItem(Item):
    """Reasoning of an earlier response; it belongs to the assistant's items that follow it."""

    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list)
    content: list[ReasoningText] | None = None
    id: Ignored = None
    status: ItemStatus | None = None
    encrypted_content: Ignored = None


def _item_type(item: Any) -> str | None:
    """The tag of an input item; messages may lack `type`."""
    if isinstance(item, Item):
        return f"<{item.type}>"  # type: ignore[attr-defined]
    return f"<{item.get('type') or 'message'}>" if isinstance(item, dict) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(
        _item_type,
        custom_error_type="kind",
        custom_error_message="a message, function_call, function_call_output or reasoning item",
    ),
]
InputItems = Annotated[list[InputItem], Field(min_length=1, max_length=8192)]


class FunctionTool(Item):
    """A function that the model may call."""

    type: Literal["function"]
    name: ShortText
    description: Text | None = None
    parameters: JsonMap | None = None
    strict: bool | None = None
    defer_loading: Ignored = None
    allowed_callers: Ignored = None
    output_schema: Ignored = None
    async_: Async = None


class NamedTool(Item):
    """A `tool_choice` that names a function."""

    type: Literal["function"]
    name: ShortText


class AllowedTools(Item):
    """A `tool_choice` among some of the tools; the others are not in the prompt."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=1024)]


ToolChoice = Annotated[
    Annotated[NamedTool, Tag("<function>")] | Annotated[AllowedTools, Tag("<allowed_tools>")],
    Discriminator(
        _item_type, custom_error_type="kind", custom_error_message="a map of the type function or allowed_tools"
    ),
]


class TextFormat(Item):
    """The form of the answer's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: ShortText | None = None
    description: Text | None = None
    schema_: Annotated[JsonMap | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextConfig(Item):
    """Options of the answer's text. `verbosity` has no effect."""

    format: TextFormat | None = None
    verbosity: Ignored = None


class Reasoning(Item):
    """Options of reasoning. Reasoning is returned in full; there are no summaries."""

    effort: Effort | None = None
    summary: Ignored = None
    generate_summary: Ignored = None
    context: Ignored = None
    mode: Ignored = None


class ResponsesRequest(SamplingFields):
    """The body of `POST /v1/responses`."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        (
            *("access_programs", "background_options", "context_management", "image", "max_tool_calls"),
            *("prompt_cache_options", "prompt_cache_retention", "service_tier", "stream_options"),
        )
    )

    model: ShortText | None = None
    """The only served model without it."""
    input: (
        Annotated[Annotated[Text, TEXT_TAG] | Annotated[InputItems, LIST_TAG], one_of("text or a list of items")] | None
    ) = None
    instructions: Text | None = None
    previous_response_id: ShortText | None = None
    tools: list[FunctionTool] = Field(default_factory=list, max_length=1024)
    tool_choice: Annotated[
        Annotated[Literal["auto", "none", "required"], TEXT_TAG] | Annotated[ToolChoice, MAP_TAG],
        one_of("auto, none, required or a map that names functions"),
    ] = "auto"
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: (
        list[
            Literal[
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "message.input_image.image_url",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
                "reasoning.encrypted_content",
                "message.output_text.logprobs",
            ]
        ]
        | None
    ) = None
    stream: bool | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    truncation: Literal["auto", "disabled"] | None = None

    chat_template_kwargs: JsonMap | None = None
    """Variables of the chat template, as vLLM names them."""
    structured_outputs: JsonMap | None = None
    """vLLM's form of `text.format`, which also has regular expressions, choices and grammars."""

    # Fields of OpenAI's schema that would change the answer and are refused.
    conversation: Ignored = None
    moderation: Ignored = None
    prompt: Ignored = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("conversation", "moderation", "prompt"):
            if getattr(self, name) is not None:
                raise contradiction(name, "not supported by this server")
        if self.input is None and self.previous_response_id is None:
            raise contradiction("input", "required")
        if self.background and self.store is False:
            raise contradiction("store", "true or absent with background: the response is read later")
        names = [tool.name for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.name not in names:
            raise contradiction("tool_choice.name", "the name of one of the tools")
        if isinstance(self.tool_choice, AllowedTools) and {each.name for each in self.tool_choice.tools} - set(names):
            raise contradiction("tool_choice.tools", "names of tools of the request")
        if self.tool_choice == "required" and not self.tools:
            raise contradiction("tool_choice", "auto or none: the request has no tools")
        form = self.text.format if self.text else None
        if form and form.type == "json_schema" and form.schema_ is None:
            raise contradiction("text.format.schema", "required")
        if form and self.structured_outputs:
            raise contradiction("structured_outputs", "only without text.format")
        return self

    @property
    def is_stored(self) -> bool:
        """Whether the response can be retrieved and continued."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer's text has log-probabilities."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    def messages(self) -> list[dict[str, Any]]:
        """The input as messages of a job, without instructions and earlier turns."""
        if self.input is None or isinstance(self.input, str):
            return [{"role": "user", "content": self.input}] if self.input is not None else []
        return messages_of(self.input)

    def echo(self, model: str) -> dict[str, Any]:
        """The fields of the response object that repeat the request."""
        form = self.text.format if self.text else None
        return {
            "model": model,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": self.reasoning.effort if self.reasoning else None, "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.is_stored,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": _dumped(form) if form else {"type": "text"}},
            "tool_choice": self.tool_choice if isinstance(self.tool_choice, str) else _dumped(self.tool_choice),
            "tools": [_dumped(tool) | {"strict": tool.strict} for tool in self.tools],
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": self.truncation or "disabled",
            "user": self.user,
        }

    def job_fields(self, conversation: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The fields of a job whose messages are the instructions and `conversation`."""
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields = self.sampling()
        if self.wants_logprobs:
            fields |= {"logprobs": self.top_logprobs or 0, "token_bytes": True}
        if self.tools:
            fields |= self._tool_fields()
        effort = self.reasoning.effort if self.reasoning else None
        fields["chat_template_kwargs"] = with_effort(effort, self.chat_template_kwargs)
        form = _job_format(self.text.format) if self.text and self.text.format else None
        fields["response_format"] = job_format(form, self.structured_outputs)
        fields |= {"messages": [*instructions, *conversation], "max_tokens": self.max_output_tokens}
        fields["tenant"] = self.user or None
        return {name: value for name, value in fields.items() if value is not None}

    def _tool_fields(self) -> dict[str, Any]:
        tools, choice = self.tools, self.tool_choice
        if isinstance(choice, AllowedTools):
            allowed = {each.name for each in choice.tools}
            tools, choice = [tool for tool in tools if tool.name in allowed], choice.mode
        named = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedTool) else choice
        return {"tools": [_job_tool(tool) for tool in tools], "tool_choice": named}


def _dumped(model: ApiModel) -> dict[str, Any]:
    return model.model_dump(by_alias=True, exclude_none=True)


def with_effort(effort: str | None, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Template variables for a reasoning effort; those that the request has take priority.

    A model family without efforts has a switch at most, which `none` turns off.
    """
    chosen: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        chosen["enable_thinking"] = False
    return chosen | (kwargs or {}) or None


def messages_of(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Input items as messages of a job.

    Reasoning, one text and the calls that follow become one assistant message, as a chat template
    renders one turn.
    """
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] = {}
    """The assistant's turn that is being collected."""
    for item in items:
        if isinstance(item, FunctionCallOutputItem):
            turn = {}
            messages.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            turn = {}
            messages.append({"role": item.role, "content": _text(item.content)})
        else:
            addition = _assistant_fields(item)
            if not turn or not _may_follow(turn, addition):
                turn = {"role": "assistant"}
                messages.append(turn)
            turn |= {"tool_calls": [*turn.get("tool_calls", []), *addition.pop("tool_calls", [])]} | addition
    return [_complete(message) for message in messages]


def _may_follow(turn: dict[str, Any], addition: dict[str, Any]) -> bool:
    """Whether an item belongs to the turn: reasoning first, then one text, then calls."""
    order = ("role", "reasoning_content", "content", "tool_calls")
    last = max(order.index(name) for name, value in turn.items() if value)
    first = min(order.index(name) for name in addition)
    return first > last or (first == last and order[first] == "tool_calls")


def _assistant_fields(item: Any) -> dict[str, Any]:
    if isinstance(item, ReasoningItem):
        return {"reasoning_content": "".join(part.text for part in item.content or item.summary)}
    if isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    return {"content": _text(item.content)}


def _complete(message: dict[str, Any]) -> dict[str, Any]:
    """A message without empty fields; one without text and calls has an empty text."""
    kept = {name: value for name, value in message.items() if value or name == "content"}
    if "content" not in kept and "tool_calls" not in kept:
        kept["content"] = ""
    return kept


def _text(content: str | list[TextPart]) -> str | list[dict[str, str]]:
    """The content of a job's message: parts stay parts, since a template may join them itself."""
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.refusal if part.type == "refusal" else part.text} for part in content]


def _job_tool(tool: FunctionTool) -> dict[str, Any]:
    names = ("name", "description", "parameters", "strict")
    function = {name: value for name in names if (value := getattr(tool, name)) is not None}
    return {"type": "function", "function": function}


def _job_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    names = {"name": "name", "description": "description", "schema": "schema_", "strict": "strict"}
    schema = {name: value for name, field in names.items() if (value := getattr(form, field)) is not None}
    return {"type": "json_schema", "json_schema": schema}
