"""Noise: counter-based, and never the same for two purposes.

Every random number of a sampler is a word of Philox4x32-10 with the seed as key and the counter
(block, step word, image number). The purpose stands in the high bits of the step word, where no
step reaches, so whatever seeds a user gives, an image that is sampled never grows from a noise that
a student was trained on.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from advkd import ops

PURPOSE_BITS = 24  # of the step word, below the purpose
MAX_STEPS = 1 << 23  # of a sampler; x_T and labels have the words that end in 0xFFFFFF and 0xFFFFFE

# Trajectories have image numbers below the first, fresh noise of a training from it on; and from
# the second on the other noise, where two images of a label are compared.
FIRST_FRESH, FIRST_OTHER = 1 << 40, 1 << 62


class Purpose(enum.IntEnum):
    """What noise is for. Code 0 has version 0.1's bits; within it, image numbers separate
    trajectories from the fresh noise of a training (`FIRST_FRESH`)."""

    TRAINING = 0
    SAMPLING = 1
    EVALUATION = 2


class Noise(NamedTuple):
    """The random numbers of one seed (0 .. 2^64 - 1) for one purpose."""

    seed: int
    purpose: Purpose

    def check(self) -> None:
        """ValueError for a seed that there is not."""
        ops.check_seed(self.seed)

    def step_word(self, step: int) -> int:
        """The step word of the Philox counter for `step` of a sampler, `ops.X_T_STEP` or
        `ops.LABEL_STEP`."""
        return step ^ (self.purpose << PURPOSE_BITS)

    def x_T(self, indices: Tensor, shape: Sequence[int]) -> Tensor:
        """x_T ~ N(0, I) of the images `indices` (B,) int64: (B, C, H, W) float32, channels_last."""
        word = self.step_word(ops.X_T_STEP)
        last = torch.channels_last
        return ops.philox_normal(self.seed, indices, word, shape, memory_format=last)

    def labels(self, indices: Tensor, num_classes: int | None) -> Tensor | None:
        """Uniform class labels of the images `indices`: (B,) int64; None without classes."""
        if num_classes is None:
            return None
        word = self.step_word(ops.LABEL_STEP)
        return ops.philox_labels(self.seed, indices, num_classes, step=word)
