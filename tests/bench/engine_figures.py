"""What the engine makes of a processor, beside torch's product of matrices on the same core.

OMP_NUM_THREADS=1 python -m tests.bench.engine_figures PART …

prints tables, by CPU time of one thread: `passes`, `overhead` and `student`, which are the default,
or `isas`, each instruction set's kernels. `threads`, by wall time of one and two threads, wants a
machine that does nothing else and no OMP_NUM_THREADS. Figures are medians of samples taken in turn,
those of single kinds of operations the least of some samples.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import torch

from advkd.diffusion import ddim_table
from advkd.engine.cache import compile
from advkd.engine.cpu import CpuEngine, kind_of, lower
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import generate
from advkd.ops import extension
from advkd.pretrained import load_student

from .bench_sampling_loop import PASSES, Shape, example, teacher_of
from .report import markdown

SECONDS = 6.0  # of the samples of one comparison
SAMPLE_SECONDS = 0.02
MATRIX = 1024
STEPS = 50
BUSY = "while True: pass"
REPEATS = 10  # of each operation, whose least time counts
ISAS = ("avx512", "avx2")

Run = Callable[[], object]


def medians(runs: dict[str, Run], clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of a call of each; samples of a few calls are taken in turn."""

    def seconds(run: Run, calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    calls = {name: 1 for name in runs}
    for name, run in runs.items():
        run()  # may make an engine first
        calls[name] = max(1, round(SAMPLE_SECONDS / max(seconds(run, 1) for _ in range(2))))
    whole = sum(calls[name] * seconds(run, 1) for name, run in runs.items())
    rounds = min(100, max(5, round(SECONDS / whole)))
    gc.disable()
    samples = [
        {name: seconds(run, calls[name]) for name, run in runs.items()} for _ in range(rounds)
    ]
    gc.enable()
    return {name: statistics.median(s[name] for s in samples) for name in runs}


def sgemm() -> tuple[Run, float]:
    """A product of matrices, and its GFLOP."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    return lambda: a @ b, 2e-9 * MATRIX**3


def gflop_of(engine: CpuEngine) -> float:
    return 1e-9 * sum(op.flops for op in engine.plan.ops)


def engine_of(shape: Shape) -> tuple[CpuEngine, torch.Tensor]:
    x_t = example(shape)
    height, width = x_t.shape[2:]
    return lower(teacher_of(shape.teacher), (height, width), batch=shape.batch), x_t


def loop_of(engine: CpuEngine, shape: Shape, threads: int = 0) -> Run:
    table = ddim_table(teacher_of(shape.teacher).schedule, STEPS)
    indices = torch.arange(shape.batch)
    noise = Noise(0, Purpose.TRAINING)
    return lambda: engine.sample(table, noise, indices, saved=[STEPS], threads=threads)


def plan_alone(engine: CpuEngine, x: torch.Tensor, t: int | None, y: torch.Tensor | None) -> Run:
    """A pass without all that Python does around it."""
    dense = x.permute(0, 2, 3, 1).contiguous()
    out = torch.empty(len(x), *engine.shape)
    conditioning = engine.conditioning([] if t is None else [t])

    def run() -> None:
        engine.compiled.run(
            x=dense.data_ptr(), y=out.data_ptr(), conditioning=conditioning.data_ptr(),
            labels=0 if y is None else y.data_ptr(), images=len(dense), threads=1, nan_fill=False,
        )  # fmt: skip

    return run


def passes() -> str:
    """How fast a network pass is."""
    rows = []
    for shape in PASSES:
        engine, x_t = engine_of(shape)
        product, gflop = sgemm()
        found = medians(
            {"pass": lambda: engine.run(x_t, t=500), "sgemm": product},  # noqa: B023
            time.process_time,
        )
        rate, core = shape.batch * gflop_of(engine) / found["pass"], gflop / found["sgemm"]
        rows.append([shape.name, f"{rate:.0f}", f"{core:.0f}", f"{rate / core:.2f}"])
    return markdown(["network pass", "GFLOP/s", "sgemm", "of sgemm"], rows)


def overhead() -> str:
    """Of a loop, beside as many network passes at one time."""
    rows = []
    for batch in (1, 16):
        shape = Shape("teacher", batch)
        engine, x_t = engine_of(shape)
        alone = plan_alone(engine, x_t, 500, None)

        def steps(alone: Run = alone) -> None:
            for _ in range(STEPS):
                alone()

        found = medians({"loop": loop_of(engine, shape, 1), "passes": steps}, time.process_time)
        loop, inner = found["loop"], found["passes"]
        rows.append(
            [shape.name, f"{loop * 1e3:.1f}", f"{inner * 1e3:.1f}", f"{loop / inner - 1:.1%}"]
        )
    return markdown([f"DDIM, {STEPS} steps", "loop, ms", "passes, ms", "more"], rows)


def student() -> str:
    """What calls for one image of the student take, beside the plan's pass that each contains."""
    model = load_student("zoo:fashion-mnist-student")
    engine = compile(model)
    assert isinstance(engine, CpuEngine)
    noise, number = Noise(0, Purpose.SAMPLING), torch.arange(1)
    x_T, y = noise.x_T(number, engine.shape), noise.labels(number, engine.classes)
    product, gflop = sgemm()
    found = medians(
        {
            "the plan alone": plan_alone(engine, x_T, None, y),
            "`engine.run`": lambda: engine.run(x_T, y),
            "`generate(engine, 1, 0)`": lambda: generate(engine, 1, 0),
            "`generate(student, 1, 0)`": lambda: generate(model, 1, 0),
            "sgemm": product,
        },
        time.process_time,
    )
    least = gflop_of(engine) / gflop * found.pop("sgemm")
    alone = found["the plan alone"]
    rows = [
        [name, f"{s * 1e3:.3f}", f"{s / alone:.2f}", f"{s / least:.2f}"]
        for name, s in found.items()
    ]
    flops = f"of the {least * 1e3:.2f} ms its FLOPs take"
    return markdown(["the student, one image", "ms", "of the plan", flops], rows)


def scaling() -> str:
    """Wall time at one and two threads, and at two beside a process that keeps a core busy."""
    rows = []
    for shape in PASSES:
        engine, x_t = engine_of(shape)
        runs: dict[str, Run] = {
            str(threads): lambda threads=threads: engine.run(x_t, t=500, threads=threads)  # type: ignore[misc]  # noqa: B023
            for threads in (1, 2)
        }
        quiet = medians(runs, time.perf_counter)
        with subprocess.Popen([sys.executable, "-c", BUSY]) as neighbour:
            busy = medians(runs, time.perf_counter)
            neighbour.kill()
        rows.append(
            [
                shape.name,
                *(f"{quiet[n] * 1e3:.1f}" for n in "12"),
                f"{quiet['1'] / quiet['2']:.2f}",
                *(f"{busy[n] * 1e3:.1f}" for n in "12"),
                f"{busy['1'] / busy['2']:.2f}",
            ]
        )
    return markdown(
        ["wall time", "1 thread, ms", "2 threads", "faster", "1, a core busy", "2", "faster"], rows
    )


def operations() -> list[list[str]]:
    """Where passes go by the instruction set in use; rows: the pass, the kind of operation, its ms,
    its share of the pass, its GFLOP/s."""
    product, gflop = sgemm()
    least = min(_seconds(product) for _ in range(REPEATS))
    rows = [["a product of matrices", "all", *_cells(gflop, least, least)]]
    for shape in PASSES:
        engine, _ = engine_of(shape)
        seconds = engine.profile(shape.batch, REPEATS)
        gflops, spent = defaultdict[str, float](float), defaultdict[str, float](float)
        for op, of_op in zip(engine.plan.ops, seconds, strict=True):
            for kind in (kind_of(op), "all"):
                gflops[kind] += 1e-9 * op.flops * shape.batch
                spent[kind] += of_op
        kinds = [*(kind for kind in spent if kind != "all"), "all"]
        rows += [[shape.name, k, *_cells(gflops[k], spent[k], spent["all"])] for k in kinds]
    return rows


def _seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _cells(gflop: float, seconds: float, whole: float) -> list[str]:
    return [f"{seconds * 1e3:.3g}", f"{seconds / whole:.0%}", f"{gflop / seconds:.0f}"]


def side_by_side() -> str:
    """Where passes go by each instruction set that runs here, in a process for each."""
    isas = [isa for isa in ISAS if extension and isa in extension.isas()]
    command = [sys.executable, "-m", "tests.bench.engine_figures", "operations"]
    tables = [
        json.loads(subprocess.check_output(command, env=os.environ | {"ADVKD_ISA": isa}))
        for isa in isas
    ]
    rows = []
    for same in zip(*tables, strict=True):  # a row of each table, of the same pass and kind
        pass_and_kind = same[0][:2]
        rows.append([*pass_and_kind, *(cell for row in same for cell in row[2:])])
    columns = [column for isa in isas for column in (f"{isa}, ms", "", "GFLOP/s")]
    return markdown(["a pass of", "operations", *columns], rows)


PARTS: dict[str, Callable[[], str]] = {
    "passes": passes,
    "overhead": overhead,
    "student": student,
    "isas": side_by_side,
    "threads": scaling,
    "operations": lambda: json.dumps(operations()),
}
USUAL = ("passes", "overhead", "student")


def main() -> None:
    """Print the parts that the command line names."""
    for name in sys.argv[1:] or USUAL:
        if name != "threads":
            torch.set_num_threads(1)
        print(PARTS[name](), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
