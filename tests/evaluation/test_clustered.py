"""Statistics of seeds and subjects, against numbers computed by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kafjax.core.records import Prediction
from kafjax.evaluation import clustered
from kafjax.evaluation.clustered import Cells, cells, compare, groups, mean, one_seed, t_interval
from kafjax.evaluation.intervals import sign_flip, wilson
from kafjax.evaluation.sweep import crossed_mean


def answers(correct_C: list[list[int]], seed: int | None = None) -> list[Prediction]:
    """One list a subject, one 0 or 1 a question of it. With `seed` the questions are that seed's
    own."""
    own = "" if seed is None else f" of {seed}"
    return [
        Prediction(
            f"{c}.{q}",
            "lora",
            "untrained",
            f"What is {c}.{q}{own}?",
            "",
            (),
            correct=bool(x),
            subject=f"person {c}",
        )
        for c, of_subject in enumerate(correct_C)
        for q, x in enumerate(of_subject)
    ]


def random_cells(
    rng: np.random.Generator, C: int, p: float, seeds: int = 1, each: int = 1
) -> Cells:
    return cells({seed: answers(rng.binomial(1, p, (C, each)).tolist()) for seed in range(seeds)})


def test_cells_sum_by_seed_and_subject():
    found = cells({1: answers([[0, 0], [1]]), 0: answers([[1, 1], [0]])})
    assert (
        found.seeds == (0, 1)
        and found.subjects == ("person 0", "person 1")
        and found.n_questions == 3
    )
    np.testing.assert_array_equal(found.sum_SxC, [[2, 0], [0, 1]])
    np.testing.assert_array_equal(found.count_SxC, [[2, 1], [2, 1]])
    assert clustered.mean_of(found) == 3 / 6


def test_seeds_that_ask_other_questions_have_other_subjects():
    found = cells({0: answers([[1], [0]], seed=0), 1: answers([[1], [1]], seed=1)})
    assert found.subjects == ("0/person 0", "0/person 1", "1/person 0", "1/person 1")
    np.testing.assert_array_equal(found.count_SxC, [[1, 1, 0, 0], [0, 0, 1, 1]])


def test_subject_falls_back_to_gold_passages_and_then_to_the_question():
    about = {"method": "m", "split": "s", "question": "?", "answer": "", "answers": ()}
    assert (
        clustered.subject_of(Prediction("q", **about, gold_passages=("a", "b"), subject="x")) == "x"
    )
    assert clustered.subject_of(Prediction("q", **about, gold_passages=("a", "b"))) == "a b"
    assert clustered.subject_of(Prediction("q", **about)) == "q"


def test_one_seed_and_a_question_a_subject_is_wilson():
    assert mean(cells({0: answers([[1]] * 7 + [[0]] * 3)})) == wilson(7, 10)


def test_asking_the_same_again_buys_no_precision():
    rng = np.random.default_rng(0)
    once_C = rng.binomial(1, 0.6, 200)
    ten = mean(cells({0: answers([[x] * 10 for x in once_C])}))
    half = 1.96 * once_C.std() / np.sqrt(200)  # of the 200 subjects, not of 2000 questions
    assert ten.n == 200 and ten.value == once_C.mean()
    np.testing.assert_allclose([ten.low, ten.high], [ten.value - half, ten.value + half], atol=0.01)
    assert ten.high - ten.low > 2.5 * (
        wilson(once_C.sum() * 10, 2000).high - wilson(once_C.sum() * 10, 2000).low
    )


def test_crossed_seeds_agree_with_the_bootstrap_over_questions():
    rng = np.random.default_rng(1)
    scores_SxQ = rng.binomial(1, np.clip(rng.normal(0.5, 0.2, (6, 1)), 0, 1), (6, 80))
    found, expected = (
        mean(cells({s: answers(row[:, None].tolist()) for s, row in enumerate(scores_SxQ)})),
        crossed_mean(scores_SxQ),
    )
    np.testing.assert_allclose(
        [found.value, found.low, found.high],
        [expected.value, expected.low, expected.high],
        atol=0.015,
    )


@pytest.mark.parametrize(
    ("correct_C", "low", "high"),
    [([[1, 1], [1]], wilson(2, 2).low, 1.0), ([[0], [0, 0]], 0.0, wilson(0, 2).high)],
)
def test_all_or_nothing_keeps_a_width_of_that_many_subjects(correct_C, low, high):
    found = mean(cells({0: answers(correct_C), 1: answers(correct_C)}))
    assert (found.low, found.high, found.n) == (low, high, 2)


def test_one_subject_has_no_interval_and_none_no_value():
    assert mean(cells({0: answers([[1, 0]])})).low is None
    assert mean(cells({})).value is None


def test_sign_flip_by_hand():
    assert sign_flip(np.array([1.0, 1.0, 1.0])) == 2 / 8  # all plus or all minus
    # 2 + 0 twice, 2 + 2, but not 2 - 2; and all of that negated
    assert sign_flip(np.array([2.0, 1.0, -1.0])) == 6 / 8
    assert sign_flip(np.zeros(5)) == 1.0 and sign_flip(np.ones(1)) == 1.0


@pytest.mark.parametrize("C", [5, 11, 60])
def test_sign_flip_is_scipys_permutation_test(C):
    difference_C = np.random.default_rng(C).normal(0.4, 1, C)
    expected = stats.permutation_test(
        (difference_C,),
        np.mean,
        permutation_type="samples",
        n_resamples=9999,
        rng=np.random.default_rng(5),
    )
    assert sign_flip(difference_C) == pytest.approx(
        expected.pvalue, abs=1e-12 if C <= 11 else 0.015
    )


def test_sign_flip_keeps_its_level_where_questions_hang_together():
    """Two arms that are alike; each answers all ten questions about a subject, or none. McNemar
    over questions would cry wolf."""
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(300):
        a, b = ([[x] * 10 for x in rng.binomial(1, 0.5, 12)] for _ in range(2))
        (found,) = compare([(cells({0: answers(a)}), cells({0: answers(b)}))])
        p_values.append(found.p_value)
    assert np.mean(np.array(p_values) < 0.05) < 0.08


def test_difference_by_hand():
    a, b = (
        cells({0: answers([[1, 1], [1, 0], [1, 1]])}),
        cells({0: answers([[0, 0], [1, 0], [0, 1]])}),
    )
    (found,) = compare([(a, b)])
    assert found.difference.value == 3 / 6 and found.difference.n == 3
    # differences 2, 0, 1: the first and the last of one sign, the second of any
    assert found.p_value == 4 / 8 == found.p_holm
    assert found.verdict == "undecided"


def test_smallest_difference_follows_the_formula():
    rng = np.random.default_rng(3)
    a, b = random_cells(rng, 400, 0.5), random_cells(rng, 400, 0.5)
    (found,) = compare([(a, b)])
    spread = (a.sum_SxC - b.sum_SxC).std() / np.sqrt(400)
    assert found.smallest == pytest.approx(
        (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * spread, rel=0.05
    )


def test_verdicts_and_holm_over_all_pairs():
    rng = np.random.default_rng(4)
    base, better = (
        answers(rng.binomial(1, 0.3, (300, 1)).tolist()),
        answers(rng.binomial(1, 0.6, (300, 1)).tolist()),
    )
    nearly = [*base[:297], *better[297:]]
    arms = [cells({0: one}) for one in (better, nearly)]
    up, same = compare([(arm, cells({0: base})) for arm in arms])
    assert (up.verdict, same.verdict) == ("greater", "equivalent")
    assert up.p_holm == pytest.approx(2 * up.p_value) and same.p_holm == same.p_value
    assert compare([(cells({0: base}), arms[0])])[0].verdict == "less"


def test_arms_that_never_differ_are_equal_only_if_they_were_asked_enough():
    # the upper 95% limit of 0 in 20 is 14%, of 0 in 100 it is 3%
    for C, verdict in ((20, "undecided"), (100, "equivalent")):
        arm = cells({0: answers([[c % 2] for c in range(C)])})
        (found,) = compare([(arm, arm)])
        assert found.verdict == verdict and found.difference.high == pytest.approx(
            stats.binomtest(0, C).proportion_ci(0.95).high
        )


def test_a_single_seed_in_common_is_what_is_compared():
    a = cells({0: answers([[1], [1]]), 1: answers([[0], [0]])})
    b = cells({1: answers([[1], [0]]), 2: answers([[1], [1]])})
    assert compare([(a, b)])[0].difference.value == -0.5


@pytest.mark.parametrize(
    ("b", "message"),
    [({1: [[1], [1]]}, "share a seed"), ({0: [[1], [1], [1]]}, "same questions")],
)
def test_arms_that_cannot_be_paired_are_refused(b, message):
    with pytest.raises(ValueError, match=message):
        compare(
            [(cells({0: answers([[1], [1]])}), cells({s: answers(rows) for s, rows in b.items()}))]
        )


def test_groups_share_a_letter_where_nothing_separates_them():
    rng = np.random.default_rng(5)
    low, high, other = (random_cells(rng, 200, p) for p in (0.2, 0.8, 0.8))
    assert groups([low, high, other]) == ["b", "a", "a"]


def test_t_interval_is_scipys():
    values = [1.2, 0.9, 1.4, 1.1]
    found, expected = t_interval(values), stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high])
    assert t_interval([2.0]).low is None and t_interval([]).value is None


def test_values_of_one_run_are_summed_by_subject():
    arm = one_seed([1.0, 0.0, 3.0], ["a", "b", "a"])
    assert (arm.subjects, arm.sum_SxC.tolist(), arm.count_SxC.tolist()) == (
        ("a", "b"),
        [[4.0, 0.0]],
        [[2.0, 1.0]],
    )
    with pytest.raises(ValueError, match="2 values for 1 subjects"):
        one_seed([1.0, 2.0], ["a"])


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(60):
        level = rng.uniform(0.2, 0.8, 30)
        scores = (rng.uniform(size=(30, 4)) < level[:, None]).astype(float).ravel()
        interval = mean(one_seed(scores.tolist(), [str(i) for i in np.repeat(np.arange(30), 4)]))
        covered += interval.low <= 0.5 <= interval.high
    assert covered >= 51  # 95% of 60 is 57


def test_a_difference_in_one_subject_alone_is_no_difference():
    subjects = [str(i) for i in np.repeat(np.arange(12), 8)]
    a, b = np.ones(96), np.ones(96)
    b[:8] = 0
    one = difference_of(a, b, subjects)
    assert (
        one.verdict != "greater"
        and one.p_value == 1.0
        and one.difference.value == pytest.approx(1 / 12)
    )
    b[::2] = 0
    many = difference_of(a, b, subjects)
    assert (
        many.verdict == "greater"
        and many.p_value < 0.01
        and difference_of(b, a, subjects).verdict == "less"
    )
    assert difference_of(a, a, [str(i) for i in range(96)]).verdict == "equivalent"


def difference_of(a, b, subjects):
    return compare([(one_seed(a.tolist(), subjects), one_seed(b.tolist(), subjects))])[0]


def test_a_mean_of_counts_is_no_share():
    found = mean(one_seed([100.0, 200.0, 360.0], ["a", "b", "c"]))
    assert found.value == 220 and 100 <= found.low < 220 < found.high <= 360
    same = mean(one_seed([7.0, 7.0], ["a", "b"]))
    assert (same.low, same.value, same.high) == (7, 7, 7)


@pytest.mark.parametrize(("wins", "losses"), [(5, 0), (6, 0), (8, 2), (1, 9)])
def test_with_a_question_a_subject_flipping_signs_is_mcnemars_exact_test(wins, losses):
    won, lost = answers([[1]] * wins + [[0]] * losses), answers([[0]] * wins + [[1]] * losses)
    (compared,) = compare([(cells({0: won}), cells({0: lost}))])
    tail = 2 * stats.binom.cdf(min(wins, losses), wins + losses, 0.5)
    assert compared.p_value == pytest.approx(min(1.0, tail))


def test_a_clear_difference_of_fractions_is_seen_both_ways():
    rng = np.random.default_rng(6)
    f1, names = rng.uniform(0.4, 0.6, 60), [f"person {i}" for i in range(60)]
    better = one_seed((f1 + 0.1).tolist(), names)
    worse = one_seed((f1 + rng.uniform(-0.1, 0.1, 60)).tolist(), names)
    verdicts = [one.verdict for one in compare([(better, worse), (worse, better)])]
    assert verdicts == ["greater", "less"]


@pytest.mark.parametrize("C", [6, 12])
def test_the_interval_covers_the_mean_where_subjects_are_few(C):
    """Plain percentiles of 6 subjects cover 87%; `_tail` makes up for it."""
    rng = np.random.default_rng(C)
    covered = []
    for _ in range(400):
        chance_C = rng.beta(2, 2, C)  # mean 0.5; a subject's four questions hang together
        found = mean(cells({0: answers([rng.binomial(1, p, 4).tolist() for p in chance_C])}))
        covered.append(found.low <= 0.5 <= found.high)
    assert np.mean(covered) >= 0.93


def test_few_subjects_show_nothing_and_have_wide_intervals():
    """Two subjects that agree are no proof, and neither are two that differ in one direction."""
    alike = mean(cells({0: answers([[1, 1, 0], [1, 0, 1]])}))
    assert (alike.low, alike.high) == pytest.approx((wilson(4 / 3, 2).low, wilson(4 / 3, 2).high))
    good, bad = answers([[1, 1, 1], [1, 1, 0]]), answers([[0, 0, 0], [0, 0, 0]])
    (compared,) = compare([(cells({0: good}), cells({0: bad}))])
    assert compared.verdict == "undecided" and compared.smallest is None
    assert compared.difference.low < 0 < compared.difference.value <= compared.difference.high


def test_many_subjects_that_agree_have_no_interval_of_width_zero():
    found = mean(cells({0: answers([[1, 0]] * 20)}))
    assert found.value == 0.5 and found.low < 0.35 and found.high > 0.65
