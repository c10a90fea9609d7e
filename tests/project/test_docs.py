"""What the pages say can be typed: make targets, commands and options, Python examples, links."""

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from blindsum import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "proto").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


def code(page: Path) -> str:
    """Everything on a page that stands in back quotes or a shell block."""
    text = page.read_text()
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text))
    return "\n".join([*inline, *blocks(page, "sh")])


def test_there_are_pages() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/threat-model.md"} <= {name(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|\s)make((?: [A-Z]+=\S+)*) ([a-z-]+)", code(page), re.MULTILINE)
    assert {target for _, target in named} - targets == set()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_examples_import_what_exists(page: Path) -> None:
    for example in blocks(page, "python"):
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def command_lines(page: Path) -> list[list[str]]:
    lines = code(page).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
        if words and words[0].rpartition("/")[2] == "blindsum" and len(words) > 1:
            found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in command_lines(page):
        if words[0].startswith("-"):
            continue
        assert words[0] in cli.commands(), words
        command: Any = typer.main.get_command(cli.build(words[0]))
        rest = list(words)
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in command.commands, f"blindsum {' '.join(words)}"
            command = command.commands[rest.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        given = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert given - options == set(), f"blindsum {' '.join(words)}"
