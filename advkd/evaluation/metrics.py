"""How generated images are judged: features of a small network, and distances on them.

Fréchet distance (FD, Heusel et al. 2017), kernel distance (KID, Binkowski et al. 2018) and
precision/recall (Kynkäänniemi et al. 2019) compare the 64 features of a `FeatureNet`; the sliced
Wasserstein distance (Rabin et al. 2011) compares pixels and is a second opinion that no network
can bias. Statistics are float64 throughout, and deterministic.

Nothing in this file may be used in training: what judges must not teach. The shipped network
was fitted before the first student and is frozen (`advkd/zoo/fashion-mnist-features/`). Its
figures are no Inception figures: compare them only with each other, under one protocol.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from scipy.spatial.distance import cdist
from torch import nn
from torch.nn import functional as F

from advkd.data.images import ImageSet
from advkd.files import (
    CheckpointError,
    load_strictly,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

SHIPPED_FEATURES = Path(__file__).parents[1] / "zoo" / "fashion-mnist-features"
FEATURES = 64
_FORMAT = "advkd-features"
_CONFIG_TYPES: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "channels": (int,),
    "size": (int,),
    "num_classes": (int, type(None)),
    "record": (dict,),
    "sha256": (str,),
}
_CODE_CHANNELS = 12  # channels of the map that is flattened into the features
_ROWS = 1024  # rows of a distance matrix that are held at once


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    # Batch norm is a fixed affine map when judging. Group norm would divide every image by its
    # own contrast and so hide washed-out samples from the judge.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class FeatureNet(nn.Module):
    """A small convolutional network whose last hidden layer gives 64 features.

    With `num_classes` it is a classifier, without an autoencoder with a 64-d bottleneck.
    channels, size: of the square images it reads; size at least 8.
    record: how it was fitted (JSON-able), kept in its config.json.
    """

    def __init__(self, channels: int, size: int, num_classes: int | None = None) -> None:
        super().__init__()
        if channels < 1 or size < 8 or (num_classes is not None and num_classes < 2):
            raise ValueError(
                f"a feature network needs channels >= 1, size >= 8 and at least 2 classes or none; "
                f"got channels={channels}, size={size}, num_classes={num_classes}"
            )
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.record: dict[str, Any] = {}
        sizes = [size]
        while sizes[-1] > 8:
            sizes.append((sizes[-1] + 1) // 2)
        # Only the two smallest maps get more channels: they cost least.
        widths = ([24] * len(sizes) + [48, 64])[-len(sizes) :]
        stages = [_block(channels, widths[0])]
        for inputs, outputs in pairwise(widths):
            stages += [_block(inputs, outputs, stride=2), _block(outputs, outputs)]
        self.encoder = nn.Sequential(*stages, nn.Conv2d(widths[-1], _CODE_CHANNELS, 1))
        self.code = (_CODE_CHANNELS, sizes[-1], sizes[-1])
        self.to_features = nn.Linear(math.prod(self.code), FEATURES)
        if num_classes is not None:
            self.classify = nn.Linear(FEATURES, num_classes)
        else:
            self.from_features = nn.Linear(FEATURES, math.prod(self.code))
            ups = [_block(_CODE_CHANNELS, 24)]
            for target in reversed(sizes[:-1]):
                ups += [nn.Sequential(nn.Upsample(size=(target, target)), _block(24, 24))]
            self.decoder = nn.Sequential(*ups, nn.Conv2d(24, channels, 3, padding=1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: float32 (B, C, H, W) in [-1, 1] -> features (B, 64), output.

        The output is logits (B, num_classes), or for an autoencoder the images again (B, C, H, W).
        """
        expected = (self.channels, self.size, self.size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(
                f"these features are for images of (C, H, W) = {expected}, not for a batch of "
                f"shape {tuple(x.shape)}"
            )
        features = self.to_features(F.relu(self.encoder(x)).flatten(1))
        if self.num_classes is not None:
            return features, self.classify(F.relu(features))
        return features, self.decoder(self.from_features(features).unflatten(1, self.code))


@dataclass(frozen=True)
class Features:
    """What a `FeatureNet` says of N images.

    values: (N, 64) float64. classes: (N,) int64 most probable classes, None from an autoencoder.
    num_classes: how many classes the network knows, None from an autoencoder.
    """

    values: np.ndarray
    classes: np.ndarray | None
    num_classes: int | None


@dataclass(frozen=True)
class Judged:
    """A set of images with its features: one side of a comparison. `images` None: no SWD."""

    features: Features
    images: ImageSet | torch.Tensor | None


def extract(net: FeatureNet, images: ImageSet | torch.Tensor, batch: int = 256) -> Features:
    """Features of images: an `ImageSet` or float32 (N, C, H, W) in [-1, 1].

    Raises ValueError where the network is for other images or a feature is not finite.
    """
    was_training = net.training
    net.eval()
    device = next(net.parameters()).device
    values = np.full((len(images), FEATURES), np.nan)
    classes = None if net.num_classes is None else np.zeros(len(images), np.int64)
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            stop = min(start + batch, len(images))
            features, output = net(_rows(images, np.arange(start, stop)).to(device))
            values[start:stop] = features.double().cpu().numpy()
            if classes is not None:
                classes[start:stop] = output.argmax(1).cpu().numpy()
    net.train(was_training)
    if not np.isfinite(values).all():
        worst = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        raise ValueError(f"the features of image {worst} are not finite")
    return Features(values, classes, net.num_classes)


def _rows(images: ImageSet | torch.Tensor, indices: np.ndarray) -> torch.Tensor:
    if isinstance(images, ImageSet):
        return images.batch(indices)
    return images[torch.from_numpy(indices)].float()


def judge(reference: Judged, candidate: Judged) -> dict[str, Any]:
    """All figures of `candidate` against `reference`, ready for JSON.

    Keys: fd, kid, precision, recall, swd (None where either side has no images), classes (the
    candidate's class shares, None from an autoencoder).
    """
    real, fake = reference.features.values, candidate.features.values
    precision, recall = precision_recall(real, fake)
    swd = None
    if reference.images is not None and candidate.images is not None:
        swd = sliced_wasserstein(reference.images, candidate.images)
    shares = class_histogram(candidate.features)
    return {
        "fd": frechet_distance(real, fake),
        "kid": kernel_distance(real, fake),
        "precision": precision,
        "recall": recall,
        "swd": swd,
        "classes": None if shares is None else shares.tolist(),
    }


def _checked(a: np.ndarray, b: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shapes {a.shape} and {b.shape} cannot be compared")
    if min(len(a), len(b)) < least:
        raise ValueError(f"{min(len(a), len(b))} samples are too few; at least {least} are needed")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("the features hold values that are not finite")
    return a, b


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features a (N, D) and b (M, D); 0 is best.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) with unbiased covariances
    (Heusel et al. 2017, eq. 6). At least 2 samples each.
    """
    a, b = _checked(a, b, least=2)
    # With S = R^T R, tr (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b^T. R comes
    # from the samples by QR: no root of an eigenvalue is taken, so singular covariances (fewer
    # samples than features, dead features) lose no digits.
    mean_a, mean_b = a.mean(0), b.mean(0)
    (root_a,) = scipy.linalg.qr((a - mean_a) / math.sqrt(len(a) - 1), mode="r")
    (root_b,) = scipy.linalg.qr((b - mean_b) / math.sqrt(len(b) - 1), mode="r")
    rows = a.shape[1]  # below these R is zero
    root_a, root_b = root_a[:rows], root_b[:rows]
    cross = scipy.linalg.svdvals(root_a @ root_b.T).sum()
    spread = (root_a**2).sum() + (root_b**2).sum() - 2 * cross
    return max(0.0, float(((mean_a - mean_b) ** 2).sum() + spread))


def kernel_distance(
    a: np.ndarray, b: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> float:
    """Kernel distance (KID): unbiased MMD^2 with the kernel (x.y / D + 1)^3; may be below 0.

    a (N, D) and b (M, D); the mean over `subsets` random subsets of at most `subset_size` of each
    (Binkowski et al. 2018), drawn from `seed`. At least 2 samples each.
    """
    a, b = _checked(a, b, least=2)
    count = min(len(a), len(b), subset_size)
    draw = np.random.Generator(np.random.PCG64(seed))
    total = 0.0
    for _ in range(subsets):
        x = a[draw.choice(len(a), count, replace=False)]
        y = b[draw.choice(len(b), count, replace=False)]
        within = _cubic(x, x, diagonal=False) + _cubic(y, y, diagonal=False)
        total += within / (count * (count - 1)) - 2 * _cubic(x, y, diagonal=True) / count**2
    return total / subsets


def _cubic(x: np.ndarray, y: np.ndarray, *, diagonal: bool) -> float:
    """The sum of (x_i.y_j / D + 1)^3 over all pairs, or over those with i != j."""
    kernel = x @ y.T / x.shape[1] + 1.0
    kernel = kernel * kernel * kernel
    return float(kernel.sum() if diagonal else kernel.sum() - np.trace(kernel))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), both in [0, 1], 1 is best.

    real (N, D), fake (M, D). Precision is the share of fakes that lie no farther from some real
    than that one's k-th nearest other real; recall the same with the roles swapped. More than k
    samples each.
    """
    real, fake = _checked(real, fake, least=k + 1)
    return _covered(real, fake, k), _covered(fake, real, k)


def _covered(centres: np.ndarray, points: np.ndarray, k: int) -> float:
    """The share of `points` inside the union of balls around `centres`."""
    inside = np.zeros(len(points), bool)
    for start in range(0, len(centres), _ROWS):
        rows = centres[start : start + _ROWS]
        # Column 0 of the sorted distances is the centre itself.
        radii = np.partition(cdist(rows, centres), k, axis=1)[:, k]
        inside |= (cdist(rows, points) <= radii[:, None]).any(0)
    return float(inside.mean())


def sliced_wasserstein(
    images_a: ImageSet | torch.Tensor,
    images_b: ImageSet | torch.Tensor,
    seed: int = 0,
    *,
    projections: int = 512,
) -> float:
    """Sliced Wasserstein-1 distance of pixels: the mean over random unit directions; 0 is best.

    images: `ImageSet` or float32 (N, C, H, W) in [-1, 1]; the two may differ in N. One unit is
    the distance of 1 in pixel space along a direction. (Rabin et al. 2011)
    """
    flat_a = _rows(images_a, np.arange(len(images_a))).flatten(1).double().cpu().numpy()
    flat_b = _rows(images_b, np.arange(len(images_b))).flatten(1).double().cpu().numpy()
    flat_a, flat_b = _checked(flat_a, flat_b, least=1)
    draw = np.random.Generator(np.random.PCG64(seed))
    directions = draw.standard_normal((flat_a.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    sorted_a = np.sort(flat_a @ directions, axis=0)
    sorted_b = np.sort(flat_b @ directions, axis=0)
    # Both quantile functions are constant between neighbouring breaks: exact for N != M too.
    n, m = len(sorted_a), len(sorted_b)
    breaks = np.union1d(np.arange(n + 1) / n, np.arange(m + 1) / m)
    middle = (breaks[1:] + breaks[:-1]) / 2
    gap = np.abs(sorted_a[(middle * n).astype(int)] - sorted_b[(middle * m).astype(int)])
    return float((np.diff(breaks) @ gap).mean())


def class_histogram(features: Features) -> np.ndarray | None:
    """The share of each class, float64 (num_classes,) that sums to 1; None from an autoencoder."""
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


@dataclass(frozen=True)
class FitSettings:
    """How a `FeatureNet` is fitted.

    AdamW with warm-up and cosine; images are mirrored at random (`flip`: wrong for letters and
    digits) and moved by up to `shift` pixels.
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
) -> FeatureNet:
    """Fits a `FeatureNet`: a classifier where images have 2 labels or more, else an autoencoder.

    held_out: labelled images whose accuracy goes into the record; they are not fitted to.
    progress: called with (step, loss) after every step. The global random state is left alone;
    the same arguments, machine and thread count give the same weights.
    Raises ValueError where the loss stops being finite.
    """
    settings = settings or FitSettings()
    num_classes = images.num_classes if images.num_classes != 1 else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = FeatureNet(images.channels, images.size, num_classes)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=settings.weight_decay)
    draw = np.random.Generator(np.random.PCG64(settings.seed))
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        loss = _fit_loss(net, images, settings, draw)
        if not math.isfinite(float(loss.detach())):
            raise ValueError(f"the loss of step {step} is not finite; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress is not None:
            progress(step, float(loss.detach()))
    net.eval()
    net.record = {
        "data": images.source,
        "images": len(images),
        **asdict(settings),
        "threads": torch.get_num_threads(),
    }
    if held_out is not None and num_classes is not None:
        net.record["held_out"] = held_out.source
        net.record["held_out_images"] = len(held_out)
        net.record["held_out_accuracy"] = accuracy(net, held_out)
    return net


def _learning_rate(settings: FitSettings, step: int) -> float:
    rise = min(1.0, (step + 1) / max(1, settings.steps // 20))
    return settings.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def _fit_loss(
    net: FeatureNet, images: ImageSet, settings: FitSettings, draw: np.random.Generator
) -> torch.Tensor:
    """The loss of one random batch: cross-entropy, or mean squared error of the autoencoder."""
    chosen = draw.integers(0, len(images), settings.batch_size)
    mirrored = draw.random(settings.batch_size) < 0.5 if settings.flip else None
    offsets = draw.integers(0, 2 * settings.shift + 1, (2, settings.batch_size))
    x = _shifted(images.batch(chosen, mirrored), offsets, settings.shift)
    _, output = net(x.contiguous(memory_format=torch.channels_last))
    if net.num_classes is None or images.labels is None:
        return F.mse_loss(output, x)
    return F.cross_entropy(output, torch.from_numpy(images.labels[chosen]))


def _shifted(x: torch.Tensor, offsets: np.ndarray, shift: int) -> torch.Tensor:
    """x (B, C, H, W), each image cut at its own offset (2, B) from its edges repeated `shift`x."""
    size = x.shape[2]
    padded = F.pad(x, (shift, shift, shift, shift), mode="replicate")
    top, left = torch.from_numpy(offsets)
    span = torch.arange(size)
    rows = (top[:, None] + span)[:, :, None]  # (B, H, 1)
    columns = (left[:, None] + span)[:, None, :]  # (B, 1, W)
    batch = torch.arange(len(x))[:, None, None]
    return padded[batch, :, rows, columns].permute(0, 3, 1, 2)


def save_features(net: FeatureNet, folder: str | Path) -> None:
    """Writes `model.safetensors` (float32) and then `config.json` into `folder`."""
    folder = Path(folder)
    config = {
        "format": _FORMAT,
        "channels": net.channels,
        "size": net.size,
        "num_classes": net.num_classes,
        "record": net.record,
        "sha256": write_tensors(folder / "model.safetensors", net.state_dict()),
    }
    write_json(folder / "config.json", config)


def load_features(folder: str | Path | None = None) -> FeatureNet:
    """The `FeatureNet` of a folder written by `save_features`; None is the shipped classifier.

    Raises CheckpointError where a file is missing or damaged, or where config and weights do not
    fit each other exactly.
    """
    folder = SHIPPED_FEATURES if folder is None else Path(folder)
    path = folder / "config.json"
    config = read_json(path)
    _check_config(config, path)
    try:
        net = FeatureNet(config["channels"], config["size"], config["num_classes"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    net.record = config["record"]
    weights = folder / "model.safetensors"
    load_strictly(net, read_tensors(weights, config["sha256"]), weights)
    return net.eval()


def _check_config(config: Any, path: Path) -> None:
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise CheckpointError(f"{path} does not describe features (format {_FORMAT!r})")
    if set(config) != set(_CONFIG_TYPES):
        unknown = ", ".join(sorted(set(config) - set(_CONFIG_TYPES))) or "none"
        missing = ", ".join(sorted(set(_CONFIG_TYPES) - set(config))) or "none"
        raise CheckpointError(f"{path} has unknown keys: {unknown}; missing keys: {missing}")
    for key, types in _CONFIG_TYPES.items():
        if type(config[key]) not in types:
            names = " or ".join(kind.__name__ for kind in types)
            raise CheckpointError(f"{path}: {key}={config[key]!r} is no {names}")
