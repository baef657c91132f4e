"""One run: its folder, and what its stages share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from advkd import device, processes
from advkd.config import Config, ConfigError
from advkd.data import Dataset, find
from advkd.data.registry import default_dataset, for_teacher
from advkd.data.split import RealImages, real_images, with_clusters
from advkd.device import placed
from advkd.evaluation.protocol import images_hash
from advkd.files import read_json, write_json
from advkd.models.student import Student
from advkd.models.unet import UNet
from advkd.pretrained import load_student, load_teacher
from advkd.run.folder import RunFolder


class Run(RunFolder):
    """A run: a folder, a configuration, and the images and networks of its stages."""

    def __init__(self, path: Path, config: Config):
        super().__init__(path, config)
        self.device = device.resolve(config.run.device)
        self._images: RealImages | None = None

    @property
    def has_images(self) -> bool:
        """Whether there are real images: the user's, or those of the run's data set."""
        return bool(self.config.data.path) or self.dataset is not None

    def images(self) -> RealImages | None:
        """Real images, or None where a teacher is distilled without any.

        Raises ConfigError where they are not those that the run began with.
        """
        if self._images is None and self.has_images:
            d = self.config.data
            source = d.path or self.dataset or ""
            found = real_images(source, d.size, d.channels, d.crop)
            self._check_same(found)
            self._images = with_clusters(found, d.clusters) if d.clusters else found
        return self._images

    def _check_same(self, images: RealImages) -> None:
        """Compare with what the run began with; a new run notes what it begins with."""
        ours = {"train": images_hash(images.train), "held_out": images_hash(images.held_out)}
        file = self.path / "data.json"
        if not file.is_file():
            if self.path.is_dir() and processes.is_first():
                write_json(file, ours)
            return
        if read_json(file) != ours:
            raise ConfigError(
                f"{self.path} was made from other images than {images.train.source} holds now; "
                "choose another --name, or --redo teacher to begin anew"
            )

    @property
    def dataset(self) -> Dataset | None:
        """The data set that the run's images or its teacher are of, never one of their shape alone.

        It is the one that `data.path` names, else that of a teacher that ships. A run that names
        neither images nor a teacher is of the default one, if that has the run's shape.
        """
        d, source = self.config.data, self.config.teacher.source
        named = find(d.path) if d.path else None
        if named is not None or source:
            return named or for_teacher(source)
        default = default_dataset()
        return default if not d.path and default.shape == (d.size, d.channels) else None

    def given_teacher(self) -> UNet:
        """The teacher that the configuration names, at the size of the run's images."""
        settings = self.config.teacher
        unet = load_teacher(settings.source, settings.scheduler or None)
        if unet.config.sample_size is None:
            unet.config = dataclasses.replace(unet.config, sample_size=self.config.data.size)
        return unet

    def teacher(self) -> UNet:
        """The run's own copy of the teacher, on the run's device."""
        return placed(self.stored_teacher(), self.device)

    def stored_teacher(self) -> UNet:
        """The same on the CPU, for what does not run it."""
        return load_teacher(self.path / "teacher")

    def student(self) -> Student:
        """The run's student, on the run's device."""
        return placed(self.stored_student(), self.device)

    def stored_student(self) -> Student:
        """The same on the CPU, for what does not run it."""
        return load_student(self.path / "student")
