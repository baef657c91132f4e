"""The front door to images: a path, or a data set's name, to a `Source` or an `ImageSet`.

Reading is deterministic: files are taken in sorted order, and the same files give the same pixels.
"""

from __future__ import annotations

import os
from pathlib import Path

from advkd.config import nearest
from advkd.data.hub import PREFIX, open_hub
from advkd.data.readers import open_source
from advkd.data.registry import dataset_names, find
from advkd.data.sentences import DataError
from advkd.data.source import ImageSet, Source


def load_images(
    path: str | Path, *, size: int | None = None, channels: int | None = None, crop: bool = True
) -> ImageSet:
    """Read a folder or a zip of images, a `.npz`/`.npy` array, an IDX file, gzipped or not, a data
    set, or one of the hub.

    size: pixels of a side of the result; None keeps square images of one size up to 256 and else
        takes the largest of 32, 64, 128, 256 that no image's shorter side falls below (for images
        below 32: their shorter side; for arrays: H and W's smaller; for a data set: its size).
    channels: 1 or 3 converts; None keeps them, and a folder that mixes both is an error.
    crop: True scales the shorter side and cuts out the center; False scales both sides.

    Folder: searched through all levels, links included, in sorted order, for every file whose
    suffix Pillow reads; hidden folders are passed over. Transparent pixels become white; floats
    and integers of more than 8 bits are scaled, one way for all (`advkd.data.picture`). Where
    every image lies in one of at least two folders side by side, these are the classes, by name.
    Of `train` beside `test` or `val`, only `train` is read. A folder with an IDX file reads that;
    of several, the one whose name begins with `train`.
    Arrays: uint8, or floats in [-1, 1] (in [0, 1] where none is negative); shape (N, H, W),
    (N, C, H, W) or (N, H, W, C) with C 1 or 3. In `.npz` the images are `images`, `x`, `x_train`,
    `train_images`, `arr_0` or the only array that can be images, and the labels `labels`, `y`,
    `y_train`, `train_labels` or `arr_1`.
    IDX: labels are read from the file beside it (`images` -> `labels`, `idx3` -> `idx1`).
    Zip: as the folder that it was made of. Its, or a folder's, dataset.json gives the labels.
    Data set: the training split of a folder with a dataset.toml, or of a registered name.
    Hub: `hf:NAME` or `hf:FOLDER`, by the library `datasets` (`advkd.data.hub`).

    More than 256 MiB of pixels stay on disk and are read when a batch asks for them.

    `advkd.data.describe` puts into words what was taken and what was passed over. Raises
    DataError, naming the file, for whatever cannot be read or holds no finite image.
    """
    return probe(path, size=size, channels=channels, crop=crop).load()


def probe(
    path: str | Path, *, size: int | None = None, channels: int | None = None, crop: bool = True
) -> Source:
    """Read the headers alone of what `load_images` reads; `load` of the result reads the images.

    Whoever needs the size before the images takes it from here, so that nothing is decoded twice.
    Parameters and errors are `load_images`'s, but for images that prove broken when they are read.
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size} is below 1")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels={channels} is neither 1 nor 3")
    if str(path).startswith(PREFIX):
        return open_hub(str(path), size, channels, crop)
    found = find(path)
    if found is not None:
        return found.open("train", size=size, channels=channels, crop=crop)
    if not os.path.exists(path):
        advice = nearest(str(path), dataset_names())
        raise DataError(f"{path} does not exist, and no data set has that name{advice}")
    return open_source(Path(path), size, channels, crop)
