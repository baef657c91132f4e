"""`python -m advkd.convert`: a teacher in an old or foreign form, as a folder of safetensors.

It alone reads pickles, and those in a process of their own (`advkd.pickles`).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from advkd.cli import guarded
from advkd.device import without_memory
from advkd.files import CheckpointError, load_strictly, read_tensors
from advkd.models import guided_diffusion
from advkd.models.unet import UNet, config_to_diffusers
from advkd.pickles import unpickle
from advkd.pretrained import PICKLES, check_finite, load_teacher, pickles_of, save_teacher

EPILOG = """\
OLD is a folder of diffusers whose weights are pickles (.bin), whole or in parts; or a checkpoint of
OpenAI's guided-diffusion, whose flags follow two dashes, MODEL_FLAGS and DIFFUSION_FLAGS as in its
README:

  advkd convert 64x64_diffusion.pt NEW --from guided-diffusion -- $MODEL_FLAGS

NEW is a pipeline folder that advkd train --teacher and diffusers read. Pickles are read in a
process of their own with weights_only=True, so that none can call anything, and every tensor has to
fit.
"""
FORMS = ("diffusers", "guided-diffusion")


def parser() -> argparse.ArgumentParser:
    """The command line of `advkd convert`."""
    p = argparse.ArgumentParser(
        prog="advkd convert",
        description="Write a teacher in an old or foreign form as a folder of safetensors.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("old", metavar="OLD", type=Path, help="a folder of diffusers, or a checkpoint")
    p.add_argument("new", metavar="NEW", type=Path, help="a folder that is not there yet")
    p.add_argument(
        "--from", dest="form", choices=FORMS, default=FORMS[0], help="whose form OLD has"
    )
    p.add_argument("--scheduler", metavar="FOLDER", help="scheduler_config.json, if not beside OLD")
    p.add_argument("--key", metavar="NAME", help="which entry of a checkpoint is the network")
    return p


def convert(args: argparse.Namespace) -> None:
    """Read OLD, write NEW, and say so in one line."""
    if args.new.exists() and (not args.new.is_dir() or any(args.new.iterdir())):
        raise ValueError(f"{args.new} is there already")
    if args.form == FORMS[0] and args.flags:
        raise ValueError("flags belong to --from guided-diffusion")
    args.new.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=args.new.parent) as name:
        room = Path(name)
        unet = _guided(args, room) if args.form != FORMS[0] else _of_diffusers(args, room)
        save_teacher(unet, room / "new")
        if args.new.is_dir():
            args.new.rmdir()
        os.replace(room / "new", args.new)
    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    several = isinstance(config_to_diffusers(unet.config)["attention_head_dim"], tuple)
    readers = "advkd and diffusers read it"
    if several:
        readers = "advkd alone reads it: levels differ in their heads"
    print(f"{args.new}: a UNet of {millions:.1f} million parameters, as {readers}")


def _of_diffusers(args: argparse.Namespace, room: Path) -> UNet:
    if args.old.is_file():
        raise CheckpointError(f"{args.old} is a file: {_advice(_tensors(args, room))}")
    pickles = pickles_of(args.old)
    weights = [room / f"{i:05}.safetensors" for i in range(len(pickles))]
    for old, new in zip(pickles, weights, strict=True):
        unpickle(old, new, args.key)
    return load_teacher(args.old, args.scheduler, weights or None)


def _guided(args: argparse.Namespace, room: Path) -> UNet:
    flags = guided_diffusion.parse_flags(args.flags)
    config = guided_diffusion.config_from_flags(flags)
    schedule = guided_diffusion.schedule_from_flags(flags)
    with without_memory():
        unet = UNet(config, schedule)
    tensors = _tensors(args, room)
    ours = guided_diffusion.renamed(tensors, config, flags["use_new_attention_order"])
    unet = unet.eval().requires_grad_(False)
    load_strictly(unet, ours, args.old)
    check_finite(unet, args.old)
    return unet


def _tensors(args: argparse.Namespace, room: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that is one file."""
    if args.old.suffix not in PICKLES:
        return read_tensors(args.old)
    unpickle(args.old, room / "old.safetensors", args.key)
    return read_tensors(room / "old.safetensors")


def _advice(tensors: dict[str, torch.Tensor]) -> str:
    """What to do with a checkpoint without settings, by the names of its tensors."""
    if guided_diffusion.is_like(list(tensors)):
        return "its tensors are those of guided-diffusion, so give --from guided-diffusion -- FLAGS"
    if any(name.endswith("init_conv.weight") for name in tensors):
        return (
            "its tensors are those of denoising-diffusion-pytorch, whose UNet needs RMS norms of "
            "channels, linear attention, memory keys and values, a 7x7 convolution and GELU"
        )
    return "name the folder of diffusers that it lies in, with its config.json"


def main() -> int:
    """Entry point; returns the exit status."""
    words = sys.argv[1:]
    own = words[: words.index("--")] if "--" in words else words
    args = parser().parse_args(own)
    args.flags = words[len(own) + 1 :]
    return guarded(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
