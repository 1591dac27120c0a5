"Fine-tuning and reporting: repeatable, continued, honest about what is missing"
import json
import math
import os
import shutil
import signal
from dataclasses import asdict, replace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import cpu_count, delayed, effective_n_jobs, parallel_config
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

import cramlit.evaluation.finetuning as finetuning
import cramlit.evaluation.protocol as protocol
from cramlit.core.devices import Precision
from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.results import read_rows, write_rows
from cramlit.core.scales import Finetune, get_scale
from cramlit.evaluation.finetuning import (
    check_length,
    classifier,
    encode,
    make_batches,
    padding_rows,
    run_job,
)
from cramlit.evaluation.glue import Examples, Task, format_prediction, majority
from cramlit.evaluation.protocol import (
    average,
    evaluate,
    evaluate_reference,
    grid_work,
    job_results,
    jobs,
    load_tasks,
    median_run,
    reference_encoder,
    run_parallel,
    run_suite,
    suite_work,
    task_rows,
)
from cramlit.evaluation.statistics import headline_difference
from cramlit.model.stock_models import load_parts
from cramlit.reporting.tables import (
    NINE,
    PUBLISHED,
    about_lengths,
    at_chance,
    gain_from_pretraining,
    gains,
    table4,
    write_table4,
)
from cramlit.running.command import main
from cramlit.training.checkpoints import export_run
from cramlit.training.training import pretrain

GRID = Finetune((1,), (16,), (1e-3,), 2, max_length=32, max_train=64, max_eval=32)
IDS = dict(stage='glue', suite='surrogate', scale='tiny', recipe='24hbert', recipe_hash='0')


@pytest.fixture(scope='module')
def model(recipe, data, tmp_path_factory):
    out = tmp_path_factory.mktemp('model')
    pretrain(recipe, data, out/'run', steps=2)
    return export_run(out/'run', data/'tokenizer', out/'model')


def toy(name='toy', n=64, labels=2):
    words = ['river', 'stone', 'house']
    e = Examples([f'the old {words[i % labels]} {i}' for i in range(n)], None, [i % labels for i in range(n)])
    return Task(name, labels, ('accuracy',), e, {'validation': e.sample(32)})


def values(rows):
    return [(r['metric'], r['task'], r.get('variant'), r.get('seed'), r['value']) for r in rows]


@pytest.mark.usefixtures('two_workers')
def test_suite_is_repeatable_and_goes_on_where_it_stopped(model, tmp_path):
    a = run_suite(model, [toy()], GRID, 2, tmp_path/'a', IDS)
    b = run_suite(model, [toy()], GRID, 2, tmp_path/'b', IDS)
    assert values(a) == values(b) and {r['seed'] for r in a if r.get('seed') is not None} == {0, 1}
    files = sorted((tmp_path/'a'/'jobs').iterdir())
    assert len(files) == 4 and {f.name for f in files} == {f.name for f in (tmp_path/'b'/'jobs').iterdir()}
    files[0].unlink()
    kept = [f.stat().st_mtime_ns for f in files[1:]]
    assert values(run_suite(model, [toy()], GRID, 2, tmp_path/'a', IDS)) == values(a)
    assert [f.stat().st_mtime_ns for f in files[1:]] == kept and files[0].exists()
    assert len(json.loads(files[0].read_text())['predictions']['validation']) == 32


def test_other_labels_or_another_model_are_other_jobs(model, tmp_path):
    run_suite(model, [toy()], GRID, 1, tmp_path, IDS)
    run_suite(model, [toy(n=60)], GRID, 1, tmp_path, IDS)
    assert len(list((tmp_path/'jobs').iterdir())) == 4


def test_a_fine_tuning_that_diverges_counts_as_the_majority_and_says_so(model, tmp_path):
    skewed = Examples(toy().train.first, None, [int(i % 4 == 0) for i in range(64)])
    task = replace(toy(), train=skewed, validation={'validation': skewed}, test={'test': skewed.sample(8)})
    job = jobs(task, GRID, 1)[0]
    wild = [replace(job, lr=1e35, seed=s) for s in (0, 1)]
    results = job_results(model, [task], [*wild, job], tmp_path)
    assert [r['diverged'] for r in results] == [True, True, False]
    the_same = majority(task, GRID.max_eval)['scores']
    assert results[0]['scores'] == the_same
    assert results[0]['predictions'] == dict(validation=[0]*32, test=[0]*8)
    tame = [dict(results[2], job=asdict(replace(wild[0], seed=2)), scores={'validation': {'accuracy': 99.}})]
    rows = task_rows(task, [*results[:2], *tame], IDS)
    runs, summaries = [r for r in rows if 'seed' in r], [r for r in rows if r.get('aggregate')]
    assert [(r['diverged'], r['value']) for r in runs] == [
        *[(True, the_same['validation']['accuracy'])]*2, (False, 99.)]
    for r in summaries:
        assert (r['diverged'], r['diverged_seeds'], r['seeds'], r['spread_high']) == (True, 2, 3, 99.)
    assert summaries[0]['value'] == runs[0]['value'] < 99
    with pytest.raises(CramlitError, match='toy diverged: there is nothing'): median_run(results[:2])
    assert median_run([*results[:2], *tame]) == tame[0]  # one that did not is enough to go on with


@pytest.mark.parametrize('steps', [10, 1])
def test_the_rates_of_a_fine_tuning(steps, model, monkeypatch):
    "Those of transformers, but that a single step is taken, which would be nothing but warm-up"
    rates = []

    class Noted(torch.optim.AdamW):
        def step(self, *args, **kwargs):
            rates.append(self.param_groups[0]['lr'])
            return super().step(*args, **kwargs)
    monkeypatch.setattr(torch.optim, 'AdamW', Noted)
    task = toy(n=8*steps)
    finetuning.run_job(finetuning.Job(task.name, 'pretrained', 1, 8, 1e-3, 0, .1, .2, 64, 0, 0), model, task)
    stock = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = get_linear_schedule_with_warmup(stock, round(.2*steps), steps)
    wanted = []
    for _ in range(steps):
        wanted.append(stock.param_groups[0]['lr'])
        stock.step()
        schedule.step()
    assert rates == pytest.approx(wanted, abs=1e-12) and max(rates) > 0


def test_logits_that_are_no_numbers_are_a_divergence_whatever_the_last_loss_was(model, monkeypatch):
    real = finetuning.train_classifier

    def spoil(network, *args):
        losses = real(network, *args)
        with torch.no_grad(): next(network.parameters()).fill_(float('nan'))
        return losses
    monkeypatch.setattr(finetuning, 'train_classifier', spoil)
    result = run_job(jobs(toy(), GRID, 1)[0], model, toy())
    assert result['diverged'] and result['scores'] == majority(toy(), GRID.max_eval)['scores']


def stamp(results, monkeypatch, commit):
    "As if the checkout and the machine were others from now on"
    other = results.provenance() | dict(commit=commit, hardware='another machine')
    for module in (results, protocol): monkeypatch.setattr(module, 'provenance', lambda: other)


@pytest.mark.usefixtures('two_workers')
def test_results_are_stamped_when_they_are_measured_and_never_again(model, tmp_path, monkeypatch):
    import cramlit.core.results as results
    before = run_suite(model, [toy()], GRID, 2, tmp_path, IDS)
    stamp(results, monkeypatch, 'tomorrow')
    assert run_suite(model, [toy()], GRID, 2, tmp_path, IDS) == before
    for path in (tmp_path/'jobs').iterdir():  # one seed is measured again, tomorrow
        if json.loads(path.read_text())['job']['seed'] == 1: path.unlink()
    with parallel_config('threading', n_jobs=1): mixed = run_suite(model, [toy()], GRID, 2, tmp_path, IDS)
    assert values(mixed) == values(before)
    today = before[0]['commit']
    commits = {r.get('seed'): r['commit'] for r in mixed if r['variant'] == 'pretrained'}
    assert commits == {0: today, 1: 'tomorrow', None: f'{today}, tomorrow'}
    assert {r['commit'] for r in mixed if r['variant'] in ('majority', 'bag-of-words')} == {today}


def test_baselines_are_computed_once(model, tmp_path, monkeypatch):
    before = run_suite(model, [toy()], GRID, 1, tmp_path, IDS)

    def no(*args): raise AssertionError('computed again')
    for name in ('majority', 'bag_of_words'): monkeypatch.setattr(protocol, name, no)
    assert run_suite(model, [toy()], GRID, 1, tmp_path, IDS) == before
    with pytest.raises(AssertionError): run_suite(model, [toy(n=60)], GRID, 1, tmp_path, IDS)


def changed_tokenizer(folder):
    path = folder/'tokenizer_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(model_max_length=31)))


def changed_config(folder):
    path = folder/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(hidden_dropout_prob=.2)))


@pytest.mark.parametrize('what', ['weights', changed_tokenizer, changed_config, 'data', 'settings', 'rules',
                                  'padding', 'precision', 'versions'])
def test_whatever_decides_a_result_is_in_its_key(what, model, tmp_path, monkeypatch):
    folder, grid, task = tmp_path/'model', GRID, toy()
    shutil.copytree(model, folder)

    def keys():
        found = protocol.job_keys(folder, [task], jobs(task, grid, 2))
        return {json.dumps(k, sort_keys=True) for k in found}
    before = keys()
    assert keys() == before and len(before) == 4
    (folder/'README.md').write_text('notes')
    (folder/'cramlit.json').write_text('{}')
    assert keys() == before
    if what == 'weights': shutil.copy(stock_folder('bert', tmp_path/'other')/'model.safetensors', folder)
    elif what == 'data': task = toy(n=60)
    elif what == 'settings': grid = replace(GRID, weight_decay=.01)
    elif what == 'rules': monkeypatch.setattr(protocol, 'FINETUNING_VERSION', 'next')
    elif what == 'padding': monkeypatch.setattr(protocol, 'POOL', 0)
    elif what == 'precision': monkeypatch.setattr(protocol, 'choose_precision', lambda device: HALF)
    elif what == 'versions': monkeypatch.setattr(protocol, 'provenance', lambda: NEXT)
    else: what(folder)
    assert not keys() & before


HALF = Precision(torch.half, '')
NEXT = dict(versions=dict(torch='9', transformers='9', tokenizers='9'))


def test_a_model_whose_tokenizer_is_a_list_of_words_is_another_with_another_list(model, tmp_path):
    "As the first BERT came: vocab.txt, and no tokenizer.json"
    folder, job = tmp_path/'model', jobs(toy(), GRID, 1)[:1]
    shutil.copytree(model, folder)
    words = json.loads((folder/'tokenizer.json').read_text())['model']['vocab']
    for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'):
        (folder/name).unlink(missing_ok=True)
    ordered = sorted(words, key=words.get)
    for n, vocabulary in enumerate((ordered, [*ordered[:5], *ordered[:4:-1]]), 1):
        (folder/'vocab.txt').write_text('\n'.join(vocabulary) + '\n')
        job_results(folder, [toy()], job, tmp_path)
        assert len(list((tmp_path/'jobs').iterdir())) == n


def test_two_jobs_of_one_name_are_two_results(model, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, 'digest', lambda value: 'same')
    work = jobs(toy(), GRID, 2)
    with parallel_config('threading', n_jobs=1): found = job_results(model, [toy()], work, tmp_path)
    assert [r['job'] for r in found] == [asdict(job) for job in work]
    assert sorted(p.name for p in (tmp_path/'jobs').iterdir()) == [
        'same-2.json', 'same-3.json', 'same-4.json', 'same.json']
    assert job_results(model, [toy()], work, tmp_path) == found


def test_a_damaged_result_is_measured_again_and_stays(model, tmp_path):
    work = jobs(toy(), GRID, 1)
    found = job_results(model, [toy()], work, tmp_path)
    path, *_ = (tmp_path/'jobs').iterdir()
    path.write_text('{"key": ')
    again = job_results(model, [toy()], work, tmp_path)
    assert [r['scores'] for r in again] == [r['scores'] for r in found]
    assert path.read_text() == '{"key": ' and len(list((tmp_path/'jobs').iterdir())) == 3


def test_rows_of_another_model_and_of_other_tasks_are_moved_aside_not_lost(model, tmp_path, capsys):
    first = run_suite(model, [toy()], GRID, 1, tmp_path, IDS | dict(pretraining_seed=42, weights='a'))
    assert run_suite(model, [toy()], GRID, 1, tmp_path, IDS | dict(pretraining_seed=42, weights='a')) == first
    assert not (tmp_path/'superseded').exists()
    second = run_suite(model, [toy()], GRID, 1, tmp_path, IDS | dict(pretraining_seed=43, weights='b'))
    aside, = (tmp_path/'superseded').iterdir()
    assert read_rows(aside) == first and read_rows(tmp_path) == second
    assert aside.name in capsys.readouterr().err
    run_suite(model, [toy('other')], GRID, 1, tmp_path, IDS | dict(pretraining_seed=43, weights='b'))
    assert len(list((tmp_path/'superseded').iterdir())) == 2


def test_a_folder_that_takes_no_files_is_one_line_before_any_training(model, tmp_path, monkeypatch, capsys):
    (tmp_path/'file').write_text('in the way')
    monkeypatch.setattr(protocol, 'run_and_save', lambda *args: pytest.fail('trained for nothing'))
    options = ['--model', str(model), '--tasks', 'review_polarity', '--scale', 'tiny']
    capsys.readouterr()
    assert main(['glue', *options, '--out', str(tmp_path/'file'/'out')]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and 'cannot write' in said[0] and 'Not a directory' in said[0]


def test_a_copy_of_glue_without_the_suite_is_refused(model, tmp_path, capsys):
    options = '--model', str(model), '--glue-dir', str(tmp_path), '--out', str(tmp_path/'out')
    assert main(['glue', *options]) == 2
    assert '--glue-dir is for --suite glue' in capsys.readouterr().err


def test_hundreds_of_failures_are_not_hundreds_of_lines():
    calls = [delayed(str)(f'job {n} failed') for n in range(300)]
    with parallel_config('threading', n_jobs=1), pytest.raises(CramlitError) as e:
        protocol.run_parallel(calls, 300, 'fine-tunings')
    assert '300 of 300' in str(e.value) and len(str(e.value).splitlines()) == 10


def test_an_error_that_breaks_a_gpu_is_not_tried_again():
    tried = []
    def broken():
        tried.append(1)
        raise torch.AcceleratorError('CUDA error: an illegal memory access was encountered')
    with pytest.raises(CramlitError, match='(?s)job 1: CUDA error.*can do no more on it.*goes on'):
        protocol.with_retry('job 1', broken)
    assert len(tried) == 1


def test_a_failing_job_is_tried_twice_and_the_others_go_on(model, tmp_path, monkeypatch):
    good, tried, real = jobs(toy(), GRID, 1)[0], [], protocol.run_job

    def flaky(job, *rest):
        tried.append(job.seed)
        if job.seed == 7 or job.seed == 5 and tried.count(5) == 1: raise RuntimeError('lightning')
        return real(job, *rest)
    monkeypatch.setattr(protocol, 'run_job', flaky)
    work = [replace(good, seed=s) for s in (7, 5, 0)]
    message = '(?s)1 of 3 fine-tunings failed twice.*seed 7: RuntimeError: lightning'
    with parallel_config('threading', n_jobs=1), pytest.raises(CramlitError, match=message):
        job_results(model, [toy()], work, tmp_path)
    assert sorted(tried) == [0, 5, 5, 7, 7]
    kept = [json.loads(p.read_text())['job']['seed'] for p in (tmp_path/'jobs').iterdir()]
    assert sorted(kept) == [0, 5]
    tried.clear()
    with parallel_config('threading', n_jobs=1), pytest.raises(CramlitError):
        job_results(model, [toy()], work, tmp_path)
    assert tried == [7, 7]


def test_work_that_takes_the_whole_machine_goes_one_by_one():
    done = []

    def work(n):
        done.append(n)
        return 'no luck' if n == 1 else ''
    with pytest.raises(CramlitError, match='(?s)1 of 5 trials failed twice.*no luck'):
        protocol.run_parallel([delayed(work)(n) for n in range(3)], 5, 'trials', one_by_one=True)
    assert done == [0, 1, 2]


def work_within(n):
    done = []
    with mock.patch.object(protocol, 'on_free_gpu', side_effect=AssertionError('it has one already')):
        protocol.run_parallel([delayed(done.append)(i) for i in range(3)], 3, 'fine-tunings')
    return '' if done == [0, 1, 2] else str(done)


def test_what_a_worker_has_to_do_it_does_on_the_gpu_that_it_has():
    with parallel_config('loky', n_jobs=2):
        protocol.run_parallel([delayed(work_within)(n) for n in range(2)], 2, 'trials')


@pytest.mark.parametrize('source, holdout, seen', [
    ('enwik8', .02, False), ('enwik8', .005, True), ('hub:wikimedia/wikipedia:20231101.en', .02, True),
    ('mine.txt', 0., False)])
def test_it_is_said_where_a_task_may_have_been_pretrained_on(source, holdout, seen, tmp_path, capsys):
    protocol.note_seen_text(tmp_path, 'surrogate')
    recipe = dict(corpus=dict(source=source, holdout=holdout))
    (tmp_path/'cramlit.json').write_text(json.dumps(dict(recipe=recipe)))
    for suite in ('glue', 'surrogate'): protocol.note_seen_text(tmp_path, suite)
    assert capsys.readouterr().err.count('may be among its text') == seen


def test_both_ways_of_padding_see_every_example_and_are_timed_in_turns(model):
    examples = toy().train
    features = [dict(input_ids=[0]*n) for n in (3, 9, 4, 1, 7, 7, 2)]
    for pool in (0, 50):
        assert [list(b) for b in make_batches(features, 3, None, pool)] == (
            [[3, 6, 0], [2, 4, 5], [1]] if pool else [[0, 1, 2], [3, 4, 5], [6]])
        batches = make_batches(features, 3, np.random.default_rng(0), pool)
        assert sorted(np.concatenate(batches)) == list(range(7))
    task = Task('toy', 2, ('accuracy',), examples, {'validation': examples})
    job = replace(jobs(task, GRID, 1, ('pretrained',))[0], task='')
    rows = padding_rows(model, [task], job, dict(scale='tiny'), turns=1)
    assert {(r['metric'], r['variant']) for r in rows} == {
        ('seconds_per_job', 'tight'), ('seconds_per_job', 'padded'), ('headline', 'tight'),
        ('headline', 'padded'), ('ratio_to_padded', 'tight')}
    assert all(r['task'] == 'toy' and r['value'] > 0 for r in rows)


SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
DISTILBERT = dict(dim=32, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=48)
STOCK = {  # architecture: settings, token id of padding, positions for text
    'bert': (SMALL | dict(max_position_embeddings=48), 0, 48),
    'distilbert': (DISTILBERT, 0, 48),
    'electra': (SMALL | dict(embedding_size=16, max_position_embeddings=48), 0, 48),
    'albert': (SMALL | dict(embedding_size=16, max_position_embeddings=48), 0, 48),
    'roberta': (SMALL | dict(type_vocab_size=1, max_position_embeddings=50), 1, 48),
    'roberta-prelayernorm': (SMALL | dict(max_position_embeddings=49), 0, 48),
    'mpnet': (SMALL | dict(max_position_embeddings=50), 1, 48),
    'deberta-v2': (SMALL | dict(max_position_embeddings=48), 0, 48),
    'modernbert': (SMALL | dict(max_position_embeddings=48, global_attn_every_n_layers=1), 0, 48)}


def stock_folder(name, folder, **more):
    "A small random model as transformers saves it, with a tokenizer that pads as the model expects"
    from transformers import AutoConfig, AutoModelForMaskedLM, BertTokenizerFast
    settings, pad, _ = STOCK[name]
    special = ['[CLS]', '[PAD]'] if pad else ['[PAD]', '[CLS]']
    words = ['the', 'old', 'river', 'stone', *map(str, range(10)), *(f'##{i}' for i in range(10))]
    pieces = [*special, '[SEP]', '[UNK]', '[MASK]', *words]
    tok = BertTokenizerFast(vocab={w: i for i, w in enumerate(pieces)})
    ids = dict(pad_token_id=pad, bos_token_id=tok.cls_token_id, eos_token_id=tok.sep_token_id,
               cls_token_id=tok.cls_token_id, sep_token_id=tok.sep_token_id)
    config = AutoConfig.for_model(name, vocab_size=len(tok), **ids, **settings | more)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


class Code:
    "An object whose pickle runs something when it is opened"
    def __init__(self, folder): self.path = str(folder.with_name('was_run'))
    def __reduce__(self): return open, (self.path, 'w')


def odd_folder(kind, folder):
    "A stock BERT with one oddity that people's folders have"
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
    stock_folder('bert', folder, max_position_embeddings=64)
    path, weights = folder/'model.safetensors', load_file(folder/'model.safetensors')
    others = {'half precision': {n: w.half() for n, w in weights.items()},
              'another prefix': {f'net.{n}': w for n, w in weights.items()},
              'a layer is gone': {n: w for n, w in weights.items() if '.query.' not in n}}
    if kind in others: save_file(others[kind], path, dict(format='pt'))
    if kind == 'no head': AutoModel.from_pretrained(folder).save_pretrained(folder)
    if kind == 'a head of three classes':
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    if kind == 'no mask token':
        settings = json.loads((folder/'tokenizer_config.json').read_text())
        (folder/'tokenizer_config.json').write_text(json.dumps(settings | dict(mask_token=None)))
    if kind == 'a list of words':
        words = AutoTokenizer.from_pretrained(folder).get_vocab()
        (folder/'vocab.txt').write_text('\n'.join(sorted(words, key=words.get)) + '\n')
        for name in ('tokenizer.json', 'tokenizer_config.json'): (folder/name).unlink()
    if 'added tokens' in kind:
        tok = AutoTokenizer.from_pretrained(folder)
        tok.add_tokens(['<a>', '<b>'])
        tok.save_pretrained(folder)
    if kind == 'added tokens':
        model = AutoModel.from_pretrained(folder)
        model.resize_token_embeddings(len(tok))
        model.save_pretrained(folder)
    if kind == 'a tokenizer of tomorrow':
        state = json.loads((folder/'tokenizer.json').read_text())
        state['model'] = dict(type='WordPieceV2')
        (folder/'tokenizer.json').write_text(json.dumps(state))
    if kind == 'a pickle':
        torch.save(weights | dict(code=Code(folder)), folder/'pytorch_model.bin')
        path.unlink()
    if kind == 'a pickle beside': torch.save(dict(code=Code(folder)), folder/'pytorch_model.bin')
    return folder


FINE = ('half precision', 'no head', 'a head of three classes', 'no mask token', 'a list of words',
        'added tokens', 'a pickle beside')
ODD = {'another prefix': 'weights of its encoder',
       'a layer is gone': 'bert.encoder.layer.0.attention.self.query.bias',
       'added tokens, no rows': 'do not belong together', 'a tokenizer of tomorrow': 'cannot be loaded',
       'a pickle': 'pytorch_model.bin is a pickle'}


@pytest.mark.parametrize('kind', FINE)
def test_odd_folders_are_fine_tuned_in_float32(kind, tmp_path):
    folder = odd_folder(kind, tmp_path/'a b [v1]')
    network = classifier(folder, toy(), True, 0)
    assert {p.dtype for p in network.parameters()} == {torch.float32} and network.num_labels == 2
    result = run_job(jobs(toy(), replace(GRID, max_train=16), 1, ('pretrained',))[0], folder, toy())
    assert not result['diverged'] and not (tmp_path/'was_run').exists()


@pytest.mark.parametrize('kind', ODD)
def test_folders_that_cannot_be_fine_tuned_are_one_line(kind, tmp_path, capsys):
    folder = odd_folder(kind, tmp_path/'model')
    capsys.readouterr()
    code = main(['glue', '--model', str(folder), '--tasks', 'review_polarity', '--scale', 'tiny',
                 '--out', str(tmp_path/'out')])
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if line.startswith('cramlit: ')]
    assert code == 1 and len(said) == 1 and err.endswith(f'{said[0]}\n') and ODD[kind] in said[0]
    assert not (tmp_path/'was_run').exists()


@pytest.mark.parametrize('name', STOCK)
def test_any_stock_folder_is_fine_tuned_up_to_its_last_position(name, tmp_path):
    folder, room = stock_folder(name, tmp_path/name), STOCK[name][2]
    check_length(folder, room)
    with pytest.raises(UsageError, match=f'has {room} positions'): check_length(folder, room + 1)
    first, second = ['the old river '*40, 'stone', 'the river'], ['the old stone '*40, 'old', 'the stone']
    e = Examples(first*4, second*4, [0, 1, 1]*4)
    task = Task('pairs', 2, ('accuracy',), e, {'validation': e})
    rows = run_suite(folder, [task], replace(GRID, max_length=room), 1, tmp_path/'out', IDS)
    scored = {r['variant'] for r in rows if r['metric'] == 'headline' and r['value'] is not None}
    assert scored == {'from-scratch', 'pretrained', 'majority', 'bag-of-words'}
    _, tok = load_parts(folder)
    network = classifier(folder, task, True, 0).eval()
    features, collate = encode(tok, e, room), DataCollatorWithPadding(tok)
    with torch.no_grad():
        alone, together = network(**collate(features[1:2])), network(**collate(features[:2]))
    assert max(len(f['input_ids']) for f in features) == room
    assert (alone[0] - together[1]).abs().max() < 1e-5  # padding changes nothing


def test_a_tokenizer_without_padding_is_one_line(model, tmp_path, capsys):
    shutil.copytree(model, tmp_path/'model')
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
        path = tmp_path/'model'/name
        if not path.exists(): continue
        kept = {k: v for k, v in json.loads(path.read_text()).items() if k != 'pad_token'}
        path.write_text(json.dumps(kept | dict(tokenizer_class='PreTrainedTokenizerFast')))
    assert main(['glue', '--model', str(tmp_path/'model'), '--out', str(tmp_path/'o')]) == 1
    assert 'no padding token' in capsys.readouterr().err


def test_all_cores_work_unless_the_user_says_otherwise():
    with protocol.local_workers(): assert effective_n_jobs(None) == cpu_count()
    with parallel_config('loky', n_jobs=1), protocol.local_workers(): assert effective_n_jobs(None) == 1
    with parallel_config('loky', n_jobs=3), protocol.local_workers(): assert effective_n_jobs(None) == 3
    with parallel_config('threading', n_jobs=3), pytest.raises(UsageError, match='one stream of random'):
        protocol.run_parallel([delayed(str)()], 1, 'jobs')


@pytest.mark.usefixtures('two_workers')
def test_a_cluster_that_the_user_chose_does_the_work(model, tmp_path):
    "Through joblib on a dask cluster, with the results of local processes"
    import dask
    from dask.distributed import Client, LocalCluster, get_task_stream
    patience = dict.fromkeys(('connect', 'tcp'), '300s')  # on a machine that has other work as well
    dask.config.set({f'distributed.comm.timeouts.{k}': v for k, v in patience.items()})
    here = run_suite(model, [toy()], GRID, 1, tmp_path/'here', IDS)
    local = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with LocalCluster(**local) as cluster, Client(cluster) as client, get_task_stream(client) as done:
        with parallel_config('dask'): there = run_suite(model, [toy()], GRID, 1, tmp_path/'there', IDS)
    assert done.data and values(here) == values(there)


def test_the_paper_grid_is_the_papers():
    grid = get_scale('paper').finetune
    small, large = jobs(toy(), grid, grid.seeds), jobs(toy('mnli'), grid, grid.seeds)
    assert len(set(small)) == 2*3*2*4*5 and len(set(large)) == 2*2*1*2*5
    assert {j.max_length for j in small + large} == {128} and {j.weight_decay for j in small} == {.1}
    assert {(j.epochs, j.batch_size, j.lr) for j in large} == {
        (epochs, 32, lr) for epochs in (3, 5) for lr in (5e-5, 8e-5)}
    for task, n in (('toy', 1000), ('mnli', 1000)):  # the work is that of the jobs
        work = jobs(toy(task), grid, grid.seeds)
        assert grid_work(task, n, grid, grid.seeds) == {
            'fine-tunings': len(work), 'sequences': sum(j.epochs*n for j in work),
            'steps': sum(j.epochs*math.ceil(n/j.batch_size) for j in work)}
    assert suite_work(grid)['rte']['fine-tunings'] == 3*len(small)//2  # from MNLI's network as well
    assert suite_work(replace(grid, protocol='plain'))['rte']['fine-tunings'] == len(small)


def test_of_many_jobs_on_one_task_none_tokenises_it_anew(model, tmp_path, monkeypatch):
    done, real = [], finetuning._tokenize

    def count(tok, examples, max_length):
        done.append(len(examples))
        return real(tok, examples, max_length)
    monkeypatch.setattr(finetuning, '_tokenize', count)
    finetuning._encoded.cache_clear()
    work = jobs(toy(), GRID, 4)
    with parallel_config('threading', n_jobs=1): found = job_results(model, [toy()], work, tmp_path/'a')
    assert len(work) == 8 and done == [64, 32]
    monkeypatch.setattr(finetuning, 'encode', real)
    with parallel_config('threading', n_jobs=1): again = job_results(model, [toy()], work, tmp_path/'b')
    assert [r['predictions'] for r in again] == [r['predictions'] for r in found]


def test_a_network_without_segments_gives_its_inputs_to_no_other(model):
    finetuning._encoded.cache_clear()
    (_, first), (_, second) = load_parts(model), load_parts(model)
    first.model_input_names = ['input_ids', 'attention_mask']
    examples = toy().train
    assert 'token_type_ids' not in encode(first, examples, 16)[0]
    assert 'token_type_ids' in encode(second, examples, 16)[0]


def test_another_tokenizer_does_not_get_what_the_first_one_made(model, tmp_path):
    from transformers import AutoTokenizer
    first = AutoTokenizer.from_pretrained(model)
    before = encode(first, toy().train, 32)
    assert encode(AutoTokenizer.from_pretrained(model), toy().train, 32) is before
    assert encode(AutoTokenizer.from_pretrained(stock_folder('bert', tmp_path)), toy().train, 32) != before
    for n in range(finetuning.KEPT): encode(first, Examples([f'stone {n}'], None, [0]), 32)
    assert finetuning._encoded.cache_info().currsize == finetuning.KEPT  # and no more are remembered


def test_gradients_are_clipped_at_a_norm_of_one(model, monkeypatch):
    norms, real = [], torch.nn.utils.clip_grad_norm_

    def watch(parameters, limit):
        parameters = [p for p in parameters if p.grad is not None]
        before = float(real(parameters, limit))
        norms.append((before, float(torch.nn.utils.get_total_norm([p.grad for p in parameters]))))
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', watch)
    run_job(jobs(toy(), replace(GRID, lrs=(.1,)), 1)[0], model, toy())
    assert len(norms) == 4 and max(before for before, _ in norms) > 1
    assert max(after for _, after in norms) < 1 + 1e-4


@pytest.mark.parametrize('name', STOCK)
@pytest.mark.parametrize('pooling', ['cls', 'mean'])
def test_all_families_have_the_same_classifier(name, pooling, tmp_path):
    "Pooled states, a layer and tanh, one dropout, a layer; nothing else, and nothing of the family's own"
    network = classifier(stock_folder(name, tmp_path), toy(), True, 0, pooling)
    parts = dict(network.named_children())
    assert set(parts) == {'encoder', 'dense', 'dropout', 'out'} and parts['dropout'].p == .1
    assert getattr(network.encoder, 'pooler', None) is None
    ids, mask = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[1, 1, 1, 0]])
    network.eval()
    with torch.no_grad():
        states = network.encoder(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        pooled = states[0] if pooling == 'cls' else states[:3].mean(0)
        expected = network.out(torch.tanh(network.dense(pooled)))
        torch.testing.assert_close(network(input_ids=ids, attention_mask=mask)[0], expected)
    with pytest.raises(UsageError, match='pooling'): classifier(tmp_path, toy(), True, 0, 'max')


def stand_in(folder, tmp_path, broken=''):
    "An archive in the layout of the reference encoder's, with a small network and things that are not taken"
    import zipfile
    path = tmp_path/'model.zip'
    with zipfile.ZipFile(path, 'w') as z:
        for p in sorted(stock_folder('bert', folder).iterdir()):
            if p.name not in (broken, 'special_tokens_map.json'): z.write(p, p.name)
        z.writestr('special_tokens_map.json', '{"pad_token": "[PAD]"}')
        z.writestr('1_Pooling/config.json', '{}')
        z.writestr('modules.json', '[]')
        z.writestr('run.py', 'raise SystemExit')
    return path


def test_the_reference_encoder_is_data_out_of_an_archive(tmp_path, monkeypatch):
    archive = stand_in(tmp_path/'stock', tmp_path)
    monkeypatch.setattr(protocol, 'fetch_member', lambda *args, source: archive)
    folder = reference_encoder(tmp_path/'all-MiniLM-L6-v2')
    assert {p.name for p in folder.iterdir()} == set(protocol._REFERENCE_FILES)
    classifier(folder, toy(), True, 0)
    before = (folder/'config.json').stat().st_mtime_ns
    assert reference_encoder(folder) == folder and (folder/'config.json').stat().st_mtime_ns == before
    archive.write_bytes(b'no archive')
    with pytest.raises(CramlitError, match='delete it'): reference_encoder(tmp_path/'again')
    stand_in(tmp_path/'other', tmp_path, 'model.safetensors')
    with pytest.raises(CramlitError, match='model.safetensors'): reference_encoder(tmp_path/'again')


def test_the_reference_is_a_column_and_marks_what_tells_nothing(tmp_path, monkeypatch):
    "On labels that nothing predicts even a good encoder is at chance"
    archive = stand_in(tmp_path/'stock', tmp_path)
    monkeypatch.setattr(protocol, 'fetch_member', lambda *args, source: archive)
    noise = Examples(toy().train.first, None, np.random.default_rng(0).integers(0, 2, 64).tolist())
    tasks = [toy('told'), Task('noise', 2, ('accuracy',), noise, {'validation': noise.sample(32)})]
    monkeypatch.setattr(protocol, 'load_tasks', lambda *args: tasks)
    scale = replace(get_scale('tiny'), finetune=replace(GRID, epochs=(12,)))
    monkeypatch.setattr(protocol, 'run_suite', lambda model, tasks, grid, *args, **how: grid)
    grid = evaluate_reference(tmp_path/'out', get_scale('paper'), 'surrogate')
    assert {grid.grid(task).lrs for task in ('mnli', 'cola')} == {protocol.REFERENCE_LRS}
    monkeypatch.setattr(protocol, 'run_suite', run_suite)
    with parallel_config('threading', n_jobs=1): rows = evaluate_reference(tmp_path/'out', scale, 'surrogate')
    assert {r['variant'] for r in rows} == {'pretrained', 'majority', 'bag-of-words'}
    assert all(r['reference'] and r['recipe'] == 'all-MiniLM-L6-v2' for r in rows)
    heads = {(r['task'], r['variant']): r for r in rows if r['metric'] == 'headline'}
    for r in heads.values():  # as if there were no doubt about the one and much about the other
        if r['variant'] == 'pretrained':
            r['seed_values'] = [95., 96., 95.5, 95.7] if r['task'] == 'told' else [50., 60., 45., 55.]
    found = gains(rows)
    assert set(found.versus) == {'majority'} and at_chance(found) == {'noise'}
    text = write_table4(rows, tmp_path)[0].read_text()
    assert 'noise§ accuracy' in text and 'told accuracy' in text and 'all-MiniLM-L6-v2, pretrained' in text
    assert 'Apache-2.0' in text and 'no task has scores' not in text


def test_a_table_has_one_pooling_for_all(tmp_path):
    some = headline('x', 'pretrained', 5., 5., 5.)
    rows = [r | dict(pooling=p, recipe=p) for p in ('cls', 'mean') for r in some]
    with pytest.raises(UsageError, match='cls, mean'): write_table4(rows, tmp_path)
    text = write_table4(rows[:2], tmp_path)[0].read_text()
    assert 'first token' in text and 'mean over all tokens' not in text


def test_one_validation_example_is_refused_before_anything_is_trained(model, tmp_path):
    one = replace(toy(), validation={'validation': toy().train.sample(1)})
    with pytest.raises(UsageError, match=r'give toy \(validation\) more'):
        run_suite(model, [toy('other'), one], GRID, 1, tmp_path/'out', IDS)
    assert not (tmp_path/'out').exists()


def end_this_process(): os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_ended_from_outside_is_said_without_a_traceback():
    message = 'a process of the fine-tunings was ended from outside'
    with parallel_config('loky', n_jobs=2), pytest.raises(CramlitError, match=message):
        run_parallel([delayed(end_this_process)() for _ in range(2)], 2, 'fine-tunings')


def test_a_table_has_one_suite(tmp_path):
    rows = [r | dict(suite=s) for s in ('surrogate', 'glue') for r in headline('x', 'pretrained', 5., 5., 5.)]
    with pytest.raises(UsageError, match=r'suites \(glue, surrogate\).*give the rows of one'):
        write_table4(rows, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_table_says_what_of_an_example_is_seen():
    seen, lengths = about_lengths(['24hbert', 'modern'], 'laptop')
    assert 'at most 64 tokens' in seen and 'sees all of it' in seen
    assert lengths == ('24hbert, modern, as at scale laptop: pretrained on sequences of 32 tokens. In '
                       '24hbert the embeddings of later positions were not trained.')
    assert len(about_lengths(['24hbert', 'my-recipe'], 'paper')) == 1


def test_a_task_may_start_from_the_network_that_learned_mnli(model, tmp_path, capsys):
    "The protocol of the paper: both columns, each with an average, and nothing done twice"
    from test_glue import make_tsv
    for name in ('mnli', 'rte', 'cola'): make_tsv(tmp_path/'glue', name)
    names, out, tiny = ['mnli', 'rte', 'cola'], tmp_path/'out', get_scale('tiny')
    scale = replace(tiny, finetune=replace(tiny.finetune, batch_sizes=(2,)))  # two steps, the first at rate 0

    def run(**how):
        with parallel_config('threading', n_jobs=1):
            return evaluate(model, out, scale, 'glue', str(tmp_path/'glue'), names, 1, **how)
    plain = run()
    assert not (out/'mnli').exists() and 'mnli-first' not in {r['variant'] for r in plain}
    rows = run(protocol='paper')
    assert len(list((out/'jobs').iterdir())) == 2*3 + 1
    first = {(r['task'], r['metric']): r for r in rows if r.get('aggregate') and r['variant'] == 'mnli-first'}
    usual = {(r['task'], r['metric']): r for r in rows if r.get('aggregate') and r['variant'] == 'pretrained'}
    assert set(first) == set(usual) and first['average', 'average']['tasks'] == 3
    assert first['cola', 'matthews']['value'] == usual['cola', 'matthews']['value']
    start, = (out/'mnli').iterdir()
    learned = classifier(start, load_tasks('glue', ['mnli'], str(tmp_path/'glue'))[0], True, 0)
    before = classifier(model, load_tasks('glue', ['mnli'], str(tmp_path/'glue'))[0], True, 0)
    parts = zip(learned.encoder.parameters(), before.encoder.parameters(), strict=True)
    assert any((a != b).any() for a, b in parts)
    kept = {p: p.stat().st_mtime_ns for p in [*(out/'jobs').iterdir(), *start.iterdir()]}
    assert run(protocol='paper') == rows
    assert {p: p.stat().st_mtime_ns for p in [*(out/'jobs').iterdir(), *start.iterdir()]} == kept
    table = table4(rows)
    assert [c for c in table if 'published' not in c][-2:] == ['24hbert, pretrained', '24hbert, mnli-first']
    assert 'mnli-first: MRPC' in write_table4(rows, tmp_path/'figures')[0].read_text()
    capsys.readouterr()
    options = ['glue', '--model', str(model), '--out', str(out), '--scale', 'tiny', '--protocol']
    assert main([*options, 'paper', '--suite', 'glue', '--tasks', 'rte']) == 2
    assert 'give --protocol plain' in capsys.readouterr().err
    assert main([*options, 'paper']) == 2 and main([*options, 'papper']) == 2
    assert "Did you mean 'paper'?" in capsys.readouterr().err




def headline(task, variant, value, low, high, recipe='24hbert'):
    ids = IDS | dict(recipe=recipe, aggregate='median', task=task, variant=variant, seeds=3, spread_low=low,
                     spread_high=high, labels_from='human', versions={}, hardware='a machine', commit='abc',
                     dirty=True, unit='%', value=value)
    return [dict(metric='headline', split='all', **ids), dict(metric='accuracy', split='validation', **ids)]


def test_what_was_not_measured_is_an_empty_cell(tmp_path):
    rows = [r for v in ('from-scratch', 'pretrained') for r in headline('x', v, 50., 40., 60.)]
    rows += headline('y', 'pretrained', None, None, None)
    rows += average(rows, IDS)
    table = table4(rows)
    assert table.loc['y accuracy', '24hbert, pretrained'] == ''
    assert set(table.columns) == {'24hbert, from-scratch', '24hbert, pretrained'}
    text = write_table4(rows, tmp_path)[0].read_text()
    assert 'nan' not in text and 'None' not in text and 'abc+changes' in text
    assert 'no task has scores of both' in gain_from_pretraining(gains(rows), '24hbert', 'from-scratch')


def test_better_and_worse_are_said_of_corrected_differences_only(tmp_path):
    rng, rows = np.random.default_rng(0), []
    values = {'from-scratch': (60., 50.), 'pretrained': (70., 50.2), 'bag-of-words': (70.1, 66.)}
    for variant, of_tasks in values.items():
        for task, value in zip('xy', of_tasks, strict=True):
            row, _ = headline(task, variant, value, value - 1, value + 1)
            seeds = dict(seed_values=list(value + .3*rng.normal(size=5))) if variant != 'bag-of-words' else {}
            rows.append(row | seeds | dict(resampled=list(value + .5*rng.normal(size=100))))
    found = gains(rows)
    assert len(found) == 6 and set(found.task) == {'x', 'y', 'average'}
    assert gain_from_pretraining(found, '24hbert', 'from-scratch') == (
        '24hbert, pretrained against from-scratch: better on x, average; not significant on y.')
    assert gain_from_pretraining(found, '24hbert', 'bag-of-words') == (
        '24hbert, pretrained against bag-of-words: worse on y, average; not significant on x.')
    summaries = [row | dict(metric='accuracy', split='validation') for row in rows]
    text, gained = (p.read_text() for p in write_table4(rows + summaries, tmp_path) if p.name in (
        'table4_glue.md', 'table4_gains.md'))
    assert 'better on x' in text and 'Standard error' in text and 'Holm' in gained and '+10.' in gained


def test_what_was_not_tested_is_neither_at_chance_nor_not_told_apart():
    columns = 'model', 'versus', 'task', 'change', 'p'
    lines = [('ours', 'from-scratch', 'x', 9., .001), ('ours', 'from-scratch', 'y', 1., .5),
             ('ours', 'from-scratch', 'z', 9., np.nan)]
    lines += [('encoder', 'majority', task, change, p) for _, _, task, change, p in lines]
    found = pd.DataFrame(lines, columns=columns)
    assert at_chance(found) == {'y'}
    assert gain_from_pretraining(found, 'ours', 'from-scratch') == (
        'ours, pretrained against from-scratch: better on x; not significant on y; not tested on z.')


def test_the_average_over_nine_numbers_and_submitted_scores(tmp_path):
    ids = dict(stage='glue', suite='glue', scale='paper', recipe='24hbert', variant='pretrained',
               aggregate='median', seeds=1, versions={}, hardware='a machine', unit='%')
    rows = [dict(metric=metric, task=task, split=split, value=80. + i, **ids)
            for i, (task, split, metric) in enumerate(PUBLISHED)]
    columns = ','.join(PUBLISHED.values())
    (tmp_path/'submitted.csv').write_text(f'row,{columns}\nours,{",".join(["70"]*9)}\n')
    write_table4(rows, tmp_path)
    line = pd.read_csv(tmp_path/'table4_glue.csv', index_col=0).loc[NINE[2]]
    assert line['24hbert, pretrained'] == 84. and line['ours (test, submitted)'] == 70.
    assert line['published: BERT-base (test)'] == 79.6
    assert NINE[2] not in table4(rows[1:]).index or table4(rows[1:]).loc[NINE[2], '24hbert, pretrained'] == ''


def test_two_recipes_have_rows_of_their_own():
    two = ('24hbert', 'bert-base')
    rows = []
    for i, recipe in enumerate(two):
        mine = []
        for v in ('majority', 'from-scratch', 'pretrained'):
            mine += headline('x', v, 50. + i, 40., 60., recipe)
        rows += [*mine, *average(mine, IDS | dict(recipe=recipe))]
    columns = {'majority', '24hbert, pretrained', 'bert-base, pretrained', 'bert-base, from-scratch'}
    assert set(table4(rows).columns) >= columns


def test_two_models_of_one_recipe_have_columns_of_their_own(tmp_path):
    rows = []
    for seed, weights, value in ((42, 'a', 60.), (43, 'b', 70.), (43, 'c', 80.)):
        some = headline('x', 'from-scratch', 50., 50., 50.) + headline('x', 'pretrained', value, value, value)
        rows += [r | dict(pretraining_seed=seed, weights=weights) for r in some]
    table = table4(rows).loc['x accuracy']
    names = '24hbert (seed 42)', '24hbert (seed 43, weights b)', '24hbert (seed 43, weights c)'
    assert [table[f'{n}, pretrained'] for n in names] == [f'{x:.1f} ({x:.1f}–{x:.1f})' for x in (60, 70, 80)]
    text = write_table4(rows, tmp_path)[0].read_text()
    for name in names: assert f'{name}: no task has scores of both' in text  # invented, without draws


def test_a_score_with_diverged_seeds_is_marked(tmp_path):
    rows = [r | dict(diverged=True, diverged_seeds=2) for r in headline('x', 'pretrained', 60., 50., 70.)]
    rows += headline('y', 'pretrained', 60., 50., 70.)
    table = table4(rows)['24hbert, pretrained']
    assert table['x accuracy'].endswith(' ‡') and not table['y accuracy'].endswith('‡')
    text = write_table4(rows, tmp_path)[0].read_text()
    assert '‡ Seeds that diverged' in text and 'x, 24hbert pretrained: 2 of 3' in text
    assert r'$\ddagger$' in (tmp_path/'table4_glue.tex').read_text()


def test_report_of_nothing_and_of_broken_rows(tmp_path, capsys):
    (tmp_path/'runs').mkdir()
    (tmp_path/'runs'/'rows.jsonl').write_text('{"metric": "x"\n')
    assert main(['report', '--runs', str(tmp_path/'runs'), '--out', str(tmp_path/'figures')]) == 1
    assert 'rows.jsonl, line 1: not JSON' in capsys.readouterr().err and not (tmp_path/'figures').exists()
    from cramlit.reporting.report import report
    with pytest.raises(CramlitError, match='no result rows'): report(tmp_path/'nowhere', tmp_path/'figures')


def test_runs_of_one_recipe_and_one_seed_have_the_names_of_their_folders(tmp_path):
    from cramlit.reporting.report import finished_runs
    def add(folder, seed):
        (tmp_path/folder).mkdir(parents=True)
        (tmp_path/folder/'run.json').write_text(json.dumps(dict(recipe=dict(name='24hbert', seed=seed))))
        for name in ('metrics.jsonl', 'rows.jsonl'): (tmp_path/folder/name).write_text('{}\n')
    add('a', 1)
    assert list(finished_runs(tmp_path)) == ['24hbert']
    add('b/run', 2)
    assert list(finished_runs(tmp_path)) == ['24hbert (seed 1)', '24hbert (seed 2)']
    add('c', 2)
    assert list(finished_runs(tmp_path)) == ['a', 'b/run', 'c']


def test_rows_are_json_that_any_reader_takes(tmp_path):
    write_rows(tmp_path/'rows.jsonl', [dict(metric='x', value=None, unit='%')])
    row = json.loads((tmp_path/'rows.jsonl').read_text(), parse_constant=lambda c: pytest.fail(c))
    assert row == dict(metric='x', value=None, unit='%')
    with pytest.raises(ValueError):
        write_rows(tmp_path/'nan.jsonl', [dict(metric='x', value=math.nan, unit='%')])
    assert not (tmp_path/'nan.jsonl').exists()


def test_unknown_names(capsys, tmp_path):
    assert protocol.task_names('surrogate', [])
    assert load_tasks('surrogate', ['review_polarity'])[0].name == 'review_polarity'
    assert main(['glue', '--model', 'm', '--tasks', 'review_polarty', '--out', str(tmp_path/'o')]) == 2
    assert "Did you mean 'review_polarity'?" in capsys.readouterr().err


@pytest.mark.parametrize('change, message', [
    (dict(variant='from scratch'), "variant.*Did you mean 'from-scratch'"),
    (dict(max_length=999), 'positions'), (dict(epochs=0), 'at least one epoch'),
    (dict(max_length=1), 'leave no room')])
def test_an_impossible_job_is_refused(model, change, message):
    job, = jobs(toy(), GRID, 1, ('pretrained',))[:1]
    with pytest.raises(UsageError, match=message): finetuning.run_job(replace(job, **change), model, toy())


def test_averages_over_other_tasks_are_not_compared():
    def row(task, *seeds): return dict(task=task, value=1., seed_values=list(seeds), resampled=[1., 2.])
    two, one = [row('a', 1., 2.), row('b', 3., 4.)], [row('a', 1., 2.)]
    with pytest.raises(ValueError, match='same tasks'): headline_difference(two, one)
    odd = [row('a', 1.), row('b', 3., 4.)]
    with pytest.raises(ValueError, match='same seeds'): headline_difference(two, odd)
    assert headline_difference(two, two).change == 0


def test_what_is_no_prediction_is_not_written():
    assert [format_prediction('stsb', x) for x in (7., -1.)] == ['5.000', '0.000']
    assert format_prediction('rte', 1) == 'not_entailment'
    for task, wrong in (('stsb', float('nan')), ('rte', -1), ('rte', .9), ('rte', 2)):
        with pytest.raises(ValueError, match='is no prediction'): format_prediction(task, wrong)


def test_a_network_of_mnli_that_diverged_is_not_kept(model, tmp_path, monkeypatch):
    real = finetuning.run_job
    monkeypatch.setattr(protocol, 'run_job', lambda *a, **k: real(*a, **k) | dict(diverged=True))
    job, = jobs(toy(), GRID, 1, ('pretrained',))[:1]
    assert 'its training diverged' in protocol._train_and_keep(job, model, toy(), tmp_path/'mnli')


def test_a_suite_needs_a_seed(model, tmp_path):
    with pytest.raises(UsageError, match='at least one is needed'):
        run_suite(model, [toy()], GRID, 0, tmp_path, IDS)
