"""Requests of Anthropic's Messages API: fields, and their translation to the fields of a job.

An unknown field is refused by name, and so is what would change the answer and is not supported:
images, documents, tools that a server runs, a prefilled answer. Read `messages_events.py` next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from worker.gateway.request import ApiModel, SamplingFields, contradiction
from worker.gateway.responses_request import Ignored, with_effort
from worker.jobs.fields import LIST_TAG, TEXT_TAG, JsonMap, ShortText, Text, one_of

FIELD_NAMES = {"stop": "stop_sequences", r"response_format\.json_schema": "output_config.format"}
"""Names of fields by patterns of those of the job, where they differ."""


class TextBlock(ApiModel):
    """Text."""

    type: Literal["text"]
    text: Text
    cache_control: Ignored = None
    citations: Ignored = None


class ThinkingBlock(ApiModel):
    """Reasoning of an earlier answer; the signature is not verified."""

    type: Literal["thinking"]
    thinking: Text
    signature: Ignored = None


class RedactedThinkingBlock(ApiModel):
    """Encrypted reasoning of another server, which is dropped."""

    type: Literal["redacted_thinking"]
    data: Ignored = None


class ToolUseBlock(ApiModel):
    """A tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: ShortText
    name: ShortText
    input: JsonMap
    cache_control: Ignored = None
    caller: Ignored = None
    toolset_name: Ignored = None


TextOrBlocks = Annotated[
    Annotated[Text, TEXT_TAG] | Annotated[list[TextBlock], LIST_TAG], one_of("text or a list of text blocks")
]


class ToolResultBlock(ApiModel):
    """The result of a tool call. Chat templates know no errors: `is_error` has no effect."""

    type: Literal["tool_result"]
    tool_use_id: ShortText
    content: TextOrBlocks = ""
    is_error: bool | None = None
    cache_control: Ignored = None
    toolset_name: Ignored = None


def _block_type(block: Any) -> str | None:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return f"<{kind}>"


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(
        _block_type,
        custom_error_type="kind",
        custom_error_message="a text, thinking, redacted_thinking, tool_use or tool_result block",
    ),
]


class InputMessage(ApiModel):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[Text, TEXT_TAG] | Annotated[list[Block], LIST_TAG], one_of("text or a list of content blocks")
    ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        of_role = {"user": ("text", "tool_result"), "system": ("text",)}
        allowed = of_role.get(self.role, ("text", "thinking", "redacted_thinking", "tool_use"))
        for index, block in enumerate(self.content if isinstance(self.content, list) else ()):
            if block.type not in allowed:
                raise contradiction(f"content.{index}.type", "not in a message of this role")
        return self


class Tool(ApiModel):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: ShortText
    input_schema: JsonMap
    description: Text | None = None
    strict: bool | None = None
    allowed_callers: Ignored = None
    cache_control: Ignored = None
    defer_loading: Ignored = None
    eager_input_streaming: Ignored = None
    input_examples: Ignored = None


class ToolChoice(ApiModel):
    """Which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: ShortText | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(ApiModel):
    """Options of reasoning. A budget is a hint that has no effect."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(ApiModel):
    """The schema of the answer's text."""

    type: Literal["json_schema"]
    schema_: Annotated[JsonMap, Field(alias="schema")]


class OutputConfig(ApiModel):
    """Options of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None
    task_budget: Ignored = None


class Metadata(ApiModel):
    """About the request."""

    user_id: Text | None = None


class PromptRequest(ApiModel):
    """The fields that determine the prompt: the body of `POST /v1/messages/count_tokens`."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        (
            *("betas", "cache_control", "context_management", "diagnostics", "inference_geo", "service_tier", "speed"),
            *("user_profile_id", "workspace_id"),
        )
    )

    model: ShortText | None = None
    """The only served model without it."""
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=8192)]
    system: TextOrBlocks | None = None
    tools: list[Tool] = Field(default_factory=list, max_length=1024)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: JsonMap | None = None
    """Variables of the chat template, as vLLM names them."""

    # Fields of Anthropic's schema that would change the answer and are refused.
    mcp_servers: Ignored = None

    @model_validator(mode="after")
    def _check_prompt(self) -> Self:
        if self.mcp_servers:
            raise contradiction("mcp_servers", "not supported by this server")
        if self.messages[-1].role == "assistant":
            last = f"messages.{len(self.messages) - 1}"
            raise contradiction(last, "of the role user: a prefilled answer is not supported")
        choice = self.tool_choice
        if choice and choice.type == "any" and not self.tools:
            raise contradiction("tool_choice.type", "auto or none: the request has no tools")
        if choice and choice.type == "tool" and choice.name not in [tool.name for tool in self.tools]:
            raise contradiction("tool_choice.name", "the name of one of the tools")
        return self

    @property
    def shows_thinking(self) -> bool:
        """Whether the answer contains its reasoning."""
        return self.thinking is None or (self.thinking.type != "disabled" and self.thinking.display != "omitted")

    @property
    def allows_parallel_calls(self) -> bool:
        """Whether the answer may have several tool calls."""
        return not (self.tool_choice and self.tool_choice.disable_parallel_tool_use)

    def prompt_fields(self) -> dict[str, Any]:
        """The fields of a job that determine its prompt."""
        system = [] if not self.system else [{"role": "system", "content": _content(self.system)}]
        messages = [part for message in self.messages for part in _job_messages(message)]
        fields: dict[str, Any] = {"messages": [*system, *messages]}
        if self.tools:
            fields |= {"tools": [_job_tool(tool) for tool in self.tools], "tool_choice": self._job_tool_choice()}
        if self.output_config and self.output_config.format:
            schema = {"name": "output", "schema": self.output_config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        kwargs = self.chat_template_kwargs
        if self.thinking and self.thinking.type in ("enabled", "disabled"):
            kwargs = {"enable_thinking": self.thinking.type == "enabled"} | (kwargs or {})
        kwargs = with_effort(self.output_config.effort if self.output_config else None, kwargs)
        return fields | ({} if kwargs is None else {"chat_template_kwargs": kwargs})

    def _job_tool_choice(self) -> Any:
        choice = self.tool_choice or ToolChoice(type="auto")
        if choice.type == "tool":
            return {"type": "function", "function": {"name": choice.name}}
        return "required" if choice.type == "any" else choice.type


class MessagesRequest(PromptRequest, SamplingFields):
    """The body of `POST /v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[Text] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    container: Ignored = None

    @model_validator(mode="after")
    def _check_container(self) -> Self:
        if self.container is not None:
            raise contradiction("container", "not supported by this server")
        return self

    def job_fields(self) -> dict[str, Any]:
        """The fields of the job."""
        fields = self.sampling() | {"max_tokens": self.max_tokens}
        if self.stop_sequences:
            fields["stop"] = [*fields.get("stop", []), *self.stop_sequences]
        return self.prompt_fields() | fields


def _content(content: str | Sequence[TextBlock]) -> str | list[dict[str, str]]:
    """The content of a job's message: blocks stay parts, since a template may join them itself."""
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": block.text} for block in content]


def _job_messages(message: InputMessage) -> list[dict[str, Any]]:
    """The job's messages of one turn: a tool result is a message of its own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "assistant":
        return [_assistant_message(message.content)]
    messages: list[dict[str, Any]] = []
    texts: list[dict[str, str]] = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            texts = []
            result = {"content": _content(block.content), "tool_call_id": block.tool_use_id}
            messages.append({"role": "tool", **result})
        elif isinstance(block, TextBlock):
            if not texts:
                messages.append({"role": message.role, "content": texts})
            texts.append({"type": "text", "text": block.text})
    return messages or [{"role": message.role, "content": ""}]


def _assistant_message(blocks: Sequence[Any]) -> dict[str, Any]:
    """One message of an assistant's turn: reasoning, text and calls."""
    message: dict[str, Any] = {"role": "assistant"}
    if thinking := [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]:
        message["reasoning_content"] = "\n".join(thinking)
    texts = [block for block in blocks if isinstance(block, TextBlock)]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    if texts or not calls:
        message["content"] = _content(texts) if texts else ""
    return message | ({"tool_calls": calls} if calls else {})


def _job_tool(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    strict = {} if tool.strict is None else {"strict": tool.strict}
    return {
        "type": "function",
        "function": {name: value for name, value in function.items() if value is not None} | strict,
    }
