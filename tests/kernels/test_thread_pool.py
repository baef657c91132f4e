"""The extension's thread pool by itself: every task once, errors, nesting, several callers, fork.

`python tests/native/thread_sanitizer.py` looks for races in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "native"))
import native

pytestmark = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


def run_tasks(tasks: int, threads: int, function: object) -> None:
    native.module().run_tasks(tasks, threads, function)


@pytest.mark.parametrize(("tasks", "threads"), [(0, 4), (1, 4), (3, 8), (1000, 1), (1000, 5)])
def test_every_task_runs_once(tasks: int, threads: int) -> None:
    done: list[int] = []
    run_tasks(tasks, threads, done.append)
    assert sorted(done) == list(range(tasks))


def test_tasks_run_side_by_side() -> None:
    # Each of the two tasks waits for the other, so one thread alone would never end.
    barrier = threading.Barrier(2, timeout=60)
    run_tasks(2, 2, lambda task: barrier.wait())


def test_an_exception_reaches_the_caller_and_the_pool_goes_on() -> None:
    def fail(task: int) -> None:
        if task == 17:
            raise KeyError("task 17")

    for _ in range(3):
        with pytest.raises(KeyError, match="task 17"):
            run_tasks(100, 4, fail)
    counts: Counter[int] = Counter()
    run_tasks(100, 4, lambda task: counts.update([task]))
    assert len(counts) == 100


def test_nested_calls_finish() -> None:
    done: list[tuple[int, int]] = []
    run_tasks(6, 3, lambda i: run_tasks(5, 3, lambda j: done.append((i, j))))
    assert len(set(done)) == len(done) == 30


def test_several_callers_at_once() -> None:
    totals: Counter[int] = Counter()
    callers = [
        threading.Thread(
            target=lambda: [run_tasks(50, 3, lambda task: totals.update([task])) for _ in range(5)]
        )
        for _ in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert sum(totals.values()) == 4 * 5 * 50


FORKING = """
import os, sys
sys.path.insert(0, sys.argv[1])
from native_tests import run_tasks as run
run(64, 4, lambda task: None)
child = os.fork()
done = []
run(64, 4, done.append)
if child == 0:
    os._exit(0 if len(done) == 64 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or len(done) != 64)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_gets_a_pool_of_its_own() -> None:
    folder = str(Path(str(native.module().__file__)).parent)
    subprocess.run([sys.executable, "-c", FORKING, folder], check=True, timeout=120)
