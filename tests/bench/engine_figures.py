"""What the engine makes of a processor, beside torch's product of matrices on the same core.

OMP_NUM_THREADS=1 python -m tests.bench.engine_figures          # one thread, by CPU time
OMP_NUM_THREADS=1 python -m tests.bench.engine_figures isas     # each instruction set's kernels
python -m tests.bench.engine_figures threads                    # one and two, by wall time

The last wants a machine that does nothing else. Figures are medians of samples taken in turn, those
of single kinds of operations the least of some samples.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from advkd.diffusion import ddim_table
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
SGEMM, ALL = "a product of matrices", "all"
UNITS = (", ms", "", ", GFLOP/s")

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


def passes() -> str:
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
        dense, out = x_t.permute(0, 2, 3, 1).contiguous(), torch.empty(batch, 28, 28, 1)
        conditioning = engine.conditioning([500])

        def alone() -> None:
            for _ in range(STEPS):
                engine.compiled.run(  # noqa: B023
                    x=dense.data_ptr(), y=out.data_ptr(),  # noqa: B023
                    conditioning=conditioning.data_ptr(), labels=0, images=batch,  # noqa: B023
                    threads=1, nan_fill=False,
                )  # fmt: skip

        found = medians({"loop": loop_of(engine, shape, 1), "passes": alone}, time.process_time)
        loop, inner = found["loop"], found["passes"]
        rows.append(
            [shape.name, f"{loop * 1e3:.1f}", f"{inner * 1e3:.1f}", f"{loop / inner - 1:.1%}"]
        )
    return markdown([f"DDIM, {STEPS} steps", "loop, ms", "passes, ms", "more"], rows)


def student() -> str:
    model = load_student("zoo:fashion-mnist-student")
    engine = lower(model, (model.size, model.size), batch=1)
    x_T = Noise(0, Purpose.SAMPLING).x_T(torch.arange(1), engine.shape)
    product, gflop = sgemm()
    found = medians(
        {
            "engine.run": lambda: engine.run(x_T),
            "generate": lambda: generate(model, 1, 0),
            "sgemm": product,
        },
        time.process_time,
    )
    least = gflop_of(engine) / gflop * found.pop("sgemm")
    rows = [[name, f"{s * 1e3:.2f}", f"{s / least:.2f}"] for name, s in found.items()]
    return markdown(
        ["the student, one image", "ms", f"of the {least * 1e3:.2f} ms its FLOPs take"], rows
    )


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


def operations() -> dict[str, dict[str, list[float]]]:
    """GFLOP and seconds of a pass by kind of operation, by the instruction set in use; and of a
    product of matrices."""
    product, gflop = sgemm()
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        product()
        seconds.append(time.process_time() - start)
    found = {SGEMM: {"sgemm": [gflop, min(seconds)]}}
    for shape in PASSES:
        engine, _ = engine_of(shape)
        kinds = found[shape.name] = {}
        for op, spent in zip(engine.plan.ops, engine.profile(shape.batch, REPEATS), strict=True):
            gflop_and_seconds = kinds.setdefault(kind_of(op), [0.0, 0.0])
            gflop_and_seconds[0] += 1e-9 * op.flops * shape.batch
            gflop_and_seconds[1] += spent
    return found


def side_by_side() -> str:
    """Where a pass goes, and how fast that is, by each instruction set that runs here."""
    isas = [isa for isa in ISAS if extension and isa in extension.isas()]
    found = {}
    for isa in isas:
        command = [sys.executable, "-m", "tests.bench.engine_figures", "operations"]
        run = subprocess.run(
            command, env=os.environ | {"ADVKD_ISA": isa}, check=True, capture_output=True, text=True
        )
        found[isa] = json.loads(run.stdout)
    rows = []
    for name, kinds in found[isas[0]].items():
        for isa in isas:
            parts = found[isa][name]
            parts[ALL] = [sum(numbers) for numbers in zip(*parts.values(), strict=True)]
        for kind in kinds if len(kinds) > 2 else [ALL]:
            row = [name, kind]
            for isa in isas:
                (gflop, seconds), (_, whole) = found[isa][name][kind], found[isa][name][ALL]
                row += [f"{seconds * 1e3:.3g}", f"{seconds / whole:.0%}", f"{gflop / seconds:.0f}"]
            rows.append(row)
    return markdown(
        ["a pass of", "operations", *(f"{isa}{unit}" for isa in isas for unit in UNITS)], rows
    )


def main() -> None:
    if sys.argv[1:] == ["threads"]:
        print(scaling())
        return
    torch.set_num_threads(1)
    if sys.argv[1:] == ["operations"]:
        print(json.dumps(operations()))
        return
    if sys.argv[1:] == ["isas"]:
        print(side_by_side())
        return
    for part in (passes, overhead, student):
        print(part(), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
