"The search: trials from text to the best, gone on with, given up, failed; and the tables and figures made of them"
import json
from dataclasses import replace

import pandas as pd
import pytest

from cramlit.experiments import search as s
from cramlit.running.command import main
from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.scales import get_recipe, get_scale
from cramlit.experiments.search import best, choice_trials, grid_trials, parse_grid, run_trials, trial_table

TRIALS = replace(get_scale('tiny').trials, steps=2, lengths=(1.,), tasks=())


def trials_of(text, lrs):
    "A grid on the session's small text"
    small = ('corpus.holdout=0.1', f'corpus.source={text}', 'tokenizer.vocab_size=128', 'validation.max_sequences=64')
    return [replace(t, settings=(*small, *t.settings)) for t in grid_trials('24hbert', 'tiny', replace(TRIALS, batch_sizes=(32,), lrs=lrs))]


def test_a_search_from_text_to_table_and_map(tmp_path, capsys):
    out = tmp_path/'out'
    args = ['search', '--scale', 'tiny', '--grid', 'batch=16,32 lr=1e-3 warmup=0.06 length=1', '--budget', '10s', '--out', str(out), '--json']
    assert main(args) == 0
    printed, err = capsys.readouterr()
    rows = [json.loads(line) for line in printed.splitlines()]
    best = [r for r in rows if r['metric'] == 'best']
    assert [(r['global_batch_size'], r['best_by']) for r in best] == [(b, by) for b in (16, 32) for by in ('validation_loss', 'continuation')]
    assert all((out/f'table3_search.{x}').exists() for x in ('md', 'csv', 'tex')) and (out/'search_grid.svg').exists()
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob('model/model.safetensors')}
    assert len(stamps) == 2 and main(args) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r['value'] for r in again] == [r['value'] for r in rows] and stamps == {p: p.stat().st_mtime_ns for p in out.rglob('model/model.safetensors')}


@pytest.mark.parametrize('args, says', [
    (['--grid', 'lrs=1'], "Did you mean 'lr'?"), (['--grid', 'lr=fast'], 'expected numbers'), (['--budget', 'soon'], 'expected a duration'),
    (['--grid', 'batch=24'], ''), (['--grid', 'warmup=2'], 'schedule.warmup=2.0'), (['--recipe', '24hbrt'], "Did you mean '24hbert'?"),
])
def test_mistakes_are_found_before_the_first_run(tmp_path, capsys, args, says):
    out = tmp_path/'out'
    if not says: assert grid_trials('24hbert', 'tiny', parse_grid(args[1], TRIALS))[0].recipe.batch.micro_batch_size == 24; return
    assert main(['search', '--scale', 'tiny', *args, '--out', str(out)]) == 2
    err = capsys.readouterr().err
    assert says in err and 'Traceback' not in err and not out.exists()


def test_one_bad_trial_does_not_stop_the_others(text, data, tmp_path, monkeypatch):
    trials, real, calls = trials_of(text, (1e-3, 2e-3)), s.pretrain, []
    def pretrain(recipe, *rest, **more):
        calls.append(recipe.optim.lr)
        if recipe.optim.lr == 1e-3 and len(calls) < 4: raise RuntimeError('no luck')
        return real(recipe, *rest, **more)
    monkeypatch.setattr(s, 'pretrain', pretrain)
    from joblib import parallel_config
    with parallel_config('threading', n_jobs=1), pytest.raises(CramlitError, match='(?s)1 of 2 trials failed twice.*LR 0.001.*no luck'):
        run_trials(trials, 'grid', data, tmp_path, TRIALS)
    assert calls == [1e-3, 1e-3, 2e-3]
    with parallel_config('threading', n_jobs=1): rows = run_trials(trials, 'grid', data, tmp_path, TRIALS)
    assert calls == [1e-3, 1e-3, 2e-3, 1e-3] and list(trial_table(rows).lr) == [1e-3, 2e-3]


def test_a_trial_that_goes_nowhere_is_given_up_and_says_so(text, data, tmp_path):
    trial, = trials_of(text, (1e-3,))
    should_stop_early = replace(trial, settings=(*trial.settings, 'validation.stop_loss=0.1', 'validation.stop_after=0.1', 'validation.every=0.2'))
    rows = run_trials([should_stop_early], 'grid', data, tmp_path, replace(TRIALS, steps=10))
    value = {r['metric']: r['value'] for r in rows}
    assert value['steps'] < 10 and 'headline' not in value and 'above 0.1' in rows[0]['stopped']


def test_tables_and_figures_of_a_search_in_which_all_were_given_up(text, data, tmp_path):
    from cramlit.reporting.figures import report
    trials = trials_of(text, (1e-3, 2e-3))
    should_stop_early = [replace(t, settings=(*t.settings, 'validation.stop_loss=0.1', 'validation.stop_after=0.1', 'validation.every=0.2')) for t in trials]
    for study in ('grid', 'choices'): run_trials(should_stop_early, study, data, tmp_path/'all'/study, replace(TRIALS, steps=10))
    names = {p.name for p in report(tmp_path/'all', tmp_path/'figures')}
    assert {'table3_search.md', 'search_grid.svg', 'table5_choices.md', 'choices_by_time.svg'} <= names
    assert 'no trial was fine-tuned' in (tmp_path/'figures'/'loss_against_task.svg').read_text()
    for name in ('table3_search', 'table5_choices'): assert (tmp_path/'figures'/f'{name}.md').read_text().count('Given up: ') == 2


def test_a_run_given_up_in_several_processes_is_not_started_again(text, data, tmp_path, capfd):
    small = ['corpus.holdout=0.1', f'corpus.source={text}', 'tokenizer.vocab_size=128', 'validation.max_sequences=64', 'batch.micro_batch_size=8',
             'validation.stop_loss=0.1', 'validation.stop_after=0.1', 'validation.every=0.2']
    args = ['pretrain', '--scale', 'tiny', '--data', str(data), '--out', str(tmp_path), '--steps', '10', '--nproc', '2', *(x for s in small for x in ('-o', s))]
    assert main(args) == 1
    err = capfd.readouterr().err
    assert 'the run stopped early: validation loss' in err and 'Traceback' not in err and err.count('on 2 × cpu') == 1 and (tmp_path/'model'/'config.json').exists()


def test_a_batch_that_cannot_be_shared_out_is_refused_before_the_first_run(text, data, tmp_path):
    with pytest.raises(UsageError, match='cannot be shared by 8 processes'): run_trials(trials_of(text, (1e-3,)), 'grid', data, tmp_path, TRIALS, nproc=8)
    assert not list(tmp_path.iterdir())


def test_trials_in_several_processes_are_the_same_trials(text, data, tmp_path):
    trial, = trials_of(text, (1e-3,))
    trial = replace(trial, settings=(*trial.settings, 'batch.micro_batch_size=8', 'model.dropout=0', 'model.attention_dropout=0'))
    alone = run_trials([trial], 'grid', data, tmp_path/'alone', TRIALS, nproc=1)
    both = run_trials([trial], 'grid', data, tmp_path/'both', TRIALS, nproc=2)
    loss = lambda rows: next(r['value'] for r in rows if r['metric'] == 'validation_loss')
    assert loss(both) == pytest.approx(loss(alone), rel=1e-3)


def test_choices_change_what_they_say():
    changed = {t.name: t.recipe for t in choice_trials('24hbert', 'paper', replace(get_scale('paper').trials, seeds=1))}
    base = get_recipe('24hbert').model
    assert changed['the recipe as it is'] == get_recipe('24hbert')
    assert changed['schedule twice the budget'].schedule.length == 2 and changed['no warm-up'].schedule.warmup == 0
    assert changed['twice the batch'].batch.global_batch_size == 8192 and changed['LayerNorm after each block'].model.norm == 'post'
    small = changed['base instead of large'].model
    assert (small.num_layers, small.hidden_size, small.num_heads, small.intermediate_size) == (12, 768, 12, 3072) and base.hidden_size == 1024
    assert 'no LayerNorm after the embeddings' not in {t.name for t in choice_trials('bert-base', 'paper', get_scale('paper').trials)}
    with pytest.raises(UsageError, match='norm=post'): get_recipe('bert-base', 'tiny', ['model.embedding_norm=false'])
    assert parse_grid('lr=1e-3,0.001', TRIALS).lrs == (1e-3,)
    assert 'LayerNorm after each block' not in {t.name for t in choice_trials('bert-base', 'paper', get_scale('paper').trials)}


def test_a_long_schedule_ends_high(text, data, tmp_path):
    trial, = trials_of(text, (1e-3,))
    lrs = []
    for length in (1, 2):
        longer = replace(trial, settings=(*trial.settings, f'schedule.length={length}', 'schedule.warmup=0'))
        run_trials([longer], 'grid', data, tmp_path/str(length), replace(TRIALS, steps=20), nproc=1)
        log, = (tmp_path/str(length)/'trials').rglob('metrics.jsonl')
        lrs.append([json.loads(line)['lr'] for line in log.read_text().splitlines() if 'lr' in line][-1])
    assert lrs == pytest.approx([1e-3*(1 - 19/20), 1e-3*(1 - 19/40)])


def test_rows_of_trials_do_not_mix_with_those_of_a_run(tmp_path):
    from cramlit.core.results import read_rows, result_row, write_rows
    write_rows(tmp_path/'a'/'rows.jsonl', [result_row('x', 1, '')])
    write_rows(tmp_path/'a'/'trials'/'b'/'rows.jsonl', [result_row('x', 2, '')])
    assert [r['value'] for r in read_rows(tmp_path)] == [1] and [r['value'] for r in read_rows(tmp_path/'a'/'trials')] == [2]


def test_best_is_the_lowest_loss_and_the_highest_score():
    table = pd.DataFrame(dict(trial=list('abcd'), global_batch_size=[32, 32, 64, 64], validation_loss=[5., 4., 6., None], mnli=[80., 70., None, None]))
    found = best(table, 'mnli')
    assert list(zip(found.trial, found.best_by, strict=True)) == [('b', 'validation_loss'), ('a', 'mnli'), ('c', 'validation_loss')]
    assert list(best(table.drop(columns='mnli'), 'mnli').trial) == ['b', 'c']


def test_an_unknown_axis_is_a_usage_error():
    with pytest.raises(UsageError, match='axis of the grid'): parse_grid('size=1', TRIALS)


def test_a_local_copy_of_glue_is_asked_for_before_the_first_run(text, data, tmp_path, monkeypatch):
    def asked(suite, names, folder): raise CramlitError(f'{names} from {folder}')
    monkeypatch.setattr(s, 'load_tasks', asked)
    with pytest.raises(CramlitError, match=r"\['cola'\] from my/glue"):
        run_trials(trials_of(text, (1e-3,)), 'grid', data, tmp_path, replace(TRIALS, tasks=('cola',)), glue_dir='my/glue')
    assert not list(tmp_path.iterdir())
