"""What a network's folder holds for others: a model card, a pipeline for diffusers, safetensors
that say what they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import advkd
from advkd.card import Facts, Metric, card
from advkd.config import StudentConfig
from advkd.engine.noise import Purpose
from advkd.models.student import Student
from advkd.publish import publish_student

ZOO = Path(advkd.__file__).parent / "zoo"
FACTS = Facts(
    "mine: <b>", "CC0-1.0", 'Faces "of" us', "us/faces",
    [("FD", {"teacher": "2.0 ± 0.1", "student": "3.0"})],
    [Metric("fd", "FD", 3.0)], ["How it was measured."], "grid.png",
)  # fmt: skip


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    config = StudentConfig(stages=(4, 8), widths=(8, 8), attention=(), groups=4)
    made = Student(config, 8, 3, num_classes=2).eval()
    made.class_names = ("cat", "dog")
    return made


def test_a_students_folder(student: Student, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path / "mine")
    files = {file.name for file in (tmp_path / "mine").iterdir()}
    names = {"README.md", "config.json", "model.safetensors", "model_index.json", "pipeline.py"}
    assert files == names
    again = Student.from_pretrained(tmp_path / "mine")
    assert all(map(torch.equal, student.state_dict().values(), again.state_dict().values()))
    assert again.class_names == ("cat", "dog")
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "# mine" in text and "8×8 RGB images" in text and "cat, dog" in text


def test_weights_say_that_they_are_torchs(student: Student, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def test_a_card_that_is_there_stays(student: Student, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    student.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    publish_student(student, tmp_path, facts=FACTS)
    assert "How it was measured." in (tmp_path / "README.md").read_text()


def test_the_hubs_library_reads_a_card(student: Student) -> None:
    hub = pytest.importorskip("huggingface_hub")
    text = card(student, FACTS)
    read = hub.ModelCard(text)
    assert read.data.license == "cc0-1.0"
    assert read.data.datasets == ["us/faces"]
    assert read.data.pipeline_tag == "unconditional-image-generation"
    assert read.data.model_name == "mine: <b>"
    (result,) = read.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        'Faces "of" us', "fd", 3.0,
    )  # fmt: skip
    assert "| FD | 2.0 ± 0.1 | 3.0 |" in text and "![Samples](grid.png)" in text
    assert r"# mine: \<b\>" in text


@pytest.mark.parametrize(
    ("license", "written"),
    [("MIT", "mit"), ("unknown", "unknown"), ("Ask my aunt", "other")],
)
def test_licenses(student: Student, license: str, written: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard(card(student, dataclasses.replace(FACTS, license=license))).data
    assert data.license == written
    assert data.get("license_name") == ("Ask my aunt" if written == "other" else None)


def test_a_teachers_folder(tmp_path: Path) -> None:
    teacher = advkd.load_teacher("zoo:fashion-mnist")
    teacher.save_pretrained(tmp_path / "t")
    again = advkd.UNet.from_pretrained(tmp_path / "t")
    found = again.state_dict()
    assert all(torch.equal(t, found[name]) for name, t in teacher.state_dict().items())
    text = (tmp_path / "t" / "README.md").read_text()
    assert "DDIMPipeline" not in text and "28×28 grayscale images" in text
    unlabelled = advkd.load_teacher("zoo:fashion-mnist-unlabelled")
    assert "DDIMPipeline" in card(unlabelled, Facts("x"))
    scheduler = tmp_path / "t" / "scheduler"
    unet = advkd.UNet.from_pretrained(tmp_path / "t" / "unet", scheduler=scheduler)
    assert unet.num_classes == 10


def test_diffusers_generates_with_a_student(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(
        "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    folder = str(tmp_path / "mine")
    student.save_pretrained(folder)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder, trust_remote_code=True
    )

    def sampled(kind: str, **more: object) -> object:
        generator = torch.Generator().manual_seed(5)
        return pipe(batch_size=3, generator=generator, output_type=kind, **more).images

    pictures, array, tensor = (sampled(kind) for kind in ("pil", "np", "pt"))
    assert [picture.size for picture in pictures] == [(8, 8)] * 3
    assert array.shape == (3, 8, 8, 3) and 0 <= array.min() <= array.max() <= 1
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    seed = int(torch.randint(1 << 62, (), generator=torch.Generator().manual_seed(5)))
    ours = advkd.generate(student, 3, seed, purpose=Purpose.SAMPLING)
    assert torch.equal(ours / 2 + 0.5, tensor)
    y = torch.tensor([1, 1, 1])
    dogs = sampled("pt", class_labels="dog")
    assert torch.equal(dogs, advkd.generate(student, 3, seed, y=y) / 2 + 0.5)
    assert torch.equal(dogs, sampled("pt", class_labels=[1, "dog", 1]))
    with pytest.raises(ValueError, match="'cow' is not a class of this student: cat, dog"):
        sampled("pt", class_labels="cow")
    with pytest.raises(ValueError, match="is not pil, np or pt"):
        sampled("gif")
    assert pipe.to("cpu") is pipe and pipe.device == torch.device("cpu")
    pipe.save_pretrained(tmp_path / "again")
    assert Student.from_pretrained(tmp_path / "again").size == 8


@pytest.mark.parametrize("file", sorted(ZOO.glob("*/README.md")), ids=lambda file: file.parent.name)
def test_what_ships_has_a_card(file: Path) -> None:
    data = pytest.importorskip("huggingface_hub").ModelCard(file.read_text()).data
    assert data.license == ("cc0-1.0" if "avatars" in file.parent.name else "mit")
    unlabelled = file.parent.name == "fashion-mnist-unlabelled"
    assert data.library_name == ("diffusers" if unlabelled else "advkd")
