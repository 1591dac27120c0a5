"What others see of a run: trackers, guesses, its page, and the view in a terminal"
import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pexpect
import pytest
import torch
from conftest import PATIENCE
from safetensors.torch import load_file

import cramlit.training.tracking as track
import cramlit.training.training as train
from cramlit.core.recipes import UsageError, override
from cramlit.reporting.run_report import budget_spent, read_run, report_html, state, write_page
from cramlit.running.command import main
from cramlit.training.checkpoints import checkpoints
from cramlit.training.distributed import World

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning')


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def break_off_at(monkeypatch, call):
    "Make the training loop fail once, at its n-th step"
    real, calls = train.accumulate, []

    def broken(*args):
        calls.append(1)
        if len(calls) == call: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, 'accumulate', broken)


@pytest.fixture(scope='module')
def often(recipe):
    return override(recipe, ['validation.every=0.25', 'checkpoint.every=0.25'])


@pytest.fixture(scope='module')
def done(often, data, tmp_path_factory):
    "A finished run"
    out = tmp_path_factory.mktemp('runs')/'run'
    train.pretrain(often, data, out, steps=40, scale='tiny')
    return out


@pytest.fixture
def going(done, tmp_path):
    "The same run as it looked before it ended"
    shutil.copytree(done, tmp_path/'run')
    (tmp_path/'run'/'rows.jsonl').unlink()
    for name in ('run.json', 'metrics.jsonl'):  # not old yet, however slow this machine is
        os.utime(tmp_path/'run'/name, (time.time() + 3600,)*2)
    return tmp_path/'run'


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(folder), size_guidance={'scalars': 0}).Reload()


def test_tensorboard_has_every_line_once_though_the_run_was_broken_off(often, data, tmp_path, monkeypatch):
    break_off_at(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        train.pretrain(often, data, tmp_path/'run', steps=12, track='tensorboard')
    train.pretrain(often, data, tmp_path/'run', steps=12, track='tensorboard')
    seen, log = scalars(tmp_path/'run'/'tensorboard'), lines(tmp_path/'run'/'metrics.jsonl')
    got = [(e.step, e.value) for e in seen.Scalars('validation_loss')]
    assert got == [(x['step'], pytest.approx(x['validation_loss'])) for x in log if 'validation_loss' in x]
    assert [s for s, _ in got] == [0, 3, 6, 9, 12]
    assert 'configuration' in str(seen.Tags()['tensors'])


def test_steps_that_are_taken_again_are_not_logged_again(often, data, tmp_path, monkeypatch):
    "The log is past the last checkpoint when the run dies: its lines are dropped, but the tracker has them"
    often = override(often, ['checkpoint.every=0.5'])
    break_off_at(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        train.pretrain(often, data, tmp_path/'run', steps=12, track='tensorboard')
    for name in ('metrics.jsonl', 'samples.jsonl'):
        with open(tmp_path/'run'/name, 'a') as f: f.write('{"step": 10, "sec')  # what a kill may leave
    train.pretrain(often, data, tmp_path/'run', steps=12, track='tensorboard')
    steps = [e.step for e in scalars(tmp_path/'run'/'tensorboard').Scalars('validation_loss')]
    assert steps == [0, 3, 6, 9, 12]
    samples = lines(tmp_path/'run'/'samples.jsonl')
    sample_steps = [x['step'] for x in samples]
    sentences = {str(x['tokens']) for x in samples}
    assert sample_steps == sorted(sample_steps) and len(samples) == 5*len(sentences)


TRAIN_WITH_TRACKIO = '''
import json, sys
from cramlit.core.recipes import recipe_from_dict
from cramlit.training.training import pretrain
recipe, data, out = sys.argv[1:]
pretrain(recipe_from_dict(json.load(open(recipe))), data, out, steps=12, track='trackio')
'''

READ_TRACKIO = '''
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
runs = list(trackio.Api().runs('cramlit'))
print(json.dumps([(r.name, r.config, SQLiteStorage.get_logs('cramlit', r.name, run_id=r.id)) for r in runs]))
'''


def test_trackio_continues_one_run(often, data, tmp_path):
    pytest.importorskip('trackio')
    own = dict(TRACKIO_DIR=str(tmp_path/'trackio'), HF_HUB_OFFLINE='1', HF_TOKEN='hf_' + 'secret'*5)

    def python(code, *args):
        command = [sys.executable, '-c', code, *map(str, args)]
        return subprocess.run(command, env=os.environ | own, capture_output=True, text=True)

    def losses(log):
        return [(x['step'], x['validation_loss']) for x in log if 'validation_loss' in x]
    (tmp_path/'recipe.json').write_text(json.dumps(asdict(often)))
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'stop').touch()  # the wish to stop after the first step
    first = python(TRAIN_WITH_TRACKIO, tmp_path/'recipe.json', data, tmp_path/'run')
    assert 'Interrupted' in first.stderr and first.stdout == ''
    second = python(TRAIN_WITH_TRACKIO, tmp_path/'recipe.json', data, tmp_path/'run')
    assert second.returncode == 0 and second.stdout == '', second.stderr
    kept = python(READ_TRACKIO)
    assert kept.returncode == 0, kept.stderr
    (name, config, logs), = json.loads(kept.stdout)
    assert name.startswith('run-') and 'secret' not in str(config)
    assert config['recipe']['optim']['lr'] == often.optim.lr
    want = losses(lines(tmp_path/'run'/'metrics.jsonl'))
    assert losses(logs) == want and len(want) == 5


FAKE_WANDB = '''
calls = []
def Settings(**how): return how
def init(**how):
    calls.append(('init', how))
    return Run()
class Run:
    def log(self, values, step): calls.append(('log', step, values))
    def finish(self): calls.append(('finish',))
'''


def test_wandb_is_offline_and_keeps_its_id(often, data, tmp_path, monkeypatch):
    (tmp_path/'wandb.py').write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    break_off_at(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        train.pretrain(often, data, tmp_path/'run', steps=12, track='wandb')
    train.pretrain(often, data, tmp_path/'run', steps=12, track='wandb')
    import wandb
    begun = [c[1] for c in wandb.calls if c[0] == 'init']
    assert len(begun) == 2 and begun[0]['id'] == begun[1]['id']
    assert {b['mode'] for b in begun} == {'offline'} and begun[0]['config']['steps'] == 12
    assert [c[1] for c in wandb.calls if c[0] == 'log' and 'validation_loss' in c[2]] == [0, 3, 6, 9, 12]
    assert [c[0] for c in wandb.calls].count('finish') == 2
    monkeypatch.delitem(sys.modules, 'wandb')


@pytest.mark.parametrize('given, says', [
    ('trackoi', "Did you mean 'trackio'?"),
    ('wandb', 'pip install wandb'),
])
def test_a_tracker_that_is_not_there_is_a_mistake_before_anything_is_done(
        given, says, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(track, 'find_spec', lambda name: None)
    assert main(['pretrain', '--data', str(data), '--out', str(tmp_path/'run'), '--track', given]) == 2
    assert says in capsys.readouterr().err and not (tmp_path/'run').exists()


def test_trackio_shall_not_send_anything_away(monkeypatch):
    monkeypatch.setattr(track, 'find_spec', lambda name: SimpleNamespace(origin='installed'))
    track.check_tracker('trackio')
    monkeypatch.setenv('TRACKIO_SPACE_ID', 'someone/space')
    with pytest.raises(UsageError, match='TRACKIO_SPACE_ID is set'): track.check_tracker('trackio')
    track.check_tracker('wandb')


def test_a_folder_of_a_trackers_name_is_not_the_tracker(tmp_path, monkeypatch):
    # what an earlier run leaves in the working directory
    (tmp_path/'wandb'/'offline-run-1').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    installed = [p for p in sys.path if p and not os.path.exists(os.path.join(p, 'wandb'))]
    monkeypatch.setattr(sys, 'path', ['', *installed])
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    with pytest.raises(UsageError, match=r'wandb is not it. Install it with: pip install wandb'):
        track.check_tracker('wandb')


@pytest.mark.parametrize('when', ['open', 'write', 'close'])
def test_a_failing_tracker_is_said_once_and_training_goes_on(
        when, often, data, tmp_path, monkeypatch, capsys):
    def fail(*args): raise OSError(28, 'No space left on device')

    def nothing(*args): pass

    def opener(*args):
        if when == 'open': fail()
        write = fail if when == 'write' else nothing
        close = fail if when == 'close' else nothing
        return write, close
    monkeypatch.setitem(track.TRACKERS, 'tensorboard', opener)
    rows = train.pretrain(often, data, tmp_path/'run', steps=4, track='tensorboard')
    failure = 'tensorboard failed (OSError: [Errno 28] No space left on device)'
    assert capsys.readouterr().err.count(failure) == 1
    assert next(r['value'] for r in rows if r['metric'] == 'steps') == 4


def test_only_the_main_process_logs_and_is_tracked(often, data, tmp_path, monkeypatch):
    @contextmanager
    def second_of_two(): yield World(rank=1)

    def only_log(run, *args):
        run.log(loss=1.)
        assert run.listeners == []
        return dict.fromkeys(train.RULERS, 5.)
    monkeypatch.setattr(train, 'join_world', second_of_two)
    monkeypatch.setattr(train, 'train', only_log)
    (tmp_path/'run').mkdir()
    train.pretrain(often, data, tmp_path/'run', steps=2, track='tensorboard')
    assert os.listdir(tmp_path/'run') == []


def test_predicting_changes_no_weight(done, often, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'prediction_writer', lambda *args: lambda line: None)
    train.pretrain(often, data, tmp_path/'unseen', steps=40, scale='tiny')
    last = [checkpoints(r/'checkpoints')[-1] for r in (done, tmp_path/'unseen')]
    a, b = (load_file(checkpoint/'model.safetensors') for checkpoint in last)
    assert all(torch.equal(a[k], b[k]) for k in a) and not (tmp_path/'unseen'/'samples.jsonl').exists()


def test_predictions_are_about_held_out_sentences(done, data, text):
    from cramlit.data.packing import read_documents
    held = ' '.join(d.text for d in read_documents(data/'holdout.jsonl.gz')).lower()
    samples = lines(done/'samples.jsonl')
    assert [s['step'] for s in samples[::6]] == [0, 10, 20, 30, 40]
    for s in samples:
        words = iter(s['words'])
        sentence = ' '.join(next(words) if t == '[MASK]' else t for t in s['tokens'])
        assert sentence.replace(' ##', '').replace(' .', '.') in held
        for guesses in s['guesses']:
            shares = [p for _, p in guesses]
            assert 1 >= sum(shares) > 0 and shares == sorted(shares, reverse=True)


class Structure(HTMLParser):
    "Open tags must be closed in order; what would be loaded, ids and texts are collected"
    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.text, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in ('meta', 'br', 'link', 'img'): self.open.append(tag)
        self.loaded += [v for k, v in attrs if k.rpartition(':')[2] in ('src', 'href')]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag: self.open.pop()

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.text.append(data)


INLINE = 'data:image/svg+xml;base64,'


def parsed(html):
    "The structure of a page that loads nothing but the figures it holds, and neither do they"
    p = Structure()
    p.feed(html)
    p.close()
    assert p.open == [] and not p.tags & {'script', 'link', 'iframe', 'object'}
    assert not re.findall(r'@import|url\((?!#)', html)
    for source in p.loaded:
        assert source.startswith(INLINE)
        figure = base64.b64decode(source.removeprefix(INLINE)).decode()
        ElementTree.fromstring(figure)
        assert not re.findall(r'(?:src|href)="(?!#)|url\((?!#)|<script', figure)
    return p


def test_the_page_of_a_finished_run_stands_alone_and_has_its_numbers(done):
    html = write_page(done).read_text()
    page = parsed(html)
    text = ' '.join(page.text)
    rows = {r['metric']: r for r in lines(done/'rows.jsonl')}
    values = [f"{rows['validation_loss']['value']:.3f}", f"{rows['unigram_entropy']['value']:.3f}",
              f"{rows['tokens']['value']:,}", rows['steps']['hardware'], rows['steps']['recipe_hash'],
              'optim.lr', 'step-00000040', 'own files']
    for value in values: assert value in text, value
    assert len(page.loaded) == 3 and 'width=device-width' in html
    assert write_page(done).read_text() == html


def test_special_characters_stay_characters(going):
    info = json.loads((going/'run.json').read_text())
    corpus = info['recipe']['corpus'] | dict(source='<img src=x onerror=y>')
    info['recipe'] |= dict(name='<script>alert("a&b")</script>', corpus=corpus)
    (going/'run.json').write_text(json.dumps(info))
    odd = dict(step=40, seconds=1., tokens=['<b>', '[MASK]', '&amp;'], words=['</td>'],
               guesses=[[['<i>', .5], ['</td>', .2]]])
    (going/'samples.jsonl').write_text(json.dumps(odd) + '\n')
    text = ''.join(parsed(report_html(read_run(going))).text)
    for s in ('<script>alert("a&b")</script>', '<img src=x onerror=y>', '<b>', '&amp;', '</td>', '<i>'):
        assert s in text, s


def test_pages_of_runs_that_are_not_over(going):
    with open(going/'metrics.jsonl', 'a') as f: f.write('{"step": 41, "sec')  # a line under way
    assert read_run(going).log[-1]['step'] == 40
    page = parsed(report_html(read_run(going)))
    assert 'running' in ''.join(page.text) and len(page.loaded) == 3
    for name in ('metrics.jsonl', 'samples.jsonl'): (going/name).unlink()
    shutil.rmtree(going/'checkpoints')
    assert 'starting' in ''.join(parsed(report_html(read_run(going))).text)


def test_files_that_vanish_while_they_are_read(going, monkeypatch):
    old = going/'checkpoints'/'step-00000001'  # as training deletes checkpoints that are no longer kept
    old.mkdir()
    stat, gone = Path.stat, {old}

    def deleted_meanwhile(path, **how):
        if path not in gone: return stat(path, **how)
        raise FileNotFoundError(2, 'No such file or directory', str(path))
    before = read_run(going)
    assert [n for n, _ in before.saved if n.endswith('step-00000001')]
    monkeypatch.setattr(Path, 'stat', deleted_meanwhile)
    after = read_run(going)
    assert [n for n, _ in after.saved] == [n for n, _ in before.saved if not n.endswith('step-00000001')]
    assert len(after.saved) == len(before.saved) - 1


def test_a_line_that_ends_in_half_a_letter(going):
    odd = dict(step=41, seconds=1., tokens=['ä'], words=[], guesses=[])
    line = json.dumps(odd, ensure_ascii=False) + '\n'
    whole = (going/'samples.jsonl').read_bytes()
    for end in range(1, len(line.encode()) + 1):
        (going/'samples.jsonl').write_bytes(whole + line.encode()[:end])
        assert len(read_run(going).samples) == whole.count(b'\n') + (end == len(line.encode()))


def test_a_literal_mask_in_the_text_and_a_mask_of_another_name(going):
    odd = [dict(step=40, seconds=1., tokens=['a', '[MASK]', '[MASK]'], words=['b'], guesses=[[['x', .5]]]),
           dict(step=40, seconds=1., tokens=['a', '<mask>'], words=['b'], guesses=[[['x', .5]]])]
    (going/'samples.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in odd))
    html = report_html(read_run(going))
    parsed(html)
    assert html.count('<mark>b</mark>') == 2 and html.count('<mark>[MASK]</mark>') == 1


def test_a_run_in_a_folder_that_ascii_cannot_spell(going, tmp_path, monkeypatch):
    folder = tmp_path/'Läufe [neu] 1'
    shutil.move(going, folder)
    odd = dict(step=40, seconds=1., tokens=['fluß', '[MASK]'], words=['straße'],
               guesses=[[['straße', .5]]])
    (folder/'samples.jsonl').write_text(json.dumps(odd, ensure_ascii=False) + '\n', encoding='utf-8')
    plain = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONIOENCODING='')
    for option in ('--once', '--html'):
        shown = watch(folder, option, **plain)
        assert shown.returncode == 0, shown.stderr
    assert 'straße' in (folder/'report.html').read_text(encoding='utf-8')


def test_how_a_run_stands(going, done):
    assert state(read_run(done)) == 'finished' and state(read_run(going)) == 'running'
    os.utime(going/'metrics.jsonl', (time.time() - 3600,)*2)
    assert state(read_run(going)) == 'quiet'
    stopped = [r | dict(stopped='the validation loss is nan', value=None) for r in lines(done/'rows.jsonl')]
    (going/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in stopped))
    assert state(read_run(going)) == 'stopped early'
    assert 'stopped early: the validation loss is nan' in ''.join(parsed(report_html(read_run(going))).text)


def test_a_run_that_stopped_early_has_not_spent_its_budget(going, done):
    stopped = [r | dict(stopped='the loss was too high') for r in lines(done/'rows.jsonl')]
    (going/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in stopped))
    half = [x for x in lines(going/'metrics.jsonl') if x['step'] <= 20]
    (going/'metrics.jsonl').write_text(''.join(json.dumps(x) + '\n' for x in half))
    run = read_run(going)
    assert budget_spent(run) == (half[-1]['step']/40, 0.) and half[-1]['step'] == 20
    run.info.update(steps=0, budget=8*half[-1]['seconds'])
    assert budget_spent(run) == (1/8, 0.)
    run.log.clear()
    assert budget_spent(run) == (0., 0.) and budget_spent(read_run(done)) == (1., 0.)


def watch(*args, **env):
    command = [sys.executable, '-m', 'cramlit.running.command', 'watch', *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE,
                          env=os.environ | dict(PYTHONIOENCODING='utf-8') | env)


def test_the_terminal_needs_neither_torch_nor_matplotlib(done):
    code = ('import sys; from cramlit.running.command import main; main(["watch", sys.argv[1], "--json"]); '
            'print({"torch", "matplotlib", "pandas"} & set(sys.modules))')
    shown = subprocess.check_output([sys.executable, '-c', code, str(done)], text=True)
    assert shown.splitlines()[-1] == 'set()' and 'budget_spent' in shown


def test_in_a_pipe_it_is_one_frame_of_plain_text(going, done):
    for folder, word in ((going, 'running'), (done, 'finished')):
        shown = watch(folder, COLUMNS='70')
        assert shown.returncode == 0 and word in shown.stdout and '\x1b' not in shown.stdout + shown.stderr
        loss = [x['validation_loss'] for x in lines(folder/'metrics.jsonl') if 'validation_loss' in x][-1]
        said = f'{loss:.3f} (perplexity {math.exp(loss):,.0f}) at step 40'
        assert said in shown.stdout and 'step-00000040' in shown.stdout
        assert any('\u2800' < c < '\u28ff' for c in shown.stdout)
        assert all(len(line) <= 70 for line in shown.stdout.splitlines()[1:])
    ascii_only = watch(done, PYTHONIOENCODING='ascii')
    assert ascii_only.returncode == 0 and ascii_only.stdout.isascii() and 'finished' in ascii_only.stdout


@pytest.mark.parametrize('option', ['--once', '--html', '--json'])
def test_what_is_no_run_is_a_mistake(option, tmp_path, capsys):
    for folder in (tmp_path, tmp_path/'nowhere'):
        assert main(['watch', str(folder), option]) == 2
        out, err = capsys.readouterr()
        assert 'is no run' in err and out == ''
    for other in ('{', '{}', '[]', '3', '{"recipe": 1}'):
        (tmp_path/'run.json').write_text(other)
        assert main(['watch', str(tmp_path), option]) == 2 and os.listdir(tmp_path) == ['run.json']


def test_rows_and_the_page_by_command(done, capsys):
    (done/'report.html').unlink(missing_ok=True)
    assert main(['watch', str(done), '--html']) == 0 and (done/'report.html').exists()
    capsys.readouterr()
    assert main(['watch', str(done), '--json']) == 0
    rows = {r['metric']: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows['step']['value'] == 40 and rows['step']['state'] == 'finished'
    assert rows['budget_spent']['value'] == 1


@pytest.fixture
def terminal():
    children = []

    def start(*args, **env):
        command = ['-m', 'cramlit.running.command', 'watch', *map(str, args)]
        env = {k: v for k, v in os.environ.items() if k != 'NO_COLOR'} | dict(TERM='xterm-256color') | env
        child = pexpect.spawn(sys.executable, command, dimensions=(30, 90), timeout=PATIENCE,
                              encoding='utf-8', env=env)
        children.append(child)
        return child
    yield start
    for c in children: c.close(force=True)


def test_on_a_terminal_it_follows_the_run_and_ctrl_c_leaves(going, terminal):
    child = terminal(going)
    child.expect('running')
    child.expect('at step 40')
    line = dict(step=41, seconds=99., tokens=1, validation_loss=1.234)
    with open(going/'metrics.jsonl', 'a') as f: f.write(json.dumps(line) + '\n')
    child.expect(r'1\.234 \(perplexity 3\) at step 41')
    child.setwinsize(30, 50)
    child.expect('\u2501{50}')  # the bar is as wide as the terminal
    child.expect('tokens a second')
    child.sendintr()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0 and 'Traceback' not in child.before
    assert '\x1b[?1049l' in child.before, 'the screen is given back'


def test_on_a_terminal_it_ends_with_the_run(going, done, terminal):
    child = terminal(going)
    child.expect('running')
    shutil.copy(done/'rows.jsonl', going/'rows.jsonl')
    child.expect('finished')
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


def test_no_color_is_heeded(done, terminal):
    colours = re.compile(r'\x1b\[[0-9;]*3[0-9][0-9;]*m')
    for env, coloured in (({}, True), (dict(NO_COLOR='1'), False)):
        child = terminal(done, '--once', **env)
        child.expect(pexpect.EOF)
        assert 'finished' in child.before and bool(colours.search(child.before)) == coloured


def test_it_waits_for_a_run_that_is_about_to_start(terminal, done, tmp_path):
    child = terminal(tmp_path/'later')
    child.expect('waiting for a run')
    shutil.copytree(done, tmp_path/'later')
    child.expect('finished')
    child.expect(pexpect.EOF)
