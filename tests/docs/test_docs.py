"""The documentation against the repository: links, commands, make targets and examples."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command

from worker.cli import command_line

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md" and page.parent.name != "notes"]
"""Pages that describe the current code; the changelog and the notes also name removed parts."""


def names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


def code_of(page):
    """Return the lines of a page's code blocks, without trailing comments, and its code spans."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line.split("  ")[0].strip() for block in blocks for line in block.splitlines()] + spans


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_link_to_a_file_resolves(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    files = [target for target in targets if "://" not in target]
    assert [target for target in files if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", CURRENT, ids=names(CURRENT))
def test_every_command_exists(page):
    commands = get_command(command_line()).commands
    shown = [re.match(r"(?:worker|python -m worker) ([a-z-]+)", code) for code in code_of(page)]
    assert {match[1] for match in shown if match} - set(commands) == set()


@pytest.mark.parametrize("page", CURRENT, ids=names(CURRENT))
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    shown = [re.match(r"make ([a-z-]+)", code) for code in code_of(page)]
    assert {match[1] for match in shown if match} - targets == set()


@pytest.mark.parametrize("page", CURRENT, ids=names(CURRENT))
def test_every_python_example_compiles(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        ast.parse(block)


@pytest.mark.parametrize("page", CURRENT, ids=names(CURRENT))
def test_every_file_that_is_named_exists(page):
    folders = "benchmarks|configs|deploy|docs|tests|worker"
    named = re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text("utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []
