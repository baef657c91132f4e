"""The shapes that are timed: those of google/ddpm-cifar10-32, google/ddpm-celebahq-256 and of the
default preset (fashion-mnist), whose batch is 32 and whose discriminator sees twice that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NormShape:
    """x (batch, channels, size, size) of a GroupNorm."""

    network: str
    batch: int
    channels: int
    size: int
    groups: int

    @property
    def name(self) -> str:
        return f"{self.network} {self.batch}x{self.channels}x{self.size}x{self.size}"


@dataclass(frozen=True)
class AttentionShape:
    """q, k, v (batch, heads, tokens, head_dim), laid out as (batch, tokens, heads, head_dim)."""

    network: str
    batch: int
    heads: int
    tokens: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"{self.network} {self.batch}x{self.heads}x{self.tokens}x{self.head_dim}"


@dataclass(frozen=True)
class ConvolutionShape:
    """x (batch, channels, size, size) of a 3x3 convolution to `out` channels; it keeps the size."""

    network: str
    batch: int
    channels: int
    size: int
    out: int

    @property
    def name(self) -> str:
        return f"{self.network} {self.batch}x{self.channels}x{self.size}x{self.size} to {self.out}"


# Where channels are twice a block's width or the sum of two, a skip has been concatenated.
GROUP_NORM_SILU = (
    NormShape("teacher", 32, 16, 28, 8),
    NormShape("teacher", 32, 128, 7, 8),
    NormShape("student", 32, 96, 14, 8),
    NormShape("student", 32, 32, 28, 8),
    NormShape("discriminator", 64, 48, 14, 8),
    NormShape("discriminator", 64, 96, 7, 8),
    NormShape("cifar10-32", 16, 128, 32, 32),
    NormShape("cifar10-32", 16, 384, 32, 32),
    NormShape("cifar10-32", 16, 512, 16, 32),
    NormShape("cifar10-32", 16, 256, 4, 32),
    NormShape("celebahq-256", 1, 128, 256, 32),
    NormShape("celebahq-256", 1, 256, 256, 32),
    NormShape("celebahq-256", 1, 256, 64, 32),
    NormShape("celebahq-256", 1, 1024, 16, 32),
    NormShape("celebahq-256", 1, 512, 8, 32),
)

# The discriminator of the default preset has no attention, that of the preset cifar10-32 has.
# The last four are of no network here: 8x8, 14x14, 32x32 and 64x64 tokens of the usual 64 channels.
ATTENTION = (
    AttentionShape("teacher", 32, 1, 49, 64),
    AttentionShape("student", 32, 1, 49, 96),
    AttentionShape("discriminator", 32, 1, 256, 128),
    AttentionShape("cifar10-32", 1, 1, 256, 256),
    AttentionShape("cifar10-32", 16, 1, 256, 256),
    AttentionShape("celebahq-256", 1, 1, 256, 512),
    AttentionShape("8x8", 32, 1, 64, 64),
    AttentionShape("14x14", 32, 1, 196, 64),
    AttentionShape("32x32", 4, 1, 1024, 64),
    AttentionShape("64x64", 1, 1, 4096, 64),
)

CONV3X3 = (
    ConvolutionShape("teacher", 32, 16, 28, 16),
    ConvolutionShape("teacher", 32, 128, 7, 64),
    ConvolutionShape("student", 32, 96, 14, 48),
    ConvolutionShape("student", 32, 32, 28, 16),
    ConvolutionShape("discriminator", 64, 48, 14, 48),
    ConvolutionShape("discriminator", 64, 96, 7, 96),
    ConvolutionShape("cifar10-32", 16, 128, 32, 128),
    ConvolutionShape("cifar10-32", 16, 512, 16, 256),
    ConvolutionShape("cifar10-32", 16, 256, 4, 256),
    ConvolutionShape("cifar10-32", 1, 256, 16, 256),
)
