"""`python -m tests.against.teachers`: every form of a teacher beside the code that it is from.

Each form is made by its own code with random weights, written as that code writes it, loaded here
and run on the same input: by torch's modules, and by the engine. Printed is the largest difference
as a share of the largest number, all in float32. The tables are those of docs/teachers.md. Forms of
guided-diffusion need: pip install guided-diffusion-sdk.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddpm
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from advkd.convert import convert, parser
from advkd.diffusion import Schedule, ddim_table, ddpm_table
from advkd.engine.cache import compile as engine_of
from advkd.engine.eager import general_step
from advkd.models.unet import UNet
from advkd.pretrained import load_teacher, save_teacher

TIME = 417
SIZE = 16
SETTINGS: dict[str, Any] = {
    "sample_size": SIZE,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}
ATTENTION = {
    "down_block_types": ("AttnDownBlock2D",) * 2,
    "up_block_types": ("AttnUpBlock2D",) * 2,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "as the google/ddpm-* uploads": {
        "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
    "`resnet_time_scale_shift=\"scale_shift\"`": {"resnet_time_scale_shift": "scale_shift"},
    "`downsample_type`, `upsample_type` `\"resnet\"`": {
        **ATTENTION, "downsample_type": "resnet", "upsample_type": "resnet",
    },
    "`ResnetDownsampleBlock2D`, `ResnetUpsampleBlock2D`": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "`class_embed_type=null`, `num_class_embeds`": {"num_class_embeds": 10},
    "`class_embed_type=\"timestep\"`": {"class_embed_type": "timestep", "num_class_embeds": 10},
    "`attn_norm_num_groups`": {"attn_norm_num_groups": 4},
    "`add_attention=false`": {"add_attention": False},
    "`mid_block_type=null`": {"mid_block_type": None},
    "`dropout`": {"dropout": 0.1},
    "`time_embedding_dim`": {"time_embedding_dim": 96},
    "`center_input_sample`, `mid_block_scale_factor`": {
        "center_input_sample": True, "mid_block_scale_factor": 1.4142,
    },
    "`sample_size=null`": {"sample_size": None},
    "`sample_size=[16, 16]`": {"sample_size": [SIZE, SIZE]},
}  # fmt: skip
GUIDED: dict[str, dict[str, Any]] = {
    "`--use_scale_shift_norm`, `--num_heads`": {},
    "`--resblock_updown`, `--learn_sigma`, `--num_head_channels`": {
        "resblock_updown": True, "learn_sigma": True, "num_head_channels": 16,
    },
    "`--class_cond`, `--use_new_attention_order`": {
        "class_cond": True, "use_new_attention_order": True, "num_head_channels": 16,
    },
    "`--use_scale_shift_norm False`": {"use_scale_shift_norm": False},
}  # fmt: skip
SCHEDULES: dict[str, dict[str, Any]] = {
    "`prediction_type=\"v_prediction\"`": {"prediction_type": "v_prediction"},
    "`timestep_spacing=\"trailing\"`": {"timestep_spacing": "trailing"},
    "`timestep_spacing=\"linspace\"`": {"timestep_spacing": "linspace"},
    "`rescale_betas_zero_snr`": {
        "rescale_betas_zero_snr": True, "prediction_type": "v_prediction",
    },
    "`thresholding`, `sample_max_value=1.5`": {"thresholding": True, "sample_max_value": 1.5},
    "`trained_betas`": {"trained_betas": tuple(0.0005 + 0.0001 * i for i in range(100))},
    "`variance_type=\"learned_range\"`, DDPM": {"variance_type": "learned_range"},
}  # fmt: skip

Row = tuple[str, str, str]  # the form, the difference of the modules, that of the engine


def randomize(network: nn.Module) -> nn.Module:
    """Random values in every parameter: zeros and ones would hide swapped tensors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return network.eval()


def share(ours: Tensor, theirs: Tensor) -> str:
    """The largest difference as a share of the largest number."""
    return f"{float((ours - theirs).abs().max() / theirs.abs().max()):.0e}"


@torch.no_grad()
def row(form: str, ours: UNet, original: Callable[..., Tensor]) -> Row:
    """How far a loaded network is from its original."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, ours.config.in_channels, SIZE, SIZE, generator=generator)
    y = None if ours.num_classes is None else torch.tensor([1, 7])
    theirs = original(x, torch.full((2,), TIME), y)
    engine = engine_of(ours, size=(SIZE, SIZE))
    found = engine.run(x, y, t=TIME)
    return form, share(ours(x, TIME, y), theirs), share(found, theirs[:, : found.shape[1]])


def of_diffusers(network: UNet2DModel) -> Callable[..., Tensor]:
    return lambda x, t, y: network(x, t, class_labels=y).sample


def networks(room: Path) -> Iterator[Row]:
    """Every architecture, as diffusers saves it; and what we save, as diffusers loads it."""
    for number, (form, change) in enumerate(NETWORKS.items()):
        folder = room / f"network {number}"
        theirs = randomize(UNet2DModel(**SETTINGS | change))
        theirs.save_pretrained(folder / "unet")
        DDIMScheduler().save_pretrained(folder / "scheduler")
        ours = load_teacher(folder)
        yield row(form, ours, of_diffusers(theirs))
        save_teacher(ours, room / "ours")
        again = UNet2DModel.from_pretrained(room / "ours" / "unet").eval()
        there_and_back = row(form, ours, of_diffusers(again))
        assert there_and_back[1:] == row(form, ours, of_diffusers(theirs))[1:], form


def files(room: Path) -> Iterator[Row]:
    """Every way in which weights lie in a folder."""
    theirs = randomize(UNet2DModel(**SETTINGS))
    original = of_diffusers(theirs)
    scheduler = room / "scheduler"
    DDIMScheduler().save_pretrained(scheduler)

    def loaded(form: str, folder: Path) -> Row:
        return row(form, load_teacher(folder, scheduler), original)

    theirs.save_pretrained(room / "parts", max_shard_size="200KB")
    yield loaded("several files and their index", room / "parts")
    tensors = theirs.state_dict()
    for mark in ("_orig_mod.", "module."):
        folder = room / mark.strip(".")
        theirs.save_pretrained(folder)
        marked = {mark + name: tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(marked, folder / "diffusion_pytorch_model.safetensors")
        yield loaded(f"names that begin with `{mark}`", folder)
    EMAModel(
        theirs.parameters(), model_cls=UNet2DModel, model_config=theirs.config
    ).save_pretrained(room / "checkpoint" / "unet_ema")
    yield loaded("`unet_ema/` of diffusers' training scripts", room / "checkpoint")
    theirs.save_pretrained(room / "pickle", safe_serialization=False)
    yield row("`.bin`, by `advkd convert`", converted(room / "pickle", room, scheduler), original)
    halves = UNet2DModel.from_pretrained(room / "parts").half()
    halves.save_pretrained(room / "fp16", variant="fp16")
    again = UNet2DModel.from_pretrained(room / "fp16", variant="fp16").float().eval()
    yield row("`.fp16.safetensors`", load_teacher(room / "fp16", scheduler), of_diffusers(again))


def converted(old: Path, room: Path, scheduler: Path | None = None, *words: str) -> UNet:
    """What `advkd convert` makes of a checkpoint."""
    new = Path(tempfile.mkdtemp(dir=room)) / "new"
    args = parser().parse_args([str(old), str(new), *words[:2]])
    args.flags, args.scheduler = list(words[2:]), scheduler
    with contextlib.redirect_stdout(None):
        convert(args)
    return load_teacher(new)


def guided(room: Path) -> Iterator[Row]:
    """Checkpoints of guided-diffusion, by `advkd convert`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from guided_diffusion import script_util

    small = {
        "image_size": SIZE, "num_channels": 32, "num_res_blocks": 2, "channel_mult": "1,2",
        "attention_resolutions": "8",
    }  # fmt: skip
    for form, change in GUIDED.items():
        flags = small | change
        defaults = script_util.model_and_diffusion_defaults()
        theirs = randomize(script_util.create_model_and_diffusion(**defaults | flags)[0])
        torch.save(theirs.state_dict(), room / "guided.pt")
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        ours = converted(room / "guided.pt", room, None, "--from", "guided-diffusion", *words)
        yield row(form, ours, lambda x, t, y: theirs(x, t) if y is None else theirs(x, t, y))  # noqa: B023


def schedules() -> Iterator[tuple[str, str]]:
    """20 steps of every sampler with one noise and one network, in diffusers' float32 and here."""
    for form, change in SCHEDULES.items():
        schedule = Schedule(num_train_timesteps=100, **change)
        learned = schedule.variance_type == "learned_range"
        kind = DDPMScheduler if learned else DDIMScheduler
        scheduler = kind.from_config(schedule.to_diffusers())
        scheduler.set_timesteps(20)
        table = ddpm_table(schedule, 20) if learned else ddim_table(schedule, 20)
        yield form, share(_ours(table), _theirs(scheduler, learned))


def _network(x: Tensor, t: int, learned: bool) -> Tensor:
    out = torch.tanh(1.2 * x + 0.01 * t)
    return torch.cat([out, torch.sin(3 * x)], dim=1) if learned else out


def _noise(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)


def _ours(table: Any) -> Tensor:
    x = _noise(-1)
    for i, t in enumerate(table.timesteps.tolist()):
        out = _network(x, t, True)
        x, _ = general_step(table, i, x, out[:, :3], out[:, 3:], _noise(i))
    return x


def _theirs(scheduler: Any, learned: bool) -> Tensor:
    x = _noise(-1)
    for i, t in enumerate(scheduler.timesteps.tolist()):
        scheduling_ddpm.randn_tensor = lambda *_, i=i, **__: _noise(i)
        x = scheduler.step(_network(x, t, learned), t, x).prev_sample
    return x


def printed(title: str, rows: Iterator[tuple[str, ...]], columns: tuple[str, ...]) -> None:
    """A table in Markdown."""
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for cells in rows:
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> int:
    """Entry point; returns the exit status."""
    argparse.ArgumentParser(
        prog="python -m tests.against.teachers", description=__doc__
    ).parse_args()
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    version = importlib.metadata.version
    two = ("modules", "engine")
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        title = f"`UNet2DModel` of diffusers {version('diffusers')}"
        printed(title, networks(room), two)
        printed("files", files(room), two)
        if importlib.util.find_spec("guided_diffusion") is not None:
            title = f"guided-diffusion (guided-diffusion-sdk {version('guided-diffusion-sdk')})"
            printed(title, guided(room), two)
    printed(f"schedulers of diffusers {version('diffusers')}", schedules(), ("after 20 steps",))
    return 0


if __name__ == "__main__":
    sys.exit(main())
