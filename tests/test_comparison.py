"Recipes compared: validation, the ablation, networks without a stock class, and statistics over seeds"
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config

from cramlit.core.recipes import RECIPES, CramlitError, UsageError, override
from cramlit.core.results import read_rows, result_row, write_rows
from cramlit.core.scales import SCALES, get_recipe, get_scale
from cramlit.data.batches import RULERS, VALIDATION_RATE, mask_for_validation, validation_batches
from cramlit.data.masking import IGNORE
from cramlit.data.packing import open_data, prepare
from cramlit.experiments import comparison, search
from cramlit.experiments.comparison import (
    ablation_trials,
    against,
    axes,
    compare,
    compare_recipes,
    curves_by_trial,
    reached,
    recipe_trials,
    recipes_to_compare,
    run_budgets,
    run_tuning,
    steps_between,
    tuned_settings,
    tuning_trials,
    with_data,
)
from cramlit.experiments.search import Curve, Trial, has_stock, run_trials, trial_table
from cramlit.reporting.studies import (
    ablation_table,
    about_steps,
    at_edge,
    choices_table,
    comparison_table,
    ends_of,
    figure_budgets,
    figure_by_time,
    figure_schedules,
    first_trial,
    same_seeds,
    seeds_and_seconds,
    write_budgets,
    write_comparison,
    write_tuning,
)

SPECIAL = dict(pad=0, unk=1, cls=2, sep=3, mask=4)


def small(trial, text):
    "A trial on the session's small text"
    settings = f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128'
    return replace(trial, settings=(*settings, *trial.settings, 'validation.max_sequences=64'))


def test_validation_is_the_same_whatever_a_recipe_trains_with(data, recipe):
    other = override(recipe, ['masking.rate=0.3', 'masking.replace_mask=0.5', 'masking.max_predictions=38',
                              'seed=7', 'batch.micro_batch_size=16', 'batch.global_batch_size=16'])
    for ruler in RULERS:
        batches = (validation_batches(open_data(data), r, ruler) for r in (recipe, other))
        for a, b in zip(*batches, strict=True):
            assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)


def scored(data, recipe, ruler):
    "The sequences that a recipe is validated on, and of each the tokens that are asked for"
    found = []
    for b in validation_batches(data, recipe, ruler):
        for ids, positions, labels in zip(b.input_ids, b.positions, b.labels, strict=True):
            used = labels != IGNORE
            found.append((ids.tolist(), positions[used].tolist(), labels[used].tolist()))
    return sorted(found)


@pytest.mark.parametrize('scale', ['tiny', 'laptop', 'paper'])
def test_all_recipes_of_a_scale_are_scored_on_the_same_tokens(text, scale, tmp_path):
    "Whatever a recipe's packing, masking, batch and seed; the rows that it packs itself are others"
    small, sets, own = (f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128'), {}, set()
    for i, name in enumerate(RECIPES):
        recipe = get_recipe(name, scale, (*small, f'seed={i}'))
        folder = tmp_path/repr(recipe.packing)
        if not folder.exists(): prepare(recipe, folder)
        data = open_data(folder)
        own.add(data.validation[:].tobytes())
        sets[name] = data.ruler_id, scored(data, recipe, 'tune'), scored(data, recipe, 'report')
    assert len(own) > 1
    ruler, tune, report = sets['24hbert']
    assert all(s == (ruler, tune, report) for s in sets.values())
    assert min(len(tune), len(report)) > 2 and not {str(s) for s in tune} & {str(s) for s in report}


def test_the_half_that_is_reported_is_taken_whole_and_the_other_as_far_as_is_asked(data, recipe):
    data, few = open_data(data), override(recipe, ['validation.max_sequences=3'])
    assert [len(scored(data, few, ruler)) for ruler in RULERS] == [3, len(data.ruler['report']), 3]


def test_the_papers_ruler_takes_as_many_tokens_as_the_official_code(data, recipe):
    data, mask = open_data(data), open_data(data).manifest['special_ids']['mask']
    replaced, asked = 0, 0
    for ids, positions, labels in scored(data, recipe, 'paper'):
        length = sum(i != 0 for i in ids)
        assert len(labels) == min(20, max(1, round(.15*length)))
        asked, replaced = asked + len(labels), replaced + sum(ids[p] == mask for p in positions)
    assert .6 < replaced/asked < .95


def test_texts_with_different_rulers_are_not_compared(text, tmp_path):
    trials = [small(Trial(mode, '24hbert', 'tiny', (f'packing.mode={mode}',), 42), text)
              for mode in ('document', 'stream')]
    folder = with_data(trials, tmp_path)[1].data
    np.save(folder/'tune-00000.npy', np.load(folder/'tune-00000.npy')[::-1])
    with pytest.raises(CramlitError, match='different sequences for validation'): with_data(trials, tmp_path)


def test_validation_masks_at_its_rate_and_never_special_tokens():
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 900, (400, 64))
    ids[:, 0], ids[:, 60], ids[:, 61:] = 2, 3, 0
    m = mask_for_validation(ids, SPECIAL)
    used = m.labels != IGNORE
    rows, slots = np.nonzero(used)
    places = m.positions[rows, slots]
    assert (m.input_ids[rows, places] == SPECIAL['mask']).all()
    assert (ids[rows, places] == m.labels[used]).all()
    assert (m.input_ids != ids).sum() == used.sum() == pytest.approx(VALIDATION_RATE*400*59, rel=.05)
    assert m.labels[used].min() > 4


def test_a_place_in_a_text_is_masked_or_not_however_it_is_cut_into_sequences():
    text = np.random.default_rng(1).integers(5, 900, 4096)
    short, long = (mask_for_validation(text.reshape(-1, n), SPECIAL).input_ids == 4 for n in (32, 64))
    inside = np.arange(4096) % 32
    inside = (inside > 1) & (inside < 30)
    assert (short.ravel() == long.ravel())[inside].all() and long.any()


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('high', [n for n in RECIPES if n != '24hbert'])
def test_the_ablation_ends_at_the_other_recipe(scale, high):
    a, b = get_recipe('24hbert', scale), get_recipe(high, scale)
    steps = steps_between(a, b)
    assert replace(override(a, [s for step in steps.values() for s in step]), name=high) == b
    trials = ablation_trials('24hbert', high, scale)
    seeds = get_scale(scale).comparison.ablation_seeds
    variants = 2*len(steps) if len(steps) > 2 else len(steps) + 1
    assert len({repr(t.recipe) for t in trials}) == len(trials) == variants*seeds


def test_each_step_is_compared_with_the_one_before_and_each_omission_with_the_whole():
    trials = ablation_trials('24hbert', 'modern', 'tiny')
    versus = {t.name: t.versus for t in trials}
    names = list(versus)
    up = names[:len(names)//2 + 1]
    assert [versus[n] for n in up] == ['', *up[:-1]]
    assert names[len(up):] and all(versus[n] == up[-1] for n in names[len(up):])


def test_a_difference_that_no_step_takes_is_refused():
    with pytest.raises(UsageError, match='differ in corpus.holdout'):
        steps_between(get_recipe('24hbert'), get_recipe('modern', 'paper', ['corpus.holdout=0.3']))


def test_recipes_take_turns_and_one_alone_gets_another_to_be_compared_with():
    trials = recipe_trials({'24hbert': (), 'modern': ('optim.lr=2e-3',)}, 'tiny')
    assert [(t.base, t.versus) for t in trials] == [('24hbert', ''), ('modern', '24hbert')]*2
    trials = recipe_trials({'24hbert': ('optim.lr=4e-3',), 'modern': ()}, 'tiny')[:3]
    assert [t.name for t in trials] == ['24hbert', '24hbert, not tuned', 'modern']
    assert [t.versus for t in trials] == ['', '24hbert', '24hbert']
    assert recipes_to_compare(['24hbert']) == recipes_to_compare(['modern']) == ['24hbert', 'modern']
    assert recipes_to_compare(['a', 'b', 'c']) == ['a', 'b', 'c']
    with pytest.raises(CramlitError, match='no try gave x'):
        tuned_settings([dict(metric='tuning_loss', recipe='x', settings=[], value=None)])


@pytest.mark.parametrize('scale', ['tiny', 'laptop', 'evening', 'gpu', 'paper'])
def test_every_recipe_has_as_many_tries_on_the_same_axes(scale):
    names, tries = [n for n in RECIPES if n != 'bert-large'], get_scale(scale).comparison.tries
    trials = tuning_trials(names, scale)
    assert [t.base for t in trials] == names*tries
    shared = {axis: values for axis, values in axes('24hbert', scale).items()}
    for name in names:
        mine = [t for t in trials if t.base == name]
        assert len({repr(t.recipe) for t in mine}) == tries and mine[0].name == f'{name}, as it is'
        assert axes(name, scale).items() >= shared.items() and set(shared) == {'peak LR', 'batch', 'warm-up'}
        for t in mine[1:]:
            assert t.recipe.optim.lr in shared['peak LR'] and t.recipe.schedule.warmup in shared['warm-up']
            assert t.recipe.batch.global_batch_size in shared['batch']
        reported = {t.seed for t in recipe_trials({name: ()}, scale)}
        assert not reported & {t.seed for t in mine} and len({t.seed for t in mine}) == 1
        assert ('window' in axes(name, scale)) == (get_recipe(name, scale).model.window > 0)


def test_a_network_without_a_stock_class_is_compared_by_its_loss(text, tmp_path):
    odd = small(Trial('a gate', '24hbert', 'tiny', ('model.ffn=geglu', 'packing.mode=stream'), 42), text)
    plain = small(Trial('plain', '24hbert', 'tiny', (), 42), text)
    assert not has_stock(odd.recipe.model) and has_stock(plain.recipe.model)
    trials = with_data([odd, plain], tmp_path/'data')
    assert trials[0].data != trials[1].data
    t = replace(get_scale('tiny').trials, steps=2, tasks=())
    rows = run_trials(trials, 'ablation', tmp_path/'data', tmp_path/'out', t)
    table = trial_table(rows)
    assert set(table.trial) == {'a gate', 'plain'} and table.validation_loss.notna().all()
    runs = {r['trial']: tmp_path/'out'/'trials'/r['folder']/'run' for r in rows}
    assert not (runs['a gate']/'model').exists() and (runs['plain']/'model'/'model.safetensors').exists()


def test_trials_are_compared_with_what_they_name():
    trials = ('a', '', 5), ('b', 'a', 4), ('c', 'b', 4.5)
    lines = [dict(trial=n, versus=v, validation_loss=mean + e) for n, v, mean in trials for e in (-.1, 0, .1)]
    found = compare(pd.DataFrame(lines))
    assert list(found.index) == ['b', 'c'] and list(found.change) == pytest.approx([-1, .5])
    assert compare(pd.DataFrame(lines[:3])).empty


def test_trials_are_compared_by_pairs_of_seeds_and_with_the_error_of_their_test_examples():
    rng = np.random.default_rng(0)
    lines = []
    for name, versus, gain in (('a', '', 0.), ('b', 'a', .1)):
        for seed in range(3):
            loss, score = 5 - gain + seed + .01*rng.normal(), 50 + gain + seed/10 + .01*rng.normal()
            lines.append(dict(trial=name, versus=versus, seed=seed, validation_loss=loss, task=score))
    found = compare(pd.DataFrame(lines), 'validation_loss', 'task')
    assert list(found.value) == ['validation_loss', 'task'] and (found.p < .05).all()
    alone = compare(pd.DataFrame(lines))
    assert alone.p['b'] < found.p.iloc[0]  # two lines in one table, corrected together
    assert compare(pd.DataFrame(lines).drop(columns='seed')).p['b'] > .8  # the scatter that seeds share
    for line in lines: line['task, draws'] = list(line['task'] + rng.normal(size=100))
    drawn = compare(pd.DataFrame(lines), 'task')
    assert drawn.p['b'] > .5 and drawn.high['b'] - drawn.low['b'] > 1
    lines[-1]['task'] = float('nan')  # stopped early: the pair is gone, and the rest is compared as it is
    assert compare(pd.DataFrame(lines), 'task').change['b'] == pytest.approx(.1, abs=.1)


def make_run(name, seed, losses, versus):
    "The rows of a run with these losses, one in ten seconds"
    ids = dict(stage='trial', study='recipes', trial=name, versus=versus, recipe=name, seed=seed, lr=1.,
               global_batch_size=64, warmup=.06, stopped='')
    end = losses[-1]
    values = dict(validation_loss=end, tuning_loss=end, steps=2, seconds=20., tokens_per_second=1.)
    rows = [result_row(m, v, '', **ids) for m, v in values.items()]
    rows[0]['curve'] = Curve(20., [[10.*i, loss] for i, loss in enumerate(losses)])
    return rows


def test_a_mark_that_is_never_reached_is_said_so_and_is_later_than_all_others():
    rows = make_run('a', 1, [7, 6, 5], '')
    rows += make_run('b', 1, [7, 5, 4], 'a') + make_run('b', 2, [7, 7, 6], 'a')
    fast, slow = curves_by_trial(rows)['b']
    assert reached(fast, 6.) == pytest.approx(.25) and reached(slow, 5.) == float('inf')
    assert reached(fast._replace(budget=40.), 6.) == pytest.approx(.25/2)  # was stopped half-way
    t, column = trial_table(rows), 'time to the loss of a'
    table = comparison_table(t, [], curves_by_trial(rows))
    assert table.loc['b', column] == '> 100 % (50 %–> 100 %)' and table.loc['a', column] == ''
    assert table.loc['a', ['time to 5.5 nats', 'time to 5.0 nats']].tolist() == ['75 %', '100 %']
    assert ablation_table(t).loc['b', 'change'] == '+0.000' and ablation_table(t).loc['a', 'change'] == ''
    rows += make_run('b', 3, [7, 7, 5], 'a')
    table = comparison_table(trial_table(rows), [], curves_by_trial(rows))
    assert table.loc['b', column] == '100 % (50 %–> 100 %)'


def test_loss_and_average_are_corrected_together_and_an_average_has_the_error_of_its_examples():
    rng, rows = np.random.default_rng(0), []
    for name, gain in (('a', 0.), ('b', .5)):
        for s in (1, 2, 3, 4):
            losses = [7, 6, 5 - gain + .01*rng.normal()]
            rows += make_run(name, s, losses, 'a' if name == 'b' else '')
            for task in ('x', 'y'):
                score, draws = 50 + 5*gain + .01*rng.normal(), rng.normal(size=100)
                about = rows[-1] | dict(metric='headline', unit='%', task=task)
                rows.append(about | dict(value=score, resampled=list(score + 3*draws)))
    t, runs = trial_table(rows), curves_by_trial(rows)
    found = comparison_table(t, ['x', 'y'], runs).loc['b']
    assert found['p'] == '< 0.001' and found['change, average'] == '+2.5'
    low, high = map(float, found['95 % interval, average'].split(' to '))
    assert high - low > 1  # the four seeds alone: 0.02
    without = comparison_table(t.drop(columns='x, draws'), ['x', 'y'], runs).loc['b']
    assert without['p, average'] == '< 0.001'


def test_a_run_that_was_stopped_early_is_in_no_mean_and_its_trial_in_no_comparison():
    rows = [r for s in (1, 2) for r in make_run('a', s, [7, 6, 5 + s/10], '')]
    rows += [r for s in (1, 2, 3) for r in make_run('b', s, [7, 5, 4 + s/10], 'a')]
    for r in rows[-5:]: r['stopped'] = 'too slow'
    t = trial_table(rows)
    for table in (comparison_table(t, [], curves_by_trial(rows)), ablation_table(t)):
        assert table.loc['b', 'MLM loss, nats'] == '4.150 ± 0.071' and table.loc['b', 'change'] == ''
    choices = choices_table(t, [])
    assert choices.loc['b', 'MLM loss, nats'] == '4.15 (4.10–4.20)'
    assert choices.loc['b', 'stopped early'] == '1 of 3' and choices.loc['a', 'stopped early'] == ''
    mark = comparison_table(t, [], curves_by_trial(rows)).loc['b', 'time to the loss of a']
    lost = make_run('a', 3, [7, 6.5], '')
    for r in lost: r['stopped'] = 'diverged'
    table = comparison_table(trial_table(rows + lost), [], curves_by_trial(rows + lost))
    assert table.loc['b', 'time to the loss of a'] == mark, 'where a run broke off is no mark'


def test_a_budget_of_which_a_seed_was_stopped_is_in_no_table_but_named(small_scale, tmp_path):
    *_, rows = run_budgets(['24hbert', 'modern'], small_scale, tmp_path/'data', tmp_path/'out')
    for r in rows:
        if r['trial'] == 'modern, 10 steps' and r['seed'] == 43: r['stopped'] = 'too slow'
    files = write_budgets(rows, tmp_path/'figures', [])
    text, gains = (files[n].read_text() for n in (0, 3))
    assert files[3].name == 'budgets_gains.md' and 'modern, 10 steps against' not in gains
    assert '24hbert, 10 steps against' in gains and '| modern, 4 steps' in text
    assert '| modern, 10 steps' not in text and 'Stopped early: modern, 10 steps, seed 43: too slow.' in text
    lost = [r | dict(stopped='too slow') if 'budget' in r else r for r in rows]
    with pytest.raises(CramlitError, match='Stopped early: 24hbert, 4 steps, seed 42: too slow'):
        write_budgets(lost, tmp_path/'none', [])


def test_a_budget_that_lacks_seeds_is_shown_and_nothing_is_claimed_of_it(small_scale, tmp_path):
    *_, rows = run_budgets(['modern'], small_scale, tmp_path/'data', tmp_path/'out')
    fewer = [r for r in rows if (r['trial'], r['seed']) != ('modern, 10 steps', 43)]
    files = write_budgets(fewer, tmp_path/'figures', [])
    text, gains = (files[n].read_text() for n in (0, 3))
    assert '1 of 2 budgets have been run' in text and '| modern, 10 steps ' in text
    assert 'modern, 10 steps: 1 of 2 seeds so far, and nothing is claimed.' in text
    assert 'modern, 4 steps against' in gains and 'modern, 10 steps against' not in gains
    none = [r for r in fewer if (r['trial'], r['seed']) != ('modern, 4 steps', 43)]
    with pytest.raises(CramlitError, match='no budget has been run with all its 2 seeds yet'):
        write_budgets(none, tmp_path/'none', [])


def test_others_are_compared_with_the_first_recipe_whichever_of_its_tries_diverged():
    tries = [('a', 'as it is', None), ('b', 'as it is', 5.), ('a', 'slower', 6.)]
    rows = [dict(metric='tuning_loss', recipe=name, trial=trial, value=x, settings=[trial])
            for name, trial, x in tries]
    assert list(tuned_settings(rows).items()) == [('a', ('slower',)), ('b', ('as it is',))]
    with pytest.raises(CramlitError, match='no try gave a a finite loss'): tuned_settings(rows[:2])


def test_networks_that_share_their_seeds_of_fine_tuning_are_named():
    def rows(trial, *first):
        for seed, n in enumerate(first):
            about = dict(trial=trial, seed=seed, settings=[])
            key = dict(finetune=dict(first_seed=n))
            if n is not None: yield dict(metric='validation_loss', key=key, **about)
            yield dict(metric='headline', **about)
    own, shared, old, one = rows('a', 0, 3), rows('b', 0, 3, 0), rows('c', None, None), rows('d', None)
    note, = same_seeds([*own, *shared, *old, *one])
    assert note.startswith('All seeds of pretraining of b; c were fine-tuned with the same seeds')
    assert same_seeds([*rows('c', None, None)])[0].startswith('All seeds of pretraining were')
    assert not same_seeds([*rows('a', 0, 3), *rows('b', 0, 0)], trials=['a'])


def test_rows_without_curves_are_refused_in_a_sentence():
    rows = [{k: v for k, v in r.items() if k != 'curve'} for r in make_run('a', 1, [7, 6, 5], '')]
    with pytest.raises(CramlitError, match='rows of a are of an earlier version'): curves_by_trial(rows)


def test_each_text_has_its_own_unigram_baseline():
    rows = []
    for name, entropy in (('a', 6.), ('b', 6.5)):
        made = make_run(name, 1, [7, 6, 5], '')
        rows += [*made, made[0] | dict(metric='unigram_entropy', value=entropy)]
    t = trial_table(rows)
    lines = figure_by_time(curves_by_trial(rows), t).axes[0].lines
    found = {line.get_label(): line.get_ydata()[0] for line in lines if 'unigram' in line.get_label()}
    assert found == {'a, unigram baseline': 6., 'b, unigram baseline': 6.5}


def test_more_trials_than_colours_are_all_drawn_and_none_as_another():
    names, rows = 'abcdefgh', []
    for i, name in enumerate(names):
        made = make_run(name, 1, [7, 6, 5], '')
        rows += [*made, made[0] | dict(metric='unigram_entropy', value=6 + i/10)]
    lines = figure_by_time(curves_by_trial(rows), trial_table(rows)).axes[0].lines
    curves = [line for line in lines if line.get_label() in names]
    looks = {(line.get_color(), line.get_linestyle(), line._unscaled_dash_pattern) for line in curves}
    assert len(curves) == len(looks) == sum('unigram' in line.get_label() for line in lines) == len(names)


def test_more_recipes_than_colours_are_all_in_the_figure_of_budgets():
    about = dict(budget=1., span='1 steps', x=50.)
    t = pd.DataFrame([about | dict(trial=f'{name}, 1 steps', recipe=name) for name in 'abcdefgh'])
    figure = figure_budgets(t, ['x'], {})
    assert {text.get_text() for text in figure.legends[0].texts} >= set('abcdefgh')


def test_more_choices_than_colours_are_all_in_the_figure_of_schedules():
    t = pd.DataFrame([dict(trial=name, lr=1e-3*(i + 1), warmup=.1, schedule_length=1.)
                      for i, name in enumerate('abcdefgh')])
    lines = figure_schedules(t).axes[0].lines
    assert [line.get_label() for line in lines] == list('abcdefgh')
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 8


@pytest.fixture
def small_scale(text, monkeypatch):
    "Scale tiny on the session's small text, in this process"
    tiny = SCALES['tiny']
    overrides = (*tiny.overrides, f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128')
    monkeypatch.setitem(SCALES, 'tiny', replace(tiny, overrides=(*overrides, 'validation.max_sequences=64')))
    with parallel_config('sequential'): yield 'tiny'


def test_rows_of_a_shorter_budget_stay_when_a_longer_one_fails(small_scale, tmp_path, monkeypatch):
    budgets = run_budgets(['modern'], small_scale, tmp_path/'data', tmp_path/'out')
    first = next(budgets)
    def fails(models, n, out): raise ValueError('no pairs today')
    monkeypatch.setattr(search, 'pair_results', fails)
    with pytest.raises(CramlitError, match='no pairs today'): next(budgets)
    assert read_rows(tmp_path/'out') == first


def test_rows_of_a_longer_budget_stay_when_a_shorter_one_is_run_again(small_scale, tmp_path, monkeypatch):
    *_, rows = run_budgets(['modern'], small_scale, tmp_path/'data', tmp_path/'out')
    lost = {r['result'] for r in rows if r['trial'] == 'modern, 4 steps'}
    for path in (tmp_path/'out'/'trials').glob('*.json'):
        if path.stem in lost: path.unlink()
    def fails(recipe, *rest, **more): raise ValueError('no luck today')
    monkeypatch.setattr(search, 'pretrain', fails)
    with pytest.raises(CramlitError, match='no luck today'):
        next(run_budgets(['modern'], small_scale, tmp_path/'data', tmp_path/'out'))
    assert read_rows(tmp_path/'out') == [r for r in rows if r['trial'] != 'modern, 4 steps']
    assert read_rows(tmp_path/'out'/'superseded'/'1'/'rows.jsonl') == rows


def test_a_study_that_lacks_seeds_or_its_first_trial_says_so():
    rows = [r for seed in (1, 2) for r in make_run('a', seed, [7, 6, 5], '')]
    rows += make_run('b', 1, [7, 6, 4], 'a')
    assert seeds_and_seconds(trial_table(rows)).startswith('2 seeds (**not finished**: so far b: 1), 20 s')
    alone = trial_table([r for r in rows if r['trial'] == 'a'])
    assert seeds_and_seconds(alone, 2).startswith('2 seeds, 20 s each')
    assert seeds_and_seconds(alone, 3).startswith('3 seeds (**not finished**: so far a: 2), 20 s')
    other = trial_table([r for r in rows if r['trial'] == 'b'])
    assert seeds_and_seconds(other).startswith('1 seed (**not finished**: so far a: 0), 20 s')
    assert first_trial(trial_table(rows)) == 'a'
    with pytest.raises(CramlitError, match='a, which the others are compared with, has no finished run'):
        first_trial(trial_table([r for r in rows if r['trial'] == 'b']))


def test_a_step_is_named_after_what_changes():
    recipes = {name: get_recipe(name, 'laptop') for name in ('24hbert', 'bert-base', 'mosaicbert', 'modern')}
    steps = {name: list(steps_between(recipes['24hbert'], r)) for name, r in recipes.items()}
    assert {'Muon', 'no dropout', 'more masks, all [MASK]'} <= set(steps['modern'])
    assert 'Muon' not in steps['bert-base'] and 'optimizer' in steps['bert-base']
    assert 'more masks, all [MASK]' not in steps['mosaicbert'] and 'masks' in steps['mosaicbert']
    assert not {'norms and biases', 'masks', 'optimizer', 'packing'} & set(steps['modern'])
    back = steps_between(recipes['modern'], recipes['24hbert'])
    assert {'a random start', 'optimizer', 'dropout'} <= set(back) and 'a start from counts' not in back


def test_notes_of_the_ablation_are_of_the_steps_that_it_has():
    def note(low, high, scale):
        return about_steps([t.__dict__ | dict(trial=t.name) for t in ablation_trials(low, high, scale)])[0]
    assert 'another rate for AdamW' in note('24hbert', 'modern', 'laptop')
    assert 'Muon' not in note('24hbert', 'bert-base', 'laptop')
    assert 'another rate for AdamW' not in note('24hbert', 'modern', 'gpu')
    for low, high in (('24hbert', 'modern'), ('modern', '24hbert')):
        t = pd.DataFrame([dict(trial=x.name) for x in ablation_trials(low, high, 'laptop')])
        assert ends_of(t) == ['24hbert', 'modern']


def test_the_best_try_at_an_edge_is_named():
    tries = [dict(recipe='a', trial='a, as it is', lr=1e-4, global_batch_size=64, warmup=0., tuning_loss=5.),
             dict(recipe='a', trial='a, peak LR 0.002, window 4', lr=2e-3, global_batch_size=64, warmup=.06,
                  tuning_loss=4.)]
    t = pd.DataFrame(tries)
    assert at_edge(t, 'window', [4, 8, 16]) == ['a (window 4)'] and not at_edge(t, 'window', [2, 4, 8])
    assert at_edge(t, 'batch', [64, 128]) == ['a (batch 64)']
    assert not at_edge(t, 'peak LR', [.001, .002, .004])
    plain = t[:1]
    assert at_edge(plain, 'peak LR', [.001, .002]) == ['a (peak LR 0.0001)']
    assert not at_edge(plain, 'window', [4, 8]) and not at_edge(plain, 'warm-up', [0., .06])


def test_a_study_goes_on_from_the_rows_of_another_machine(small_scale, tmp_path, monkeypatch, capsys):
    *_, rows = run_budgets(['modern'], small_scale, tmp_path/'data', tmp_path/'there')
    one = [r['trial'] == 'modern, 10 steps' and r['seed'] == 43 for r in rows]
    there = [r for r, last in zip(rows, one, strict=True) if not last]
    half = [r for r, last in zip(rows, one, strict=True) if last][:2]  # of a result that was cut off
    write_rows(tmp_path/'known'/'here.jsonl', [*there, *there, *half])
    trained, real = [], search.pretrain
    def pretrain(recipe, *rest, **more):
        trained.append((recipe.seed, more['steps']))
        return real(recipe, *rest, **more)
    monkeypatch.setattr(search, 'pretrain', pretrain)
    *_, again = run_budgets(['modern'], small_scale, tmp_path/'data', tmp_path/'here')
    assert trained == [(43, 10)] and not (tmp_path/'here'/'jobs').exists()  # nor anything from scratch
    assert 'of 2 trials 1 are known' in capsys.readouterr().err
    def of_the_clock(r): return r['metric'].endswith(('seconds', 'per_second')) or 'memory' in r['metric']
    def told(rows): return [{k: v for k, v in r.items() if k != 'curve'} for r in rows if not of_the_clock(r)]
    assert told(again) == told(rows) and len(again) == len(rows)


def test_what_a_budget_buys_is_drawn_after_each_budget_and_again_to_the_last_digit(small_scale, tmp_path):
    pages, counts = [], []
    for name in 'ab':
        for rows in run_budgets(['modern'], small_scale, tmp_path/'data', tmp_path/name):
            files = write_budgets(rows, tmp_path/f'figures {name}', [])
            counts.append(files[0].read_text().count('1 of 2 budgets have been run'))
        pages.append({f.name: f.read_bytes() for f in files})
    assert counts == [1, 0]*2 and pages[0] == pages[1]
    table = pd.read_csv(tmp_path/'figures a'/'budgets.csv', index_col=0)
    assert list(table.index) == ['majority', 'bag-of-words', 'bigrams', 'trigrams',
                                 'modern, from scratch', 'modern, 4 steps', 'modern, 10 steps']
    gains = pd.read_csv(tmp_path/'figures a'/'budgets_gains.csv', index_col=0)
    scratch = 'modern, 10 steps against modern, from scratch'
    assert list(gains.index) == [f'average of the tasks: {scratch}',
                                 'average of the tasks: modern, 10 steps against bag-of-words',
                                 f'minimal pairs: {scratch}',
                                 'minimal pairs: modern, 10 steps against trigrams']
    assert list(table['minimal pairs, %'].notna()) == [False, False, True, True, True, True, True]
    rows, trials = read_rows(tmp_path/'a'), sorted((tmp_path/'a'/'trials').glob('*.json'))
    before = [p.stat().st_mtime_ns for p in trials]
    again = list(run_budgets(['modern'], small_scale, tmp_path/'data', tmp_path/'a'))
    assert again[-1] == rows and [p.stat().st_mtime_ns for p in trials] == before  # nothing is run twice


def test_a_rate_is_chosen_by_as_many_seeds_from_scratch_as_for_a_pretrained_network(
        small_scale, tmp_path, monkeypatch):
    tiny, asked = SCALES[small_scale], []
    monkeypatch.setitem(SCALES, small_scale, replace(tiny, finetune=replace(tiny.finetune, lrs=(1e-3, 5e-3))))
    def best_runs(runs):
        asked.append({(r['job']['lr'], r['job']['seed']) for r in runs})
        return real(runs)
    real = comparison.best_runs
    monkeypatch.setattr(comparison, 'best_runs', best_runs)
    *_, rows = run_budgets(['modern'], small_scale, tmp_path/'data', tmp_path/'out')
    each, budgets = tiny.finetune.seeds, tiny.comparison.budget_seeds
    assert asked == [{(lr, seed) for lr in (1e-3, 5e-3) for seed in range(i*each, (i + 1)*each)}
                     for i in range(budgets)]
    said = write_budgets(rows, tmp_path/'figures', [])[0].read_text()
    assert 'best of the rates 0.001, 0.005, chosen by the score itself' in said


def test_one_trial_is_compared_with_several_and_a_baseline_has_no_seeds():
    lines = [dict(trial='x', seed=s, score=50 + s) for s in (1, 2, 3)]
    lines += [dict(trial='y', seed=s, score=48 + s) for s in (7, 8, 9)] + [dict(trial='z', score=40.)]
    found = against(pd.DataFrame(lines), [('x', 'y'), ('x', 'z')], 'score')
    assert list(found.index) == ['x against y', 'x against z']
    assert list(found.change) == [-4, 12] and found.p['x against z'] == pytest.approx(2*.0023, rel=.05)


def test_a_search_and_the_comparison_that_follows_from_it_are_the_same_a_second_time(
        small_scale, tmp_path, monkeypatch):
    "Seconds of calibrated steps: nothing in the tables is of the clock"
    tiny, pages = SCALES[small_scale], []
    seconds = replace(tiny.comparison, steps=0, budget=.4)
    monkeypatch.setitem(SCALES, small_scale, replace(tiny, comparison=seconds))
    timed = []

    def time_steps(trials, study, turns):  # as a quiet machine might, so that nothing here is of the clock
        timed.extend(trials)
        about = dict(median=.04, high=.04, before=0.)
        return [result_row('seconds_per_step', .04, 's', contestant=key, **about) for key in trials]
    monkeypatch.setattr(search, '_time_steps', time_steps)
    for name in 'ab':
        found = run_tuning(['24hbert', 'modern'], small_scale, tmp_path/'data', tmp_path/name/'tuning')
        rows = compare_recipes(tuned_settings(found), small_scale, tmp_path/'data', tmp_path/name/'out')
        files = write_tuning(found, tmp_path/f'figures {name}')
        files += write_comparison(rows, tmp_path/f'figures {name}')
        pages.append({f.name: f.read_bytes() for f in files})
    assert pages[0] == pages[1] and len(pages[0]) == 8
    assert len(timed) == len(set(timed))  # once, for both studies and for both times
    assert {r['value'] for r in rows if r['metric'] == 'steps'} == {10}
    best = {r['recipe']: r for r in sorted((r for r in found if r['metric'] == 'tuning_loss'),
                                           key=lambda r: -r['value'])}
    for r in rows:
        if r['trial'] not in best: continue
        of_search = [s for s in best[r['recipe']]['settings'] if not s.startswith('validation')]
        assert set(of_search) <= set(r['settings'])
    space = {(r['recipe'], r['axis']): r['values'] for r in found if r['stage'] == 'space'}
    assert {axis for _, axis in space} == {'peak LR', 'batch', 'warm-up', 'Muon over AdamW'}
