"""The main job by its command line: all stages, resuming after any kill, refusals, own data."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import advkd.run.stages
from advkd.config import UNetConfig, load_preset, parse
from advkd.diffusion import Schedule
from advkd.evaluation.features import FeatureNet, FitSettings, save_features
from advkd.files import hold, read_tensors
from advkd.models.unet import UNet
from advkd.pretrained import load_student, load_teacher, save_teacher
from advkd.train import configure, main, parser
from advkd.training.checkpoint import latest_checkpoint

TINY = """
name = "tiny"
[run]
threads = 2
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
widths = [8]
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
    *("discriminator.widths=[8]", "discriminator.groups=4", "distill.steps=4"),
    *("distill.batch=8", "distill.log_every=1", "evaluate.num=20", "evaluate.teacher_steps=4"),
]


def small_settings(*but: str) -> list[str]:
    kept = [setting for setting in SMALL if not setting.startswith(but)] if but else SMALL
    return [word for setting in kept for word in ("--set", setting)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.toml, images.npz (40 of 1x8x8) and a network that judges such images."""
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
    assert parse((finished / "config.toml").read_text()) == configure(parser().parse_args(command))
    load_teacher(finished / "teacher")
    load_student(finished / "student")
    assert (finished / "trajectories" / "index.json").is_file()
    assert (finished / "report" / "report.html").stat().st_size > 1000
    assert list((finished / "report").glob("*.png"))
    assert not (finished / "checkpoints").exists()
    assert [entry["step"] for entry in metrics(finished, "teacher")] == list(range(1, 9))
    assert [entry["step"] for entry in metrics(finished, "distill")] == list(range(1, 21))
    assert not list(finished.rglob("*.tmp"))


def test_the_summary(finished: Path) -> None:
    summary = json.loads((finished / "report" / "summary.json").read_text())
    for key in ("fd", "kid", "precision", "recall", "swd"):
        assert set(summary[key]) == {"real", "teacher", "student"}
        assert all(np.isfinite(value) for value in summary[key].values())
    for key in ("ms_per_image", "passes", "parameters"):
        assert set(summary[key]) == {"teacher", "student"}
    assert summary["passes"] == {"teacher": 4, "student": 1}
    milliseconds = summary["ms_per_image"]
    assert summary["speed_up"] == milliseconds["teacher"] / milliseconds["student"]
    assert set(summary["seconds"]) == {"teacher", "trajectories", "distill", "evaluate"}
    assert summary["parameters"]["student"] == sum(t.numel() for t in weights(finished).values())
    assert "8 held-out images" in summary["protocol"]


def test_the_same_command_again_does_nothing_but_show_the_table(
    copy: Path,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(run: Any) -> float:
        raise AssertionError("a stage ran again")

    monkeypatch.setattr(advkd.run, "_MAKERS", dict.fromkeys(advkd.run.stages.STAGES, refuse))
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
    assert capsys.readouterr().out == ""


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
    changes = ["--set", "distill.log_every=7", "--set", "teacher.checkpoint_every=2"]
    assert main([*command, *changes, "--runs", str(copy.parent)]) == 0
    assert parse((copy / "config.toml").read_text()).distill.log_every == 7


def test_redo_does_a_stage_and_all_later_ones_anew(
    copy: Path, finished: Path, command: list[str]
) -> None:
    arguments = [*command, "--runs", str(copy.parent), "--set", "distill.steps=4"]
    kept = {name: contents(copy / name) for name in ("teacher", "trajectories")}
    assert main([*arguments, "--redo", "distill", "--stage", "distill"]) == 0
    assert not (copy / "report").exists()
    assert main([*arguments, "--stage", "evaluate"]) == 0
    assert {name: contents(copy / name) for name in kept} == kept
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
    run = advkd.run.stages.Run(parse((copy / "config.toml").read_text()), copy)
    stands = [run.is_done(stage) for stage in advkd.run.stages.STAGES]
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
        (["--set", "distill.lr=1"], "unknown key 'distill'; the nearest is 'distill'"),
        (["--set", "distill.lr"], "is not of the form table.key=value"),
        (["--set", "distill.steps=many"], "'distill.steps' is of type int"),
        (["--name", "a/b"], "'a/b' is not a name"),
        (["--name", ".."], "'..' is not a name"),
        (["--preset", "fashion"], "there is no preset 'fashion'"),
        (["--threads", "-1"], "--threads -1"),
        (["--data", "nowhere"], "nowhere does not exist"),
        # What only a later stage needs is refused before the first one.
        (["--set", "student.stages=[2, 8]"], "must keep or double"),
        (["--set", "discriminator.widths=[8, 8, 8, 8]"], "4 halvings"),
        (["--set", "distill.rho=l1"], "distill.rho='l1'"),
        (["--set", "distill.head_weights=[1.0]"], "1 entries, the student 2 heads"),
        (["--set", "trajectory.dtype=int8"], "trajectory.dtype='int8'"),
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
    assert (data.path, data.size, data.channels, data.crop, data.flip) == (
        *('a "b"/c', 16, 3),
        *(False, False),
    )
    assert (config.run.seed, config.run.threads, config.trajectory.num) == (4, 2, 7)
    assert (config.evaluate.features, config.teacher.init) == ("f", "i")
    assert config.distill.lr == 2e-4


# Killed.

# Forks a child that runs the command, and kills it at each moment in turn; then runs it to its
# end. Forking saves importing torch every time.
KILLER = """
import json, os, signal, sys, time
from pathlib import Path
from advkd.train import main

arguments, run, moments, number = json.loads(sys.argv[1])

def reached(stage, step):
    if isinstance(stage, str) and step is None:
        return any(Path(run).glob(stage))
    log = Path(run, "metrics.jsonl")
    lines = log.read_text().splitlines() if log.exists() else []
    return sum(f'"{stage}"' in line for line in lines) >= step

def start():
    pid = os.fork()
    if pid == 0:
        os._exit(main(arguments))
    return pid

codes = []
for moment in moments:
    pid = start()
    while not reached(*moment):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.001)
    else:
        os.kill(pid, number)
        _, status = os.waitpid(pid, 0)
    codes.append(os.waitstatus_to_exitcode(status))
print(json.dumps(codes))
"""


def killed(
    arguments: list[str], run: Path, moments: list[tuple[str, int | None]], number: signal.Signals
) -> tuple[list[int], str]:
    """The children's exit codes and what they said."""
    given = json.dumps([arguments, str(run), moments, int(number)])
    done = subprocess.run(
        [sys.executable, "-c", KILLER, given], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_killed_at_any_moment_it_ends_with_the_same_bits(
    finished: Path, command: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "tiny"
    moments: list[tuple[str, int | None]] = [
        ("config.toml", None),
        ("teacher", 2),  # before its first checkpoint
        ("checkpoints/teacher-*6.json", None),
        ("teacher/model_index.json", None),
        ("trajectories/shard-00000.npy", None),
        ("trajectories/shard-00001.json", None),
        ("distill", 1),
        ("distill", 5),
        ("checkpoints/.distill-*.tmp", None),  # while a checkpoint is written, or at the end
    ]
    codes, _ = killed([*command, "--runs", str(tmp_path)], run, moments, signal.SIGKILL)
    assert codes.count(-signal.SIGKILL) >= 4  # a slow watcher may miss a moment, not most
    assert set(codes) <= {-signal.SIGKILL, 0}
    (run / "metrics.jsonl").open("a").write('{"stage": "distill", "st')  # cut in mid-line
    arguments = [*command, "--runs", str(tmp_path)]
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
    arguments = [*command, "--runs", str(tmp_path), "--set", "distill.steps=100000"]
    arguments += ["--set", "distill.checkpoint_every=100000"]
    codes, said = killed(arguments, run, [("distill", 3)], signal.SIGTERM)
    assert codes == [130]
    steps = [entry["step"] for entry in metrics(run, "distill")]
    assert steps == list(range(1, len(steps) + 1))
    found = latest_checkpoint(run / "checkpoints", "distill")
    assert found is not None
    assert found.step == steps[-1]
    assert f"advkd: stopped at step {steps[-1]} of 100000" in said
    assert "the same command goes on from there" in said
    (run / "metrics.jsonl").unlink()  # the watcher is not to see the steps of before
    redo = [*arguments, "--redo", "distill"]
    _, said = killed(redo, run, [("distill", 3)], signal.SIGTERM)
    assert "the same command without --redo goes on from there" in said


# The user's own images and teacher.


@pytest.fixture
def quick_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit the features that judge for a moment only."""
    monkeypatch.setattr(advkd.run, "FitSettings", lambda steps: FitSettings(steps=3))


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
    config = parse((run / "config.toml").read_text())
    assert (config.data.size, config.data.channels, config.data.flip) == (8, 3, True)
    teacher, student = load_teacher(run / "teacher"), load_student(run / "student")
    assert (teacher.config.in_channels, student.channels, student.size) == (3, 3, 8)
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert set(summary["fd"]) == {"real", "teacher", "student"}
    assert "autoencoder fitted on the training images" in summary["features"]
    assert "6 held-out images of" in summary["protocol"]
    assert "class_names" not in summary


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


def test_a_given_teacher_with_data_to_judge_by(teacher: Path, given: Path, tmp_path: Path) -> None:
    arguments = ["--teacher", str(teacher), "--size", "8", "--name", "both"]
    arguments += ["--data", str(given / "images.npz"), "--features", str(given / "features")]
    arguments += ["--runs", str(tmp_path / "runs")]
    arguments += small_settings("unet", "schedule", "teacher")
    for stage in advkd.run.stages.STAGES[:4]:
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
