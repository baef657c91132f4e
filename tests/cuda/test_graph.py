"""advkd.engine.cuda with real networks: the C++ loop and GroupNorm emulated, the rest by torch on
the CPU.

What torch.cuda would capture is called again at each replay instead.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from advkd import ops
from advkd.config import UNetConfig
from advkd.diffusion import ddim_table
from advkd.engine import cuda as graph
from advkd.engine import sampling
from advkd.models.unet import UNet
from advkd.ops import _backend

SIDE = 8


def teacher(dtype: torch.dtype = torch.float32, classes: int | None = None) -> UNet:
    torch.manual_seed(3)
    config = UNetConfig(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=8,
        num_class_embeds=classes,
    )
    return UNet(config).to(dtype).eval()


@pytest.fixture
def emulated(cuda: Any, monkeypatch: pytest.MonkeyPatch, set_threads: Any) -> Iterator[Any]:
    """Replaces what graph.py takes of CUDA; the norms of CPU tensors go to the emulated kernel."""
    set_threads(1)  # the networks are too small for more
    extension = SimpleNamespace(**vars(cuda))

    def waiting(*args: Any) -> None:
        cuda.cuda_group_norm_silu(*args)
        cuda.synchronize()

    extension.cuda_group_norm_silu = waiting

    class Captured:
        def __init__(self, replay: Callable[[], object]):
            self.handle = cuda.python_network(replay)

        def raw_cuda_graph(self) -> int:
            return int(self.handle)

        def __del__(self) -> None:
            cuda.destroy_graph(self.handle)

    functions: list[Callable[[], Tensor]] = []  # kept apart from what is kept by the graphs

    def captured(function: Callable[[], Tensor], device: torch.device) -> tuple[Captured, Tensor]:
        out, number = function(), len(functions)
        functions.append(function)

        @torch.inference_mode()
        def replay() -> None:
            out.copy_(functions[number]())

        return Captured(replay), out

    norms = ops.CudaGroupNorm
    stream = cuda.new_stream()  # other than the norms', which are waited for inside a replay
    monkeypatch.setattr(graph.ops, "extension", extension)
    monkeypatch.setattr(graph.ops, "CudaGroupNorm", lambda: norms(extension, "cpu"))
    monkeypatch.setattr(graph, "captured", captured)
    monkeypatch.setattr(graph, "current_stream", lambda device: stream)
    yield cuda
    functions.clear()
    gc.collect()
    cuda.destroy_stream(stream)


def plainly(unet: UNet, steps: int, indices: Tensor, **how: Any) -> list[Tensor]:
    table = ddim_table(unet.schedule, steps, eta=1.0)
    return sampling.sample_eagerly(unet, table, 11, indices, **how)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_draws_what_the_plain_loop_draws(
    emulated: Any, dtype: torch.dtype, last: bool, on_device: bool
) -> None:
    unet = teacher(dtype)
    if last:
        unet = unet.to(memory_format=torch.channels_last)
    engine = graph.CudaEngine(unet, 3, SIDE, on_device=on_device)
    table = ddim_table(unet.schedule, 5, eta=1.0)
    indices = torch.tensor([4, 9, 2])
    emulated.launches()
    got = engine.sample(table, 11, indices, None, kept=[2, 5], target="denoised")
    norms = sum(isinstance(module, torch.nn.GroupNorm) for module in unet.modules())
    launched = emulated.launches()
    assert launched["forward"] == 5 * norms
    assert launched["graph kernel"] == 5
    want = torch.stack(plainly(unet, 5, indices, kept=[2, 5]))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert (got - want).abs().max() < tolerance
    assert (got - want).abs().mean() < tolerance / 10


def test_labels_parts_of_batches_and_changed_weights(emulated: Any) -> None:
    unet = teacher(classes=5)
    engine = graph.CudaEngine(unet, 4, SIDE)
    table = ddim_table(unet.schedule, 3, eta=0.0)
    indices, y = torch.arange(6), torch.tensor([0, 4, 2, 2, 1, 3])
    how: dict[str, Any] = {"kept": [3], "target": "denoised"}
    whole = engine.sample(table, 11, indices, y, **how)
    assert whole.shape == (1, 6, 3, SIDE, SIDE)
    part = engine.sample(table, 11, indices[4:5], y[4:5], **how)
    assert torch.equal(part[:, 0], whole[:, 4])
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.1)
    changed = engine.sample(table, 11, indices, y, **how)
    assert not torch.equal(changed, whole)
    want = sampling.sample_eagerly(unet, table, 11, indices, y=y, kept=[3])[0]
    assert (changed[0] - want).abs().max() < 1e-4
    for bad, words in ((None, "labels are given"), (y[:2], "2 labels for 6 images")):
        with pytest.raises(ValueError, match=words):
            engine.sample(table, 11, indices, bad, **how)
    with pytest.raises(ValueError, match="at least one image"):
        engine.sample(table, 11, indices[:0], y[:0], **how)


def test_the_host_loops_where_the_device_cannot(
    emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old driver, or a graph that may not be in a WHILE node, whose call then fails."""

    def host_only(**how: Any) -> Any:
        if how["on_device"]:
            raise RuntimeError("cudaGraphInstantiate failed: operation not supported")
        return emulated.CudaSamplingLoop(**how)

    unet = teacher()
    table = ddim_table(unet.schedule, 3, eta=1.0)
    found = []
    for driver, make in (
        (13000, emulated.CudaSamplingLoop), (12000, emulated.CudaSamplingLoop), (13000, host_only)
    ):  # fmt: skip
        emulated.set_driver(driver)
        emulated.launches()
        monkeypatch.setattr(graph.ops.extension, "CudaSamplingLoop", make)
        engine = graph.CudaEngine(unet, 2, SIDE)
        out = engine.sample(table, 11, torch.arange(2), None, kept=[3], target="state")
        found.append((out, emulated.launches()["graph launch"]))
    assert [launches for _, launches in found] == [1, 3, 3]
    assert all(torch.equal(out, found[0][0]) for out, _ in found)


def test_sampling_goes_by_it(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = teacher()
    engine = graph.CudaEngine(unet, 4, SIDE)
    monkeypatch.setattr(sampling, "engine_for", lambda *args: engine)
    told: list[tuple[int, int]] = []
    images = sampling.generate(
        unet, 6, 11, 3, eta=1.0, batch=4, callback=lambda i, n: told.append((i, n))
    )
    assert told == [(i + 1, 6) for i in range(6)]
    want = torch.cat(
        [plainly(unet, 3, i, kept=[3])[0] for i in (torch.arange(4), torch.arange(4, 6))]
    )
    assert (images - want.clamp(-1, 1)).abs().max() < 1e-4
    table = ddim_table(unet.schedule, 4)
    out = torch.empty(2, 2, 3, SIDE, SIDE, dtype=torch.float16)
    polled: list[int] = []
    sampling.sample_into(
        out, engine, table, 11, torch.arange(2), kept=[1, 4], poll=lambda: polled.append(0)
    )
    want = torch.stack(sampling.sample(unet, table, 11, torch.arange(2), keep=[1]), dim=1)
    assert torch.equal(out, want.half())
    assert len(polled) == 4


def test_where_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert graph.unavailable(teacher()) == "the network is on cpu"
    monkeypatch.setattr(_backend, "extension", SimpleNamespace(cuda_left_out="nvcc was not found"))
    assert ops.cuda_missing() == "the extension was built without CUDA: nvcc was not found"
    monkeypatch.setattr(
        _backend, "extension", SimpleNamespace(cuda_unavailable=lambda: "no CUDA device: none")
    )
    assert ops.cuda_missing() == "no CUDA device: none"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 3), True),
     ((11, 0), False), ((12, 0), True), ((13, 0), True)],
)  # fmt: skip
def test_which_devices_can_run_what_was_compiled(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    extension = SimpleNamespace(cuda_archs="80 90 100 120")
    monkeypatch.setattr(_backend, "extension", extension)
    missing = ops.cuda_code_missing(capability)
    assert (missing is None) == runs
    if missing is not None:
        assert missing.startswith("the CUDA part was built for 8.0, 9.0, 10.0, 12.0, not for ")


def test_a_teacher_of_a_half_type_draws_plainly_too() -> None:
    table = ddim_table(teacher().schedule, 3)
    wide, narrow = (
        sampling.sample(teacher(dtype), table, 1, torch.arange(2))[-1]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert narrow.dtype == torch.float32
    assert (wide - narrow).abs().mean() < 0.05
