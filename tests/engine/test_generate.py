"""The Python interface: four functions that no module shadows, reproducible images."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import advkd
from advkd.config import StudentConfig, UNetConfig
from advkd.diffusion import Schedule
from advkd.engine.interface import Engine
from advkd.engine.noise import Noise, Purpose
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import save_student, save_teacher

STUDENT = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(4,), groups=4)
TEACHER = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 8),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
NUM = 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    save_student(Student(STUDENT, 8, 1), folder / "student")
    save_student(Student(STUDENT, 8, 1, num_classes=3), folder / "conditional")
    save_teacher(UNet(TEACHER, Schedule()), folder / "teacher")
    return folder


def load(folders: Path, name: str) -> UNet | Student:
    loader = advkd.load_teacher if name == "teacher" else advkd.load_student
    return loader(folders / name)


def test_no_module_shadows_a_function(folders: Path) -> None:
    for module in pkgutil.walk_packages(advkd.__path__, "advkd."):
        importlib.import_module(module.name)
    teacher = advkd.load_teacher(str(folders / "teacher"))
    student = advkd.load_student(str(folders / "student"))
    x = torch.zeros(2, 1, 8, 8)
    assert teacher(x, 10).shape == x.shape
    assert student(x).shape == x.shape and student(x, exit_at=1).shape == (2, 1, 4, 4)
    for model in (teacher, student):
        images = advkd.generate(model, num=3, seed=0, steps=2)
        assert images.shape == (3, 1, 8, 8) and images.dtype == torch.float32
        assert images.is_contiguous() and images.abs().max() <= 1 and images.std() > 0


def test_names() -> None:
    functions = {"compile", "generate", "load_student", "load_teacher", "push_folder"}
    assert set(advkd.__all__) == {*functions, "Student", "UNet"}
    with pytest.raises(AttributeError, match="no attribute 'load_studnet'"):
        _ = advkd.load_studnet  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["teacher", "student", "conditional"])
@pytest.mark.parametrize("settings", [{"batch": 1}, {"batch": 3, "threads": 1}, {"threads": 2}])
def test_an_image_does_not_depend_on_its_batch(
    folders: Path, name: str, settings: dict[str, Any]
) -> None:
    model = load(folders, name)
    together = advkd.generate(model, NUM, seed=5, steps=4, eta=0.5)
    divided = advkd.generate(model, NUM, seed=5, steps=4, eta=0.5, **settings)
    alone = [
        advkd.generate(model, 1, seed=5, steps=4, eta=0.5, first=number) for number in range(NUM)
    ]
    scale = float(together.abs().max())
    assert scale > 0
    assert (divided - together).abs().max() <= 1e-4 * scale
    assert (torch.cat(alone) - together).abs().max() <= 1e-4 * scale


def test_seeds_and_numbers_give_other_images(folders: Path) -> None:
    student = advkd.load_student(folders / "student")
    images = advkd.generate(student, 2, seed=0)
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images, advkd.generate(student, 2, seed=1))
    assert torch.equal(images, advkd.generate(student, 2, seed=0))


def test_given_labels_are_followed(folders: Path) -> None:
    student = advkd.load_student(folders / "conditional")
    numbers = torch.arange(NUM)
    labels = Noise(0, Purpose.SAMPLING).labels(numbers, 3)
    assert labels is not None
    images = advkd.generate(student, NUM, seed=0)
    assert torch.equal(images, advkd.generate(student, NUM, seed=0, y=labels))
    others = advkd.generate(student, NUM, seed=0, y=(labels + 1) % 3)
    assert ((others - images).abs().amax((1, 2, 3)) > 0).all()


def test_no_images(folders: Path) -> None:
    assert advkd.generate(advkd.load_student(folders / "student"), 0, seed=0).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("name", ["teacher", "student", "conditional"])
def test_an_engine_of_compile_samples_as_its_network_does(folders: Path, name: str) -> None:
    model = load(folders, name)
    expected = advkd.generate(model, NUM, seed=4, steps=3)
    engine = advkd.compile(model, NUM)
    assert torch.equal(advkd.generate(engine, NUM, seed=4, steps=3), expected)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert torch.equal(advkd.generate(engine, NUM, seed=4, steps=3), expected)
    with pytest.raises(ValueError, match="compile"):
        advkd.generate(engine, 1, seed=0, exit_at=1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_classes", [None, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_images_of_one_call_are_those_of_its_parts(
    channels: int, num_classes: int | None, threads: int
) -> None:
    """To the bit, labels, noise and bounds included, up to the last image that has a number."""
    torch.manual_seed(1)
    student = Student(STUDENT, 8, channels, num_classes=num_classes)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(2)  # some pixels are beyond the bounds
    for purpose in Purpose:
        noise, last = Noise((1 << 64) - 1, purpose), (1 << 63) - 1
        for first, num in ((0, 1), (5, 33), (last - 40, 40)):
            engine = advkd.compile(student, num)
            images = engine.images(noise, first, num, threads=threads)
            assert images.shape == (num, channels, 8, 8) and images.is_contiguous()
            assert torch.equal(images, Engine.images(engine, noise, first, num, threads=threads))
            if num_classes is not None:
                labels = torch.arange(num) % num_classes
                given = engine.images(noise, first, num, labels, threads=threads)
                assert torch.equal(given, Engine.images(engine, noise, first, num, labels))
    assert images.abs().max() == 1


def test_what_images_cannot_be_of(folders: Path) -> None:
    student = advkd.load_student(folders / "conditional")
    for model in (student, advkd.compile(student)):
        for seed in (-1, 1 << 64):
            with pytest.raises(ValueError, match=r"seed=-?\d+ is not in"):
                advkd.generate(model, 1, seed)
        for labels in ([3], [-1]):
            with pytest.raises(ValueError, match="is not one of 0"):
                advkd.generate(model, 1, 0, y=torch.tensor(labels))


def test_what_a_call_for_an_image_asks_of_torch(folders: Path) -> None:
    """Memory for the image, since each operation of torch's takes as long as one of the network."""

    class Counting(TorchDispatchMode):
        seen: list[str]

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    student = advkd.load_student(folders / "conditional")
    for model in (student, advkd.compile(student)):
        advkd.generate(model, 1, 0)
        with Counting() as counting:
            counting.seen = []
            advkd.generate(model, 1, 0)
        assert counting.seen == ["aten.empty.memory_format"]


def test_an_engine_leaves_early_where_it_was_made_to(folders: Path) -> None:
    student = advkd.load_student(folders / "student")
    engine = advkd.compile(student, exit_at=1)
    assert torch.equal(
        advkd.generate(engine, 2, seed=0), advkd.generate(student, 2, seed=0, exit_at=1)
    )
    with pytest.raises(ValueError, match="exit_at=3"):
        advkd.compile(student, exit_at=3)
