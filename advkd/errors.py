"""What commands end with in one sentence; here, so that catching it needs no other import."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A file that cannot be used; the message names it and says why."""


class TrainingError(RuntimeError):
    """A training that cannot go on; the message names the step and what to do."""


class Interrupted(RuntimeError):
    """A training that was asked to stop and has saved its state."""
