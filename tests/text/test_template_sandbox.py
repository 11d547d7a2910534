"""Chat templates reach neither Python's objects nor files: known ways out of Jinja2 are refused."""

from __future__ import annotations

import pytest

from tests.text.test_chat import chat_with, rejection

UNSAFE = "is unsafe"
WAYS_OUT = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": UNSAFE,
    "{{ messages.__class__.__base__ }}": UNSAFE,
    "{{ raise_exception.__globals__['sys'] }}": UNSAFE,
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}": UNSAFE,
    "{{ self.__init__.__globals__ }}": UNSAFE,
    "{{ messages.append(1) }}": UNSAFE,
    "{{ messages[0].update({'role': 'system'}) }}": UNSAFE,
    "{% include '/etc/passwd' %}": "no loader",
    "{% import '/etc/passwd' as x %}": "no loader",
    "{% extends '/etc/passwd' %}": "no loader",
    "{{ __import__('os') }}": "'__import__' is undefined",
    "{{ open('/etc/passwd') }}": "'open' is undefined",
    "{{ get_flashed_messages() }}": "is undefined",
}
"""A template, and a part of the refusal."""
EMPTY = [
    "{{ messages[0].content.__class__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ namespace.__init__ }}",
    "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('{0.__cla' ~ 'ss__}').format(messages) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ [''] | map(attribute='__class__') | list | first | string | upper }}",
]
"""Templates that print an object which they may not read; Jinja2 prints nothing for it."""


@pytest.mark.parametrize("template", WAYS_OUT)
def test_a_way_out_of_the_sandbox_is_refused(template):
    assert WAYS_OUT[template] in rejection("{{ messages[0].content }}" + template)


@pytest.mark.parametrize("template", EMPTY)
def test_an_object_that_a_template_may_not_read_is_printed_as_nothing(template):
    assert chat_with(template + "{{ messages[0].content }}") == "Hi"


def test_the_texts_of_a_request_are_never_rendered_as_a_template():
    content = "{{ 7 * 7 }}{% include 'x' %}{# comment #}"
    assert chat_with("{{ messages[0].content }}", content) == content
