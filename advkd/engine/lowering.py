"""Lowering of modules to operations of a plan: convolutions, norms, attention, residual blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from advkd.engine.interface import replaced_method
from advkd.engine.plan import Builder, Part, Source, value_of
from advkd.models.layers import (
    Attention,
    Conv3x3,
    GroupNormSiLU,
    ResnetBlock,
)
from advkd.ops import addresses, extension

Module = TypeVar("Module", bound=nn.Module)


class LoweringError(ValueError):
    """A network that a plan cannot express; the message names the module."""


class Lowering:
    """Appends the operations of modules to a plan, with one method for each kind of module.

    The plan is for the C++ executor, or, where there is a tensor `like`, for networks of its dtype
    and on its device, whose weights are read in their places.
    """

    def __init__(self, model: nn.Module, batch: int, threads: int, like: Tensor | None = None):
        self.packs = like is None  # convolutions, as the C++ executor reads them
        self.place = ("cpu", torch.float32) if like is None else (like.device.type, like.dtype)
        self.names = {module: name for name, module in model.named_modules()}
        self.seen: set[nn.Module] = set()
        self.plan = Builder(batch, threads)
        # The offset of each residual block's projection of time and class, and their total width.
        self.projections: dict[ResnetBlock, int] = {}
        self.projected = 0
        for module in model.modules():
            if isinstance(module, ResnetBlock) and module.time_emb_proj is not None:
                self.projections[module] = self.projected
                self.projected += module.time_emb_proj.out_features
        # All projections of each image, where the network is class-conditional.
        self.image_projections: Part | None = None

    def known(self, module: nn.Module | None, kind: type[Module]) -> Module:
        """The module, if it is of exactly this kind and computes nothing but what the kind does.

        Raises LoweringError for another kind, hooks, a replaced method such as `forward`, and
        tensors of another dtype or on another device than those that the plan is for.
        """
        name = "the network" if module is None else self.names.get(module) or "the network"
        if type(module) is not kind:
            raise LoweringError(
                f"{name} is a {type(module).__name__} where a plan knows {kind.__name__} only"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise LoweringError(f"{name} has hooks, which a plan cannot call")
        method = replaced_method(module)
        if method is not None:
            raise LoweringError(f"{name} has its own method {method}, which a plan cannot call")
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if (tensor.device.type, tensor.dtype) != self.place:
                device, dtype = self.place[0].upper(), str(self.place[1]).removeprefix("torch.")
                raise LoweringError(f"{name} is not {dtype} on the {device}")
        self.seen.add(module)
        return module

    def check_complete(self, ignored: Sequence[nn.Module] = ()) -> None:
        """Raise LoweringError for a module that took no part."""
        left_out = {inner for module in ignored for inner in module.modules()}
        for module, name in self.names.items():
            passive = isinstance(module, nn.ModuleList | nn.Dropout)
            if passive and module.training and getattr(module, "p", 0) > 0:
                raise LoweringError(f"{name} drops values: call eval() first")
            if not (passive or module in self.seen or module in left_out):
                raise LoweringError(f"{name} is a {type(module).__name__}, unknown to a plan")

    # Convolutions.

    def convolution(
        self,
        name: str,
        weight: Source,
        x: Part,
        bias: Source | int | Part | None = None,
        *,
        stride: int = 1,
        pad: tuple[int, int] = (0, 0),
        upsample: bool = False,
        norm: tuple[Part, Part] | None = None,
        silu: bool = False,
        residual: Part | None = None,
        scale: float = 1.0,
        into: Part | None = None,
    ) -> Part:
        """Append y = (conv(act(x * norm[0] + norm[1])) + bias + residual) * scale, and return y.

        The bias is weights, an offset into the conditioning, or a vector of each image. y is
        `into`, else a new buffer.
        """
        C_out, C_in, kernel, _ = value_of(weight).shape
        sides = [side * (2 if upsample else 1) for side in (x.height, x.width)]
        H, W = ((side + sum(pad) - kernel) // stride + 1 for side in sides)
        y = self.plan.new(C_out, H, W) if into is None else into
        assert (y.height, y.width, y.channels, x.channels) == (H, W, C_out, C_in), name
        sizes = (self.plan.batch, x.height, x.width, C_in, C_out)
        numbers = self._packed(weight, (sizes, kernel, stride, *pad, upsample))
        reads = {"x": x}
        tensors = {"packed": weight}
        if norm is not None:
            reads |= {"x_scale": norm[0], "x_shift": norm[1]}
        if isinstance(bias, Part):
            reads["bias_buffer"] = bias
        elif isinstance(bias, int):
            numbers["bias_conditioning"] = bias
        elif bias is not None:
            tensors["bias"] = bias
        if residual is not None:
            reads["residual"] = residual
        self.plan.add(
            "convolution", name, reads, {"y": y}, scale,
            flops=2 * C_out * C_in * kernel**2 * H * W,
            height=x.height, width=x.width, in_channels=C_in, out_channels=C_out, kernel=kernel,
            stride=stride, pad_before=pad[0], pad_after=pad[1], upsample=upsample, silu=silu,
            tensors=tensors, **numbers,
        )  # fmt: skip
        return y

    def _packed(self, weight: Source, shape: tuple[Any, ...]) -> dict[str, int]:
        """What the C++ executor reads of a convolution beside its sizes: the algorithm, the packed
        weights, and the number of their floats."""
        if not self.packs:
            return {}
        assert extension is not None
        algorithm, size = extension.convolution_plan(*shape, self.plan.threads)

        def pack(out: Tensor) -> None:
            assert extension is not None
            dense = value_of(weight).contiguous()
            extension.convolution_pack(*shape, *addresses(torch.float32, dense, out))

        packed = self.plan.weights(size, pack)
        return {"algorithm": algorithm, "packed": packed, "weights": size}

    def conv2d(
        self,
        module: nn.Module | None,
        x: Part,
        *,
        pad: tuple[int, int] | None = None,
        bias: Source | int | Part | None = None,
        weight: Source | None = None,
        **options: Any,
    ) -> Part:
        """Append an nn.Conv2d or Conv3x3. `bias`, `weight` and `pad` replace its own."""
        kind = Conv3x3 if isinstance(module, Conv3x3) else nn.Conv2d
        conv: nn.Conv2d = self.known(module, kind)
        kernel, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        square = (conv.kernel_size, conv.stride, conv.padding) == (
            (kernel, kernel),
            (stride, stride),
            (padding, padding),
        )
        if not square or (conv.dilation, conv.groups, conv.padding_mode) != ((1, 1), 1, "zeros"):
            raise LoweringError(f"{self.names[conv]} is a convolution that a plan does not know")
        return self.convolution(
            self.names[conv],
            conv.weight if weight is None else weight,
            x,
            conv.bias if bias is None else bias,
            stride=stride,
            pad=(int(padding), int(padding)) if pad is None else pad,
            **options,
        )

    def linear(self, name: str, layers: Sequence[nn.Linear], x: Part, **options: Any) -> Part:
        """Append linear layers side by side, over the channels of every pixel."""
        for layer in layers:
            self.known(layer, nn.Linear)
        if len(layers) == 1:
            weight: Source = layers[0].weight.detach()[:, :, None, None]
            own_bias: Source = layers[0].bias
        else:
            weight = partial(_side_by_side, layers)
            own_bias = partial(_biases_side_by_side, layers)
        return self.convolution(name, weight, x, **{"bias": own_bias} | options)

    # Blocks.

    def norm(
        self, module: nn.Module, x: Part, film: int | Part | None = None
    ) -> tuple[tuple[Part, Part], bool]:
        """Append a norm and return its scale and shift, for whoever reads x to apply, and whether
        SiLU follows. `film` is an offset into the conditioning, or a vector of each image."""
        norm = self.known(module, GroupNormSiLU)
        scale, shift = self.plan.new(x.channels), self.plan.new(x.channels)
        self.plan.add(
            "norm", self.names[norm], {"x": x}, {"scale": scale, "shift": shift}, norm.eps,
            channels=x.channels, pixels=x.pixels, groups=norm.num_groups,
            tensors={"weight": norm.weight, "bias": norm.bias}, weights=2 * x.channels,
            flops=3 * x.pixels * x.channels,
        )  # fmt: skip
        affine = (scale, shift) if film is None else self._film(norm, scale, shift, film)
        return affine, norm.activation == "silu"

    def _film(
        self, norm: nn.Module, scale: Part, shift: Part, film: int | Part
    ) -> tuple[Part, Part]:
        """Append FiLM of a norm's scale and shift, and return both."""
        y_scale, y_shift = self.plan.new(scale.channels), self.plan.new(scale.channels)
        reads = {"scale": scale, "shift": shift}
        numbers: dict[str, Any] = {}
        if isinstance(film, Part):
            reads["film"] = film
        else:
            numbers["film_conditioning"] = film
        writes = {"y_scale": y_scale, "y_shift": y_shift}
        self.plan.add("film", self.names[norm], reads, writes, channels=scale.channels, **numbers)
        return y_scale, y_shift

    def resnet(self, module: nn.Module, x: Part, into: Part | None = None) -> Part:
        """Append a residual block, with time and class in the first convolution's bias or, as FiLM,
        in the second norm."""
        block = self.known(module, ResnetBlock)
        projected = self._projected(block)
        bias, film = (None, projected) if block.film else (projected, None)
        norm, silu = self.norm(block.norm1, x)
        if block.resample == "down":
            name = self.names[block]
            residual = self.pooled(x, name)
            first = self.conv2d(block.conv1, self.pooled(x, name, norm, silu), bias=bias)
        else:
            up = block.resample == "up"
            residual = self.upsampled(x, self.names[block]) if up else x
            first = self.conv2d(block.conv1, x, norm=norm, silu=silu, bias=bias, upsample=up)
        norm, silu = self.norm(block.norm2, first, film)
        if block.conv_shortcut is not None:
            residual = self.conv2d(block.conv_shortcut, residual)
        return self.conv2d(
            block.conv2, first, norm=norm, silu=silu, residual=residual, scale=1 / block.scale,
            into=into,
        )  # fmt: skip

    def _projected(self, block: ResnetBlock) -> int | Part | None:
        """Where a block's projection of time and class is, if it has one: an offset into the
        conditioning, or a vector of each image."""
        if block not in self.projections:
            return None
        first = self.projections[block]
        projection = self.known(block.time_emb_proj, nn.Linear)
        if self.image_projections is None:
            return first
        return self.image_projections.cut(first, projection.out_features)

    def attention(self, module: nn.Module, x: Part, into: Part | None = None) -> Part:
        """Append self-attention over the pixels, with its norm and its residual."""
        block = self.known(module, Attention)
        name = self.names[block]
        C, head_dim = x.channels, x.channels // block.heads
        norm, silu = None, False
        if block.group_norm is not None:
            norm, silu = self.norm(block.group_norm, x)
        qkv = self.linear(
            f"{name}.to_qkv", (block.to_q, block.to_k, block.to_v), x, norm=norm, silu=silu
        )
        h = self.plan.new(C, x.height, x.width)
        lse = self.plan.new(block.heads * x.pixels)
        self.plan.add(
            "attention", name, {"qkv": qkv}, {"y": h, "lse": lse}, head_dim**-0.5,
            flops=4 * x.pixels**2 * C, heads=block.heads, head_dim=head_dim, pixels=x.pixels,
        )  # fmt: skip
        return self.linear(
            f"{name}.to_out.0",
            [self.known(block.to_out[0], nn.Linear)],
            h,
            residual=x,
            scale=1 / block.scale,
            into=into,
        )

    def upsampled(self, x: Part, name: str, into: Part | None = None) -> Part:
        """Append a nearest-neighbor doubling of height and width."""
        y = self.plan.new(x.channels, 2 * x.height, 2 * x.width) if into is None else into
        self.plan.add(
            "upsample", name, {"x": x}, {"y": y},
            channels=x.channels, height=x.height, width=x.width,
        )  # fmt: skip
        return y

    def pooled(
        self, x: Part, name: str, norm: tuple[Part, Part] | None = None, silu: bool = False
    ) -> Part:
        """Append averages of squares of 2 x 2 pixels, of x after its norm and SiLU."""
        y = self.plan.new(x.channels, x.height // 2, x.width // 2)
        reads = {"x": x}
        if norm is not None:
            reads |= {"x_scale": norm[0], "x_shift": norm[1]}
        self.plan.add(
            "average_pool", name, reads, {"y": y},
            channels=x.channels, height=x.height, width=x.width, silu=silu,
        )  # fmt: skip
        return y

    def copied(self, x: Part, name: str, into: Part) -> Part:
        """Append a copy: squares of one pixel, made one pixel each."""
        self.plan.add(
            "space_to_depth", name, {"x": x}, {"y": into},
            channels=x.channels, block=1, height=x.height, width=x.width,
        )  # fmt: skip
        return into

    def embedding(self, name: str, table: Source, hidden: int, conditioning: int | None) -> None:
        """Append the projections of each image's class, as one product; `table` (classes, hidden)
        are the class embeddings.

        To an image's, `hidden` floats of the conditioning are added, from an offset on.
        """
        self.plan.classes = len(value_of(table))
        temb = self.plan.new(hidden)
        self.plan.add(
            "embed", name, {}, {"y": temb}, channels=hidden,
            tensors={"table": table}, weights=value_of(table).numel(),
            **({} if conditioning is None else {"conditioning": conditioning}),
        )  # fmt: skip
        self.image_projections = self.project(temb)

    def project(self, temb: Part, into: Part | None = None) -> Part:
        """Append all blocks' projections of SiLU(temb), plus the biases of the convolutions that
        have them for their own."""
        layers: list[nn.Linear] = []
        added: list[Tensor | None] = []
        for block in self.projections:
            assert block.time_emb_proj is not None
            layers.append(block.time_emb_proj)
            added.append(None if block.film else block.conv1.bias)

        def biases() -> Tensor:
            pairs = zip((layer.bias for layer in layers), added, strict=True)
            return torch.cat([own if other is None else own + other for own, other in pairs])

        return self.linear("time_emb_proj", layers, temb, bias=biases, silu=True, into=into)

    def affine_input(self, x: Part, scale: float, shift: float) -> tuple[Part, Part]:
        """Append a constant scale and shift in place of a norm."""
        parts = []
        for value in (scale, shift):
            part = self.plan.new(x.channels)
            device, dtype = self.place
            values = torch.full((x.channels,), value, dtype=dtype, device=device)
            self.plan.add(
                "constant", "center_input_sample", {}, {"y": part}, channels=x.channels,
                tensors={"values": values}, weights=x.channels,
            )  # fmt: skip
            parts.append(part)
        return parts[0], parts[1]


def _side_by_side(layers: Sequence[nn.Linear]) -> Tensor:
    """The weights of layers side by side, as of a 1x1 convolution."""
    return torch.cat([layer.weight for layer in layers])[:, :, None, None]


def _biases_side_by_side(layers: Sequence[nn.Linear]) -> Tensor:
    return torch.cat([layer.bias for layer in layers])


class Slots:
    """Concatenation by placement: a skip and what it is concatenated with are written side by side
    into one buffer."""

    def __init__(self, lowering: Lowering, totals: Sequence[int]):
        self._plan = lowering.plan
        self._totals = list(totals)  # channels of each concatenation, in the order of the skips
        self._open: list[Part] = []

    def skip(self, channels: int, height: int, width: int) -> Part:
        """The place of the next skip: the last channels of a new buffer."""
        total = self._totals[len(self._open)]
        whole = self._plan.new(total, height, width)
        self._open.append(whole)
        return whole.cut(total - channels, channels)

    def top(self, channels: int) -> Part | None:
        """The place of what the last open skip is concatenated with: the first channels of its
        buffer; None without an open skip."""
        return self._open[-1].cut(0, channels) if self._open else None

    def pop(self) -> Part:
        """The whole buffer of the last open skip, which is closed."""
        return self._open.pop()
