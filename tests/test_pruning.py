"""The schedule, exact selection and smoothing, against their definitions."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning import (
    Schedule,
    SelectionError,
    Smoother,
    choose,
    kept_size,
    perturbed,
    select,
    soft_prune,
    stratified,
    with_floor,
)
from train import parse


def test_schedule_scores_every_cycle_after_the_full_epochs():
    schedule = Schedule(epochs=10, full_epochs=2, cycle=3, keep=0.5)
    assert [epoch for epoch in range(10) if schedule.prunes_at(epoch)] == [2, 5, 8]
    assert [epoch for epoch in range(10) if schedule.full_at(epoch)] == [0, 1]
    assert schedule.total == 10 and not any(map(schedule.restarts_at, range(10)))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_no_scoring_pass_is_in_vain(epochs, full_epochs, cycle, full_end):
    def rounds(keep):
        return sum(map(Schedule(epochs, full_epochs, cycle, keep, full_end).prunes_at, range(epochs)))

    assert rounds(0.5) == max(0, -(-(epochs - full_epochs - full_end) // cycle))  # r = ceil((E − τ − F) / T)
    assert rounds(1) == 0


def test_the_last_epochs_may_be_full_again():
    schedule = Schedule(8, 1, 1, 0.5, full_end=2)
    assert [schedule.full_at(epoch) for epoch in range(8)] == [True] + [False] * 5 + [True] * 2


def test_static_selection_selects_once_and_starts_again():
    """τ = 2 epochs to score after, then E = 4 of its own, with a learning rate that begins again."""
    schedule = Schedule(4, 2, 1, 0.5, static=True)
    assert schedule.total == 6
    assert [epoch for epoch in range(6) if schedule.prunes_at(epoch)] == [2]
    assert [epoch for epoch in range(6) if schedule.restarts_at(epoch)] == [2]
    assert [schedule.progress(epoch) for epoch in range(6)] == [0, 0.25, 0, 0.25, 0.5, 0.75]
    assert schedule.progress(5.5) == 0.875
    random = Schedule(4, 0, 1, 0.5, static=True)  # needs no training to select by
    assert random.total == 4 and random.prunes_at(0) and not random.restarts_at(0)
    assert Schedule(4, 2, 1, 1.0, static=True).total == 4


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


def slow_chances(scores, size):
    """{kept: probability} of drawing one after the other, each in proportion to its score among those left."""
    chances = Counter()
    for order in permutations(range(len(scores)), size):
        chance, left = 1.0, sum(scores)
        for i in order:
            chance, left = chance * scores[i] / left, left - scores[i]
        chances[tuple(sorted(order))] += chance
    return chances


@pytest.mark.parametrize(("scores", "keep"), [([1, 2, 3, 4], 0.5), ([5, 0.1, 0.1, 1, 2], 0.6), ([1, 1, 1], 1 / 3)])
def test_drawing_has_the_chances_of_one_example_after_the_other(rng, scores, keep):
    n, wanted = 10_000, slow_chances(scores, round(keep * len(scores)))
    got = Counter(tuple(select(perturbed(np.array(scores, float), rng), keep).tolist()) for _ in range(n))
    assert set(got) <= set(wanted) and sum(wanted.values()) == pytest.approx(1)
    for kept, chance in wanted.items():
        assert got[kept] / n == pytest.approx(chance, abs=4.5 * (chance * (1 - chance) / n) ** 0.5)


def test_drawing_takes_what_has_no_score_last_and_at_random(rng):
    scores = np.r_[np.zeros(50), rng.random(50)].astype(np.float32)
    some, more, again = (set(select(perturbed(scores, rng), keep).tolist()) for keep in (0.2, 0.6, 0.6))
    assert min(some) >= 50  # 20 of the 50 that have one
    assert set(range(50, 100)) == {i for i in more if i >= 50} == {i for i in again if i >= 50} and more != again


@pytest.mark.parametrize(("score", "message"), [(np.nan, "1 of 3 scores are NaN"), (-0.5, "1 of 3 scores are below 0")])
def test_nothing_is_drawn_by_scores_that_are_no_chances(rng, score, message):
    with pytest.raises(SelectionError, match=message):
        select(perturbed(np.array([1.0, score, 1.0]), rng), 0.5)


def slow_stratified(scores, keep, offset, bins):
    """How many of each range are kept: one after the other goes to the range with the fewest so far that has more."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    size = round(keep * len(scores))
    ranked = ranked[min(round(offset * len(scores)), len(scores) - size) :]
    low, high = min(scores[i] for i in ranked), max(scores[i] for i in ranked)
    ranges = {}
    for i in ranked:
        place = min(int((scores[i] - low) // ((high - low) / bins)), bins - 1) if high > low else 0
        ranges.setdefault(place, []).append(i)
    counts = dict.fromkeys(ranges, 0)
    for _ in range(size):
        counts[min((place for place in ranges if counts[place] < len(ranges[place])), key=counts.get)] += 1
    return ranges, counts


@given(st.lists(st.integers(0, 40), min_size=1, max_size=80), st.sampled_from([0.2, 0.5, 0.9, 1.0]),
       st.sampled_from([0.0, 0.1]))
def test_stratified_selection_fills_all_ranges_alike(values, keep, offset):
    """Equally many of each range, give or take one, as a slow reader that deals them out one by one has it."""
    scores = np.array(values, dtype=np.float64)
    if not kept_size(len(scores), keep):
        return
    kept = stratified(scores, keep, offset, np.random.default_rng(0), bins=5)
    ranges, wanted = slow_stratified(scores, keep, offset, 5)
    got = {place: sum(i in ranges[place] for i in kept.tolist()) for place in ranges}
    assert len(set(kept.tolist())) == len(kept) == sum(wanted.values()) == sum(got.values())
    assert all(abs(got[place] - wanted[place]) <= 1 for place in ranges)
    assert kept.tolist() == sorted(kept.tolist())


def test_stratified_selection_draws_within_a_range_and_repeats():
    scores = np.repeat([0.0, 1.0], 50)
    first, second, other = (stratified(scores, 0.2, 0, np.random.default_rng(seed)).tolist() for seed in (0, 0, 1))
    assert first == second != other and sum(i < 50 for i in first) == 10


def slow_floor(kept, scores, labels, floor):
    """One by one: bring in the best of a class that has too few, and put out the lowest of those that have too many."""
    kept = set(kept)
    while True:
        count = {label: sum(labels[i] == label for i in kept) for label in set(labels)}
        short = [label for label in sorted(count) if count[label] < min(floor, labels.count(label))]
        if not short:
            return sorted(kept)
        best = min((i for i in range(len(scores)) if labels[i] == short[0] and i not in kept),
                   key=lambda i: (-scores[i], i))
        spare = [i for i in kept if count[labels[i]] > min(floor, labels.count(labels[i]))]
        kept -= {max(spare, key=lambda i: (-scores[i], i))}
        kept |= {best}


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.integers(0, 4)), min_size=12, max_size=50),
       st.integers(0, 3))
def test_a_floor_keeps_rare_classes_and_the_size(examples, floor):
    scores, labels = np.array([x for x, _ in examples]), [label for _, label in examples]
    kept = select(scores, 0.5)
    needed = sum(min(floor, labels.count(label)) for label in set(labels))
    if needed > len(kept):
        with pytest.raises(SelectionError, match=f"{needed} in all, more than the {len(kept)} to keep"):
            with_floor(kept, scores, np.array(labels), floor)
    else:
        got = with_floor(kept, scores, np.array(labels), floor).tolist()
        assert got == slow_floor(kept.tolist(), scores.tolist(), labels, floor)


def slow_soft_prune(scores, keep, draws):
    mean, kept, weights = sum(scores) / len(scores), [], []
    for i, (score, draw) in enumerate(zip(scores, draws)):
        weights.append(1 / keep if score < mean else 1.0)
        if score >= mean or draw < keep:
            kept.append(i)
    return kept, weights


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_infobatch_drops_and_reweighs_as_one_example_at_a_time(rng, keep):
    scores = rng.exponential(size=500).astype(np.float32)
    kept, weights = soft_prune(scores, keep, np.random.default_rng(7))
    wanted = slow_soft_prune(scores.tolist(), keep, np.random.default_rng(7).random(500))
    assert kept.tolist() == wanted[0] and weights.tolist() == pytest.approx(wanted[1])
    assert weights.dtype == np.float32 and kept.dtype == np.int64


def test_infobatchs_weights_leave_the_expected_sum_as_it_was(rng):
    values = rng.random(300)
    sums = [values[kept] @ weights[kept] for kept, weights in (soft_prune(values, 0.4, rng) for _ in range(2000))]
    assert np.mean(sums) == pytest.approx(values.sum(), abs=4 * np.std(sums) / 2000**0.5)


def test_infobatch_refuses_what_is_no_number(rng):
    with pytest.raises(SelectionError, match="1 of 2 scores are NaN"):
        soft_prune(np.array([np.nan, 1.0]), 0.5, rng)


def test_flags_choose_the_rule(rng):
    scores, labels = np.arange(100.0), np.arange(100) // 50
    flags = {"--keep 0.2": range(80, 100), "--keep 0.2 --offset 0.1": range(70, 90),
             "--keep 0.2 --class-floor 3": [47, 48, 49, *range(83, 100)]}  # fmt: skip
    for line, wanted in flags.items():
        kept, weights = choose(scores, labels, parse(line.split()), rng)
        assert kept.tolist() == list(wanted) and (weights == 1).all() and weights.shape == (100,)
    draws = [choose(scores, labels, parse(["--keep", "0.2", "--draw"]), rng)[0] for _ in range(50)]
    assert 60 < np.mean(draws) < 75 and {len(kept) for kept in draws} == {20}  # 2/3 of the way up, or a little less
    rare, args = np.r_[np.zeros(98, int), 1, 1], parse(["--keep", "0.2", "--draw", "--class-floor", "2"])
    for _ in range(20):  # a floor brings in the rare ones, but changes nothing about the others' chances
        kept, _ = choose(np.r_[np.ones(98), 0.0, 0.0], rare, args, rng)
        assert {98, 99} < set(kept.tolist()) and len(kept) == 20
    kept, _ = choose(scores, labels, parse(["--keep", "0.2", "--stratify"]), rng)
    assert len(kept) == 20 and kept.min() < 40 and kept.max() > 60
    kept, weights = choose(scores, labels, parse(["--method", "infobatch"]), rng)
    assert set(range(50, 100)) < set(kept.tolist()) and set(weights) == {1, 2}


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
