"""Networks of the Hugging Face hub, served by a stub of it on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import advkd
from advkd.files import CheckpointError
from advkd.hub import download, is_repository
from advkd.pretrained import load_student, resolve, zoo
from advkd.train import _resolved

from .stub_hub import StubHub

# huggingface_hub reads the hub's address when it is imported, hence a process of its own.
ROUND = """
import torch, advkd
from diffusers import DiffusionPipeline
from advkd.files import CheckpointError

ours = advkd.load_student("zoo:avatars-student")
print(ours.push_to_hub("me/faces", token="hf_x", dtype=torch.float16))
theirs = advkd.Student.from_pretrained("me/faces")
same = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
print(all(torch.equal(a.half(), b.half()) for a, b in same))
print(advkd.push_folder("mine", "me/mine", private=True))
teacher = advkd.load_teacher("zoo:fashion-mnist")
teacher.push_to_hub("me/teacher")
found = advkd.UNet.from_pretrained("me/teacher@main").state_dict()
print(all(torch.equal(t, found[name]) for name, t in teacher.state_dict().items()))
for arguments in ({"custom_pipeline": "me/faces"}, {}):
    pipe = DiffusionPipeline.from_pretrained("me/faces", trust_remote_code=True, **arguments)
    generator = torch.Generator().manual_seed(3)
    found = pipe(batch_size=2, class_labels="lorelei", generator=generator, output_type="pt")
    print(found.images.shape)
for name in ("me/absent", "me/faces@v7"):
    try:
        advkd.load_student(name)
    except CheckpointError as error:
        print(error)
"""


def in_process(code: str, hub: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": hub, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **more,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder,
        env=environment,
    )  # fmt: skip


def test_networks_go_to_the_hub_and_come_from_there(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("diffusers")
    advkd.load_student("zoo:fashion-mnist-student").save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "distill.done.json").write_text("{}")
    card = b"---\nlicense: mit\n---\nTheirs.\n"
    with StubHub({"me/mine": {"README.md": card}}) as hub:
        done = in_process(ROUND, hub.address, tmp_path)
        assert done.returncode == 0, done.stderr
        said = done.stdout.splitlines()
        assert said[0].startswith(f"{hub.address}/me/faces/commit/")
        assert said[1:2] + said[3:4] == ["True", "True"]
        assert said[4:6] == ["torch.Size([2, 3, 32, 32])"] * 2
        assert said[6].startswith("there is no folder me/absent, and the hub gives no such")
        assert "404" in said[6] and "revision" in said[7].lower()
        assert hub.repositories["me/mine"]["README.md"] == card
        assert "distill.done.json" not in hub.repositories["me/mine"]
        assert {"unet/config.json", "model_index.json"} <= set(hub.repositories["me/teacher"])
        asked = [line for line in hub.requests if "resolve" in line]
    # What is in the cache needs no hub.
    code = 'import advkd; print(advkd.load_student("me/faces").size)'
    again = in_process(code, hub.address, tmp_path, HF_HUB_OFFLINE="1")
    assert again.stdout == "32\n", again.stderr
    assert not any(line.endswith((".bin", ".pt", "README.md")) for line in asked if "GET" in line)


def test_only_what_a_network_needs_is_downloaded(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    teacher = zoo("fashion-mnist")
    files = {
        str(path.relative_to(teacher)): path.read_bytes()
        for path in teacher.rglob("*")
        if path.is_file()
    }
    pickle = {"unet/diffusion_pytorch_model.bin": b"\x80\x02", "vae/model.safetensors": b"large"}
    with StubHub({"a/b": {**files, **pickle}}) as hub:
        code = 'import advkd; print(advkd.load_teacher("a/b").num_classes)'
        done = in_process(code, hub.address, tmp_path)
        assert done.stdout == "10\n", done.stderr
        fetched = {line.split("/", 4)[-1] for line in hub.requests if line.startswith("GET a/b/")}
    assert fetched == {
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("google/ddpm-cat-256", True),
        ("google/ddpm-cat-256@main", True),
        ("me/x@refs/pr/1", True),
        ("runs", False),
        ("./runs/a", False),
        ("../runs", False),
        ("/runs/a", False),
        ("runs/a/b", False),
        ("runs/", False),
        ("zoo:a/b", False),
        ("a/b c", False),
    ],
)
def test_what_a_repository_is_called(source: str, is_one: bool) -> None:
    assert is_repository(source) == is_one


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _resolved("me/network") == "me/network"
    (tmp_path / "me" / "network").mkdir(parents=True)
    assert not is_repository("me/network")
    assert resolve("me/network") == Path("me/network")
    assert _resolved("me/network") == str(tmp_path / "me" / "network")


def test_without_the_library_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = r"there is no folder me/x, and the Hugging Face hub needs .* pip install 'advkd\[hub\]'"
    with pytest.raises(CheckpointError, match=words):
        load_student("me/x")
    with pytest.raises(CheckpointError, match=r"^the Hugging Face hub needs the library"):
        advkd.push_folder("zoo:avatars-student", "me/x")


def test_what_cannot_be_pushed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no network"):
        advkd.push_folder(tmp_path, "me/x")
    with pytest.raises(CheckpointError, match="is not OWNER/NAME"):
        download("x")


def test_loaded_networks_lie_on_the_cpu_in_float32() -> None:
    student = advkd.Student.from_pretrained("zoo:avatars-student")
    assert (student.device, student.dtype) == (torch.device("cpu"), torch.float32)
