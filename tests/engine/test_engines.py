"""One interface, several engines: which one serves, when one is made anew, and adding another."""

from __future__ import annotations

import copy
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import advkd
from advkd import ops
from advkd.config import StudentConfig, UNetConfig
from advkd.diffusion import Schedule, ddim_table, ddpm_table
from advkd.engine import cache
from advkd.engine.cpu import CpuEngine
from advkd.engine.eager import EagerEngine
from advkd.engine.interface import Engine, patched
from advkd.engine.lowering import LoweringError
from advkd.engine.noise import Noise, Purpose
from advkd.models.layers import Attention, ResnetBlock
from advkd.models.student import Head, Student
from advkd.models.unet import UNet

NOISE = Noise(5, Purpose.SAMPLING)
needs_extension = pytest.mark.skipif(ops.extension is None, reason="the extension is missing")


def small_teacher(num_classes: int | None = None) -> UNet:
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=num_classes,
    )
    return UNet(config, Schedule(num_train_timesteps=20)).eval().requires_grad_(False)


def small_student(num_classes: int | None = None) -> Student:
    torch.manual_seed(0)
    config = StudentConfig(stages=(4, 8), widths=(16, 8), attention=(4,), groups=4)
    return Student(config, 8, 1, "denoised", num_classes).eval().requires_grad_(False)


def halved(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def patched_forward(*args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * forward(*args, **kwargs)

    return patched_forward


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether images agree, but for what fused ops round otherwise than their references."""
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def images(model: UNet | Student | Engine) -> Tensor:
    return advkd.generate(model, 5, 3, steps=4)


# Which one serves.


@needs_extension
@pytest.mark.parametrize("make", [small_teacher, small_student])
def test_the_cpu_engine_serves_and_agrees_with_the_eager_one(make: Any) -> None:
    model = make()
    assert isinstance(cache.engine_for(model, 5), CpuEngine)
    fused = images(model)
    with ops.use_backend("reference"):
        assert isinstance(cache.engine_for(model, 5), EagerEngine)
        torch.testing.assert_close(images(model), fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conditional", [False, True])
def test_engines_keep_one_contract(conditional: bool) -> None:
    model = small_teacher(3 if conditional else None)
    table, indices = ddpm_table(model.schedule, 5), torch.tensor([4, 0, 9])
    y = NOISE.labels(indices, model.num_classes)
    found = {}
    for kind in (EagerEngine, CpuEngine):
        if kind is CpuEngine and ops.extension is None:
            continue
        engine = kind.make(model, (8, 8), kind.batch_for(3), None)
        assert engine.shape == (1, 8, 8) and engine.classes == model.num_classes
        assert engine.schedule is model.schedule
        steps: list[tuple[int, int]] = []
        polled: list[int] = []
        targets = engine.sample(
            table, NOISE, indices, y, saved=[2, 5], target="state",
            on_step=lambda done, N, steps=steps: steps.append((done, N)),
            poll=lambda polled=polled: polled.append(0),
        )  # fmt: skip
        assert targets.shape == (3, 2, 1, 8, 8) and targets.dtype == torch.float32
        assert steps == [(i, 5) for i in range(1, 6)] and len(polled) >= 5
        out = torch.full((3, 2, 1, 8, 8), torch.nan, dtype=torch.float16)
        assert engine.sample(table, NOISE, indices, y, saved=[2, 5], target="state", out=out) is out
        torch.testing.assert_close(out.float(), targets, rtol=1e-3, atol=1e-3)
        x = NOISE.x_T(indices, engine.shape)
        torch.testing.assert_close(engine.run(x, y, t=7), model(x, 7, y), rtol=1e-4, atol=1e-4)
        found[engine.name] = targets
        for wrong in (
            {"saved": [0]}, {"saved": [3, 2]}, {"saved": [6]}, {"saved": [5], "target": "noise"},
            {"saved": [5], "out": torch.empty(3, 1, 1, 8, 9)},
            {"saved": [5], "out": torch.empty(3, 1, 1, 8, 8, dtype=torch.float64)},
        ):  # fmt: skip
            with pytest.raises(ValueError, match=r"saved|target|out"):
                engine.sample(table, NOISE, indices, y, **wrong)
        with pytest.raises(ValueError, match=r"class-conditional|unconditional"):
            engine.sample(table, NOISE, indices, None if conditional else indices, saved=[5])
        with pytest.raises(ValueError, match="time"):
            engine.run(x, y)
    for targets in found.values():
        torch.testing.assert_close(targets, found["eager"], rtol=1e-4, atol=1e-4)


def test_threads_that_share_a_network_do_not_disturb_each_other() -> None:
    model = small_teacher()
    expected = [advkd.generate(model, 6, seed, steps=6) for seed in range(4)]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = advkd.generate(model, 6, seed, steps=6)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert torch.equal(found[seed], expected[seed])


# What a program replaces takes effect.


def patch_head(student: Student) -> None:
    head = student.heads[-1]
    head.forward = halved(head.forward)  # type: ignore[method-assign]


def patch_block(student: Student) -> None:
    block = student.submodules[0].blocks[0]
    block.forward = types.MethodType(halved(ResnetBlock.forward), block)  # type: ignore[method-assign]


def patch_student(student: Student) -> None:
    student.forward = halved(student.forward)  # type: ignore[method-assign]


def patch_trunk(student: Student) -> None:
    trunk = student._trunk
    student._trunk = lambda *args: [-h for h in trunk(*args)]  # type: ignore[method-assign]


def patch_leaf(student: Student) -> None:
    conv = student.heads[-1].conv
    conv.forward = halved(conv.forward)  # type: ignore[union-attr, method-assign]


PATCHES = [patch_head, patch_block, patch_student, patch_trunk, patch_leaf]


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("sampled_before", [False, True])
def test_a_replaced_method_of_an_object_takes_effect(patch: Any, sampled_before: bool) -> None:
    student = small_student()
    before = images(student) if sampled_before else None
    patch(student)
    assert patched(student) is not None
    with ops.use_backend("reference"):
        expected = images(student)
    assert close(images(student), expected)
    if before is not None:
        assert (before - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [Head, ResnetBlock, Attention, torch.nn.Conv2d])
def test_a_replaced_method_of_a_class_takes_effect(
    kind: type[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = small_student()
    before = images(student)
    assert patched(student) is None
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", halved(kind.forward))
        assert patched(student) == f"{kind.__name__}.forward"
        assert (images(student) - before).abs().max() > 1e-2
    assert torch.equal(images(student), before)


def test_a_hook_takes_effect_until_it_is_removed() -> None:
    student = small_student()
    before = images(student)
    hook = student.heads[-1].register_forward_hook(lambda module, given, out: 0.5 * out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert (images(student) - before).abs().max() > 1e-2
    hook.remove()
    assert torch.equal(images(student), before)


@needs_extension
def test_a_network_that_no_plan_expresses_is_sampled_by_torch_with_one_warning() -> None:
    student = small_student()
    student.heads[-1].register_forward_hook(lambda module, given, out: None)
    with pytest.warns(UserWarning, match="has hooks"):
        first = images(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(images(student), first)
        with ops.use_backend("reference"):
            assert close(images(student), first)


# Adding one.


class NegativeEngine(EagerEngine):
    """A toy: the eager engine, but every image is its negative."""

    name = "negative"

    @classmethod
    def unavailable(cls, model: UNet | Student) -> str | None:
        return None if isinstance(model, Student) else "a teacher is left to others"

    def run(self, x: Tensor, y: Tensor | None = None, **how: Any) -> Tensor:
        return -super().run(x, y, **how)


@pytest.fixture
def negative() -> Iterator[None]:
    cache.ENGINES.insert(0, NegativeEngine)
    yield
    cache.ENGINES.remove(NegativeEngine)


def test_an_engine_is_added_by_one_entry(negative: None) -> None:
    student, teacher = small_student(), small_teacher()
    assert isinstance(cache.engine_for(student, 2), NegativeEngine)
    assert not isinstance(cache.engine_for(teacher, 2), NegativeEngine)
    with ops.use_backend("reference"):
        expected = images(student)
    assert close(images(student), -expected)
    assert close(images(advkd.compile(student)), -expected)


class RefusingEngine(EagerEngine):
    """A toy that learns only in `make` that it cannot."""

    @classmethod
    def make(cls, *arguments: Any) -> RefusingEngine:
        raise LoweringError("out of toys")


def test_an_engine_that_refuses_late_falls_back_with_one_warning() -> None:
    cache.ENGINES.insert(0, RefusingEngine)
    try:
        student = small_student()
        with pytest.warns(UserWarning, match="out of toys"):
            found = images(student)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(images(student), found)
        with pytest.warns(UserWarning, match="out of toys"):
            assert isinstance(advkd.compile(student), EagerEngine)
    finally:
        cache.ENGINES.remove(RefusingEngine)


def test_engines_are_few_and_made_anew_for_new_weights() -> None:
    teacher = small_teacher()
    table = ddim_table(teacher.schedule, 3)
    before = cache.engine_for(teacher, 2)
    if isinstance(before, EagerEngine):
        pytest.skip("the extension is missing")
    assert cache.engine_for(teacher, 3) is before
    assert cache.engine_for(teacher, 40) is not before
    first = before.sample(table, NOISE, torch.arange(2), saved=[3])
    teacher.conv_out.weight.data.mul_(2)  # past torch's version counter
    after = cache.engine_for(teacher, 2)
    assert after is not before
    assert not torch.equal(after.sample(table, NOISE, torch.arange(2), saved=[3]), first)


@pytest.mark.parametrize("default", [torch.float64, torch.float16, "meta"])
@pytest.mark.parametrize("make", [small_teacher, small_student])
def test_no_default_of_a_program_reaches_an_engine(make: Any, default: torch.dtype | str) -> None:
    model = make()
    expected = images(model)
    try:
        if isinstance(default, str):
            torch.set_default_device(default)
        else:
            torch.set_default_dtype(default)
        found = images(model), images(advkd.compile(make_alike(model), 5))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


def make_alike(model: UNet | Student) -> UNet | Student:
    """A copy of which no engine is known yet."""
    return copy.deepcopy(model)


def test_any_replaced_method_of_a_class_takes_effect_also_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = small_student()
    before = images(student)  # its engine is cached from here on
    trunk = Student._trunk
    monkeypatch.setattr(Student, "_trunk", lambda self, *args: [-h for h in trunk(self, *args)])
    assert patched(student) == "Student._trunk"
    assert (images(student) - before).abs().max() > 1e-2
    monkeypatch.undo()
    assert torch.equal(images(student), before)
