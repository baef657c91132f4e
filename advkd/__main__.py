"""`advkd COMMAND …` and `python -m advkd COMMAND …`: the same as `python -m advkd.COMMAND …`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": "the main job: teacher, trajectories, student, evaluation, report",
    "watch": "a run in the browser while it trains",
    "sample": "sample images from a student or a teacher",
    "evaluate": "evaluate networks, or fit features to evaluate by",
    "export": "write a student as ONNX or a torch.export program",
    "convert": "write a teacher in an old or foreign form as a folder of safetensors",
    "info": "versions, instruction set and which backend serves each op",
}


def main() -> int:
    """Run the command named by the first argument; 2 for one that does not exist."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("", "-h", "--help"):
        print("usage: advkd COMMAND [OPTIONS]\n\ncommands:")
        for name, meaning in COMMANDS.items():
            print(f"  {name:<10} {meaning}")
        print("\n`advkd COMMAND --help` lists the options of one.")
        return 0 if command else 2
    if command not in COMMANDS:
        print(f"advkd: there is no command {command!r}; see advkd --help", file=sys.stderr)
        return 2
    sys.argv = [f"advkd {command}", *sys.argv[2:]]
    return int(importlib.import_module(f"advkd.{command}").main())


if __name__ == "__main__":
    sys.exit(main())
