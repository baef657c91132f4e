"""The eager engine: a network by its own torch modules, on any device; the loop is Python's.

It serves every network, so it is what the other engines fall back to and are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from advkd import ops
from advkd.diffusion import StepTable
from advkd.engine.interface import (
    Engine,
    Item,
    OnStep,
    Result,
    check_labels,
    check_out,
    check_saved,
    input_shape,
)
from advkd.engine.noise import Noise
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.parallel import Workers


def general_step(
    table: StepTable, i: int, x_t: Tensor, model_out: Tensor, variance: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Step i of any table: (x_prev, x0_hat), both (B, C, H, W) as x_t, the network's prediction,
    the variance behind it and the noise z; see `StepTable`."""
    a_x, a_m, c_0, c_x, c_m, sigma = table.coefficients[i].tolist()
    x0_hat = a_x * x_t + a_m * model_out
    if table.clip > 0:
        x0_hat = x0_hat.clamp(-table.clip, table.clip)
    if table.threshold is not None:
        ratio, most = table.threshold
        magnitudes = x0_hat.abs().flatten(1)
        # One by one, because torch.quantile takes 16 million numbers at most.
        bounds = [torch.quantile(image, ratio) for image in magnitudes]
        s = torch.stack(bounds).clamp(1.0, most)[:, None, None, None]
        x0_hat = x0_hat.clamp(-s, s) / s
    x_prev = c_0 * x0_hat + c_x * x_t + c_m * model_out
    if sigma == 0:
        return x_prev, x0_hat
    if table.log_variances is None:
        return x_prev + sigma * z, x0_hat
    low, high = table.log_variances[i].tolist()
    log_variance = low + (variance + 1) / 2 * (high - low)
    return x_prev + (0.5 * log_variance).exp() * z, x0_hat


class EagerEngine(Engine):
    """A network as it is: what patches or hooks it, and whatever dtype it has, takes effect.

    On the CPU an image's last bits depend on the batch it is sampled in.
    """

    reads_in_place = True
    name = "eager"

    def __init__(self, model: UNet | Student, size: tuple[int, int], exit_at: int | None = None):
        self.model, self.exit_at = model, exit_at
        self.shape = input_shape(model, size)
        self.classes = model.num_classes
        if isinstance(model, Student):
            model.depth_of(exit_at)
        else:
            self.schedule = model.schedule

    @classmethod
    def unavailable(cls, model: UNet | Student) -> str | None:
        """None: it serves every network."""
        return None

    @classmethod
    def batch_for(cls, images: int) -> int:
        """1: it is not made for a batch size."""
        return 1

    @classmethod
    def make(
        cls, model: UNet | Student, size: tuple[int, int], batch: int, exit_at: int | None
    ) -> EagerEngine:
        """See `Engine.make`; any batch size will do."""
        return cls(model, size, exit_at)

    @property
    def device(self) -> torch.device:
        """Where the network lies now."""
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def run(
        self, x: Tensor, y: Tensor | None = None, *, t: int | None = None, threads: int = 0
    ) -> Tensor:
        """See `Engine.run`; on the network's device. `threads` are torch's own."""
        if x.dim() != 4 or x.shape[1:] != self.shape:
            raise ValueError(f"x {tuple(x.shape)} is not (B, {', '.join(map(str, self.shape))})")
        check_labels(y, len(x), self.classes)
        weight = next(self.model.parameters())
        x = x.to(weight.device, weight.dtype)
        y = None if y is None else y.to(weight.device)
        if isinstance(self.model, Student):
            if t is not None:
                raise ValueError("a student takes no time t")
            image: Tensor = self.model(x, y, self.exit_at)
            return image.float()
        if t is None:
            raise ValueError("a teacher needs a time t")
        return self._prediction(x, t, y)[0]

    def _prediction(self, x: Tensor, t: int, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """A teacher's prediction in float32, and the variance behind it, of no channels if none."""
        weight, C = next(self.model.parameters()), self.shape[0]
        y = None if y is None else y.to(weight.device)
        whole = self.model(x.to(weight.dtype), t, y).float()
        return whole[:, :C], whole[:, C:]

    @torch.inference_mode()
    def sample(
        self,
        table: StepTable,
        noise: Noise,
        indices: Tensor,
        y: Tensor | None = None,
        *,
        saved: Sequence[int],
        target: str = "denoised",
        out: Tensor | None = None,
        threads: int = 0,
        on_step: OnStep | None = None,
        poll: Callable[[], object] | None = None,
    ) -> Tensor:
        """See `Engine.sample`: one batch, by the reference of the C++ and CUDA loops."""
        N = len(table)
        check_saved(N, saved, target)
        check_out(out, len(indices), len(saved), self.shape)
        check_labels(y, len(indices), self.classes)
        indices = indices.to(self.device)
        x_t = noise.x_T(indices, self.shape)
        targets = []
        for i, t in enumerate(table.timesteps.tolist()):
            model_out, variance = self._prediction(x_t, t, y)
            if table.is_plain:
                x_t, x0_hat = ops.sampling_step(
                    x_t,
                    model_out,
                    table.coefficients[i],
                    clip=table.clip,
                    seed=noise.seed,
                    image_index=indices,
                    step=noise.step_word(i),
                )
            else:
                z = ops.philox_normal(noise.seed, indices, noise.step_word(i), self.shape)
                x_t, x0_hat = general_step(table, i, x_t, model_out, variance, z)
            if i + 1 in saved:
                targets.append(x0_hat if target == "denoised" and i + 1 < N else x_t)
            if poll is not None:
                poll()
            if on_step is not None:
                on_step(i + 1, N)
        result = torch.stack(targets, dim=1)
        return result if out is None else out.copy_(result)

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], threads: int = 0
    ) -> Iterator[Result]:
        """Apply `function` to batches, in order; on the CPU one thread takes each, several at once,
        so that an image has the same bits whatever their number."""
        with Workers(threads, self.device) as workers:
            yield from workers.map(function, items)
