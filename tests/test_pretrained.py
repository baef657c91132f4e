"""Teacher folders in every form that diffusers and the google/ddpm-* uploads have."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel

from advkd.config import ConfigError, StudentConfig
from advkd.diffusion import Schedule
from advkd.engine.sampling import generate
from advkd.files import LISTED, CheckpointError, read_tensors, write_tensors
from advkd.models.student import Student
from advkd.models.unet import UNet, config_from_diffusers
from advkd.pretrained import (
    CLASS_NAMES,
    WEIGHTS,
    load_network,
    load_student,
    load_teacher,
    resolve,
    save_student,
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
    settings["down_block_types"][0] = "SkipDownBlock2D"
    config.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="SkipDownBlock2D"):
        load_teacher(pipeline)


def test_unsupported_scheduler_value_is_an_error(pipeline: Path) -> None:
    file = pipeline / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"variance_type": "learned"}))
    with pytest.raises(ValueError, match=r"variance_type.*learned"):
        load_teacher(pipeline)


def test_a_learned_range_and_twice_the_channels_go_together(pipeline: Path) -> None:
    file = pipeline / "scheduler" / "scheduler_config.json"
    edit(file, variance_type="learned_range")
    with pytest.raises(ConfigError, match=r"variance_type='learned_range'.*1 channels for 1"):
        load_teacher(pipeline)
    with pytest.raises(ValueError, match=r"2 would be.*variance_type='learned_range'"):
        generate(UNet(dataclasses.replace(our_teacher().config, out_channels=2)), 1, seed=0)


def test_a_learned_range_loads_and_comes_back(tmp_path: Path) -> None:
    """From diffusers' DDPMPipeline and back to it, where it samples."""
    torch.manual_seed(1)
    network = UNet2DModel(**SETTINGS | {"out_channels": 2}).eval()
    scheduler = DDPMScheduler(num_train_timesteps=50, variance_type="learned_range")
    DDPMPipeline(network, scheduler).save_pretrained(tmp_path / "theirs")
    ours = load_teacher(tmp_path / "theirs")
    assert ours.learns_variance
    assert_same_network(ours, network)
    save_teacher(ours, tmp_path / "ours")
    pipe = DDPMPipeline.from_pretrained(tmp_path / "ours")
    assert_same_network(ours, pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)
    assert load_teacher(tmp_path / "ours").schedule == ours.schedule


def test_a_pickle_is_refused_with_the_way_to_convert_it(pipeline: Path) -> None:
    weights = pipeline / "unet" / WEIGHTS
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError) as caught:
        load_teacher(pipeline)
    for part in (weights.with_suffix(".bin").name, f"advkd convert {pipeline / 'unet'}"):
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


NAMES = ("T-shirt/top", "\N{LATIN SMALL LETTER E WITH ACUTE}t\udcff \n", "2")


def our_conditional_teacher() -> UNet:
    config = dataclasses.replace(config_from_diffusers(SETTINGS), num_class_embeds=3)
    return UNet(config, Schedule(num_train_timesteps=100)).eval()


def test_names_of_classes_come_back(tmp_path: Path) -> None:
    teacher, student = our_conditional_teacher(), our_student(num_classes=3)
    for names in (None, NAMES):
        teacher.class_names = student.class_names = names
        save_teacher(teacher, tmp_path / "teacher")
        save_student(student, tmp_path / "student")
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert load_teacher(tmp_path / "teacher").class_names == names
            assert load_student(tmp_path / "student").class_names == names
        for file in ("teacher/unet/config.json", "student/config.json"):
            assert ("class_names" in (tmp_path / file).read_text()) == (names is not None)


def test_names_of_classes_travel_through_diffusers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours = our_conditional_teacher()
    ours.class_names = NAMES
    save_teacher(ours, tmp_path / "ours")
    pipe = DDIMPipeline.from_pretrained(tmp_path / "ours")
    assert "class_names" not in caplog.text
    pipe.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "theirs", tmp_path / "theirs" / "unet"):
        assert load_teacher(folder, tmp_path / "theirs" / "scheduler").class_names == NAMES


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("abc", "list of texts|list of str"),
        (["a", "b", 3], "list of texts|type str"),
        (["a", "b", None], "list of texts|type str"),
        (["a", "b"], "2 names for 3 classes"),
        (["a"] * 100_000, "100000 names for 3 classes"),
        (["a", "b", "a"], "one name twice"),
        (["a", "b", ""], "1 to 255 characters"),
        (["a", "b", "c" * 256], "1 to 255 characters"),
    ],
)
def test_names_that_are_no_names_of_the_classes(tmp_path: Path, names: Any, words: str) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    save_teacher(our_conditional_teacher(), teacher)
    edit(teacher / "unet" / "config.json", **{CLASS_NAMES: names})
    with pytest.raises(ConfigError, match=rf"config\.json: .*({words})"):
        load_teacher(teacher)
    save_student(our_student(num_classes=3), student)
    edit(student / "config.json", class_names=names)
    with pytest.raises(CheckpointError, match=rf"config\.json describes no student.*({words})"):
        load_student(student)


def test_names_without_classes(tmp_path: Path) -> None:
    """Neither read nor written: what is saved can be loaded."""
    for model, save in ((our_teacher(), save_teacher), (our_student(), save_student)):
        save(model, tmp_path)
        model.class_names = NAMES
        with pytest.raises(ConfigError, match="3 names for no classes"):
            save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    edit(tmp_path / "unet" / "config.json", **{CLASS_NAMES: NAMES})
    with pytest.raises(ConfigError, match="3 names for no classes"):
        load_teacher(tmp_path)
    edit(tmp_path / "config.json", class_names=NAMES)
    with pytest.raises(CheckpointError, match="3 names for no classes"):
        load_student(tmp_path)


def test_half_precision_folders_load_in_float32(tmp_path: Path) -> None:
    ours = our_teacher()
    save_teacher(ours, tmp_path, torch.float16)
    stored = safetensors.torch.load_file(tmp_path / "unet" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for name, tensor in load_teacher(tmp_path).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, ours.state_dict()[name].half().float())


# Odd folders that load.


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": [8, 8]},
        {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 500}
        | {"power": 0.75, "update_after_step": 0, "use_ema_warmup": True},
        {"num_train_timesteps": 1000},
        {"time_embedding_dim": 32},
        {"attn_norm_num_groups": 4},
        {"downsample_type": None, "upsample_type": None},
        {"downsample_type": "resnet"},  # the only block with attention is not halved
        {"class_embed_type": None, "num_class_embeds": None},
        {"act_fn": "SiLU"},
        {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]},
        {"_name_or_path": "x", "_diffusers_version": "0.9", "_anything": [1]},
    ],
    ids=str,
)
def test_settings_that_change_nothing_load(
    pipeline: Path, network: UNet2DModel, changes: dict[str, Any]
) -> None:
    """Without a warning, and diffusers takes the same folder for the same network."""
    edit(pipeline / "unet" / "config.json", **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = load_teacher(pipeline)
    assert_same_network(ours, network)
    assert ours.config.sample_size == 8
    assert_same_network(ours, UNet2DModel.from_pretrained(pipeline / "unet").eval())


def test_settings_that_diffusers_ignores_are_ignored_aloud(
    pipeline: Path, network: UNet2DModel
) -> None:
    edit(pipeline / "unet" / "config.json", cross_attention_dim=768, zoom=1)
    edit(pipeline / "scheduler" / "scheduler_config.json", use_karras_sigmas=False)
    with pytest.warns(UserWarning) as caught:
        unet = load_teacher(pipeline)
    words = " ".join(str(warning.message) for warning in caught)
    assert "cross_attention_dim" in words and "zoom" in words and "use_karras_sigmas" in words
    assert_same_network(unet, network)
    assert_same_network(unet, UNet2DModel.from_pretrained(pipeline / "unet").eval())


def test_a_byte_order_mark_is_no_content(pipeline: Path, network: UNet2DModel) -> None:
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        (pipeline / name).write_bytes(b"\xef\xbb\xbf" + (pipeline / name).read_bytes())
    assert_same_network(load_teacher(pipeline), network)


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "DDP of torch.compile": lambda name: f"module._orig_mod.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
    "each block by torch.compile": lambda name: re.sub(r"(blocks\.\d+)\.", r"\1._orig_mod.", name),
    "activation checkpointing of resnets": lambda name: re.sub(
        r"(resnets\.\d+)\.", r"\1._checkpoint_wrapped_module.", name
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_names_with_the_marks_of_wrappers(
    pipeline: Path, network: UNet2DModel, wrapping: str
) -> None:
    path = pipeline / "unet" / WEIGHTS
    tensors = safetensors.torch.load_file(path)
    wrapped = {WRAPPINGS[wrapping](name): tensor for name, tensor in tensors.items()}
    assert wrapped.keys() != tensors.keys()
    safetensors.torch.save_file(wrapped, path)
    assert_same_network(load_teacher(pipeline), network)


def test_names_with_and_without_a_mark_are_an_error(pipeline: Path) -> None:
    path = pipeline / "unet" / WEIGHTS
    tensors = safetensors.torch.load_file(path)
    tensors["module.conv_in.bias"] = tensors["conv_in.bias"].clone()
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"twice.*conv_in\.bias"):
        load_teacher(pipeline)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_the_only_variant_of_the_weights_is_taken(pipeline: Path, variant: str) -> None:
    network = UNet2DModel.from_pretrained(pipeline / "unet").half()
    (pipeline / "unet" / WEIGHTS).unlink()
    network.save_pretrained(pipeline / "unet", variant=variant)
    (pipeline / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x")
    theirs = UNet2DModel.from_pretrained(pipeline / "unet", variant=variant).float().eval()
    assert_same_network(load_teacher(pipeline), theirs)


def test_several_variants_are_named(pipeline: Path) -> None:
    weights = pipeline / "unet" / WEIGHTS
    shutil.copy(weights, weights.with_suffix(".bf16.safetensors"))
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(CheckpointError, match=r"bf16\.safetensors.*fp16\.safetensors"):
        load_teacher(pipeline)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(
    pipeline: Path, network: UNet2DModel, variant: str | None
) -> None:
    (pipeline / "unet" / WEIGHTS).unlink()
    network.save_pretrained(pipeline / "unet", max_shard_size="20KB", variant=variant)
    assert len(list((pipeline / "unet").glob("*.safetensors"))) > 5
    assert_same_network(load_teacher(pipeline), network)
    theirs = UNet2DModel.from_pretrained(pipeline / "unet", variant=variant).eval()
    assert_same_network(load_teacher(pipeline), theirs)


def parts(pipeline: Path, network: UNet2DModel) -> tuple[Path, list[Path]]:
    """The index of weights in several files, and the files."""
    (pipeline / "unet" / WEIGHTS).unlink()
    network.save_pretrained(pipeline / "unet", max_shard_size="20KB")
    folder = pipeline / "unet"
    return folder / f"{WEIGHTS}.index.json", sorted(folder.glob("*.safetensors"))


def test_a_part_that_is_missing_is_named(pipeline: Path, network: UNet2DModel) -> None:
    _, files = parts(pipeline, network)
    files[3].unlink()
    with pytest.raises(CheckpointError, match=files[3].name):
        load_teacher(pipeline)


def test_parts_without_their_index_are_named(pipeline: Path, network: UNet2DModel) -> None:
    index, files = parts(pipeline, network)
    index.unlink()
    with pytest.raises(CheckpointError, match=rf"{files[0].name}.*index\.json"):
        load_teacher(pipeline)


@pytest.mark.parametrize(
    "content",
    [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": "../b.safetensors"}}]
    + [{"weight_map": {"a": name}} for name in ("/etc/passwd", "..", "", 3, ["a/b"])],
    ids=str,
)
def test_an_index_of_anything_else_is_named(
    pipeline: Path, network: UNet2DModel, content: dict[str, Any]
) -> None:
    index, _ = parts(pipeline, network)
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{index.parent}"):
        load_teacher(pipeline)


def test_a_tensor_in_two_parts_is_an_error(pipeline: Path, network: UNet2DModel) -> None:
    _, files = parts(pipeline, network)
    shutil.copy(files[0], files[1])
    with pytest.raises(CheckpointError, match="twice"):
        load_teacher(pipeline)


def test_a_checkpoint_of_diffusers_training_script(
    pipeline: Path, network: UNet2DModel, tmp_path: Path
) -> None:
    """unet/ beside unet_ema/, whose config.json says how the average was made, and no scheduler."""
    checkpoint, scheduler = tmp_path / "checkpoint-500", pipeline / "scheduler"
    average = EMAModel(network.parameters(), model_cls=UNet2DModel, model_config=network.config)
    for shadow in average.shadow_params:
        shadow.mul_(1.25)
    average.save_pretrained(checkpoint / "unet_ema")
    ema = UNet2DModel.from_pretrained(checkpoint / "unet_ema").eval()
    assert_same_network(load_teacher(checkpoint, scheduler), ema)
    network.save_pretrained(checkpoint / "unet")
    with pytest.warns(UserWarning, match="unet_ema"):
        assert_same_network(load_teacher(checkpoint, scheduler), network)
    assert_same_network(load_teacher(checkpoint / "unet_ema", scheduler), ema)


# Odd folders that do not.


@pytest.mark.parametrize("size", [[8, 16], [8], ["8", "8"], [8, 8, 8], [[8], [8]], "8", 8.5])
def test_a_size_that_is_not_square_is_named(pipeline: Path, size: Any) -> None:
    edit(pipeline / "unet" / "config.json", sample_size=size)
    with pytest.raises(ConfigError, match=r"config\.json.*sample_size"):
        load_teacher(pipeline)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"PK\x03\x04\x00\x00\x08\x08archive/data.pkl", "torch.save"),
        (b"\x80\x02}q\x00(X\x01\x00\x00\x00a", "pickle"),
        (b"", "cut off"),
        (b"\x10\x00", "cut off"),
    ],
)
def test_what_stands_in_for_weights_is_named(pipeline: Path, content: bytes, words: str) -> None:
    (pipeline / "unet" / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}.*{words}"):
        load_teacher(pipeline)


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_what_stands_in_for_settings_is_named(pipeline: Path, name: str) -> None:
    (pipeline / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n")
    with pytest.raises(CheckpointError, match=rf"{Path(name).name}.*Git LFS pointer"):
        load_teacher(pipeline)


def test_a_long_list_of_differences_is_cut(pipeline: Path) -> None:
    path = pipeline / "unet" / WEIGHTS
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({f"other.{name}": t for name, t in tensors.items()}, path)
    with pytest.raises(CheckpointError) as caught:
        load_teacher(pipeline)
    more = 2 * len(tensors) - LISTED
    assert str(caught.value).endswith(f"; and {more} more")
    assert str(caught.value).count("missing") == LISTED and len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, kind: str, value: float) -> None:
    if kind == "teacher":
        save_teacher(our_teacher(), tmp_path)
        file, load = tmp_path / "unet" / WEIGHTS, load_teacher
        name = "mid_block.resnets.1.conv2.bias"
    else:
        save_student(our_student(), tmp_path)
        file, name, load = tmp_path / "model.safetensors", "heads.1.conv.weight", load_student
    tensors = read_tensors(file)
    tensors[name].view(-1)[-1] = value
    write_tensors(file, tensors)
    with pytest.raises(CheckpointError, match=rf"{file.name}.*{re.escape(name)}.*NaN or infinity"):
        load(tmp_path)


def test_a_double_that_float32_cannot_hold_is_not_finite(tmp_path: Path) -> None:
    save_teacher(our_teacher(), tmp_path, torch.float64)
    tensors = read_tensors(tmp_path / "unet" / WEIGHTS)
    tensors["conv_in.bias"][0] = 1e300
    write_tensors(tmp_path / "unet" / WEIGHTS, tensors)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        load_teacher(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    save_teacher(our_teacher(), tmp_path)
    tensors = read_tensors(tmp_path / "unet" / WEIGHTS)
    write_tensors(tmp_path / "unet" / WEIGHTS, {n: t.to(torch.int8) for n, t in tensors.items()})
    with pytest.raises(CheckpointError, match=r"int8 instead of torch\.float32"):
        load_teacher(tmp_path)


def our_student(num_classes: int | None = None) -> Student:
    torch.manual_seed(4)
    config = StudentConfig("unet", (4, 8), (16, 8), attention=(4,), groups=4)
    return Student(config, 8, 1, num_classes=num_classes).eval()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"size": 16}, "stages"),
        ({"size": "8"}, "size"),
        ({"size": [8]}, "size"),
        ({"channels": 0}, "channels"),
        ({"channels": 2.0}, "channels"),
        ({"target": "noise"}, "target"),
        ({"num_classes": -1}, "num_classes"),
        ({"num_classes": True}, "num_classes"),
        ({"student": 3}, "student"),
        ({"student": {"stages": {"a": 1}}}, "stages"),
        ({"student": {"blocks": 10**9}}, "blocks"),
        ({"extra": 1}, "extra"),
    ],
)
def test_settings_that_no_student_has_are_named(
    tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    save_student(our_student(), tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json describes no .*{word}"):
        load_student(tmp_path)


@pytest.mark.parametrize("key", ["size", "channels", "student"])
def test_a_student_without_a_setting_is_an_error(tmp_path: Path, key: str) -> None:
    save_student(our_student(), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings[key]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{key}"):
        load_student(tmp_path)


# Memory: taken only for what fits.

HUGE = """
import resource, sys, time
from pathlib import Path
from advkd.files import CheckpointError
from advkd.pretrained import load_student, load_teacher
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for load, folder in ((load_teacher, sys.argv[1]), (load_student, sys.argv[2])):
    try:
        load(folder)
    except CheckpointError as error:
        print(error)
"""


def test_a_network_that_asks_for_terabytes_is_refused_before_memory_is_taken(
    tmp_path: Path,
) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    save_teacher(our_teacher(), teacher)
    edit(teacher / "unet" / "config.json", block_out_channels=(16384,) * 2, layers_per_block=30)
    save_student(our_student(), student)
    huge = {"stages": [4, 8], "widths": [16384] * 2, "blocks": 60}
    edit(student / "config.json", student=huge)
    arguments = [sys.executable, "-c", HUGE, str(teacher), str(student)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, file in zip(done.stdout.splitlines(), (WEIGHTS, "model.safetensors"), strict=True):
        assert f"{file} does not fit the network" in line and "16384" in line


def test_settings_are_refused_in_milliseconds(tmp_path: Path) -> None:
    save_teacher(our_teacher(), tmp_path)
    edit(tmp_path / "unet" / "config.json", block_out_channels=(16384, 16384))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        with pytest.raises(CheckpointError, match="does not fit"):
            load_teacher(tmp_path)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.1


def test_a_header_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    save_student(our_student(), tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for claim in (2**40, 2**63, len(content)):
        path.write_bytes(struct.pack("<Q", claim) + content[8:])
        with pytest.raises(CheckpointError, match=r"model\.safetensors.*header"):
            load_student(tmp_path)


def test_loading_leaves_the_global_random_state_and_the_ambient_defaults_alone(
    tmp_path: Path,
) -> None:
    save_student(our_student(), tmp_path)
    torch.manual_seed(9)
    expected = torch.randn(3)
    torch.manual_seed(9)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        student = load_student(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("cpu")
    assert torch.equal(torch.randn(3), expected)
    for name, tensor in our_student().state_dict().items():
        found = student.state_dict()[name]
        assert found.dtype == torch.float32 and torch.equal(found, tensor), name


def test_load_network_is_for_any_module(tmp_path: Path) -> None:
    """Counters keep their dtype, and what the builder raises names the settings' file."""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    net(torch.randn(3, 1, 5, 5))
    file = tmp_path / "w.safetensors"
    sha256 = write_tensors(file, net.state_dict())

    def make() -> torch.nn.Sequential:
        return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))

    again = load_network(make, tmp_path / "c.json", file, sha256=sha256)
    for name, tensor in net.state_dict().items():
        found = again.state_dict()[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    with pytest.raises(CheckpointError, match="checksum"):
        load_network(make, tmp_path / "c.json", file, sha256="0" * 64)
    for size in (10**12, 10**30, "3"):
        with pytest.raises(CheckpointError, match=r"c\.json describes no network"):
            load_network(lambda s=size: torch.nn.Linear(s, 10**9), tmp_path / "c.json", file)
