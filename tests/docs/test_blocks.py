"""The Python of every page runs as it stands, top to bottom, in an empty folder; the commands are ones that there are."""

import contextlib
import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch

from bootgrad import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Fenced blocks of a language: the line where each begins, and its text without the fence's indent."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        indent, name, block = match.groups()
        if name == language:
            line = text.count("\n", 0, match.start()) + 1
            found.append((line, "".join(s.removeprefix(indent) for s in block.splitlines(keepends=True))))
    return found


def run(page: Path) -> dict:
    """What the Python blocks of a page define, one after the other."""
    torch.manual_seed(0)
    names: dict = {"__name__": "__main__"}
    for line, block in blocks(page, "python"):
        code = compile("\n" * line + block, str(page), "exec")  # tracebacks show the page's own lines
        exec(code, names)  # noqa: S102 — our own pages
    return names


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES if blocks(page, "python")],
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)  # as torchrun would
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        run(page)


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_the_commands_of_a_page_exist(page):
    text = "".join(block for language in ("", "sh", "console") for _, block in blocks(page, language))
    for line in re.findall(r"^(?:\$ )?(bootgrad .*)$", text, re.MULTILINE):
        words = shlex.split(line.partition("  #")[0])
        assert callable(cli._parser().parse_args(words[1:]).run), line
