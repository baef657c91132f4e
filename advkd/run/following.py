"""What one sees of a training while it runs: `preview.png` in the run's folder, and a tracker.

The images grow from the same noise each time. They are sampled between two steps, by noise of their
own, so a training is the same bits with and without them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from advkd.config import Config
from advkd.engine.eager import EagerEngine
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import table_of
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.report.pictures import grid_sheet, save_png, strips_of, tile_grid
from advkd.run.trackers import Tracker, open_tracker

PREVIEW = "preview.png"
COLUMNS, STRIPS = 4, 4  # of a preview's grid, and images whose heads are shown
LARGE = 128  # pixels of a side from which on a preview has a quarter of the images
SAMPLER_STEPS = 20  # of DDIM, for a teacher's preview
SHARE = 0.01  # of the training's time that previews may take
LEAST_SECONDS = 10.0  # between two previews
SEED = 0  # with the evaluation's noise: the images are those of the report's pictures


class Following:
    """Follows one stage's training, within `with`; see `advkd.training.loop.Follower`.

    What fails here ends the following with a warning, never the training.
    """

    def __init__(self, folder: Path, stage: str, config: Config, size: int):
        """`size`: pixels of a side, for a teacher whose configuration names none."""
        self.folder, self.stage, self.config, self.size = folder, stage, config, size
        self._tracker: Tracker | None = None
        self._begun = self._ended = False
        self._next = time.monotonic()  # when the next preview may be made

    def __enter__(self) -> Following:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._safely(tracker.close)

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values of a line of metrics.jsonl on to the tracker."""
        if self.config.run.log == "none":
            return
        self._safely(lambda: self._track(step, lambda tracker: tracker.numbers(step, values)))

    def stepped(self, step: int, steps: int, network: Student | UNet) -> None:
        """Make a preview of a training's averaged network, where one is due after `step`."""
        every = self.config.run.preview_every
        if not every or self._ended:
            return
        due = step % every == 0 and time.monotonic() >= self._next
        if due or step == steps:
            self._safely(lambda: self._show(step, steps, network))

    def _show(self, step: int, steps: int, network: Student | UNet) -> None:
        began = time.monotonic()
        sheet = preview(network, f"{self.stage}, step {step:,} of {steps:,}", self.size)
        save_png(self.folder / PREVIEW, sheet)
        self._track(step, lambda tracker: tracker.picture(step, sheet))
        now = time.monotonic()
        self._next = now + max(LEAST_SECONDS, (now - began) * (1 / SHARE - 1))

    def _track(self, step: int, act: Callable[[Tracker], None]) -> None:
        if not self._begun:
            self._begun = True
            self._tracker = open_tracker(self.folder, self.stage, step, self.config)
        if self._tracker is not None:
            act(self._tracker)

    def _safely(self, act: Callable[[], None]) -> None:
        if self._ended:
            return
        try:
            act()
        except Exception as error:  # of a full disk, or of whatever a tracker's library does
            self._ended, self._tracker = True, None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"previews and tracking of stage {self.stage} end here, metrics.jsonl goes on: "
                f"{reason}",
                stacklevel=2,
            )


@torch.inference_mode()
def preview(network: Student | UNet, heading: str, size: int) -> np.ndarray:
    """A sheet of images that a network makes now, uint8 (H, W, 3); a student's with the images of
    its heads beside them. Classes, where there are any, follow each other.

    By torch's modules: they read the weights where they are, so for a network that changes at every
    step nothing is copied, and on a GPU nothing captured.
    """
    rows = COLUMNS if size < LARGE else 1
    numbers = torch.arange(rows * COLUMNS, device="cpu")
    y = None if network.num_classes is None else numbers % network.num_classes
    noise = Noise(SEED, Purpose.EVALUATION)
    if isinstance(network, UNet):
        samples = _sampled(network, noise, numbers, y, size)
        return grid_sheet({heading: tile_grid(samples, COLUMNS)})
    place = next(network.parameters()).device
    x_T = noise.x_T(numbers.to(place), (network.channels, network.size, network.size))
    heads = [_shown(x) for x in network.states(x_T, None if y is None else y.to(place))]
    strips = np.concatenate(strips_of([x[:STRIPS] for x in heads]))
    return grid_sheet({heading: tile_grid(heads[-1], COLUMNS), f"heads 1 to {len(heads)}": strips})


def _sampled(unet: UNet, noise: Noise, numbers: Tensor, y: Tensor | None, size: int) -> Tensor:
    """Images of a teacher by DDIM."""
    steps = min(SAMPLER_STEPS, unet.schedule.num_train_timesteps)
    table = table_of(unet.schedule, "ddim", steps, 0.0)
    engine = EagerEngine(unet, (size, size))
    return _shown(engine.sample(table, noise, numbers, y, saved=[len(table)])[:, 0])


def _shown(images: Tensor) -> Tensor:
    """Images on the CPU; what overflows in a network that has learned little yet is black."""
    return images.float().cpu().nan_to_num(nan=-1.0)
