"""`python -m tests.processes`: whole runs by several processes, in some minutes.

One process, 2 and 4; two launchers as two machines; and runs whose processes are killed at random
moments and go on with other numbers of processes until they are done. All leave the same bits.
Exit status 1 where one does not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from .launching import STAGES, ended, launched, left_by, prepared


def two_machines(command: list[str]) -> None:
    """The run by two launchers of this machine, which meet by a port as those of two would."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [
        ["--nnodes=2", f"--node-rank={n}", "--master-addr=localhost", f"--master-port={port}"]
        for n in range(2)
    ]
    launchers = [launched(1, command, node) for node in nodes]
    for launcher in launchers:
        code, said = ended(launcher)
        assert code == 0, said


def killed_at_random(command: list[str], rng: random.Random) -> int:
    """The run, one of its processes killed after a random time, until it ends; how many were."""
    kills = 0
    while True:
        launcher = launched(rng.choice((2, 3)), command)
        until = time.monotonic() + rng.uniform(6, 40)
        while launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        if launcher.poll() is None:
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
            if workers := children.split():
                os.kill(int(rng.choice(workers)), signal.SIGKILL)
                kills += 1
        code, said = ended(launcher)
        if code == 0:
            return kills
        print(f"    {said[-1] if len(said[-1]) < 200 else 'killed, says torchrun'}", flush=True)


def main() -> int:
    """Carry out the matrix and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3, metavar="N", help="runs with kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    rng, failed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        options, expected = prepared(Path(folder)), None

        def compared(name: str, words: str) -> None:
            nonlocal expected, failed
            found = left_by(Path(folder) / "runs" / name)
            found = {k: v for k, v in found.items() if not k.startswith("features")}
            expected = expected or found
            differing = sorted(k for k in expected | found if expected.get(k) != found.get(k))
            failed += bool(differing)
            print(f"{words}: {', '.join(differing) or 'the same bits'}", flush=True)

        for count in (0, 2, 4):
            name = f"by-{count}"
            whole = ["-m", "advkd.train", *options, "--name", name, "--set", "run.shares=8"]
            code, said = ended(launched(count, whole))
            assert code == 0, said
            compared(name, f"{count or 1} processes, all stages")
        two_machines([str(STAGES), *options, "--name", "nodes"])
        compared("nodes", "2 launchers of 1 process each")
        for n in range(args.kills):
            kills = killed_at_random([str(STAGES), *options, "--name", f"kill-{n}"], rng)
            compared(f"kill-{n}", f"2 or 3 processes, {kills} killed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
