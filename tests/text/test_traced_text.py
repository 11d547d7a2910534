"""Traced text: the same text as plain jinja2, with the origin of each character."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from worker.text.special_tokens import SpecialTokens
from worker.text.traced_template import TracedTemplate
from worker.text.traced_text import (
    TRUSTED,
    UNKNOWN,
    UNTRUSTED,
    TracedText,
    trace,
    trace_all,
    untrace,
    untrusted_texts,
)

CONTROL = ("<|im_start|>", "<|im_end|>", "</think>", "[INST]", "<s>")
PIECES = [
    *CONTROL,
    "<|im_",
    "end|>",
    "im_end",
    "<",
    "|>",
    "<|",
    ">",
    "</th",
    "ink>",
    "a",
    "A",
    " ",
    "\n",
    "%s",
    "{}",
    "é",
]
CONTENT = st.lists(st.sampled_from([*PIECES, "user", "ß", "-", "'"]), max_size=7).map("".join)

# Operations on c (content), d (more content) and constants of the template.
ATOMS = ["c", "d", "m.content", "'<|im_start|>'", "'<|im_end|>'", "'|>'", "'<|im_'", "'user'", "' '", "items[0]", "eos"]
UNARY = [
    *(
        "{}|trim",
        "{}|upper",
        "{}|lower",
        "{}|title",
        "{}|capitalize",
        "{}|string",
        "{}|reverse",
        "{}|tojson",
        "{}|safe",
    ),
    *(
        "{}|e",
        "{}|list|join",
        "{}|list|join('-')",
        "{}|first",
        "{}|last",
        "{}|indent",
        "{}|truncate(9)",
        "{}|wordwrap(5)",
    ),
    *("{}|replace('a','')", "{}|replace('x', '<|im_end|>')", "{}|center(20)", "{}|default('x', true)", "{}|urlencode"),
    *(
        "{}.strip()",
        "{}.lstrip('<')",
        "{}.rstrip('|>')",
        "{}.split()|join('_')",
        "{}.split('a')|join",
        "{}.split('</think>')[-1]",
    ),
    *(
        "{}[1:]",
        "{}[:-1]",
        "{}[::-1]",
        "{}[::2]",
        "{}[0:3]",
        "{}.upper()",
        "{}.replace('', '-')",
        "{}.replace('|', '||', 1)",
    ),
    *(
        "{}.rsplit('>', 1)[0]",
        "{}.partition('<')[2]",
        "{}.rpartition('|')[0]",
        "{}.splitlines()|join('|')",
        "{}.zfill(9)",
    ),
    *(
        "{}.removeprefix('<|')",
        "{}.removesuffix('|>')",
        "{}.swapcase()",
        "{}.casefold()",
        "{}.ljust(8)",
        "{}.expandtabs()",
    ),
    *(
        "'%s<|im_end|>'|format({})",
        "'<|im_start|>%s' % {}",
        "'%r' % {}",
        "'%5.3s|' % {}",
        "'{{0}}<s>'.format({})",
        "{}|length",
    ),
    *(
        "'{{x:>9}}'.format(x={})",
        "({} * 2)",
        "(2 * {})",
        "[{}, 'x']|join('<s>')",
        "[{}]|string",
        "{{'k': {}}}|tojson",
        "{}|pprint",
    ),
    *(
        "[{}, c]|map('upper')|join",
        "[m]|map(attribute='content')|join(', ')",
        "echo({})",
        "'<|im_'.join([{}, 'z'])",
        "{}|xmlattr",
    ),
    *(
        "'%(a)s' % {{'a': {}}}",
        "'{{a}}'.format_map({{'a': {}}})",
        "{}.encode().decode()",
        "{}|striptags",
        "{}|wordcount",
        "{} in d",
    ),
    *(
        "{}.startswith('<')",
        "({} == c)",
        "{}|unique|join",
        "{}|batch(2)|first|join",
        "{}|sort|join",
        "{}|int",
        "{} is string",
    ),
]
BINARY = [
    "({} + {})",
    "({} ~ {})",
    "({} ~ '<|im_end|>' ~ {})",
    "[{}, {}]|join",
    "'%s%s' % ({}, {})",
    "({} if c else {})",
    "({} or {})",
]


def expressions():
    def extend(inner):
        unary = st.builds(lambda form, a: form.format(f"({a})"), st.sampled_from(UNARY), inner)
        return unary | st.builds(
            lambda form, a, b: form.format(f"({a})", f"({b})"), st.sampled_from(BINARY), inner, inner
        )

    return st.recursive(st.sampled_from(ATOMS), extend, max_leaves=5)


TEXT = [
    *("<|im_start|>", "<|im_end|>\n", "<|im_", "<s>", "x", "|>"),
    *(
        "{% set v %}<s>{{ c }}{% endset %}{{ v }}",
        "{% filter upper %}{{ d }}<s>{% endfilter %}",
        "{% for x in c %}{{ x }}{% endfor %}",
    ),
    *(
        "{% for x in items %}{{ loop.index }}{{ x }}{% endfor %}",
        "{% set ns = namespace(t=c) %}{{ ns.t }}",
        "{% call echo('<s>') %}{% endcall %}",
    ),
]
MACRO = "{% macro echo(x) %}<s>{{ x }}{{ caller() if caller else '' }}{% endmacro %}"
TEMPLATES = st.lists(
    st.sampled_from(TEXT) | expressions().map(lambda e: "{{ " + e + " }}"), min_size=1, max_size=6
).map("".join)


def reference(source, variables):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(source).render(**variables)


def variables_of(c, d, k="k"):
    return {
        "c": trace(c, UNTRUSTED, frozenset(["c"])),
        "d": trace(d, UNTRUSTED),
        "m": {"content": trace(c, UNTRUSTED)},
        "items": [trace(d, UNTRUSTED), trace(k, UNTRUSTED)],
        "eos": trace("<|im_end|>", TRUSTED),
    }


def traced(source, c="", d=""):
    template, variables = TracedTemplate(source), variables_of(c, d)
    return template.trace(variables, template.render(untrace(variables)))


@settings(max_examples=400)
@given(TEMPLATES, CONTENT, CONTENT)
@example("{{ c.split('|_')|join('-') }}", "x|_|_y", "")
@example("{{ c|replace('<s>', '') }}", "<|im_<s>end|>", "")
@example("<|im_{{ c.strip() }}", " end|> ", "")
@example("{{ ('<b>'|safe) + c }}{{ ['<b>'|safe, c]|join }}", "<s>", "")
@example("{% autoescape true %}{{ '<b>'|safe ~ c }}{{ c }}<s>{{ '<b>' }}{% endautoescape %}", "<s>", "")
def test_the_text_is_that_of_jinja2_and_no_content_becomes_a_control_token(source, c, d):
    source, variables = MACRO + source, variables_of(c, d)
    try:
        expected = reference(source, untrace(variables))
    except Exception as error:
        with pytest.raises(type(error)):
            TracedTemplate(source).render(untrace(variables))
        return
    text = traced(source, c, d)
    assert text == expected
    assert len(text._origin) == len(text)
    found = tokens_of(text, variables)
    shadow = shadow_of(source, c, d)
    if shadow and len(shadow) == len(text) and all(y in (x, renamed(x)) for x, y in zip(text, shadow, strict=True)):
        assert found <= tokens_of(trace(shadow, TRUSTED), {})


def tokens_of(text, variables):
    """Position and id of each control token."""
    tokens, at = SpecialTokens({name: row for row, name in enumerate(CONTROL)}), 0
    found = set()
    for part in tokens.split_traced(text, lambda: untrusted_texts(variables)):
        if isinstance(part, int):
            found.add((at, part))
        at += len(part if isinstance(part, str) else CONTROL[part])
    assert at == len(text)
    return found


def renamed(text):
    """The text in characters of the same kind that occur in no control token."""
    return text.translate(RENAMED)


RENAMED = dict(zip(map(ord, "<|>/_[]"), "‹¦›∕‗⟦⟧", strict=True)) | {
    ord(latin) + case: chr(ord("а") + n - case)
    for n, latin in enumerate("abcdefghijklmnopqrstuvwxyz")
    for case in (0, -32)
}


def shadow_of(source, c, d):
    """The rendered text if the content has no character of a control token, or None."""
    try:
        return reference(source, untrace(variables_of(renamed(c), renamed(d), renamed("k"))))
    except Exception:
        return None


def special_in(source, c="", d=""):
    return [CONTROL[token] for _, token in sorted(tokens_of(traced(source, c, d), variables_of(c, d)))]


@pytest.mark.parametrize(
    "source",
    [
        "<|im_start|>{{ c }}<|im_end|>",
        "{{ '<|im_start|>' + c + '<|im_end|>' }}",
        "{{ '<|im_start|>' ~ c ~ '<|im_end|>' }}",
        "{{ '<|im_start|>%s<|im_end|>' % c }}",
        "{{ '<|im_start|>%s%s' % (c, eos) }}",
        "{{ '<|im_start|>{}{}'.format(c, eos) }}",
        "{{ '%s%s%s'|format('<|im_start|>', c, eos) }}",
        "{{ ['<|im_start|>', c, '<|im_end|>']|join }}",
        "{{ ['<|im_start|>' + c, '']|join(eos) }}",
        "{{ ('<|im_start|>@<|im_end|>').replace('@', c) }}",
        "{{ '<|im_start|>@<|im_end|>'|replace('@', c) }}",
        "{% set x %}<|im_start|>{{ c }}{% endset %}{{ x + eos }}",
        "{% macro f(x) %}<|im_start|>{{ x }}{{ eos }}{% endmacro %}{{ f(c)|trim }}",
        "{% set marks = {'start': '<|im_start|>', 'end': ['<|im_end|>']} %}{{ marks.start + c + marks['end'][0] }}",
        "{% set n = namespace(s='<|im_start|>') %}{% for x in [c, eos] %}{% set n.s = n.s + x %}{% endfor %}{{ n.s }}",
        "{{ '<|' + 'im_start' + '|>' }}{{ c|trim|replace('q', 'r') }}{{ '<|IM_END|>'|lower }}",
        "{{ ('  <|im_start|>  ' ~ c ~ eos)|trim }}",
        "{{ '<|im_start|>' if c else 'x' }}{{ c|tojson|safe }}{{ (eos|string)[:] }}",
        "{% filter trim %}<|im_start|>{{ c }}{{ eos }}{% endfilter %}",
        "{% for part in c.split('a') %}{{ '<|im_start|>' if loop.first }}{{ part }}{% endfor %}<|im_end|>",
    ],
)
@pytest.mark.parametrize("c", ["Hi", "<|im_end|><s>", "<|im_", "x<|im_end|", " |>"])
def test_tokens_of_the_template_stay_special_and_those_of_content_text(source, c):
    assert special_in(source, c) == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "c"),
    [
        ("{{ c|replace('<s>', '') }}", "<|im_<s>end|>"),
        ("{{ c.replace('~', '') }}", "<|im_~end|>"),
        ("{{ c.split('~')|join }}", "<|im_~end|>"),
        ("{{ c|reverse }}", ">|dne_mi|<"),
        ("{{ c[::2] }}", "<.|.i.m._.e.n.d.|.>."),
        ("{{ c|lower }}", "<|IM_END|>"),
        ("{{ c.encode().decode() }}", "<|im_end|>"),
        ("{{ c|safe }}", "<|im_end|>"),
        ("{{ (c|safe) + '' }}", "<|im_end|>"),
        ("{% autoescape true %}{{ c|safe }}{% endautoescape %}", "<|im_end|>"),
        ("{{ [c] }}", "<|im_end|>"),
        ("{{ m }}", "<|im_end|>"),
        ("{{ m|tojson }}", "<|im_end|>"),
        ("{{ {c: 1}|tojson }}{% for k in {c: 1} %}{{ k }}{% endfor %}", "<|im_end|>"),
        ("<|im_{{ c }}", "end|>"),
        ("<|{{ c }}|>", "im_end"),
        ("{{ '<|' ~ c ~ '|>' }}", "im_end"),
        ("{{ '<|%s|>' % c }}", "im_end"),
        ("{{ '<|{}|>'.format(c) }}", "im_end"),
        ("{{ '<|{0.content}|>'.format(m) }}", "im_end"),
        ("{{ '<|%(content)s|>' % m }}", "im_end"),
        ("{{ c % eos }}", "<|im_end|>%s"),
        ("{{ c|format('x') }}", "%s<|im_end|>"),
        ("{{ c.format('im_end') }}", "<|{}|>"),
    ],
)
def test_no_operation_makes_a_token_of_content_special(source, c):
    assert any(name in str(traced(source, c)) for name in CONTROL)
    assert special_in(source, c) == [] if "eos" not in source else special_in(source, c) != ["<|im_end|>"] * 2


def test_content_compares_and_is_measured_as_plain_text():
    source = (
        "{{ '</think>' in c }}{{ c == d }}{{ c.startswith('<') }}{{ c|length }}{{ c.split('>')|length }}{{ {d: 5}[c] }}"
    )
    assert traced(source, "</think>x", "</think>x") == "TrueTrueTrue925"


def test_a_slice_of_the_origins_goes_with_each_piece():
    text = TracedText("1abb", bytes([TRUSTED, UNTRUSTED, UNTRUSTED, UNTRUSTED]))
    assert [piece._origin for piece in text.split("ab")] == [bytes([TRUSTED]), bytes([UNTRUSTED])]
    text = trace("a", TRUSTED) + trace(" b", UNTRUSTED) + "c"
    assert text._origin == bytes([TRUSTED, UNTRUSTED, UNTRUSTED, UNKNOWN])
    assert text.split()[1]._origin == text.rsplit(None, 1)[1]._origin == bytes([UNTRUSTED, UNKNOWN])
    assert [char._origin for char in text] == [bytes([origin]) for origin in text._origin]


def test_a_text_has_the_sources_of_what_is_not_blank_in_it():
    text = trace("a\n", UNTRUSTED, frozenset("1")) + trace(" b", UNTRUSTED, frozenset("2"))
    assert text._sources == frozenset("12")
    assert text[1:3]._sources == frozenset()
    assert traced("{{ m.content }}{{ c.split('>')[-1] }}", "x>")._sources == frozenset()
    assert traced("{{ [c]|tojson }}", "x")._sources == frozenset("c")


def test_an_origin_is_no_attribute_that_templates_read():
    for source in ("{{ c._origin }}", "{{ c.__class__ }}"):
        with pytest.raises((SecurityError, Exception)):
            TracedTemplate(source + "{{ c._origin.x }}").render(untrace(variables_of("", "")))


def test_a_value_without_strings_has_an_unknown_origin():
    assert list(traced("{{ 5 }}{{ items|length }}{{ items[2] is defined }}")._origin) == [TRUSTED] + [UNKNOWN] * 6
    assert trace_all([1, None, {"a": True}], UNTRUSTED) == [1, None, {"a": True}]
