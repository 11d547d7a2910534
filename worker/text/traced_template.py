"""Jinja2 templates as transformers renders them, with the origin of each character of the result.

A template is compiled once and rendered twice: with plain strings, whose text is the result, and
with `TracedText`, whose origins are used if its text is the same. Otherwise all are UNKNOWN.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from worker.text.traced_text import TRUSTED, TracedText, concat, labelled, trace, trace_format


class RaisedByTemplate(TemplateError):
    """The template called `raise_exception`."""


class TracedTemplate:
    """A compiled template. Raises what jinja2 raises, which can be any exception."""

    def __init__(self, source: str) -> None:
        plain, tracing = _Environment(), _TracingEnvironment()
        code = plain.compile(source)
        self._plain = Template.from_code(plain, code, plain.make_globals(None))
        self._traced = Template.from_code(tracing, code, tracing.make_globals(None))

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render with the variables as they are."""
        return self._plain.render(variables)

    def trace(self, variables: Mapping[str, Any], text: str) -> TracedText:
        """Trace `text`, which `render` returned for the same variables without their origins."""
        try:
            traced = trace(self._traced.render(variables))
        except MemoryError:
            raise
        except Exception:  # an operation that depends on the type of a string
            return TracedText(text)
        return traced if traced == text else TracedText(text)


class _CodeGenerator(CodeGenerator):
    """Generates code in which the environment makes the template's own texts, and joins texts."""

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.literal({super()._output_const_repr(group)})"

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: CodeGenerator._FinalizeInfo) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super()._output_child_pre(node, frame, finalize)
        else:
            self.write("environment.text(")

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802
        self.write(_literal(node.as_const(frame.eval_ctx)))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("environment.join((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")


def _literal(value: Any) -> str:
    """Python source of a constant, in which each string is the template's."""
    if type(value) is str:  # not Markup, which has operations of its own
        return f"environment.literal({value!r})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        items = "".join(f"{_literal(item)}, " for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items})"
    return repr(value)


class _Generation(Extension):
    """`{% generation %}`, which marks the model's turns for training: render its body."""

    tags = {"generation"}  # noqa: RUF012  (a plain set in jinja2's Extension)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of transformers' `apply_chat_template`."""

    code_generator_class = _CodeGenerator
    text: Callable[[Any], str] = str
    join: Callable[[Iterable[Any]], str] = staticmethod(str_join)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception

    def literal(self, text: str) -> str:
        """Return a text of the template's own."""
        return text


class _TracingEnvironment(_Environment):
    """The same environment for `TracedText`. What loses the origins of a text labels it anew."""

    concat = staticmethod(concat)
    text = staticmethod(trace)
    join = staticmethod(concat)

    def __init__(self) -> None:
        super().__init__()
        self._literals: dict[str, TracedText] = {}
        self.filters = {name: _labelling(function) for name, function in self.filters.items()}
        self.filters |= {"join": self._join, "safe": lambda value: value}

    def literal(self, text: str) -> TracedText:
        found = self._literals.get(text)
        if found is None:
            found = self._literals[text] = trace(text, TRUSTED)
        return found

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        result = super().call(__context, __obj, *args, **kwargs)
        return _label(result, (getattr(__obj, "__self__", None), args, kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        call = super().wrap_str_format(value)
        if call is None:
            return None

        def format_traced(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                return trace_format(value.__self__, lambda _, named: call(named), [], args[0])
            return trace_format(value.__self__, lambda items, named: call(*items, **named), list(args), kwargs)

        return format_traced

    def _join(self, _: object, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        # The first argument is the evaluation context, which compiled code passes to jinja2's own.
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        return trace(d).join([trace(item) for item in value])


def _labelling(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)  # keeps the attributes that request the context or the environment
    def call(*args: Any, **kwargs: Any) -> Any:
        return _label(function(*args, **kwargs), (args, kwargs))

    return call


def _label(result: Any, inputs: object) -> Any:
    return labelled(str(result), inputs) if type(result) in (str, Markup) else result


def _raise_exception(message: str) -> NoReturn:
    raise RaisedByTemplate(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
