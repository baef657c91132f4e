"""`python -m tests.tutorial`: every command of docs/tutorial.md as it stands there, in order.

    python -m tests.tutorial [--folder FOLDER] [--pictures docs]

Works in a temporary folder, or in an empty one that is named; a stub stands in for the hub.
`--pictures` makes the tutorial's pictures anew from this run. Exit status 1 where a command fails
or leaves out what the text says it makes. It takes some minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .stub_hub import StubHub

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
MADE = (  # by the commands, as the text says
    *("runs/faces/report/report.html", "runs/faces/student/README.md", "runs/faces/preview.png"),
    *("faces.png", "faces.html", "more.png", "face.png", "hub.png"),
)


class Block(NamedTuple):
    """A piece of code: its kind (sh or python), and its text."""

    kind: str
    text: str


def blocks(text: str) -> list[Block]:
    """The code of a Markdown page that is there to be run."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(kind, code) for kind, code in found if kind in ("sh", "python")]


def environment(hub: str, folder: Path) -> dict[str, str]:
    """This interpreter's commands first, and a hub that is not the world's."""
    scripts = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]), "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / ".cache"), "HF_TOKEN": "hf_stub", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0",
    }  # fmt: skip


def run(folder: Path, pages: Path) -> None:
    """Run all blocks in `folder`, and keep previews of the trainings in `pages`."""
    with StubHub() as hub, contextlib.ExitStack() as later:
        surroundings = environment(hub.address, folder)
        for number, block in enumerate(blocks(TUTORIAL.read_text()), 1):
            shell = ["bash", "-euo", "pipefail", "-c", block.text]
            command = shell if block.kind == "sh" else [sys.executable, "-c", block.text]
            print(f"\n== {number}: {block.text.strip().splitlines()[0]}", flush=True)
            began = time.monotonic()
            if block.text.startswith("advkd watch"):  # which goes on until it is stopped
                later.enter_context(served(command, folder, surroundings))
            else:
                with previews(folder / "runs" / "faces" / "preview.png", pages):
                    subprocess.run(command, cwd=folder, env=surroundings, check=True)
            print(f"== {time.monotonic() - began:.0f} s", flush=True)
    missing = [name for name in MADE if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"no command has made {', '.join(missing)}")


@contextlib.contextmanager
def served(command: list[str], folder: Path, surroundings: dict[str, str]) -> Iterator[None]:
    """A command that goes on, once it answers at the address that it prints."""
    with subprocess.Popen(
        command, cwd=folder, env=surroundings, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            address = re.search(r"http://\S+", process.stdout.readline())
            assert address is not None
            with urllib.request.urlopen(address[0], timeout=60) as answer:
                assert b"The network as it is now" in answer.read()
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)


@contextlib.contextmanager
def previews(file: Path, pages: Path) -> Iterator[None]:
    """Copies every preview that appears meanwhile to `pages`, by the time it was made."""
    ended = threading.Event()

    def copy() -> None:
        seen = 0
        while not ended.wait(0.2):
            with contextlib.suppress(OSError):
                state = file.stat().st_mtime_ns
                if state != seen:
                    seen = state
                    shutil.copy(file, pages / f"{state}.png")

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def make_pictures(folder: Path, pages: Path, out: Path) -> None:
    """Write the tutorial's pictures: of the folder, the previews, the samples and the page."""
    photos = [Image.open(file) for file in sorted((folder / "photos").iterdir())[:20]]
    rows = [
        np.hstack([np.asarray(photo.resize((64, 64))) for photo in photos[i::2]]) for i in (0, 1)
    ]
    Image.fromarray(np.vstack(rows)).save(out / "tutorial-photos.png", optimize=True)
    shown = [Image.open(file).convert("RGB") for file in sorted(pages.iterdir())]
    width = min(picture.width for picture in shown)  # a student's are wider, by its heads
    teacher = [picture for picture in shown if picture.width == width]
    student = [picture for picture in shown if picture.width > width]
    _beside([teacher[0], teacher[len(teacher) // 3], teacher[-1]], out / "tutorial-teacher.png")
    _beside([student[0], student[-1]], out / "tutorial-student.png")
    shutil.copy(folder / "runs" / "faces" / "report" / "grid.png", out / "tutorial-grid.png")
    _photograph(folder / "faces.html", out / "tutorial-page.png")


def _photograph(page: Path, file: Path) -> None:
    """The page as Chromium shows it, once it has made its images."""
    from selenium import webdriver  # which running the commands does without
    from selenium.webdriver.support.wait import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_argument("--window-size=900,1000")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as browser:
        browser.get(page.as_uri())
        save = browser.find_element("id", "try-save")
        WebDriverWait(browser, 60).until(lambda browser: save.is_enabled())
        browser.save_screenshot(str(file))


def _beside(pictures: list[Image.Image], file: Path) -> None:
    """Pictures of one height in a row, as a PNG."""
    Image.fromarray(np.hstack([np.asarray(picture) for picture in pictures])).save(
        file, optimize=True
    )


def main() -> int:
    """Entry point; returns the exit status."""
    p = argparse.ArgumentParser(prog="python -m tests.tutorial", description=__doc__)
    p.add_argument("--folder", type=Path, help="an empty folder to work in, which stays")
    p.add_argument("--pictures", type=Path, metavar="FOLDER", help="make the pictures anew there")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, pages = args.folder or Path(name) / "work", Path(name) / "pages"
        for place in (folder, pages):
            place.mkdir(parents=True, exist_ok=True)
        try:
            run(folder.resolve(), pages)
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"failed: {error}", file=sys.stderr)
            return 1
        if args.pictures:
            make_pictures(folder.resolve(), pages, args.pictures.resolve())
    print("\nevery command of the tutorial ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
