"The search: trials from text to the best, continued, stopped early, failed; and their tables and figures"
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Semaphore

import pandas as pd
import pytest
import torch
from conftest import PATIENCE
from joblib import parallel_config

from cramlit.core.devices import Precision
from cramlit.core.recipes import RECIPES, CramlitError, UsageError
from cramlit.core.results import locked, read_rows, result_row, write_rows
from cramlit.core.scales import SCALES, get_recipe, get_scale
from cramlit.data.packing import prepare
from cramlit.efficiency import benchmark
from cramlit.experiments import search as s
from cramlit.experiments.search import (
    best,
    choice_trials,
    grid_trials,
    over_seeds,
    parse_grid,
    run_trials,
    trial_table,
)
from cramlit.reporting.studies import about_diverged, write_choices, write_search
from cramlit.running.command import main

TRIALS = replace(get_scale('tiny').trials, steps=2, lengths=(1.,), grid_seeds=1, tasks=())
STOPS = ('validation.stop_loss=0.1', 'validation.stop_after=0.1', 'validation.every=0.2')


def trials_of(text, lrs):
    "A grid on the session's small text"
    small = ('corpus.holdout=0.1', f'corpus.source={text}', 'tokenizer.vocab_size=128',
             'validation.max_sequences=64')
    grid = grid_trials('24hbert', 'tiny', replace(TRIALS, batch_sizes=(32,), lrs=lrs))
    return [replace(t, settings=(*small, *t.settings)) for t in grid]


def values(rows, metric): return [r['value'] for r in rows if r['metric'] == metric]


def test_a_search_from_text_to_table_and_map(tmp_path, capsys):
    out = tmp_path/'out'
    grid = 'batch=16,32 lr=1e-3 warmup=0.06 length=1'  # with two seeds
    args = ['search', '--scale', 'tiny', '--grid', grid, '--budget', '5s', '--out', str(out), '--json']
    assert main(args) == 0
    printed, err = capsys.readouterr()
    rows = [json.loads(line) for line in printed.splitlines()]
    found = [(r['global_batch_size'], r['best_by']) for r in rows if r['metric'] == 'best']
    assert found == [(b, by) for b in (16, 32) for by in ('tuning_loss', 'continuation')]
    assert all((out/f'table3_search.{x}').exists() for x in ('md', 'csv', 'tex'))
    assert (out/'search_grid.svg').exists()
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob('model/model.safetensors')}
    assert len(stamps) == 4 and main(args) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r['value'] for r in again] == [r['value'] for r in rows]
    assert stamps == {p: p.stat().st_mtime_ns for p in out.rglob('model/model.safetensors')}


@pytest.mark.parametrize('args, says', [
    (['--grid', 'lrs=1'], "Did you mean 'lr'?"),
    (['--grid', 'lr=fast'], 'expected numbers'),
    (['--budget', 'soon'], 'expected a duration'),
    (['--grid', 'warmup=2'], 'schedule.warmup=2.0'),
    (['--nproc', '-1'], '--nproc -1: expected a number above zero'),
    (['--recipe', '24hbrt'], "Did you mean '24hbert'?"),
])
def test_mistakes_are_found_before_the_first_run(tmp_path, capsys, args, says):
    out = tmp_path/'out'
    assert main(['search', '--scale', 'tiny', *args, '--out', str(out)]) == 2
    err = capsys.readouterr().err
    assert says in err and 'Traceback' not in err and not out.exists()


def test_a_small_batch_is_one_micro_batch():
    trial, *_ = grid_trials('24hbert', 'tiny', parse_grid('batch=24', TRIALS))
    assert trial.recipe.batch.micro_batch_size == 24


def test_one_bad_trial_does_not_stop_the_others(text, data, tmp_path, monkeypatch):
    trials, real, calls = trials_of(text, (1e-3, 2e-3)), s.pretrain, []
    def pretrain(recipe, *rest, **more):
        calls.append(recipe.optim.lr)
        if recipe.optim.lr == 1e-3 and len(calls) < 4: raise RuntimeError('no luck')
        return real(recipe, *rest, **more)
    monkeypatch.setattr(s, 'pretrain', pretrain)
    with parallel_config('threading', n_jobs=1):
        with pytest.raises(CramlitError, match='(?s)1 of 2 trials failed twice.*LR 0.001.*no luck'):
            run_trials(trials, 'grid', data, tmp_path, TRIALS)
        assert calls == [1e-3, 1e-3, 2e-3]
        assert {r['lr'] for r in read_rows(tmp_path/'rows.jsonl')} == {2e-3}  # what is finished has rows
        rows = run_trials(trials, 'grid', data, tmp_path, TRIALS)
    assert calls == [1e-3, 1e-3, 2e-3, 1e-3] and list(trial_table(rows).lr) == [1e-3, 2e-3]


def test_a_trial_that_does_not_learn_is_stopped_early_and_says_so(text, data, tmp_path):
    trial, = trials_of(text, (1e-3,))
    trial = replace(trial, settings=(*trial.settings, *STOPS))
    rows = run_trials([trial], 'grid', data, tmp_path, replace(TRIALS, steps=10))
    assert values(rows, 'steps')[0] < 10 and not values(rows, 'headline')
    assert 'above 0.1' in rows[0]['stopped']


def test_tables_and_figures_of_a_search_in_which_all_were_stopped_early(text, data, tmp_path):
    trials = [replace(t, settings=(*t.settings, *STOPS)) for t in trials_of(text, (1e-3, 2e-3))]
    figures = tmp_path/'figures'
    longer = replace(TRIALS, steps=10)
    grid = run_trials(trials, 'grid', data, tmp_path/'grid', longer)
    choices = run_trials(trials, 'choices', data, tmp_path/'choices', longer)
    write_search(grid, 'continuation', figures)
    write_choices(choices, figures)
    names = {p.name for p in figures.iterdir()}
    assert {'table3_search.md', 'search_grid.svg', 'table5_choices.md', 'choices_by_time.svg'} <= names
    assert 'no trial was fine-tuned' in (figures/'loss_against_task.svg').read_text()
    for name in ('table3_search', 'table5_choices'):
        note = (figures/f'{name}.md').read_text()
        assert note.count('Stopped early: ') == 2 and note.count('is above 0.1 after') == 2
        assert note.count("of the recipe's own masks") == 1


def test_a_run_stopped_early_in_several_processes_is_not_started_again(text, data, tmp_path, capfd):
    small = ['corpus.holdout=0.1', f'corpus.source={text}', 'tokenizer.vocab_size=128',
             'validation.max_sequences=64', 'batch.micro_batch_size=8', *STOPS]
    args = ['pretrain', '--scale', 'tiny', '--data', str(data), '--out', str(tmp_path), '--steps', '10']
    args += ['--nproc', '2']
    for setting in small: args += ['-o', setting]
    assert main(args) == 1
    err = capfd.readouterr().err
    assert 'validation loss' in err and 'is above 0.1' in err and 'Traceback' not in err
    assert err.count('on 2 × cpu') == 1  # not started again
    assert (tmp_path/'model'/'config.json').exists()


def test_a_batch_that_cannot_be_divided_is_refused_before_the_first_run(text, data, tmp_path):
    with pytest.raises(UsageError, match='8 processes'):
        run_trials(trials_of(text, (1e-3,)), 'grid', data, tmp_path, TRIALS, nproc=8)
    assert not list(tmp_path.iterdir())


def test_trials_in_several_processes_are_the_same_trials(text, data, tmp_path):
    trial, = trials_of(text, (1e-3,))
    settings = 'batch.micro_batch_size=8', 'model.dropout=0', 'model.attention_dropout=0'
    trial = replace(trial, settings=(*trial.settings, *settings))
    alone, both = (run_trials([trial], 'grid', data, tmp_path/str(n), TRIALS, nproc=n) for n in (1, 2))
    assert values(both, 'validation_loss') == pytest.approx(values(alone, 'validation_loss'), rel=1e-3)


def test_a_finished_trial_is_read_under_whatever_name_it_has_today(text, data, tmp_path):
    trial, = trials_of(text, (1e-3,))
    before = run_trials([trial], 'grid', data, tmp_path, TRIALS)
    left = tmp_path/'trials'/before[0]['folder']/'run'/'checkpoints'/'step-00000007'
    left.mkdir(parents=True)  # killed before it could be removed
    run_trials([trial], 'grid', data, tmp_path, TRIALS)
    assert not left.exists()
    for network in (tmp_path/'trials').glob('*/'): shutil.rmtree(network)  # to have the space back
    after = run_trials([replace(trial, name='renamed', versus='other')], 'choices', data, tmp_path, TRIALS)
    assert {(r['study'], r['trial'], r['versus']) for r in after} == {('choices', 'renamed', 'other')}
    labels = 'study', 'trial', 'versus'
    assert [{k: v for k, v in r.items() if k not in labels} for r in after] == \
        [{k: v for k, v in r.items() if k not in labels} for r in before]


STAMP = dict(commit='measured', dirty=False, versions={}, hardware='another machine')


def test_what_has_no_stock_model_keeps_its_checkpoint(text, data, tmp_path):
    trial, = trials_of(text, (1e-3,))
    trial = replace(trial, settings=(*trial.settings, 'model.position=rotary'))
    row, *_ = run_trials([trial], 'grid', data, tmp_path, TRIALS)
    kept = tmp_path/'trials'/row['folder']/'run'
    assert not (kept/'model').exists() and list(kept.glob('checkpoints/*/model.safetensors'))


def test_two_searches_do_not_work_in_one_folder(text, data, tmp_path):
    with locked(tmp_path/'trials'), pytest.raises(UsageError, match='another process works in'):
        run_trials(trials_of(text, (1e-3,)), 'grid', data, tmp_path, TRIALS)


def test_rows_of_other_trials_are_moved_aside_and_named(tmp_path, capsys):
    rows, path = [dict(metric='x', value=1., unit='', result=name) for name in 'ab'], tmp_path/'rows.jsonl'
    for these in (rows[:1], rows): s.keep_rows(path, these)
    assert not (tmp_path/'superseded').exists() and not capsys.readouterr().err
    s.keep_rows(path, rows[1:])
    assert read_rows(path) == rows[1:] and read_rows(tmp_path/'superseded'/'1'/'rows.jsonl') == rows
    assert 'had rows of other trials as well' in capsys.readouterr().err
    path.write_text('{"half')
    s.keep_rows(path, rows)
    assert (tmp_path/'superseded'/'2'/'rows.jsonl').read_text() == '{"half' and read_rows(path) == rows


def test_a_trial_says_where_it_was_measured_and_not_where_it_is_read(text, data, tmp_path, monkeypatch):
    found = result_row('validation_loss', 3., 'nats', stopped='', recipe_hash='x') | STAMP
    score = result_row('headline', 60., '%', task='continuation', resampled=1.) | STAMP
    monkeypatch.setattr(s, 'train_trial', lambda trial, study, run: (run/'checkpoints').mkdir(parents=True)
                        or [found])
    monkeypatch.setattr(s, 'learning_curve', lambda run, before: s.Curve(1., [(1., 3.)]))
    monkeypatch.setattr(s, 'export_all', lambda run, tokenizer: run/'model')
    monkeypatch.setattr(s, 'check_length', lambda model, length: None)
    monkeypatch.setattr(s, 'run_grid', lambda *args: [score])
    with parallel_config('threading', n_jobs=1):
        t = replace(TRIALS, tasks=('acceptability',))
        rows = run_trials(trials_of(text, (1e-3,)), 'grid', data, tmp_path, t)
    assert [r['metric'] for r in rows] == ['validation_loss', 'headline']
    assert all({k: r[k] for k in STAMP} == STAMP for r in rows)


def test_a_trial_is_run_again_when_anything_that_decides_its_result_is_another(
        text, data, tmp_path, monkeypatch):
    ran = []
    def trial_rows(trial, study, folder):
        (folder/'run'/'checkpoints').mkdir(parents=True, exist_ok=True)
        ran.append(folder)
        return [result_row('validation_loss', float(len(ran)), 'nats', curve=[1., [[1., 3.]]])]
    monkeypatch.setattr(s, 'trial_rows', trial_rows)
    other = tmp_path/'other'
    shutil.copytree(data, other)
    manifest = json.loads((other/'manifest.json').read_text())
    (other/'manifest.json').write_text(json.dumps(manifest | dict(unigram_entropy=1.)))
    def loss(data=data, t=TRIALS, nproc=1):
        trial, = trials_of(text, (1e-3,))
        trials = [replace(trial, settings=(*trial.settings, 'batch.micro_batch_size=8'))]
        row, = run_trials(trials, 'grid', data, tmp_path/'out', t, nproc)
        return row['value']
    scored = replace(TRIALS, tasks=('continuation',))
    changed = [dict(data=other), dict(nproc=2), dict(t=replace(TRIALS, steps=3)), dict(t=scored),
               dict(t=replace(scored, tasks=('acceptability',))),
               dict(t=replace(scored, finetune=replace(scored.finetune, max_train=7)))]
    with parallel_config('threading', n_jobs=1):
        assert [loss(), loss()] == [1., 1.]
        for n, change in enumerate(changed, 2): assert [loss(**change), loss(**change)] == [n, n]
        assert loss() == 1. and len(ran) == 7 and len(set(ran)) == 4  # tasks have no run of their own
        others = dict.fromkeys(('torch', 'numpy', 'transformers', 'tokenizers'), '0')
        another = dict(TRAINING_VERSION='next', provenance=lambda: dict(versions=others),
                       choose_precision=lambda device: Precision(torch.float16, 'of another machine'))
        for n, (name, value) in enumerate(another.items(), len(changed) + 2):
            monkeypatch.setattr(s, name, value)
            assert [loss(), loss()] == [n, n], name


def test_other_tasks_cost_no_other_pretraining(text, data, tmp_path):
    trials, t = trials_of(text, (1e-3,)), replace(TRIALS, tasks=('acceptability',))
    with parallel_config('threading', n_jobs=1):
        alone = run_trials(trials, 'grid', data, tmp_path, TRIALS)
        run, = (tmp_path/'trials').glob('*/run')
        before = {p.name: p.stat().st_mtime_ns for p in run.glob('*.jsonl')}
        scored = run_trials(trials, 'grid', data, tmp_path, t)
    assert before and before == {p.name: p.stat().st_mtime_ns for p in run.glob('*.jsonl')}
    assert list((tmp_path/'trials').glob('*/run')) == [run]
    assert values(alone, 'validation_loss') == values(scored, 'validation_loss')
    assert len(values(scored, 'headline')) == 1 and not values(alone, 'headline')


def test_a_search_takes_the_text_that_it_is_given(data, tmp_path):
    trials = grid_trials('24hbert', 'tiny', replace(TRIALS, batch_sizes=(32,), lrs=(1e-3,)))
    assert values(run_trials(trials, 'grid', data, tmp_path, TRIALS), 'steps') == [2]
    run, = tmp_path.rglob('run.json')
    assert json.loads(run.read_text())['recipe']['tokenizer']['vocab_size'] == 128


def test_choices_change_what_they_say():
    t = replace(get_scale('paper').trials, seeds=1)
    changed = {trial.name: trial.recipe for trial in choice_trials('24hbert', 'paper', t)}
    base = get_recipe('24hbert')
    assert changed['the recipe as it is'] == base
    assert changed['schedule twice the budget'].schedule.length == 2
    assert changed['no warm-up'].schedule.warmup == 0
    assert changed['twice the batch'].batch.global_batch_size == 8192
    assert changed['LayerNorm after each block'].model.norm == 'post'
    small = changed['base instead of large'].model
    sizes = small.num_layers, small.hidden_size, small.num_heads, small.intermediate_size
    assert sizes == (12, 768, 12, 3072) and base.model.hidden_size == 1024
    names = {trial.name for trial in choice_trials('bert-base', 'paper', t)}
    assert not names & {'no LayerNorm after the embeddings', 'LayerNorm after each block'}
    with pytest.raises(UsageError, match='norm=post'):
        get_recipe('bert-base', 'tiny', ['model.embedding_norm=false'])


@pytest.mark.parametrize('name', RECIPES)
def test_every_recipe_has_choices_that_are_possible_at_every_scale(name):
    for scale in SCALES:
        trials = choice_trials(name, scale, replace(get_scale(scale).trials, seeds=1))
        assert len({trial.name for trial in trials}) == len(trials) > 5
        for trial in trials: assert trial.recipe


def test_choices_are_compared_with_the_recipe_as_it_is():
    trials = choice_trials('24hbert', 'tiny', replace(TRIALS, seeds=2))
    assert {t.seed for t in trials} == {42, 43}
    assert all(t.versus == ('' if t.name == 'the recipe as it is' else 'the recipe as it is') for t in trials)


def test_a_long_schedule_ends_high(text, data, tmp_path):
    trial, = trials_of(text, (1e-3,))
    lrs = []
    for length in (1, 2):
        longer = replace(trial, settings=(*trial.settings, f'schedule.length={length}', 'schedule.warmup=0'))
        run_trials([longer], 'grid', data, tmp_path/str(length), replace(TRIALS, steps=20), nproc=1)
        log, = (tmp_path/str(length)/'trials').rglob('metrics.jsonl')
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        lrs.append([line['lr'] for line in lines if 'lr' in line][-1])
    assert lrs == pytest.approx([1e-3*(1 - 19/20), 1e-3*(1 - 19/40)])


@pytest.mark.usefixtures('two_workers')
def test_seconds_become_steps_once_and_two_studies_of_the_same_steps_agree_to_the_last_digit(text, tmp_path):
    "Whatever else the machine does: only what was timed before the study knows of time"
    first, *others = trials_of(text, (1e-3, 2e-3))
    wide = replace(first, name='wide', settings=(*first.settings, 'model.intermediate_size=512'))
    trials = [first, *others, wide, replace(first, name='another seed', seed=7)]
    t, data, found = replace(TRIALS, budget=.5, steps=0), tmp_path/'data', {}
    prepare(first.recipe, data)
    for name in 'ab':
        (tmp_path/name).mkdir()
        if name == 'b': shutil.copy(tmp_path/'a'/'calibration.jsonl', tmp_path/'b')
        compared = 'metric', 'trial', 'seed', 'value', 'span', 'kind'
        rows = run_trials(trials, 'grid', data, tmp_path/name, t)
        found[name] = [{k: r.get(k) for k in compared} for r in rows]
    assert found['a'] == found['b']
    times = {r['trial']: r['value'] for r in read_rows(tmp_path/'a'/'calibration.jsonl')}
    assert set(times) == {first.name, 'wide'}  # rates and seeds take the same time
    steps = {r['trial']: r['value'] for r in found['a'] if r['metric'] == 'steps'}
    assert steps == {n: max(1, round(.5/times.get(n, times[first.name]))) for n in (x.name for x in trials)}
    assert {r['value'] for r in found['a'] if r['metric'] == 'seconds'} == {.5}
    assert {r['kind'] for r in found['a'] if r['metric'] == 'tokens_per_second'} == {'calibrated'}
    curves = [s.Curve(*r['curve']) for r in rows if 'curve' in r]
    assert len(curves) == 4 and {curve.budget for curve in curves} == {.5}
    assert {curve.points[-1][0] for curve in curves} == {.5}


def test_a_step_is_timed_again_for_text_of_another_length_and_in_another_precision(
        text, data, tmp_path, monkeypatch):
    trial, = trials_of(text, (1e-3,))
    long = tmp_path/'long'
    shutil.copytree(data, long)
    manifest = json.loads((long/'manifest.json').read_text())
    manifest['packing']['seq_len'] = 64
    (long/'manifest.json').write_text(json.dumps(manifest))
    names = [s._contestant(trial, s.Study('grid', d, TRIALS, 1)) for d in (data, long)]
    monkeypatch.setattr(s, 'choose_precision', lambda device: Precision(torch.float16, 'of another machine'))
    names.append(s._contestant(trial, s.Study('grid', data, TRIALS, 1)))
    assert len(set(names)) == 3


def test_what_was_compiled_on_a_gpu_says_nothing_of_what_is_not(text, data, monkeypatch):
    (trial,), study, found = trials_of(text, (1e-3,)), s.Study('grid', data, TRIALS, 1), []
    monkeypatch.setattr(s, 'pick_device', lambda: torch.device('cuda'))
    monkeypatch.setattr(s, 'choose_precision', lambda device: Precision(torch.bfloat16, 'of a GPU'))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'a GPU')
    for form in ('compiled', 'eager'):
        monkeypatch.setattr(s, 'form_of', lambda device, form=form: form)
        found.append((s._contestant(trial, study), s.trial_key(trial, study, [])))
    (timed, key), (otherwise, other) = found
    assert timed != otherwise and key != other and key['device'] == other['device'] == 'cuda'


@pytest.mark.parametrize('nproc, gpus, shared', [(1, 8, 1), (2, 8, 2), (8, 8, 8), (2, 1, 1)])
def test_a_step_has_as_many_gpus_as_its_trial(nproc, gpus, shared, text, data, monkeypatch):
    timing = benchmark.Timing(get_recipe('24hbert', 'tiny', ['batch.global_batch_size=64',
                                                             'batch.micro_batch_size=8']), 1., .5, 8)
    assert timing.step(shared=shared) == 8/shared + .5
    for module in (s, benchmark): monkeypatch.setattr(module, 'devices', lambda: gpus)
    monkeypatch.setattr(s, 'take_turns', lambda contenders, *_: ({n: [timing] for n in contenders}, {}))
    trial, = trials_of(text, (1e-3,))
    row, = s._time_steps({'name': trial}, s.Study('grid', data, TRIALS, nproc), 1)
    assert row['value'] == 8/shared + .5


def test_a_trial_in_several_processes_knows_what_its_steps_stand_for(text, data, tmp_path):
    trial, = [replace(t, steps=2, settings=(*t.settings, 'batch.micro_batch_size=8'))
              for t in trials_of(text, (1e-3,))]
    study = s.Study('grid', data, replace(TRIALS, budget=30., steps=0), 2)
    rows = s.train_trial(trial, study, tmp_path/'run')
    assert values(rows, 'steps') == [2] and s.learning_curve(tmp_path/'run').points[-1][0] == 30.


def test_a_curve_begins_when_the_first_calibrated_step_does(tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    (run/'run.json').write_text(json.dumps(dict(budget=30., steps=10)))
    lines = [dict(step=step, seconds=99., validation_loss=6. - step/5) for step in (0, 5, 10)]
    (run/'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert [when for when, _ in s.learning_curve(run, 6.).points] == [6., 18., 30.]
    assert [when for when, _ in s.learning_curve(run).points] == [0., 15., 30.]


def test_a_trial_knows_what_goes_before_its_steps(text, data, tmp_path):
    slow, quick = (replace(t, settings=(*t.settings, *more)) for t, more in
                   zip(trials_of(text, (1e-3, 2e-3)), (('model.cooccurrence=3',), ()), strict=True))
    study = s.Study('grid', data, replace(TRIALS, budget=10., steps=0), 1)
    slow, quick = s.calibrate([slow, quick], study, tmp_path/'calibration.jsonl', turns=2)
    assert slow.before > 0 and quick.before == 0 and slow.steps and quick.steps


def test_a_score_with_a_diverged_seed_says_so(text, data, tmp_path, monkeypatch):
    about = dict(task='continuation', resampled=[1.], seeds=2, diverged=True, diverged_seeds=1)
    score = result_row('headline', 60., '%', **about)
    monkeypatch.setattr(s, 'run_grid', lambda *args: [score])
    monkeypatch.setattr(s, 'check_length', lambda model, length: None)
    trial, = trials_of(text, (1e-3,))
    study = s.Study('grid', data, replace(TRIALS, tasks=('acceptability',)), 1)
    row = s.trial_rows(trial, study, tmp_path/'trial')[-1]
    assert row['diverged_seeds'] == 1 and row['seeds'] == 2
    assert 'continuation: 1 of 2.' in about_diverged([row])[0]


def test_seeds_of_pretraining_are_fine_tuned_with_seeds_of_their_own(text, data, tmp_path):
    trial, = trials_of(text, (1e-3,))
    t = replace(TRIALS, tasks=('acceptability',), finetune=replace(TRIALS.finetune, seeds=2))
    with parallel_config('threading', n_jobs=1):
        run_trials([trial, replace(trial, seed=43)], 'grid', data, tmp_path, t)
    jobs = [json.loads(p.read_text())['key']['job'] for p in (tmp_path/'trials').glob('*/jobs/*.json')]
    assert sorted(job['seed'] for job in jobs) == [0, 1, 2, 3]


def test_rows_of_two_searches_are_not_one_table(tmp_path):
    ids = dict(trial='a', seed=1, stage='trial', study='grid', stopped='', scale='tiny', unit='nats')
    rows = [ids | dict(metric='validation_loss', value=5., recipe=name) for name in ('24hbert', 'modern')]
    with pytest.raises(UsageError, match='two runs are named a, seed 1'): trial_table(rows)
    rows[1]['trial'] = 'b'
    with pytest.raises(UsageError, match='Table 3 is of one recipe'): write_search(rows, 'x', tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_of_trials_do_not_mix_with_those_of_a_run(tmp_path):
    write_rows(tmp_path/'a'/'rows.jsonl', [result_row('x', 1, '')])
    write_rows(tmp_path/'a'/'trials'/'b'/'rows.jsonl', [result_row('x', 2, '')])
    assert values(read_rows(tmp_path), 'x') == [1] and values(read_rows(tmp_path/'a'/'trials'), 'x') == [2]


def test_best_is_the_lowest_loss_and_the_highest_score():
    table = pd.DataFrame(dict(trial=list('abcd'), global_batch_size=[32, 32, 64, 64],
                              validation_loss=[1., 2., 3., 4.], tuning_loss=[5., 4., 6., None],
                              mnli=[80., 70., None, None]))
    found = best(table, 'mnli')
    expected = [('b', 'tuning_loss'), ('a', 'mnli'), ('c', 'tuning_loss')]
    assert list(zip(found.trial, found.best_by, strict=True)) == expected
    assert list(best(table.drop(columns='mnli'), 'mnli').trial) == ['b', 'c']
    assert best(table.assign(tuning_loss=None, mnli=None), 'mnli').empty


def test_a_trial_without_a_loss_has_an_empty_field():
    rows = [dict(trial=n, seed=1, metric='validation_loss', value=v) for n, v in (('a', 2.), ('b', None))]
    table = trial_table(rows)
    assert table.validation_loss[0] == 2. and pd.isna(table.validation_loss[1])


def test_a_grid_that_is_typed_in():
    with pytest.raises(UsageError, match='axis of the grid'): parse_grid('size=1', TRIALS)
    assert parse_grid('lr=1e-3,0.001', TRIALS).lrs == (1e-3,)


def test_warm_ups_that_are_nearly_the_same_have_names_of_their_own():
    trials = grid_trials('24hbert', 'tiny', parse_grid('warmup=0,0.004,0.015,0.02', TRIALS))
    assert len({(trial.name, trial.seed) for trial in trials}) == len(trials)


def test_a_local_copy_of_glue_is_asked_for_before_the_first_run(text, data, tmp_path, monkeypatch):
    def asked(suite, names, folder): raise CramlitError(f'{names} from {folder}')
    monkeypatch.setattr(s, 'load_tasks', asked)
    trials, t = trials_of(text, (1e-3,)), replace(TRIALS, tasks=('cola',))
    with pytest.raises(CramlitError, match=r"\['cola'\] from my/glue"):
        run_trials(trials, 'grid', data, tmp_path, t, glue_dir='my/glue')
    assert not list(tmp_path.iterdir())


def test_a_grid_of_several_seeds_is_judged_by_their_means():
    t = replace(TRIALS, batch_sizes=(32,), lrs=(1e-3, 2e-3), grid_seeds=2)
    trials = grid_trials('24hbert', 'tiny', t)
    assert [(t.recipe.optim.lr, t.seed) for t in trials] == [(1e-3, 42), (2e-3, 42), (1e-3, 43), (2e-3, 43)]
    assert len({t.name for t in trials}) == 2
    losses = (4., 4.5, 6., 4.7)
    ids = [dict(trial=t.name, seed=t.seed, stopped='', global_batch_size=32) for t in trials]
    rows = [result_row('tuning_loss', x, '', **i) for x, i in zip(losses, ids, strict=True)]
    rows[2]['stopped'] = 'too slow'
    means = over_seeds(trial_table(rows))
    assert list(means.tuning_loss) == [5., pytest.approx(4.6)] and list(means.stopped) == ['too slow', '']
    assert list(best(means, 'no task').trial) == [trials[1].name]
    rows[3]['value'] = None  # a seed that diverged is no reason to be the best
    assert list(best(over_seeds(trial_table(rows)), 'no task').trial) == [trials[0].name]
    scored = [rows[0] | dict(metric='headline', task='x', value=60.)]  # its other seed was stopped
    scored += [rows[n] | dict(metric='headline', task='x', value=58.) for n in (1, 3)]
    named = list(best(over_seeds(trial_table(rows + scored)), 'x').query("best_by == 'x'").trial)
    assert named == [trials[1].name]


def test_contestants_that_are_timed_later_are_timed_beside_a_known_one(data, tmp_path, monkeypatch, capsys):
    "A machine half as fast in the second hour gives as many steps; what precedes the first is taken off"
    t, pace = replace(TRIALS, budget=10., steps=0), [1.]
    first, second = trials_of(tmp_path, (1e-3,)), [replace(x, settings=(*x.settings, 'model.num_layers=1'))
                                                   for x in trials_of(tmp_path, (1e-3,))]
    study = s.Study('grid', data, t, 1)

    def time_steps(trials, study, turns):
        seconds = {2: .1, 1: .05}
        found = {key: seconds[x.recipe.model.num_layers]*pace[0] for key, x in trials.items()}
        before = {2: 0., 1: 2.*pace[0]}
        return [result_row('seconds_per_step', value, 's', median=value, high=value, contestant=key,
                           before=before[trials[key].recipe.model.num_layers])
                for key, value in found.items()]

    monkeypatch.setattr(s, '_time_steps', time_steps)
    assert [x.steps for x in s.calibrate(first, study, tmp_path/'times.jsonl')] == [100]
    pace[0] = 2.
    assert [x.steps for x in s.calibrate(first + second, study, tmp_path/'times.jsonl')] == [100, 160]
    assert values(read_rows(tmp_path/'times.jsonl'), 'seconds_per_step') == [.1, .05]
    write_rows(tmp_path/'others.jsonl', [result_row('seconds_per_step', 1., 's', contestant='unknown')])
    assert not capsys.readouterr().err
    assert [x.steps for x in s.calibrate(first, study, tmp_path/'others.jsonl')] == [50]
    assert 'has none of these networks' in capsys.readouterr().err
    pair = replace(study, nproc=2)  # a step of two processes takes another time
    assert [x.steps for x in s.calibrate(first, pair, tmp_path/'times.jsonl')] == [50]
    monkeypatch.setattr(s, '_time_steps', None)  # nothing is left to time
    assert [x.steps for x in s.calibrate(second, study, tmp_path/'times.jsonl')] == [160]
    short = replace(study, trials=replace(t, budget=2.))
    with pytest.raises(UsageError, match='has 2 s, and computes 2.0 s before its first step'):
        s.calibrate(second, short, tmp_path/'times.jsonl')


def test_two_studies_do_not_time_at_once(data, tmp_path, monkeypatch):
    t = replace(TRIALS, budget=10., steps=0)
    study, trials = s.Study('grid', data, t, 1), trials_of(tmp_path, (1e-3,))
    path, inside, arrived = tmp_path/'times.jsonl', [], Semaphore(0)

    def note(said):
        assert 'waiting for its end' in said
        arrived.release()

    def time_steps(trials, study, turns):
        inside.append(1)
        if len(inside) > 1: arrived.release()
        else:  # the first stays until the two others are at the lock, or in here without one
            for _ in range(2): assert arrived.acquire(timeout=PATIENCE)
        return [result_row('seconds_per_step', .1, 's', median=.1, high=.1, contestant=key, before=0.)
                for key in trials]

    monkeypatch.setattr(s, '_time_steps', time_steps)
    monkeypatch.setattr('cramlit.core.results.note', note)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: s.calibrate(trials, study, path), range(3)))
    assert inside == [1] and len(read_rows(path)) == 1 and all(x.steps == 100 for x, in found)
