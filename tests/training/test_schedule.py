"""Learning rates, active heads and the heads that D sees, step by step."""

from __future__ import annotations

import itertools

import pytest

from advkd.config import ConfigError
from advkd.training.schedule import active_heads, adversary_heads, head_weights, learning_rate


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [learning_rate(step, 0.5, 10, 110, 0.1) for step in range(110)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == rates[10] == 0.5
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[60] == pytest.approx(0.5 * (0.1 + 0.9 * 0.5))
    assert learning_rate(110, 0.5, 10, 110, 0.1) == pytest.approx(0.05)
    assert learning_rate(200, 0.5, 10, 110, 0.1) == pytest.approx(0.05)
    assert learning_rate(0, 0.5, 0, 100, 0.1) == 0.5
    assert learning_rate(3, 0.5, 10, 5, 0.1) == pytest.approx(0.2)
    assert learning_rate(0, 1.0, 0, 0, 0.0) == 1.0


def test_head_weights() -> None:
    assert head_weights((), 3) == (0.25, 0.25, 1.0)
    assert head_weights((), 1) == (1.0,)
    assert head_weights((1.0, 2.0), 2) == (1.0, 2.0)
    with pytest.raises(ConfigError, match="2 entries, the student 3 heads"):
        head_weights((1.0, 2.0), 3)
    with pytest.raises(ConfigError, match="are all 0"):
        head_weights((0.0, 0.0), 2)


def test_active_heads() -> None:
    def heads(schedule: str, grow_until: float) -> list[int]:
        return [active_heads(schedule, 3, step, 10, grow_until) for step in range(10)]

    assert heads("joint", 0.6) == [3] * 10
    assert heads("progressive", 0.6) == [1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert heads("progressive", 0.0) == [3] * 10
    assert heads("progressive", 1.0) == [1] * 5 + [2] * 5
    assert active_heads("progressive", 1, 0, 10, 0.6) == 1


def test_the_heads_that_D_sees_weigh_the_same_over_the_steps() -> None:
    weights = (0.25, 0.5, 1.0)
    total = dict.fromkeys(range(3), 0.0)
    for step in range(12):
        seen = adversary_heads(weights, 3, step, "all", 4)
        assert seen[2] == 1.0
        for k, weight in seen.items():
            total[k] += weight / 12
    assert total == pytest.approx(dict(enumerate(weights)))
    assert adversary_heads(weights, 2, 1, "all", 4) == {1: 0.5}
    assert adversary_heads(weights, 1, 0, "all", 4) == {0: 0.25}
    assert adversary_heads(weights, 3, 0, "last", 4) == {2: 1.0}
