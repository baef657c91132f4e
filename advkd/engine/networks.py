"""The plans of a teacher, of its conditioning on the time, and of a student."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from advkd.engine.lowering import Lowering, Slots
from advkd.engine.plan import (
    INPUT,
    OUTPUT,
    Builder,
    Part,
    Plan,
    Source,
)
from advkd.models.layers import (
    Downsample,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
)
from advkd.models.student import (
    Encoder,
    Head,
    Stem,
    Student,
    Submodule,
)
from advkd.models.unet import (
    DownBlock,
    MidBlock,
    UNet,
    UpBlock,
)

_TIME_BATCH = 64  # timesteps of a pass of the conditioning's plan

# Teachers.


def lower_unet(
    unet: UNet, size: tuple[int, int], batch: int, threads: int, like: Tensor | None = None
) -> Lowering:
    """Lower one pass of a teacher for inputs of `size` (H, W); `like` as for `Lowering`."""
    low = Lowering(unet, batch, threads, like)
    low.known(unet, UNet)
    plan, config = low.plan, unet.config
    x = plan.new(config.in_channels, *size)
    out = plan.new(config.in_channels if unet.learns_variance else config.out_channels, *size)
    assert (x.buffer, out.buffer) == (INPUT, OUTPUT)
    _lower_time(low, unet)
    ups = [low.known(up, UpBlock) for up in unet.up_blocks]
    resnets = [low.known(resnet, ResnetBlock) for up in ups for resnet in up.resnets]
    totals = [resnet.norm1.num_channels for resnet in resnets]
    slots = Slots(low, totals[::-1])
    norm = low.affine_input(x, 2.0, -1.0) if config.center_input_sample else None
    width = config.block_out_channels[0]
    h = low.conv2d(unet.conv_in, x, norm=norm, into=slots.skip(width, *size))
    for down in unet.down_blocks:
        h = _lower_down(low, down, h, slots)
    if unet.mid_block is not None:
        h = _lower_mid(low, unet.mid_block, h, slots)
    else:
        h = low.copied(h, "down_blocks", _placed(slots.top(h.channels)))
    for up in ups:
        h = _lower_up(low, up, h, slots)
    last, silu = low.norm(unet.conv_norm_out, h)
    own: dict[str, Any] = {}
    if unet.learns_variance:  # which is no part of the six numbers of a step
        conv = unet.conv_out
        assert conv.bias is not None
        own = {"weight": conv.weight[: out.channels], "bias": conv.bias[: out.channels]}
    low.conv2d(unet.conv_out, h, norm=last, silu=silu, into=out, **own)
    low.check_complete()
    return low


def _placed(part: Part | None) -> Part:
    assert part is not None
    return part


def _lower_time(low: Lowering, unet: UNet) -> None:
    """Size the conditioning: all projections of the time embedding or, with classes, the time
    embedding itself, to which each image adds its class embedding."""
    embedding = low.known(unet.time_embedding, TimestepEmbedding)
    for layer in (embedding.linear_1, embedding.linear_2):
        low.known(layer, nn.Linear)
    if unet.class_embedding is None:
        low.plan.conditioning = low.projected
        return
    low.plan.conditioning = embedding.linear_2.out_features
    _lower_classes(low, unet)


def _lower_classes(low: Lowering, unet: UNet) -> None:
    """Lower the class embedding: its table, or the one that its sinusoids make."""
    module = unet.class_embedding
    if isinstance(module, TimestepEmbedding):
        low.known(module, TimestepEmbedding)
        for layer in (module.linear_1, module.linear_2):
            low.known(layer, nn.Linear)
        labels = torch.arange(unet.num_classes or 0, device=module.linear_1.weight.device)
        table: Source = partial(unet.embed_class, labels)
    else:
        table = low.known(module, nn.Embedding).weight
    low.embedding("class_embedding", table, low.plan.conditioning, 0)


def _lower_layer(
    low: Lowering, block: DownBlock | UpBlock, i: int, x: Part, into: Part | None
) -> Part:
    """Lower residual block number i and, where the block has some, the attention behind it."""
    if block.attentions is None:
        return low.resnet(block.resnets[i], x, into)
    return low.attention(block.attentions[i], low.resnet(block.resnets[i], x), into)


def _lower_down(low: Lowering, module: nn.Module, h: Part, slots: Slots) -> Part:
    block = low.known(module, DownBlock)
    for i, module in enumerate(block.resnets):
        resnet = low.known(module, ResnetBlock)
        into = slots.skip(resnet.norm2.num_channels, h.height, h.width)
        h = _lower_layer(low, block, i, h, into)
    if block.downsamplers is not None:
        h = _lower_downsampler(low, block.downsamplers[0], h, slots)
    return h


def _lower_downsampler(low: Lowering, module: nn.Module, h: Part, slots: Slots) -> Part:
    if isinstance(module, ResnetBlock):
        return low.resnet(module, h, slots.skip(h.channels, h.height // 2, h.width // 2))
    down = low.known(module, Downsample)
    pad = (0, 1) if down.padding == 0 else (down.padding, down.padding)
    sides = ((side + sum(pad) - 3) // 2 + 1 for side in (h.height, h.width))
    return low.conv2d(down.conv, h, pad=pad, into=slots.skip(h.channels, *sides))


def _lower_mid(low: Lowering, module: nn.Module, h: Part, slots: Slots) -> Part:
    block = low.known(module, MidBlock)
    h = low.resnet(block.resnets[0], h)
    if block.attentions is not None:
        h = low.attention(block.attentions[0], h)
    return low.resnet(block.resnets[1], h, slots.top(h.channels))


def _lower_up(low: Lowering, block: UpBlock, h: Part, slots: Slots) -> Part:
    last = len(block.resnets) - 1
    for i, module in enumerate(block.resnets):
        resnet = low.known(module, ResnetBlock)
        x = slots.pop()
        # The block's result is concatenated with the next skip, unless it is upsampled first.
        C = resnet.norm2.num_channels
        concatenated = i < last or block.upsamplers is None
        into = slots.top(C) if concatenated else None
        h = _lower_layer(low, block, i, x, into)
    if block.upsamplers is None:
        return h
    module, into = block.upsamplers[0], slots.top(h.channels)
    if isinstance(module, ResnetBlock):
        return low.resnet(module, h, into)
    return low.conv2d(low.known(module, Upsample).conv, h, upsample=True, into=into)


def time_plan(low: Lowering, unet: UNet) -> Plan:
    """The plan from sinusoids (N, dim) to the conditioning (N, conditioning) of N passes."""
    return lower_time(low, unet).finished()


def lower_time(low: Lowering, unet: UNet) -> Builder:
    """Lower what `time_plan` is."""
    plan = Builder(_TIME_BATCH, low.plan.threads)
    main, low.plan = low.plan, plan
    embedding = unet.time_embedding
    x = plan.new(embedding.linear_1.in_features)
    out = plan.new(main.conditioning)
    h = low.linear("time_embedding.linear_1", [embedding.linear_1], x)
    if unet.class_embedding is not None:
        low.linear("time_embedding.linear_2", [embedding.linear_2], h, silu=True, into=out)
    else:
        temb = low.linear("time_embedding.linear_2", [embedding.linear_2], h, silu=True)
        low.project(temb, into=out)
    low.plan = main
    return plan


# Students.


def lower_student(
    student: Student, size: tuple[int, int], batch: int, threads: int, exit_at: int | None,
    like: Tensor | None = None,
) -> Lowering:  # fmt: skip
    """Lower one pass of a student to head `exit_at` (None: the last); `like` as for `Lowering`."""
    depth = student.depth_of(exit_at)
    low = Lowering(student, batch, threads, like)
    low.known(student, Student)
    plan = low.plan
    x = plan.new(student.channels, *size)
    side = student.config.stages[depth - 1]
    out = plan.new(student.channels, side, side)
    if student.class_embedding is not None:
        table = low.known(student.class_embedding, nn.Embedding).weight
        low.embedding("class_embedding", table, table.shape[1], None)
    submodules = [low.known(module, Submodule) for module in student.submodules[:depth]]
    resnets = [low.known(s.blocks[0], ResnetBlock) for s in submodules if s.doubles]
    totals = [resnet.norm1.num_channels for resnet in resnets]
    slots = Slots(low, totals[::-1] if student.encoder is not None else [])
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


def _lower_encoder(low: Lowering, module: nn.Module, x: Part, slots: Slots, skips: int) -> Part:
    """Lower an encoder. The `skips` feature maps before its last are read again by submodules."""
    encoder = low.known(module, Encoder)
    last = len(encoder.downs)

    def place(i: int, like: Part) -> Part | None:
        is_skip = last - skips <= i < last
        return slots.skip(like.channels, like.height, like.width) if is_skip else None

    width = encoder.conv_in.out_channels
    h = low.conv2d(encoder.conv_in, x, into=place(0, x._replace(channels=width)))
    for i, (down, block) in enumerate(zip(encoder.downs, encoder.blocks, strict=True), 1):
        h = low.conv2d(down, h)
        h = low.resnet(block, h, place(i, h))
    return h


def _lower_stem(low: Lowering, module: nn.Module | None, x: Part) -> Part:
    stem = low.known(module, Stem)
    f, C = stem.factor, x.channels
    deep = low.plan.new(C * f * f, x.height // f, x.width // f)
    low.plan.add(
        "space_to_depth", low.names[stem], {"x": x}, {"y": deep},
        channels=C, block=f, height=x.height, width=x.width,
    )  # fmt: skip
    conv = stem.conv

    def weight() -> Tensor:
        # pixel_unshuffle puts channels first, the plan the position within the square.
        return conv.weight.unflatten(1, (C, f * f)).transpose(1, 2).flatten(1, 2)

    return low.conv2d(conv, deep, weight=weight)


def _lower_submodule(low: Lowering, block: Submodule, h: Part, slots: Slots) -> Part:
    if block.reduce is not None:
        h = low.conv2d(block.reduce, h)
    if block.doubles:
        into = slots.top(h.channels)
        doubled = low.upsampled(h, low.names[block], into)
        h = doubled if into is None else slots.pop()
    for resnet in block.blocks:
        h = low.resnet(resnet, h)
    return h if block.attention is None else low.attention(block.attention, h)
