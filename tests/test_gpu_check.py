"The check of a GPU, on a CPU: limits and failures do not stop it, and steps that need no GPU run in small"
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_bundle
import gpu_check
import pandas as pd
import pytest
from conftest import PATIENCE

from cramlit.reporting.report import report

ROOT = Path(__file__).parent.parent
# stands for gpu_steps.py: one step finds a fault, one breaks off, one hangs with a child of its own
STEPS = '''
import json, subprocess, sys, time
if sys.argv[1] == 'count': sys.exit(print(1))
step, out = sys.argv[1], sys.argv[-5]
def row(**r):
    with open(out + '/rows.jsonl', 'a') as f: f.write(json.dumps(dict(step=step, **r)) + '\\n')
row(metric='passed', value=float(step != 'functional'), check='it works', why='no', commit='c', dirty=False,
    versions={}, hardware='a GPU')
if step == 'memory': raise ValueError('broken off')
if step == 'compile':
    with open(out + '/rows.jsonl', 'a') as f: f.write('{"half a li')
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    open(out + '/child', 'w').write(str(child.pid))
    time.sleep(600)
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path/'steps.py').write_text(STEPS)
    monkeypatch.setattr(gpu_check, 'PROGRAM', tmp_path/'steps.py')
    class Until(subprocess.Popen):
        "Of the step that hangs, the time is over when it has a child, and not before"
        def wait(self, timeout=None):
            if timeout and 'compile' in self.args:
                while not (tmp_path/'child').exists(): time.sleep(.05)
                timeout = .1
            return super().wait(timeout)
    monkeypatch.setattr(gpu_check, 'subprocess', SimpleNamespace(**vars(subprocess) | dict(Popen=Until)))
    names = 'machine', 'functional', 'memory', 'compile', 'speed'
    monkeypatch.setattr(gpu_check, 'STEPS', dict.fromkeys(names, (PATIENCE, PATIENCE)))
    return tmp_path


def alive(pid):
    path = Path(f'/proc/{pid}/stat')
    return path.exists() and path.read_text().split()[2] != 'Z'


def test_no_failure_stops_the_check_and_nothing_is_left_running(stand_in, capsys):
    assert not gpu_check.check(stand_in, stand_in, False, [])
    rows = gpu_check.read(stand_in)
    ends = {r['step']: r for r in rows if r['metric'] == 'seconds'}
    assert {k: r['outcome'] for k, r in ends.items()} == dict(
        machine='done', functional='done', memory='failed', compile='out of time', speed='done')
    assert ends['memory']['why'] == 'ValueError: broken off'
    assert all(r['hardware'] == 'a GPU' for r in ends.values()), 'stamped as the other rows are'
    assert len([r for r in rows if r['metric'] == 'passed']) == 5, 'half a line spoils no other'
    child = (stand_in/'child').read_text()
    for _ in range(20*PATIENCE):
        if not alive(child): break
        time.sleep(.05)
    assert not alive(child)
    said = capsys.readouterr().out
    assert 'functional' in said and 'it works' in said and 'ValueError: broken off' in said


def test_all_is_well_when_all_is_well(stand_in):
    assert gpu_check.check(stand_in, stand_in, False, ['machine', 'speed'])
    assert not gpu_check.check(stand_in, stand_in, False, ['functional'])


def test_the_limits_add_up():
    assert [sum(limit[fast] for limit in gpu_check.STEPS.values()) for fast in (0, 1)] == [550, 250]


@pytest.fixture(scope='module')
def prepared(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp('gpu')/'data'
    settings = f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128'
    gpu_bundle.prepare_data(folder, ('tiny', 'tiny-modern'), settings)
    return folder


def run(*steps, out, data, code=0):
    "The command; the rows it leaves"
    command = [sys.executable, ROOT/'tests'/'gpu_check.py', '--out', out, '--data', data, '--steps', *steps]
    for name in ('24hbert', 'modern'):  # they are not needed here
        (data/name).mkdir(exist_ok=True)
        (data/name/'manifest.json').touch()
    env = gpu_check.environment() | dict(CUDA_VISIBLE_DEVICES='')
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    logs = ''.join((out/f'{s}.log').read_text()[-3000:] for s in steps if (out/f'{s}.log').exists())
    assert done.returncode == code, done.stdout + done.stderr + logs
    return gpu_check.read(out)


def checks(rows, step):
    return {(r['check'], r.get('precision'), r.get('recipe')) for r in rows
            if r['step'] == step and r['metric'] == 'passed' and r['value'] == 1}


def test_one_seed_all_precisions_and_a_resumed_run(prepared, tmp_path):
    rows = run('functional', out=tmp_path, data=prepared)
    found = checks(rows, 'functional')
    assert found == {(check, p, None) for check in ('gradient', 'randomness_by_seed')
                     for p in ('fp32', 'fp16', 'bf16')} | {('resume', None, None)}
    off = {r['metric']: r['value'] for r in rows if r['metric'].startswith('difference_of')}
    assert off == dict(difference_of_two_runs=0, difference_of_resumed_run=0)
    assert all(r['stage'] == 'gpu_check' and 'versions' in r for r in rows)


def test_two_ranks_end_with_the_same_weights(prepared, tmp_path):
    rows = run('ranks', out=tmp_path, data=prepared)
    assert checks(rows, 'ranks') == {('weights_equal', None, 'tiny'), ('weights_equal', None, 'tiny-modern')}


@pytest.mark.slow
def test_what_needs_a_compiler_or_a_kill_or_a_gpu_runs_in_small(prepared, tmp_path):
    rows = run('machine', 'compile', 'memory', 'speed', 'gpus', out=tmp_path, data=prepared)
    graphs = [r['value'] for r in rows if r['metric'] in ('graphs', 'graph_breaks')]
    assert graphs in ([], [0, 1]), 'one graph, no break; or no compiler'
    assert {check for check, *_ in checks(rows, 'gpus')} == {
        'bandwidth', 'weights_equal', 'killed_rank', 'stopped_and_resumed'}
    assert [r['value'] for r in rows if r['metric'] == 'same_as_without'] == [1, 1]
    peaks = [r for r in rows if r['metric'] == 'peak_memory_bytes']
    assert {r['phase'] for r in peaks} == {'fresh', 'resumed', 'validating'}
    assert {r['value'] for r in peaks} == {None}, 'no figure without a GPU'


@pytest.mark.slow
def test_a_run_that_learns_nothing_is_found(prepared, tmp_path):
    rows = run('training', out=tmp_path, data=prepared, code=1)  # words drawn at random teach no more
    why = {r['recipe']: r['why'] for r in rows if r['metric'] == 'passed'}
    assert set(why) == {'24hbert', 'modern'}
    assert all('no better than the unigram baseline' in w for w in why.values()), 'stopped, and gone on'


WITHOUT_EXTRAS = '''
import sys
missing = 'datasets pyarrow joblib scipy tabulate matplotlib papermill psutil trackio rich nbdev'.split()
sys.modules.update(dict.fromkeys(missing))
'''


def test_the_check_loads_where_there_is_little_but_torch_and_transformers(tmp_path):
    (tmp_path/'sitecustomize.py').write_text(WITHOUT_EXTRAS)
    env = gpu_check.environment()
    env['PYTHONPATH'] += f':{tmp_path}'
    done = subprocess.run([sys.executable, ROOT/'tests'/'gpu_steps.py', 'count'], env=env, text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stdout.strip().isdigit(), done.stderr


def test_a_bundle_holds_what_the_check_needs(prepared, tmp_path, monkeypatch):
    folder = tmp_path/'bundle'
    gpu_bundle.copy_code(folder)
    (folder/'wheels').mkdir()
    (folder/'wheels'/'tqdm-1-py3-none-any.whl').touch()  # is installed, and is left alone
    (folder/'wheels'/'absent-1-py3-none-any.whl').touch()
    archive = gpu_bundle.pack(folder)
    with tarfile.open(archive) as tar: names = set(tar.getnames())
    needed = 'cramlit/training/training.py', 'tests/gpu_check.py', 'tests/gpu_steps.py', 'tests/gpu_bundle.py'
    assert {f'bundle/{p}' for p in needed} <= names
    assert gpu_bundle.carried_commit() == {}, 'this is a checkout'
    monkeypatch.setattr(gpu_bundle, 'ROOT', folder)
    assert set(gpu_bundle.carried_commit()) == {'commit', 'dirty'}
    assert gpu_bundle.places() == [str(folder), str(folder/'wheels'/'absent-1-py3-none-any.whl')]
    monkeypatch.setattr(gpu_bundle, 'LIMIT', 10)
    with pytest.raises(SystemExit, match='take fewer documents'): gpu_bundle.pack(folder)


def test_the_wheels_of_the_bundle_are_pinned(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(subprocess, 'run', lambda command, check: asked.extend(command))
    gpu_bundle.take_wheels(tmp_path)
    lock = (ROOT/'requirements.lock').read_text().splitlines()
    pins = [x for x in asked if '==' in str(x)]
    assert len(pins) == len(gpu_bundle.WHEELS) and set(pins) <= set(lock) and '--no-deps' in asked


def row(metric, value, unit='', **ids):
    return dict(metric=metric, value=value, unit=unit, stage='gpu_check', why='') | ids


def test_rows_become_a_table_with_empty_cells(tmp_path):
    stamp = dict(commit='c', dirty=False, versions=dict(torch='2.13'), hardware='A GPU')
    speed = dict(step='speed', shape='large', micro_batch_size=256, **stamp)
    rows = [row('seconds', 3., 's', step='machine', outcome='failed', why='no library'),
            *(row('mfu', x, 'of the measured ceiling', **speed) for x in (.25, .5)),
            row('mfu', None, 'of the datasheet peak', **speed | dict(why='no datasheet is known')),
            row('passed', 0., check='timed', **speed), row('passed', None, check='fits', **speed)]
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    inner = tmp_path/'trials'/'train-24hbert'  # the runs of the check are not results
    inner.mkdir(parents=True)
    (inner/'rows.jsonl').write_text(json.dumps(row('validation_loss', 1.) | dict(stage='glue')) + '\n')
    files = report(tmp_path, tmp_path/'figures')
    assert {p.name for p in files} == {f'gpu_check.{x}' for x in ('md', 'csv', 'tex', 'jsonl')}
    table = pd.read_csv(tmp_path/'figures'/'gpu_check.csv', keep_default_na=False, index_col=0)
    assert table.value.tolist() == ['3', '0.5', '', 'no', ''], 'of two the later one; nothing is invented'
    assert 'A GPU' in (tmp_path/'figures'/'gpu_check.md').read_text()
