"""What compare.py reads of callgrind, and what it calls slower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .compare import COMMITTED, WORKLOADS, Count, State, compared, main, parsed, state_of

CALLGRIND = """\
# callgrind format
events: Ir Dr Dw I1mr D1mr D1mw ILmr DLmr DLmw
summary: 1000 400 200 3 20 10 2 5

fn=(1) main
16 400 0 0
cfn=(2) kernel<int>
calls=3 0
16 550 40

fn=(2)
0x20 500 1
+1 45
* 5
calls=1 0
18 50

fn=(3) rare
2 5
"""


def test_what_is_read_of_callgrind() -> None:
    assert parsed(CALLGRIND) == Count(1000, 33, 7, {"kernel<int>": 550, "main": 400})


def _state(compiler: str = "g++ 12", **instructions: int) -> State:
    return State(
        compiler,
        {name: Count(count, 0, 0, {"f": count}) for name, count in instructions.items()},
    )


@pytest.mark.parametrize(
    ("old", "new", "status", "said"),
    [
        (_state(a=1000), _state(a=1050), 0, "nothing executes over 5% more"),
        (_state(a=1000), _state(a=500), 0, "-50.00%"),
        (_state(a=1000, b=10), _state(a=1051, b=10), 1, "more instructions: a by 5.1%"),
        (_state(a=1000), _state("g++ 14", a=2000), 0, "the compilers differ, so it fails nothing"),
        (_state(a=1000), _state(a=1000, b=7), 0, "new"),
        (_state(a=1000), _state(a=1100), 1, "+100  f"),
    ],
)
def test_what_is_called_slower(
    old: State, new: State, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(old, new) == status
    assert said in capsys.readouterr().out


def test_the_committed_counts_are_of_all_workloads(tmp_path: Path) -> None:
    state = state_of(str(COMMITTED), tmp_path, {})
    assert state.compiler and list(state.counts) == list(WORKLOADS)
    assert all(count.instructions > 1e6 and count.functions for count in state.counts.values())
    assert set(json.loads(COMMITTED.read_text())) == {"compiler", "counts"}


def test_without_valgrind_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main([str(COMMITTED), "."]) == 0
    assert "valgrind is not installed" in capsys.readouterr().err
