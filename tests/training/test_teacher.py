"""Training a tiny teacher: it learns, stops cleanly, and a resumed run ends with the same bits."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkd.config import (
    ConfigError,
    override,
    to_toml,
)
from advkd.data.images import ImageSet
from advkd.diffusion import PREDICTION_TYPES
from advkd.errors import CheckpointError, Interrupted, TrainingError
from advkd.models.unet import UNet
from advkd.parallel import Workers
from advkd.pretrained import load_teacher, save_teacher
from advkd.training.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from advkd.training.teacher import (
    TeacherTraining,
    noised,
    prediction_target,
    train_teacher,
)

from ..killing import ended_at
from .tiny import CPU, metrics, squares, teacher_config


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_teacher(run / "teacher").state_dict()


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """As if SIGINT came during the step that makes `step` steps done."""
    original = TeacherTraining.step

    def interrupted(self: TeacherTraining, now: int, workers: Workers) -> dict[str, float]:
        values = original(self, now, workers)
        if now + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return values

    monkeypatch.setattr(TeacherTraining, "step", interrupted)


def test_the_loss_falls(tmp_path: Path) -> None:
    config = teacher_config(
        "teacher.steps=100",
        "teacher.batch=16",
        "teacher.lr=5e-3",
        "teacher.warmup=5",
        "teacher.ema=0.9",
    )
    seconds = train_teacher(config, squares(), tmp_path)
    losses = [entry["loss"] for entry in metrics(tmp_path)]
    assert np.mean(losses[:3]) > 0.7
    assert np.mean(losses[-20:]) < 0.35
    unet = load_teacher(tmp_path / "teacher")
    training = TeacherTraining(config, squares())
    training.unet = unet  # the average, not the last weights, is what is saved
    averaged = [float(training.loss(*training.batch(10_000 + i))) for i in range(10)]
    assert np.mean(averaged) < 0.35
    assert seconds > 0 and metrics(tmp_path)[-1]["seconds"] <= seconds


def test_what_a_finished_training_leaves(tmp_path: Path) -> None:
    config = teacher_config()
    train_teacher(config, squares(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "teacher"]
    unet = load_teacher(tmp_path / "teacher")
    assert unet.config == config.unet
    for name, value in vars(config.schedule).items():
        assert getattr(unet.schedule, name) == value
    entries = metrics(tmp_path)
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 12]
    assert set(entries[0]) == {"stage", "step", "seconds", "loss", "grad_norm", "lr"}
    assert {entry["stage"] for entry in entries} == {"teacher"}


@pytest.mark.parametrize("threads", [1, 2])
def test_two_runs_give_the_same_bits(tmp_path: Path, threads: int) -> None:
    config = teacher_config(f"run.threads={threads}", "teacher.steps=4")
    for name in ("a", "b"):
        torch.manual_seed(99 if name == "a" else 1)
        train_teacher(config, squares(), tmp_path / name)
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    other = override(config, ["run.seed=1"])
    train_teacher(other, squares(), tmp_path / "c")
    assert not torch.equal(
        weights(tmp_path / "a")["conv_in.weight"], weights(tmp_path / "c")["conv_in.weight"]
    )


@pytest.mark.parametrize(
    ("stops", "overrides"), [([1, 11], []), ([5], []), ([7], ["unet.dropout=0.2"])]
)
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    tmp_path: Path, stops: list[int], overrides: list[str]
) -> None:
    config = teacher_config("run.threads=2", *overrides)
    train_teacher(config, squares(), tmp_path / "straight")
    for step in stops:
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Interrupted, match=f"step {step} of 12"):
                train_teacher(config, squares(), tmp_path / "resumed")
        assert not (tmp_path / "resumed" / "teacher").exists()
        found = latest_checkpoint(tmp_path / "resumed" / "checkpoints", "teacher")
        assert found is not None and found.step == step
    train_teacher(config, squares(), tmp_path / "resumed")
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    straight, resumed = metrics(tmp_path / "straight"), metrics(tmp_path / "resumed")
    assert [(e["step"], e["loss"]) for e in straight] == [(e["step"], e["loss"]) for e in resumed]


def test_a_stop_in_the_last_step_stops_too_and_the_next_call_only_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 12)
    with pytest.raises(Interrupted, match="step 12 of 12"):
        train_teacher(teacher_config(), squares(), tmp_path)
    assert not (tmp_path / "teacher").exists()
    train_teacher(teacher_config(), squares(), tmp_path)
    assert len(metrics(tmp_path)) == len({entry["step"] for entry in metrics(tmp_path)})
    assert (tmp_path / "teacher" / "model_index.json").exists()


TRAINING = """
from pathlib import Path
import numpy as np
from advkd.config import parse
from advkd.data.images import ImageSet
from advkd.training.teacher import train_teacher
given = Path(arguments[0])
images = ImageSet(np.load(given / "pixels.npy", allow_pickle=False), None, "squares")
config = parse((given / "config.toml").read_text())
"""


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """Each attempt goes on from where the one before it was killed."""
    config = teacher_config()
    np.save(tmp_path / "pixels.npy", squares().pixels)
    (tmp_path / "config.toml").write_text(to_toml(config))
    train_teacher(config, squares(), tmp_path / "straight")
    moments = [
        ("open", "metrics.jsonl", 2),  # in step 4, before the first checkpoint
        ("os.rename", "teacher-00000005.json", 1),  # before that checkpoint is closed
        ("open", "metrics.jsonl", 6),  # in step 10: it has been read once
        ("open", ".teacher-00000010.*.tmp", 1),  # as the tensors are written
        ("os.remove", "teacher-00000005.json", 1),  # after the last step, as older ones go
    ]
    work = 'train_teacher(config, images, given / "resumed")'
    codes, _ = ended_at(moments, TRAINING, work, [str(tmp_path)])
    assert codes == [-signal.SIGKILL] * len(moments)
    found = latest_checkpoint(tmp_path / "resumed" / "checkpoints", "teacher")
    assert found is not None and found.step == 12
    train_teacher(config, squares(), tmp_path / "resumed")
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    assert [e["step"] for e in metrics(tmp_path / "resumed")] == [2, 4, 6, 8, 10, 12]
    assert not (tmp_path / "resumed" / "checkpoints").exists()


def test_dropout_follows_the_runs_seed_and_leaves_the_users_generator_alone() -> None:
    def gradients(run_seed: int, step: int, users: int) -> torch.Tensor:
        config = teacher_config("unet.dropout=0.5", f"run.seed={run_seed}")
        training = TeacherTraining(config, squares())
        batch = TeacherTraining(teacher_config(), squares()).batch(0)  # the same for all
        training.inputs = lambda step: batch
        training.unet.load_state_dict(
            TeacherTraining(teacher_config(), squares()).unet.state_dict()
        )
        torch.manual_seed(users)
        with Workers(1, CPU) as workers:
            training.step(step, workers)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.manual_seed(users)))
        return torch.cat([p.grad.flatten() for p in training.unet.parameters()])

    first = gradients(0, 0, users=1)
    assert torch.equal(gradients(0, 0, users=2), first)
    assert not torch.equal(gradients(1, 0, users=1), first)
    assert not torch.equal(gradients(0, 1, users=1), first)


def test_a_new_training_leaves_the_users_generator_alone() -> None:
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    TeacherTraining(teacher_config(), squares())
    assert torch.equal(torch.rand(3), expected)


def test_a_damaged_last_checkpoint_costs_steps_but_no_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = teacher_config()
    train_teacher(config, squares(), tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Interrupted):
            train_teacher(config, squares(), tmp_path / "resumed")
    last = tmp_path / "resumed" / "checkpoints" / "teacher-00000007.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="passed over"):
        train_teacher(config, squares(), tmp_path / "resumed")
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "resumed"))
    assert [entry["step"] for entry in metrics(tmp_path / "resumed")] == [2, 4, 6, 8, 10, 12]


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    other = TeacherTraining(teacher_config("unet.layers_per_block=2"), squares())
    with Workers(1, CPU) as workers:
        other.step(0, workers)
    save_checkpoint(tmp_path / "checkpoints", "teacher", other.checkpoint(1, 0.0, {}))
    with pytest.raises(CheckpointError, match="superfluous"):
        train_teacher(teacher_config(), squares(), tmp_path)


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_non_finite_step_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    original = TeacherTraining.loss
    calls = iter(range(1000))

    def diverging(self: TeacherTraining, *batch: Any) -> torch.Tensor:
        loss = original(self, *batch)
        if next(calls) != 8:
            return loss
        if what == "loss":
            return loss * float("nan")
        # A finite loss whose gradient is not: the slope of the square root at 0.
        return loss + (next(self.unet.parameters()).sum() * 0).sqrt()

    with monkeypatch.context() as patch:
        patch.setattr(TeacherTraining, "loss", diverging)
        with pytest.raises(TrainingError, match=rf"{what} is nan at step 8"):
            train_teacher(teacher_config(), squares(), tmp_path)
    found = latest_checkpoint(tmp_path / "checkpoints", "teacher")
    assert found is not None and found.step == 5
    assert all(torch.isfinite(tensor).all() for tensor in found.tensors.values())
    assert not (tmp_path / "teacher").exists()
    assert torch.get_num_threads() >= 1
    train_teacher(
        teacher_config(), squares(), tmp_path
    )  # the cause removed, the same command goes on
    train_teacher(teacher_config(), squares(), tmp_path / "straight")
    assert_same_weights(weights(tmp_path), weights(tmp_path / "straight"))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_target_is_what_sampling_undoes(prediction_type: str) -> None:
    """x0_hat of the sampler, given a network that predicts the target exactly, is x_0."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 5, 1, 3, 3, generator=generator, dtype=torch.float64)
    schedule = UNet(teacher_config().unet).schedule
    t = torch.tensor([0, 1, 500, 998, 999])
    alpha_bar = torch.from_numpy(schedule.alpha_bar)[t]
    x_t = noised(x_0, eps, alpha_bar)
    level = alpha_bar[:, None, None, None]
    torch.testing.assert_close(x_t, level.sqrt() * x_0 + (1 - level).sqrt() * eps)
    target = prediction_target(prediction_type, x_0, eps, alpha_bar)
    recovered = {
        "epsilon": (x_t - (1 - level).sqrt() * target) / level.sqrt(),
        "sample": target,
        "v_prediction": level.sqrt() * x_t - (1 - level).sqrt() * target,
    }[prediction_type]
    torch.testing.assert_close(recovered, x_0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("prediction_type", "beta_schedule"),
    [("sample", "linear"), ("v_prediction", "squaredcos_cap_v2")],
)
def test_every_kind_of_prediction_trains(
    tmp_path: Path, prediction_type: str, beta_schedule: str
) -> None:
    config = teacher_config(
        f"schedule.prediction_type={prediction_type}",
        f"schedule.beta_schedule={beta_schedule}",
        "teacher.steps=40",
        "teacher.batch=16",
        "teacher.lr=3e-3",
    )
    train_teacher(config, squares(), tmp_path)
    assert load_teacher(tmp_path / "teacher").schedule.prediction_type == prediction_type
    losses = [entry["loss"] for entry in metrics(tmp_path)]
    assert np.mean(losses[-5:]) < np.mean(losses[:2])


def test_class_conditional(tmp_path: Path) -> None:
    config = teacher_config("unet.num_class_embeds=4", "teacher.steps=2")
    train_teacher(config, squares(labels=True), tmp_path)
    unet = load_teacher(tmp_path / "teacher")
    x = torch.randn(2, 1, 8, 8)
    y = torch.tensor([0, 3])
    assert not torch.equal(unet(x, 500, y), unet(x, 500, y.flip(0)))
    training = TeacherTraining(config, squares(labels=True))
    x_0, _, _, labels = training.batch(0)
    assert labels is not None
    corners = torch.stack(  # of images that may be mirrored
        [x_0[:, 0, 4 * (c // 2) + 1, 4 * (c % 2) + 1] > -0.5 for c in range(4)]
    )
    top = labels < 2
    assert torch.equal(corners[:2].any(dim=0), top) and torch.equal(corners[2:].any(dim=0), ~top)


@pytest.mark.parametrize(("classes", "kept"), [(4, True), (5, False), (None, False)])
def test_a_teacher_knows_the_names_of_its_classes(
    classes: int | None, kept: bool, tmp_path: Path
) -> None:
    """Where it has as many classes as the images: else some would have no name."""
    corners = ("top left", "top right", "bottom left", "bottom right")
    images = dataclasses.replace(squares(labels=True), classes=corners)
    config = teacher_config(f"unet.num_class_embeds={classes or 'none'}", "teacher.steps=1")
    train_teacher(config, images, tmp_path)
    assert load_teacher(tmp_path / "teacher").class_names == (corners if kept else None)


@pytest.mark.parametrize(
    ("overrides", "data", "words"),
    [
        (["unet.num_class_embeds=4"], squares(), ["labels", "squares"]),
        (["unet.num_class_embeds=3"], squares(labels=True), ["num_class_embeds=3", "squares"]),
        ([], squares(channels=3), ["1", "3", "channels", "squares"]),
        (["unet.out_channels=2"], squares(), ["channels", "squares"]),
    ],
)
def test_data_that_do_not_fit_are_an_error(
    tmp_path: Path, overrides: list[str], data: ImageSet, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        train_teacher(teacher_config(*overrides), data, tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_labels_are_ignored_by_an_unconditional_teacher() -> None:
    assert TeacherTraining(teacher_config(), squares(labels=True)).batch(0)[3] is None


def test_flips_are_of_half_of_the_squares() -> None:
    data = squares()
    data.pixels[:, :, :, :4] = 0
    data.pixels[:, :, :, 4:] = 255
    for flip, low, high in ((True, 0.35, 0.65), (False, 1.0, 1.0)):
        config = teacher_config(f"data.flip={str(flip).lower()}", "teacher.batch=400")
        x_0 = TeacherTraining(config, data).batch(0)[0]
        assert low <= float((x_0[:, 0, 0, 7] > 0).float().mean()) <= high


def test_init_starts_from_a_folder(tmp_path: Path) -> None:
    train_teacher(teacher_config(), squares(), tmp_path / "first")
    config = teacher_config(
        f"teacher.init={tmp_path / 'first' / 'teacher'}", "schedule.variance_type=fixed_small"
    )
    training = TeacherTraining(config, squares())
    assert_same_weights(
        {name: tensor.contiguous() for name, tensor in training.unet.state_dict().items()},
        weights(tmp_path / "first"),
    )
    assert training.unet.training
    assert all(parameter.requires_grad for parameter in training.unet.parameters())
    assert training.unet.schedule.variance_type == "fixed_small"
    train_teacher(config, squares(), tmp_path / "second")
    assert not torch.equal(
        weights(tmp_path / "second")["conv_in.weight"],
        weights(tmp_path / "first")["conv_in.weight"],
    )


def test_init_from_an_unconditional_teacher_gains_classes(tmp_path: Path) -> None:
    """To begin with the classes are alike: the network is what it was."""
    first = UNet(teacher_config().unet)
    save_teacher(first, tmp_path)
    config = teacher_config(f"teacher.init={tmp_path}", "unet.num_class_embeds=4")
    unet = TeacherTraining(config, squares(labels=True)).unet
    x, t = torch.randn(4, 1, 8, 8), torch.arange(4)
    torch.testing.assert_close(unet(x, t, torch.arange(4)), first(x, t))
    save_teacher(unet, tmp_path / "conditional")
    back = teacher_config(f"teacher.init={tmp_path / 'conditional'}")
    with pytest.raises(ConfigError, match="num_class_embeds"):
        TeacherTraining(back, squares())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("unet.block_out_channels=[8, 24]", "block_out_channels"),
        ("unet.norm_eps=1e-6", "norm_eps"),
        ("unet.downsample_padding=0", "downsample_padding"),
        ("schedule.prediction_type=sample", "prediction_type"),
        ("schedule.beta_schedule=squaredcos_cap_v2", "beta_schedule"),
        ("schedule.num_train_timesteps=100", "num_train_timesteps"),
    ],
)
def test_init_from_another_teacher_is_an_error(tmp_path: Path, change: str, word: str) -> None:
    save_teacher(UNet(teacher_config().unet), tmp_path)
    with pytest.raises(ConfigError, match=word):
        TeacherTraining(teacher_config(f"teacher.init={tmp_path}", change), squares())


def test_workers_share_a_step_without_changing_it() -> None:
    """A step by three workers moves the weights as a step by one, but for rounding."""
    moved = []
    for count in (1, 3):
        training = TeacherTraining(teacher_config(), squares())
        with Workers(count, CPU) as workers:
            values = training.step(0, workers)
        gradients = [p.grad for p in training.unet.parameters() if p.grad is not None]
        moved.append((values, gradients))
    (one, gradients_one), (three, gradients_three) = moved
    assert one["loss"] == pytest.approx(three["loss"], rel=1e-5)
    assert len(gradients_one) == len(gradients_three) > 0
    for a, b in zip(gradients_one, gradients_three, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-7


def test_bfloat16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    train_teacher(teacher_config("teacher.autocast=on", "teacher.steps=3"), squares(), tmp_path)
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    assert all(np.isfinite(entry["loss"]) for entry in metrics(tmp_path))


def kept_for_the_gradient(training: TeacherTraining) -> int:
    """Bytes that a loss keeps until its gradient is taken."""
    kept: dict[int, int] = {}

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(counted, lambda tensor: tensor):
        loss = training.loss(*training.batch(0))
        return sum(kept.values()) if loss.requires_grad else 0


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_activations_take_less_memory_and_change_no_bit(dropout: float) -> None:
    found, kept = [], []
    for recompute in ("false", "true"):
        config = teacher_config(f"unet.dropout={dropout}", f"teacher.recompute={recompute}")
        training = TeacherTraining(config, squares())
        kept.append(kept_for_the_gradient(training))
        torch.manual_seed(7)
        with Workers(1, CPU) as workers:
            for step in range(2):
                training.step(step, workers)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.manual_seed(7)))
        found.append(training.unet.state_dict())
    assert_same_weights(*found)
    assert kept[1] < 0.5 * kept[0]


def test_parts_of_a_batch_give_its_gradient(tmp_path: Path) -> None:
    """One after the other, as the loop takes them where a batch does not fit into memory."""
    sizes: list[int] = []
    original = TeacherTraining.loss

    def counted(self: TeacherTraining, x_0: torch.Tensor, *others: Any) -> torch.Tensor:
        sizes.append(len(x_0))
        return original(self, x_0, *others)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeacherTraining, "loss", counted)
        for parts in (1, 4):
            config = teacher_config(f"teacher.accumulate={parts}", "teacher.steps=1")
            train_teacher(config, squares(), tmp_path / str(parts))
            found.append(metrics(tmp_path / str(parts))[0])
    assert sizes == [6, 2, 2, 2]  # in fourths of at most 2, the last being empty
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)
    assert found[1]["grad_norm"] == pytest.approx(found[0]["grad_norm"], rel=1e-4)


def test_a_closed_training_gives_its_memory_back_at_once() -> None:
    """A distillation follows it on the same GPU, and the garbage collector comes when it likes."""
    gc.collect()
    gc.disable()
    try:
        training = TeacherTraining(teacher_config(), squares())
        with Workers(1, CPU) as workers:
            training.step(0, workers)
        training.close()
        weight = weakref.ref(training.unet.conv_in.weight)
        del training
        assert weight() is None
    finally:
        gc.enable()


def test_gradients_are_clipped_to_the_norm() -> None:
    training = TeacherTraining(teacher_config("teacher.grad_clip=0.01"), squares())
    with Workers(1, CPU) as workers:
        values = training.step(0, workers)
    assert values["grad_norm"] > 0.01  # logged as it was
    clipped = torch.stack([p.grad.norm() for p in training.unet.parameters()]).norm()
    assert float(clipped) == pytest.approx(0.01, rel=1e-3)


def test_checkpoint_holds_everything(tmp_path: Path) -> None:
    training = TeacherTraining(teacher_config(), squares())
    with Workers(1, CPU) as workers:
        training.step(0, workers)
    saved = training.checkpoint(1, 2.5, {"loss": 0.5})
    assert isinstance(saved, Checkpoint) and saved.values == {
        "seconds": 2.5,
        "logged": {"loss": 0.5},
    }
    n = len(list(training.unet.parameters()))
    prefixes = [name.split(".")[0] for name in saved.tensors]
    assert prefixes.count("unet") == prefixes.count("ema") == n
    assert prefixes.count("optimizer") == 3 * n  # step, exp_avg, exp_avg_sq
