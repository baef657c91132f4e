"""The student: x_T in, image out, in one network pass.

h_0 = stem(x_T); h_k = f_k(h_{k-1}); xhat^(k) = head_k(h_k). Submodule f_k and its head predict the
teacher's state at the k-th of K times. Two families share the submodules: `unet` encodes x_T and
passes skips to them, `pyramid` (the paper's) has no encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advkd.config import TARGETS, StudentConfig
from advkd.models.folders import InFolder
from advkd.models.layers import Attention, Conv3x3, GroupNormSiLU, ResnetBlock, normed_conv

FAMILIES = ("unet", "pyramid")
MAX_BLOCKS = 256  # residual blocks of all submodules


class Head(nn.Module):
    """GroupNorm-SiLU and a convolution: features to an image of the same resolution."""

    def __init__(self, width: int, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNormSiLU(groups, width)
        self.conv = Conv3x3(width, channels)

    def forward(self, h: Tensor) -> Tensor:
        return normed_conv(self.norm, self.conv, h)


class Submodule(nn.Module):
    """f_k: upsampling where the resolution doubles, residual blocks, attention.

    (B, C, H, W) -> (B, width, r, r). A 1x1 convolution changes the width before the upsampling,
    where pixels are few.
    """

    def __init__(
        self, c_in: int, c_skip: int, config: StudentConfig, k: int, temb: int | None, doubles: bool
    ):
        super().__init__()
        width = config.widths[k]
        self.reduce = nn.Conv2d(c_in, width, 1) if c_in != width else None
        self.doubles = doubles
        self.blocks = nn.ModuleList(
            ResnetBlock(width + (c_skip if i == 0 else 0), width, temb, config.groups)
            for i in range(config.blocks)
        )
        self.attention = (
            Attention(width, None, config.groups) if config.stages[k] in config.attention else None
        )

    def forward(self, h: Tensor, skip: Tensor | None, temb: Tensor | None) -> Tensor:
        if self.reduce is not None:
            h = self.reduce(h)
        if self.doubles:
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        for block in self.blocks:
            h = block(h, temb)
        return h if self.attention is None else self.attention(h)


class Encoder(nn.Module):
    """The `unet` family's encoder: one feature map of x_T per resolution, highest first."""

    def __init__(self, channels: int, widths: Sequence[int], groups: int, temb: int | None):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.downs = nn.ModuleList(
            nn.Conv2d(c_in, c_out, 3, stride=2, padding=1) for c_in, c_out in pairwise(widths)
        )
        self.blocks = nn.ModuleList(ResnetBlock(c, c, temb, groups) for c in widths[1:])

    def forward(self, x_T: Tensor, temb: Tensor | None) -> list[Tensor]:
        h = self.conv_in(x_T)
        maps = [h]
        for down, block in zip(self.downs, self.blocks, strict=True):
            h = block(down(h), temb)
            maps.append(h)
        return maps


class Stem(nn.Module):
    """The `pyramid` family's stem: space-to-depth of x_T and a 1x1 convolution."""

    def __init__(self, channels: int, factor: int, width: int):
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels * factor**2, width, 1)

    def forward(self, x_T: Tensor) -> Tensor:
        h: Tensor = self.conv(F.pixel_unshuffle(x_T, self.factor))
        return h


class Student(InFolder):
    """The one-pass generator: `student(x_T, y=None, exit_at=None)`, (B, C, S, S) -> (B, C, r, r).

    `size` (S, pixels) and `channels` (C) are those of its images, `config.stages` the resolutions r
    of its submodules, K in number. `exit_at=k` (1..K) returns the image of head k and skips what
    follows; `target="state"` means that the heads predict noisy states, and then exit_at must be K.
    `num_classes` makes the student conditional on labels y (B,) int64; `class_names`, label 0
    first, are None where the classes have no names. Images are float32 in about [-1, 1]. Raises
    ValueError for settings that do not fit each other.
    """

    def __init__(
        self,
        config: StudentConfig,
        size: int,
        channels: int,
        target: str = "denoised",
        num_classes: int | None = None,
    ):
        super().__init__()
        _check(config, size, target)
        self.config, self.size, self.channels = config, size, channels
        self.target, self.num_classes = target, num_classes
        self.class_names: tuple[str, ...] | None = None
        temb = (config.class_width or 4 * config.widths[0]) if num_classes else None
        self.class_embedding = nn.Embedding(num_classes, temb) if num_classes and temb else None
        resolutions = sorted(set(config.stages), reverse=True)
        first = {r: config.stages.index(r) for r in resolutions}
        self.encoder: Encoder | None = None
        self.stem: Stem | None = None
        if config.family == "unet":
            widths = [config.widths[first[r]] for r in resolutions]
            self.encoder = Encoder(channels, widths, config.groups, temb)
        else:
            self.stem = Stem(channels, size // config.stages[0], config.widths[0])
        self.submodules = nn.ModuleList()
        self.heads = nn.ModuleList()
        for k, r in enumerate(config.stages):
            doubles = k > 0 and r != config.stages[k - 1]
            c_skip = config.widths[k] if self.encoder is not None and doubles else 0
            c_in = config.widths[max(k - 1, 0)]
            self.submodules.append(Submodule(c_in, c_skip, config, k, temb, doubles))
            self.heads.append(Head(config.widths[k], channels, config.groups))

    def _trunk(self, x_T: Tensor, y: Tensor | None, depth: int) -> list[Tensor]:
        """The features h_1 .. h_depth of x_T (B, C, S, S)."""
        temb = None
        if self.class_embedding is not None:
            if y is None:
                raise ValueError("this student is class-conditional: pass labels y (B,)")
            temb = self.class_embedding(y)
        elif y is not None:
            raise ValueError("this student is unconditional: it takes no labels")
        skips = self.encoder(x_T, temb) if self.encoder is not None else []
        h = skips.pop() if self.encoder is not None or self.stem is None else self.stem(x_T)
        features = []
        for submodule in self.submodules[:depth]:
            skip = skips.pop() if submodule.doubles and skips else None
            h = submodule(h, skip, temb)
            features.append(h)
        return features

    def states(
        self, x_T: Tensor, y: Tensor | None = None, depth: int | None = None
    ) -> list[Tensor]:
        """The images xhat^(1) .. xhat^(depth) of the heads (of all K by default).

        Each is (B, C, r, r) at its stage's resolution; x_T and y are as in `forward`.
        """
        features = self._trunk(x_T, y, len(self.heads) if depth is None else depth)
        return [head(h) for head, h in zip(self.heads, features, strict=False)]

    def depth_of(self, exit_at: int | None) -> int:
        """The number of submodules that `exit_at` runs; ValueError for one that is not possible."""
        K = len(self.heads)
        depth = K if exit_at is None else exit_at
        if not 1 <= depth <= K:
            raise ValueError(f"exit_at={exit_at} is not between 1 and {K}")
        if depth < K and self.target == "state":
            raise ValueError(
                "this student was trained on noisy states (target = 'state'): its early heads give "
                "no clean image, so exit_at is not possible; student.states(x_T) returns them"
            )
        return depth

    def forward(self, x_T: Tensor, y: Tensor | None = None, exit_at: int | None = None) -> Tensor:
        """The image of head `exit_at` (by default the last) for noise x_T and labels y."""
        depth = self.depth_of(exit_at)
        image: Tensor = self.heads[depth - 1](self._trunk(x_T, y, depth)[-1])
        return image


def _check(config: StudentConfig, size: int, target: str) -> None:
    """Raise ValueError for settings that do not fit each other."""
    stages = config.stages
    if config.family not in FAMILIES:
        raise ValueError(f"student.family={config.family!r} is not one of {FAMILIES}")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not one of {TARGETS}")
    if not stages or len(stages) != len(config.widths):
        raise ValueError(f"student.widths has {len(config.widths)} entries, stages {len(stages)}")
    if min(*stages, *config.widths, config.blocks, config.groups) < 1:
        raise ValueError(
            f"student.stages={list(stages)}, widths={list(config.widths)}, blocks={config.blocks} "
            f"and groups={config.groups} must be positive"
        )
    if len(stages) * config.blocks > MAX_BLOCKS:
        raise ValueError(
            f"student.blocks={config.blocks} in {len(stages)} stages is more than {MAX_BLOCKS} "
            "residual blocks"
        )
    doubling = all(b in (a, 2 * a) for a, b in pairwise(stages))
    if stages[-1] != size or not doubling or size % stages[0]:
        raise ValueError(
            f"student.stages={list(stages)} must keep or double the resolution up to {size}"
        )
