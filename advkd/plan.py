"""Lowers a teacher or a student to a flat plan that the C++ engine runs (csrc/cpu/plan.cpp).

A plan is plain data: operations on buffers of one arena, which is laid out for the buffers' life
times, and weights that are packed once. Activations are (B, H, W, C). It is made for a batch size
and a number of threads, which decide each convolution's algorithm, and runs any batch: an image's
bits depend on the plan alone.

    engine = lower(student, (28, 28), batch=1, threads=1)
    images = engine.run(x_T)                       # (B, C, H, W) in and out
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from advkd.models.layers import (
    Attention,
    Conv3x3,
    Downsample,
    GroupNormSiLU,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    timestep_embedding,
)
from advkd.models.student import Encoder, Head, Stem, Student, Submodule
from advkd.models.unet import DownBlock, MidBlock, UNet, UpBlock
from advkd.ops import extension

ALGORITHMS = ("direct", "winograd2", "winograd4")
INPUT, OUTPUT = 0, 1  # the first two buffers, which lie in the caller's memory
_ALIGNMENT = 16  # floats of a cache line
_TIME_BATCH = 64  # of the plan for what depends on the time

Module = TypeVar("Module", bound=nn.Module)


class LoweringError(ValueError):
    """A network that a plan cannot express; the message names the module."""


@dataclass
class Buffer:
    """Activations (height, width, channels) of one image, at `offset` floats of the arena."""

    height: int
    width: int
    channels: int
    offset: int = 0

    @property
    def floats(self) -> int:
        return self.height * self.width * self.channels


class Part(NamedTuple):
    """Channels [channel, channel + channels) of a buffer."""

    buffer: int
    channel: int
    channels: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def cut(self, channel: int, channels: int) -> Part:
        return self._replace(channel=self.channel + channel, channels=channels)


@dataclass(frozen=True)
class Op:
    """One operation; `numbers` and `factor` are what the executor reads."""

    kind: str
    module: str
    numbers: dict[str, int]
    reads: tuple[Part, ...]
    writes: tuple[Part, ...]
    factor: float = 1.0
    flops: int = 0  # of one image; a convolution counts as a direct one
    weights: int = 0  # floats


@dataclass(frozen=True)
class Plan:
    """The flat list of operations, and the weights they read; see csrc/cpu/plan.h."""

    buffers: list[Buffer]
    ops: list[Op]
    arena: int  # floats of an image
    row: int  # floats that a pass is told beside its input
    classes: int
    batch: int
    threads: int
    weights: Tensor

    def compiled(self) -> Any:
        """The executor's own form; ValueError for a plan that it would not run."""
        assert extension is not None
        return extension.Plan(
            buffers=[(b.offset, b.height * b.width, b.channels) for b in self.buffers],
            ops=[(op.kind, op.numbers, op.factor) for op in self.ops],
            arena=self.arena,
            row=self.row,
            classes=self.classes,
            batch=self.batch,
            weights=self.weights.data_ptr(),
            weights_size=self.weights.numel(),
        )


@dataclass
class _Builder:
    """A plan in the making."""

    batch: int
    threads: int
    row: int = 0
    classes: int = 0
    buffers: list[Buffer] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    packing: list[tuple[int, int, Callable[[Tensor], object]]] = field(default_factory=list)
    floats: int = 0  # of weights so far

    def new(self, channels: int, height: int = 1, width: int = 1) -> Part:
        self.buffers.append(Buffer(height, width, channels))
        return Part(len(self.buffers) - 1, 0, channels, height, width)

    def weights(self, size: int, fill: Callable[[Tensor], object]) -> int:
        """Room for `size` floats, which `fill` will write; their offset."""
        offset = self.floats
        self.packing.append((offset, size, fill))
        self.floats = _aligned(offset + size)
        return offset

    def vector(self, values: Tensor) -> int:
        return self.weights(values.numel(), lambda out: out.copy_(values.detach().reshape(-1)))

    def add(
        self,
        kind: str,
        module: str,
        reads: dict[str, Part],
        writes: dict[str, Part],
        factor: float = 1.0,
        flops: int = 0,
        weights: int = 0,
        **numbers: int,
    ) -> None:
        for name, part in (reads | writes).items():
            numbers[name] = part.buffer
            numbers[f"{name}_channel"] = part.channel
        self.ops.append(
            Op(
                kind,
                module,
                {key: int(value) for key, value in numbers.items()},
                tuple(reads.values()),
                tuple(writes.values()),
                float(factor),
                flops,
                weights,
            )
        )

    def finished(self) -> Plan:
        arena = _lay_out(self.buffers, self.ops)
        weights = torch.empty(self.floats)
        assert extension is not None
        extension.ask_for_huge_pages(weights.data_ptr(), 4 * self.floats)
        weights.zero_()
        for offset, size, fill in self.packing:
            fill(weights[offset : offset + size])
        return Plan(
            self.buffers, self.ops, arena, self.row, self.classes, self.batch, self.threads, weights
        )


def _aligned(floats: int) -> int:
    return -(-floats // _ALIGNMENT) * _ALIGNMENT


def _lives(buffers: Sequence[Buffer], ops: Sequence[Op]) -> list[tuple[int, int]]:
    """The first and the last operation of every buffer."""
    lives = [(len(ops), -1)] * len(buffers)
    for i, op in enumerate(ops):
        for part in (*op.reads, *op.writes):
            first, last = lives[part.buffer]
            lives[part.buffer] = (min(first, i), max(last, i))
    return lives


def _lay_out(buffers: Sequence[Buffer], ops: Sequence[Op]) -> int:
    """Give every buffer an offset that no other holds during its life; floats of the arena.

    Large ones first, each as low as it can lie (Pisarchyk and Lee 2020, greedy by size).
    """
    lives = _lives(buffers, ops)
    placed: list[int] = []
    top = 0
    inner = [i for i in range(len(buffers)) if i not in (INPUT, OUTPUT)]
    for i in sorted(inner, key=lambda i: -buffers[i].floats):
        first, last = lives[i]
        rivals = [j for j in placed if lives[j][0] <= last and first <= lives[j][1]]
        offset = 0
        for j in sorted(rivals, key=lambda j: buffers[j].offset):
            if offset + buffers[i].floats <= buffers[j].offset:
                break
            offset = max(offset, _aligned(buffers[j].offset + buffers[j].floats))
        buffers[i].offset = offset
        placed.append(i)
        top = max(top, offset + buffers[i].floats)
    return _aligned(top)


class _Lowering:
    """Appends the operations of modules, one method for each kind of module."""

    def __init__(self, model: nn.Module, batch: int, threads: int):
        self.names = {module: name for name, module in model.named_modules()}
        self.seen: set[nn.Module] = set()
        self.plan = _Builder(batch, threads)
        # Where each residual block's projection of time and class begins, and their total width.
        self.projections: dict[ResnetBlock, int] = {}
        self.projected = 0
        for module in model.modules():
            if isinstance(module, ResnetBlock) and module.time_emb_proj is not None:
                self.projections[module] = self.projected
                self.projected += module.time_emb_proj.out_features
        self.conditioning: Part | None = None  # the projections of each image, with classes

    def known(self, module: nn.Module | None, kind: type[Module]) -> Module:
        """The module, if it is exactly of this kind and nothing hooks into it."""
        name = "the network" if module is None else self.names.get(module) or "the network"
        if type(module) is not kind:
            raise LoweringError(
                f"{name} is a {type(module).__name__} where a plan knows {kind.__name__} only"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise LoweringError(f"{name} has hooks, which a plan cannot call")
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.dtype is not torch.float32 or not tensor.is_cpu:
                raise LoweringError(f"{name} is not float32 on the CPU")
        self.seen.add(module)
        return module

    def check_complete(self, ignored: Sequence[nn.Module] = ()) -> None:
        """LoweringError for a module that took no part."""
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
        weight: Tensor,
        x: Part,
        bias: Tensor | int | Part | None = None,
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
        """y = (conv(act(x * scale + shift of norm)) + bias + residual) * scale; y, or `into`.

        The bias is weights, an offset into the row, or a vector of each image.
        """
        assert extension is not None
        C_out, C_in, kernel, _ = weight.shape
        sides = [side * (2 if upsample else 1) for side in (x.height, x.width)]
        H, W = ((side + sum(pad) - kernel) // stride + 1 for side in sides)
        y = self.plan.new(C_out, H, W) if into is None else into
        assert (y.height, y.width, y.channels, x.channels) == (H, W, C_out, C_in), name
        sizes = (self.plan.batch, x.height, x.width, C_in, C_out)
        shape = (sizes, kernel, stride, *pad, upsample)
        algorithm, size = extension.convolution_plan(*shape, self.plan.threads)

        def pack(out: Tensor) -> None:
            dense = weight.detach().contiguous()
            extension.convolution_pack(*shape, dense.data_ptr(), out.data_ptr())

        reads = {"x": x}
        numbers = {}
        if norm is not None:
            reads |= {"x_scale": norm[0], "x_shift": norm[1]}
        if isinstance(bias, Part):
            reads["bias_buffer"] = bias
        elif isinstance(bias, int):
            numbers["bias_row"] = bias
        elif bias is not None:
            numbers["bias"] = self.plan.vector(bias)
        if residual is not None:
            reads["residual"] = residual
        self.plan.add(
            "convolution", name, reads, {"y": y}, scale,
            flops=2 * weight.numel() * H * W, weights=size,
            height=x.height, width=x.width, in_channels=C_in, out_channels=C_out, kernel=kernel,
            stride=stride, pad_before=pad[0], pad_after=pad[1], upsample=upsample, silu=silu,
            algorithm=algorithm, packed=self.plan.weights(size, pack), **numbers,
        )  # fmt: skip
        return y

    def conv2d(
        self,
        module: nn.Module | None,
        x: Part,
        *,
        pad: tuple[int, int] | None = None,
        bias: Tensor | int | Part | None = None,
        weight: Tensor | None = None,
        **options: Any,
    ) -> Part:
        """An nn.Conv2d or Conv3x3; `bias` and `weight` replace its own, `pad` its padding."""
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
        """Linear layers side by side, over the channels of every pixel."""
        for layer in layers:
            self.known(layer, nn.Linear)
        weight = torch.cat([layer.weight.detach() for layer in layers])[:, :, None, None]
        if "bias" not in options:
            options["bias"] = torch.cat([layer.bias.detach() for layer in layers])
        return self.convolution(name, weight, x, **options)

    # Blocks.

    def norm(self, module: GroupNormSiLU, x: Part) -> tuple[tuple[Part, Part], bool]:
        """Scale and shift for whoever reads x, and whether SiLU follows."""
        norm = self.known(module, GroupNormSiLU)
        scale, shift = self.plan.new(x.channels), self.plan.new(x.channels)
        self.plan.add(
            "norm", self.names[norm], {"x": x}, {"scale": scale, "shift": shift}, norm.eps,
            channels=x.channels, pixels=x.pixels, groups=norm.num_groups,
            weight=self.plan.vector(norm.weight), bias=self.plan.vector(norm.bias),
            weights=2 * x.channels, flops=3 * x.pixels * x.channels,
        )  # fmt: skip
        return (scale, shift), norm.activation == "silu"

    def resnet(self, module: nn.Module, x: Part, into: Part | None = None) -> Part:
        block = self.known(module, ResnetBlock)
        bias: int | Part | None = None
        if block in self.projections:
            first = self.projections[block]
            self.known(block.time_emb_proj, nn.Linear)
            bias = first  # of the row
            if self.conditioning is not None:
                bias = self.conditioning.cut(first, block.conv1.out_channels)
        norm, silu = self.norm(block.norm1, x)
        h = self.conv2d(block.conv1, x, norm=norm, silu=silu, bias=bias)
        norm, silu = self.norm(block.norm2, h)
        if block.conv_shortcut is not None:
            x = self.conv2d(block.conv_shortcut, x)
        return self.conv2d(
            block.conv2, h, norm=norm, silu=silu, residual=x, scale=1 / block.scale, into=into
        )

    def attention(self, module: nn.Module, x: Part, into: Part | None = None) -> Part:
        block = self.known(module, Attention)
        name = self.names[block]
        C, head_dim = x.channels, x.channels // block.heads
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
        y = self.plan.new(x.channels, 2 * x.height, 2 * x.width) if into is None else into
        self.plan.add(
            "upsample", name, {"x": x}, {"y": y},
            channels=x.channels, height=x.height, width=x.width,
        )  # fmt: skip
        return y

    def embedding(self, module: nn.Embedding, hidden: int, row: int | None) -> None:
        """The projections of each image's class (and time, from the row), by one product."""
        embedding = self.known(module, nn.Embedding)
        name = self.names[embedding]
        self.plan.classes = embedding.num_embeddings
        temb = self.plan.new(hidden)
        self.plan.add(
            "embed", name, {}, {"y": temb}, channels=hidden,
            table=self.plan.vector(embedding.weight), weights=embedding.weight.numel(),
            **({} if row is None else {"row": row}),
        )  # fmt: skip
        self.conditioning = self.project(temb)

    def project(self, temb: Part, into: Part | None = None) -> Part:
        """All residual blocks' projections of SiLU(temb), with the bias of their convolutions."""
        layers, biases = [], []
        for block in self.projections:
            assert block.time_emb_proj is not None
            assert block.conv1.bias is not None
            layers.append(block.time_emb_proj)
            biases.append(block.time_emb_proj.bias.detach() + block.conv1.bias.detach())
        return self.linear(
            "time_emb_proj", layers, temb, bias=torch.cat(biases), silu=True, into=into
        )

    def affine_input(self, x: Part, scale: float, shift: float) -> tuple[Part, Part]:
        """Constants in the place of a norm."""
        parts = []
        for value in (scale, shift):
            part = self.plan.new(x.channels)
            values = self.plan.vector(torch.full((x.channels,), value))
            self.plan.add(
                "constant", "center_input_sample", {}, {"y": part}, channels=x.channels,
                values=values, weights=x.channels,
            )  # fmt: skip
            parts.append(part)
        return parts[0], parts[1]


class _Slots:
    """Concatenation by placement: the buffers that skips and what meets them are written into."""

    def __init__(self, lowering: _Lowering, totals: Sequence[int]):
        self._plan = lowering.plan
        self._totals = list(totals)  # channels of what is concatenated, in the order of skips
        self._open: list[Part] = []

    def skip(self, channels: int, height: int, width: int) -> Part:
        """Where the next skip goes: the last channels of a buffer."""
        total = self._totals[len(self._open)]
        whole = self._plan.new(total, height, width)
        self._open.append(whole)
        return whole.cut(total - channels, channels)

    def top(self, channels: int) -> Part | None:
        """Where what meets the last skip goes: the buffer's first channels."""
        return self._open[-1].cut(0, channels) if self._open else None

    def pop(self) -> Part:
        return self._open.pop()


# Teachers.


def _lower_unet(unet: UNet, size: tuple[int, int], batch: int, threads: int) -> _Lowering:
    low = _Lowering(unet, batch, threads)
    low.known(unet, UNet)
    plan, config = low.plan, unet.config
    x = plan.new(config.in_channels, *size)
    out = plan.new(config.out_channels, *size)
    assert (x.buffer, out.buffer) == (INPUT, OUTPUT)
    _lower_time(low, unet)
    ups = [low.known(up, UpBlock) for up in unet.up_blocks]
    resnets = [low.known(resnet, ResnetBlock) for up in ups for resnet in up.resnets]
    totals = [resnet.norm1.num_channels for resnet in resnets]
    slots = _Slots(low, totals[::-1])
    norm = low.affine_input(x, 2.0, -1.0) if config.center_input_sample else None
    width = config.block_out_channels[0]
    h = low.conv2d(unet.conv_in, x, norm=norm, into=slots.skip(width, *size))
    for down in unet.down_blocks:
        h = _lower_down(low, down, h, slots)
    h = _lower_mid(low, unet.mid_block, h, slots)
    for up in ups:
        h = _lower_up(low, up, h, slots)
    last, silu = low.norm(unet.conv_norm_out, h)
    low.conv2d(unet.conv_out, h, norm=last, silu=silu, into=out)
    low.check_complete()
    return low


def _lower_time(low: _Lowering, unet: UNet) -> None:
    """What the row holds: all projections of the time, or with classes the time's own vector."""
    embedding = low.known(unet.time_embedding, TimestepEmbedding)
    for layer in (embedding.linear_1, embedding.linear_2):
        low.known(layer, nn.Linear)
    if unet.class_embedding is None:
        low.plan.row = low.projected
        return
    low.plan.row = embedding.linear_2.out_features
    low.embedding(unet.class_embedding, low.plan.row, 0)


def _lower_down(low: _Lowering, module: nn.Module, h: Part, slots: _Slots) -> Part:
    block = low.known(module, DownBlock)
    for i, module in enumerate(block.resnets):
        resnet = low.known(module, ResnetBlock)
        into = slots.skip(resnet.norm2.num_channels, h.height, h.width)
        if block.attentions is None:
            h = low.resnet(resnet, h, into)
        else:
            h = low.attention(block.attentions[i], low.resnet(resnet, h), into)
    if block.downsamplers is not None:
        down = low.known(block.downsamplers[0], Downsample)
        pad = (0, 1) if down.padding == 0 else (down.padding, down.padding)
        sides = ((side + sum(pad) - 3) // 2 + 1 for side in (h.height, h.width))
        h = low.conv2d(down.conv, h, pad=pad, into=slots.skip(h.channels, *sides))
    return h


def _lower_mid(low: _Lowering, module: nn.Module, h: Part, slots: _Slots) -> Part:
    block = low.known(module, MidBlock)
    h = low.resnet(block.resnets[0], h)
    if block.attentions is not None:
        h = low.attention(block.attentions[0], h)
    return low.resnet(block.resnets[1], h, slots.top(h.channels))


def _lower_up(low: _Lowering, block: UpBlock, h: Part, slots: _Slots) -> Part:
    last = len(block.resnets) - 1
    for i, module in enumerate(block.resnets):
        resnet = low.known(module, ResnetBlock)
        x = slots.pop()
        # What ends the block meets the next skip, unless it is doubled first.
        C = resnet.norm2.num_channels
        meets = i < last or block.upsamplers is None
        into = slots.top(C) if meets else None
        if block.attentions is None:
            h = low.resnet(resnet, x, into)
        else:
            h = low.attention(block.attentions[i], low.resnet(resnet, x), into)
    if block.upsamplers is not None:
        up = low.known(block.upsamplers[0], Upsample)
        h = low.conv2d(up.conv, h, upsample=True, into=slots.top(h.channels))
    return h


def _time_plan(low: _Lowering, unet: UNet) -> Plan:
    """From sinusoids (N, dim) to the rows of N passes."""
    plan = _Builder(_TIME_BATCH, low.plan.threads)
    main, low.plan = low.plan, plan
    embedding = unet.time_embedding
    x = plan.new(embedding.linear_1.in_features)
    out = plan.new(main.row)
    h = low.linear("time_embedding.linear_1", [embedding.linear_1], x)
    if unet.class_embedding is not None:
        low.linear("time_embedding.linear_2", [embedding.linear_2], h, silu=True, into=out)
    else:
        temb = low.linear("time_embedding.linear_2", [embedding.linear_2], h, silu=True)
        low.project(temb, into=out)
    low.plan = main
    return plan.finished()


# Students.


def _lower_student(
    student: Student, size: tuple[int, int], batch: int, threads: int, exit_at: int | None
) -> _Lowering:
    depth = student.depth_of(exit_at)
    low = _Lowering(student, batch, threads)
    low.known(student, Student)
    plan = low.plan
    x = plan.new(student.channels, *size)
    side = student.config.stages[depth - 1]
    out = plan.new(student.channels, side, side)
    if student.class_embedding is not None:
        low.embedding(student.class_embedding, student.class_embedding.embedding_dim, None)
    submodules = [low.known(module, Submodule) for module in student.submodules[:depth]]
    resnets = [low.known(s.blocks[0], ResnetBlock) for s in submodules if s.doubles]
    totals = [resnet.norm1.num_channels for resnet in resnets]
    slots = _Slots(low, totals[::-1] if student.encoder is not None else [])
    if student.encoder is not None:
        h = _lower_encoder(low, student.encoder, x, slots, len(totals))
    else:
        h = _lower_stem(low, student.stem, x)
    for submodule in submodules:
        h = _lower_submodule(low, submodule, h, slots)
    head = low.known(student.heads[depth - 1], Head)
    norm, silu = low.norm(head.norm, h)
    low.conv2d(head.conv, h, norm=norm, silu=silu, into=out)
    low.check_complete(
        [m for k, m in enumerate(student.heads) if k != depth - 1] + [*student.submodules[depth:]]
    )
    return low


def _lower_encoder(low: _Lowering, module: nn.Module, x: Part, slots: _Slots, skips: int) -> Part:
    """Its maps but the last become skips; so many of them, the lowest, are met again."""
    encoder = low.known(module, Encoder)
    last = len(encoder.downs)

    def place(i: int, like: Part) -> Part | None:
        met = last - skips <= i < last
        return slots.skip(like.channels, like.height, like.width) if met else None

    width = encoder.conv_in.out_channels
    h = low.conv2d(encoder.conv_in, x, into=place(0, x._replace(channels=width)))
    for i, (down, block) in enumerate(zip(encoder.downs, encoder.blocks, strict=True), 1):
        h = low.conv2d(down, h)
        h = low.resnet(block, h, place(i, h))
    return h


def _lower_stem(low: _Lowering, module: nn.Module | None, x: Part) -> Part:
    stem = low.known(module, Stem)
    f, C = stem.factor, x.channels
    deep = low.plan.new(C * f * f, x.height // f, x.width // f)
    low.plan.add(
        "space_to_depth", low.names[stem], {"x": x}, {"y": deep},
        channels=C, block=f, height=x.height, width=x.width,
    )  # fmt: skip
    # pixel_unshuffle puts channels first, the plan the place in the square.
    weight = stem.conv.weight.detach().unflatten(1, (C, f * f)).transpose(1, 2).flatten(1, 2)
    return low.conv2d(stem.conv, deep, weight=weight)


def _lower_submodule(low: _Lowering, block: Submodule, h: Part, slots: _Slots) -> Part:
    if block.reduce is not None:
        h = low.conv2d(block.reduce, h)
    if block.doubles:
        into = slots.top(h.channels)
        doubled = low.upsampled(h, low.names[block], into)
        h = doubled if into is None else slots.pop()
    for resnet in block.blocks:
        h = low.resnet(resnet, h)
    return h if block.attention is None else low.attention(block.attention, h)


# Engines.


class Engine:
    """A network as a compiled plan: float32 on the CPU, (B, C, H, W) in and out.

    `plan` is the pass; `time` makes, for a teacher, the rows that tell its passes their times.
    Its weights are copies, so that later changes of the network do not reach it.
    """

    def __init__(self, plan: Plan, time: Plan | None, sinusoids: Callable[[Tensor], Tensor] | None):
        self.plan, self.time = plan, time
        self.compiled = plan.compiled()
        self._time = None if time is None else time.compiled()
        self._sinusoids = sinusoids

    @property
    def name(self) -> str:
        """What decides an image's bits, beside the network and the instruction set."""
        told = json.dumps([(op.kind, op.numbers, op.factor) for op in self.plan.ops])
        digest = hashlib.sha256(told.encode()).hexdigest()[:8]
        return f"plan {digest} for batch {self.plan.batch}"

    def rows(self, timesteps: Sequence[int]) -> Tensor:
        """What the passes at these times are told: (N, row) float32."""
        if self._time is None or self._sinusoids is None:
            return torch.zeros(len(timesteps), 0)
        x = self._sinusoids(torch.tensor(timesteps, dtype=torch.int64)).contiguous()
        out = torch.empty(len(timesteps), self.plan.row)
        self._time.run(
            x=x.data_ptr(), y=out.data_ptr(), row=0, labels=0, images=len(timesteps),
            threads=torch.get_num_threads(), poison=False,
        )  # fmt: skip
        return out

    def run(
        self,
        x: Tensor,
        t: int | None = None,
        y: Tensor | None = None,
        *,
        threads: int = 0,
        poison: bool = False,
    ) -> Tensor:
        """One pass: x (B, C, H, W) float32 -> (B, C', H', W'), channels_last.

        t is a teacher's time, y (B,) int64 the labels of a class-conditional network. `threads`
        as torch has them, if 0. `poison` fills the arena with NaN first. ValueError for a shape,
        dtype or label that does not fit.
        """
        self._check(x, y)
        source = self.plan.buffers[INPUT]
        target = self.plan.buffers[OUTPUT]
        if (t is None) != (self.time is None):
            raise ValueError("a teacher needs a time t, and a student takes none")
        row = self.rows([] if t is None else [t])
        dense = x.detach().permute(0, 2, 3, 1).contiguous()
        assert dense.shape[1:] == (source.height, source.width, source.channels)
        out = torch.empty(len(x), target.height, target.width, target.channels)
        labels = None if y is None else y.contiguous()
        self.compiled.run(
            x=dense.data_ptr(), y=out.data_ptr(), row=row.data_ptr(),
            labels=0 if labels is None else labels.data_ptr(), images=len(x),
            threads=threads or torch.get_num_threads(), poison=poison,
        )  # fmt: skip
        return out.permute(0, 3, 1, 2)

    def profile(self, images: int, repeats: int = 5) -> list[float]:
        """Seconds of CPU time of each operation at one thread, the least of some repeats."""
        source, target = self.plan.buffers[INPUT], self.plan.buffers[OUTPUT]
        x, y = (torch.zeros(images, b.height, b.width, b.channels) for b in (source, target))
        row, labels = torch.zeros(max(1, self.plan.row)), torch.zeros(images, dtype=torch.int64)
        seconds: list[float] = self.compiled.profile(
            x=x.normal_().data_ptr(), y=y.data_ptr(), row=row.data_ptr(),
            labels=labels.data_ptr(), images=images, repeats=repeats,
        )  # fmt: skip
        return seconds

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        source = self.plan.buffers[INPUT]
        shape = (source.channels, source.height, source.width)
        if x.dim() != 4 or tuple(x.shape[1:]) != shape:
            raise ValueError(f"x {tuple(x.shape)} is not (B, {', '.join(map(str, shape))})")
        if x.dtype is not torch.float32 or not x.is_cpu:
            raise ValueError(f"the engine takes float32 on the CPU, not {x.dtype} on {x.device}")
        self.check_labels(y, len(x))

    def check_labels(self, y: Tensor | None, images: int) -> None:
        """ValueError for labels that are missing, superfluous or not (B,) int64."""
        if self.plan.classes and y is None:
            raise ValueError("this network is class-conditional: pass labels y (B,)")
        if not self.plan.classes and y is not None:
            raise ValueError("this network is unconditional: it takes no labels")
        if y is not None and (y.shape != (images,) or y.dtype is not torch.int64 or not y.is_cpu):
            raise ValueError(f"y {tuple(y.shape)} {y.dtype} is not ({images},) int64 on the CPU")


def lower(
    model: UNet | Student,
    size: tuple[int, int],
    *,
    batch: int,
    threads: int = 1,
    exit_at: int | None = None,
) -> Engine:
    """The engine of a network for inputs of `size` (H, W), made for `batch` images at a time.

    Batch and threads decide which algorithm a convolution takes; more images are run in parts of
    `batch`. Raises LoweringError for a module that a plan cannot express, ValueError for a size or
    an `exit_at` that the network does not have.
    """
    if extension is None:
        raise LoweringError("the C++ extension is not installed")
    if batch < 1 or threads < 1:
        raise ValueError(f"batch={batch} and threads={threads} must be positive")
    if isinstance(model, Student):
        if size != (model.size, model.size):
            raise ValueError(f"this student takes {model.size}x{model.size} pixels, not {size}")
        plan = _lower_student(model, size, batch, threads, exit_at).plan.finished()
        return Engine(plan, None, None)
    model.check_size(*size)
    low = _lower_unet(model, size, batch, threads)
    config = model.config

    def sinusoids(timesteps: Tensor) -> Tensor:
        width = config.block_out_channels[0]
        return timestep_embedding(timesteps, width, config.flip_sin_to_cos, config.freq_shift)

    time = _time_plan(low, model)
    return Engine(low.plan.finished(), time, sinusoids)


def describe(engine: Engine, images: int, timed: bool = False) -> Iterator[str]:
    """Lines that tell a plan's operations, their sizes and FLOPs, and the memory of a pass.

    `timed` adds what each takes of this processor, by CPU time at one thread.
    """
    plan = engine.plan
    images = min(images, plan.batch)
    seconds = engine.profile(images) if timed else []
    yield (
        f"{'operation':<15}{'module':<42}{'input':>15}{'output':>15}  {'algorithm':<10}"
        f"{'MFLOP':>9}{'weights, KiB':>14}" + (f"{'us':>10}{'GFLOP/s':>9}" if timed else "")
    )
    for i, op in enumerate(plan.ops):
        algorithm = ALGORITHMS[op.numbers["algorithm"]] if op.kind == "convolution" else ""
        read = _shape(op.reads[0]) if op.reads else ""
        flops = op.flops * images
        yield (
            f"{op.kind:<15}{op.module:<42}{read:>15}{_shape(op.writes[0]):>15}  {algorithm:<10}"
            f"{op.flops / 1e6:>9.2f}{op.weights / 256:>14.1f}"
            + (f"{seconds[i] * 1e6:>10.1f}{flops / seconds[i] / 1e9:>9.1f}" if timed else "")
        )
    flops = sum(op.flops for op in plan.ops)
    memory = engine.compiled.bytes(images, plan.threads)
    yield (
        f"{len(plan.ops)} operations, {flops / 1e9:.3f} GFLOP an image; weights "
        f"{plan.weights.numel() / 2**18:.1f} MiB; a pass of {images} takes "
        f"{memory / 2**20:.1f} MiB; made for batch {plan.batch}"
    )
    if timed:
        total = sum(seconds)
        yield f"{total * 1e3:.3f} ms a pass, {flops * images / total / 1e9:.1f} GFLOP/s; of which"
        for kind in dict.fromkeys(op.kind for op in plan.ops):
            part = sum(s for s, op in zip(seconds, plan.ops, strict=True) if op.kind == kind)
            yield f"  {kind:<15}{part / total:>6.1%}"


def _shape(part: Part) -> str:
    return f"{part.height}x{part.width}x{part.channels}"
