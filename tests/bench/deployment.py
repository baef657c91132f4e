"""What a student costs where it is deployed, for each way to run it:

    python -m tests.bench.deployment                    # the Fashion-MNIST student that ships
    python -m tests.bench.deployment --student FOLDER --skip-browser

Prints a table of: the model's file, the runtime that it needs, the time from the start of a process
(or from opening a page) to the first image, the peak memory of that process, and the milliseconds
of an image, one at a time and 16 at a time, on one thread. Ways that are not installed are named
and left out: ONNX Runtime (pip install onnxruntime), the browser (chromium, chromedriver, pip
install selenium), and ONNX Runtime Web (npm), which is fetched into a temporary folder.

`--int8` prints instead what products of int8 save, by each instruction set that runs here; the two
files take turns in one process, on one thread, by CPU time.

`--sizes` prints the sizes alone and fails where one has grown by more than 10% over those of
`deployment_sizes.json`; `--sizes --write` replaces these.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from advkd.ops import extension

from .report import markdown

ROOT = Path(__file__).resolve().parents[2]
SIZES = Path(__file__).with_name("deployment_sizes.json")
GROWTH = 1.1  # of a size, at most
STARTS = 5  # of a process, whose median is taken
MANY, FEW = 512, 16  # images of the two runs that an image's time is the difference of
BATCHES = (1, 16)
SECONDS = 1.0  # of timing, at least


class Row(NamedTuple):
    """One way to run a student: sizes and memory in bytes, times in seconds; None: unknown."""

    name: str
    file: int
    runtime: int
    cold: float | None
    memory: int | None
    one: float | None
    many: float | None


# A contender is a program of Python that prints JSON: {"one": seconds, "many": seconds} of an
# image. With --cold it ends after the first image.
PROGRAM = """
import json, sys, time
{setup}
run(1)
if "--cold" not in sys.argv:
    found = {{}}
    for name, batch in (("one", 1), ("many", 16)):
        run(batch)
        laps, began = [], time.perf_counter()
        while time.perf_counter() - began < {seconds}:
            start = time.process_time()
            run(batch)
            laps.append((time.process_time() - start) / batch)
        found[name] = sorted(laps)[len(laps) // 2]
    print(json.dumps(found))
"""
RUNTIME = """
from advkd import runtime
student = runtime.load({model!r})
run = lambda n: student.generate(num=n, seed=0, threads=1)
"""
INT8 = """
import json, statistics, sys, time
from advkd import runtime
students = [runtime.load(path) for path in sys.argv[1:]]
found = []
for batch in (1, 16):
    laps = [[] for _ in students]
    for _ in range(30):
        for student, of_student in zip(students, laps):
            student.generate(batch, threads=1)  # brings its weights into the caches
            start = time.process_time()
            for _ in range(64 // batch):
                student.generate(batch, threads=1)
            of_student.append((time.process_time() - start) / 64)
    found.append(list(map(statistics.median, laps)))
print(json.dumps(found))
"""
TORCH = """
import torch
torch.set_num_threads(1)
from advkd.engine.noise import Noise, Purpose
from advkd.ops import use_backend
from advkd.pretrained import load_student
student, noise = load_student({student!r}), Noise(0, Purpose.SAMPLING)
def run(n):
    with torch.inference_mode(), use_backend("reference"):
        numbers = torch.arange(n)
        x = noise.x_T(numbers, (student.channels, student.size, student.size))
        return student(x, noise.labels(numbers, student.num_classes))
"""
ONNX = """
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession({onnx!r}, options, providers=["CPUExecutionProvider"])
def run(n):
    feeds = {{}}
    for given in session.get_inputs():
        shape = [n, *given.shape[1:]]
        labels = given.type != "tensor(float)"
        feeds[given.name] = (numpy.zeros(shape, numpy.int64) if labels
                             else numpy.random.standard_normal(shape).astype(numpy.float32))
    return session.run(None, feeds)
"""


def main(argv: list[str] | None = None) -> int:
    """Print the table or the sizes; return the exit status."""
    p = argparse.ArgumentParser(description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--student", default="zoo:fashion-mnist-student")
    p.add_argument("--skip-browser", action="store_true")
    p.add_argument("--int8", action="store_true")
    p.add_argument("--sizes", action="store_true")
    p.add_argument("--write", action="store_true")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="advkd-deployment-") as name:
        folder = Path(name)
        if args.sizes:
            return check_sizes(sizes(folder), args.write)
        if args.int8:
            print(by_instruction_set(args.student, folder))
            return 0
        rows = list(contenders(args.student, folder, args.skip_browser))
    print(markdown(["", "file", "runtime", "first image", "memory", "ms, 1", "ms, 16"],
                   [words(row) for row in rows]))  # fmt: skip
    return 0


def words(row: Row) -> list[str]:
    """A row of the table."""

    def shown(value: float | None, unit: float, digits: int, suffix: str) -> str:
        return "" if value is None else f"{value * unit:.{digits}f}{suffix}"

    return [
        row.name,
        shown(row.file, 1e-6, 2, " MB"),
        shown(row.runtime, 1e-6, 2, " MB"),
        shown(row.cold, 1e3, 0, " ms"),
        shown(row.memory, 1e-6, 0, " MB"),
        shown(row.one, 1e3, 3, ""),
        shown(row.many, 1e3, 3, ""),
    ]


def contenders(student: str, folder: Path, skip_browser: bool) -> Iterator[Row]:
    """Measure every way that can be run here."""
    model, onnx, page = (folder / f"student.{kind}" for kind in ("advkd", "onnx", "html"))
    export(student, model)
    build = built(folder / "build")
    library = (build / "libadvkd.so").resolve()
    stripped(library)
    int8 = folder / "student-int8.advkd"
    export(student, int8, "--dtype", "int8")
    for dtype, file in (("", model), (", int8", int8)):
        name = f"C library (advkd-generate){dtype}"
        yield native(name, build / "advkd-generate", file, library)
        own = RUNTIME.format(model=str(file))
        yield by_python(f"advkd.runtime{dtype}", own, file, library.stat().st_size)
    if importlib.util.find_spec("onnxruntime") is None:
        print("ONNX Runtime is not installed", file=sys.stderr)
    else:
        export(student, onnx)
        program = ONNX.format(onnx=str(onnx))
        yield by_python("ONNX Runtime", program, onnx, package_size("onnxruntime"))
    files = sum(f.stat().st_size for f in model_folder(student).glob("*.safetensors"))
    program = TORCH.format(student=student)
    yield by_python("torch", program, files, package_size("torch"))
    if skip_browser:
        return
    try:
        import selenium  # noqa: F401
    except ImportError:
        print("selenium is not installed: no browser", file=sys.stderr)
        return
    export(student, page)
    yield from in_browser(folder, model, onnx if onnx.exists() else None)


def by_instruction_set(student: str, folder: Path) -> str:
    """Milliseconds of an image by products of float32 and of int8, one at a time and 16."""
    files = [folder / "float32.advkd", folder / "int8.advkd"]
    export(student, files[0])
    export(student, files[1], "--dtype", "int8")
    rows = []
    for isa in extension.isas() if extension else ():
        command = [sys.executable, "-c", INT8, *map(str, files)]
        printed = subprocess.check_output(command, env=one_thread() | {"ADVKD_ISA": isa})
        cells = [
            cell
            for plain, rounded in json.loads(printed)
            for cell in (f"{plain * 1e3:.2f}", f"{rounded * 1e3:.2f}", f"{rounded / plain:.2f}")
        ]
        rows.append([isa, *cells])
    columns = ["float32, ms, 1", "int8", "of float32", "float32, ms, 16", "int8", "of float32"]
    return markdown(["one thread", *columns], rows)


def export(student: str, path: Path, *options: str) -> None:
    """`advkd export` to the format that the file's name ends in."""
    subprocess.run(
        [sys.executable, "-m", "advkd.export", "--student", student, "--format", path.suffix[1:],
         "--out", str(path), *options],
        check=True, capture_output=True,
    )  # fmt: skip


def built(folder: Path, *options: str) -> Path:
    """csrc, built by CMake."""
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    run(["cmake", "-S", str(ROOT / "csrc"), "-B", str(folder), *options])
    run(["cmake", "--build", str(folder), "--parallel", "2"])
    return folder


def stripped(path: Path) -> int:
    """Take the symbols from a library; its bytes afterwards."""
    subprocess.run(["strip", str(path)], check=True)
    return path.stat().st_size


def started(command: list[str]) -> tuple[float, int, str]:
    """Median seconds of a process, its peak memory in bytes, and what it printed."""
    seconds, printed = [], ""
    for _ in range(STARTS):
        before = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread())
        seconds.append(time.perf_counter() - before)
        printed = done.stdout
    return statistics.median(seconds), peak_memory(command), printed


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def peak_memory(command: list[str]) -> int:
    """Peak resident bytes of a process, by one that has no other children."""
    program = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        check=True, capture_output=True, text=True, env=one_thread(),
    )  # fmt: skip
    return int(done.stdout) * 1024


def native(name: str, program: Path, model: Path, library: Path) -> Row:
    """advkd-generate; the time of an image is the difference of two runs."""
    out = model.with_name("images.bin")

    def cpu_seconds(num: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        command = [str(program), str(model), "--num", str(num), "--raw", str(out)]
        subprocess.run(command, check=True)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    many = statistics.median(
        (cpu_seconds(MANY + FEW) - cpu_seconds(FEW)) / MANY for _ in range(STARTS)
    )
    png = str(model.with_name("image.png"))
    cold, _, _ = started([str(program), str(model), "--num", "1", "--out", png])
    memory = own_peak_memory(program.parent, model)
    size = library.stat().st_size
    return Row(name, model.stat().st_size, size, cold, memory, None, many)


def own_peak_memory(build: Path, model: Path) -> int:
    """Peak resident bytes of a C program that generates one image.

    It reads its own: what the system counts for a child begins with the parent's.
    """
    measured = build / "measured"
    source = ROOT / "tests" / "deploy" / "measured.c"
    subprocess.run(
        ["cc", "-O1", f"-I{ROOT / 'csrc' / 'include'}", str(source), str(build / "libadvkd.a"),
         "-lstdc++", "-lm", "-o", str(measured)],
        check=True,
    )  # fmt: skip
    done = subprocess.run([str(measured), str(model)], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[0]) * 1024


def by_python(name: str, setup: str, file: Path | int, runtime: int) -> Row:
    """A program of Python."""
    program = PROGRAM.format(setup=setup, seconds=SECONDS)
    cold, memory, _ = started([sys.executable, "-c", program, "--cold"])
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True, capture_output=True, text=True, env=one_thread(),
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    size = file if isinstance(file, int) else file.stat().st_size
    return Row(name, size, runtime, cold, memory, found["one"], found["many"])


def package_size(name: str) -> int:
    """Bytes of an installed package."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None
    return sum(f.stat().st_size for f in Path(found.origin).parent.rglob("*") if f.is_file())


def model_folder(student: str) -> Path:
    from advkd.pretrained import resolve

    return resolve(student)


# Both pages define `run(n)`, which generates n images, and set `ready`.
OURS = """<script type="module">
import { open } from "./advkd.js";
const bytes = async (name) => new Uint8Array(await (await fetch(name)).arrayBuffer());
const student = await open(await bytes("advkd.wasm"), await bytes("student.advkd"));
window.run = async (n) => student.generate({ seed: 0n, first: 0, count: n });
await window.run(1);
window.ready = performance.now();
</script>"""
THEIRS = """<script src="ort.wasm.min.js"></script><script>
(async () => {
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create("student.onnx");
  const shape = SHAPE;
  window.run = (n) => {
    const noise = new Float32Array(n * shape[0] * shape[1] * shape[2]).map(() => Math.random());
    const feeds = { x_T: new ort.Tensor("float32", noise, [n, ...shape]) };
    if (session.inputNames.includes("y")) {
      feeds.y = new ort.Tensor("int64", new BigInt64Array(n), [n]);
    }
    return session.run(feeds);
  };
  await window.run(1);
  window.ready = performance.now();
})();
</script>"""
TIMING = """
const [batch, seconds, done] = arguments;
(async () => {
  const laps = [];
  await window.run(batch);
  const began = performance.now();
  while (performance.now() - began < 1000 * seconds) {
    const start = performance.now();
    await window.run(batch);
    laps.push((performance.now() - start) / batch / 1000);
  }
  done(laps.sort((a, b) => a - b)[laps.length >> 1]);
})();
"""


def in_browser(folder: Path, model: Path, onnx: Path | None) -> Iterator[Row]:
    """Our library, and ONNX Runtime's where npm has it, in headless Chromium."""
    web = ROOT / "advkd" / "deploy" / "web"
    for name in ("advkd.js", "advkd.wasm"):
        shutil.copy(web / name, folder)
    (folder / "ours.html").write_text(OURS)
    size = sum((folder / name).stat().st_size for name in ("advkd.js", "advkd.wasm"))
    with served(folder) as address:
        yield page_row("WebAssembly, in Chromium", f"{address}/ours.html", model, size)
        if onnx is None or shutil.which("npm") is None:
            print("no ONNX Runtime Web: it needs onnxruntime and npm", file=sys.stderr)
            return
        subprocess.run(
            ["npm", "install", "--silent", "--prefix", str(folder / "npm"), "onnxruntime-web"],
            check=True, capture_output=True,
        )  # fmt: skip
        names = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
        for name in names:
            shutil.copy(folder / "npm/node_modules/onnxruntime-web/dist" / name, folder)
        (folder / "theirs.html").write_text(THEIRS.replace("SHAPE", json.dumps(shape_of(onnx))))
        size = sum((folder / name).stat().st_size for name in names)
        yield page_row("ONNX Runtime Web, in Chromium", f"{address}/theirs.html", onnx, size)


def shape_of(onnx: Path) -> list[int]:
    """(C, S, S) of the input of an exported student."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    return list(session.get_inputs()[0].shape[1:])


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """A web server for a folder on the loopback interface; its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def page_row(name: str, address: str, file: Path, runtime: int) -> Row:
    """A page in headless Chromium; the first image is counted from opening the page."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for option in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"):
        options.add_argument(option)
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        colds = []
        for _ in range(STARTS):
            driver.get("about:blank")
            driver.get(address)
            ready = WebDriverWait(driver, 60).until(
                lambda found: found.execute_script("return window.ready")
            )
            colds.append(ready / 1e3)
        driver.set_script_timeout(60)
        one, many = (driver.execute_async_script(TIMING, batch, SECONDS) for batch in BATCHES)
    finally:
        driver.quit()
    return Row(name, file.stat().st_size, runtime, statistics.median(colds), None, one, many)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of what is deployed, by name."""
    found = {}
    for isas in ("avx2", "portable;avx2;avx512"):
        build = built(folder / isas.replace(";", "-"), f"-DADVKD_ISAS={isas}", "-DADVKD_TOOLS=OFF")
        found[f"C library, {isas.replace(';', ', ')}"] = stripped((build / "libadvkd.so").resolve())
    found["WebAssembly"] = (ROOT / "advkd/deploy/web/advkd.wasm").stat().st_size
    for kind, *options in (("advkd",), ("html",), ("advkd", "--dtype", "int8")):
        path = folder / f"student.{kind}"
        export("zoo:fashion-mnist-student", path, *options)
        name = ", ".join(["Fashion-MNIST student", kind, *options[1:]])
        found[name] = path.stat().st_size
    return found


def check_sizes(found: dict[str, int], write: bool) -> int:
    """Print sizes beside the known ones; 1 where one has grown too much."""
    known: dict[str, int] = json.loads(SIZES.read_text()) if SIZES.exists() else {}
    grown = [name for name, size in found.items() if size > GROWTH * known.get(name, size)]
    for name, size in found.items():
        change = f"{size / known[name] - 1:+.1%}" if name in known else "new"
        print(f"{name:<36}{size:>10,} bytes  {change}")
    if write:
        SIZES.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    for name in grown:
        print(f"{name} has grown by more than {GROWTH - 1:.0%}", file=sys.stderr)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
