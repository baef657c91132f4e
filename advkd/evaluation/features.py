"""The features that images are compared by: a small convolutional network, fitted once and frozen.

Its last hidden layer sees what is shown, its earlier layers the texture.

Nothing in this package may be used in training: what evaluates must not teach. The network that
ships was fitted before the first student (`advkd/zoo/fashion-mnist-features/`). Figures by these
features are no Inception figures: compare them only with each other, under one protocol.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from advkd.config import MAX_CLASSES, MAX_SIDE
from advkd.data.source import ImageSet
from advkd.device import placed
from advkd.files import (
    CheckpointError,
    load_strictly,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

FEATURES = 64
_FORMAT = "advkd-features"
_CONFIG_TYPES: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "channels": (int,),
    "size": (int,),
    "num_classes": (int, type(None)),
    "decodes": (bool,),
    "record": (dict,),
    "sha256": (str,),
}
_RECONSTRUCTION = 10.0  # weight of the squared error beside the cross-entropy
_CODE_CHANNELS = 12  # channels of the map that is flattened into the features
_MAX_CHANNELS = 64  # of an image
# Stated for every layer, since the program around may have set other defaults.
_PLACE: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    # Batch norm is a fixed affine map in evaluation. Group norm would divide every image by its
    # own contrast, and so give washed-out samples the features of crisp ones.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False, **_PLACE),
        nn.BatchNorm2d(outputs, **_PLACE),
        nn.ReLU(),
    )


class Output(NamedTuple):
    """What a `FeatureNet` gives: features (B, 64), logits (B, num_classes) and the images again
    (B, C, H, W); None where it has no classes, or does not decode."""

    features: torch.Tensor
    logits: torch.Tensor | None
    images: torch.Tensor | None


class FeatureNet(nn.Module):
    """A small convolutional network whose last hidden layer gives 64 features.

    With `num_classes` it is a classifier; where it `decodes` (always without classes) it is an
    autoencoder with a 64-d bottleneck, or both. channels, size: of the square images it reads
    (float32, on the CPU until moved); size at least 8. record: how it was fitted (JSON-able),
    stored in its config.json.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        num_classes: int | None = None,
        decodes: bool | None = None,
    ) -> None:
        super().__init__()
        _check_shape(channels, size, num_classes)
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.decodes = num_classes is None if decodes is None else decodes
        if num_classes is None and not self.decodes:
            raise ValueError("a feature network without classes has to decode")
        self.record: dict[str, Any] = {}
        sizes = [size]
        while sizes[-1] > 8:
            sizes.append((sizes[-1] + 1) // 2)
        # Only the two smallest maps get more channels: they cost least.
        widths = ([24] * len(sizes) + [48, 64])[-len(sizes) :]
        stages = [_block(channels, widths[0])]
        for inputs, outputs in pairwise(widths):
            stages += [_block(inputs, outputs, stride=2), _block(outputs, outputs)]
        self.encoder = nn.Sequential(*stages, nn.Conv2d(widths[-1], _CODE_CHANNELS, 1, **_PLACE))
        self.code = (_CODE_CHANNELS, sizes[-1], sizes[-1])
        self.to_features = nn.Linear(math.prod(self.code), FEATURES, **_PLACE)
        if num_classes is not None:
            self.classify = nn.Linear(FEATURES, num_classes, **_PLACE)
        if self.decodes:
            self.from_features = nn.Linear(FEATURES, math.prod(self.code), **_PLACE)
            ups = [_block(_CODE_CHANNELS, 24)]
            for target in reversed(sizes[:-1]):
                ups += [nn.Sequential(nn.Upsample(size=(target, target)), _block(24, 24))]
            self.decoder = nn.Sequential(*ups, nn.Conv2d(24, channels, 3, padding=1, **_PLACE))

    @property
    def kind(self) -> str:
        """What sort of network it is, in words."""
        if self.num_classes is None:
            return "a small autoencoder"
        return "a small classifier and autoencoder" if self.decodes else "a small classifier"

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes it tells apart; None where it has none, or they have no names."""
        names = self.record.get("classes")
        if not isinstance(names, list) or len(names) != self.num_classes:
            return None
        return tuple(names) if all(isinstance(name, str) for name in names) else None

    def forward(self, x: torch.Tensor) -> Output:
        """x: float32 (B, C, H, W) in [-1, 1]."""
        features, logits = self._heads(self.encoder(self._checked(x)))
        images = None
        if self.decodes:
            images = self.decoder(self.from_features(features).unflatten(1, self.code))
        return Output(features, logits, images)

    def _heads(self, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = self.to_features(F.relu(code).flatten(1))
        return features, None if self.num_classes is None else self.classify(F.relu(features))

    def _checked(self, x: torch.Tensor) -> torch.Tensor:
        expected = (self.channels, self.size, self.size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"these features are for images of (C, H, W) = {expected}, not for a batch of "
                f"shape {tuple(x.shape)}"
            )
        return x

    def look(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x as in `forward` -> features (B, 64), texture (B, D), logits or None.

        The texture are the mean and the deviation, over an image, of every channel of every layer
        before the features, fine scales first.
        """
        maps, h = [], self._checked(x)
        for layer in self.encoder:
            h = layer(h)
            maps.append(h)
        pooled = [part for h in maps[:-1] for part in (h.mean((2, 3)), h.std((2, 3)))]
        features, logits = self._heads(h)
        return features, torch.cat(pooled, 1), logits


def _check_shape(channels: int, size: int, num_classes: int | None) -> None:
    """ValueError unless such a network can be made, and is none that fills the memory."""
    fits = 1 <= channels <= _MAX_CHANNELS and 8 <= size <= MAX_SIDE
    if not fits or not (num_classes is None or 2 <= num_classes <= MAX_CLASSES):
        raise ValueError(
            f"a feature network needs channels of 1 to {_MAX_CHANNELS}, size of 8 to {MAX_SIDE} "
            f"and no classes or 2 to {MAX_CLASSES}; got channels={channels}, size={size}, "
            f"num_classes={num_classes}"
        )


@dataclass(frozen=True)
class Features:
    """Features of N images.

    values: (N, 64) float64. texture: (N, D) float64, of the earlier layers. classes: (N,) int64
    most probable classes, None without classes. num_classes: how many the network knows, or None.
    """

    values: np.ndarray
    texture: np.ndarray
    classes: np.ndarray | None
    num_classes: int | None


def extract(net: FeatureNet, images: ImageSet | torch.Tensor, batch: int = 256) -> Features:
    """Features of images: an `ImageSet` or float32 (N, C, H, W) in [-1, 1].

    The network runs in its own precision, also under autocast. Raises ValueError where it is for
    other images or a feature is not finite.
    """
    if len(images) == 0:  # shaped as those of any others
        one = extract(net, torch.zeros(1, net.channels, net.size, net.size, **_PLACE))
        no_classes = None if one.classes is None else one.classes[:0]
        return Features(one.values[:0], one.texture[:0], no_classes, net.num_classes)
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    values, texture, classes = [], [], []
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for start in range(0, len(images), batch):
            rows = np.arange(start, min(start + batch, len(images)))
            features, pooled, logits = net.look(rows_of(images, rows).to(device))
            values.append(features.double().cpu().numpy())
            texture.append(pooled.double().cpu().numpy())
            if logits is not None:
                classes.append(logits.argmax(1).cpu().numpy())
    net.train(was_training)
    all_values, all_texture = np.concatenate(values), np.concatenate(texture)
    finite = np.isfinite(all_values).all(1) & np.isfinite(all_texture).all(1)
    if not finite.all():
        worst = int(np.flatnonzero(~finite)[0])
        raise ValueError(f"the features of image {worst} are not finite")
    found = np.concatenate(classes) if classes else None
    return Features(all_values, all_texture, found, net.num_classes)


def rows_of(images: ImageSet | torch.Tensor, indices: np.ndarray) -> torch.Tensor:
    """These images as float32 (B, C, H, W) in [-1, 1]."""
    if isinstance(images, ImageSet):
        return images.batch(indices)
    return images[torch.from_numpy(indices).to(images.device)].float()


def class_shares(features: Features) -> np.ndarray | None:
    """The share of each class, float64 (num_classes,) that sums to 1; None without classes."""
    if features.classes is None or features.num_classes is None:
        return None
    counts = np.bincount(features.classes, minlength=features.num_classes)
    return counts / max(1, len(features.classes))


def accuracy(net: FeatureNet, images: ImageSet) -> float:
    """The share of labelled images that a classifier gets right. ValueError without labels."""
    found = extract(net, images).classes
    if found is None or images.labels is None:
        raise ValueError(f"accuracy needs a classifier and labels; {images.source} has none")
    return float((found == images.labels).mean())


@torch.inference_mode()
def reconstruction_error(net: FeatureNet, images: ImageSet, batch: int = 256) -> float:
    """An autoencoder's mean squared error per pixel value, images in [-1, 1]."""
    total = 0.0
    for start in range(0, len(images), batch):
        x = images.batch(np.arange(start, min(start + batch, len(images))))
        again = net(x).images
        if again is None:
            raise ValueError("a classifier that does not decode has no reconstruction error")
        total += float((again - x).square().mean((1, 2, 3)).double().sum())
    return total / len(images)


@dataclass(frozen=True)
class FitSettings:
    """How a `FeatureNet` is fitted.

    AdamW with warm-up and a cosine; images are mirrored at random (`flip`: wrong for letters and
    digits, so it has to follow `data.flip` of a run) and moved by up to `shift` pixels.
    """

    steps: int = 1200
    seed: int = 0
    batch_size: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    flip: bool = True
    shift: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 2 or self.shift < 0:
            raise ValueError(
                f"fitting needs steps >= 1, batch_size >= 2 and shift >= 0; got "
                f"steps={self.steps}, batch_size={self.batch_size}, shift={self.shift}"
            )


def fit_features(
    images: ImageSet,
    *,
    settings: FitSettings | None = None,
    held_out: ImageSet | None = None,
    progress: Callable[[int, float], None] | None = None,
    device: torch.device | None = None,
) -> FeatureNet:
    """Fit a `FeatureNet`: an autoencoder, and a classifier too where images have 2 labels or more.

    Labels alone would not do: what tells few classes apart can be blind to everything else.

    held_out: labeled images whose accuracy goes into the record; they are not fitted to.
    progress: called with (step, loss) after every step. The global random state is left alone;
    the same arguments, machine and thread count give the same weights.
    device: where it is fitted, and where it lies afterwards; None for the CPU.
    Raises ValueError where the loss stops being finite.
    """
    settings = settings or FitSettings()
    num_classes = images.num_classes if images.num_classes != 1 else None
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # the CPU's alone
        net = FeatureNet(images.channels, images.size, num_classes, decodes=True)
        net = net if device is None else placed(net, device)
        _fit(net, images, settings, progress)
    net.record = {
        "data": images.source,
        "images": len(images),
        **asdict(settings),
        "threads": torch.get_num_threads(),
    }
    if images.classes is not None and num_classes is not None:
        net.record["classes"] = list(images.classes)
    if held_out is not None and num_classes is not None:
        net.record["held_out"] = held_out.source
        net.record["held_out_images"] = len(held_out)
        net.record["held_out_accuracy"] = accuracy(net, held_out)
    return net


def _fit(
    net: FeatureNet,
    images: ImageSet,
    settings: FitSettings,
    progress: Callable[[int, float], None] | None,
) -> None:
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=settings.weight_decay)
    rng = np.random.Generator(np.random.PCG64(settings.seed))
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        loss = _fit_loss(net, images, settings, rng)
        if not math.isfinite(float(loss.detach())):
            raise ValueError(f"the loss of step {step} is not finite; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step, float(loss.detach()))
    net.eval()


def _learning_rate(settings: FitSettings, step: int) -> float:
    rise = min(1.0, (step + 1) / max(1, settings.steps // 20))
    return settings.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def _fit_loss(
    net: FeatureNet, images: ImageSet, settings: FitSettings, rng: np.random.Generator
) -> torch.Tensor:
    """The loss of one random batch: squared error and, where there are classes, cross-entropy."""
    chosen = rng.integers(0, len(images), settings.batch_size)
    mirrored = rng.random(settings.batch_size) < 0.5 if settings.flip else None
    offsets = rng.integers(0, 2 * settings.shift + 1, (2, settings.batch_size))
    device = next(net.parameters()).device
    x = _shifted(images.batch(chosen, mirrored), offsets, settings.shift).to(device)
    output = net(x.contiguous(memory_format=torch.channels_last))
    loss = x.new_zeros(())
    if output.images is not None:
        loss = loss + F.mse_loss(output.images, x)
    if output.logits is not None and images.labels is not None:
        labels = torch.from_numpy(images.labels[chosen]).to(device)
        loss = _RECONSTRUCTION * loss + F.cross_entropy(output.logits, labels)
    return loss


def _shifted(x: torch.Tensor, offsets: np.ndarray, shift: int) -> torch.Tensor:
    """x (B, C, H, W), each image moved by its own offset (2, B) - `shift`, its edges repeated."""
    size = x.shape[2]
    padded = F.pad(x, (shift, shift, shift, shift), mode="replicate")
    top, left = torch.from_numpy(offsets)
    span = torch.arange(size)
    rows = (top[:, None] + span)[:, :, None]  # (B, H, 1)
    columns = (left[:, None] + span)[:, None, :]  # (B, 1, W)
    batch = torch.arange(len(x))[:, None, None]
    return padded[batch, :, rows, columns].permute(0, 3, 1, 2)


def save_features(net: FeatureNet, folder: str | Path) -> None:
    """Write `model.safetensors` (float32) and then `config.json` into `folder`."""
    folder = Path(folder)
    config = {
        "format": _FORMAT,
        "channels": net.channels,
        "size": net.size,
        "num_classes": net.num_classes,
        "decodes": net.decodes,
        "record": net.record,
        "sha256": write_tensors(folder / "model.safetensors", net.state_dict()),
    }
    write_json(folder / "config.json", config)


def load_features(folder: str | Path) -> FeatureNet:
    """The `FeatureNet` of a folder written by `save_features`.

    Raises CheckpointError where a file is missing or damaged, where config and weights do not fit
    each other exactly, or where a weight is not finite.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = read_json(path)
    if isinstance(config, dict):  # versions before 0.3 fitted no network that did both
        config.setdefault("decodes", config.get("num_classes") is None)
    _check_config(config, path)
    try:
        net = FeatureNet(
            config["channels"], config["size"], config["num_classes"], config["decodes"]
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error!s:.300}") from None
    net.record = config["record"]
    weights = folder / "model.safetensors"
    load_strictly(net, read_tensors(weights, config["sha256"]), weights)
    for name, tensor in net.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{weights}: {name} holds values that are not finite")
    return net.eval()


def _check_config(config: Any, path: Path) -> None:
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise CheckpointError(f"{path} does not describe features (format {_FORMAT!r})")
    if set(config) != set(_CONFIG_TYPES):
        unknown = ", ".join(sorted(set(config) - set(_CONFIG_TYPES))) or "none"
        missing = ", ".join(sorted(set(_CONFIG_TYPES) - set(config))) or "none"
        raise CheckpointError(f"{path} has unknown keys: {unknown:.200}; missing keys: {missing}")
    for key, types in _CONFIG_TYPES.items():
        if type(config[key]) not in types:
            names = " or ".join(kind.__name__ for kind in types)
            raise CheckpointError(f"{path}: {key}={config[key]!r:.60} is no {names}")
