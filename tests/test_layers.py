"""The house's layers: a file imports only from layers below its own, wherever the import stands."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top down. Places of one layer may not import each other; a package's own files may.
LAYERS: dict[int, tuple[str, ...]] = {
    10: ("train", "watch", "sample", "evaluate", "export", "convert", "info", "__main__"),
    9: ("api", "run", "sample_network", "diffusers_pipeline"),
    8: ("report", "cli"),
    7: ("evaluation", "deploy"),
    6: ("training",),
    5: ("data",),
    4: ("engine", "publish"),
    3: ("pretrained", "card"),
    2: ("models", "pickles", "hub"),
    1: ("ops", "diffusion", "config", "files", "console", "device", "parallel"),
    0: ("kernels", "runtime", "_C", "processes", "errors", "names"),
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
EXEMPT = ("__init__",)  # re-exports the API lazily


def sources() -> dict[str, str]:
    """Module name below advkd -> source."""
    package = ROOT / "advkd"
    found = {
        ".".join(path.relative_to(package).with_suffix("").parts): path.read_text()
        for path in package.rglob("*.py")
    }
    elsewhere = {"kernels": ROOT / "kernels", "runtime": ROOT / "csrc" / "advkd_runtime"}
    for name, folder in elsewhere.items():
        found |= {f"{name}.{path.stem}": path.read_text() for path in folder.rglob("*.py")}
    return {name: text for name, text in found.items() if name not in EXEMPT}


def place(name: str) -> str | None:
    """The entry of LAYERS that a dotted name below advkd lies in."""
    parts = name.split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((candidate for candidate in candidates if candidate in LAYER_OF), None)


def imported(module: str, source: str) -> set[str]:
    """Dotted names below advkd that a file imports, at the top or inside of functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["advkd", *module.split(".")][: -node.level] if node.level else []
            base = [*package, *([node.module] if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return {name.removeprefix("advkd.") for name in found if name.startswith("advkd.")}


def violations(module: str, source: str) -> list[str]:
    """Imports of a file that do not go down."""
    here = place(module)
    assert here is not None, f"{module} has no layer: give it one in LAYERS"
    found = []
    for name in sorted(imported(module, source)):
        there = place(name)
        if there is None:
            found.append(f"{module} imports {name}, which has no layer")
        elif there != here and LAYER_OF[there] >= LAYER_OF[here]:
            found.append(f"{module} ({LAYER_OF[here]}) imports {name} ({LAYER_OF[there]})")
    return found


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_go_down(module: str) -> None:
    assert violations(module, sources()[module]) == []


def file_of(name: str, files: set[str]) -> str | None:
    """The file that a dotted name below advkd means: a module, or a package's own file."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        for candidate in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if candidate in files:
                return candidate
    return None


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Files that import each other in a circle; empty where there is none."""
    state: dict[str, str] = {}

    def visit(file: str, path: list[str]) -> list[str]:
        if state.get(file) == "open":
            return [*path[path.index(file) :], file]
        if state.get(file) == "done":
            return []
        state[file] = "open"
        for other in sorted(imports[file]):
            found = visit(other, [*path, file])
            if found:
                return found
        state[file] = "done"
        return []

    return next((found for file in sorted(imports) if (found := visit(file, []))), [])


def test_no_files_import_each_other_in_a_circle() -> None:
    files = sources()
    # A package's own file only hands on what is below it.
    own = {module for module in files if module.endswith("__init__")}
    imports = {
        module: {file_of(name, set(files)) for name in imported(module, source)} - own - {module}
        for module, source in files.items()
        if module not in own
    }
    found = {m: {other for other in others if other} for m, others in imports.items()}
    assert circle(found) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_a_layer_for_every_file_and_a_file_for_most_entries() -> None:
    places = {place(module) for module in sources()}
    assert None not in places
    assert len(places) > 15


def test_the_packages_own_file_imports_only_the_api() -> None:
    text = (ROOT / "advkd" / "__init__.py").read_text()
    assert {place(name) for name in imported("__init__", text)} <= {"api"}


@pytest.mark.parametrize("name", ["kernels", "runtime"])
def test_kernels_and_runtime_stand_on_nothing(name: str) -> None:
    for module, source in sources().items():
        if module.startswith(f"{name}."):
            assert {place(there) for there in imported(module, source)} <= {name}


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("ops", "import advkd.config", 1),
        ("ops", "from advkd import config, kernels", 1),
        ("ops", "from advkd.kernels.group_norm_silu import f", 0),
        ("ops", "import numpy\nfrom torch import nn", 0),
        ("ops", "from advkd.models import layers", 1),
        ("ops", "from advkd.models.layers import Attention", 1),
        ("ops", "def f():\n    from advkd import sampling", 1),
        ("ops", "def f():\n    import advkd.engine.sampling as s, advkd.train", 2),
        ("diffusion", "from advkd.config import Config", 1),
        ("models.unet", "from .layers import Attention", 0),
        ("models.unet", "from ..sampling import sample", 1),
        ("models.unet", "from .. import train", 1),
        ("models.unet", "if TYPE_CHECKING:\n    from advkd.engine.cpu import Engine", 1),
        ("data", "from advkd import something_new", 1),
        ("kernels.group_norm_silu", "from advkd.kernels.common import f", 0),
        ("kernels.group_norm_silu", "from advkd import ops", 1),
    ],
)
def test_the_check_itself(module: str, source: str, count: int) -> None:
    assert len(violations(module, source)) == count
