"""Temperature from logits, and from per-document sums on a grid."""

from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from posttrain import stats


def drawn(seed: int, true: float, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 3, shape)
    y = (softmax(z / true, axis=2).cumsum(axis=2) < rng.random((*shape[:2], 1))).sum(axis=2).clip(max=shape[2] - 1)
    return z, y


def grid_sums(z: np.ndarray, y: np.ndarray, betas: np.ndarray) -> dict[str, Any]:
    return {
        "logsumexp": np.stack([logsumexp(b * z, axis=2).sum(1) for b in betas], axis=1),
        "slope": np.stack([(softmax(b * z, axis=2) * z).sum((1, 2)) for b in betas], axis=1),
        "label_logit": np.take_along_axis(z, y[..., None], 2).sum((1, 2)),
        "tokens": np.full(len(y), y.shape[1]),
    }


@pytest.mark.parametrize("true", [0.5, 1.0, 2.2])
def test_the_grid_finds_what_the_logits_give_and_reports_on_the_other_half(true: float) -> None:
    z, y = drawn(1, true, (80, 12, 20))
    betas = stats.temperature_grid()
    found = stats.fit_temperature_on_grid(betas, **grid_sums(z, y, betas), ids=np.arange(80), seed=3)
    order = np.random.default_rng(3).permutation(80)
    fit, held = order[:40], order[40:]
    exact = stats.fit_temperature(z[fit].reshape(-1, 20), y[fit].ravel(), clusters=np.repeat(fit, 12))
    assert found.value == pytest.approx(exact.value, abs=6e-4)
    assert found.se == pytest.approx(exact.se, rel=0.01)
    assert (found.n, found.clusters, found.report_on) == (480, 40, "held out")
    for t, part in ((1.0, found.nll_before), (exact.value, found.nll_after)):
        label = np.take_along_axis(log_softmax(z[held] / t, axis=2), y[held][..., None], 2)
        assert part.value == pytest.approx(-label.mean(), abs=1e-4)
        assert part.clusters == 40
    assert found.low < true < found.high


def test_the_order_of_the_documents_does_not_show() -> None:
    z, y = drawn(2, 1.5, (31, 5, 7))
    betas = stats.temperature_grid()
    sums, order = grid_sums(z, y, betas), np.random.default_rng(0).permutation(31)
    ids = np.array([f"doc{k}" for k in range(31)])
    first = stats.fit_temperature_on_grid(betas, **sums, ids=ids)
    assert stats.fit_temperature_on_grid(betas, **{k: v[order] for k, v in sums.items()}, ids=ids[order]) == first


@pytest.mark.parametrize("chunk", [1, 50, 10**9])
def test_chunks_and_float32_do_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.stats import temperature

    z, y = drawn(3, 1.4, (30, 4, 6))
    z = z.astype(np.float32)
    expected = stats.fit_temperature(z.reshape(-1, 6).astype(float), y.ravel())
    monkeypatch.setattr(temperature, "CHUNK_LOGITS", chunk)
    assert stats.fit_temperature(z.reshape(-1, 6), y.ravel()) == expected


def test_adding_a_constant_to_the_logits_changes_nothing_and_doubling_them_doubles_t() -> None:
    z, y = drawn(4, 1.3, (1, 200, 5))
    base = stats.fit_temperature(z[0], y[0])
    assert stats.fit_temperature(z[0] + 1000, y[0]).value == pytest.approx(base.value, rel=1e-9)
    double = stats.fit_temperature(2 * z[0], y[0])
    assert (double.value, double.low, double.high) == pytest.approx((2 * base.value, 2 * base.low, 2 * base.high))


@pytest.mark.parametrize(("labels", "bound"), [([0, 0, 0], 0.05), ([1, 1, 0], 20.0)])
def test_a_bound_is_flagged_and_has_no_interval(labels: list[int], bound: float) -> None:
    found = stats.fit_temperature(np.tile([3.0, 0.0], (3, 1)), labels)
    assert found.value == pytest.approx(bound)
    assert found.at_bound
    assert found.low is found.high is None
    assert "bound" in found.method


@pytest.mark.parametrize("true", [0.1, 9.0])
def test_the_grids_ends_are_bounds_too(true: float) -> None:
    z, y = drawn(5, true, (40, 10, 6))
    betas = stats.temperature_grid()
    found = stats.fit_temperature_on_grid(betas, **grid_sums(z, y, betas), ids=range(40))
    assert found.at_bound
    assert found.value == pytest.approx(0.25 if true < 1 else 4)


def test_constant_logits_leave_t_alone() -> None:
    found = stats.fit_temperature(np.ones((9, 3)), np.zeros(9, int))
    assert (found.value, found.at_bound, found.low) == (1.0, False, None)
    assert "no effect" in found.method


def test_one_document_cannot_be_fitted_and_told_apart() -> None:
    z, y = drawn(6, 1.3, (1, 10, 5))
    betas = stats.temperature_grid()
    assert stats.fit_temperature_on_grid(betas, **grid_sums(z, y, betas), ids=["a"]).value is None


def test_documents_are_what_the_interval_rests_on() -> None:
    z, y = drawn(7, 1.3, (60, 1, 5))
    alone = stats.fit_temperature(z[:, 0], y[:, 0])
    copies = stats.fit_temperature(np.tile(z[:, 0], (4, 1)), np.tile(y[:, 0], 4), clusters=np.tile(np.arange(60), 4))
    assert copies.value == pytest.approx(alone.value)
    assert copies.se == pytest.approx(alone.se)
    assert (copies.n, copies.clusters) == (240, 60)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (np.ones((3, 1)), [0, 0, 0], "two classes or more"),
        (np.ones((3, 4)), [0, 0], "labels must be 3 whole numbers"),
        (np.ones((3, 4)), [0.0, 1.0, 2.0], "whole numbers"),
        (np.ones((3, 4)), [0, 4, -100], r"in 0 \.\. 3; got -100 to 4; drop masked"),
        (np.full((3, 4), np.inf), [0, 0, 0], "finite"),
    ],
)
def test_errors(logits: np.ndarray, labels: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stats.fit_temperature(logits, labels)


def test_a_grid_must_reach_around_1() -> None:
    z, y = drawn(8, 1.3, (4, 3, 5))
    betas = np.array([2.0, 3, 4, 5])
    with pytest.raises(ValueError, match="reach around 1"):
        stats.fit_temperature_on_grid(betas, **grid_sums(z, y, betas), ids=range(4))
    with pytest.raises(ValueError, match="4 points or more"):
        stats.temperature_grid(3)
    assert stats.temperature_grid()[8] == 1
