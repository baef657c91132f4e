"""`advkd convert`: old and foreign teachers against their own code, and what is refused."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import nn

from advkd import convert, pickles
from advkd.diffusion import ddpm_table
from advkd.engine.eager import general_step
from advkd.models.guided_diffusion import (
    config_from_flags,
    parse_flags,
    renamed,
    schedule_from_flags,
)
from advkd.models.unet import UNet
from advkd.pretrained import load_teacher

RTOL = 1e-5  # of the output's largest value: float32 sums in another order

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command: its exit status, and what it said."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["advkd convert", *map(str, words)])
        showwarning = warnings.showwarning
        try:
            status = convert.main()
        finally:
            warnings.showwarning = showwarning
        said = capsys.readouterr()
        return status, said.out + said.err

    return call


@pytest.fixture(autouse=True)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles are read here and now, since a process takes seconds; a few tests want one."""
    if "own_process" in request.keywords:
        return

    def here(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            status = pickles.main(*command[3:])
        return subprocess.CompletedProcess(command, status, "", errors.getvalue())

    monkeypatch.setattr(pickles.subprocess, "run", here)


own_process = pytest.mark.own_process


def randomize(network: nn.Module) -> None:
    """Random values in every parameter: zeros and ones would hide swapped tensors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= RTOL * theirs.abs().max()


# Folders of diffusers.


@pytest.fixture
def network() -> UNet2DModel:
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    randomize(network)
    return network.eval()


@pytest.mark.parametrize(
    "size", [pytest.param("10GB", marks=own_process, id="whole"), pytest.param("20KB", id="parts")]
)
@pytest.mark.parametrize("layout", ["pipeline", "flat", "unet alone"])
@torch.no_grad()
def test_pickles_of_diffusers(
    network: UNet2DModel, tmp_path: Path, run: Run, size: str, layout: str
) -> None:
    old, options = tmp_path / "old", []
    unet = old / "unet" if layout == "pipeline" else old
    network.save_pretrained(unet, safe_serialization=False, max_shard_size=size)
    assert list(unet.glob("*.bin")) and not list(unet.glob("*.safetensors"))
    place = {"pipeline": old / "scheduler", "flat": old, "unet alone": tmp_path / "scheduler"}
    DDIMScheduler(num_train_timesteps=77).save_pretrained(place[layout])
    if layout == "unet alone":
        options = ["--scheduler", place[layout]]
    status, said = run(old, tmp_path / "new", *options)
    assert (status, said.count("\n")) == (0, 1) and "million parameters" in said
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 70])
    ours = load_teacher(tmp_path / "new")
    assert_agree(ours(x, t), network(x, t).sample)
    assert ours.schedule.num_train_timesteps == 77
    assert not [file for file in (tmp_path / "new").rglob("*") if file.suffix in (".bin", ".pt")]
    pipe = DDIMPipeline.from_pretrained(tmp_path / "new")
    assert_agree(pipe.unet(x, t).sample, network(x, t).sample)


def test_a_folder_of_safetensors_is_written_anew(
    network: UNet2DModel, tmp_path: Path, run: Run
) -> None:
    network.save_pretrained(tmp_path / "old", max_shard_size="20KB")
    DDIMScheduler().save_pretrained(tmp_path / "old")
    assert run(tmp_path / "old", tmp_path / "new")[0] == 0
    assert len(list((tmp_path / "new").rglob("*.safetensors"))) == 1


# OpenAI's.

GUIDED: dict[str, dict[str, Any]] = {
    "as the unconditional ones for 256 pixels": {
        "image_size": 32, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1,2",
        "attention_resolutions": "16,8", "learn_sigma": True, "resblock_updown": True,
        "num_head_channels": 32,
    },
    "as that for 64 pixels": {
        "image_size": 16, "num_channels": 32, "num_res_blocks": 2, "channel_mult": "1,2",
        "attention_resolutions": "16,8", "class_cond": True, "learn_sigma": True,
        "resblock_updown": True, "num_head_channels": 16, "use_new_attention_order": True,
        "noise_schedule": "cosine", "dropout": 0.1, "use_fp16": False,
    },
    "as its defaults": {
        "image_size": 64, "num_channels": 32, "num_res_blocks": 1,
    },
    "as improved-diffusion's": {
        "image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2",
        "attention_resolutions": "8", "use_scale_shift_norm": False, "num_heads": 2,
        "predict_xstart": True,
    },
}  # fmt: skip


def original(flags: dict[str, Any]) -> tuple[nn.Module, Any]:
    """Network and diffusion of guided-diffusion itself, with random values everywhere."""
    pytest.importorskip("guided_diffusion", reason="pip install guided-diffusion-sdk")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from guided_diffusion import script_util

    defaults = script_util.model_and_diffusion_defaults()
    network, diffusion = script_util.create_model_and_diffusion(**defaults | flags)
    randomize(network)
    return network.eval(), diffusion


def words_of(flags: dict[str, Any]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_a_checkpoint_of_guided_diffusion(name: str, tmp_path: Path, run: Run) -> None:
    flags = GUIDED[name]
    theirs, _ = original(flags)
    torch.save(theirs.state_dict(), tmp_path / "old.pt")
    words = ["--from", "guided-diffusion", "--", *words_of(flags)]
    status, said = run(tmp_path / "old.pt", tmp_path / "new", *words)
    assert status == 0, said
    ours = load_teacher(tmp_path / "new")
    size = flags["image_size"]
    x, t = torch.randn(2, 3, size, size), torch.tensor([3, 700])
    y = torch.tensor([5, 999]) if flags.get("class_cond") else None
    expected = theirs(x, t) if y is None else theirs(x, t, y)
    assert_agree(ours(x, t, y), expected)
    one_size = not isinstance(ours.config.attention_head_dim, tuple)
    assert one_size == ("diffusers read it" in said) == (name != "as its defaults")
    if one_size:
        pipe = (DDPMPipeline if flags.get("learn_sigma") else DDIMPipeline).from_pretrained(
            tmp_path / "new"
        )
        assert_agree(pipe.unet(x, t, class_labels=y).sample, expected)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1000, 4000, 250])
@pytest.mark.parametrize("learned", [False, True])
def test_the_sampler_is_guided_diffusions(kind: str, steps: int, learned: bool) -> None:
    """Mean and deviation of x_(t-1), by the original's own p_mean_variance."""
    flags = {"noise_schedule": kind, "diffusion_steps": steps, "learn_sigma": learned}
    _, diffusion = original(GUIDED["as its defaults"] | flags)
    schedule = schedule_from_flags(parse_flags(words_of(flags)))
    assert_allclose = np.testing.assert_allclose
    assert_allclose(schedule.alpha_bar, diffusion.alphas_cumprod, rtol=1e-12)
    table = ddpm_table(schedule)
    generator = torch.Generator().manual_seed(1)
    x, out = (
        torch.randn(2, n, 4, 4, generator=generator, dtype=torch.float64)
        for n in (3, 6 if learned else 3)
    )
    for i in (0, steps // 2, steps - 2):
        t = torch.full((2,), int(table.timesteps[i]))
        theirs = diffusion.p_mean_variance(lambda *_: out, x, t)
        mean, _ = general_step(table, i, x, out[:, :3], out[:, 3:], torch.zeros_like(x))
        moved, _ = general_step(table, i, x, out[:, :3], out[:, 3:], torch.ones_like(x))
        # The original looks its float64 tables up in float32.
        assert_allclose(mean, theirs["mean"], rtol=1e-4, atol=1e-5)
        assert_allclose(moved - mean, (0.5 * theirs["log_variance"]).exp(), rtol=1e-4, atol=1e-6)


def test_rescaled_times_are_the_whole_ones() -> None:
    """Of 4,000 steps the network is asked for every fourth as 0 to 999."""
    flags = {"diffusion_steps": 4000, "noise_schedule": "cosine", "rescale_timesteps": True}
    _, diffusion = original(GUIDED["as its defaults"] | flags)
    with pytest.warns(UserWarning, match="of the 4000 training times those 1000"):
        schedule = schedule_from_flags(parse_flags(words_of(flags)))
    network = diffusion._wrap_model(lambda _, times: times)  # what it gives a network for t
    asked = network(None, torch.arange(0, 4000, 4))
    assert asked.tolist() == list(range(1000))
    np.testing.assert_allclose(schedule.alpha_bar, diffusion.alphas_cumprod[::4], rtol=1e-9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--image_size", "no value"),
        ("--image_size 64 --nonsense 3", "--nonsense"),
        ("--image_size wide", "is no int"),
        ("--class_cond maybe", "is no bool"),
        ("--image_size 512 --num_channels 64", "channel_mult begins with 0.5"),
        ("--image_size 48", "channel_mult '' is no list"),
        ("--attention_resolutions 16,x", "attention_resolutions"),
        ("--num_heads_upsample 2", "num_heads_upsample"),
        ("--num_channels 20", "norm_num_groups=32 does not divide"),
        ("--noise_schedule sqrt", "noise_schedule 'sqrt'"),
        ("--diffusion_steps 0", "num_train_timesteps=0"),
        ("--diffusion_steps 500 --rescale_timesteps True", "rescale_timesteps with"),
        ("--num_res_blocks 0", "layers_per_block=0"),
    ],
)
def test_flags_that_make_something_else(words: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        flags = parse_flags(words.split())
        schedule = schedule_from_flags(flags)
        with torch.device("meta"):
            UNet(config_from_flags(flags), schedule)


def test_flags_as_they_are_typed() -> None:
    found = parse_flags(["--image_size=32", "--learn_sigma", "yes", "--use_fp16", "True"])
    assert (found["image_size"], found["learn_sigma"]) == (32, True)
    assert "use_fp16" not in found


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path, run: Run) -> None:
    flags = GUIDED["as improved-diffusion's"]
    config = config_from_flags(parse_flags(words_of(flags)))
    assert renamed({"some.other": torch.zeros(1)}, config, False).keys() == {"some.other"}
    tensors = {"out.2.bias": torch.zeros(4), "middle_block.1.qkv.weight": torch.zeros(5, 64, 1)}
    torch.save(tensors | {"some.other": torch.zeros(1)}, tmp_path / "old.pt")
    words = ["--from", "guided-diffusion", "--", *words_of(flags)]
    status, said = run(tmp_path / "old.pt", tmp_path / "new", *words)
    assert status == 1 and said.count("\n") == 1
    assert "old.pt does not fit" in said and "conv_out.bias is (4,) instead of (3,)" in said
    assert os.listdir(tmp_path) == ["old.pt"]


# What is refused: one sentence, and nothing is left behind.


class Calls:
    """A pickle that calls something when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def refused(run: Run, folder: Path, *words: object) -> str:
    """What the command says of a file old.pt that it refuses."""
    before = sorted(folder.rglob("*"))
    status, said = run(folder / "old.pt", folder / "new", *words)
    assert status == 1 and said.startswith("advkd: ") and said.count("\n") == 1
    assert "old.pt" in said and sorted(folder.rglob("*")) == before
    return said


@own_process
def test_a_pickle_calls_nothing(tmp_path: Path, run: Run) -> None:
    torch.save({"conv_in.weight": Calls(tmp_path / "made")}, tmp_path / "old.pt")
    assert "cannot be converted" in refused(run, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"init_conv.weight": torch.zeros(8, 3, 7, 7)}, "denoising-diffusion-pytorch.*RMS norms"),
        ({"input_blocks.0.0.weight": torch.zeros(3)}, "--from guided-diffusion"),
        ({"conv_in.weight": torch.zeros(3)}, "config.json"),
        ({"model": {"a": torch.zeros(1)}, "step": 3}, "model; step.*--key"),
        ({}, "no tensors"),
        ([torch.zeros(1)], "a list, not a table"),
        ({3: torch.zeros(1)}, "3 is no plain tensor"),
        ({"a": torch.zeros(2).to_sparse()}, "'a' is no plain tensor"),
    ],
)
def test_what_is_no_teacher(tmp_path: Path, run: Run, content: Any, said: str) -> None:
    torch.save(content, tmp_path / "old.pt")
    assert re.search(said, refused(run, tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"", "cannot be converted"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00a", "cannot be converted"),
    ],
)
def test_what_stands_in_for_weights(tmp_path: Path, run: Run, content: bytes, said: str) -> None:
    (tmp_path / "old.pt").write_bytes(content)
    assert said in refused(run, tmp_path)


def test_an_entry_by_its_key(tmp_path: Path, run: Run) -> None:
    flags = GUIDED["as improved-diffusion's"]
    content = {"ema": {"out.2.bias": torch.zeros(3)}, "step": 7}
    torch.save(content, tmp_path / "old.pt")
    guided = ["--from", "guided-diffusion", "--", *words_of(flags)]
    assert "missing conv_in.weight" in refused(run, tmp_path, "--key", "ema", *guided)
    assert "no table 'step', but ema; step" in refused(run, tmp_path, "--key", "step", *guided)


def test_what_is_there_is_left_alone(network: UNet2DModel, tmp_path: Path, run: Run) -> None:
    network.save_pretrained(tmp_path / "old")
    DDIMScheduler().save_pretrained(tmp_path / "old")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("x")
    status, said = run(tmp_path / "old", tmp_path / "new")
    assert status == 1 and "new is there already" in said
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["mine"]
    (tmp_path / "new" / "mine").unlink()
    assert run(tmp_path / "old", tmp_path / "new")[0] == 0


def test_flags_are_of_guided_diffusion(tmp_path: Path, run: Run) -> None:
    status, said = run(tmp_path, tmp_path / "new", "--", "--image_size", "64")
    assert status == 1 and "flags belong to --from guided-diffusion" in said


def test_several_pickles_are_named(network: UNet2DModel, tmp_path: Path, run: Run) -> None:
    network.save_pretrained(tmp_path / "old", safe_serialization=False)
    DDIMScheduler().save_pretrained(tmp_path / "old")
    weights = tmp_path / "old" / "diffusion_pytorch_model.bin"
    for name in ("a.pt", "b.ckpt"):
        (weights.parent / name).write_bytes(weights.read_bytes())
    weights.unlink()
    status, said = run(tmp_path / "old", tmp_path / "new")
    assert status == 1 and "a.pt, b.ckpt" in said


def test_the_documented_forms_are_those_that_are_compared() -> None:
    """docs/teachers.md has a row for each form of tests/against/teachers.py, and no other."""
    root = Path(__file__).resolve().parents[1]
    path = root / "tests" / "against" / "teachers.py"
    spec = importlib.util.spec_from_file_location("against_teachers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (root / "docs" / "teachers.md").read_text().partition("\n## ")[0]
    rows = [line.split(" | ")[0][2:] for line in text.splitlines() if line.startswith("| ")]
    tables = [i for i, row in enumerate(rows) if " of diffusers " in row or row == "files"]
    found = [rows[i + 1 : j] for i, j in zip(tables, [*tables[1:], len(rows)], strict=True)]
    networks, files, schedules = found
    guided = next(i for i, row in enumerate(files) if row.startswith("guided-diffusion"))
    assert networks == list(module.NETWORKS)
    assert files[guided + 1 :] == list(module.GUIDED)
    assert schedules == list(module.SCHEDULES)
