"""`advkd COMMAND`: every command starts, and passes on its arguments and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from advkd.__main__ import COMMANDS, main
from advkd.cli import guarded


def run(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "advkd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)


# All in one process, since importing torch takes longest.
HELP = """
import contextlib, io, json, sys
from advkd.__main__ import COMMANDS, main

found = {}
for name in COMMANDS:
    sys.argv = ["advkd", name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            main()
        except SystemExit as end:
            found[name] = (end.code, said.getvalue())
print(json.dumps(found))
"""


def test_every_command_has_help(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    helps = json.loads(done.stdout)
    assert list(helps) == list(COMMANDS)
    for name, (code, said) in helps.items():
        assert code == 0 and said.startswith(f"usage: advkd {name} ")
    assert "--exit-at" in helps["sample"][1] and "--teacher" in helps["sample"][1]


def test_arguments_and_status_are_passed_on(tmp_path: Path) -> None:
    failed = run("sample", "--student", "absent", folder=tmp_path)
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr == "advkd: there is no folder absent\n"


def test_help_and_unknown_commands_do_without_torch() -> None:
    code = "import sys, advkd.__main__ as m; s = m.main(); print(s, 'torch' in sys.modules)"
    helped = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, timeout=300
    )
    assert helped.stdout.endswith("0 False\n"), helped.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in helped.stdout


@pytest.mark.parametrize("arguments", [[], ["distill"]])
def test_no_such_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["advkd", *arguments])
    assert main() == 2
    said = capsys.readouterr()
    if arguments:
        assert said.err == "advkd: there is no command 'distill'; see advkd --help\n"
    else:
        assert said.out.startswith("usage: advkd COMMAND")


def test_an_error_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes may write to one stderr, and their lines are to stay whole."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append))

    def fail() -> None:
        raise ValueError("it cannot be")

    assert guarded(fail) == 1
    assert written == ["advkd: it cannot be\n"]
