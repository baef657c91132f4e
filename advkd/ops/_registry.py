"""The registry of ops: `register` makes a torch op of a reference and the kernels that stand in
for it. `advkd.ops.describe` and the tests that hold for every op read their lists from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from advkd.kernels import unavailable_reason as triton_missing
from advkd.ops import _backend
from advkd.ops._backend import runs_eagerly, runs_eagerly_backward, transformed
from advkd.ops._cuda import cuda_missing


class Kernel(NamedTuple):
    """A fused backend of an op: C++ for tensors on the CPU, Triton or C++ for those on CUDA."""

    run: Callable[..., Any]  # takes and returns what the op's reference does
    dtypes: tuple[torch.dtype, ...]  # of the op's first tensor
    limit: Callable[[Tensor], str | None] | None = None  # why it takes no such one, as a clause
    language: str = ""  # "" for C++ or Triton; "CUDA C++"

    def missing(self, on_cpu: bool) -> str | None:
        """Why it cannot be called here at all, as a clause."""
        if on_cpu:
            return _backend.extension_missing
        return cuda_missing() if self.language else triton_missing()

    def language_on(self, on_cpu: bool) -> str:
        """What it is written in, where it serves tensors on the CPU, or on CUDA."""
        return self.language or ("C++" if on_cpu else "Triton")


@dataclass(frozen=True, eq=False)
class Op:
    """A torch op `advkd::NAME`; called, it takes the arguments of its schema.

    In eager code a call goes past torch's dispatcher, whose way through Python takes longer than a
    small kernel; wherever something traces, transforms or casts, it goes through.
    """

    name: str
    reference: Callable[..., Any]  # plain torch; takes the schema's arguments without `fused`
    cpu: Kernel | None
    cuda: Kernel | None
    gradient: type[Function] | None  # takes the schema's arguments; None: the reference's gradient
    derived: bool  # whether it is only a part of another op's gradient
    tensors: tuple[int, ...]  # the places of tensors among the schema's arguments
    optional: bool  # whether the schema ends with `fused`, which False turns off
    dispatched: Any  # torch.ops.advkd.NAME

    def __call__(self, *arguments: Any) -> Any:
        tensors = self._given(arguments)
        if not runs_eagerly_backward(*tensors):
            return self.dispatched(*arguments)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self._tracked(*arguments)
        return self.run(*arguments)

    def fused(self, *plain: Any) -> Any:
        """The op by the kernel that, as `unavailable` says, serves its first tensor."""
        tensors = self._given(plain)
        if torch.is_grad_enabled() or not runs_eagerly(*tensors):
            return self(*plain, True) if self.optional else self(*plain)
        kernel = self.cpu if tensors[0].is_cpu else self.cuda
        assert kernel is not None
        return kernel.run(*plain)

    def run(self, *arguments: Any) -> Any:
        """The op without torch's dispatcher and without a gradient: by a kernel where one serves.

        An exported program that was traced with the fused op runs without it too.
        """
        plain, first = self._plain(arguments), arguments[self.tensors[0]]
        kernel = self.cpu if first.is_cpu else self.cuda
        off = self.optional and not arguments[-1]
        if off or kernel is None or self._unserved(first, kernel) is not None:
            return self.reference(*plain)
        return kernel.run(*plain)

    def below_autograd(self, *arguments: Any) -> Any:
        """The op in the forward of its own gradient."""
        if runs_eagerly_backward(*self._given(arguments)):
            return self.run(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.dispatched(*arguments)

    def unavailable(self, first: Tensor) -> str | None:
        """Why no kernel serves calls with this first tensor, as a clause; None where one does."""
        if transformed():
            return "no kernel carries the tangents and batches of forward-mode AD and torch.func"
        return self._unserved(first, self.cpu if first.is_cpu else self.cuda)

    def _unserved(self, first: Tensor, kernel: Kernel | None) -> str | None:
        if kernel is None or not (first.is_cpu or first.is_cuda):
            return f"no kernel serves tensors on {first.device.type}"
        if first.dtype not in kernel.dtypes:
            language = kernel.language_on(first.is_cpu)
            return f"the {language} kernel takes {_listed(kernel.dtypes)}, not {first.dtype}"
        missing = kernel.missing(first.is_cpu)
        return missing or (None if kernel.limit is None else kernel.limit(first))

    def _given(self, arguments: tuple[Any, ...]) -> list[Tensor]:
        return [arguments[place] for place in self.tensors if arguments[place] is not None]

    def _plain(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return arguments[:-1] if self.optional else arguments

    def _tracked(self, *arguments: Any) -> Any:
        """The op with its gradient, for autograd."""
        if transformed():
            return self.reference(*self._plain(arguments))
        if self.gradient is None:
            return _ReferenceGradient.apply(self, *arguments)
        return self.gradient.apply(*arguments)


_OPS: dict[str, Op] = {}
_library = torch.library.Library("advkd", "FRAGMENT")


def register(
    schema: str,
    reference: Callable[..., Any],
    *,
    cpu: Kernel | None = None,
    cuda: Kernel | None = None,
    fake: Callable[..., Any] | None = None,
    gradient: type[Function] | None = None,
    autocast: bool = False,
    derived: bool = False,
) -> Op:
    """Define a torch op and all that torch asks of one, and list it.

    Args:
        schema: "name(Tensor x, ...) -> Tensor". If the last argument is `bool fused`, False runs
            the reference.
        reference: the op in plain torch, of the schema's arguments without `fused`.
        cpu, cuda: the kernels. Where none serves, the reference runs.
        fake: the shapes and strides of the results, of the reference's arguments; by default the
            reference finds them.
        gradient: the op with its gradient, of the schema's arguments; by default the reference is
            differentiated.
        autocast: whether autocast runs the op in its own dtype, as it runs matrix products.
        derived: whether the op is only a part of another op's gradient.
    """
    name, arguments = schema.split("(", 1)
    words = [argument.split() for argument in arguments.split(") ->")[0].split(",")]
    tensors = tuple(i for i, (kind, *_) in enumerate(words) if kind.startswith("Tensor"))
    optional = words[-1] == ["bool", "fused"]
    torch.library.define(f"advkd::{name}", f"({arguments}", tags=torch.Tag.pt2_compliant_tag)
    dispatched = getattr(torch.ops.advkd, name)
    op = Op(name, reference, cpu, cuda, gradient, derived, tensors, optional, dispatched)
    torch.library.impl(f"advkd::{name}", "default", op.run)
    shapes = reference if fake is None else fake
    torch.library.register_fake(f"advkd::{name}", lambda *given: shapes(*op._plain(given)))
    _library.impl(name, op._tracked, "Autograd")
    if autocast:
        for device in ("cpu", "cuda"):
            _library.impl(name, _autocast(op, device), f"Autocast{device.upper()}")
    _OPS[name] = op
    return op


def registered() -> list[Op]:
    """Every op, in the order of registration."""
    return list(_OPS.values())


def rows() -> list[tuple[str, str, str]]:
    """Which backend serves each op by default, for `advkd.ops.describe`."""
    ops = [op for op in registered() if not op.derived]
    asked, extension = _backend.asked_reference(), _backend.extension
    missing = asked or _backend.extension_missing or ""
    isa = f" ({extension.isa()})" if extension else ""
    found = [(op.name, *_serving(f"C++{isa}", op.cpu, missing)) for op in ops]
    no_device = "" if torch.cuda.is_available() else "torch sees no CUDA device"
    for op in ops:
        if op.cuda is not None:
            missing = asked or op.cuda.missing(on_cpu=False) or ""
            backend, reason = _serving(op.cuda.language_on(on_cpu=False), op.cuda, missing)
            reasons = "; ".join(filter(None, (reason, no_device)))
            found.append((f"{op.name} on CUDA", backend, reasons))
    return found


def _serving(language: str, kernel: Kernel | None, missing: str) -> tuple[str, str]:
    """The backend of an op on one kind of device, and why it is not the other; may be empty."""
    if kernel is None:
        return "reference, torch", "no fused kernel exists for it"
    return ("reference, torch", missing) if missing else (f"fused, {language}", "")


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    """E.g. "float32, float16 and bfloat16"."""
    *some, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(some)} and {last}" if some else last


def _autocast(op: Op, device: str) -> Callable[..., Any]:
    """The op under autocast: in autocast's dtype (torch's register_autocast would fix one)."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def run(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            if arguments[op.tensors[0]].dtype is not torch.float64:
                dtype = torch.get_autocast_dtype(device)
                arguments = tuple(
                    x.to(dtype) if i in op.tensors and x is not None else x
                    for i, x in enumerate(arguments)
                )
            return op.dispatched(*arguments)

    return run


class _ReferenceGradient(Function):
    """An op with the gradient of its reference, which it runs again backward."""

    @staticmethod
    def forward(ctx: Any, op: Op, *arguments: Any) -> Any:
        ctx.op = op
        ctx.save_for_backward(*(arguments[place] for place in op.tensors))
        ctx.others = [None if i in op.tensors else x for i, x in enumerate(arguments)]
        return op.below_autograd(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the op's tensors where they are needed; None for all other arguments."""
        op, arguments = ctx.op, list(ctx.others)
        for place, saved in zip(op.tensors, ctx.saved_tensors, strict=True):
            arguments[place] = saved
        wanted = [i for i in op.tensors if ctx.needs_input_grad[1 + i]]
        with torch.enable_grad():
            # Views, so that the gradients end here even where one saved tensor is made of another.
            for i in wanted:
                arguments[i] = arguments[i].view_as(arguments[i])
            outputs = op.reference(*op._plain(tuple(arguments)))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs], [arguments[i] for i in wanted], [g for _, g in pairs],
            create_graph=torch.is_grad_enabled(), allow_unused=True,
        )  # fmt: skip
        gradients: list[Tensor | None] = [None] * len(arguments)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return None, *gradients
