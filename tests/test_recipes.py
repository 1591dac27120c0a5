"Recipes against one another: the same question for all, the ladder, and what is judged by its loss alone"
from dataclasses import replace

import numpy as np
import pytest
import torch

from cramlit.reporting.beyond import ablation_table, reached, recipes_table
from cramlit.core.recipes import CramlitError, UsageError, override
from cramlit.data.batches import VALIDATION_RATE, mask_for_validation, validation_batches
from cramlit.data.masking import IGNORE
from cramlit.data.packing import open_data
from cramlit.experiments.comparison import best_rates, recipes_to_compare, ablation_trials, rate_trials, recipe_trials, steps_between, with_data
from cramlit.core.scales import RECIPES, SCALES, get_recipe, get_scale
from cramlit.experiments.search import Trial, has_stock, run_trials


def small(trial, text):
    "A trial on the session's small text"
    return replace(trial, settings=(f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128', *trial.settings, 'validation.max_sequences=64'))


def test_validation_asks_the_same_whatever_a_recipe_trains_with(data, recipe):
    other = override(recipe, ['masking.rate=0.3', 'masking.replace_mask=0.5', 'masking.max_predictions=38', 'seed=7',
                              'batch.micro_batch_size=16', 'batch.global_batch_size=16'])
    for a, b in zip(validation_batches(open_data(data), recipe), validation_batches(open_data(data), other), strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.labels, b.labels)


def test_what_is_hidden_is_all_masks_at_the_rate_and_never_special():
    special, rng = dict(pad=0, unk=1, cls=2, sep=3, mask=4), np.random.default_rng(0)
    ids = rng.integers(5, 900, (400, 64)); ids[:, 0], ids[:, 60], ids[:, 61:] = 2, 3, 0
    m = mask_for_validation(ids, special)
    used = m.labels != IGNORE
    rows, slots = np.nonzero(used)
    assert (m.input_ids[rows, m.positions[rows, slots]] == special['mask']).all() and (ids[rows, m.positions[rows, slots]] == m.labels[used]).all()
    assert (m.input_ids != ids).sum() == used.sum() == pytest.approx(VALIDATION_RATE*400*59, rel=.05) and m.labels[used].min() > 4


def test_a_place_in_a_text_is_hidden_or_not_however_rows_are_cut():
    special, text = dict(pad=0, unk=1, cls=2, sep=3, mask=4), np.random.default_rng(1).integers(5, 900, 4096)
    short, long = (mask_for_validation(text.reshape(-1, n), special).input_ids == 4 for n in (32, 64))
    inside = np.arange(4096) % 32
    inside = (inside > 1) & (inside < 30)
    assert (short.ravel() == long.ravel())[inside].all() and long.any()


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('top', [n for n in RECIPES if n != '24hbert'])
def test_the_ladder_ends_at_the_other_recipe(scale, top):
    a, b = get_recipe('24hbert', scale), get_recipe(top, scale)
    steps = steps_between(a, b)
    assert replace(override(a, [s for part in steps.values() for s in part]), name=top) == b
    trials = ablation_trials('24hbert', top, scale)
    assert len({repr(t.recipe) for t in trials}) == len(trials) == (2*len(steps) if len(steps) > 2 else len(steps) + 1)*get_scale(scale).comparison.ablation_seeds


def test_a_difference_that_no_step_takes_is_refused():
    with pytest.raises(UsageError, match='differ in corpus.holdout'): steps_between(get_recipe('24hbert'), get_recipe('modern', 'paper', ['corpus.holdout=0.3']))


def test_recipes_take_turns_and_one_alone_gets_an_opponent():
    assert [t.base for t in recipe_trials({'24hbert': 1e-3, 'modern': 2e-3}, 'tiny')] == ['24hbert', 'modern']*2
    assert {t.recipe.optim.lr for t in rate_trials(['bert-base'], 'laptop')} == set(get_scale('laptop').comparison.lrs)
    assert recipes_to_compare(['24hbert']) == ['24hbert', 'modern'] == recipes_to_compare(['modern']) and recipes_to_compare(['a', 'b', 'c']) == ['a', 'b', 'c']
    with pytest.raises(CramlitError, match='no learning rate gave x'): best_rates([dict(metric='validation_loss', recipe='x', lr=1., value=None)])


def test_a_network_without_a_stock_class_is_judged_by_its_loss(text, tmp_path):
    odd = small(Trial('a gate', '24hbert', 'tiny', ('model.ffn=geglu', 'packing.mode=stream'), 42), text)
    plain = small(Trial('plain', '24hbert', 'tiny', (), 42), text)
    assert not has_stock(odd.recipe.model) and has_stock(plain.recipe.model)
    trials = with_data([odd, plain], tmp_path/'data')
    assert trials[0].data != trials[1].data
    rows = run_trials(trials, 'ladder', tmp_path/'data', tmp_path/'out', replace(get_scale('tiny').trials, steps=2, tasks=()))
    loss = {r['trial']: r['value'] for r in rows if r['metric'] == 'validation_loss'}
    assert set(loss) == {'a gate', 'plain'} and len(list((tmp_path/'out').rglob('model.safetensors'))) >= 1
    assert not (next(p for p in (tmp_path/'out').rglob('run.json') if 'geglu' in p.read_text()).parent/'model').exists()


def test_a_mark_that_is_never_reached_is_said_so(tmp_path):
    from cramlit.core.results import result_row
    def run(name, seed, losses):
        folder = tmp_path/f'{name}{seed}'/'run'; folder.mkdir(parents=True)
        (folder/'metrics.jsonl').write_text('\n'.join(f'{{"step": {i}, "seconds": {10*i}, "validation_loss": {x}}}' for i, x in enumerate(losses)))
        ids = dict(stage='trial', study='recipes', trial=name, recipe=name, seed=seed, global_batch_size=1, lr=1., warmup=0., schedule_length=1.,
                   stopped='', folder=f'{name}{seed}')
        return [result_row(m, v, '', **ids) for m, v in dict(validation_loss=losses[-1], steps=2, seconds=20., tokens_per_second=1.).items()]
    rows = [*run('a', 1, [7, 6, 5]), *run('b', 1, [7, 5, 4]), *run('b', 2, [7, 7, 6])]
    assert reached(tmp_path/'b1'/'run', 6.) == pytest.approx(.25) and recipes_table(rows, tmp_path).loc['b', 'part of its time to the loss of a'] == '50% (1 of 2 never)'
    ablation = [r | dict(study='ladder', trial={'a': 'a', 'b': '+ x'}[r['trial']]) for r in rows]
    assert ablation_table(ablation).loc['+ x', 'change'] == '+0.000'
