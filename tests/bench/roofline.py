"""What a sampling step of ddpm-cifar10-32 should take on an A100 and an H100, and how many images
the large presets should sample and train a second: predictions.

    python -m tests.bench.roofline [--write]

A pass of the network is run on the CPU with one image, and every operation on the way counted: its
FLOPs, and the bytes it cannot but move (each input read once, each result written once). Its time
is the longer of FLOPs over the peak and bytes over the bandwidth of the data sheet, and the step's
the sum. No cache helps, and no kernel has a latency, so this is a bound; at batch 1 the number of
launches, which is counted too, decides instead. --write puts the tables into docs/performance.md
and docs/scaling.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from advkd.config import load_preset
from advkd.models.unet import UNet

DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"
BATCHES = (1, 64, 256)
# Presets, pixels of a side, and images of a batch.
PRESETS = (("cifar10-32", 32, 256), ("advkd-celebahq-256", 256, 16))
BACKWARD = 2  # a backward pass is about two forward ones: gradients of inputs, and of weights
VIEWS = {"view", "expand", "t", "transpose", "permute", "_unsafe_view", "slice", "unsqueeze",
         "select", "detach", "empty", "empty_like", "reshape", "as_strided", "split", "alias",
         "unbind", "squeeze", "new_empty", "empty_strided", "lift_fresh", "dropout"}  # fmt: skip


@dataclass(frozen=True)
class Device:
    """Dense peaks in FLOP/s and bytes/s, as NVIDIA's data sheets say for the SXM modules."""

    name: str
    flops: dict[torch.dtype, float]
    bandwidth: float


DEVICES = (
    Device("A100 80GB", {torch.float32: 156e12, torch.bfloat16: 312e12}, 2.039e12),
    Device("H100", {torch.float32: 495e12, torch.bfloat16: 989e12}, 3.35e12),
)


@dataclass(frozen=True)
class Work:
    """One operation for one image; weights are read once for a batch."""

    kind: str
    flops: float
    activations: int  # numbers read and written
    weights: int


class Counting(TorchDispatchMode):
    """Collects the operations that launch something."""

    def __init__(self, weights: set[int]):
        super().__init__()
        self.weights = weights
        self.found: list[Work] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if name in VIEWS:
            return out
        inputs = [a for arg in args for a in (arg if isinstance(arg, list | tuple) else [arg])]
        inputs = [a for a in inputs if isinstance(a, Tensor)]
        of_weights = sum(a.numel() for a in inputs if a.data_ptr() in self.weights)
        moved = sum(a.numel() for a in inputs if a.data_ptr() not in self.weights)
        outs = out if isinstance(out, tuple | list) else [out]
        moved += sum(o.numel() for o in outs[:1] if isinstance(o, Tensor))
        self.found.append(Work(name, flops_of(name, inputs, outs[0]), moved, of_weights))
        return out


def flops_of(name: str, inputs: list[Tensor], out: Tensor) -> int:
    """A product and a sum count as two."""
    if name == "attention":
        q, k = inputs[:2]
        return 4 * q.numel() * k.shape[2]
    if name in ("conv2d", "conv3x3", "linear"):
        return 2 * out.numel() * inputs[1][0].numel()
    return 0


@torch.inference_mode()
def network(preset: str = "cifar10-32", side: int = 32) -> list[Work]:
    """One pass for one image, by the fused ops; the time's embedding is made before the loop."""
    config = dataclasses.replace(load_preset(preset).unet, dropout=0.0)
    unet = UNet(config).eval().to(memory_format=torch.channels_last)
    x_t = torch.zeros(1, 3, side, side).contiguous(memory_format=torch.channels_last)
    temb = unet.embed_time(0, 1)
    mode = Counting({p.data_ptr() for p in unet.parameters()})
    with mode:
        unet.denoise(x_t, temb)
    return mode.found


def kind_of(work: Work) -> str:
    names = {"conv2d": "convolution", "conv3x3": "convolution", "linear": "linear",
             "group_norm_silu": "GroupNorm-SiLU", "attention": "attention"}  # fmt: skip
    return names.get(work.kind, "sums, joins, the rest")


def step_work(width: int) -> Work:
    """The sampling step: x_t and the network's output in, x_t out; of a half type, its copy too."""
    elements = 3 * 32 * 32
    moved = elements * (4 + width + 4 + (width if width < 4 else 0))
    return Work("sampling_step", 20 * elements, moved // width, 0)


def seconds(work: Work, batch: int, dtype: torch.dtype, device: Device) -> float:
    moved = (work.activations * batch + work.weights) * dtype.itemsize
    return max(work.flops * batch / device.flops[dtype], moved / device.bandwidth)


def report(works: list[Work]) -> list[str]:
    gflop = sum(work.flops for work in works) / 1e9
    launches = len(works)
    lines = [
        f"A pass is {gflop:.1f} GFLOP an image, in about {launches} launches. Without a graph the",
        f"host makes these {launches} launches a step, and one for the update.",
        "The captured loop launches one graph a step.",
        "",
        "| predicted, ms a step | dtype | batch | convolution | GroupNorm-SiLU | attention | "
        "linear | sums, joins, the rest | sampling step | all | images/s in 50 steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    columns = ("convolution", "GroupNorm-SiLU", "attention", "linear", "sums, joins, the rest")
    for device in DEVICES:
        for dtype in (torch.float32, torch.bfloat16):
            for batch in BATCHES:
                times: Counter[str] = Counter()
                for work in works:
                    times[kind_of(work)] += seconds(work, batch, dtype, device)
                step = seconds(step_work(dtype.itemsize), batch, dtype, device)
                whole = sum(times.values()) + step
                cells = " | ".join(f"{times[kind] * 1e3:.3f}" for kind in columns)
                name = "tf32" if dtype == torch.float32 else "bfloat16"
                lines.append(
                    f"| {device.name} | {name} | {batch} | {cells} | {step * 1e3:.4f} | "
                    f"{whole * 1e3:.3f} | {batch / whole / 50:.0f} |"
                )
    return lines


def throughput() -> list[str]:
    """Lines of a table: images a second of the presets' teachers."""
    lines = [
        "| predicted | a pass, GFLOP | dtype | batch | trajectories, images/s | hours for all | "
        "teacher's training, images/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for preset, side, batch in PRESETS:
        works, trajectory = network(preset, side), load_preset(preset).trajectory
        gflop = sum(work.flops for work in works) / 1e9
        for device in DEVICES:
            for dtype in (torch.float32, torch.bfloat16):
                a_pass = sum(seconds(work, batch, dtype, device) for work in works)
                sampled = batch / a_pass / trajectory.steps
                name = "TF32" if dtype == torch.float32 else "bfloat16"
                lines.append(
                    f"| {preset}, {device.name} | {gflop:.0f} | {name} | {batch} | {sampled:.1f} | "
                    f"{trajectory.num / sampled / 3600:.2f} | "
                    f"{batch / a_pass / (1 + BACKWARD):.0f} |"
                )
    return lines


def write(document: Path, lines: list[str]) -> None:
    """Puts lines between the marks of a document."""
    head, rest = document.read_text().split(BEGIN)
    document.write_text("\n".join([head + BEGIN, *lines, END + rest.split(END)[1]]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the documents")
    args = parser.parse_args()
    tables = {"performance.md": report(network()), "scaling.md": throughput()}
    for document, lines in tables.items():
        print("\n".join([*lines, ""]))
        if args.write:
            write(DOCS / document, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
