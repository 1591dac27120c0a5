"Differences, their intervals and p-values: scipy's tests, the error of test examples, Holm, censored times"
import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_ind, ttest_rel

from cramlit.evaluation.glue import Examples, Task, always_the_same, linear_model
from cramlit.evaluation.protocol import DRAWS, resampled, summary
from cramlit.evaluation.statistics import difference, headline_difference, holm, median_text, sampling_error


def seeds(*values, first=0):
    return pd.Series(values, range(first, first + len(values)))


def test_equal_seeds_are_pairs_and_others_are_welchs():
    a, b = seeds(4.9, 5.1, 5.0, 5.3), seeds(5.4, 5.6, 5.9, 5.7)
    for theirs, test in ((b, ttest_rel(a, b)), (seeds(*b, first=7), ttest_ind(a, b, equal_var=False)),
                         (b[:3], ttest_ind(a, b[:3], equal_var=False))):
        d = difference(a, theirs)
        assert d.change == pytest.approx(a.mean() - theirs.mean()) and d.p == pytest.approx(test.pvalue)
        assert (d.low, d.high) == pytest.approx(tuple(test.confidence_interval()))
    assert difference(a[[2, 0, 3, 1]], b) == pytest.approx(difference(a, b))  # by seed, not by place


def test_a_lost_seed_ends_the_pairs_and_what_does_not_scatter_has_no_p():
    a, b = seeds(4.9, 5.1, float('nan')), seeds(5.4, 5.6, 5.9)
    assert difference(a, b).p == pytest.approx(ttest_ind(a[:2], b, equal_var=False).pvalue)
    constant = seeds(1., 1.)
    rounded = seeds(53.3, 53.3, 53.3)
    assert rounded.var() > 0  # by rounding alone
    for d in (difference(seeds(1.), seeds(2.)), difference(constant, constant + 1), difference(seeds(1.), b),
              difference(constant, 2., .3), difference(rounded, 50., .3)):
        assert np.isnan([d.low, d.high, d.p]).all() and not np.isnan(d.change)
    assert np.isnan(difference(seeds(), seeds()).change)


def test_errors_of_examples_widen_an_interval_and_are_known_better_than_seeds():
    a, b = seeds(61., 63., 62.), seeds(58., 59., 60.)
    alone, little, more, mostly = (difference(a, b, e) for e in (0., .5, 2., 50.))
    assert alone.high - alone.low < more.high - more.low and alone.p < more.p
    assert little == alone  # what is known more exactly makes nothing more certain
    assert mostly.high - mostly.low == pytest.approx(2*1.96*50, rel=.02)  # as good as normal


def test_holms_correction():
    p = pd.Series([.04, .001, float('nan'), .03, .9], index=list('abcde'))
    corrected = holm(p)
    assert list(corrected.dropna()) == pytest.approx([.09, .004, .09, .9])
    assert list(corrected.index) == list('abcde')
    twice = holm(pd.Series([.04, .01, float('nan'), .03], index=list('abab')))  # two values of each name
    assert list(twice.dropna()) == pytest.approx([.06, .03, .06]) and np.isnan(twice.iloc[2])
    assert list(holm(pd.Series([.6, .7]))) == [1., 1.] and holm(pd.Series([float('nan')])).isna().all()


def test_equal_things_are_rarely_found_different():
    "The probability of any false discovery among ten comparisons is five per cent, and not twenty"
    rng, found, uncorrected = np.random.default_rng(0), 0, 0
    for _ in range(200):
        values = rng.normal(size=(11, 5))
        p = pd.Series([difference(seeds(*v), seeds(*values[0])).p for v in values[1:]])
        found, uncorrected = found + (holm(p) < .05).any(), uncorrected + (p < .05).any()
    assert found <= 18 < 30 < uncorrected


def task(n=200):
    words = ['river', 'stone']
    e = Examples([f'the old {words[i % 2]} {i}' for i in range(n)], None, [int(i % 10 > 4) for i in range(n)])
    return Task('toy', 2, ('accuracy', 'f1'), e, {'a': e.sample(100), 'b': e.sample(50)})


def test_all_are_judged_on_the_same_draws_and_the_error_is_that_of_the_formula():
    t = task()
    predict = linear_model(t, 0), always_the_same(t)
    runs = [dict(predictions={n: p(e).tolist() for n, e in t.validation.items()}) for p in predict]
    first, second = (resampled(t, [r]) for r in runs)
    assert len(first) == DRAWS and list(resampled(t, runs[:1])) == list(first)
    assert resampled(t, runs) == pytest.approx((first + second)/2)
    plain = Task('plain', 2, ('accuracy',), t.train, {'a': t.validation['a']})
    right = np.mean(np.array(runs[0]['predictions']['a']) == t.validation['a'].labels)
    assert resampled(plain, runs[:1]).std() == pytest.approx(100*(right*(1 - right)/100)**.5, rel=.3)
    assert sampling_error([first], [first]) == 0 < sampling_error([first], [second])


def test_a_summary_keeps_what_a_difference_needs_and_a_baseline_has_no_seeds():
    t = task()
    stamp = dict(commit='', dirty=False, versions={}, hardware='')

    def run(seed, wrong):
        labels = {n: e.labels for n, e in t.validation.items()}
        predictions = {n: [1 - y for y in ys[:wrong]] + ys[wrong:] for n, ys in labels.items()}
        scores = {n: {m: 100. - wrong for m in t.metrics} for n in t.validation}
        return dict(job=dict(seed=seed), diverged=False, scores=scores, predictions=predictions,
                    provenance=stamp)
    rows = [summary(t, f'{n} wrong', [run(s, n + s) for s in range(3)], {})[-1] for n in (5, 25)]
    assert rows[0]['seed_values'] == [95., 94., 93.] and len(rows[0]['resampled']) == DRAWS
    baseline = {k: v for k, v in run(0, 40).items() if k != 'job'}
    base = summary(t, 'majority', [baseline], {})[-1]
    assert 'seed_values' not in base and len(base['resampled']) == DRAWS
    apart = headline_difference([rows[0]], [base])
    assert apart.change == 94 - 60 and apart.p < .001
    assert headline_difference(rows, rows[::-1]).change == 0


def test_a_time_that_was_not_reached_is_longer_than_the_budget_and_never_left_out():
    inf = float('inf')
    assert median_text(seeds(.5, inf, .62)) == '62 % (50 %–> 100 %)'
    assert median_text(seeds(inf, .5)).startswith('> 100 %') and median_text(seeds(inf, inf)) == '> 100 %'
    assert median_text(seeds(.5)) == '50 %' and median_text(seeds()) == ''
