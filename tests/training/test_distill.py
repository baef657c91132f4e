"""Distillation: the gradients are those of the stated losses; schedules, resuming, stopping."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from advkd.config import Config, ConfigError, StudentConfig
from advkd.console import StopSignals
from advkd.data.images import ImageSet
from advkd.data.trajectories import Trajectories
from advkd.errors import Interrupted, TrainingError
from advkd.files import read_tensors
from advkd.parallel import Workers
from advkd.pretrained import load_student
from advkd.training import distill
from advkd.training import losses as losses_module
from advkd.training.batches import Batch, Drawn, Labeled
from advkd.training.checkpoint import latest_checkpoint
from advkd.training.distill import Distillation, StepPlan, distill_student
from advkd.training.losses import huber

from .tiny import CONFIG, CPU, changed, metrics, photos, sampled


def in_float64(
    config: Config, store: Trajectories, images: ImageSet | None = None
) -> tuple[Distillation, Batch]:
    training = Distillation(config, store, images)
    training.student.double()
    training.discriminator.double()
    fresh = not training.paired
    drawn = training.batches.drawn(0, range(3), fresh, training.plan(0).apart > 0)
    batch = training.made(drawn)

    def doubled(given: Labeled | None) -> Labeled | None:
        return Labeled(given.x.double(), given.y) if given else None

    targets = {k: x.double() for k, x in batch.targets.items()}
    extra = doubled(batch.fresh), doubled(batch.images)
    moved = batch.of_real, batch.of_fake, doubled(batch.other)
    return training, Batch(batch.x_T.double(), targets, batch.y, batch.last, *extra, *moved)


def everything(training: Distillation, seen: dict[int, float] | None = None) -> StepPlan:
    """A step that computes all there is to compute."""
    heads = len(training.stages)
    return StepPlan(heads, 1, {heads - 1: 1.0} if seen is None else seen, tuple(range(heads)))


# The losses, written as the formulas are.


def stated_rho(error: Tensor, rho: str, delta: float) -> Tensor:
    if rho == "l2":
        return (error**2).mean()
    size = error.abs()
    return torch.where(size < delta, size**2 / (2 * delta), size - delta / 2).mean()


def stated_losses(training: Distillation, batch: Batch, plan: StepPlan) -> tuple[Tensor, Tensor]:
    """L_G and L_D as the module's header states them, each with a graph of its own."""
    s, D = training.settings, training.discriminator
    images = training.student.states(batch.x_T, batch.y)
    fakes, x_T, y_fake = images, batch.x_T, batch.y
    if s.adversary == "fresh":
        assert batch.fresh is not None
        fakes, x_T = training.student.states(*batch.fresh), None
        y_fake = batch.fresh.y
    paired_logits = s.adversarial_loss == "relativistic"
    loss_g = loss_d = torch.zeros((), dtype=torch.float64)
    for k in range(plan.heads):
        error = images[k] - batch.targets[k]
        rho = stated_rho(error, s.rho, s.huber_delta)
        loss_g = loss_g + plan.reconstruct * training.weights[k] * s.lambda_rec * rho
        shown, y_real = batch.targets[k], batch.y
        if batch.images is not None and k == 2:
            shown, y_real = batch.images
        real = shown.clone().requires_grad_()
        view_real = view_fake = torch.nn.Identity()
        if k == 2 and batch.of_real is not None and batch.of_fake is not None:
            view_real, view_fake = batch.of_real, batch.of_fake
        real_logits = D(view_real(real), x_T, k, y_real)
        if k in plan.seen:
            fake_logits = D(view_fake(fakes[k]), x_T, k, y_fake)
            versus = real_logits.detach() if paired_logits else 0
            adversarial = torch.log1p(torch.exp(versus - fake_logits)).mean()
            loss_g = loss_g + plan.seen[k] * s.lambda_adv * adversarial
            fake_logits = D(view_fake(fakes[k].detach()), x_T, k, y_fake)
            if paired_logits:
                apart = torch.log1p(torch.exp(fake_logits - real_logits))
            else:
                apart = torch.log1p(torch.exp(-real_logits)) + torch.log1p(torch.exp(fake_logits))
            loss_d = loss_d + plan.seen[k] * apart.mean()
        if k in plan.penalize:
            fake = fakes[k].detach().requires_grad_()
            fake_logits = D(view_fake(fake), x_T, k, y_fake)
            penalized = ((real_logits, real, s.r1_gamma), (fake_logits, fake, s.r2_gamma))
            for logits, x, gamma in penalized:
                (gradient,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
                norm = (gradient**2).flatten(1).sum(dim=1).mean()
                loss_d = loss_d + training.weights[k] * gamma / 2 * s.r1_every * norm
    if plan.apart:
        assert batch.other is not None
        others = training.student.states(*batch.other)[-1]
        for i, (fake, other) in enumerate(zip(fakes[-1], others, strict=True)):
            wanted = training.typical[0 if batch.other.y is None else int(batch.other.y[i])]
            short = torch.relu(wanted - (fake - other).abs().mean())
            loss_g = loss_g + plan.apart * s.lambda_div * short / len(others)
    return loss_g, loss_d


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("penalize", [(), (2,), (0, 1, 2)])
@pytest.mark.parametrize(
    ("changes", "heads", "seen"),
    [
        (
            {"adversary": "fresh", "translate": 2, "cutout": 3, "r2_gamma": 0.7, "rec_every": 3},
            3,
            {2: 1.0},
        ),
        ({"adversary": "fresh"}, 3, {0: 0.5, 1: 0.5, 2: 1.0}),
        ({"adversary": "fresh", "real_images": False}, 3, {2: 1.0}),
        ({}, 3, {0: 0.5, 1: 0.5, 2: 1.0}),
        ({}, 3, {2: 1.0}),
        ({"rho": "l2", "lambda_rec": 3.0, "lambda_adv": 0.3}, 3, {0: 0.25, 1: 0.25, 2: 1.0}),
        ({"lambda_rec": 0.0, "head_weights": (2.0, 0.5, 1.0)}, 2, {0: 2.0, 1: 0.5}),
        ({"adversary": "fresh", "adversarial_loss": "relativistic"}, 3, {0: 0.5, 1: 0.5, 2: 1.0}),
        ({"adversarial_loss": "relativistic"}, 3, {2: 1.0}),
        ({"adversary": "fresh", "lambda_div": 7.0, "lambda_rec": 0.0}, 3, {2: 1.0}),
        ({"adversary": "fresh", "lambda_div": 7.0, "real_images": False}, 3, {2: 1.0}),
    ],
)
def test_gradients_are_those_of_the_losses(
    request: pytest.FixtureRequest,
    changes: dict[str, Any],
    heads: int,
    seen: dict[int, float],
    penalize: tuple[int, ...],
    classes: bool,
) -> None:
    """One backward pass through D serves both networks; here each has two passes of its own."""
    found_in = request.getfixturevalue("store_with_classes" if classes else "store")
    training, batch = in_float64(changed(**changes), found_in, photos(classes))
    assert (batch.y is not None) == classes
    assert (batch.fresh is not None) == ("adversary" in changes)
    assert (batch.images is not None) == ("adversary" in changes and "real_images" not in changes)
    with torch.no_grad():  # a head whose images D is sure of: logits away from 0
        training.discriminator.out.bias.add_(2.0)
    plan = StepPlan(heads, training.settings.rec_every, seen, penalize)
    if training.settings.lambda_div:
        plan = plan._replace(apart=training.settings.div_every)
    if max(penalize, default=0) >= heads:
        plan = plan._replace(penalize=())
    found, _ = training.gradients(batch, plan)
    loss_g, loss_d = stated_losses(training, batch, plan)
    unused = {"allow_unused": True, "materialize_grads": True}
    of_g, of_d = training.student.named_parameters(), training.discriminator.named_parameters()
    names_g, parameters_g = zip(*of_g, strict=True)
    names_d, parameters_d = zip(*of_d, strict=True)
    expected = [
        *torch.autograd.grad(loss_g, parameters_g, **unused),
        *torch.autograd.grad(loss_d, parameters_d, **unused),
    ]
    largest = max(gradient.abs().max().item() for gradient in expected)
    tolerance = 1e4 * torch.finfo(torch.float64).eps * largest  # long sums, a few networks deep
    for name, ours, theirs in zip((*names_g, *names_d), found, expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance, name
    used = [name for name, g in zip(names_g, expected, strict=False) if g.abs().max() > 0]
    assert len(used) > len(names_g) // 2


@pytest.mark.parametrize("bias", [-60.0, -100.0, -1000.0])
def test_the_students_gradient_survives_a_discriminator_that_is_sure(
    store: Trajectories, bias: float
) -> None:
    """In float32, where sigmoid(-104) is 0: the adversarial gradient is that of -D(xhat)."""
    training = Distillation(changed(lambda_rec=0.0), store)
    with torch.no_grad():
        training.discriminator.out.bias.add_(bias)
    batch = training.batch(0)
    found, _ = training.gradients(batch, everything(training)._replace(penalize=()))
    training, batch = in_float64(changed(lambda_rec=0.0), store)
    image = training.student.states(batch.x_T, batch.y)[2]
    loss = -training.discriminator(image, batch.x_T, 2).mean()
    parameters = list(training.student.parameters())
    expected = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    largest = max(gradient.abs().max().item() for gradient in expected)
    assert largest > 1e-4
    for ours, theirs in zip(found, expected, strict=False):
        assert (ours - theirs).abs().max() <= 1e4 * torch.finfo(torch.float32).eps * largest


def test_fresh_noise_is_never_seen_twice(store: Trajectories) -> None:
    training = Distillation(changed(adversary="fresh"), store, photos(False))
    stored = store.x_T(torch.arange(24))
    seen = [*stored]
    for step in range(4):
        batch = training.batch(step)
        assert batch.fresh is not None
        assert batch.images is not None
        assert all(any(torch.equal(x, known) for known in stored) for x in batch.x_T)
        seen += [*batch.fresh.x]
        again = training.batch(step)
        assert again.fresh is not None
        assert again.images is not None
        torch.testing.assert_close(again.fresh.x, batch.fresh.x, rtol=0, atol=0)
        torch.testing.assert_close(again.images.x, batch.images.x, rtol=0, atol=0)
    apart = torch.cdist(torch.stack(seen).flatten(1), torch.stack(seen).flatten(1))
    assert (apart + 100 * torch.eye(len(seen))).min() > 1


def test_real_images_must_fit(store: Trajectories, store_with_classes: Trajectories) -> None:
    config = changed(adversary="fresh")
    with pytest.raises(ConfigError, match="photos has images of 16x16 with 1 channels, the"):
        Distillation(config, store, photos(False, size=16))
    with pytest.raises(ConfigError, match="3 classes, but photos has no labels that fit"):
        Distillation(config, store_with_classes, photos(False))
    # Where they are not asked for, they may be anything.
    Distillation(changed(), store, photos(False, size=16))
    Distillation(changed(adversary="fresh", real_images=False), store_with_classes, photos(False))


def test_r1_is_the_plain_formula(store: Trajectories) -> None:
    training, batch = in_float64(CONFIG, store)
    total = 0.0
    for k, weight in enumerate(training.weights):
        x = batch.targets[k]
        for i in range(len(x)):  # one image after the other, by finite differences in one direction
            image = x[i : i + 1].clone().requires_grad_()
            logit = training.discriminator(image, batch.x_T[i : i + 1], k)
            (gradient,) = torch.autograd.grad(logit.sum(), image)
            h = 1e-6
            with torch.no_grad():
                there = training.discriminator(image + h * gradient, batch.x_T[i : i + 1], k)
                back = training.discriminator(image - h * gradient, batch.x_T[i : i + 1], k)
            total += weight * ((there - back) / (2 * h)).item() / len(x)
    penalty, logged = training.penalty(batch, range(3), [])
    assert logged["r1"].item() > 0 and "r2" not in logged
    assert logged["r1"].item() == pytest.approx(total, rel=1e-6)
    assert penalty.item() == pytest.approx(training.settings.r1_gamma / 2 * total, rel=1e-6)


def weights_of(training: Distillation) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}": tensor.clone()
        for prefix, module in (
            ("student", training.student),
            ("ema", training.ema.model),
            ("d", training.discriminator),
        )
        for name, tensor in module.state_dict().items()
    }


@pytest.mark.parametrize("family", ["unet", "pyramid"])
def test_progressive_leaves_later_submodules_untouched(family: str, store: Trajectories) -> None:
    config = changed(schedule="progressive", grow_until=2 / 3, steps=6, warmup=1)
    student = dataclasses.replace(config.student, family=family)
    training = Distillation(dataclasses.replace(config, student=student), store)
    before = weights_of(training)
    with Workers(1, CPU) as workers:
        for step, heads in ((0, 1), (1, 1), (2, 2), (3, 2), (4, 3)):
            logged = training.step(step, workers)
            assert {key for key in logged if key.startswith("rec_")} == {
                f"rec_{k + 1}" for k in range(heads)
            }
            now = weights_of(training)
            moved = {name for name in now if not torch.equal(now[name], before[name])}
            for part in ("student", "ema"):
                for k in range(3):
                    module = (f"{part}.submodules.{k}.", f"{part}.heads.{k}.")
                    touched = [name for name in moved if name.startswith(module)]
                    assert bool(touched) == (k < heads), (part, k, step)
            assert ("d.entrances.8.weight" in moved) == (heads == 3)


def test_the_adversary_enters_late(store: Trajectories) -> None:
    training = Distillation(
        changed(adversary="fresh", adversary_after=2 / 12), store, photos(False)
    )
    before = weights_of(training)
    with Workers(1, CPU) as workers:
        for step in range(4):
            batch = training.batch(step)
            assert (batch.fresh is None) == (batch.images is None) == (step < 2)
            logged = training.step(step, workers)
            assert {"adv_3", "logit_gap_3", "loss_d", "grad_d"}.isdisjoint(logged) == (step < 2)
            assert set(training.brief(logged)) >= {"rec"}
            now = weights_of(training)
            moved = {name for name in now if not torch.equal(now[name], before[name])}
            assert any(name.startswith("d.") for name in moved) == (step >= 2)
            assert any(name.startswith("student.") for name in moved)
            rate = training.optimizer_d.param_groups[0]["lr"]
            if step >= 2:  # it has a warm-up of 2 steps of its own
                assert rate == pytest.approx(training.settings.lr_d * (step - 1) / 2)


@pytest.mark.parametrize("stopped_after", [3, 5])
def test_late_and_fresh_is_resumed_to_the_bit(
    store: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    config = changed(adversary="fresh", adversary_after=0.6, steps=7)
    distill_student(config, store, tmp_path / "whole", photos(False))
    with monkeypatch.context() as patch:
        stop_after(patch, stopped_after)
        with pytest.raises(Interrupted):
            distill_student(config, store, tmp_path / "cut", photos(False))
    distill_student(config, store, tmp_path / "cut", photos(False))
    assert_same_student(tmp_path / "cut", tmp_path / "whole")


def test_what_a_step_computes(store: Trajectories) -> None:
    def plans(**changes: Any) -> list[StepPlan]:
        training = Distillation(changed(**changes), store, photos(False))
        return [training.plan(step) for step in range(6)]

    late = {"adversary": "fresh", "adversary_after": 2 / 12, "r1_every": 4, "inner_every": 2}
    assert [p.penalize for p in plans(**late)] == [(), (), (), (), (0, 1, 2), ()]
    assert [set(p.seen) for p in plans(**late)][1:5] == [set(), {0, 1, 2}, {2}, {0, 1, 2}]
    last = plans(**late, adversary_heads="last")
    assert [set(p.seen) for p in last] == [set()] * 2 + [{2}] * 4
    assert [p.penalize for p in last] == [(), (), (), (), (2,), ()]
    # Without D every step reconstructs; with it, every third three times as heavily.
    assert [p.reconstruct for p in plans(**late, rec_every=3)] == [1, 1, 0, 3, 0, 0]
    assert [p.reconstruct for p in plans(lambda_rec=0.0)] == [0] * 6
    assert [p.apart for p in plans(**late)] == [0] * 6
    assert [p.apart for p in plans(**late, lambda_div=1.0, div_every=3)] == [0, 0, 0, 3, 0, 0]
    assert plans(r1_gamma=0.0)[0].penalize == ()
    assert plans(r1_gamma=0.0, r2_gamma=1.0)[0].penalize == (0, 1, 2)


def test_what_is_covered_gets_no_gradient(store: Trajectories) -> None:
    """The student's gradient is that of what D saw: moved back, and 0 below the square."""
    settings = changed(adversary="fresh", translate=1, cutout=5, lambda_rec=0.0)
    training, batch = in_float64(settings, store, photos(False))
    assert batch.of_fake is not None and batch.of_real is not None
    assert not torch.equal(batch.of_fake.offsets, batch.of_real.offsets)
    fake = torch.zeros(6, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    _, logits = training.logits(batch, 2, fake)
    (gradient,) = torch.autograd.grad(logits.sum(), fake)
    seen = batch.of_fake(fake)
    (sources,) = torch.autograd.grad(seen, fake, torch.ones_like(seen))
    assert 0 < (sources == 0).double().mean() < 1
    assert torch.equal(gradient != 0, sources != 0)


@pytest.mark.parametrize("changes", [{}, {"adversary": "fresh", "lambda_div": 1.0}], ids=str)
def test_bfloat16_serves_the_networks_and_float32_the_losses(
    store: Trajectories, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The penalty, which is differentiated twice, has float32 throughout; so have all weights."""
    given = changed(**changes)
    penalties, losses = [], []
    slope, rho = Distillation.squared_slope, losses_module.RECONSTRUCTION["huber"]

    def watched_slope(self: Distillation, *arguments: Any) -> Tensor:
        with Dtypes() as seen:
            found = slope(self, *arguments)
        penalties.append(seen.found)
        return found

    def watched_rho(error: Tensor, delta: float) -> Tensor:
        losses.append(error.dtype)
        return rho(error, delta)

    monkeypatch.setattr(Distillation, "squared_slope", watched_slope)
    monkeypatch.setitem(losses_module.RECONSTRUCTION, "huber", watched_rho)
    found = {}
    for dtype in ("float32", "bfloat16"):
        run = dataclasses.replace(given.run, dtype=dtype)
        training = Distillation(dataclasses.replace(given, run=run), store, photos(False))
        plan = training.plan(0)
        assert plan.penalize and plan.reconstruct and len(plan.seen) == 3
        with Dtypes() as seen:
            gradients, values = training.gradients(training.batch(0), plan)
        assert (torch.bfloat16 in seen.found) == (dtype == "bfloat16")
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        found[dtype] = torch.cat([gradient.flatten() for gradient in gradients]), values
    assert {*losses} == {torch.float32} and penalties
    assert all(torch.bfloat16 not in of for of in penalties)
    (exact, expected), (rounded, values) = found["float32"], found["bfloat16"]
    # bfloat16 keeps 8 bits; errors of some layers add up.
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()
    for name, value in expected.items():
        assert value == pytest.approx(float(values[name]), rel=0.1, abs=0.02), name


class Dtypes(TorchDispatchMode):
    """The dtypes of all that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= {x.dtype for x in tree_leaves(out) if isinstance(x, Tensor)}
        return out


def test_a_new_distillation_leaves_the_users_generator_alone(store: Trajectories) -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    training = Distillation(CONFIG, store)
    assert torch.equal(torch.rand(3), expected)
    before = weights_of(training)
    assert all(
        torch.equal(before[k], v) for k, v in weights_of(Distillation(CONFIG, store)).items()
    )


def test_joint_moves_everything_at_once(store: Trajectories) -> None:
    training = Distillation(CONFIG, store)
    before = weights_of(training)
    with Workers(1, CPU) as workers:
        training.step(0, workers)
    now = weights_of(training)
    still = [name for name in now if torch.equal(now[name], before[name])]
    assert [name for name in still if not name.endswith("to_k.bias")] == []


def test_workers_and_their_number_change_rounding_only(store: Trajectories) -> None:
    steps = []
    for threads in (1, 2, 2):
        training = Distillation(CONFIG, store)
        with Workers(threads, CPU) as workers:
            logged = training.step(0, workers)
        gradients = [p.grad for p in training.discriminator.parameters()]
        steps.append((logged, gradients, weights_of(training)))
    (one, gradients_one, _), (two, gradients_two, weights_two), (_, _, again) = steps
    assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    largest = max(g.abs().max() for g in gradients_one)
    for a, b in zip(gradients_one, gradients_two, strict=True):
        assert (a - b).abs().max() <= 1e-4 * largest
    assert all(torch.equal(weights_two[name], again[name]) for name in again)


def test_a_batch_is_resized_targets_of_its_own_noise(store: Trajectories) -> None:
    training = Distillation(CONFIG, store)
    batch = training.batch(3)
    shapes = {k: tuple(x.shape) for k, x in batch.targets.items()}
    assert shapes == {0: (6, 1, 4, 4), 1: (6, 1, 4, 4), 2: (6, 1, 8, 8)}
    every = store.x_T(torch.arange(24))
    rows = [int((every == x).flatten(1).all(dim=1).nonzero()) for x in batch.x_T]
    assert torch.equal(batch.targets[2], store.targets(torch.tensor(rows), 2))
    smaller = F.avg_pool2d(store.targets(torch.tensor(rows), 0), 2)
    torch.testing.assert_close(batch.targets[0], smaller)
    assert torch.equal(training.batch(3).x_T, batch.x_T)
    assert not torch.equal(training.batch(4).x_T, batch.x_T)


def test_a_step_reads_the_targets_that_it_takes(
    store: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of heads that are not active, nor the last head's where images replace them."""
    read: list[int] = []
    targets = Trajectories.targets

    def counted(self: Trajectories, indices: Tensor, k: int) -> Tensor:
        read.append(k)
        return targets(self, indices, k)

    monkeypatch.setattr(Trajectories, "targets", counted)

    def read_by(steps: Sequence[int], **changes: Any) -> list[list[int]]:
        training = Distillation(changed(**changes), store, photos(False))
        found = []
        for step in steps:
            read.clear()
            training.batch(step)
            found.append([*read])
        return found

    assert read_by([0, 3, 6], schedule="progressive") == [[0], [0, 1], [0, 1, 2]]
    fresh = {"adversary": "fresh", "rec_every": 2, "r1_every": 3}
    assert read_by([1, 2, 3], **fresh) == [[], [0, 1, 2], [0, 1]]
    assert read_by([1], **fresh, real_images=False) == [[2]]
    assert read_by([1], lambda_rec=0.0) == [[2]]


def test_it_is_trained_alike_by_targets_of_full_size(store: Trajectories, tmp_path: Path) -> None:
    """To the bit where they are stored in float32: they are averaged either way."""
    smaller = sampled(tmp_path, sizes=CONFIG.student.stages)
    weights = []
    for given in (store, smaller):
        training = Distillation(CONFIG, given)
        with Workers(1, CPU) as workers:
            for step in range(3):
                training.step(step, workers)
        weights.append(weights_of(training))
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())


def test_another_number_of_heads_than_targets_is_an_error(store: Trajectories) -> None:
    student = StudentConfig(stages=(4, 8), widths=(16, 8), attention=(), groups=4)
    with pytest.raises(ConfigError, match="the store has 3 targets, the student 2 heads"):
        Distillation(dataclasses.replace(CONFIG, student=student), store)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rho": "hubber"}, r"distill\.rho='hubber' is not one of .*; the nearest is 'huber'"),
        (
            {"adversarial_loss": "logstic"},
            r"distill\.adversarial_loss='logstic' is not one of .*; the nearest is 'logistic'",
        ),
        ({"head_weights": (1.0, 2.0)}, "2 entries, the student 3 heads"),
        ({"translate": 1}, r"translate and cutout .* paired adversary"),
        ({"adversary_after": 0.5, "lambda_rec": 0.0}, "leaves steps without a loss"),
        ({"lambda_adv": 0.0, "lambda_rec": 0.0}, "leave the student without a loss"),
    ],
)
def test_settings_that_no_student_can_be_trained_with(
    store: Trajectories, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Distillation(changed(**changes), store)


# Whole distillations.


def test_it_learns_to_reconstruct(store: Trajectories, tmp_path: Path) -> None:
    config = changed(steps=60, lr=3e-3, batch=12, lambda_adv=0.0, r1_gamma=0.0, ema=0.9)
    distill_student(config, store, tmp_path)
    entries = metrics(tmp_path)
    first, last = entries[0], entries[-1]
    for k in range(1, 4):
        assert last[f"rec_{k}"] < 0.5 * first[f"rec_{k}"]
    # And so does what is saved, the average.
    student = load_student(tmp_path / "student")
    indices = torch.arange(24)
    with torch.no_grad():
        error = student(store.x_T(indices)) - store.targets(indices, -1)
    assert huber(error, 0.1) < 0.6 * first["rec_3"]


def test_a_student_is_given_its_teachers_names(
    store_with_classes: Trajectories, tmp_path: Path
) -> None:
    names = ("one", "two", "three")
    distill_student(changed(steps=1), store_with_classes, tmp_path, class_names=names)
    assert load_student(tmp_path / "student").class_names == names


def test_the_log(store: Trajectories, tmp_path: Path) -> None:
    config = changed(steps=6, log_every=2)
    seconds = distill_student(config, store, tmp_path)
    entries = metrics(tmp_path)
    assert [(entry["stage"], entry["step"]) for entry in entries] == [
        ("distill", step) for step in (2, 4, 6)
    ]
    per_head = {f"{name}_{k}" for name in ("rec", "adv", "logit_gap") for k in (1, 2, 3)}
    once = {"loss_d", "lr", "lr_d", "grad_g", "grad_d", "seconds", "r1"}
    for entry in entries:
        assert per_head | once <= set(entry)
    assert 0 < entries[0]["seconds"] <= entries[-1]["seconds"] <= seconds
    assert not (tmp_path / "checkpoints").exists()


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Ask for a stop, as a signal would, once so many steps are done from here on."""
    done = 0
    step = Distillation.step

    def counting(self: Distillation, *args: Any) -> dict[str, float]:
        nonlocal done
        done += 1
        return step(self, *args)

    monkeypatch.setattr(Distillation, "step", counting)
    asked = property(lambda self: done >= steps, lambda self, value: None)
    monkeypatch.setattr(StopSignals, "requested", asked, raising=False)


CASES = {
    "joint": CONFIG,
    "progressive pyramid": dataclasses.replace(
        changed(schedule="progressive", lambda_rec=0.0, beta1=0.5),
        student=dataclasses.replace(CONFIG.student, family="pyramid"),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def whole(
    request: pytest.FixtureRequest, store: Trajectories, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Path]:
    """An uninterrupted distillation."""
    config = CASES[request.param]
    run = tmp_path_factory.mktemp("whole")
    distill_student(config, store, run)
    return config, run


def assert_same_student(a: Path, b: Path) -> None:
    ours, theirs = (read_tensors(run / "student" / "model.safetensors") for run in (a, b))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("stopped_after", [1, 4, 7, 12])
def test_stopped_and_resumed_is_bit_identical(
    whole: tuple[Config, Path],
    store: Trajectories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_after: int,
) -> None:
    config, uninterrupted = whole
    with monkeypatch.context() as patch:
        stop_after(patch, stopped_after)
        with pytest.raises(Interrupted, match=f"step {stopped_after} of 12"):
            distill_student(config, store, tmp_path)
    assert not (tmp_path / "student").exists()
    found = latest_checkpoint(tmp_path / "checkpoints", "distill")
    assert found is not None
    assert found.step == stopped_after
    distill_student(config, store, tmp_path)
    assert_same_student(tmp_path, uninterrupted)
    steps = [entry["step"] for entry in metrics(tmp_path)]
    assert steps == list(range(1, 13))
    # Also what is logged of earlier steps: r1 and the inner heads.
    for ours, theirs in zip(metrics(tmp_path), metrics(uninterrupted), strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_damaged_checkpoint_is_passed_over(
    whole: tuple[Config, Path],
    store: Trajectories,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, uninterrupted = whole
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(Interrupted):
            distill_student(config, store, tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("*.json")) == [
        "distill-00000008.json",
        "distill-00000010.json",
    ]
    last = folder / "distill-00000010.safetensors"
    last.write_bytes(last.read_bytes()[:-5])
    with pytest.warns(UserWarning, match="passed over"):
        distill_student(config, store, tmp_path)
    assert_same_student(tmp_path, uninterrupted)
    assert [entry["step"] for entry in metrics(tmp_path)] == list(range(1, 13))


def test_two_runs_agree_bit_for_bit(
    whole: tuple[Config, Path], store: Trajectories, tmp_path: Path
) -> None:
    config, uninterrupted = whole
    distill_student(config, store, tmp_path)
    assert_same_student(tmp_path, uninterrupted)
    other = dataclasses.replace(config, run=dataclasses.replace(config.run, seed=1))
    shutil.rmtree(tmp_path / "student")
    distill_student(other, store, tmp_path)
    with pytest.raises(AssertionError):
        assert_same_student(tmp_path, uninterrupted)


def test_a_loss_that_is_not_finite_stops_with_the_step(
    store: Trajectories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_for = Distillation.drawn

    def drawn(self: Distillation, step: int) -> Drawn:
        found = drawn_for(self, step)
        if step == 9:
            found.targets[1][0, 0, 0, 0] = float("inf")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "drawn", drawn)
        with pytest.raises(TrainingError, match=r"rec_2 is inf at step 9.*checkpoint"):
            distill_student(CONFIG, store, tmp_path)
    found = latest_checkpoint(tmp_path / "checkpoints", "distill")
    assert found is not None
    assert found.step == 8
    assert all(tensor.isfinite().all() for tensor in found.tensors.values())
    assert not (tmp_path / "student").exists()


def test_a_gradient_that_is_not_finite_changes_no_weight(
    store: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Distillation(CONFIG, store)
    before = weights_of(training)
    monkeypatch.setattr(
        distill, "generator_gradient", lambda gradient, logits: gradient * float("nan")
    )
    with Workers(1, CPU) as workers, pytest.raises(TrainingError, match="grad_g is nan at step 1"):
        training.step(1, workers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(training).items())


def test_class_conditional_distillation(store_with_classes: Trajectories, tmp_path: Path) -> None:
    distill_student(changed(steps=2), store_with_classes, tmp_path)
    student = load_student(tmp_path / "student")
    assert student.num_classes == 3
    x_T = store_with_classes.x_T(torch.arange(2))
    assert student(x_T, torch.tensor([0, 2])).shape == (2, 1, 8, 8)


def test_images_that_are_all_alike_are_no_reason_to_stop(store: Trajectories) -> None:
    """No distance is typical of them, and none is missing."""
    gray = ImageSet(np.zeros((40, 1, 8, 8), np.float32), None, "gray")
    training = Distillation(changed(adversary="fresh", lambda_div=7.0), store, gray)
    with Workers(1, CPU) as workers:
        assert training.step(0, workers)["div"] == 0
