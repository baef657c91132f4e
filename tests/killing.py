"""Processes that end themselves at a chosen moment, so that no test depends on who is faster.

A moment is (event, pattern, n): the n-th time (from 1) that a file whose name matches the pattern
is about to be opened ("open"), renamed to ("os.rename") or removed ("os.remove"). These are all the
steps by which a folder changes, so a process that dies at each has died at any moment.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence

Moment = tuple[str, str, int]

# Forks a child for each moment: that saves importing torch every time.
_RUNNER = """
import fnmatch, json, os, signal, sys
from pathlib import Path

imports, work, arguments, moments, number = json.loads(sys.argv[1])

def end(event, args):
    if number == signal.SIGKILL and event == "open" and "w" in (args[1] or ""):
        Path(args[0]).write_bytes(b"half")  # as if killed within the write
    os.kill(os.getpid(), number)

def watch(moment):
    name, pattern, left = moment
    inside = False
    def hook(event, args):
        nonlocal left, inside
        if event != name or inside or not isinstance(args[event == "os.rename"], (str, Path)):
            return
        if fnmatch.fnmatch(os.path.basename(args[event == "os.rename"]), pattern):
            left -= 1
            if left == 0:
                inside = True
                end(event, args)
    sys.addaudithook(hook)

space = {"arguments": arguments}
exec(imports, space)
codes = []
for index, moment in enumerate(moments):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        space["index"] = index
        watch(moment)
        try:
            exec(work, space)
            sys.stdout.flush()
            os._exit(space.get("code", 0))
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(99)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


def ended_at(
    moments: Sequence[Moment],
    imports: str,
    work: str,
    arguments: Sequence[str] = (),
    number: signal.Signals = signal.SIGKILL,
) -> tuple[list[int], str]:
    """Run `work` once for each moment, each time until a signal that it sends itself then.

    `work` finds what `imports` imported, `arguments`, and the moment's `index`; it may set `code`.
    Returns the exit codes (-9 of one that was killed, 99 of one that raised) and what was printed
    to stderr.
    """
    task = json.dumps([imports, work, list(arguments), list(moments), int(number)])
    done = subprocess.run([sys.executable, "-c", _RUNNER, task], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes: list[int] = json.loads(done.stdout.splitlines()[-1])
    return codes, done.stderr
