"""UNets of OpenAI's guided-diffusion (Dhariwal and Nichol 2021): their flags and tensors, as ours.

Their checkpoints hold tensors alone; the architecture and the schedule are in the flags of the
command that trained them. Both map to diffusers' `UNet2DModel`: residual blocks and attention are
the same, in another order and by other names.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from advkd.config import UNetConfig, build
from advkd.diffusion import LEARNED_RANGE, Schedule

# The flags that make a network or a schedule another one, and their defaults.
FLAGS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": False,
}
# Flags of losses, of memory and of sampling, which change neither.
_PASSED_OVER = {
    *("use_fp16", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "timestep_respacing"),
    *("batch_size", "num_samples", "use_ddim", "model_path", "clip_denoised", "lr", "ema_rate"),
}
_CHANNEL_MULT = {
    512: "0.5,1,1,2,2,4,4",
    256: "1,1,2,2,4,4",
    128: "1,1,2,3,4",
    64: "1,2,3,4",
}
_CLASSES = 1000  # of a class-conditional network: ImageNet's
_GROUPS = 32
_TIMES = 1000  # that a network is asked for with rescale_timesteps

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
_RESAMPLER = {"op": "conv", "conv": "conv"}
_WHOLE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def parse_flags(words: Sequence[str]) -> dict[str, Any]:
    """The flags of a command line such as `--image_size 64 --learn_sigma True`.

    ValueError for a flag that guided-diffusion does not have, and for a value of another type.
    """
    flags = dict(FLAGS)
    joined = [part for word in words for part in _parts(word)]
    if len(joined) % 2:
        raise ValueError(f"the flag {joined[-1]} has no value")
    for name, text in zip(joined[::2], joined[1::2], strict=True):
        key = name.removeprefix("--")
        if not name.startswith("--") or key not in FLAGS.keys() | _PASSED_OVER:
            known = ", ".join(sorted(FLAGS))
            raise ValueError(f"{name!r} is no flag of guided-diffusion's networks: {known}")
        if key in FLAGS:
            flags[key] = _value(name, text, type(FLAGS[key]))
    return flags


def _parts(word: str) -> Iterator[str]:
    """A word of a command line; `--name=value` is two."""
    name, equals, value = word.partition("=")
    yield from (name, value) if equals and name.startswith("--") else (word,)


def _value(name: str, text: str, kind: type) -> Any:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return words[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name} {text!r:.100} is no {kind.__name__}") from None


def config_from_flags(flags: Mapping[str, Any]) -> UNetConfig:
    """The architecture. ValueError names flags that make one this package does not have."""
    size, width = flags["image_size"], flags["num_channels"]
    if flags["num_heads_upsample"] not in (-1, flags["num_heads"]):
        raise ValueError(
            "num_heads_upsample is not supported: the way up would need heads of its own"
        )
    mult = _numbers("channel_mult", flags["channel_mult"] or _CHANNEL_MULT.get(size, ""), float)
    if mult[0] != 1:
        raise ValueError(
            f"channel_mult begins with {mult[0]:g}, not 1: times would need sinusoids of another "
            "width than the first level"
        )
    widths = tuple(int(width * factor) for factor in mult)
    sides = _numbers("attention_resolutions", flags["attention_resolutions"], int)
    attended = {size // side for side in sides if side > 0}
    with_attention = [1 << level in attended for level in range(len(widths))]
    resnet = flags["resblock_updown"]
    down, up = ("ResnetDownsample" if resnet else "Down"), ("ResnetUpsample" if resnet else "Up")
    per_head = flags["num_head_channels"]
    heads = tuple(w // flags["num_heads"] for w in widths) if per_head == -1 else per_head
    settings = dict(
        sample_size=size,
        in_channels=3,
        out_channels=6 if flags["learn_sigma"] else 3,
        block_out_channels=widths,
        down_block_types=tuple(f"{'AttnDown' if a else down}Block2D" for a in with_attention),
        up_block_types=tuple(f"{'AttnUp' if a else up}Block2D" for a in with_attention[::-1]),
        layers_per_block=flags["num_res_blocks"],
        attention_head_dim=heads,
        norm_num_groups=_GROUPS,
        attn_norm_num_groups=_GROUPS,
        resnet_time_scale_shift="scale_shift" if flags["use_scale_shift_norm"] else "default",
        downsample_type="resnet" if resnet else "conv",
        upsample_type="resnet" if resnet else "conv",
        dropout=flags["dropout"],
        num_class_embeds=_CLASSES if flags["class_cond"] else None,
    )
    config: UNetConfig = build(UNetConfig, settings, "")
    return config


def _numbers(name: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} {text!r:.100} is no list of numbers") from None


def schedule_from_flags(flags: Mapping[str, Any]) -> Schedule:
    """The noise schedule. ValueError names flags that make one this package does not have.

    With rescale_timesteps a network of 4,000 steps, say, is asked for every fourth of them as 0 to
    999: the schedule is that of those thousand, which the network then knows by their own names.
    """
    T, kind = flags["diffusion_steps"], flags["noise_schedule"]
    if kind not in ("linear", "cosine"):
        raise ValueError(f"noise_schedule {kind!r:.100} is not one of linear, cosine")
    scale = 1000 / max(T, 1)
    schedule = Schedule(
        num_train_timesteps=T,
        beta_schedule="linear" if kind == "linear" else "squaredcos_cap_v2",
        beta_start=scale * 1e-4,
        beta_end=scale * 0.02,
        prediction_type="sample" if flags["predict_xstart"] else "epsilon",
        variance_type=LEARNED_RANGE if flags["learn_sigma"] else "fixed_large",
    )
    if not flags["rescale_timesteps"] or T == _TIMES:
        return schedule
    if T % _TIMES:
        raise ValueError(
            f"rescale_timesteps with diffusion_steps {T} is not supported: the network would need "
            f"times between whole numbers, since {T} is no multiple of {_TIMES}"
        )
    levels = schedule.alpha_bar[:: T // _TIMES]
    betas = 1 - levels / np.concatenate([[1.0], levels[:-1]])
    warnings.warn(
        f"of the {T} training times those {_TIMES} are taken that rescale_timesteps makes whole",
        stacklevel=2,
    )
    return dataclasses.replace(
        schedule, num_train_timesteps=_TIMES, trained_betas=tuple(betas.tolist())
    )


def renamed(
    tensors: Mapping[str, Tensor], config: UNetConfig, new_order: bool
) -> dict[str, Tensor]:
    """A checkpoint's tensors by the names of `UNet`; those of other names as they are.

    `new_order` says that attention parts queries, keys and values before the heads
    (use_new_attention_order).
    """
    prefixes = dict(_prefixes(config))
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, dot, leaf = name.removeprefix("module.").rpartition(".")
        target = _target(module, prefixes)
        if target is None:
            found[name] = tensor
        elif target.endswith(".qkv"):
            heads = 1 if new_order else _heads(config, target, tensor)
            for part, rows in zip("qkv", _split(tensor, heads), strict=True):
                found[f"{target[:-3]}to_{part}{dot}{leaf}"] = rows
        else:
            as_linear = target.endswith("to_out.0") and tensor.dim() == 3
            found[f"{target}{dot}{leaf}"] = tensor.squeeze(-1) if as_linear else tensor
    return found


def _target(module: str, prefixes: Mapping[str, str]) -> str | None:
    """The name of a module here, where it has one."""
    if module in _WHOLE:
        return _WHOLE[module]
    match = re.match(r"(?:input_blocks|output_blocks)\.\d+\.\d+|middle_block\.\d+", module)
    if match is None or match[0] not in prefixes:
        return None
    ours, rest = prefixes[match[0]], module[match.end() + 1 :]
    tables = [_RESNET] if ".resnets." in ours else [_ATTENTION]
    if "samplers." in ours:
        tables = [_RESNET, _RESAMPLER]
    inner = next((table[rest] for table in tables if rest in table), None)
    return None if inner is None else f"{ours}.{inner}"


def _prefixes(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """What each residual block, attention and change of resolution is called there and here."""
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    number = 1
    for level, kind in enumerate(config.down_block_types):
        for i in range(layers):
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{i}"
            if kind.startswith("Attn"):
                yield f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{i}"
            number += 1
        if level < levels - 1:
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.downsamplers.0"
            number += 1
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    number = 0
    for level, kind in enumerate(config.up_block_types):
        attended = kind.startswith("Attn")
        for i in range(layers + 1):
            yield f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{i}"
            if attended:
                yield f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{i}"
            if i == layers and level < levels - 1:
                yield f"output_blocks.{number}.{1 + attended}", f"up_blocks.{level}.upsamplers.0"
            number += 1


def _heads(config: UNetConfig, target: str, tensor: Tensor) -> int:
    """The heads of the attention of this name."""
    widths, heads = config.block_out_channels, config.attention_head_dim
    place, number = target.split(".")[:2]
    level = len(widths) - 1
    if place != "mid_block":
        level = int(number) if place == "down_blocks" else level - int(number)
    per_head = heads[level] if isinstance(heads, tuple) else heads or widths[level]
    return max(1, len(tensor) // 3 // per_head)


def _split(qkv: Tensor, heads: int) -> Iterator[Tensor]:
    """Queries, keys and values of (3 C, ...): rows are by head, then by which of the three."""
    rows = qkv.squeeze(-1) if qkv.dim() == 3 else qkv
    if len(rows) % (3 * heads):
        yield from (rows, rows[:0], rows[:0])  # fits nothing, and is named by who compares
        return
    by_head = rows.unflatten(0, (heads, 3, -1))
    for part in range(3):
        yield by_head[:, part].flatten(0, 1).contiguous()


def is_like(names: Sequence[str]) -> bool:
    """Whether tensors of these names are of such a network."""
    return any(name.startswith("input_blocks.") for name in names)
