"""When to select, what is kept, and smoothing: each rule agrees with a slow, obvious twin."""

from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flags
import pruning
from errors import UserError
from pruning import Smoother, highest, infobatch, make_plan, select

TIED = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1e9, -3.0])  # few distinct scores: mostly ties

# ---- when


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 30), st.integers(0, 8))
def test_a_dynamic_plan_selects_every_cycle_between_its_full_epochs(epochs, full, cycle, full_end):
    plan, pruned = make_plan(epochs, full, cycle, full_end), list(range(full, epochs - full_end))
    assert len(plan) == epochs and [e for e in range(epochs) if plan[e] == "select"] == pruned[::cycle]
    assert [e for e in range(epochs) if plan[e] != "full"] == pruned


def test_a_static_plan_selects_once():
    """With τ = 2 and E = 4, there are two epochs before the selection, and four after it."""
    assert make_plan(4, 2, static=True) == ["full", "full", "select", "same", "same", "same"]
    assert make_plan(2, 0, static=True) == ["select", "same"]


@pytest.mark.parametrize("epochs", [3, 7, 8, 9, 10, 16, 17, 40, 100])
def test_infobatch_prunes_in_the_epochs_of_its_authors(epochs):
    """Qin et al. prune in epoch e (from 0) while e + 1 ≤ 0.875 E. Epoch 0 has no losses yet, so it keeps everything."""
    args = flags.parse(["--method", "infobatch", "--epochs", str(epochs)], "")
    plan = make_plan(args.epochs, args.full_epochs, args.cycle, args.full_end)
    selecting = [e for e in range(epochs) if plan[e] == "select"]
    assert selecting == [e for e in range(1, epochs) if e + 1 <= 0.875 * epochs] and "same" not in plan


# ---- which


@given(st.lists(TIED, min_size=1, max_size=60), st.floats(0.01, 1), st.floats(0, 0.5))
def test_highest_agrees_with_sorting_pairs(scores, keep, offset):
    """Of equal scores the lower index comes first."""
    n, size = len(scores), round(keep * len(scores))
    ranked = sorted(range(n), key=lambda i: (-scores[i], i))[min(round(offset * n), n - size) :]
    assert highest(np.array(scores), keep, offset).tolist() == sorted(ranked[:size])


@pytest.mark.parametrize(("bad", "line"), [
    *product([np.nan, np.inf, -np.inf], ["", "--stratify", "--sample", "--method infobatch"]), (-1.0, "--sample"),
])  # fmt: skip
def test_scores_that_make_no_sense_are_refused(bad, line, rng):
    with pytest.raises(UserError):
        select(np.array([1.0, bad, 0.5]), flags.parse(line.split(), ""), rng)


@pytest.mark.parametrize(("scores", "keep"), [([1, 2, 3, 4], 0.5), ([5, 0.1, 0.1, 1, 2], 0.6), ([1, 1, 1], 1 / 3),
                                                ([1, 0, 2], 0.5), ([1, 1e-30, 2], 0.5)])
def test_sampling_has_the_chances_of_one_draw_after_the_other(rng, scores, keep):
    """Each draw is in proportion to the scores of the samples that are left. A score of 0 comes last."""
    n, wanted = 5000, Counter()
    for order in permutations(range(len(scores)), round(keep * len(scores))):
        chance, left = 1.0, sum(scores)
        for i in order:
            chance, left = chance * scores[i] / left, left - scores[i]
        wanted[tuple(sorted(order))] += chance
    draws = (highest(pruning.gumbel_log_scores(np.array(scores, float), rng), keep) for _ in range(n))
    got = Counter(tuple(kept.tolist()) for kept in draws)
    for kept, chance in wanted.items():
        assert got[kept] / n == pytest.approx(chance, abs=4.5 * (chance * (1 - chance) / n) ** 0.5)


@given(st.lists(st.integers(0, 40), min_size=5, max_size=80), st.sampled_from([0.2, 0.5, 0.9]),
       st.sampled_from([0.0, 0.1]))  # fmt: skip
def test_stratified_selection_agrees_with_dealing_out(scores, keep, offset):
    """One sample after the other goes to the range with the fewest so far that has more."""
    n, size, bins = len(scores), round(keep * len(scores)), 5
    ranked = sorted(range(n), key=lambda i: (-scores[i], i))[min(round(offset * n), n - size) :]
    low, high = scores[ranked[-1]], scores[ranked[0]]
    place = {i: min(int((scores[i] - low) // ((high - low) / bins)), bins - 1) if high > low else 0 for i in ranked}
    there, wanted = Counter(place.values()), Counter(dict.fromkeys(place.values(), 0))
    for _ in range(size):
        wanted[min((p for p in there if wanted[p] < there[p]), key=wanted.get)] += 1
    kept = pruning.stratified(np.array(scores, float), keep, offset, np.random.default_rng(0), bins).tolist()
    got = Counter(place[i] for i in kept)
    assert kept == sorted(set(kept)) and len(kept) == size
    assert all(abs(got[p] - wanted[p]) <= 1 for p in there)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_infobatch_agrees_with_one_sample_at_a_time(keep):
    """A kept sample below the mean weighs 1 / keep, so the expected sum of the losses is the full one."""
    scores = np.random.default_rng(1).exponential(size=500)
    kept, weights = infobatch(scores, keep, np.random.default_rng(7))
    draws, mean = np.random.default_rng(7).random(500), sum(scores) / 500
    assert kept.tolist() == [i for i in range(500) if scores[i] >= mean or draws[i] < keep]
    assert weights.tolist() == pytest.approx([1 / keep if score < mean else 1 for score in scores])
    rounds = [infobatch(scores, keep, np.random.default_rng(seed)) for seed in range(1000)]
    sums = [scores[kept] @ weights[kept] for kept, weights in rounds]
    assert np.mean(sums) == pytest.approx(scores.sum(), abs=4 * np.std(sums) / 1000**0.5)


def test_the_flags_choose_the_rule(rng):
    def kept_by(line):
        return select(np.arange(100.0), flags.parse(line.split(), ""), rng)[0].tolist()

    assert kept_by("--keep 0.2") == list(range(80, 100))
    assert kept_by("--keep 0.2 --offset 0.1") == list(range(70, 90))
    assert min(kept_by("--keep 0.2 --stratify")) < 40
    drawn = [kept_by("--keep 0.2 --sample") for _ in range(50)]
    assert 60 < np.mean(drawn) < 75 and {len(kept) for kept in drawn} == {20}  # the mean of the 20 highest is 89.5
    assert set(range(50, 100)) < set(kept_by("--method infobatch"))


# ---- smoothing


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3), min_size=1, max_size=8),
       st.floats(0.05, 0.99) | st.just(1.0), st.floats(0, 3))  # fmt: skip
def test_smoothing_agrees_with_the_weights_written_out(rounds, alpha, c):
    """EMA + c·SD as of pandas' ewm(alpha, adjust=False). The state is saved and loaded between rounds."""
    state, rounds = {}, np.array(rounds, dtype=np.float32)
    for n in range(1, len(rounds) + 1):
        smooth, history = Smoother(alpha, c), rounds[:n].astype(float)
        smooth.state = state
        weights = np.array([(1 - alpha) ** (n - 1)] + [alpha * (1 - alpha) ** (n - 1 - i) for i in range(1, n)])
        mean, correction = weights @ history, 1 - weights @ weights
        deviation = np.sqrt(weights @ (history - mean) ** 2 / correction) if correction > 1e-12 else 0
        np.testing.assert_allclose(smooth(rounds[n - 1]), mean + c * deviation, rtol=1e-5, atol=2e-6)
        state = smooth.state
