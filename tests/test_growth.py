"""Laws of growth: steady sums stay sums, and what compounds or adds up first is found."""

import json
import math

import pytest

from kvtune.growth import Growth, Reading

LEVELS = (1e-4, 1e-3, 1e-2, 1e-1)


def readings(truth: Growth) -> list[Reading]:
    """Probes of keys, of values and of both under a known growth."""
    pairs = [(p, 0.0) for p in LEVELS] + [(0.0, p) for p in LEVELS] + [(p, p / 2) for p in LEVELS]
    return [Reading(k, v, float(truth.kl(k, v))) for k, v in pairs]


@pytest.mark.parametrize(
    "truth",
    [
        Growth((1.3, 1.0), (0.9, 1.0)),
        Growth((2.0, 1.4), (1.1, 1.0)),
        Growth((1.5, 1.0), (1.2, 1.2), 0.7),
    ],
    ids=["sums", "a side that compounds", "both sides together"],
)
def test_what_was_true_is_found(truth: Growth) -> None:
    found = Growth.fit(readings(truth))
    for one in readings(truth):
        assert found.kl(one.keys, one.values) == pytest.approx(one.measured, rel=1e-6)
    assert found.is_additive == truth.is_additive


def test_noise_within_a_tenth_gets_a_scale_and_no_more_terms() -> None:
    noisy = [
        Reading(k, v, m * (1 + 0.04 * math.sin(7 * i)))
        for i, (k, v, m) in enumerate(readings(Growth((1.3, 1.0), (0.9, 1.0))))
    ]
    assert Growth.fit(noisy).is_additive


def test_without_probes_sums_stand_as_they_are() -> None:
    assert Growth.fit([]).kl(0.25, 0.5) == 0.75
    assert Growth.fit([Reading(0.0, 0.0, 0.0)]).is_additive


def test_more_of_either_side_is_never_less() -> None:
    grown = Growth.fit(readings(Growth((1.5, 1.1), (1.2, 1.3), 1.9)))
    steps = [x / 50 for x in range(50)]
    for other in steps:
        along = [float(grown.kl(x, other)) for x in steps]
        assert along == sorted(along)


def test_a_growth_is_written_and_read_back() -> None:
    grown = Growth.fit(readings(Growth((1.5, 1.1), (1.2, 1.3), 0.4)))
    assert Growth.of_table(json.loads(json.dumps(grown.table()))) == grown
