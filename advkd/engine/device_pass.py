"""A plan on a device: its operations by torch, cuDNN and the Triton kernels, for a CUDA graph.

What a plan says in one operation stays in as few passes over memory as those allow: GroupNorm-SiLU
adds the bias of the convolution before it, bias, residual and factor are one kernel, and that
writes its channels of a concatenation where they belong. Activations are (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from advkd import ops
from advkd.engine.plan import INPUT, OUTPUT, Builder, Op, Part, Source, lives_of, value_of
from advkd.kernels import unavailable_reason as triton_missing


@dataclass(frozen=True)
class Step:
    """An operation as it is carried out."""

    op: Op
    weights: dict[str, Tensor]
    norm: Step | None  # which is applied to what a convolution reads
    constants: tuple[Tensor, Tensor] | None  # a scale and a shift in the place of a norm
    deferred: bool  # a convolution's bias, which is left to the norms that read its result
    ends: tuple[int, ...]  # buffers that nothing reads afterwards


class DevicePass:
    """One pass of a plan. The weights are read in their places, at each call or, where they are
    made of the network's tensors, at each `refresh`."""

    def __init__(self, plan: Builder):
        self._plan = plan
        self._made: list[tuple[Tensor, Source]] = []  # tensors that are not read in their places
        self._steps = list(self._all_steps())

    def _all_steps(self) -> Iterator[Step]:
        plan = self._plan
        makers: dict[int, Step] = {}  # of norms and constants, by the buffers of scale and shift
        ends: list[list[int]] = [[] for _ in plan.ops]
        for buffer, (_, last) in enumerate(lives_of(plan.buffers, plan.ops)):
            if last >= 0 and buffer not in (INPUT, OUTPUT):
                ends[last].append(buffer)
        for op, sources, ending in zip(plan.ops, plan.sources, ends, strict=True):
            norm, constants = None, None
            if "x_scale" in op.numbers:
                scale, shift = makers[op.numbers["x_scale"]], makers[op.numbers["x_shift"]]
                if scale.op.kind == "film":
                    norm = makers[scale.op.numbers["scale"]]
                elif scale.op.kind == "norm":
                    norm = scale
                else:
                    constants = scale.weights["values"], shift.weights["values"]
            deferred = op.kind == "convolution" and _is_read_by_norms(op, plan)
            step = Step(op, self._weights(op, sources), norm, constants, deferred, tuple(ending))
            if op.kind in ("norm", "film", "constant"):
                makers |= {part.buffer: step for part in op.writes}
            yield step

    def _weights(self, op: Op, sources: dict[str, Source]) -> dict[str, Tensor]:
        """An operation's tensors as they are read: the network's own, or copies to refresh."""
        weights = {}
        for name, source in sources.items():
            weight = value_of(source)
            is_kernel = name == "packed" and op.numbers["kernel"] > 1
            layout = torch.channels_last if is_kernel else torch.contiguous_format
            if not isinstance(source, Tensor) or not weight.is_contiguous(memory_format=layout):
                weight = weight.clone(memory_format=layout)
                self._made.append((weight, source))
            weights[name] = weight
        return weights

    @torch.inference_mode()
    def refresh(self) -> None:
        """Make again what is made of the network's tensors."""
        if self._made:
            made, sources = zip(*self._made, strict=True)
            torch._foreach_copy_(list(made), [value_of(source) for source in sources])

    def __call__(
        self, x: Tensor, conditioning: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """x (B, H, W, C) of the network's dtype -> (B, H', W', C'), dense.

        `conditioning` is what all images of a pass share, (R,) of any floating dtype; `labels`
        (B,) int64 are for a plan with classes.
        """
        run = _Run(self._plan, x, conditioning, labels)
        for step in self._steps:
            run.carry_out(step)
            for buffer in step.ends:
                run.buffers.pop(buffer, None)
        return run.buffers[OUTPUT]


def _is_read_by_norms(op: Op, plan: Builder) -> bool:
    """Whether all that reads a convolution's result is a norm, or reads it through one."""
    (y,) = op.writes
    if y.buffer == OUTPUT or y.channels != plan.buffers[y.buffer].channels:
        return False
    if "residual" in op.numbers or op.factor != 1.0:
        return False
    norms = {o.numbers["scale"] for o in plan.ops if o.kind == "norm"}
    norms |= {o.numbers["y_scale"] for o in plan.ops if o.kind == "film"}
    for reader in plan.ops:
        times = sum(part.buffer == y.buffer for part in reader.reads)
        if times == 0 or reader.kind == "norm":
            continue
        through = "x_scale" in reader.numbers and reader.numbers["x_scale"] in norms
        if not (through and times == 1 and reader.numbers["x"] == y.buffer):
            return False
    return True


class _Run:
    """The buffers of one pass, and one method for each kind of operation."""

    def __init__(
        self, plan: Builder, x: Tensor, conditioning: Tensor | None, labels: Tensor | None
    ):
        self.plan, self.conditioning, self.labels = plan, conditioning, labels
        self.buffers: dict[int, Tensor] = {INPUT: x}
        self.added: dict[int, Tensor] = {}  # (C,) or (B, C), of buffers without their bias
        self.films: dict[int, tuple[Tensor, Tensor]] = {}  # (B, C) each, by the scale's buffer

    def carry_out(self, step: Step) -> None:
        """Carry out an operation; norms and constants are a part of what reads them."""
        if step.op.kind in ("convolution", "average_pool"):
            getattr(self, f"_{step.op.kind}")(step)
        elif step.op.kind not in ("norm", "constant"):
            getattr(self, f"_{step.op.kind}")(step.op, step.weights)

    def _view(self, part: Part) -> Tensor:
        """A part that has been written, (B, H, W, C)."""
        return self.buffers[part.buffer][..., part.channel : part.channel + part.channels]

    def _place(self, part: Part) -> Tensor:
        """A part to be written; its buffer is allocated with the first."""
        if part.buffer not in self.buffers:
            whole, x = self.plan.buffers[part.buffer], self.buffers[INPUT]
            shape = (len(x), whole.height, whole.width, whole.channels)
            self.buffers[part.buffer] = torch.empty(shape, dtype=x.dtype, device=x.device)
        return self._view(part)

    def _convolution(self, step: Step) -> None:
        op, (y,) = step.op, step.op.writes
        x, weight, bias = self._normalized(step), step.weights["packed"], self._bias(step)
        residual = self._residual(op)
        whole = y.channels == self.plan.buffers[y.buffer].channels
        if step.deferred and bias is not None:
            self.added[y.buffer], bias = bias, None
        fused = None  # a product of matrices adds its bias in passing, if one serves all images
        if op.numbers["kernel"] == 1 and "bias" in step.weights and residual is None:
            fused, bias = bias, None
        found = _convolved(x, weight, fused, op.numbers)
        if bias is not None and bias.dim() == 2:
            found, bias = found + bias[:, None, None, :].to(found.dtype), None
        if whole:
            self.buffers[y.buffer] = found
        if not whole or bias is not None or residual is not None or op.factor != 1.0:
            joined(found, bias, residual, op.factor, self._place(y))

    def _normalized(self, step: Step) -> Tensor:
        """What an operation reads, after its norm and SiLU."""
        part, silu = step.op.reads[0], bool(step.op.numbers["silu"])
        x = self._view(part)
        if step.norm is not None:
            weights, norm = step.norm.weights, step.norm.op
            return group_norm(
                x, weights["weight"], weights["bias"], norm.numbers["groups"], norm.factor, silu,
                self.added.get(part.buffer), self.films.get(step.op.numbers["x_scale"]),
            )  # fmt: skip
        if step.constants is not None:
            x = x * step.constants[0] + step.constants[1]
        return F.silu(x) if silu else x

    def _bias(self, step: Step) -> Tensor | None:
        """(C,) of all images, or (B, C) of each."""
        numbers, channels = step.op.numbers, step.op.numbers["out_channels"]
        if "bias_conditioning" in numbers:
            assert self.conditioning is not None
            first = numbers["bias_conditioning"]
            return self.conditioning[first : first + channels]
        if "bias_buffer" in numbers:
            first = numbers["bias_buffer_channel"]
            return self.buffers[numbers["bias_buffer"]][:, 0, 0, first : first + channels]
        return step.weights.get("bias")

    def _film(self, op: Op, weights: dict[str, Tensor]) -> None:
        """Keep both halves for what the norm is applied to."""
        channels, images = op.numbers["channels"], len(self.buffers[INPUT])
        if "film_conditioning" in op.numbers:
            assert self.conditioning is not None
            first = op.numbers["film_conditioning"]
            whole = self.conditioning[first : first + 2 * channels].expand(images, -1)
        else:
            first = op.numbers["film_channel"]
            whole = self.buffers[op.numbers["film"]][:, 0, 0, first : first + 2 * channels]
        self.films[op.numbers["y_scale"]] = (whole[:, :channels], whole[:, channels:])

    def _average_pool(self, step: Step) -> None:
        images = self._normalized(step).permute(0, 3, 1, 2)
        found = F.avg_pool2d(images, 2).permute(0, 2, 3, 1)
        self.buffers[step.op.writes[0].buffer] = found.contiguous()

    def _residual(self, op: Op) -> Tensor | None:
        if "residual" not in op.numbers:
            return None
        first, channels = op.numbers["residual_channel"], op.numbers["out_channels"]
        return self.buffers[op.numbers["residual"]][..., first : first + channels]

    def _attention(self, op: Op, weights: dict[str, Tensor]) -> None:
        qkv, y = self._view(op.reads[0]), op.writes[0]
        heads, head_dim = op.numbers["heads"], op.numbers["head_dim"]
        q, k, v = (
            part.reshape(len(qkv), -1, heads, head_dim).transpose(1, 2)
            for part in qkv.chunk(3, dim=-1)
        )
        out = ops.attention(q, k, v, op.factor).transpose(1, 2)
        self.buffers[y.buffer] = out.reshape(len(qkv), y.height, y.width, y.channels)

    def _embed(self, op: Op, weights: dict[str, Tensor]) -> None:
        (y,) = op.writes
        assert self.labels is not None
        found = F.embedding(self.labels, weights["table"])
        if "conditioning" in op.numbers:
            assert self.conditioning is not None
            first = op.numbers["conditioning"]
            found = found + self.conditioning[first : first + y.channels].to(found.dtype)
        self.buffers[y.buffer] = found[:, None, None, :]

    def _space_to_depth(self, op: Op, weights: dict[str, Tensor]) -> None:
        x, (y,), block = self._view(op.reads[0]), op.writes, op.numbers["block"]
        squares = x.unflatten(2, (-1, block)).unflatten(1, (-1, block)).transpose(2, 3)
        self._place(y).copy_(squares.reshape(len(x), y.height, y.width, y.channels))

    def _upsample(self, op: Op, weights: dict[str, Tensor]) -> None:
        x, y = self._view(op.reads[0]), self._place(op.writes[0])
        squares = y.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        squares.copy_(x[:, :, None, :, None, :].expand_as(squares))


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: dict[str, int]) -> Tensor:
    """A convolution of x (B, H, W, C); dense."""
    if numbers["kernel"] == 1 and numbers["stride"] == 1:
        rows, matrix = x.reshape(-1, x.shape[-1]), weight.flatten(1).t()
        found = rows @ matrix if bias is None else torch.addmm(bias, rows, matrix)
        return found.view(*x.shape[:-1], -1)
    images = x.permute(0, 3, 1, 2)
    if numbers["upsample"]:
        images = F.interpolate(images, scale_factor=2.0, mode="nearest")
    before, after = numbers["pad_before"], numbers["pad_after"]
    if before != after:
        images, before = F.pad(images, (before, after, before, after)), 0
    images = images.contiguous(memory_format=torch.channels_last)
    found = F.conv2d(images, weight, bias, stride=numbers["stride"], padding=before)
    return found.permute(0, 2, 3, 1).contiguous()


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool,
    added: Tensor | None, film: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """GroupNorm-SiLU of x + added, (B, H, W, C); added is (C,), (B, C) or None. `film` are scale
    and shift, (B, C) each."""
    scale, shift = (None, None) if film is None else film
    images = x.permute(0, 3, 1, 2)
    if x.is_cuda and triton_missing() is None:
        # Here and not above, because importing Triton takes long and only CUDA needs it.
        from advkd.kernels.group_norm_silu import forward

        y = forward(images, (weight, bias, scale, shift), groups, eps, silu, added)[0]
    else:
        wide = images.float()
        wide = wide if added is None else wide + added[..., None, None].float()
        activation = "silu" if silu else "none"
        y = ops.group_norm_silu(wide, weight, bias, groups, eps, activation, scale, shift)
        y = y.to(x.dtype)
    return y.permute(0, 2, 3, 1).contiguous()


def joined(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, scale: float, out: Tensor
) -> Tensor:
    """(x + bias + residual) scale into `out`, all (B, H, W, C) with neighboring channels."""
    if x.is_cuda and triton_missing() is None:
        from advkd.kernels.bias_residual import bias_residual

        bias_residual(
            _rows(x), bias, None if residual is None else _rows(residual), scale, _rows(out)
        )
        return out
    y = x.float()
    y = y if bias is None else y + bias.float()
    y = y if residual is None else y + residual.float()
    return out.copy_(y * scale)


def _rows(x: Tensor) -> Tensor:
    """(B, H, W, C) as (B H W, C), in place."""
    return x.view(-1, x.shape[-1])
