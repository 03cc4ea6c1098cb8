"""The schedule, exact selection and smoothing, against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning import Schedule, SelectionError, Smoother, kept_size, select


def test_schedule_scores_every_cycle_after_the_full_epochs():
    schedule = Schedule(epochs=10, full_epochs=2, cycle=3, keep=0.5)
    assert [epoch for epoch in range(10) if schedule.prunes_at(epoch)] == [2, 5, 8]
    assert schedule.rounds == 3
    assert schedule.sizes(101) == [101] * 2 + [50] * 8


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_no_scoring_pass_is_in_vain(epochs, full_epochs, cycle):
    schedule = Schedule(epochs, full_epochs, cycle, keep=0.5)
    assert schedule.rounds == max(0, -(-(epochs - full_epochs) // cycle))  # r = ceil((E − τ) / T)
    assert Schedule(epochs, full_epochs, cycle, keep=1).rounds == 0


@pytest.mark.parametrize(("keep", "s", "saved"), [(0.5, 0.15, 41.6), (0.2, 0.15, 68.6), (0.5, 0, 45), (0.2, 0, 72)])
def test_cost_model_gives_the_papers_figures(keep, s, saved):
    assert 100 * (1 - Schedule(40, 4, 4, keep).relative_time(s)) == pytest.approx(saved, abs=0.06)


def slow_select(scores, keep, offset):
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    size = round(keep * len(scores))
    first = min(round(offset * len(scores)), len(scores) - size)
    return sorted(ranked[first : first + size])


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1e9, -3.0]), min_size=1, max_size=60),
       st.floats(0.01, 1), st.floats(0, 0.5))
def test_select_agrees_with_sorting_pairs(scores, keep, offset):
    scores = np.array(scores, dtype=np.float32)  # few distinct values: mostly ties
    if kept_size(len(scores), keep) < 1:
        with pytest.raises(SelectionError, match="is none"):
            select(scores, keep, offset)
    else:
        assert select(scores, keep, offset).tolist() == slow_select(scores, keep, offset)


def test_select_keeps_exactly_what_was_asked_where_all_scores_are_equal():
    assert select(np.zeros(10), 0.3).tolist() == [0, 1, 2]
    assert select(np.zeros(1), 1).tolist() == [0]


@pytest.mark.parametrize(("n", "keep"), [(1, 0.5), (1, 0.01), (4, 0.1), (5, 0.1), (100, 0.004)])
def test_a_share_that_rounds_to_nothing_is_refused(n, keep):
    assert kept_size(n, keep) == 0  # of 1 at a half, too: halves are rounded to even
    with pytest.raises(SelectionError, match=f"a share of {keep:g} of {n} examples is none"):
        select(np.arange(float(n)), keep)


@given(st.integers(1, 50), st.floats(0.02, 1), st.floats(0, 1))
def test_of_equal_scores_the_first_after_the_offset_are_kept(n, keep, offset):
    if size := kept_size(n, keep):
        first = min(round(offset * n), n - size)
        assert select(np.full(n, 0.5), keep, offset).tolist() == list(range(first, first + size))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_select_refuses_what_is_no_number(bad):
    with pytest.raises(SelectionError, match="1 of 3 scores are NaN or infinite"):
        select(np.array([1.0, bad, 0.0]), 0.5)


def test_an_offset_that_rounds_up_with_keep_still_keeps_what_was_asked():
    assert len(select(np.arange(4479.0), 0.5, 0.5)) == 2240


def slow_smoothing(history, alpha, c):
    """EMA + c·SD of one example's scores from the weights themselves, as pandas' ewm(alpha, adjust=False)."""
    n = len(history)
    weights = [(1 - alpha) ** (n - 1)] + [alpha * (1 - alpha) ** (n - 1 - i) for i in range(1, n)]
    mean = sum(w * x for w, x in zip(weights, history))
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, history))
    correction = 1 - sum(w * w for w in weights)
    return mean + (c * (variance / correction) ** 0.5 if correction > 1e-12 else 0)


@pytest.mark.parametrize(("alpha", "c"), [(0.8, 1.0), (0.3, 0.5), (0.8, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_smoother_agrees_with_the_weights_written_out(rng, alpha, c):
    rounds = rng.random((7, 20)).astype(np.float32)
    smooth = Smoother(alpha, c)
    for n in range(1, 8):
        wanted = [slow_smoothing(rounds[:n, i].astype(float), alpha, c) for i in range(20)]
        np.testing.assert_allclose(smooth(rounds[n - 1]), wanted, rtol=1e-5)


@given(st.lists(st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3), min_size=1, max_size=8),
       st.floats(0.05, 0.99) | st.just(1.0), st.floats(0, 3))
def test_smoothing_of_any_scores_agrees_with_the_weights_written_out(rounds, alpha, c):
    """Ties and equal scores included: then there is no deviation, and the score comes out as it was."""
    smooth, rounds = Smoother(alpha, c), np.array(rounds, dtype=np.float32)
    for n in range(1, len(rounds) + 1):
        wanted = [slow_smoothing(rounds[:n, i].astype(float), alpha, c) for i in range(3)]
        np.testing.assert_allclose(smooth(rounds[n - 1]), wanted, rtol=1e-5, atol=2e-6)


def test_smoothing_keeps_nan_for_select_to_refuse():
    smooth = Smoother(0.8, 1.0)
    smooth(np.array([0.5, np.nan, 1.0]))
    with pytest.raises(SelectionError, match="1 of 3 scores are NaN"):
        select(smooth(np.array([0.5, 0.5, 1.0])), 0.5)
