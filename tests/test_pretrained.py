"""Teacher folders in every form that diffusers and the google/ddpm-* uploads have."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from advkd.diffusion import Schedule
from advkd.files import CheckpointError
from advkd.models.unet import UNet, config_from_diffusers
from advkd.pretrained import (
    WEIGHTS,
    load_teacher,
    resolve,
    save_teacher,
    zoo,
)

SETTINGS = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}
SCHEDULE = {"num_train_timesteps": 500, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}


@pytest.fixture
def network() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**SETTINGS).eval()


@pytest.fixture
def pipeline(network: UNet2DModel, tmp_path: Path) -> Path:
    """A folder as diffusers' DDPMPipeline writes it."""
    DDPMPipeline(network, DDPMScheduler(**SCHEDULE)).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@torch.no_grad()
def assert_same_network(ours: UNet, theirs: UNet2DModel) -> None:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 400])
    expected = theirs(x, t).sample
    assert (ours(x, t) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pipeline_folder(pipeline: Path, network: UNet2DModel) -> None:
    unet = load_teacher(pipeline)
    assert_same_network(unet, network)
    assert unet.schedule == Schedule(
        num_train_timesteps=500, beta_schedule="squaredcos_cap_v2", clip_sample=False
    )
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    assert_same_network(load_teacher(str(pipeline)), network)


def test_unet_folder_with_the_scheduler_named(pipeline: Path, network: UNet2DModel) -> None:
    for scheduler in (
        pipeline / "scheduler",
        str(pipeline / "scheduler"),
        pipeline / "scheduler" / "scheduler_config.json",
    ):
        unet = load_teacher(pipeline / "unet", scheduler)
        assert_same_network(unet, network)
        assert unet.schedule.num_train_timesteps == 500


def test_a_named_scheduler_wins_over_the_folders_own(pipeline: Path, tmp_path: Path) -> None:
    DDIMScheduler(num_train_timesteps=77).save_pretrained(tmp_path / "other")
    assert load_teacher(pipeline, tmp_path / "other").schedule.num_train_timesteps == 77


def test_unet_folder_without_a_scheduler_is_an_error(pipeline: Path) -> None:
    with pytest.raises(CheckpointError, match="scheduler"):
        load_teacher(pipeline / "unet")
    with pytest.raises(CheckpointError, match="nowhere"):
        load_teacher(pipeline / "unet", pipeline / "nowhere")


def test_flat_folder(pipeline: Path, network: UNet2DModel, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    shutil.copytree(pipeline / "unet", flat)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", flat)
    shutil.copy(pipeline / "model_index.json", flat)
    unet = load_teacher(flat)
    assert_same_network(unet, network)
    assert unet.schedule.num_train_timesteps == 500


def test_deprecated_attention_names(pipeline: Path, network: UNet2DModel) -> None:
    """diffusers before 0.15 called the projections query, key, value and proj_attn."""
    path = pipeline / "unet" / WEIGHTS
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        match = re.search(r"(?<=\.)(to_q|to_k|to_v|to_out\.0)(?=\.)", name)
        old[name.replace(match[0], old_names[match[0]]) if match else name] = tensor
    changed = len(set(old) - set(network.state_dict()))
    assert changed == 4 * 2 * 4  # 4 attentions, weight and bias, 4 projections
    safetensors.torch.save_file(old, path)
    assert_same_network(load_teacher(pipeline), network)


def test_deprecated_and_present_name_of_one_tensor_is_an_error(pipeline: Path) -> None:
    path = pipeline / "unet" / WEIGHTS
    tensors = safetensors.torch.load_file(path)
    name = "mid_block.attentions.0.to_q.weight"
    tensors[name.replace("to_q", "query")] = torch.zeros_like(tensors[name])
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"twice.*mid_block\.attentions\.0\.to_q\.weight"):
        load_teacher(pipeline)


def test_what_does_not_fit_is_listed(pipeline: Path) -> None:
    path = pipeline / "unet" / WEIGHTS
    tensors = safetensors.torch.load_file(path)
    del tensors["conv_in.weight"], tensors["conv_in.bias"]
    tensors["conv_middle.weight"] = torch.zeros(1)
    tensors["conv_out.bias"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load_teacher(pipeline)
    for part in (
        str(pipeline),
        "missing conv_in.weight",
        "missing conv_in.bias",
        "superfluous conv_middle.weight",
        "conv_out.bias is (3,) instead of (1,)",
    ):
        assert part in str(caught.value)


def test_unknown_block_type_is_an_error(pipeline: Path) -> None:
    config = pipeline / "unet" / "config.json"
    settings = json.loads(config.read_text())
    settings["down_block_types"][0] = "ResnetDownsampleBlock2D"
    config.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="ResnetDownsampleBlock2D"):
        load_teacher(pipeline)


def test_unsupported_scheduler_value_is_an_error(pipeline: Path) -> None:
    file = pipeline / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"variance_type": "learned_range"}))
    with pytest.raises(ValueError, match=r"variance_type.*learned_range"):
        load_teacher(pipeline)


def test_a_pickle_is_not_read_but_told_how_to_convert(pipeline: Path) -> None:
    weights = pipeline / "unet" / WEIGHTS
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError) as caught:
        load_teacher(pipeline)
    for part in (weights.with_suffix(".bin").name, "convert", "use_safetensors=False"):
        assert part in str(caught.value)


@pytest.mark.parametrize("missing", [f"unet/{WEIGHTS}", "unet/config.json"])
def test_an_absent_file_is_named(pipeline: Path, missing: str) -> None:
    (pipeline / missing).unlink()
    with pytest.raises(CheckpointError, match=Path(missing).name):
        load_teacher(pipeline)


@pytest.mark.parametrize(
    "broken", [f"unet/{WEIGHTS}", "unet/config.json", "scheduler/scheduler_config.json"]
)
def test_a_broken_file_is_named(pipeline: Path, broken: str) -> None:
    content = (pipeline / broken).read_bytes()
    (pipeline / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=Path(broken).name):
        load_teacher(pipeline)


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_json_that_is_no_table_is_an_error(pipeline: Path, file: str) -> None:
    (pipeline / file).write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=Path(file).name):
        load_teacher(pipeline)


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="scheduler"):
        load_teacher(tmp_path)


def test_zoo_names(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'no-such-network'"):
        zoo("no-such-network")
    with pytest.raises(CheckpointError, match="'no-such-network'"):
        load_teacher("zoo:no-such-network")
    with pytest.raises(CheckpointError):
        resolve("zoo:")
    with pytest.raises(CheckpointError):
        resolve("zoo:../presets")
    names = [folder.name for folder in zoo("fashion-mnist-features").parent.iterdir()]
    assert resolve("zoo:fashion-mnist-features") == zoo("fashion-mnist-features")
    with pytest.raises(CheckpointError) as caught:
        zoo("no-such-network")
    for name in names:
        assert name in str(caught.value)


def our_teacher() -> UNet:
    torch.manual_seed(3)
    schedule = Schedule(num_train_timesteps=100, variance_type="fixed_large", clip_sample=False)
    return UNet(config_from_diffusers(SETTINGS), schedule).eval()


def test_diffusers_pipelines_read_our_folder_and_sample(tmp_path: Path) -> None:
    ours = our_teacher()
    save_teacher(ours, tmp_path)
    for kind in (DDIMPipeline, DDPMPipeline):
        pipe = kind.from_pretrained(tmp_path)
        assert_same_network(ours, pipe.unet)
        assert pipe.scheduler.config["num_train_timesteps"] == 100
        assert pipe.scheduler.config["clip_sample"] is False
        pipe.set_progress_bar_config(disable=True)
        images = pipe(batch_size=2, num_inference_steps=2, output_type="np").images
        assert images.shape == (2, 8, 8, 1)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    ours = our_teacher()
    save_teacher(ours, tmp_path)
    again = load_teacher(tmp_path)
    assert (again.config, again.schedule) == (ours.config, ours.schedule)
    for (name, a), b in zip(ours.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_half_precision_folders_load_in_float32(tmp_path: Path) -> None:
    ours = our_teacher()
    save_teacher(ours, tmp_path, torch.float16)
    stored = safetensors.torch.load_file(tmp_path / "unet" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name, tensor in load_teacher(tmp_path).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, ours.state_dict()[name].half().float())
