"""The page that generates in a browser: one HTML file that holds the model and the C library.

The library comes as WebAssembly (`web/advkd.wasm`) and runs in a Web Worker. `page` makes a file of
its own, `section` the same as a part of another page, such as a run's report. Both load nothing: a
Content-Security-Policy forbids every request, and lets only the scripts run that are written here.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import shlex
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

WEB = Path(__file__).parent / "web"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # of a page without scripts
WORDS = (
    "Each of these images is made here, in your browser, by a single pass through a small neural "
    "network. The page works offline and sends nothing anywhere."
)


class Section(NamedTuple):
    """A part of a page: its HTML, its style, and the Content-Security-Policy that it needs."""

    html: Markup
    style: Markup
    policy: str


def page(model_file: bytes, title: str, student: str = "STUDENT") -> str:
    """The whole page of a model file (`advkd.deploy.model_file`) under a title.

    student: what `advkd sample --student` is given in the command that the page shows.
    """
    part = section(model_file, student)
    template = environment(WEB).get_template("page.html.j2")
    return template.render(
        title=title,
        words=WORDS,
        section=part.html,
        style=base_style() + part.style,
        policy=part.policy,
    )


def section(model_file: bytes, student: str = "STUDENT") -> Section:
    """The controls and the grid of a model file, for a page that has `base_style`.

    A page holds it once at most, since its parts have ids.
    """
    template, script = environment(WEB).get_template("try.html.j2"), source("try.js")
    html = template.render(
        command=f"advkd sample --student {shlex.quote(student)}",
        library=packed((WEB / "advkd.wasm").read_bytes()),
        model=packed(model_file),
        worker=worker_script(),
        script=script,
    )
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{own}' 'wasm-unsafe-eval'; worker-src blob:"
    return Section(Markup(html), source("try.css"), policy)


def worker_script() -> Markup:
    """The worker's script and the wrapper of the library in one.

    A module cannot be imported from a page that is a file, so the wrapper's `export` is taken away.
    """
    return source("worker.js") + source("advkd.js").replace("\nexport ", "\n")


def packed(content: bytes) -> str:
    """Bytes as text in a page: base64 of gzip, which is shorter and has a checksum."""
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def base_style() -> Markup:
    """The style sheet that every page of this package begins with: colours, type and spacing."""
    return source("base.css")


def source(name: str) -> Markup:
    """A file of `web/`, which goes into a page as it is."""
    return Markup((WEB / name).read_text(encoding="utf-8"))


def environment(folder: Path) -> jinja2.Environment:
    """The templates of a folder, with every value escaped that is no Markup."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
