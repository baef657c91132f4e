"""What `advkd sample` does by torch: a network on its device, its labels and its images."""

from __future__ import annotations

import argparse
import contextlib

import numpy as np
import torch

from advkd.cli import place_of, use_threads
from advkd.console import StopSignals, progress_bar
from advkd.deploy import prepared
from advkd.deploy.model_file import model_bytes
from advkd.device import placed
from advkd.engine.interface import input_shape
from advkd.engine.lowering import LoweringError
from advkd.engine.noise import Noise, Purpose
from advkd.engine.sampling import generate
from advkd.models.student import Student
from advkd.pretrained import load_student, load_teacher


class SampledNetwork:
    """The teacher or the student that the options of `advkd sample` name."""

    def __init__(self, args: argparse.Namespace):
        """Load it to its device; raises what that raises, and ValueError for options."""
        place = place_of(args)
        use_threads(args.threads)
        self._source = args.student
        self._key = None if args.teacher else prepared.key_of(args.student)
        network = (
            load_teacher(args.teacher, args.scheduler)
            if args.teacher
            else load_student(args.student)
        )
        self._network = placed(network, *place)
        size = None if args.size is None else (args.size, args.size)
        self.channels = input_shape(self._network, size)[0]
        self.num_classes = self._network.num_classes
        self.class_names = self._network.class_names

    def labels(self, num: int, seed: int, first: int) -> np.ndarray:
        """The labels (num,) int64 of images number `first` and later; num_classes is not None."""
        labels = Noise(seed, Purpose.SAMPLING).labels(
            torch.arange(first, first + num), self.num_classes
        )
        assert labels is not None
        return labels.numpy()

    def images(self, args: argparse.Namespace, y: np.ndarray | None) -> np.ndarray:
        """The images that the options ask for, (N, C, H, W) float32 in [-1, 1]; Ctrl-C ends it at
        the next network pass."""
        with StopSignals() as stop, progress_bar("sample", 0, unit="pass") as bar:

            def report(done: int, total: int) -> None:
                if stop.requested:
                    raise KeyboardInterrupt
                bar.total = total
                bar.update(done - bar.n)

            images = generate(
                self._network,
                args.num,
                args.seed,
                args.steps,
                eta=args.eta or 0.0,
                sampler=args.sampler or "ddim",
                y=None if y is None else torch.from_numpy(y),
                exit_at=args.exit_at,
                size=args.size,
                first=args.first,
                callback=report,
            )
        return images.numpy()

    def prepare(self) -> None:
        """Keep a student for a start without torch, unless its files changed since it was read."""
        network = self._network
        if self._key is None or not isinstance(network, Student) or not _is_on_cpu(network):
            return
        with contextlib.suppress(LoweringError):
            content = model_bytes(network)
            if prepared.key_of(self._source) == self._key:
                prepared.keep(self._key, content)


def _is_on_cpu(network: Student) -> bool:
    return all(tensor.is_cpu for tensor in network.parameters())
