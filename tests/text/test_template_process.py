"""Templates in the child process: the results of the parent's process, limits, and its death."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from tests.text.small import CHATML, byte_level, tokenizer_of
from worker.errors import Internal, InvalidRequest, ModelLoadFailed
from worker.text import template_process
from worker.text.chat import Chat
from worker.text.chat_template import MAX_CHARACTERS, ChatTemplate
from worker.text.template_process import BoundedTemplate, TemplateProcess

NOW = datetime(2026, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
TEMPLATES = sorted((Path(__file__).parent.parent / "data" / "templates").glob("*.jinja"))
USER = [{"role": "user", "content": "Grüße <|im_end|> 世界 🌍"}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, 2.5, null]}'}}
CHATS = [
    Chat(USER),
    Chat([{"role": "system", "content": "Be brief."}, *USER], kwargs={"enable_thinking": False, "n": 2**70}),
    Chat([*USER, {"role": "assistant", "content": "a\n\nb"}, *USER]),
    Chat([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}]),
    Chat(
        [
            *USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "7", "tool_call_id": "abcdefghi", "name": "f"},
        ],
        [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
        "auto",
    ),
]
LOOP = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
HOSTILE = {
    "nested loops": ("{{ messages[0].content }}" + LOOP, "more than 2 s"),
    "a large product": ("{{ 7 ** (10 ** 9) }}", "more than 2 s"),
    "a large text": ("{{ 'a' * 10**10 }}", "more than 256 MB"),
    "a text of the request that is repeated": ("{{ messages[0].content * 10**9 }}", "more than 256 MB"),
    "a text that doubles": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "more than 256 MB",
    ),
    "lists of lists": (
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "more than 256 MB",
    ),
    "a long prompt": ("{{ messages[0].content }}{{ 'ab' * 10**7 }}", f"at most {MAX_CHARACTERS} characters"),
    "indentation": ("{{ messages | tojson(indent=10**9) }}", "more than 256 MB"),
    "centred text": ("{{ 'a' | center(10**10) }}", "more than 256 MB"),
    "a format": ("{{ '%999999999d' % 1 }}", "more than 256 MB"),
    "recursion": ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
    "a nested list that is printed": (
        "{% set n = namespace(x=[]) %}{% for i in range(5000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
        "fails on them",
    ),
    "lone surrogates": (r"{{ messages[0].content }}{{ '\ud800' }}", "lone surrogates"),
    "an unknown filter of the parser": ("{{ 1 | nothing }}", "does not compile"),
    "parentheses": ("{{" + "(" * 50_000 + "1" + ")" * 50_000 + "}}", "no usable chat template"),
    "signs": ("{{" + "-" * 50_000 + "1}}", "no usable chat template"),
    "conditions": ("{% if 1 %}" * 5000 + "{% endif %}" * 5000, "no usable chat template"),
}


def tokenizer_with(source: str):
    return tokenizer_of(byte_level(), **{"tokenizer.chat_template": source})


def bounded(source: str, process: TemplateProcess, **keys) -> BoundedTemplate:
    return BoundedTemplate(process, source, {"bos_token": "<s>"}, ["<s>", "<|im_start|>", "<|im_end|>"], **keys)


def outcome(template, chat: Chat):
    try:
        rendered = template.render(chat, NOW)
    except InvalidRequest as error:
        return error.message, error.details
    return str.__str__(rendered.text), rendered.text._origin, sorted(rendered.requested)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_chat_has_the_text_and_the_origins_of_the_rendering_in_this_process(path, template_process):
    source = path.read_text("utf-8")
    special = ["<s>", "<|im_start|>", "<|im_end|>"]
    own = ChatTemplate(source, {"bos_token": "<s>"}, special)
    outcomes = [outcome(bounded(source, template_process), chat) for chat in CHATS]
    assert outcomes == [outcome(own, chat) for chat in CHATS]
    assert any(USER[0]["content"] in each[0] for each in outcomes)


def test_a_chat_with_tools_is_rendered_with_the_template_for_tools(template_process):
    template = bounded(CHATML, template_process, tool_use="{{ tools[0].function.name }}{{ messages[0].content }}")
    assert str(template.render(Chat(USER, CHATS[-1].tools), NOW).text) == "f" + USER[0]["content"]
    assert str(template.render(Chat(USER), NOW).text).startswith("<|im_start|>user")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error_of_the_job_within_the_limits(name):
    source, reason = HOSTILE[name]
    tokenizer, memory = tokenizer_with(source), psutil.Process().memory_info().rss
    with pytest.raises(InvalidRequest, match="messages") as refused:
        tokenizer.encode_chat(USER, now=NOW)
    assert reason in refused.value.message
    assert psutil.Process().memory_info().rss < memory + (64 << 20)
    assert tokenizer_with(CHATML).encode_chat(USER, now=NOW)  # by the same process, or the next one


def test_a_request_uses_at_most_two_seconds_of_processor_time(template_process):
    template_process.request(request_of(CHATML))
    earlier, begun = psutil.Process(template_process.pid).cpu_times(), psutil.Process().cpu_times()
    assert template_process.request(request_of(LOOP)) == ["time"]
    used = psutil.Process().cpu_times()  # with all that the child has used, since it has ended
    children = used.children_user + used.children_system - begun.children_user - begun.children_system
    assert 1.5 < children - earlier.user - earlier.system < 4


def request_of(source: str) -> dict:
    definition = {"source": source, "variables": {}, "special": [], "tool_use": ""}
    return {"template": source[:99], "definition": definition, "chat": {"messages": USER}, "now": NOW.isoformat()}


def rendering_until(process: TemplateProcess, interrupt):
    """Render a slow template, and interrupt the child as soon as it uses its time on that."""
    process.request(request_of(CHATML))
    killed, finished = [], threading.Event()

    def watch():
        for _ in itertools.count():
            if finished.wait(0.01):
                return
            pid = process.pid
            if pid in (None, *killed):
                continue
            child = psutil.Process(pid)
            if child.status() == psutil.STATUS_RUNNING and child.cpu_times().user > 0.5:
                killed.append(pid)
                interrupt(pid, len(killed))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return process.request(request_of(LOOP)), killed
    finally:
        finished.set()
        watcher.join()


def test_a_process_that_is_killed_while_it_renders_is_replaced_and_the_chat_rendered_again():
    process = TemplateProcess()
    reply, killed = rendering_until(process, lambda pid, n: n == 1 and os.kill(pid, signal.SIGKILL))
    assert reply == ["time"]  # of the second process
    assert len(killed) == 2
    assert process.request(request_of(CHATML))[:2] == ["ok", "rendered"]


def test_a_process_that_is_killed_twice_is_an_error_with_a_code():
    process = TemplateProcess()
    with pytest.raises(Internal, match="killed twice"):
        rendering_until(process, lambda pid, n: os.kill(pid, signal.SIGKILL))
    assert process.request(request_of(CHATML))[:2] == ["ok", "rendered"]


def test_a_process_that_crashes_is_an_error_of_the_job_and_is_replaced():
    process = TemplateProcess()
    reply, killed = rendering_until(process, lambda pid, n: os.kill(pid, signal.SIGSEGV))
    assert (reply, len(killed)) == (["crash", -signal.SIGSEGV], 1)
    assert process.request(request_of(CHATML))[:2] == ["ok", "rendered"]


def test_a_process_that_is_stopped_is_given_up(monkeypatch):
    monkeypatch.setattr(template_process, "_WALL_S", 1.5)
    process = TemplateProcess()
    reply, _ = rendering_until(process, lambda pid, n: os.kill(pid, signal.SIGSTOP))
    assert reply == ["time"]
    monkeypatch.undo()
    assert process.request(request_of(CHATML))[:2] == ["ok", "rendered"]


def test_a_panic_of_a_native_library_is_an_error_of_the_job(monkeypatch):
    panicking = """
import worker.text.template_child as child
class PanicException(BaseException): pass
def render(self, chat, now): raise PanicException("called `Option::unwrap()` on a `None` value")
child.ChatTemplate.render = render
child.serve()
"""
    monkeypatch.setattr(template_process, "_CODE", panicking)
    process = TemplateProcess()
    template = bounded(CHATML, process)
    template.prepare()
    pid = process.pid
    with pytest.raises(InvalidRequest, match=r"messages: .*PanicException: called `Option::unwrap"):
        template.render(Chat(USER), NOW)
    assert process.pid == pid


def test_memory_that_earlier_chats_have_left_is_no_error_of_a_later_one(monkeypatch):
    leaking = """
import worker.text.template_child as child
left, render = [], child.ChatTemplate.render
def leaking(self, chat, now):
    left.append(bytes(100 << 20))
    return render(self, chat, now)
child.ChatTemplate.render = leaking
child.serve()
"""
    monkeypatch.setattr(template_process, "_CODE", leaking)
    process = TemplateProcess()
    template, pids = bounded(CHATML, process), set()
    for _ in range(6):
        assert USER[0]["content"] in template.render(Chat(USER), NOW).text
        pids.add(process.pid)
    assert len(pids) > 1


def test_a_template_that_does_not_compile_is_an_error_of_the_file(template_process):
    for source, reason in [("{% if %}", "does not compile"), ("{{ 'a' * 10**10 }}", "256 MB"), (LOOP, "more than 2 s")]:
        with pytest.raises(ModelLoadFailed, match=reason):
            bounded(source, template_process).prepare()


def test_a_process_that_does_not_start_is_an_error_of_each_chat_and_not_of_the_tokenizer(monkeypatch):
    monkeypatch.setattr(template_process, "_CODE", "raise SystemExit(3)")
    template = bounded(CHATML, TemplateProcess())
    with pytest.raises(OSError, match="helper process does not start"):
        template.render(Chat(USER), NOW)


def test_the_process_is_in_a_session_of_its_own_and_ends_with_the_last_user():
    process = TemplateProcess()
    process.request(request_of(CHATML))
    child = psutil.Process(process.pid)
    assert os.getsid(child.pid) == child.pid  # Ctrl-C in a terminal does not reach it
    del process
    assert not child.is_running()


def test_the_process_ends_when_its_parent_is_killed():
    code = (
        "from worker.text.template_process import *; import time; p = TemplateProcess(); p.start();"
        f"p.request({request_of(CHATML)!r}); print(p.pid, flush=True); time.sleep(60)"
    )
    path = os.pathsep.join(sys.path)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env={"PYTHONPATH": path}) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs([child], timeout=30)
    assert not alive
