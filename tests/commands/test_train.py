"""The main job by its command line: all stages, resuming after any kill, refusals, own data."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import advkd.device
import advkd.run.evaluation
import advkd.run.stages
from advkd.config import UNetConfig, load_preset
from advkd.diffusion import Schedule
from advkd.evaluation.features import FeatureNet, save_features
from advkd.files import hold, read_tensors
from advkd.models.unet import UNet
from advkd.pretrained import load_student, load_teacher, save_teacher
from advkd.report.tables import QUALITY
from advkd.run.folder import STAGES, stored_config
from advkd.run.run import Run
from advkd.train import configure, main, parser
from advkd.training.checkpoint import latest_checkpoint

from ..killing import Moment, ended_at

TINY = """
name = "tiny"
[run]
threads = 2
device = "cpu"
checkpoint_minutes = 0
[data]
size = 8
flip = false
[unet]
sample_size = 8
block_out_channels = [8, 16]
down_block_types = ["DownBlock2D", "DownBlock2D"]
up_block_types = ["UpBlock2D", "UpBlock2D"]
layers_per_block = 1
norm_num_groups = 4
[schedule]
num_train_timesteps = 50
[teacher]
steps = 8
batch = 8
warmup = 2
log_every = 1
checkpoint_every = 3
[trajectory]
num = 20
steps = 4
shard = 8
[student]
stages = [4, 8]
widths = [16, 8]
attention = [4]
groups = 4
[discriminator]
widths = [8, 8]
groups = 4
[distill]
steps = 20
batch = 8
warmup = 2
r1_every = 3
inner_every = 2
log_every = 1
checkpoint_every = 3
[evaluate]
num = 30
teacher_steps = 4
"""

# The same in --set, for runs whose configuration follows from --data or --teacher.
SMALL = [
    *("unet.block_out_channels=[8,16]", "unet.layers_per_block=1", "unet.norm_num_groups=4"),
    *("teacher.steps=4", "teacher.batch=8", "teacher.warmup=1", "teacher.log_every=1"),
    *("schedule.num_train_timesteps=50", "trajectory.num=12", "trajectory.steps=4"),
    *("trajectory.shard=6", "student.widths=[16,8]", "student.groups=4"),
    *("discriminator.widths=[8,8]", "discriminator.groups=4", "distill.steps=4"),
    *("distill.batch=8", "distill.log_every=1"),
    *("evaluate.num=20", "evaluate.blocks=2", "evaluate.teacher_steps=4"),
]


def small_settings(*but: str) -> list[str]:
    chosen = [setting for setting in SMALL if not setting.startswith(but)] if but else SMALL
    return [word for setting in chosen for word in ("--set", setting)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.toml, images.npz (40 of 1x8x8) and a feature network for such images."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "tiny.toml").write_text(TINY)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8)).astype(np.uint8)
    np.savez(folder / "images.npz", images=pixels)
    torch.manual_seed(0)
    save_features(FeatureNet(1, 8), folder / "features")
    return folder


@pytest.fixture(scope="module")
def command(given: Path) -> list[str]:
    """Arguments of the run that the tests begin, cut, change and compare."""
    files = {"preset": "tiny.toml", "data": "images.npz", "features": "features"}
    return [word for name, file in files.items() for word in (f"--{name}", str(given / file))]


@pytest.fixture(scope="module")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    runs = tmp_path_factory.mktemp("finished")
    assert main([*command, "--runs", str(runs)]) == 0
    return runs / "tiny"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run to change."""
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def metrics(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [entry for entry in lines if entry["stage"] == stage]


def weights(run: Path, network: str = "student") -> dict[str, torch.Tensor]:
    file = "model.safetensors"
    if network == "teacher":
        file = "unet/diffusion_pytorch_model.safetensors"
    return read_tensors(run / network / file)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# A whole run.


def test_what_a_run_leaves(finished: Path, command: list[str]) -> None:
    assert stored_config(finished) == configure(parser().parse_args(command))
    load_teacher(finished / "teacher")
    load_student(finished / "student")
    assert (finished / "trajectories" / "index.json").is_file()
    assert (finished / "report" / "report.html").stat().st_size > 1000
    assert list((finished / "report").glob("*.png"))
    assert not (finished / "checkpoints").exists()
    assert [entry["step"] for entry in metrics(finished, "teacher")] == list(range(1, 9))
    assert [entry["step"] for entry in metrics(finished, "distill")] == list(range(1, 21))
    assert not list(finished.rglob("*.tmp"))
    assert (finished / "preview.png").stat().st_size > 1000


def test_the_model_card(finished: Path) -> None:
    student, text = finished / "student", (finished / "student" / "README.md").read_text()
    summary = json.loads((finished / "report" / "summary.json").read_text())
    data = pytest.importorskip("huggingface_hub").ModelCard(text).data
    assert data.license == "unknown" and data.model_name == "tiny student"
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {figure.key: summary[figure.key]["student"]["mean"] for figure in QUALITY}
    assert all("± " in result.metric_name for result in data.eval_results)
    assert "| FD |" in text and " ± " in text and summary["protocol"] in text
    grid = (finished / "report" / "grid.png").read_bytes()
    assert (student / "grid.png").read_bytes() == grid and "(grid.png)" in text


def test_diffusers_runs_a_runs_networks(finished: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    teacher = diffusers.DDIMPipeline.from_pretrained(str(finished / "teacher"))
    student = str(finished / "student")
    with pytest.MonkeyPatch.context() as patch:
        modules = "diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE"
        patch.setattr(modules, str(tmp_path / "modules"))
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            student, custom_pipeline=student, trust_remote_code=True
        )
    images = pipeline(batch_size=2).images + teacher(num_inference_steps=2).images
    assert [image.size for image in images] == [(8, 8)] * 3


def test_the_summary(finished: Path) -> None:
    summary = json.loads((finished / "report" / "summary.json").read_text())
    sides = {"real", "teacher", "student"}
    for key in (figure.key for figure in QUALITY):
        assert set(summary[key]) == sides
        for value in summary[key].values():
            assert set(value) == {"mean", "std"} and np.isfinite([*value.values()]).all()
    assert set(summary["spectra"]) == sides
    assert all(
        len(curve) == 6 and np.isfinite(curve).all() for curve in summary["spectra"].values()
    )
    for key in ("ms_per_image", "passes", "parameters"):
        assert set(summary[key]) == {"teacher", "student"}
    assert summary["passes"] == {"teacher": 4, "student": 1}
    milliseconds = summary["ms_per_image"]
    assert summary["speed_up"] == milliseconds["teacher"] / milliseconds["student"]
    assert set(summary["seconds"]) == {"teacher", "trajectories", "distill", "evaluate"}
    assert summary["parameters"]["student"] == sum(t.numel() for t in weights(finished).values())
    assert "8 held-out images" in summary["protocol"]
    assert "30 images of each network" in summary["protocol"]
    assert "in 5 blocks of 6" in summary["protocol"]


def test_the_same_command_again_does_nothing_but_show_the_table(
    copy: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(run: Any) -> float:
        raise AssertionError("a stage ran again")

    monkeypatch.setattr(advkd.run.stages, "_MAKERS", dict.fromkeys(STAGES, refuse))
    before = contents(copy)
    assert main([*command, "--runs", str(copy.parent)]) == 0
    assert contents(copy) == before
    said = capsys.readouterr().out
    assert "teacher" in said and "student" in said
    assert str(copy / "report" / "report.html") in said


def test_stages_one_by_one_give_the_same_student(
    finished: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command, "--runs", str(tmp_path)]
    assert main([*arguments, "--stage", "distill"]) == 1
    assert "stage distill needs teacher" in capsys.readouterr().err
    for stage in ("teacher", "trajectories", "distill"):
        assert main([*arguments, "--stage", stage]) == 0
    assert same(weights(tmp_path / "tiny"), weights(finished))
    assert not (tmp_path / "tiny" / "report").exists()
    assert re.fullmatch(
        rf"(stage \w+: {re.escape(str(tmp_path / 'tiny'))}/\w+, \d+\.\d s\n){{3}}",
        capsys.readouterr().out,
    )


# Another configuration.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--set", "distill.lr=1e-5"], ["distill.lr", "--redo distill "]),
        (["--set", "student.widths=[16, 16]"], ["student.widths", "--redo distill "]),
        (["--set", "trajectory.eta=0.5"], ["trajectory.eta", "--redo trajectories "]),
        (["--trajectories", "30"], ["trajectory.num", "--redo trajectories "]),
        (["--seed", "3"], ["run.seed", "--redo teacher "]),
        (["--set", "evaluate.num=31"], ["evaluate.num", "--redo evaluate "]),
        (["--redo", "evaluate", "--set", "distill.lr=1e-5"], ["distill.lr", "--redo distill "]),
        (["--redo", "report", "--set", "evaluate.num=31"], ["evaluate.num", "--redo evaluate "]),
    ],
)
def test_another_configuration_is_refused(
    copy: Path,
    command: list[str],
    changes: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(copy)
    assert main([*command, *changes, "--runs", str(copy.parent)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("advkd: ") and said.count("\n") == 1
    assert all(word in said for word in [*words, "choose another --name"])
    assert contents(copy) == before


def test_keys_that_change_no_result_are_no_other_configuration(
    copy: Path, command: list[str]
) -> None:
    keys = ("distill.log_every=7", "teacher.checkpoint_every=2", "run.checkpoint_minutes=7")
    keys += ("run.compile=off", "teacher.recompute=true")
    changes = [word for key in keys for word in ("--set", key)]
    assert main([*command, *changes, "--runs", str(copy.parent)]) == 0
    assert stored_config(copy).distill.log_every == 7


def test_redo_does_a_stage_and_all_later_ones_anew(
    copy: Path, finished: Path, command: list[str]
) -> None:
    arguments = [*command, "--runs", str(copy.parent), "--set", "distill.steps=4"]
    before = {name: contents(copy / name) for name in ("teacher", "trajectories")}
    assert main([*arguments, "--redo", "distill", "--stage", "distill"]) == 0
    assert not (copy / "report").exists()
    assert main([*arguments, "--stage", "evaluate"]) == 0
    assert {name: contents(copy / name) for name in before} == before
    assert not same(weights(copy), weights(finished))
    assert [entry["step"] for entry in metrics(copy, "distill")] == [1, 2, 3, 4]
    assert [entry["step"] for entry in metrics(copy, "teacher")] == list(range(1, 9))
    summaries = [json.loads((run / "report/summary.json").read_text()) for run in (copy, finished)]
    assert summaries[0]["fd"]["student"] != summaries[1]["fd"]["student"]
    assert summaries[0]["fd"]["teacher"] == summaries[1]["fd"]["teacher"]


@pytest.mark.parametrize("removed", [1, 2, 3])
def test_a_redo_that_is_cut_short_leaves_no_stale_result(
    copy: Path, command: list[str], removed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was removed when it was killed, no later stage still stands on an earlier one."""
    left = removed
    remove = shutil.rmtree

    def rmtree(folder: Path, **options: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            for path in [path for path in Path(folder).rglob("*") if path.is_file()][:1]:
                path.unlink()
            raise KeyboardInterrupt
        remove(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", rmtree)
        arguments = [*command, "--runs", str(copy.parent), "--redo", "trajectories"]
        assert main([*arguments, "--stage", "teacher"]) == 130
    run = Run(copy, stored_config(copy))
    stands = [run.is_done(stage) for stage in STAGES]
    assert stands == sorted(stands, reverse=True)
    assert not run.is_done("report")


def test_a_folder_in_use_is_refused(
    copy: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with hold(copy):
        assert main([*command, "--runs", str(copy.parent)]) == 1
    assert "process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--set", "distill.lrr=1"], "unknown key 'distill.lrr'; the nearest is 'lr'"),
        (["--set", "distil.lr=1"], "unknown key 'distil'; the nearest is 'distill'"),
        (["--set", "distill.lr"], "is not of the form table.key=value"),
        (["--set", "distill.steps=many"], "'distill.steps' is of type int"),
        (["--name", "a/b"], "'a/b' is not a name"),
        (["--name", ".."], "'..' is not a name"),
        (["--preset", "fashion"], "there is no preset 'fashion'"),
        (["--threads", "-1"], "--threads -1"),
        (["--data", "nowhere"], "nowhere does not exist"),
        # What only a later stage needs is refused before the first one.
        (["--set", "student.stages=[2, 8]"], "must keep or double"),
        (["--set", "discriminator.widths=[8, 8, 8, 8, 8]"], "4 halvings"),
        (["--set", "distill.rho=l1"], "distill.rho='l1'"),
        (["--set", "distill.head_weights=[1.0]"], "1 entries, the student 2 heads"),
        (["--set", "trajectory.dtype=int8"], "trajectory.dtype='int8'"),
        (["--set", "evaluate.num=3"], "evaluate.num=3"),
        (["--set", "evaluate.teacher_steps=5000"], "evaluate.teacher_steps=5000"),
        (["--set", "trajectory.steps=5000"], "trajectory.steps=5000"),
        (["--set", "trajectory.eta=-1"], "trajectory.eta=-1"),
        (["--set", "run.device=cuda:99"], "'cuda:99' does not exist"),
        (["--set", "student.groups=5"], "num_groups=5 does not divide"),
        (["--set", "data.channels=2"], "channels=2"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_is_made(
    command: list[str],
    changes: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*command, *changes, "--runs", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("advkd: ") and said.count("\n") == 1
    assert words in said
    assert not (tmp_path / "tiny" / "teacher").exists()
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


# The configuration that the arguments mean.


def configured(*arguments: str) -> Any:
    return configure(parser().parse_args(arguments))


def test_without_arguments_it_is_the_default_preset() -> None:
    assert configured() == load_preset("fashion-mnist")
    assert configured("--preset", "smoke") == load_preset("smoke")
    assert configured("--stage", "teacher").teacher.source == ""


def test_arguments_that_are_short_for_keys(given: Path) -> None:
    config = configured(
        *("--preset", "smoke", "--name", 'it\'s "mine"', "--data", 'a "b"/c', "--seed", "4"),
        *("--size", "16", "--channels", "3", "--no-crop", "--no-flip", "--trajectories", "7"),
        *("--features", "f", "--threads", "2", "--init", "i", "--set", "distill.lr=2e-4"),
    )
    assert config.name == 'it\'s "mine"'
    data = config.data
    path = str(Path('a "b"/c').resolve())
    assert (data.path, data.size, data.channels, data.crop, data.flip) == (
        *(path, 16, 3),
        *(False, False),
    )
    assert (config.run.seed, config.run.threads, config.trajectory.num) == (4, 2, 7)
    assert config.evaluate.features == str(Path("f").resolve())
    assert config.teacher.init == str(Path("i").resolve())
    assert config.distill.lr == 2e-4


def test_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = configured("--data", "avatars")
    assert (config.name, config.data.path, config.teacher.source) == ("avatars", "avatars", "")
    assert (config.data.size, config.data.channels, config.data.flip) == (32, 3, False)
    assert config.unet.num_class_embeds == 3
    assert config.student.class_width
    again = configured("--preset", "cifar10-32", "--data", "avatars", "--set", "data.flip=true")
    assert (again.data.path, again.data.flip) == ("avatars", True)
    assert not configured("--preset", "cifar10-32", "--data", "avatars").data.flip
    assert configured("--preset", "cifar10-32", "--data", "elsewhere").data.flip


@pytest.mark.parametrize(
    ("count", "classes", "expected"),
    [(200, 2, 2), (199, 2, None), (300, 3, 3), (300, 1, None), (300, None, None)],
)
def test_classes_are_taken_where_they_serve(
    tmp_path: Path, count: int, classes: int | None, expected: int | None
) -> None:
    arrays = {"images": np.zeros((count, 8, 8), np.uint8)}
    if classes:
        arrays["labels"] = np.arange(count) % classes
    np.savez(tmp_path / "some.npz", **arrays)
    config = configured("--data", str(tmp_path / "some.npz"))
    assert config.unet.num_class_embeds == expected
    plain = ("--set", "unet.num_class_embeds=none")
    config = configured("--data", str(tmp_path / "some.npz"), *plain)
    assert config.unet.num_class_embeds is None


def test_a_teacher_of_avatars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--data",
        "avatars",
        "--stage",
        "teacher",
        *small_settings("unet", "teacher.steps"),
    ]
    settings = ("unet.block_out_channels=[8,8,8]", "unet.norm_num_groups=4", "teacher.steps=1")
    arguments += [word for setting in settings for word in ("--set", setting)]
    assert main([*arguments, "--set", "unet.num_class_embeds=3"]) == 0
    teacher = load_teacher(tmp_path / "runs" / "avatars" / "teacher")
    assert teacher.class_names == ("pixel-art", "open-peeps", "lorelei")
    assert (teacher.config.sample_size, teacher.config.in_channels) == (32, 3)


# Killed.

IMPORTS, WORK = "from advkd.train import main", "code = main(arguments)"


def test_killed_at_any_moment_it_ends_with_the_same_bits(
    finished: Path, command: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    moments: list[Moment] = [
        ("os.rename", "config.toml", 1),
        ("open", "metrics.jsonl", 2),  # before the teacher's first checkpoint
        ("os.rename", "teacher-*.json", 1),
        ("os.rename", "model_index.json", 1),
        ("os.rename", "shard-00000.npy", 1),
        ("os.rename", "shard-00001.json", 1),
        ("open", "metrics.jsonl", 3),
        ("os.rename", "distill-*.safetensors", 1),
        ("os.rename", "distill-*.json", 2),
        ("os.remove", "distill-*", 1),
        ("os.rename", "distill.done.json", 1),
    ]
    arguments = [*command, "--runs", str(tmp_path)]
    codes, said = ended_at(moments, IMPORTS, WORK, arguments)
    assert codes == [-signal.SIGKILL] * len(moments), said
    (run / "metrics.jsonl").open("a").write('{"stage": "distill", "st')  # cut in mid-line
    for stage in ("teacher", "trajectories", "distill"):
        assert main([*arguments, "--stage", stage]) == 0
    assert same(weights(run, "teacher"), weights(finished, "teacher"))
    assert same(weights(run), weights(finished))
    for name in ("shard-00000.npy", "shard-00001.npy", "shard-00002.npy"):
        path = Path("trajectories") / name
        assert (run / path).read_bytes() == (finished / path).read_bytes()
    for stage, steps in (("teacher", 8), ("distill", 20)):
        assert [entry["step"] for entry in metrics(run, stage)] == list(range(1, steps + 1))


def test_sigterm_ends_cleanly_with_a_checkpoint(command: list[str], tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    longer = ["--set", "distill.steps=100000", "--set", "distill.checkpoint_every=100000"]
    whole = [*command, "--runs", str(tmp_path), *longer]
    for stage in ("teacher", "trajectories"):
        assert main([*whole, "--stage", stage]) == 0
    arguments = [*whole, "--stage", "distill"]
    third = [("open", "metrics.jsonl", 4)]  # the first reads what the teacher logged
    codes, said = ended_at(third, IMPORTS, WORK, arguments, signal.SIGTERM)
    assert codes == [130]
    steps = [entry["step"] for entry in metrics(run, "distill")]
    assert steps == list(range(1, len(steps) + 1))
    found = latest_checkpoint(run / "checkpoints", "distill")
    assert found is not None
    assert found.step == steps[-1]
    assert f"advkd: stopped at step {steps[-1]} of 100000" in said
    assert "the same command goes on from there" in said
    _, said = ended_at(third, IMPORTS, WORK, [*arguments, "--redo", "distill"], signal.SIGTERM)
    assert "the same command without --redo goes on from there" in said


# The user's own images and teacher.


@pytest.fixture
def quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit features for a moment only."""
    monkeypatch.setattr(advkd.run.evaluation, "FEATURE_STEPS", 3)


def test_a_folder_of_images(quick_features: None, tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    folder = tmp_path / "my pictures"
    (folder / "more").mkdir(parents=True)
    for i in range(32):
        height, width = draw.integers(8, 40, 2)
        pixels = draw.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if i % 2 else ".") / f"{i}.png")
    arguments = ["--data", str(folder), "--size", "8", "--runs", str(tmp_path / "runs")]
    assert main([*arguments, *small_settings()]) == 0
    run = tmp_path / "runs" / "my pictures"
    config = stored_config(run)
    assert (config.data.size, config.data.channels, config.data.flip) == (8, 3, True)
    teacher, student = load_teacher(run / "teacher"), load_student(run / "student")
    assert (teacher.config.in_channels, student.channels, student.size) == (3, 3, 8)
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert set(summary["fd"]) == {"real", "teacher", "student"}
    assert "autoencoder fitted on the training images" in summary["features"]
    assert "6 held-out images of" in summary["protocol"]
    assert "class_names" not in summary


def test_two_folders_of_one_relative_name_are_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("A", 0), ("B", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 8, 8), dtype=np.uint8)
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "images.npy", pixels)
    arguments = ["--data", "images.npy", "--runs", str(tmp_path / "runs"), "--stage", "teacher"]
    arguments += small_settings()
    monkeypatch.chdir(tmp_path / "A")
    assert main(arguments) == 0
    config = stored_config(tmp_path / "runs" / "images")
    assert config.data.path == str(tmp_path / "A" / "images.npy")
    before = contents(tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "B")
    assert main(arguments) == 1
    assert "was made with another data.path" in capsys.readouterr().err
    assert contents(tmp_path / "runs") == before
    monkeypatch.chdir(tmp_path / "A")
    np.save("images.npy", np.zeros((40, 8, 8), np.uint8))
    assert main(arguments) == 1
    assert "was made from other images" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["--data", ".", *arguments[2:]]) == 1  # named by its resolved path
    assert "holds no images" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "run").exists()


def test_classes_lead_through_the_whole_job(
    quick_features: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(2)
    for name, count in (("dark", 24), ("light", 16)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 100, (8, 8)).astype(np.uint8) + 150 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    arguments = ["--data", str(tmp_path / "photos"), "--runs", str(tmp_path / "runs")]
    arguments += [*small_settings(), "--set", "unet.num_class_embeds=2"]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "2 classes: dark (24), light (16)" in said and ".txt files (1)" in said
    run = tmp_path / "runs" / "photos"
    student = load_student(run / "student")
    teacher = load_teacher(run / "teacher")
    assert student.num_classes == teacher.num_classes == 2
    assert student.class_names == teacher.class_names == ("dark", "light")
    index = json.loads((run / "trajectories" / "index.json").read_text())
    assert index["num_classes"] == 2
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["class_names"] == ["dark", "light"]
    assert all(len(shares) == 2 for shares in summary["classes"].values())
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""  # nothing is made, so nothing is announced
    assert main([*arguments, "--name", "one", "--set", "unet.num_class_embeds=1"]) == 1
    assert "unet.num_class_embeds=1 is too small" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_the_trainings_run_on_the_device_of_the_configuration(
    device: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def resolve(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr(advkd.device, "resolve", resolve)
    arguments = [*command, "--runs", str(tmp_path), "--set", f"run.device={device}"]
    for stage in ("teacher", "trajectories", "distill"):
        assert main([*arguments, "--stage", stage]) == 0
    assert set(asked) == {device} and len(asked) >= 5  # three checks and two trainings


def test_too_few_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "few.npy", np.zeros((29, 8, 8), np.uint8))
    arguments = ["--data", str(tmp_path / "few.npy"), "--runs", str(tmp_path)]
    assert main([*arguments, *small_settings()]) == 1
    assert "holds 29 images; at least 30 are needed" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "few").glob("*.toml")] == ["config.toml"]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A given DDPM of 1x8x8 whose configuration names no size."""
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=None,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    save_teacher(UNet(config, Schedule(num_train_timesteps=50)), tmp_path / "ddpm")
    return tmp_path / "ddpm"


def test_a_given_teacher_without_data(
    quick_features: None, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--teacher", str(teacher), "--runs", str(tmp_path / "runs")]
    arguments += small_settings("unet", "schedule", "teacher")
    assert main(arguments) == 1
    assert "give a size" in capsys.readouterr().err
    assert main([*arguments, "--size", "8"]) == 0
    run = tmp_path / "runs" / "ddpm"
    assert same(weights(run, "teacher"), load_teacher(teacher).state_dict())
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert set(summary["fd"]) == {"teacher", "student"}
    assert "other samples of the teacher" in summary["protocol"]
    assert "autoencoder fitted on the trajectories" in summary["features"]
    assert metrics(run, "teacher") == []


def test_a_given_teacher_with_data_to_evaluate_by(
    teacher: Path, given: Path, tmp_path: Path
) -> None:
    arguments = ["--teacher", str(teacher), "--size", "8", "--name", "both"]
    arguments += ["--data", str(given / "images.npz"), "--features", str(given / "features")]
    arguments += ["--runs", str(tmp_path / "runs")]
    arguments += small_settings("unet", "schedule", "teacher")
    for stage in STAGES[:4]:
        assert main([*arguments, "--stage", stage]) == 0
    run = tmp_path / "runs" / "both"
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert set(summary["fd"]) == {"real", "teacher", "student"}
    assert same(weights(run, "teacher"), load_teacher(teacher).state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [("size=16", "8x8, but data.size=16"), ("channels=3", "1 channels, but data.channels=3")],
)
def test_a_given_teacher_of_other_images_is_refused(
    teacher: Path,
    given: Path,
    tmp_path: Path,
    change: str,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unet = load_teacher(teacher)
    config = json.loads((teacher / "unet" / "config.json").read_text())
    (teacher / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 8}))
    assert unet.config.in_channels == 1
    arguments = ["--teacher", str(teacher), "--runs", str(tmp_path), "--set", f"data.{change}"]
    if change == "size=16":
        arguments += ["--set", "student.stages=[8,16]"]
    assert main([*arguments, *small_settings("unet", "schedule", "teacher")]) == 1
    assert words in capsys.readouterr().err
