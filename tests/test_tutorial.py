"""docs/tutorial.md, as far as seconds allow; `python -m tests.tutorial` runs all of it."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest
from PIL import Image

from advkd.__main__ import COMMANDS
from advkd.config import override
from advkd.train import configure

from .tutorial import TUTORIAL, blocks

TEXT = TUTORIAL.read_text()
CODE = blocks(TEXT)


def commands() -> list[list[str]]:
    """The advkd commands of all blocks, each as its words."""
    shell = [text.replace("\\\n", " ") for kind, text in CODE if kind == "sh"]
    lines = [line for text in shell for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_blocks_are_found() -> None:
    page = [("sh", "a\nb\n"), ("text", "c\n"), ("", "d\n"), ("python", "e\n")]
    found = blocks("\n".join(f"```{kind}\n{text}```\n" for kind, text in page))
    assert found == [("sh", "a\nb\n"), ("python", "e\n")]
    assert {kind for kind, _ in CODE} == {"sh", "python"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_its_options(words: list[str]) -> None:
    assert words[0] == "advkd" and words[1] in COMMANDS
    importlib.import_module(f"advkd.{words[1]}").parser().parse_args(words[2:])


def test_every_program_compiles() -> None:
    for kind, text in CODE:
        if kind == "python":
            compile(text, str(TUTORIAL), "exec")


def test_settings_that_are_named_in_passing_exist() -> None:
    configuration = configure(
        importlib.import_module("advkd.train").parser().parse_args(["--preset", "smoke"])
    )
    named = re.findall(r"`[^`]*`", TEXT)
    assignments = [a for code in named for a in re.findall(r"--set ([\w.]+=[\w.-]+)", code)]
    assert len(assignments) >= 5
    for assignment in assignments:
        override(configuration, [assignment])
    options = {option for code in named for option in re.findall(r"--[a-z][a-z-]+", code)}
    modules = [importlib.import_module(f"advkd.{name}") for name in COMMANDS]
    parsers = [module.parser() for module in modules if hasattr(module, "parser")]
    known = {option for parser in parsers for option in parser._option_string_actions}
    assert options <= known, options - known


def test_its_pictures_and_links_are_there() -> None:
    for place in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        if "://" not in place:
            assert (TUTORIAL.parent / place).is_file(), place
    for place in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT):
        with Image.open(TUTORIAL.parent / place) as picture:
            assert min(picture.size) > 100
            assert (TUTORIAL.parent / place).stat().st_size < 400_000
