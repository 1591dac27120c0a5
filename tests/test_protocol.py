"Fine-tuning and reporting: repeatable, continued, honest about what is missing"
import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import effective_n_jobs, parallel_config

import cramlit.evaluation.protocol as protocol
from cramlit.running.command import main
from cramlit.core.recipes import CramlitError, UsageError
from cramlit.evaluation.finetuning import check_length, classifier, collate, encode, load_parts
from cramlit.evaluation.glue import Examples, Task
from cramlit.training.checkpoints import export_run
from cramlit.evaluation.protocol import average, bag_of_words, jobs, load_tasks, majority, run_jobs, run_suite, summary
from cramlit.reporting.tables import NINE, PUBLISHED, gain_from_pretraining, table4, write_table4
from cramlit.core.results import write_rows
from cramlit.core.scales import Finetune
from cramlit.training.training import pretrain

GRID = Finetune((1,), (16,), (1e-3,), 2, max_length=32, max_train=64, max_eval=32)
IDS = dict(stage='glue', suite='stand-in', scale='tiny', recipe='24hbert', recipe_hash='0')


@pytest.fixture(scope='module')
def model(recipe, data, tmp_path_factory):
    out = tmp_path_factory.mktemp('model')
    pretrain(recipe, data, out/'run', steps=2)
    return export_run(out/'run', data/'tokenizer', out/'model')


def toy(name='toy', n=64, labels=2):
    words = ['river', 'stone', 'house']
    e = Examples([f'the old {words[i % labels]} {i}' for i in range(n)], None, [i % labels for i in range(n)])
    return Task(name, labels, ('accuracy',), e, {'validation': e.head(32)})


def values(rows): return [(r['metric'], r['task'], r.get('variant'), r.get('seed'), r['value']) for r in rows]


def test_suite_is_repeatable_and_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    a = run_suite(model, [toy()], GRID, 2, tmp_path/'a', IDS)
    b = run_suite(model, [toy()], GRID, 2, tmp_path/'b', IDS)
    assert values(a) == values(b) and {r['seed'] for r in a if r.get('seed') is not None} == {0, 1}
    files = sorted((tmp_path/'a'/'jobs').iterdir())
    assert [f.name for f in files] == [f.name for f in sorted((tmp_path/'b'/'jobs').iterdir())] and len(files) == 4
    files[0].unlink()
    kept = [f.stat().st_mtime_ns for f in files[1:]]
    assert values(run_suite(model, [toy()], GRID, 2, tmp_path/'a', IDS)) == values(a)
    assert [f.stat().st_mtime_ns for f in files[1:]] == kept and files[0].exists()
    assert len(json.loads(files[0].read_text())['predictions']['validation']) == 32


def test_other_labels_or_another_model_are_other_jobs(model, tmp_path):
    run_suite(model, [toy()], GRID, 1, tmp_path, IDS)
    run_suite(model, [toy(n=60)], GRID, 1, tmp_path, IDS)
    assert len(list((tmp_path/'jobs').iterdir())) == 4


def test_a_fine_tuning_that_diverges_has_no_score_and_does_not_win(model, tmp_path):
    job, task = jobs(toy(), GRID, 1)[0], toy()
    wild = replace(job, lr=1e35)
    results = run_jobs([(wild, task), (job, task)], model, ['wild', 'tame'], tmp_path)
    assert results[0]['scores'] == {'validation': None} and results[1]['scores']['validation']['accuracy'] > 0
    best = summary(task, 'x', [[r['scores']] for r in results], {})
    assert best[0]['value'] == results[1]['scores']['validation']['accuracy']
    none = summary(task, 'x', [[results[0]['scores']]], {})
    assert [r['value'] for r in none] == [None, None]
    assert average(none, {})[0]['value'] is None


def test_a_failing_job_is_tried_twice_and_the_others_go_on(model, tmp_path, monkeypatch):
    good, tried, real = jobs(toy(), GRID, 1)[0], [], protocol.run_job

    def flaky(job, *rest):
        tried.append(job.seed)
        if job.seed == 7 or job.seed == 5 and tried.count(5) == 1: raise RuntimeError('lightning')
        return real(job, *rest)
    monkeypatch.setattr(protocol, 'run_job', flaky)
    work = [(replace(good, seed=s), toy()) for s in (7, 5, 0)]
    with parallel_config('threading', n_jobs=1), pytest.raises(CramlitError, match='(?s)1 of 3 fine-tunings failed twice.*seed 7: RuntimeError: lightning'):
        run_jobs(work, model, ['bad', 'once', 'good'], tmp_path)
    assert sorted(tried) == [0, 5, 5, 7, 7] and sorted(p.stem for p in (tmp_path/'jobs').iterdir()) == ['good', 'once']
    tried.clear()
    with parallel_config('threading', n_jobs=1), pytest.raises(CramlitError): run_jobs(work, model, ['bad', 'once', 'good'], tmp_path)
    assert tried == [7, 7]


SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
STOCK = {  # architecture: settings, token id of padding, positions for text
    'bert': (SMALL | dict(max_position_embeddings=48), 0, 48), 'distilbert': (dict(dim=32, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=48), 0, 48),
    'electra': (SMALL | dict(embedding_size=16, max_position_embeddings=48), 0, 48), 'albert': (SMALL | dict(embedding_size=16, max_position_embeddings=48), 0, 48),
    'roberta': (SMALL | dict(type_vocab_size=1, max_position_embeddings=50), 1, 48), 'roberta-prelayernorm': (SMALL | dict(max_position_embeddings=49), 0, 48),
    'mpnet': (SMALL | dict(max_position_embeddings=50), 1, 48), 'deberta-v2': (SMALL | dict(max_position_embeddings=48), 0, 48),
    'modernbert': (SMALL | dict(max_position_embeddings=48, global_attn_every_n_layers=1), 0, 48)}


def stock_folder(name, folder):
    "A small random model as stock transformers saves it, with a tokenizer whose padding token has the id that the model expects"
    from transformers import AutoConfig, AutoModelForMaskedLM, BertTokenizerFast
    settings, pad, _ = STOCK[name]
    special = ['[CLS]', '[PAD]', '[SEP]', '[UNK]', '[MASK]'] if pad else ['[PAD]', '[CLS]', '[SEP]', '[UNK]', '[MASK]']
    tok = BertTokenizerFast(vocab={w: i for i, w in enumerate([*special, 'the', 'old', 'river', 'stone', *map(str, range(10)), *(f'##{i}' for i in range(10))])})
    ids = dict(pad_token_id=pad, bos_token_id=tok.cls_token_id, eos_token_id=tok.sep_token_id, cls_token_id=tok.cls_token_id, sep_token_id=tok.sep_token_id)
    AutoModelForMaskedLM.from_config(AutoConfig.for_model(name, vocab_size=len(tok), **ids, **settings)).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.mark.parametrize('name', STOCK)
def test_any_stock_folder_is_fine_tuned_up_to_its_last_position(name, tmp_path):
    folder, room = stock_folder(name, tmp_path/name), STOCK[name][2]
    check_length(folder, room)
    with pytest.raises(UsageError, match=f'has {room} positions'): check_length(folder, room + 1)
    e = Examples(['the old river '*40, 'stone', 'the river']*4, ['the old stone '*40, 'old', 'the stone']*4, [0, 1, 1]*4)
    task = Task('pairs', 2, ('accuracy',), e, {'validation': e})
    grid = replace(GRID, max_length=room)
    rows = run_suite(folder, [task], grid, 1, tmp_path/'out', IDS)
    assert {r['variant'] for r in rows if r['metric'] == 'headline' and r['value'] is not None} == {'from-scratch', 'pretrained', 'majority', 'bag-of-words'}
    _, tok = load_parts(folder)
    network, encoded, device = classifier(folder, task, True, 0).eval(), encode(tok, e, room), torch.device('cpu')
    with torch.no_grad():
        alone, together = (network(**collate(encoded, np.array(i), tok.pad_token_id, device)).logits for i in ([1], [0, 1]))
    assert max(map(len, encoded.columns['input_ids'])) == room and (alone[0] - together[1]).abs().max() < 1e-5  # padding changes nothing


def test_a_tokenizer_without_padding_is_one_line(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path/'model')
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
        path = tmp_path/'model'/name
        if not path.exists(): continue
        kept = {k: v for k, v in json.loads(path.read_text()).items() if k != 'pad_token'}
        path.write_text(json.dumps(kept | dict(tokenizer_class='PreTrainedTokenizerFast')))
    assert main(['glue', '--model', str(tmp_path/'model'), '--out', str(tmp_path/'o')]) == 1 and 'no padding token' in capsys.readouterr().err


def test_all_cores_work_unless_the_user_says_otherwise():
    with protocol.workers(): assert effective_n_jobs(None) == len(os.sched_getaffinity(0))
    with parallel_config('loky', n_jobs=1), protocol.workers(): assert effective_n_jobs(None) == 1
    with parallel_config('threading', n_jobs=3), protocol.workers(): assert effective_n_jobs(None) == 3


def test_a_cluster_that_the_user_chose_does_the_work(model, tmp_path):
    "Through joblib on a dask cluster, with the results of local processes"
    from dask.distributed import Client, LocalCluster, get_task_stream
    here = run_suite(model, [toy()], GRID, 1, tmp_path/'here', IDS)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client, get_task_stream(client) as done:
        with parallel_config('dask'): there = run_suite(model, [toy()], GRID, 1, tmp_path/'there', IDS)
    assert done.data and values(here) == values(there)


def test_baselines_by_hand():
    task = toy(labels=3)
    assert majority(task, 0)['validation']['accuracy'] == pytest.approx(100*sum(y == 0 for y in task.validation['validation'].labels)/32)
    assert bag_of_words(task, 0, 0)['validation']['accuracy'] == 100
    scores = Task('s', 1, ('pearson', 'spearman'), Examples(['a b', 'a c', 'd b'], None, [1., 2., 3.]), {'v': Examples(['d', 'a'], None, [3., 1.])})
    assert majority(scores, 0)['v'] == dict(pearson=0, spearman=0) and bag_of_words(scores, 0, 0)['v']['pearson'] == pytest.approx(100)


def test_the_paper_grid_is_the_papers():
    names = jobs(toy(), Finetune(), 5)
    assert len(names) == 2*3*2*4*5 and {j.max_length for j in names} == {128} and {j.weight_decay for j in names} == {.1}


def headline(task, variant, value, low, high, recipe='24hbert'):
    ids = IDS | dict(recipe=recipe, aggregate='median', task=task, variant=variant, seeds=3, spread_low=low, spread_high=high, labels_from='human', versions={},
                     hardware='a machine', commit='abc', dirty=True, unit='%', value=value)
    return [dict(metric='headline', split='all', **ids), dict(metric='accuracy', split='validation', **ids)]


def test_what_was_not_measured_is_an_empty_cell(tmp_path):
    rows = [r for v in ('from-scratch', 'pretrained') for r in headline('x', v, 50., 40., 60.)] + headline('y', 'pretrained', None, None, None)
    rows += average(rows, IDS)
    table = table4(rows)
    assert table.loc['y accuracy', '24hbert, pretrained'] == '' and set(table.columns) == {'24hbert, from-scratch', '24hbert, pretrained'}
    text = write_table4(rows, tmp_path)[0].read_text()
    assert 'nan' not in text and 'None' not in text and 'abc+changes' in text
    assert 'ranges overlap on x' in gain_from_pretraining(rows, '24hbert')


def test_the_average_over_nine_numbers_and_submitted_scores(tmp_path):
    ids = dict(stage='glue', suite='glue', scale='paper', recipe='24hbert', variant='pretrained', aggregate='median', seeds=1, versions={}, hardware='a machine')
    rows = [dict(metric=metric, task=task, split=split, value=80. + i, unit='%', **ids) for i, (task, split, metric) in enumerate(PUBLISHED)]
    columns = ','.join(PUBLISHED.values())
    (tmp_path/'submitted.csv').write_text(f'row,{columns}\nours,{",".join(["70"]*9)}\n')
    write_table4(rows, tmp_path)
    line = pd.read_csv(tmp_path/'table4_glue.csv', index_col=0).loc[NINE[2]]
    assert line['24hbert, pretrained'] == 84. and line['ours (test, submitted)'] == 70. and line['published: BERT-base (test)'] == 79.6
    assert NINE[2] not in table4(rows[1:]).index or table4(rows[1:]).loc[NINE[2], '24hbert, pretrained'] == ''


def test_two_recipes_have_rows_of_their_own():
    two = ('24hbert', 'bert-base')
    rows = [r for i, recipe in enumerate(two) for v in ('majority', 'from-scratch', 'pretrained') for r in headline('x', v, 50. + i, 40., 60., recipe)]
    rows += [r for recipe in two for r in average([x for x in rows if x['recipe'] == recipe], IDS | dict(recipe=recipe))]
    assert set(table4(rows).columns) >= {'majority', '24hbert, pretrained', 'bert-base, pretrained', 'bert-base, from-scratch'}


def test_report_of_nothing_and_of_broken_rows(tmp_path, capsys):
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs'/'rows.jsonl').write_text('{"metric": "x"\n')
    assert main(['report', '--runs', str(tmp_path/'runs'), '--out', str(tmp_path/'figures')]) == 1
    assert 'rows.jsonl, line 1: not JSON' in capsys.readouterr().err and not (tmp_path/'figures').exists()
    from cramlit.reporting.report import report
    with pytest.raises(CramlitError, match='no result rows'): report(tmp_path/'nowhere', tmp_path/'figures')


def test_rows_are_json_that_any_reader_takes(tmp_path):
    write_rows(tmp_path/'rows.jsonl', [dict(metric='x', value=None, unit='%')])
    assert json.loads((tmp_path/'rows.jsonl').read_text(), parse_constant=lambda c: pytest.fail(c)) == dict(metric='x', value=None, unit='%')
    with pytest.raises(ValueError): write_rows(tmp_path/'nan.jsonl', [dict(metric='x', value=math.nan, unit='%')])
    assert not (tmp_path/'nan.jsonl').exists()


def test_unknown_names(capsys, tmp_path):
    assert protocol.task_names('stand-in', []) and load_tasks('stand-in', ['review_polarity'])[0].name == 'review_polarity'
    assert main(['glue', '--model', 'm', '--tasks', 'review_polarty', '--out', str(tmp_path/'o')]) == 2
    assert "Did you mean 'review_polarity'?" in capsys.readouterr().err
