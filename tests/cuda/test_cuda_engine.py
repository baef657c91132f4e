"""CudaEngine with real networks: the C++ loop emulated, the network by torch on the CPU.

What torch.cuda would capture is called again at each replay instead.
"""

from __future__ import annotations

import dataclasses
import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import eager
from torch import Tensor, nn

from advkd import ops
from advkd.config import UNetConfig
from advkd.diffusion import Schedule, StepTable, ddim_table, ddpm_table
from advkd.engine import cache
from advkd.engine import cuda as cuda_engine
from advkd.engine.cuda import CudaEngine
from advkd.engine.eager import EagerEngine
from advkd.engine.lowering import LoweringError
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import generate
from advkd.models.layers import ResnetBlock
from advkd.models.unet import UNet
from advkd.ops import _backend
from advkd.pretrained import load_student

SIZE = (8, 8)
NOISE = Noise(11, Purpose.SAMPLING)


def teacher(
    dtype: torch.dtype = torch.float32,
    classes: int | None = None,
    schedule: Schedule | None = None,
    **changes: Any,
) -> UNet:
    torch.manual_seed(3)
    config = UNetConfig(
        sample_size=SIZE[0],
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
    return UNet(dataclasses.replace(config, **changes), schedule).to(dtype).eval()


@pytest.fixture
def emulated(cuda: Any, monkeypatch: pytest.MonkeyPatch, set_threads: Any) -> Iterator[Any]:
    """The emulation in place of CUDA; its `functions` are those that were captured."""
    set_threads(1)  # the networks are too small for more
    functions: list[Callable[[], Tensor]] = []  # apart from the graphs, which refer to none

    class Graph:
        def __init__(self, replay: Callable[[], object]):
            self.replay = replay
            self.handle = cuda.python_network(replay)

        def raw_cuda_graph(self) -> int:
            return int(self.handle)

        def __del__(self) -> None:
            cuda.destroy_graph(self.handle)

    def captured(function: Callable[[], Tensor], device: torch.device) -> tuple[Graph, Tensor]:
        out, number = function(), len(functions)
        functions.append(function)
        autocast = torch.is_autocast_enabled("cpu")

        @torch.inference_mode()
        def replay() -> None:  # what was captured, whatever the modes are by then
            with torch.device("cpu"), torch.autocast("cpu", enabled=autocast):
                out.copy_(functions[number]())

        return Graph(replay), out

    stream = cuda.new_stream()
    monkeypatch.setattr(ops, "extension", cuda)
    monkeypatch.setattr(cuda_engine, "captured", captured)
    monkeypatch.setattr(cuda_engine, "current_stream", lambda device: stream)
    monkeypatch.setattr(cuda_engine, "recorded", lambda device: None)
    monkeypatch.setattr(cuda_engine, "free_memory", lambda device: 1 << 30)
    yield SimpleNamespace(cuda=cuda, functions=functions)
    functions.clear()
    gc.collect()
    cuda.destroy_stream(stream)


def table_of(unet: UNet, steps: int, eta: float = 1.0) -> StepTable:
    return ddim_table(unet.schedule, steps, eta)


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_samples_what_the_eager_loop_samples(
    emulated: Any, dtype: torch.dtype, purpose: Purpose
) -> None:
    unet = teacher(dtype)
    engine = CudaEngine.make(unet, SIZE, 4)
    indices, noise = torch.tensor([4, 9, 2]), Noise(11, purpose)
    emulated.cuda.launches()
    got = engine.sample(table_of(unet, 5), noise, indices, saved=[2, 5])
    assert emulated.cuda.launches() == {"graph launch": 5, "kernel": 1, "graph kernel": 5}
    assert got.shape == (3, 2, 3, *SIZE) and got.dtype == torch.float32
    want = eager(unet, table_of(unet, 5), noise, indices)
    if dtype == torch.float32:
        assert (got[:, 1] - want).abs().max() < 1e-4
        return
    # It rounds elsewhere, and no more: it is as near to the network of these weights in float32.
    exact = eager(unet.float(), table_of(unet, 5), noise, indices)
    errors = [(found - exact).abs().mean() for found in (got[:, 1], want)]
    assert errors[0] < 1.5 * errors[1] < 0.02


def test_labels_parts_of_batches_and_changed_weights(emulated: Any) -> None:
    unet = teacher(classes=5)
    engine = CudaEngine.make(unet, SIZE, 4)
    table = table_of(unet, 3, eta=0.0)
    indices, y = torch.arange(6), torch.tensor([0, 4, 2, 2, 1, 3])
    whole = engine.sample(table, NOISE, indices, y, saved=[3])
    assert whole.shape == (6, 1, 3, *SIZE)
    part = engine.sample(table, NOISE, indices[4:5], y[4:5], saved=[3])
    assert torch.equal(part[0], whole[4])
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.1)
    changed = engine.sample(table, NOISE, indices, y, saved=[3])
    assert not torch.equal(changed, whole)
    assert (changed[:, 0] - eager(unet, table, NOISE, indices, y)).abs().max() < 1e-4
    assert engine.sample(table, NOISE, indices[:0], y[:0], saved=[3]).shape == (0, 1, 3, *SIZE)


def test_film_and_a_variance_that_ddim_leaves_alone(emulated: Any) -> None:
    schedule = Schedule(variance_type="learned_range")
    unet = teacher(
        schedule=schedule, out_channels=6, resnet_time_scale_shift="scale_shift",
        downsample_type="resnet", down_block_types=("AttnDownBlock2D",) * 2,
    )  # fmt: skip
    engine = CudaEngine.make(unet, SIZE, 4)
    indices = torch.tensor([4, 9, 2])
    got = engine.sample(table_of(unet, 5), NOISE, indices, saved=[5])
    want = EagerEngine(unet, SIZE).sample(table_of(unet, 5), NOISE, indices, saved=[5])
    assert got.shape == (3, 1, 3, *SIZE) and (got - want).abs().max() < 1e-4
    with pytest.raises(ValueError, match="eager engine alone"):
        engine.sample(ddpm_table(schedule, 5), NOISE, indices, saved=[5])


@pytest.mark.parametrize("images", [1, 3, 4, 6])
def test_one_pass_is_the_networks(emulated: Any, images: int) -> None:
    unet = teacher(classes=5)
    engine = CudaEngine.make(unet, SIZE, 4)
    x, y = torch.randn(images, 3, *SIZE), torch.arange(images) % 5
    with torch.no_grad():
        want = unet(x, 77, y)
    assert (engine.run(x, y, t=77) - want).abs().max() < 1e-5
    assert (engine.run(x, y, t=500) - want).abs().max() > 1e-3


def test_saved_targets_go_where_they_are_wanted(emulated: Any) -> None:
    """Into float16 memory of the caller, whose images are contiguous and no more."""
    unet = teacher()
    engine = CudaEngine.make(unet, SIZE, 2)
    table, indices = table_of(unet, 4), torch.arange(3)
    want = engine.sample(table, NOISE, indices, saved=[1, 4], target="state")
    memory = torch.full((3, 5, 3, *SIZE), float("nan"), dtype=torch.float16)
    out = memory[:, 1:3]
    found = engine.sample(table, NOISE, indices, saved=[1, 4], target="state", out=out)
    assert found is out and torch.equal(out, want.half())
    assert memory[:, [0, 3, 4]].isnan().all()


def test_every_step_is_reported_and_polled(emulated: Any) -> None:
    unet = teacher()
    engine = CudaEngine.make(unet, SIZE, 2)
    steps: list[tuple[int, int]] = []
    polls: list[None] = []
    engine.sample(
        table_of(unet, 13), NOISE, torch.arange(3), saved=[13],
        on_step=lambda done, all_: steps.append((done, all_)), poll=lambda: polls.append(None),
    )  # fmt: skip
    assert steps == [(i + 1, 13) for i in range(13)]
    assert len(polls) == 26  # in both parts

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.sample(table_of(unet, 13), NOISE, torch.arange(3), saved=[13], poll=stop)
    assert engine.sample(table_of(unet, 2), NOISE, torch.arange(3), saved=[2]).isfinite().all()


def test_threads_take_turns(emulated: Any) -> None:
    """A second thread begins while the first stands in its callback, at a chunk's end."""
    unet = teacher()
    engine = CudaEngine.make(unet, SIZE, 2)
    table, indices = table_of(unet, 24), torch.arange(2)
    noises = [Noise(seed, Purpose.SAMPLING) for seed in (1, 2)]
    want = [engine.sample(table, noise, indices, saved=[24]) for noise in noises]
    found: list[Tensor] = [torch.empty(0)] * 2
    began = threading.Event()

    def second() -> None:
        began.set()
        found[1] = engine.sample(table, noises[1], indices, saved=[24])

    thread = threading.Thread(target=second)

    def on_step(done: int, steps: int) -> None:
        if done == 1:
            thread.start()
            began.wait()
        thread.join(0.01)  # were it not for the turns, it would be through by the last step

    found[0] = engine.sample(table, noises[0], indices, saved=[24], on_step=on_step)
    thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_a_callback_cannot_use_its_own_engine(emulated: Any) -> None:
    unet = teacher()
    engine, other = (CudaEngine.make(unet, SIZE, 2) for _ in range(2))
    table, indices = table_of(unet, 3), torch.arange(2)
    want = engine.sample(table, NOISE, indices, saved=[3])
    inside: list[Tensor] = []

    def on_step(done: int, steps: int) -> None:
        with pytest.raises(RuntimeError, match="a callback of its own run"):
            engine.sample(table, NOISE, indices, saved=[3])
        with pytest.raises(RuntimeError, match="a callback of its own run"):
            engine.run(torch.zeros(1, 3, *SIZE), t=5)
        inside.append(other.sample(table, NOISE, indices, saved=[3]))

    got = engine.sample(table, NOISE, indices, saved=[3], on_step=on_step)
    assert all(torch.equal(each, want) for each in (got, *inside))
    assert torch.equal(engine.sample(table, NOISE, indices, saved=[3]), want)


@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: torch.inference_mode(),
        lambda: torch.no_grad(),
        nullcontext,
    ],
    ids=["autocast", "inference mode", "no grad", "nothing"],
)
def test_the_callers_modes_do_not_reach_it(
    emulated: Any, around: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Neither when it is made nor when it samples, and it leaves them as they were."""
    unet = teacher()
    table, indices, x = table_of(unet, 3), torch.arange(3), torch.randn(2, 3, *SIZE)
    engine = CudaEngine.make(unet, SIZE, 2)
    want = engine.sample(table, NOISE, indices, saved=[3]), engine.run(x, t=9)
    modes: list[tuple[bool, bool]] = []

    def on_step(done: int, steps: int) -> None:
        modes.append((torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()))

    with around():
        outside = (torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled())
        for each in (engine, CudaEngine.make(unet, SIZE, 2)):
            found = each.sample(table, NOISE, indices, saved=[3], on_step=on_step)
            assert torch.equal(found, want[0])
            assert torch.equal(each.run(x, t=9), want[1])
    assert set(modes) == {outside}
    assert torch.equal(found, want[0])


def test_default_dtype_and_device_do_not_reach_it(emulated: Any) -> None:
    unet = teacher()
    table, indices, x = table_of(unet, 3), torch.arange(3), torch.randn(2, 3, *SIZE)
    engine = CudaEngine.make(unet, SIZE, 2)
    want = engine.sample(table, NOISE, indices, saved=[3]), engine.run(x, t=9)
    torch.set_default_dtype(torch.float64)
    try:
        made = CudaEngine.make(unet, SIZE, 2)
        with torch.device("meta"):
            for each in (engine, made):
                found = each.sample(table, NOISE, indices, saved=[3])
                assert found.is_cpu and found.dtype == torch.float32
                assert torch.equal(found, want[0])
                assert torch.equal(each.run(x, t=9), want[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_engine_goes_with_its_last_reference_and_outlives_its_network(emulated: Any) -> None:
    unet = teacher()
    engine = CudaEngine.make(unet, SIZE, 2)
    table = table_of(unet, 3)
    want = engine.sample(table, NOISE, torch.arange(2), saved=[3])
    gc.collect()
    gc.disable()
    try:
        network, alive = weakref.ref(unet), weakref.ref(engine)
        functions = emulated.functions.copy()
        del unet
        emulated.functions.clear()
        again = functions.pop()  # holds the network, as no graph of CUDA does
        emulated.functions.append(again)
        assert torch.equal(engine.sample(table, NOISE, torch.arange(2), saved=[3]), want)
        emulated.functions.clear()
        del again
        assert network() is None
        del engine
        assert alive() is None
        assert set(emulated.cuda.live_objects()) <= {"stream"}  # the fixture's
    finally:
        gc.enable()


def test_whatever_fails_in_a_capture_is_a_lowering_error(
    emulated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the first line of the reason, and without any of the memory it took."""
    unet = teacher()
    attempts: list[weakref.ref[Tensor]] = []

    def failing(error: BaseException) -> Callable[..., Any]:
        def captured(function: Any, device: torch.device) -> Any:
            out = function()
            attempts.append(weakref.ref(out))
            raise error

        return captured

    for error, words in (
        (torch.OutOfMemoryError("CUDA out of memory.\nSee the documentation"), "out of memory.$"),
        (RuntimeError("operation not permitted when stream is capturing"), "is capturing$"),
        (TypeError("no keep_graph"), "no keep_graph$"),
        (AssertionError(), "AssertionError$"),
    ):
        monkeypatch.setattr(cuda_engine, "captured", failing(error))
        with pytest.raises(LoweringError, match=f"could not be captured: .*{words}") as raised:
            CudaEngine.make(unet, SIZE, 2)
        assert raised.value.__context__ is None and raised.value.__cause__ is None
        error.__traceback__ = None
    assert len(attempts) == 4 and all(attempt() is None for attempt in attempts)
    monkeypatch.setattr(cuda_engine, "captured", failing(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        CudaEngine.make(unet, SIZE, 2)


def test_a_driver_that_refuses_is_a_lowering_error(emulated: Any) -> None:
    emulated.cuda.fail_call(4)
    with pytest.raises(LoweringError, match=r"cuda\w+ failed: out of memory"):
        CudaEngine.make(teacher(), SIZE, 2)
    emulated.cuda.fail_call(0)
    emulated.functions.clear()
    assert CudaEngine.make(teacher(), SIZE, 2).batch == 2


def test_calls_that_do_not_fit_are_refused(emulated: Any) -> None:
    unet = teacher(classes=5)
    engine = CudaEngine.make(unet, SIZE, 2)
    table, indices, y = table_of(unet, 3), torch.arange(2), torch.tensor([1, 2])
    how: dict[str, Any] = {"saved": [3]}
    for labels, change, words in (
        (None, {}, "pass labels y"),
        (y[:1], {}, r"is not \(2,\) int64"),
        (y + 3, {}, "not one of 0 .. 4"),
        (y, {"saved": [3, 3]}, "ascending"),
        (y, {"saved": [4]}, "ascending"),
        (y, {"target": "noise"}, "not one of"),
        (y, {"out": torch.empty(2, 2, 3, *SIZE)}, r"is not \(2, 1, 3, 8, 8\)"),
        (y, {"out": torch.empty(2, 1, 3, *SIZE).double()}, "float32 or float16"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.sample(table, NOISE, indices, labels, **how | change)
    x = torch.zeros(2, 3, *SIZE)
    for bad, t, words in (
        (x[..., 1:], 5, "is not"), (x.double(), 5, "is not"), (x, None, "needs a time"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            engine.run(bad, y, t=t)
    with pytest.raises(ValueError, match="pass labels"):
        engine.run(x, t=5)
    with pytest.raises(ValueError, match="must divide both sides"):
        CudaEngine.make(unet, (7, 8), 2)
    with pytest.raises(ValueError, match="exit_at=1: a teacher has no heads"):
        CudaEngine.make(unet, SIZE, 2, 1)
    with pytest.raises(ValueError, match="batch=0"):
        CudaEngine.make(unet, SIZE, 0)


def test_sizes_of_batches_are_few(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [CudaEngine.batch_for(n) for n in (1, 2, 3, 5, 64, 65)] == [1, 2, 4, 8, 64, 128]
    monkeypatch.setattr(cuda_engine, "MAX_PIXELS", 5 * 8 * 8)
    assert [CudaEngine.make(teacher(), SIZE, n).batch for n in (1, 4, 8)] == [1, 4, 4]
    monkeypatch.setattr(cuda_engine, "free_memory", lambda device: 1 << 10)
    assert CudaEngine.make(teacher(), SIZE, 8).batch == 1


class Counting(ResnetBlock):
    """A block with a state of its own, which a graph would not repeat."""


def changed_networks() -> Iterator[tuple[str, Callable[[UNet], object]]]:
    def patch(name: str, of: Callable[[UNet], nn.Module]) -> Callable[[UNet], object]:
        return lambda unet: setattr(of(unet), name, getattr(of(unet), name))

    yield "forward of the network", patch("forward", lambda unet: unet)
    yield "denoise of the network", patch("denoise", lambda unet: unet)
    yield "forward of a block", patch("forward", lambda unet: unet.mid_block.resnets[0])
    yield "forward of a convolution", patch("forward", lambda unet: unet.conv_out)
    yield "hook", lambda unet: unet.mid_block.register_forward_hook(lambda *args: None)
    yield "hook before", lambda unet: unet.conv_in.register_forward_pre_hook(lambda *args: None)


@pytest.mark.parametrize("name", dict(changed_networks()))
def test_a_changed_network_is_left_to_its_modules(name: str) -> None:
    unet = teacher()
    assert CudaEngine.unavailable(unet) == "the network is on cpu"
    dict(changed_networks())[name](unet)
    reason = str(CudaEngine.unavailable(unet))
    assert re.search("has hooks|has been replaced", reason)


@pytest.mark.parametrize("kind", [UNet, ResnetBlock, nn.Conv2d])
def test_so_is_one_of_a_changed_class(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module]
) -> None:
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: original(self, *args))
    assert "has been replaced" in str(CudaEngine.unavailable(teacher()))


def test_where_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(unet: UNet) -> str:
        return str(CudaEngine.unavailable(unet))

    assert reason(teacher(torch.float64)).startswith("the CUDA loop takes float32, float16")
    split = teacher()
    split.conv_out.to("meta")
    assert reason(split) == "the network is on several devices"
    training = teacher()
    training.mid_block.resnets[1].dropout.p = 0.1
    assert reason(training) == "the network is on cpu"
    training.mid_block.train()
    assert reason(training) == "the network is in training, with dropout"
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
def test_which_devices_can_run_the_compiled_code(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], runs: bool
) -> None:
    extension = SimpleNamespace(cuda_archs="80 90 100 120")
    monkeypatch.setattr(_backend, "extension", extension)
    missing = ops.cuda_code_missing(capability)
    assert (missing is None) == runs
    if missing is not None:
        assert missing.startswith("the CUDA part was built for 8.0, 9.0, 10.0, 12.0, not for ")


@pytest.fixture
def first_choice(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emulation, for all networks that a graph serves but for the device they are on."""
    monkeypatch.setattr(
        CudaEngine, "unavailable", classmethod(lambda cls, model: cuda_engine._unsuited(model))
    )
    monkeypatch.setattr(cache, "ENGINES", [CudaEngine])
    return emulated


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_captures_once_for_a_size_of_batch(first_choice: Any, dtype: torch.dtype) -> None:
    """And again where the network has another structure, but not where its values have changed."""
    unet = teacher(dtype)
    engine = cache.engine_for(unet, 3)
    assert isinstance(engine, CudaEngine) and engine.batch == 4
    with torch.no_grad():
        unet.conv_in.weight.mul_(0.5)
    assert cache.engine_for(unet, 4) is engine
    assert cache.engine_for(unet, 2) is not engine and len(first_choice.functions) == 2
    unet.conv_in.weight.data = unet.conv_in.weight.data.clone()
    assert cache.engine_for(unet, 4) is not engine
    images = generate(unet, 6, 11, 3, eta=1.0, batch=4)
    want = eager(unet, table_of(unet, 3), NOISE, torch.arange(6)).clamp(-1, 1)
    assert (images - want).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
    hook = unet.mid_block.register_forward_hook(lambda *args: None)
    assert isinstance(cache.engine_for(unet, 4), EagerEngine)
    hook.remove()
    assert isinstance(cache.engine_for(unet, 4), CudaEngine)


def test_a_refused_capture_warns_once_and_torch_samples(
    first_choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = teacher()

    def captured(function: Any, device: torch.device) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(cuda_engine, "captured", captured)
    with pytest.warns(UserWarning, match="could not be captured: CUDA out of memory") as warned:
        images = [generate(unet, 2, 11, 3, eta=1.0) for _ in range(2)]
    assert len(warned) == 1
    want = eager(unet, table_of(unet, 3), NOISE, torch.arange(2)).clamp(-1, 1)
    assert all((each - want).abs().max() < 1e-4 for each in images)


STUDENT = "zoo:fashion-mnist-student"


@pytest.mark.parametrize("exit_at", [None, 1])
def test_a_student_is_one_captured_pass(first_choice: Any, exit_at: int | None) -> None:
    student = load_student(STUDENT)
    engine = cache.engine_for(student, 3, exit_at=exit_at)
    assert isinstance(engine, CudaEngine) and engine.batch == 4
    y = torch.tensor([0, 9, 4, 4, 1, 3])
    x = NOISE.x_T(torch.arange(6), (1, 28, 28))
    with torch.no_grad():
        want = student(x, y, exit_at)
    assert (engine.run(x, y) - want).abs().max() < 1e-4
    with torch.no_grad():  # those that are read in their places, and those that are made of them
        for parameter in student.parameters():
            parameter.mul_(1.1)
        changed = student(x, y, exit_at)
    assert (engine.run(x, y) - changed).abs().max() < 1e-4 < (changed - want).abs().max()
    with pytest.raises(ValueError, match="a student takes none"):
        engine.run(x, y, t=3)
    images = generate(student, 6, 11, y=y, exit_at=exit_at)
    assert (images - changed.clamp(-1, 1)).abs().max() < 1e-4


def test_a_student_in_half_precision(first_choice: Any) -> None:
    student = load_student(STUDENT)
    want = generate(student, 4, 3)
    got = generate(student.bfloat16(), 4, 3)
    assert isinstance(cache.engine_for(student, 4), CudaEngine)
    assert 0 < (got - want).abs().mean() < 0.05
