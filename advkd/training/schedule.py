"""What changes from step to step of a training: learning rate, active heads, heads that D sees."""

from __future__ import annotations

import math

from advkd.config import ConfigError


def learning_rate(step: int, base: float, warmup: int, steps: int, final: float) -> float:
    """Linear warm-up to `base`, then a cosine down to `final * base` at the last step."""
    if step < warmup:
        return base * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return base * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))


def active_heads(schedule: str, K: int, step: int, steps: int, grow_until: float) -> int:
    """The number of heads that train at `step`: all of K ("joint"), or one more at a time, the last
    of them from `grow_until` of the steps on ("progressive")."""
    last_joins = round(grow_until * steps)
    if schedule == "joint" or step >= last_joins:
        return K
    return 1 + step * (K - 1) // last_joins


def head_weights(given: tuple[float, ...], K: int) -> tuple[float, ...]:
    """w_1 .. w_K: as configured, or 1 for the last head and 0.25 for the others.

    Raises ConfigError unless there is one for every head and one that is not 0.
    """
    if given and len(given) != K:
        raise ConfigError(f"distill.head_weights has {len(given)} entries, the student {K} heads")
    if given and not any(given):
        raise ConfigError("distill.head_weights are all 0, which leaves nothing to learn")
    return given or (0.25,) * (K - 1) + (1.0,)


def adversary_heads(
    weights: tuple[float, ...], heads: int, step: int, seen: str, inner_every: int
) -> dict[int, float]:
    """The heads that D sees at `step`, of the `heads` that are active, with their weights.

    D sees the last active head in every step. Where it sees "all", it sees those before it every
    `inner_every` steps with `inner_every` times their weight: over the steps the sum is the loss's,
    for less work.
    """
    inner = {}
    if seen == "all" and step % inner_every == 0:
        inner = {k: weights[k] * inner_every for k in range(heads - 1)}
    return {**inner, heads - 1: weights[heads - 1]}
