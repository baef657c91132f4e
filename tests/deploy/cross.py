"""The C library for other processors: built by zig, run, and compared with the package.

    python tests/deploy/cross.py wasm [--write]
    python tests/deploy/cross.py aarch64
    python tests/deploy/cross.py macos
    python tests/deploy/cross.py windows

`wasm` builds the module that pages embed, holds its size and its images to their bounds, and checks
that advkd/deploy/web/advkd.wasm computes the same; --write replaces that file. It runs in node.
`aarch64` runs advkd-generate in qemu-aarch64, and counts the instructions of the loops in which
convolutions spend their time. What is missing to run is said, and leaves only the build.
`macos` (ARM) and `windows` (x86-64) only compile, since nothing here runs their programs.

Takes CMake, `pip install ziglang==0.15.1`, and as above nodejs, qemu-user and
binutils-aarch64-linux-gnu. ADVKD_ZIG is another command of zig, as "python3;-m;ziglang".
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from advkd import runtime
from advkd.deploy.model_file import model_bytes
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import generate
from advkd.models.student import Student
from advkd.pretrained import load_student

sys.path.insert(0, str(Path(__file__).resolve().parent))
import library

HERE = Path(__file__).resolve().parent
COMMITTED = library.ROOT / "advkd" / "deploy" / "web" / "advkd.wasm"
ZIG_VERSION = "0.15.1"
MOST_BYTES = 150_000  # of the module
TOLERANCE = 5e-5
LAST_SEED = (1 << 64) - 1


class Request(NamedTuple):
    """Images of a head; 0 is the last."""

    seed: int
    first: int = 0
    images: int = 1
    exit_at: int = 0


# Few and many images are computed by different algorithms.
REQUESTS = (
    Request(0),
    Request(7, 100, 3),
    Request(LAST_SEED, 0, 17),
    Request(5, 0, 2, 1),
    Request(5, (1 << 40) + 3, 9, 2),
)
Shaped = Sequence[tuple[Request, tuple[int, ...]]]  # with the images' shapes
Run = Callable[[Path, Shaped], list[np.ndarray]]


def zig() -> str:
    """The command of zig as CMake takes it; refuses another version, whose code would differ."""
    command = os.environ.get("ADVKD_ZIG", f"{sys.executable};-m;ziglang")
    try:
        version = library.run(*command.split(";"), "version").strip()
    except (OSError, RuntimeError):
        version = "none"
    if version != ZIG_VERSION:
        raise SystemExit(f"zig is {version}, not {ZIG_VERSION}: pip install ziglang=={ZIG_VERSION}")
    return command


def built(folder: Path, target: str) -> Path:
    """The folder in which CMake has built for a target of zig."""
    return library.build(
        folder,
        f"-DCMAKE_TOOLCHAIN_FILE={library.CSRC / 'cmake' / 'zig.cmake'}",
        f"-DADVKD_TARGET={target}",
        f"-DADVKD_ZIG={zig()}",
    )


# What is compared.


def noise_file(size: int, channels: int) -> bytes:
    """A model whose image is an eighth of its x_T: 1 x 1 weights that are the identity."""
    weights = torch.eye(channels).reshape(channels, channels, 1, 1)
    op = convolution(size, channels) | {"factor": 0.125, "weights": {"packed": "identity"}}
    ends = [[0, size * size, channels]] * 2
    return file_of({"identity": weights}, size, channels, 0, ends, [op])


def label_file(size: int, classes: int) -> bytes:
    """A model whose pixels are all its label, as a part of the classes: a bias without weights."""
    table = torch.arange(classes).reshape(classes, 1) / classes
    embed = {
        "kind": "embed",
        "numbers": {"y": 2, "y_channel": 0, "channels": 1},
        "factor": 1.0,
        "weights": {"table": "table"},
    }
    op = convolution(size, 1) | {"factor": 1.0, "weights": {"packed": "zero"}}
    op["numbers"] |= {"bias_buffer": 2, "bias_buffer_channel": 0}
    buffers = [[0, size * size, 1], [0, size * size, 1], [0, 1, 1]]
    tensors = {"table": table, "zero": torch.zeros(1, 1, 1, 1)}
    return file_of(tensors, size, 1, classes, buffers, [embed, op])


def convolution(size: int, channels: int) -> dict[str, Any]:
    """A 1 x 1 convolution from the input to the output, without weights and factor."""
    sides = {"height": size, "width": size, "in_channels": channels, "out_channels": channels}
    slices = {"x": 0, "x_channel": 0, "y": 1, "y_channel": 0}
    rest = {"kernel": 1, "stride": 1, "pad_before": 0, "pad_after": 0, "upsample": 0, "silu": 0}
    return {"kind": "convolution", "numbers": slices | sides | rest}


def file_of(
    tensors: dict[str, torch.Tensor],
    size: int,
    channels: int,
    classes: int,
    buffers: list[list[int]],
    ops: list[dict[str, Any]],
) -> bytes:
    """A model file of one head (docs/file-format.md)."""
    head = {"size": size, "arena": 16, "buffers": buffers, "ops": ops}
    plan = {"size": size, "channels": channels, "classes": classes, "heads": [head]}
    return save(tensors, {"advkd": "1", "plan": json.dumps(plan)})


def check_noise(run: Run, folder: Path) -> None:
    """x_T and labels have the package's bits."""
    size, channels, classes = 19, 3, 1000
    requests = [Request(0), Request(LAST_SEED, (1 << 33) + 7, 5), Request(12345, 0, 20)]
    path = folder / "noise.advkd"
    path.write_bytes(noise_file(size, channels))
    shaped = [(r, (r.images, size, size, channels)) for r in requests]
    for request, found in zip(requests, run(path, shaped), strict=True):
        indices = torch.arange(request.first, request.first + request.images)
        noise = Noise(request.seed, Purpose.SAMPLING)
        x_T = noise.x_T(indices, (channels, size, size)).permute(0, 2, 3, 1).numpy()
        require(np.array_equal(found * 8, x_T), f"x_T differs: {request}")
    path.write_bytes(label_file(4, classes))
    shaped = [(r, (r.images, 4, 4, 1)) for r in requests]
    for request, found in zip(requests, run(path, shaped), strict=True):
        indices = torch.arange(request.first, request.first + request.images)
        labels = Noise(request.seed, Purpose.SAMPLING).labels(indices, classes)
        assert labels is not None
        expected = np.broadcast_to((labels / classes).numpy()[:, None, None, None], found.shape)
        require(np.array_equal(found, expected), f"labels differ: {request}")
    print("x_T and labels have the package's bits")


def students() -> Iterator[tuple[str, Student]]:
    """The students that ship, and small ones of every kind."""
    for name in ("zoo:fashion-mnist-student", "zoo:avatars-student"):
        yield name, load_student(name)
    yield "without labels", library.student("small", channels=2)
    yield "attention, blocks", library.student("attention", 3)
    yield "pyramid", library.student("pyramid", 4, channels=3)


def check_images(run: Run, folder: Path) -> None:
    """Images agree with the package's."""
    for name, student in students():
        path = folder / "student.advkd"
        path.write_bytes(model_bytes(student))
        expected = [images_of(student, request) for request in REQUESTS]
        found = run(path, [(r, e.shape) for r, e in zip(REQUESTS, expected, strict=True)])
        worst = max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))
        print(f"{name}: within {worst:.1e} of the package's images")
        require(worst <= TOLERANCE, f"{name} differs by {worst}")


def check_rounded(run: Run, folder: Path) -> None:
    """A file of int8 gives this machine's images, but where a number lies between two levels."""
    student = load_student("zoo:fashion-mnist-student")
    content, path = model_bytes(student, "int8"), folder / "int8.advkd"
    path.write_bytes(content)
    request = Request(3, 0, 20)
    exact = images_of(student, request)
    expected = runtime.load(content).generate(20, seed=3, dtype="float32", threads=1)
    (found,) = run(path, [(request, exact.shape)])
    error, effect = np.abs(found - expected).mean(), np.abs(exact - expected).mean()
    print(f"int8: {error:.1e} from this machine's images, which are {effect:.1e} from float32's")
    require(error < effect / 2, "images of int8 differ")


def images_of(student: Student, request: Request) -> np.ndarray:
    depth = request.exit_at or len(student.heads)
    images = generate(student, request.images, request.seed, first=request.first, exit_at=depth)
    return images.permute(0, 2, 3, 1).numpy()


def require(holds: bool, complaint: str) -> None:
    if not holds:
        raise SystemExit(complaint)


# WebAssembly.


def in_node(module: Path) -> Run:
    """Runs a module."""

    def run(path: Path, requests: Shaped) -> list[np.ndarray]:
        out = path.with_suffix(".raw")
        texts = [",".join(map(str, request)) for request, _ in requests]
        program = str(HERE / "wasm_images.mjs")
        library.run("node", program, str(module), str(path), str(out), *texts)
        numbers = np.fromfile(out, np.float32)
        sizes = np.cumsum([int(np.prod(shape)) for _, shape in requests])
        require(len(numbers) == sizes[-1], "the images are not as many as were asked for")
        parts = np.split(numbers, sizes[:-1])
        return [part.reshape(s) for part, (_, s) in zip(parts, requests, strict=True)]

    return run


def check_wasm(folder: Path, write: bool) -> None:
    fresh = built(folder / "wasm", "wasm32-wasi") / "advkd.wasm"
    size = fresh.stat().st_size
    print(f"advkd.wasm: {size:,} bytes")
    require(size <= MOST_BYTES, f"advkd.wasm has {size} bytes, more than {MOST_BYTES}")
    if shutil.which("node") is None:
        print("node is not installed, so the module does not run here")
    else:
        check_noise(in_node(fresh), folder)
        check_images(in_node(fresh), folder)
        check_rounded(in_node(fresh), folder)
    if write:
        shutil.copyfile(fresh, COMMITTED)
        print(f"{COMMITTED} is written")
    elif fresh.read_bytes() == COMMITTED.read_bytes():
        print("the committed module is the same bytes")
    elif shutil.which("node") is not None:
        check_same(fresh, folder)
        print("the committed module has other bytes, and the same images to the bit")


def check_same(fresh: Path, folder: Path) -> None:
    """The committed module makes the fresh one's images."""
    for name, student in students():
        path = folder / "student.advkd"
        path.write_bytes(model_bytes(student))
        shaped = [(r, images_of(student, r).shape) for r in REQUESTS]
        try:
            pairs = zip(
                *(in_node(module)(path, shaped) for module in (fresh, COMMITTED)), strict=True
            )
        except RuntimeError as error:
            raise SystemExit(
                f"the committed module fails: run this with --write\n{error}"
            ) from None
        require(
            all(np.array_equal(a, b) for a, b in pairs),
            f"the committed module makes other images of {name}: run this with --write",
        )


# ARM.

OBJDUMPS = ("aarch64-linux-gnu-objdump", "llvm-objdump")
# What a loop is made of, by the instruction and its operands.
KINDS = {
    "fmla by element": r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[\d\]",
    "fmla vector": r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.4s",
    "sdot": r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.16b",
    "128-bit loads": r"(ldr|ldur)\s+q|ld1\s+\{v\d+\.4s\}",
    "pairs of them": r"ldp\s+q",
    "scalar loads": r"(ldr|ldur|ldp)\s+s|ld1r",
    "scalar fmadd": r"f(n?madd|n?msub|mul|add)\s+s",
    "spilt vectors": r"(ldr|ldp|str|stp|ldur|stur)\s+q.*\[sp",
}
# Name -> what the functions are called by.
HOT = {
    "product, 5 rows": r"::multiply_tile<5, 1,",
    "product, 4 rows": r"::multiply_tile<4, 1,",
    "product, 1 row": r"::multiply_tile<1, 1,",
    "int8 product": r"::make_tile<6, 1>\(",
    "attention, 4 x 3": r"::make_tile<4, 3, float,.*StoreScores",
    "Winograd 4: input": r"InputTiles<4>::transform(_tile<4, 4>)?\(",
    "Winograd 4: weights": r"WinogradConvolution<4>::transform\(",
    "Winograd 4: output": r"WinogradConvolution<4>::(write_tile<4, 4>|write|multiply)\(",
}


def functions(objdump: str, archive: Path) -> dict[str, list[tuple[int, str]]]:
    """Function -> (address, instruction) of each instruction of an archive."""
    flags = ("--disassemble", "--demangle", "--no-show-raw-insn")
    found: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in library.run(objdump, *flags, str(archive)).splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = found.setdefault(head[1], [])
        elif instruction := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
            current.append((int(instruction[1], 16), instruction[2]))
    return found


def hot_loop(code: list[tuple[int, str]]) -> list[str]:
    """The shortest loop with half of the arithmetic; all of the function where it has no loop."""
    loops = []
    for address, text in code:
        branch = re.match(r"(?:b|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+([0-9a-f]+)\b", text)
        if branch and int(branch[1], 16) <= address:
            begin = int(branch[1], 16)
            loops.append([t for a, t in code if begin <= a <= address])
    loops = loops or [[text for _, text in code]]
    most = max(map(arithmetic, loops))
    return min((loop for loop in loops if 2 * arithmetic(loop) >= most), key=len)


def arithmetic(code: list[str]) -> int:
    """Instructions that compute with vectors or floats."""
    computing = r"(f(mla|mls|mul|add|sub|n?madd|n?msub)|sdot)\b"
    return sum(bool(re.match(computing, text)) for text in code)


def check_instructions(archive: Path) -> None:
    """Prints what the hot loops are made of; refuses one that is not vectors all through."""
    objdump = next(filter(None, map(shutil.which, OBJDUMPS)), None)
    if objdump is None:
        print(f"none of {', '.join(OBJDUMPS)} is installed, so no instructions are counted")
        return
    known = functions(objdump, archive)
    print(f"{'instructions of':20}  {'all':>4}", *KINDS, sep="  ")
    for name, pattern in HOT.items():
        named = [code for function, code in known.items() if re.search(pattern, function)]
        require(bool(named), f"{name}: no function is called {pattern}")
        loop = max(map(hot_loop, named), key=arithmetic)
        mix = Counter(k for t in loop for k, shape in KINDS.items() if re.match(shape, t))
        print(f"{name:20}  {len(loop):4}", *(f"{mix[k]:{len(k)}}" for k in KINDS), sep="  ")
        if "product" in name:
            products = mix["fmla by element"] + mix["fmla vector"] + mix["sdot"]
            require(products > 0, f"{name}: its loop has no products of vectors")
            require(mix["scalar fmadd"] == 0, f"{name}: its loop computes with scalars")
            require(mix["spilt vectors"] == 0, f"{name}: its loop has too few registers")


def in_qemu(*command: str) -> Run:
    """Runs advkd-generate of another processor."""

    def run(path: Path, requests: Shaped) -> list[np.ndarray]:
        images = []
        for request, shape in requests:
            options = ["--seed", str(request.seed), "--first", str(request.first)]
            if request.exit_at:
                options += ["--exit-at", str(request.exit_at)]
            images.append(library.generated([*command], path, shape, *options))
        return images

    return run


def check_aarch64(folder: Path) -> None:
    made = built(folder / "aarch64", "aarch64-linux-musl")
    check_instructions(made / "libadvkd.a")
    if shutil.which("qemu-aarch64") is None:
        print("qemu-aarch64 is not installed, so nothing runs here")
        return
    run = in_qemu("qemu-aarch64", str(made / "advkd-generate"))
    check_noise(run, folder)
    check_images(run, folder)
    check_rounded(run, folder)
    # A processor without dot products of bytes.
    check_rounded(
        in_qemu("qemu-aarch64", "-cpu", "cortex-a53", str(made / "advkd-generate")), folder
    )


def check_compiled(folder: Path, target: str, made: Sequence[str]) -> None:
    """Compile for a system whose programs do not run here."""
    at = built(folder, target)
    for name in made:
        path = at / name
        require(path.is_file(), f"{path} has not been made")
        print(f"{target}: {name}, {path.stat().st_size:,} bytes: compiled, not run")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=("wasm", "aarch64", "macos", "windows"))
    parser.add_argument("--write", action="store_true", help="replace the module that is committed")
    arguments = parser.parse_args()
    if library.cmake() is None:
        raise SystemExit("CMake is not installed: pip install cmake ninja")
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.target == "wasm":
            check_wasm(Path(temporary), arguments.write)
        elif arguments.target == "aarch64":
            check_aarch64(Path(temporary))
        elif arguments.target == "macos":
            made = ("libadvkd.dylib", "libadvkd.a", "advkd-generate")
            check_compiled(Path(temporary), "aarch64-macos", made)
        else:
            made = ("libadvkd.dll", "libadvkd.a", "advkd-generate.exe")
            check_compiled(Path(temporary), "x86_64-windows-gnu", made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
