"""Plans: every kind of block against its module in float64, bits, memory, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from advkd import ops
from advkd.config import StudentConfig, UNetConfig
from advkd.engine import plan
from advkd.engine.cpu import Engine, describe, lower
from advkd.engine.lowering import LoweringError
from advkd.engine.networks import lower_student, lower_unet, time_plan
from advkd.models.layers import Conv3x3
from advkd.models.student import Student
from advkd.models.unet import UNet

pytestmark = pytest.mark.skipif(ops.extension is None, reason="the C++ extension is not installed")

# The budget of a network pass in float32, Winograd included.
TOLERANCE = 2e-5

SMALL = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
TEACHERS = {
    "small": (SMALL, (8, 8)),
    "one level": (
        dataclasses.replace(
            SMALL,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
        ),
        (5, 7),
    ),
    "as the default teacher": (
        dataclasses.replace(UNetConfig(), sample_size=28),
        (28, 28),
    ),
    "as google/ddpm-cifar10-32": (
        dataclasses.replace(
            SMALL,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=2,
            norm_num_groups=32,
            norm_eps=1e-6,
            freq_shift=1,
            flip_sin_to_cos=False,
            downsample_padding=0,
            dropout=0.1,
        ),
        (16, 16),
    ),
    "heads, odd widths, a rectangle": (
        dataclasses.replace(
            SMALL,
            in_channels=2,
            out_channels=2,
            block_out_channels=(12, 20),
            attention_head_dim=5,
        ),
        (6, 10),
    ),
    "attention at every level": (
        dataclasses.replace(
            SMALL,
            block_out_channels=(16, 24),
            down_block_types=("AttnDownBlock2D",) * 2,
            up_block_types=("AttnUpBlock2D",) * 2,
            attention_head_dim=8,
        ),
        (14, 14),
    ),
    "scaled, centred, without attention": (
        dataclasses.replace(
            SMALL,
            mid_block_scale_factor=1.4,
            add_attention=False,
            center_input_sample=True,
        ),
        (8, 8),
    ),
    "FiLM": (dataclasses.replace(SMALL, resnet_time_scale_shift="scale_shift"), (8, 8)),
    "resampled by resnets, FiLM, a rectangle": (
        dataclasses.replace(
            SMALL,
            in_channels=3,
            out_channels=3,
            block_out_channels=(12, 20, 24),
            norm_num_groups=2,
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=(4, 5, 24),
        ),
        (12, 20),
    ),
    "resampled by resnets": (
        dataclasses.replace(
            SMALL,
            block_out_channels=(16, 40),
            down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
            up_block_types=("ResnetUpsampleBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        ),
        (16, 8),
    ),
    "no middle block": (dataclasses.replace(SMALL, mid_block_type=None), (8, 8)),
    "sizes of other numbers": (dataclasses.replace(SMALL, sample_size=None), (22, 18)),
}
STUDENTS = {
    "unet": StudentConfig(stages=(4, 8), widths=(16, 8), attention=(4,), groups=4),
    "unet, three levels": StudentConfig(stages=(7, 14, 28), widths=(24, 16, 8), groups=4),
    "unet, some stages twice": StudentConfig(
        stages=(4, 4, 8, 8), widths=(16, 12, 12, 8), blocks=2, attention=(4, 8), groups=4
    ),
    "pyramid": StudentConfig(
        family="pyramid", stages=(4, 4, 8), widths=(16, 12, 8), attention=(4,), groups=4
    ),
    "pyramid, one width": StudentConfig(
        family="pyramid", stages=(3, 6, 12), widths=(8, 8, 8), groups=4
    ),
}


def scrambled(model: Any) -> Any:
    """The model with no parameter at a value, such as 0 or 1, that hides a mistake."""
    for parameter in model.parameters():
        # Of He's size, so that signals neither die nor blow up.
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        nn.init.normal_(parameter, std=fan_in**-0.5)
        if parameter.dim() == 1:
            parameter.data += 0.5
    return model.eval().requires_grad_(False)


def teacher(name: str = "small", num_classes: int | None = None) -> UNet:
    torch.manual_seed(0)
    config = dataclasses.replace(TEACHERS[name][0], num_class_embeds=num_classes)
    return scrambled(UNet(config))


def student(name: str = "unet", num_classes: int | None = None) -> Student:
    torch.manual_seed(0)
    config = STUDENTS[name]
    return scrambled(Student(config, config.stages[-1], 2, num_classes=num_classes))


def exactly(model: nn.Module, *args: Any) -> Tensor:
    """The module's own result in float64, by plain torch."""
    args = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    with ops.use_backend("reference"), torch.no_grad():
        return copy.deepcopy(model).double()(*args)


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def noise(model: UNet | Student, size: tuple[int, int], batch: int = 3) -> Tensor:
    channels = model.channels if isinstance(model, Student) else model.config.in_channels
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


# Against the modules.


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_equals_its_module(name: str, batch: int) -> None:
    unet, size = teacher(name), TEACHERS[name][1]
    x = noise(unet, size)
    found = lower(unet, size, batch=batch).run(x, t=7)
    assert found.dtype is torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert distance(found, exactly(unet, x, 7)) <= TOLERANCE


@pytest.mark.parametrize(
    "name", ["as google/ddpm-cifar10-32", "resampled by resnets, FiLM, a rectangle"]
)
@pytest.mark.parametrize("isa_name", ["portable", "avx2", "avx512"])
def test_teacher_on_every_instruction_set(isa_name: str, name: str) -> None:
    assert ops.extension is not None
    if isa_name not in ops.extension.isas():
        pytest.skip(f"this machine does not run {isa_name}")
    unet, size = teacher(name), TEACHERS[name][1]
    x, before = noise(unet, size), ops.extension.isa()
    ops.extension.set_isa(isa_name)
    try:
        found = lower(unet, size, batch=2).run(x, t=3)
    finally:
        ops.extension.set_isa(before)
    assert distance(found, exactly(unet, x, 3)) <= TOLERANCE


@pytest.mark.parametrize("t", [0, 1, 999])
def test_a_teacher_is_conditioned_on_the_time(t: int) -> None:
    unet = teacher()
    x = noise(unet, (8, 8))
    assert distance(lower(unet, (8, 8), batch=4).run(x, t=t), exactly(unet, x, t)) <= TOLERANCE


@pytest.mark.parametrize("name", ["small", "FiLM", "resampled by resnets, FiLM, a rectangle"])
@pytest.mark.parametrize("kind", [None, "timestep"])
def test_class_conditional_teachers_of_each_kind(name: str, kind: str | None) -> None:
    torch.manual_seed(0)
    config, size = TEACHERS[name]
    config = dataclasses.replace(config, num_class_embeds=5, class_embed_type=kind)
    unet = scrambled(UNet(config))
    x, y = noise(unet, size), torch.tensor([4, 0, 3])
    found = lower(unet, size, batch=2).run(x, y, t=9, nan_fill=True)
    assert distance(found, exactly(unet, x, 9, y)) <= TOLERANCE
    again = lower(unet, size, batch=2).run(x, y, t=9, threads=2)
    assert torch.equal(found, again)


def test_class_conditional_teacher() -> None:
    unet = teacher(num_classes=5)
    x, y = noise(unet, (8, 8)), torch.tensor([4, 0, 3])
    engine = lower(unet, (8, 8), batch=2)
    assert distance(engine.run(x, y, t=9), exactly(unet, x, 9, y)) <= TOLERANCE
    for wrong in (None, y[:2], y.int()):
        with pytest.raises(ValueError, match=r"labels|int64"):
            engine.run(x, wrong, t=9)
    for label in (-1, 5):
        with pytest.raises(ValueError, match=f"label {label} is not one of"):
            engine.run(x, torch.tensor([0, label, 0]), t=9)


@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("name", STUDENTS)
def test_student_equals_its_module(name: str, num_classes: int | None) -> None:
    model = student(name, num_classes)
    size = (model.size, model.size)
    x = noise(model, size)
    y = None if num_classes is None else torch.tensor([2, 0, 1])
    for exit_at in (None, *range(1, len(model.heads) + 1)):
        found = lower(model, size, batch=2, exit_at=exit_at).run(x, y=y)
        truth = exactly(model, x, y, exit_at)
        assert found.shape == truth.shape
        assert distance(found, truth) <= TOLERANCE


def test_shipped_networks() -> None:
    from advkd.pretrained import load_student, load_teacher

    for model in (load_teacher("zoo:fashion-mnist"), load_student("zoo:fashion-mnist-student")):
        x = noise(model, (28, 28), 2)
        y = None if model.num_classes is None else torch.tensor([3, 9])
        t = 500 if isinstance(model, UNet) else None
        args = (x, y) if t is None else (x, t, y)
        found = lower(model, (28, 28), batch=2).run(x, y, t=t)
        assert distance(found, exactly(model, *args)) <= TOLERANCE


# Bits.


@pytest.mark.parametrize("make", [teacher, student])
def test_bits_depend_neither_on_batch_nor_on_threads(make: Callable[..., Any]) -> None:
    model = make("small" if make is teacher else "unet, some stages twice", 3)
    x = noise(model, (8, 8), 21)
    y = torch.arange(21) % 3
    t = 11 if make is teacher else None
    engine = lower(model, (8, 8), batch=4)
    whole = engine.run(x, y, t=t, threads=1)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    for threads in (1, 2, 3, 8):
        assert torch.equal(engine.run(x[order], y[order], t=t, threads=threads), whole[order])
        for part in ([0], [20], [3, 7], [5, 6, 7, 8, 9]):
            assert torch.equal(engine.run(x[part], y[part], t=t, threads=threads), whole[part])
    assert torch.equal(lower(model, (8, 8), batch=4).run(x, y, t=t), whole)


def test_nothing_is_read_that_was_not_written() -> None:
    for model, t in ((teacher("as google/ddpm-cifar10-32"), 3), (student("pyramid"), None)):
        size = (16, 16) if t else (8, 8)
        x = noise(model, size, 5)
        engine = lower(model, size, batch=3)
        clean = engine.run(x, t=t, threads=2)
        assert torch.equal(engine.run(x, t=t, threads=2, nan_fill=True), clean)
        assert clean.isfinite().all()


def test_no_images() -> None:
    engine = lower(teacher(), (8, 8), batch=3)
    assert engine.run(torch.empty(0, 1, 8, 8), t=1).shape == (0, 1, 8, 8)


def test_an_engine_keeps_its_weights() -> None:
    model = teacher()
    x = noise(model, (8, 8))
    engine = lower(model, (8, 8), batch=3)
    before = engine.run(x, t=1)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(engine.run(x, t=1), before)


def test_layout_of_input_and_weights_does_not_matter() -> None:
    model = teacher()
    x = noise(model, (8, 8))
    expected = lower(model, (8, 8), batch=3).run(x, t=1)
    model.to(memory_format=torch.channels_last)
    strided = torch.empty(3, 1, 8, 16)[..., ::2].copy_(x)
    assert torch.equal(lower(model, (8, 8), batch=3).run(strided, t=1), expected)


# Memory.


def test_the_conditioning_holds_all_projections_of_the_time() -> None:
    model = teacher()
    rows = lower(model, (8, 8), batch=1).conditioning([0, 5, 999])
    blocks = [m for m in copy.deepcopy(model).double().modules() if hasattr(m, "time_emb_proj")]
    embedded = copy.deepcopy(model).double().embed(torch.tensor([0, 5, 999]), 3)
    truth = [b.time_emb_proj(nn.functional.silu(embedded)) + b.conv1.bias for b in blocks]
    assert distance(rows, torch.cat(truth, dim=1)) <= TOLERANCE


def together(lives: list[tuple[int, int]], i: int, j: int) -> bool:
    return lives[i][0] <= lives[j][1] and lives[j][0] <= lives[i][1]


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 200)), max_size=40)
)
def test_buffers_that_live_together_lie_apart(wanted: list[tuple[int, int, int]]) -> None:
    buffers = [plan.Buffer(1, 1, 1), plan.Buffer(1, 1, 1)]
    buffers += [plan.Buffer(1, 1, size) for *_, size in wanted]
    lives = [(min(a, b), max(a, b)) for a, b, _ in wanted]
    operations = [
        plan.Op(
            "", "", {}, (), tuple(
                plan.Part(i + 2, 0, 1, 1, 1) for i, life in enumerate(lives) if step in life
            )
        )
        for step in range(21)
    ]  # fmt: skip
    arena = plan.lay_out(buffers, operations)
    for i, a in enumerate(buffers[2:]):
        assert a.offset % 16 == 0
        assert a.offset + a.floats <= arena
        for j, b in enumerate(buffers[2 : i + 2]):
            apart = a.offset + a.floats <= b.offset or b.offset + b.floats <= a.offset
            assert apart or not together(lives, i, j)


def test_the_arena_is_much_smaller_than_all_buffers() -> None:
    found = lower(teacher("as google/ddpm-cifar10-32"), (16, 16), batch=1).plan
    assert found.arena < sum(buffer.floats for buffer in found.buffers) / 2


def test_describe_lists_memory_and_flops() -> None:
    engine = lower(teacher(), (8, 8), batch=2)
    lines = list(describe(engine, 2))
    assert len(lines) == len(engine.plan.ops) + 2
    assert any(line.split()[:2] == ["convolution", "conv_in"] for line in lines)
    convolution = next(op for op in engine.plan.ops if op.module == "conv_in")
    assert convolution.flops == 2 * 9 * 1 * 8 * 64
    assert engine.compiled.bytes(2, 1) >= 2 * 4 * engine.plan.arena


# What a plan cannot express.


def test_an_unknown_module_is_named() -> None:
    model = teacher()
    model.down_blocks[0].resnets[0].conv1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    with pytest.raises(LoweringError, match=r"down_blocks\.0\.resnets\.0\.conv1.* Sequential"):
        lower(model, (8, 8), batch=1)
    model = teacher()
    model.mid_block.extra = nn.ReLU()
    with pytest.raises(LoweringError, match=r"mid_block\.extra is a ReLU"):
        lower(model, (8, 8), batch=1)
    model = student()
    model.heads[1].conv = nn.Conv2d(8, 2, 3, padding=1, padding_mode="circular")
    with pytest.raises(LoweringError, match=r"heads\.1\.conv"):
        lower(model, (8, 8), batch=1)


def test_what_would_change_the_network_is_refused() -> None:
    model = teacher()
    model.conv_out.register_forward_hook(lambda *args: None)
    with pytest.raises(LoweringError, match="conv_out has hooks"):
        lower(model, (8, 8), batch=1)
    with pytest.raises(LoweringError, match="float32"):
        lower(teacher().double(), (8, 8), batch=1)
    dropping = teacher("as google/ddpm-cifar10-32").train()
    with pytest.raises(LoweringError, match=r"dropout.*eval\(\)"):
        lower(dropping, (16, 16), batch=1)
    with pytest.raises(ValueError, match="2 must divide"):
        lower(teacher(), (7, 8), batch=1)
    with pytest.raises(ValueError, match="takes 8x8"):
        lower(student(), (4, 4), batch=1)
    with pytest.raises(ValueError, match="exit_at=3"):
        lower(student(), (8, 8), batch=1, exit_at=3)
    with pytest.raises(ValueError, match="batch=0"):
        lower(teacher(), (8, 8), batch=0)


def zeros(x: Tensor, *args: object) -> Tensor:
    return torch.zeros_like(x)


def test_a_replaced_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = student()
    assert lower(model, (8, 8), batch=1)
    model.heads[1].forward = zeros
    with pytest.raises(LoweringError, match=r"heads\.1 has its own method forward"):
        lower(model, (8, 8), batch=1)
    model = student()
    model.forward = zeros
    with pytest.raises(LoweringError, match="the network has its own method forward"):
        lower(model, (8, 8), batch=1)
    model = teacher()
    model.embed = zeros
    with pytest.raises(LoweringError, match="the network has its own method embed"):
        lower(model, (8, 8), batch=1)
    model = teacher()
    for kind, name in ((type(model.mid_block), "mid_block"), (Conv3x3, "conv1"), (UNet, "network")):
        with monkeypatch.context() as patch, pytest.raises(LoweringError, match=name):
            patch.setattr(kind, "forward", zeros)
            lower(model, (8, 8), batch=1)
    assert lower(model, (8, 8), batch=1)


@pytest.fixture
def ambient() -> Iterator[None]:
    """The defaults of a program that computes in float64 on another device."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_a_plan_does_not_depend_on_ambient_defaults(request: pytest.FixtureRequest) -> None:
    models = [teacher("scaled, centred, without attention"), student(num_classes=3)]
    expected = [lowered(model) for model in models]
    request.getfixturevalue("ambient")
    for model, plans in zip(models, expected, strict=True):
        for ours, theirs in zip(lowered(model), plans, strict=True):
            assert ours.weights.dtype is torch.float32
            assert torch.equal(ours.weights, theirs.weights)


def lowered(model: UNet | Student) -> list[plan.Plan]:
    """The plan of a pass and, of a teacher, that of its conditioning."""
    if isinstance(model, Student):
        return [lower_student(model, (8, 8), 1, 1, None).plan.finished()]
    low = lower_unet(model, (8, 8), 1, 1)
    return [low.plan.finished(), time_plan(low, model)]


def test_inputs_that_do_not_fit_are_refused() -> None:
    engine = lower(teacher(), (8, 8), batch=1)
    for x in (torch.zeros(1, 1, 8, 7), torch.zeros(1, 8, 8), torch.zeros(1, 2, 8, 8)):
        with pytest.raises(ValueError, match=r"is not \(B, 1, 8, 8\)"):
            engine.run(x, t=1)
    with pytest.raises(ValueError, match="float32"):
        engine.run(torch.zeros(1, 1, 8, 8).double(), t=1)
    with pytest.raises(ValueError, match="time"):
        engine.run(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="unconditional"):
        engine.run(torch.zeros(1, 1, 8, 8), torch.tensor([0]), t=1)
    for threads in (-1, 1 << 13):
        with pytest.raises(ValueError, match=f"threads={threads}"):
            engine.run(torch.zeros(1, 1, 8, 8), t=1, threads=threads)


# Corrupt plans.

VICTIMS: list[Engine] = []


def victims() -> list[Engine]:
    """One plan with every kind of operation in it, or nearly."""
    if not VICTIMS:
        VICTIMS.append(lower(teacher(num_classes=3), (8, 8), batch=2))
        VICTIMS.append(lower(student("pyramid", 3), (8, 8), batch=2))
        VICTIMS.append(lower(student("unet, some stages twice"), (8, 8), batch=2))
        centred = teacher("scaled, centred, without attention")
        VICTIMS.append(lower(centred, (8, 8), batch=2))
    return VICTIMS


def changed(whole: plan.Plan, **changes: Any) -> plan.Plan:
    return dataclasses.replace(
        whole,
        buffers=[dataclasses.replace(b) for b in whole.buffers],
        ops=[dataclasses.replace(op, numbers=dict(op.numbers)) for op in whole.ops],
        **changes,
    )


def run_anyway(corrupt: plan.Plan) -> None:
    """Builds and runs a plan that may be wrong; ValueError is its only way to fail."""
    compiled = corrupt.compiled()
    # As large as any input or output that passes the checks may be.
    pixels = [b.height * b.width * b.channels for b in corrupt.buffers[:2]]
    if max(*pixels, corrupt.conditioning) > 1 << 20:
        return
    x, y = (torch.zeros(2 * n) for n in pixels)
    conditioning = torch.zeros(corrupt.conditioning + 1)
    labels = torch.zeros(2, dtype=torch.int64)
    compiled.run(
        x=x.data_ptr(), y=y.data_ptr(), conditioning=conditioning.data_ptr(),
        labels=labels.data_ptr(), images=2, threads=1, nan_fill=False,
    )  # fmt: skip


NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([1 << 15, 1 << 31, (1 << 31) - 1, 1 << 40, (1 << 63) - 1, -(1 << 63)]),
    st.integers(-(1 << 63), (1 << 63) - 1),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_corrupt_plan_is_an_exception(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(victims())).plan
    corrupt = changed(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        corrupt = data.draw(st.sampled_from([in_operation, in_buffer, in_list, in_head]))(
            data, corrupt
        )
    try:
        run_anyway(corrupt)
    except (ValueError, MemoryError):
        pass
    except TypeError as error:  # a number that does not fit into 64 bits
        assert "incompatible constructor arguments" in str(error)


def in_operation(data: st.DataObject, corrupt: plan.Plan) -> plan.Plan:
    op = data.draw(st.sampled_from(corrupt.ops))
    name = data.draw(st.sampled_from(sorted(op.numbers)))
    kind = data.draw(st.sampled_from(["near", "any", "gone", "other"]))
    if kind == "near":
        op.numbers[name] += data.draw(st.integers(-2, 2))
    elif kind == "any":
        op.numbers[name] = data.draw(NUMBERS)
    elif kind == "gone":
        del op.numbers[name]
        if not op.numbers:
            corrupt.ops.remove(op)
    else:
        other = data.draw(st.sampled_from(corrupt.ops))
        op.numbers[name] = data.draw(st.sampled_from(sorted(other.numbers.values()) or [0]))
    return corrupt


def in_buffer(data: st.DataObject, corrupt: plan.Plan) -> plan.Plan:
    buffer = data.draw(st.sampled_from(corrupt.buffers))
    name = data.draw(st.sampled_from(["height", "width", "channels", "offset"]))
    near = getattr(buffer, name) + data.draw(st.integers(-16, 16))
    setattr(buffer, name, data.draw(st.one_of(st.just(near), st.integers(-3, 1 << 20))))
    return corrupt


def in_list(data: st.DataObject, corrupt: plan.Plan) -> plan.Plan:
    i = data.draw(st.integers(0, len(corrupt.ops) - 1))
    j = data.draw(st.integers(0, len(corrupt.ops) - 1))
    kind = data.draw(st.sampled_from(["swap", "drop", "repeat", "rename"]))
    if kind == "swap":
        corrupt.ops[i], corrupt.ops[j] = corrupt.ops[j], corrupt.ops[i]
    elif kind == "drop" and len(corrupt.ops) > 1:
        del corrupt.ops[i]
    elif kind == "repeat":
        corrupt.ops.insert(j, corrupt.ops[i])
    else:
        name = data.draw(st.sampled_from([op.kind for op in corrupt.ops] + ["", "nothing"]))
        corrupt.ops[i] = dataclasses.replace(corrupt.ops[i], kind=name)
    return corrupt


def in_head(data: st.DataObject, corrupt: plan.Plan) -> plan.Plan:
    name = data.draw(st.sampled_from(["arena", "conditioning", "classes", "batch"]))
    before = getattr(corrupt, name)
    value = data.draw(st.one_of(st.integers(-1, before), st.just(1 << 62)))
    return changed(corrupt, **{name: value})


@pytest.mark.parametrize(
    ("words", "spoil"),
    [
        ("does not lie in the arena", lambda p: setattr(p.buffers[5], "offset", p.arena)),
        ("has an offset", lambda p: setattr(p.buffers[0], "offset", 16)),
        ("impossible shape", lambda p: setattr(p.buffers[3], "channels", 0)),
        ("there is no such kind", lambda p: rename(p, "convolution", "konvolution")),
        ("it has no kernel", lambda p: drop(p, "convolution", "kernel")),
        ("not known", lambda p: number(p, "norm", "surprise", 1)),
        ("packed=-1 is not between", lambda p: number(p, "convolution", "packed", -1)),
        ("packed=.* is not between", lambda p: number(p, "convolution", "packed", 1 << 40)),
        ("no kernel serves", lambda p: number(p, "convolution", "kernel", 2)),
        ("groups do not divide", lambda p: number(p, "norm", "groups", 3)),
        ("other pixels", lambda p: number(p, "convolution", "height", 9)),
        ("reads what nothing has written", lambda p: p.ops.insert(0, p.ops.pop(-2))),
        ("nothing writes the whole output", lambda p: p.ops.pop()),
        ("writes to the input", lambda p: p.ops[-1].numbers.update(y=0)),
    ],
)
def test_what_is_wrong_is_said(words: str, spoil: Callable[[plan.Plan], object]) -> None:
    corrupt = changed(lower(teacher(), (8, 8), batch=2).plan)
    spoil(corrupt)
    with pytest.raises(ValueError, match=f"corrupt plan: .*{words}"):
        corrupt.compiled()


@pytest.mark.parametrize(
    ("words", "spoil"),
    [
        ("it has no film", lambda p: drop(p, "film", "film_conditioning")),
        ("film_conditioning=.* is not", lambda p: number(p, "film", "film_conditioning", -1)),
        ("scale is not dense", lambda p: number(p, "film", "channels", 1)),
        ("fewer channels than", lambda p: number(p, "film", "channels", 1 << 19)),
        ("sides are not even", lambda p: number(p, "average_pool", "height", 3)),
        ("other pixels", lambda p: number(p, "average_pool", "width", 4)),
        ("silu=2 is not between", lambda p: number(p, "average_pool", "silu", 2)),
        ("not known", lambda p: number(p, "average_pool", "y_scale", 1)),
    ],
)
def test_what_is_wrong_with_operations_of_teachers(
    words: str, spoil: Callable[[plan.Plan], object]
) -> None:
    name = "resampled by resnets, FiLM, a rectangle"
    corrupt = changed(lower(teacher(name), TEACHERS[name][1], batch=2).plan)
    corrupt.compiled()
    spoil(corrupt)
    with pytest.raises(ValueError, match=f"corrupt plan: .*{words}"):
        corrupt.compiled()


def test_buffers_that_overlap_are_refused() -> None:
    whole = lower(teacher(), (8, 8), batch=2).plan
    lives = plan.lives_of(whole.buffers, whole.ops)
    i, j = next(
        (i, j)
        for i in range(2, len(lives))
        for j in range(2, len(lives))
        if i != j and together(lives, i, j)
    )
    corrupt = changed(whole)
    corrupt.buffers[i].offset = corrupt.buffers[j].offset
    with pytest.raises(ValueError, match=r"overlap|does not lie"):
        corrupt.compiled()


def first(corrupt: plan.Plan, kind: str) -> plan.Op:
    return next(op for op in corrupt.ops if op.kind == kind)


def rename(corrupt: plan.Plan, kind: str, name: str) -> None:
    i = next(i for i, op in enumerate(corrupt.ops) if op.kind == kind)
    corrupt.ops[i] = dataclasses.replace(corrupt.ops[i], kind=name)


def drop(corrupt: plan.Plan, kind: str, name: str) -> None:
    del first(corrupt, kind).numbers[name]


def number(corrupt: plan.Plan, kind: str, name: str, value: int) -> None:
    first(corrupt, kind).numbers[name] = value
