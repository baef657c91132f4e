"""Where the time of the default preset goes, by kind of op, with plain torch and with fused ops.

    python -m tests.bench.where_time_goes

CPU time of one thread, shared out by the self times of torch's profiler, whose own cost weighs on
small ops. The teacher pass is that of drawing trajectories, the steps are those of the benchmark of
a distillation step.
"""

from __future__ import annotations

import functools
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from advkd import ops
from advkd.parallel import Workers
from advkd.pretrained import load_teacher

from .bench_distillation_step import CONFIG, PARTS, prepared, sampled_store
from .report import markdown

# An event is of the first kind whose pattern is found in its name or in that of one around it. A
# norm that the convolution behind it applies counts as convolution.
KINDS = {
    "optimisers, average, clipping": r"Optimizer|_foreach_|clip_grad",
    "attention, backward": r"_AttentionBackward|attention_backward|BmmBackward|SoftmaxBackward",
    "attention": r"^attention$|advkd::attention|_Attention$",
    "GroupNorm-SiLU, backward": r"GroupNorm.*Backward|SiluBackward|group_norm_silu_backward",
    "GroupNorm-SiLU": r"^group_norm_silu$|advkd::group_norm_silu|aten::group_norm|aten::silu",
    "convolution, backward": r"onvolution_?[bB]ackward|Conv3x3.*Backward|conv3x3_wgrad",
    "convolution": r"aten::conv2d|aten::convolution|^(normed_)?conv3x3$|advkd::conv3x3|Conv3x3$",
    "linear": r"aten::linear|aten::addmm|AddmmBackward|aten::mm$|MmBackward",
    "sums": r"aten::add_?$|aten::sum$|AccumulateGrad",
    "concatenation, resizing": r"aten::cat|CatBackward|psample|vg_?[pP]ool",
    "copies": r"aten::copy_|aten::clone|aten::contiguous|aten::to$",
}
WHOLE = "whole"
SECONDS = 2.0  # measured of each, at least


class CallingThread(Executor):
    """Runs what is submitted at once: the profiler follows no thread that a pool began earlier."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextmanager
def named_ops() -> Iterator[None]:
    """Marks calls of the ops, which in eager code are no events of their own."""
    names = ("attention", "conv3x3", "group_norm_silu", "normed_conv3x3")
    plain = {name: getattr(ops, name) for name in names}

    def marked(name: str) -> Callable[..., Any]:
        @functools.wraps(plain[name])
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return plain[name](*args, **kwargs)

        return call

    for name in plain:
        setattr(ops, name, marked(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(ops, name, function)


def kind_of(event: FunctionEvent) -> str:
    names = []
    around: FunctionEvent | None = event
    while around is not None:
        names.append(around.name)
        around = around.cpu_parent
    for kind, pattern in KINDS.items():
        if any(re.search(pattern, name) for name in names):
            return kind
    return "Python between the ops" if event.name == WHOLE else "the rest"


def milliseconds_by_kind(run: Callable[[], object]) -> Counter[str]:
    """Milliseconds of CPU time of a call of `run`: its time alone, shared out as in the profile."""
    run()
    spent, calls, alone, began = Counter[str](), 0, 0.0, time.process_time()
    while time.process_time() - began < SECONDS:
        with profile(activities=[ProfilerActivity.CPU]) as profiled, record_function(WHOLE):
            run()
        for event in profiled.events():
            spent[kind_of(event)] += event.self_cpu_time_total
        calls += 1
        alone -= time.process_time()
        run()
        alone += time.process_time()
    milliseconds = alone / calls * 1e3
    return Counter({kind: milliseconds * part / spent.total() for kind, part in spent.items()})


def passes(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    teacher = load_teacher(CONFIG.teacher.source).eval().requires_grad_(False)
    teacher = teacher.to(memory_format=torch.channels_last)
    x_t = torch.randn(125, 1, 28, 28).to(memory_format=torch.channels_last)
    classes = teacher.num_classes
    y = torch.arange(125) % classes if classes else None
    yield "a teacher pass, 125 images", torch.no_grad()(lambda: teacher(x_t, 500, y))
    store = sampled_store(folder)
    workers = Workers(1, torch.device("cpu"))
    workers._pool = CallingThread()  # type: ignore[assignment]
    for part in PARTS:
        training, steps = prepared(part, store)
        yield part, lambda: [training.step(step, workers) for step in steps]  # noqa: B023


def table(name: str, run: Callable[[], object]) -> str:
    found = {}
    for backend in ("reference", None):
        with ops.use_backend(backend):
            found[backend] = milliseconds_by_kind(run)
    plain, fused = found["reference"], found[None]
    kinds = sorted({*plain, *fused}, key=lambda kind: -plain[kind])
    rows = [
        [kind]
        + [
            text
            for by in (plain, fused)
            for text in (f"{by[kind]:.1f}", f"{by[kind] / by.total():.0%}")
        ]
        for kind in kinds
    ]
    rows.append(["all", f"{plain.total():.1f}", "", f"{fused.total():.1f}", ""])
    return markdown([name, "plain, ms", "share", "fused, ms", "share"], rows)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, named_ops():
        for name, run in passes(Path(folder)):
            print(table(name, run), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
