"""Readable output of an answer's channels, on a terminal and in a pipe."""

import pytest

from worker.cli.console import Terminal
from worker.errors import InvalidRequest
from worker.jobs.events import End, Token

ANSWER = (
    Token(0, 9, ""),
    Token(1, 9, "h", channel="reasoning"),
    Token(2, 9, "", channel="final"),
    Token(3, 9, "m", channel="reasoning"),
    Token(4, 9, "yes"),
    Token(5, 9, "", channel="tool", recipient="functions.f", call=0),
    Token(6, 9, "{}", channel="tool", recipient="functions.f", call=0),
    Token(7, 9, '{"a": 1}', channel="tool", recipient="functions.g", call=1),
)


def shown(tokens, capsys):
    terminal = Terminal()
    for token in tokens:
        terminal.token(token)
    terminal.ended(End(finish_reason="stop", tokens_out=1, prompt_tokens=1, ttft_ms=1, decode_ms=0))
    return capsys.readouterr()


def test_in_a_pipe_the_answer_and_its_calls_are_on_stdout_and_reasoning_on_stderr(capsys):
    out, err = shown(ANSWER, capsys)
    assert out == 'yes\nfunctions.f {}\nfunctions.g {"a": 1}\n'
    assert err.startswith("hm\n[stop: ")


def test_on_a_terminal_reasoning_is_dimmed(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    out, err = shown(ANSWER, capsys)
    assert out == '\x1b[2mh\x1b[0m\x1b[2mm\x1b[0m\nyes\nfunctions.f {}\nfunctions.g {"a": 1}\n'
    assert err.startswith("[stop: ")


@pytest.mark.parametrize(("tokens", "out", "err"), [([], "\n", "[stop"), (ANSWER[1:4], "\n", "hm\n[stop")])
def test_an_answer_without_final_text_is_an_empty_line(tokens, out, err, capsys):
    captured = shown(tokens, capsys)
    assert captured.out == out
    assert captured.err.startswith(err)


def test_the_name_of_a_tool_cannot_control_the_terminal(capsys):
    out, _ = shown([Token(0, 9, "{}", channel="tool", recipient="functions.\x1b[2J", call=0)], capsys)
    assert out == "functions.\\x1b[2J {}\n"


def test_the_message_of_an_error_cannot_control_the_terminal(capsys):
    """A chat template writes what it likes into the error that ends a job."""
    Terminal().failed(InvalidRequest("no \x1b[2J\u202e\ud800"))
    assert capsys.readouterr().err == "worker: INVALID_REQUEST: no \\x1b[2J\\u202e\\ud800\n"
