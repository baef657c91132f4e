"""Images to train on and to compare with, and the store of a teacher's trajectories."""

from __future__ import annotations

from advkd.data.images import CLASS_NAMES, DataError, ImageSet, load_images, shipped

__all__ = ["CLASS_NAMES", "DataError", "ImageSet", "load_images", "shipped"]
