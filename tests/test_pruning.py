"""When to select, what is kept, and smoothing: each rule agrees with a slow, obvious twin."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flags
from pruning import (
    Plan,
    SelectionError,
    Smoother,
    gumbel_log_scores,
    highest,
    infobatch,
    kept_size,
    select,
    stratified,
    with_class_floor,
)

# ---- when


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 30), st.integers(0, 8))
def test_a_dynamic_plan_selects_every_cycle_between_its_full_epochs(epochs, full, cycle, full_end):
    plan = Plan(epochs, full, cycle, full_end)
    pruned = range(full, epochs - full_end)
    assert plan.total == epochs and not any(map(plan.restarts_before, range(epochs)))
    assert [e for e in range(epochs) if plan.selects_before(e)] == list(pruned)[::cycle]
    assert [e for e in range(epochs) if not plan.is_full(e)] == list(pruned)


def test_a_static_plan_selects_once_and_starts_again():
    """With τ = 2 and E = 4 there are 6 epochs: two that end in the selection, and four from the pretrained weights."""
    plan = Plan(4, 2, 1, static=True)
    assert plan.total == 6
    assert [epoch for epoch in range(6) if plan.selects_before(epoch)] == [2]
    assert [epoch for epoch in range(6) if plan.restarts_before(epoch)] == [2]
    assert [plan.progress(epoch) for epoch in range(6)] == [0, 0.5, 0, 0.25, 0.5, 0.75]
    random = Plan(4, 0, 1, static=True)  # random needs no training before its selection
    assert random.total == 4 and random.selects_before(0) and not random.restarts_before(0)


def test_infobatch_prunes_in_the_epochs_of_its_authors(capsys):
    """Qin et al. prune in epoch e (from 0) while e + 1 ≤ 0.875 E. Epoch 0 has no losses yet, so it keeps everything."""
    for epochs in range(1, 101):
        wanted = [e for e in range(1, epochs) if e + 1 <= 0.875 * epochs]
        line = ["--method", "infobatch", "--epochs", str(epochs)]
        if not wanted:
            with pytest.raises(SystemExit):
                flags.parse(line, "")
            continue
        args = flags.parse(line, "")
        plan = Plan(args.epochs, args.full_epochs, args.cycle, args.full_end)
        assert [e for e in range(epochs) if not plan.is_full(e)] == wanted
        assert [e for e in range(epochs) if plan.selects_before(e)] == wanted


# ---- which


def slow_highest(scores, keep, offset):
    """Sort pairs of score and index."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    size = round(keep * len(scores))
    first = min(round(offset * len(scores)), len(scores) - size)
    return sorted(ranked[first : first + size])


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 1e9, -3.0]), min_size=1, max_size=60),
       st.floats(0.01, 1), st.floats(0, 0.5))  # fmt: skip
def test_highest_agrees_with_sorting_pairs(scores, keep, offset):
    """Few distinct values make many ties: the lower index comes first. A size of 0 is refused."""
    scores = np.array(scores, dtype=np.float32)
    if kept_size(len(scores), keep) < 1:
        with pytest.raises(SelectionError):
            highest(scores, keep, offset)
    else:
        assert highest(scores, keep, offset).tolist() == slow_highest(scores, keep, offset)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad, rng):
    scores = np.array([1.0, bad, 0.0])
    for rule in (lambda: highest(scores, 0.5), lambda: infobatch(scores, 0.5, rng),
                 lambda: stratified(scores, 0.5, 0, rng)):  # fmt: skip
        with pytest.raises(SelectionError):
            rule()


def slow_chances(scores, size):
    """Return {kept: probability} of drawing one sample after the other, in proportion to the scores that are left."""
    chances = Counter()
    for order in permutations(range(len(scores)), size):
        chance, left = 1.0, sum(scores)
        for i in order:
            chance, left = chance * scores[i] / left, left - scores[i]
        chances[tuple(sorted(order))] += chance
    return chances


@pytest.mark.parametrize(("scores", "keep"), [([1, 2, 3, 4], 0.5), ([5, 0.1, 0.1, 1, 2], 0.6), ([1, 1, 1], 1 / 3)])
def test_sampling_has_the_chances_of_one_draw_after_the_other(rng, scores, keep):
    n, wanted = 5000, slow_chances(scores, round(keep * len(scores)))
    draws = (highest(gumbel_log_scores(np.array(scores, float), rng), keep) for _ in range(n))
    got = Counter(tuple(kept.tolist()) for kept in draws)
    assert set(got) <= set(wanted) and sum(wanted.values()) == pytest.approx(1)
    for kept, chance in wanted.items():
        assert got[kept] / n == pytest.approx(chance, abs=4.5 * (chance * (1 - chance) / n) ** 0.5)


def test_sampling_takes_scores_of_0_last_and_refuses_negative_ones(rng):
    scores = np.r_[np.zeros(50), rng.random(50)].astype(np.float32)
    some, more = (set(highest(gumbel_log_scores(scores, rng), keep).tolist()) for keep in (0.2, 0.6))
    assert min(some) >= 50 and more > set(range(50, 100))
    for bad in (-0.5, np.nan):
        with pytest.raises(SelectionError):
            highest(gumbel_log_scores(np.array([1.0, bad]), rng), 0.5)


def slow_stratified(scores, keep, offset, bins):
    """Deal samples out one by one, to the range with the fewest so far that has more. Returns (ranges, counts)."""
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


@given(st.lists(st.integers(0, 40), min_size=5, max_size=80), st.sampled_from([0.2, 0.5, 0.9]),
       st.sampled_from([0.0, 0.1]))  # fmt: skip
def test_stratified_selection_fills_all_ranges_alike(values, keep, offset):
    scores = np.array(values, dtype=np.float64)
    kept = stratified(scores, keep, offset, np.random.default_rng(0), bins=5).tolist()
    ranges, wanted = slow_stratified(scores, keep, offset, 5)
    got = {place: sum(i in ranges[place] for i in kept) for place in ranges}
    assert kept == sorted(set(kept)) and len(kept) == sum(got.values()) == sum(wanted.values())
    assert all(abs(got[place] - wanted[place]) <= 1 for place in ranges)


def slow_floor(kept, scores, labels, floor):
    """Exchange one by one: the best of a class that has too few, for the worst of the classes that have enough."""
    kept = set(kept)
    while True:
        count = {label: sum(labels[i] == label for i in kept) for label in set(labels)}
        short = [label for label in sorted(count) if count[label] < min(floor, labels.count(label))]
        if not short:
            return sorted(kept)
        best = min((i for i in range(len(scores)) if labels[i] == short[0] and i not in kept),
                   key=lambda i: (-scores[i], i))  # fmt: skip
        spare = [i for i in kept if count[labels[i]] > min(floor, labels.count(labels[i]))]
        kept -= {max(spare, key=lambda i: (-scores[i], i))}
        kept |= {best}


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.integers(0, 4)), min_size=12, max_size=50),
       st.integers(0, 3))  # fmt: skip
def test_a_class_floor_agrees_with_exchanging_one_by_one(samples, floor):
    scores, labels = np.array([x for x, _ in samples]), [label for _, label in samples]
    kept = highest(scores, 0.5)
    if sum(min(floor, labels.count(label)) for label in set(labels)) > len(kept):
        with pytest.raises(SelectionError):
            with_class_floor(kept, scores, np.array(labels), floor)
    else:
        got = with_class_floor(kept, scores, np.array(labels), floor).tolist()
        assert got == slow_floor(kept.tolist(), scores.tolist(), labels, floor)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_infobatch_agrees_with_one_sample_at_a_time(keep):
    """A kept sample below the mean weighs 1 / keep, so the expected sum of the losses is the full one."""
    scores = np.random.default_rng(1).exponential(size=500).astype(np.float32)
    kept, weights = infobatch(scores, keep, np.random.default_rng(7))
    draws, mean = np.random.default_rng(7).random(500), sum(scores.tolist()) / 500
    assert kept.tolist() == [i for i in range(500) if scores[i] >= mean or draws[i] < keep]
    assert weights.tolist() == pytest.approx([1 / keep if score < mean else 1 for score in scores])
    rng, sums = np.random.default_rng(2), []
    for _ in range(1000):
        kept, weights = infobatch(scores, keep, rng)
        sums.append(scores[kept] @ weights[kept])
    assert np.mean(sums) == pytest.approx(float(scores.sum()), abs=float(4 * np.std(sums) / 1000**0.5))


def test_the_flags_choose_the_rule(rng):
    scores, labels = np.arange(100.0), np.arange(100) // 50
    wanted = {"--keep 0.2": range(80, 100), "--keep 0.2 --offset 0.1": range(70, 90),
              "--keep 0.2 --class-floor 3": [47, 48, 49, *range(83, 100)]}  # fmt: skip
    for line, kept in wanted.items():
        assert select(scores, labels, flags.parse(line.split(), ""), rng)[0].tolist() == list(kept)

    def kept_by(line, scores=scores, labels=labels):
        return select(scores, labels, flags.parse(line.split(), ""), rng)

    drawn = [kept_by("--keep 0.2 --sample")[0] for _ in range(50)]
    assert 60 < np.mean(drawn) < 75 and {len(kept) for kept in drawn} == {20}  # the mean of the 20 highest is 89.5
    rare = np.r_[np.zeros(98, int), 1, 1]
    kept, weights = kept_by("--keep 0.2 --sample --class-floor 2", np.r_[np.ones(98), 0.0, 0.0], rare)
    assert {98, 99} < set(kept.tolist()) and len(kept) == 20 and (weights == 1).all()
    assert kept_by("--keep 0.2 --stratify")[0].min() < 40
    assert set(kept_by("--method infobatch")[1]) == {1, 2}


# ---- smoothing


def slow_smoothing(history, alpha, c):
    """Return EMA + c·SD of one sample from the weights written out, as pandas' ewm(alpha, adjust=False)."""
    n = len(history)
    weights = [(1 - alpha) ** (n - 1)] + [alpha * (1 - alpha) ** (n - 1 - i) for i in range(1, n)]
    mean = sum(w * x for w, x in zip(weights, history))
    variance = sum(w * (x - mean) ** 2 for w, x in zip(weights, history))
    correction = 1 - sum(w * w for w in weights)
    return mean + (c * (variance / correction) ** 0.5 if correction > 1e-12 else 0)


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3), min_size=1, max_size=8),
       st.floats(0.05, 0.99) | st.just(1.0), st.floats(0, 3))  # fmt: skip
def test_smoothing_agrees_with_the_weights_written_out(rounds, alpha, c):
    """The state is saved and loaded between rounds, as by --resume."""
    state, rounds = {}, np.array(rounds, dtype=np.float32)
    for n in range(1, len(rounds) + 1):
        smooth = Smoother(alpha, c)
        smooth.load_state_dict(state)
        wanted = [slow_smoothing(rounds[:n, i].astype(float), alpha, c) for i in range(3)]
        np.testing.assert_allclose(smooth(rounds[n - 1]), wanted, rtol=1e-5, atol=2e-6)
        state = smooth.state_dict()
