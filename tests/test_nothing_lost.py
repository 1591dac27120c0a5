"What the commands did not make they do not remove, empty or write over, wherever they are sent"
import os
import shutil
import subprocess
import sys
import time
from threading import Event, Thread, Timer

import psutil
import pytest
from conftest import PATIENCE, make_text

from cramlit.core.recipes import CramlitError, UsageError, override
from cramlit.core.results import locked
from cramlit.data.packing import open_data, verify
from cramlit.running import pipeline
from cramlit.running.command import main
from cramlit.running.pipeline import reproduce, workspace
from cramlit.training import checkpoints as checkpoint
from cramlit.training.checkpoints import (
    checkpoints,
    export_run,
    find_damage,
    remove_checkpoints,
    verify_folder,
    write_checkpoint,
)
from cramlit.training.training import pretrain, pretrain_in

SETTINGS = ('--scale', 'tiny', '-o', 'corpus.holdout=0.1', '-o', 'tokenizer.vocab_size=128',
            '-o', 'validation.max_sequences=64')


def prepare(source, out): return main(['prepare', '--source', str(source), *SETTINGS, '--out', str(out)])


def train(data, out):
    return main(['pretrain', *SETTINGS, '--data', str(data), '--out', str(out), '--steps', '2'])


def thesis(folder, name='thesis.tex'):
    "Years of work"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/name).write_text('years of work')
    return folder/name


def found(folder):
    return [p for p in folder.rglob('*thesis*') if p.is_file() and p.read_text() == 'years of work']


@pytest.fixture
def source(tmp_path): return make_text(tmp_path/'text', documents=40)


def test_a_text_that_goes_to_and_fro_leaves_each_of_its_data(source, tmp_path):
    "The third time, the data to be moved aside is that of the first time, to the byte"
    first, out = (source/'000.txt').read_text(), tmp_path/'data'
    for n, text in enumerate([first, first + ' More.', first, first + ' More.', first]):
        (source/'000.txt').write_text(text)
        os.utime(source/'000.txt', ns=(n, n))
        assert prepare(source, out) == 0
    verify(open_data(out))
    assert [p.name for p in sorted((out/'superseded').iterdir())] == ['1', '2', '3', '4']
    for old in (out/'superseded').iterdir(): verify(open_data(old))


@pytest.mark.parametrize('moved', range(1, 9))
def test_a_kill_while_data_takes_the_place_of_older_data_loses_neither(source, tmp_path, monkeypatch, moved):
    out, real, calls = tmp_path/'data', os.replace, []
    assert prepare(source, out) == 0
    (source/'000.txt').write_text('Another text, which is not the one that was there. It has two sentences.')

    def dying(a, b):
        if tmp_path/'data'/'superseded' in b.parents or b.parent == out:
            calls.append(b)
            if len(calls) == moved: raise KeyboardInterrupt
        real(a, b)
    monkeypatch.setattr('cramlit.data.packing.os.replace', dying)
    assert prepare(source, out) == 1 and len(calls) == moved
    monkeypatch.undo()
    assert prepare(source, out) == 0
    verify(open_data(out))
    assert not (out/'.prepare').exists() and len(list((out/'superseded').rglob('tokenizer'))) == 1


def test_what_lies_where_data_is_made_is_moved_and_named(source, tmp_path, capsys):
    out = tmp_path/'data'
    thesis(out/'.prepare')
    assert prepare(source, out) == 0
    assert f'{out}/superseded/1' in capsys.readouterr().err and len(found(out)) == 1
    thesis(out, 'thesis.npy')
    (source/'000.txt').write_text('Another text.')
    assert prepare(source, out) == 0 and (out/'thesis.npy').exists()


def test_data_is_made_after_two_attempts_that_were_killed(source, tmp_path, monkeypatch):
    "The half-made part of the first, which the second moved aside, is nothing foreign"
    def killed(*_): raise KeyboardInterrupt
    thesis(tmp_path/'data'/'.prepare')
    with monkeypatch.context() as m:
        m.setattr('cramlit.data.packing._sources', killed)
        assert prepare(source, tmp_path/'data') == 1
    assert os.listdir(tmp_path/'data'/'superseded') and prepare(source, tmp_path/'data') == 0
    verify(open_data(tmp_path/'data'))
    assert len(found(tmp_path/'data')) == 1


def test_a_source_that_is_named_after_another_is_read_too(source, tmp_path):
    more = make_text(tmp_path/'more', documents=15, seed=1)
    for n, folders in enumerate(([source, more], [source])):
        sources = [part for folder in folders for part in ('--source', str(folder))]
        assert main(['prepare', *sources, *SETTINGS, '--out', str(tmp_path/f'data{n}')]) == 0
    both, one = (open_data(tmp_path/f'data{n}').manifest['splits']['train']['text_tokens'] for n in (0, 1))
    assert both > 1.2*one


def test_data_stays_where_nothing_can_be_moved_aside(source, tmp_path, capsys):
    out = tmp_path/'data'
    assert prepare(source, out) == 0
    thesis(out, 'superseded')
    (source/'000.txt').write_text('Another text.')
    assert prepare(source, out) == 1 and 'superseded: it is a file' in capsys.readouterr().err
    verify(open_data(out))
    (out/'superseded').rename(out/'thesis')
    assert prepare(source, out) == 0 and found(out)


@pytest.mark.parametrize('name', ['metrics.jsonl', 'samples.jsonl', 'rows.jsonl', 'report.html',
                                  'tracked.json', 'checkpoints/step-00000001/thesis', 'model/thesis'])
def test_a_folder_that_is_no_run_is_not_continued(data, tmp_path, name, capsys):
    path = tmp_path/'out'/name
    thesis(path.parent, path.name)
    assert train(data, tmp_path/'out') == 2
    assert 'choose another' in capsys.readouterr().err and path.read_text() == 'years of work'
    assert [str(p.relative_to(tmp_path/'out')) for p in (tmp_path/'out').rglob('*') if p.is_file()] == [name]


def test_copies_of_checkpoints_are_no_checkpoints(recipe, data, tmp_path, capsys):
    "A copy beside them is neither continued from, counted nor removed; nor is what was put into one"
    pretrain(recipe, data, tmp_path/'run', steps=2)
    folder = tmp_path/'run'/'checkpoints'
    newest = checkpoints(folder)[-1]
    names = ['step-00000002-backup', 'step-00000001.bak', 'step-by-step', '.step-mine.tmp']
    for name in names: shutil.copytree(newest, folder/name)
    thesis(folder/'.step-00000007.tmp')
    thesis(newest)
    (tmp_path/'run'/'rows.jsonl').unlink()
    pretrain(recipe, data, tmp_path/'run', steps=2)
    assert [p.name for p in checkpoints(folder)] == ['step-00000001', 'step-00000002']
    assert all((folder/name/'state.json').exists() for name in names) and len(found(folder)) == 2
    assert 'step-00000002-kept-1 has more in it' in capsys.readouterr().err
    assert [find_damage(p) for p in checkpoints(folder)] == ['', '']
    assert [row['value'] for row in verify_folder(tmp_path/'run')] == [0, 2]
    remove_checkpoints(folder)
    assert not checkpoints(folder) and len(found(folder)) == 2


def test_a_folder_in_the_way_of_a_checkpoint_is_not_removed(tmp_path):
    thesis(tmp_path/'.step-00000001.tmp')
    with pytest.raises(CramlitError, match='step-00000001'): write_checkpoint(tmp_path, {}, dict(step=1))
    assert len(found(tmp_path)) == 1
    write_checkpoint(tmp_path, {}, dict(step=2))
    remove_checkpoints(tmp_path)
    assert os.listdir(tmp_path) == ['.step-00000001.tmp']


def test_other_files_beside_milestones_and_exports(data, tmp_path):
    run, to = tmp_path/'run', tmp_path/'gift'
    more = ['-o', 'checkpoint.milestones=0.5']
    again = ['pretrain', *SETTINGS, *more, '--data', str(data), '--out', str(run), '--steps', '2']
    assert main(again) == 0
    for name in ('.DS_Store', 'thesis'): thesis(run/'milestones', name)
    assert main(again) == 0
    export = ['export', '--run', str(run), '--to', str(to)]
    thesis(to/'.cramlit-export.part')
    for n in range(4):
        assert main(export) == 0
        (to/'model.safetensors').write_bytes(b'other weights')
        if n == 2: shutil.rmtree(to/'superseded'/'2')  # the numbers have a gap
    assert len(found(to)) == 1 and sorted(os.listdir(to/'superseded')) == ['1', '2', '3']


def test_a_checkpoint_that_one_may_not_read_is_not_passed_over(recipe, data, tmp_path, monkeypatch, capsys):
    "The run does not go back to an older one, and the newest is not replaced"
    pretrain(recipe, data, tmp_path/'run', steps=2)
    (tmp_path/'run'/'rows.jsonl').unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'run'/'checkpoints').rglob('*')}
    real = checkpoint.sha256

    def refuse(path):
        if 'step-00000002' in str(path): raise PermissionError(13, 'Permission denied')
        return real(path)
    monkeypatch.setattr(checkpoint, 'sha256', refuse)
    says = 'step-00000002/.*: Permission denied. Ask for the right to read it'
    with pytest.raises(CramlitError, match=says): pretrain(recipe, data, tmp_path/'run', steps=2)
    broken = tmp_path/'run'/'checkpoints'/'step-00000001'/'model.safetensors'
    content = broken.read_bytes()
    broken.write_bytes(content[:-1])
    both = f'(?s)2 of 2 .*step-00000001.*{says}'
    with pytest.raises(CramlitError, match=both): verify_folder(tmp_path/'run')
    broken.write_bytes(content)
    os.utime(broken, ns=(before[broken], before[broken]))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path/'run'/'checkpoints').rglob('*')} == before


STUDY = '''
import sys
from dataclasses import replace
from cramlit.core.scales import get_scale
from cramlit.experiments.search import grid_trials, run_trials
if __name__ == '__main__':
    trials = replace(get_scale('tiny').trials, steps=int(sys.argv[3]), tasks=(), batch_sizes=(32,),
                     lrs=(1e-3, 2e-3), warmups=(.06,), lengths=(1.,))
    run_trials(grid_trials('24hbert', 'tiny', trials), 'grid', sys.argv[1], sys.argv[2], trials)
'''


@pytest.mark.usefixtures('two_workers')
def test_a_study_goes_on_although_workers_of_one_that_was_killed_are_still_busy(source, tmp_path):
    args = '--source', str(source), '--scale', 'tiny', '-o', 'corpus.holdout=0.1'
    assert main(['prepare', *args, '--out', str(tmp_path/'data')]) == 0
    (tmp_path/'study.py').write_text(STUDY)
    command = [sys.executable, str(tmp_path/'study.py'), str(tmp_path/'data'), str(tmp_path/'study'), '60']
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob('study/trials/*/run/metrics.jsonl'))) < 2:
        assert first.poll() is None, 'it ended before its trials began'
        assert time.monotonic() < until
        time.sleep(.02)
    workers = psutil.Process(first.pid).children(recursive=True)
    for worker in workers: worker.suspend()
    first.kill()  # the workers know nothing of it
    first.wait()
    second = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def waits():
        return any('waiting for its end' in p.read_text() for p in tmp_path.glob('study/trials/*/log.txt'))
    while second.poll() is None and not waits() and time.monotonic() < until: time.sleep(.02)
    waited = waits()
    for worker in workers: worker.resume()
    _, err = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0 and waited, err


def test_several_processes_of_a_trial_wait_for_those_left_behind(recipe, data, tmp_path, monkeypatch):
    held, free, launched = Event(), Event(), []

    def left_behind():
        with locked(tmp_path/'run'):
            held.set()
            free.wait(PATIENCE)
    Thread(target=left_behind, daemon=True).start()
    held.wait(PATIENCE)
    monkeypatch.setattr('cramlit.training.training.launch', lambda *args: launched.append(free.is_set()))
    half = override(recipe, ['batch.micro_batch_size=16'])
    arguments = half, data, tmp_path/'run', 0., 1, ''
    with pytest.raises(UsageError, match='another process works in'): pretrain_in(2, [], *arguments)
    Timer(.3, free.set).start()
    with pytest.raises(CramlitError, match='no result rows'): pretrain_in(2, [], *arguments, wait=True)
    assert launched == [True]


def test_a_second_training_in_a_process_is_refused(recipe, data, tmp_path, monkeypatch):
    why = []

    def meanwhile(*args):
        def begin():
            try: pretrain(recipe, data, tmp_path/'other', steps=1)
            except UsageError as e: why.append(str(e))
        thread = Thread(target=begin)
        thread.start()
        thread.join()
    with monkeypatch.context() as patch:
        patch.setattr('cramlit.training.training.resume', meanwhile)
        pretrain(recipe, data, tmp_path/'run', steps=1)
    assert len(why) == 1 and 'another training goes on in this process' in why[0]
    pretrain(recipe, data, tmp_path/'other', steps=1)


def test_a_run_with_other_data_is_not_to_be_deleted(source, tmp_path, capsys):
    data, run = tmp_path/'data', tmp_path/'run'
    assert prepare(source, data) == 0 and train(data, run) == 0
    (source/'000.txt').write_text('Another text than before. It has two sentences.')
    assert prepare(source, data) == 0 and train(data, run) == 2
    says = capsys.readouterr().err
    assert f'{data}/superseded has what was moved aside), or choose another --out' in says
    assert train(data/'superseded'/'1', run) == 0


def test_a_run_beside_texts_is_none_of_them(source, data, tmp_path):
    assert train(data, source/'run') == 0 and prepare(source, tmp_path/'data') == 0
    assert open_data(tmp_path/'data').manifest['documents']['documents'] == 40
    assert prepare(source, tmp_path/'data') == 0  # the same text as before
    assert not (tmp_path/'data'/'superseded').exists()


def test_a_name_that_is_not_utf_8_is_one_line(tmp_path, capsys):
    name = os.fsdecode(str(tmp_path/'B').encode() + b'\xfccher')
    assert main(['prepare', '--source', 'enwik8', '--out', name]) == 2
    assert 'is not UTF-8' in capsys.readouterr().err and not os.listdir(tmp_path)


@pytest.mark.parametrize('options', [('--shape', 'tiny', '--brief'), ('--model', 'model')])
def test_a_benchmark_that_cannot_be_written_is_not_measured(options, tmp_path, monkeypatch, capsys):
    (tmp_path/'out').write_text('a file')
    monkeypatch.setattr('cramlit.reporting.speed.model_ids', lambda *args: {})  # there is no such model
    for name in ('prepare', 'open_data', 'jobs'):
        monkeypatch.setattr(f'cramlit.reporting.speed.{name}', lambda *args: pytest.fail('it went on'))
    assert main(['bench', *options, '--out', str(tmp_path/'out')]) == 1
    assert 'cannot write' in capsys.readouterr().err


@pytest.mark.parametrize('option', ['--data', '--model'])
def test_no_folder_is_made_for_what_cannot_be_timed(option, tmp_path, capsys):
    assert main(['bench', option, str(tmp_path/'nosuch'), '--out', str(tmp_path/'out')]) == 1
    assert 'nosuch' in capsys.readouterr().err and not (tmp_path/'out').exists()


def test_what_is_private_is_a_repository(tmp_path, capsys):
    assert main(['export', '--run', str(tmp_path), '--to', str(tmp_path/'to'), '--private']) == 2
    assert 'name it with --push' in capsys.readouterr().err


def test_an_export_is_made_by_one_process_at_a_time(recipe, data, tmp_path):
    "What another one is writing is not taken for half-made and moved away"
    to = tmp_path/'gift'

    def at_the_same_time(part):
        with pytest.raises(UsageError, match='another process'), locked(to): pass
    pretrain(recipe, data, tmp_path/'run', steps=2)
    export_run(tmp_path/'run', data/'tokenizer', to, finish=at_the_same_time)
    assert (to/'config.json').exists() and '.lock' not in os.listdir(to)


def test_an_export_that_was_killed_before_its_last_file_is_finished(data, tmp_path):
    assert train(data, tmp_path/'run') == 0
    export = ['export', '--run', str(tmp_path/'run'), '--to', str(tmp_path/'gift')]
    assert main(export) == 0
    (tmp_path/'gift'/'.cramlit-export.part').mkdir()
    (tmp_path/'gift'/'config.json').rename(tmp_path/'gift'/'.cramlit-export.part'/'config.json')
    assert main(export) == 0 and (tmp_path/'gift'/'config.json').exists()


@pytest.mark.parametrize('command', [
    ['glue', '--model', 'model', '--tasks', 'cloze'], ['search', '--scale', 'tiny']])
def test_rows_of_a_run_are_not_replaced_by_other_rows(command, tmp_path, capsys):
    (tmp_path/'run.json').write_text('{}')
    thesis(tmp_path, 'rows.jsonl')
    assert main([*command, '--out', str(tmp_path)]) == 2
    assert 'choose another --out' in capsys.readouterr().err
    assert (tmp_path/'rows.jsonl').read_text() == 'years of work'


def test_pages_and_stages_of_others(tmp_path):
    page = thesis(tmp_path/'figures', 'README.md')
    with pytest.raises(UsageError, match='choose another --figures'):
        reproduce(workspace('tiny', tmp_path/'out', tmp_path/'figures'), only='prepare')
    assert page.read_text() == 'years of work' and not (tmp_path/'out').exists()


@pytest.mark.parametrize('content', ['[]', 'null', '{"question": 1', '"x"'])
def test_a_folder_with_a_note_of_another_program_is_moved_aside(content, tmp_path, capsys):
    ws = workspace('tiny', tmp_path/'out', tmp_path/'figures')
    folder = thesis(ws.folder('prepare', '24hbert')).parent
    (folder/'key.json').write_text(content)
    pipeline._move_aside(ws, 'prepare', '24hbert')
    assert pipeline._note(folder) == {} and len(found(tmp_path/'out')) == 1
    (folder/'key.json').parent.mkdir()
    (folder/'key.json').write_text(content)
    assert pipeline._note(folder) == {} and not pipeline._is_done(ws, 'prepare', '24hbert')


@pytest.mark.parametrize('args', [
    ['prepare', '--out', ''], ['pretrain', '--data', 'data', '--out', ''], ['watch', ''], ['verify', ''],
    ['pretrain', '--data', '', '--out', 'x'], ['export', '--run', '', '--to', 'x'],
    ['export', '--run', 'x', '--to', ''], ['glue', '--model', 'x', '--out', ''], ['reproduce', '--out', '']])
def test_an_empty_name_is_not_the_folder_one_stands_in(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2 and 'is empty: name a folder' in capsys.readouterr().err
    assert not os.listdir(tmp_path)


FOREIGN = {'rows.jsonl': ['{"mine": 1}\n', '[]\n', '3\n'], 'metrics.jsonl': ['{"mine": 1}\n', '"x"\n'],
           'samples.jsonl': ['{"step": 1}\n']}


@pytest.mark.parametrize('name', FOREIGN)
def test_files_of_other_programs_in_a_run_are_named(recipe, data, tmp_path, capsys, name):
    run = tmp_path/'run'
    pretrain(recipe, data, run, steps=1)
    asked = [['watch', str(run), '--once'], ['watch', str(run), '--html'], ['watch', str(run), '--json']]
    if name == 'rows.jsonl': asked += [['report', '--runs', str(run), '--out', str(tmp_path/'figures')]]
    for text in FOREIGN[name]:
        (run/name).write_text(text)
        for args in asked:
            capsys.readouterr()
            assert main(args) == 1
            line, = capsys.readouterr().err.splitlines()
            assert f'{run/name}, line 1: no ' in line and 'remove it' in line


def test_rows_that_are_empty_are_none(recipe, data, tmp_path, capsys):
    first = pretrain(recipe, data, tmp_path/'run', steps=1)
    (tmp_path/'run'/'rows.jsonl').write_text('')
    again = pretrain(recipe, data, tmp_path/'run', steps=1)
    assert [r['metric'] for r in again] == [r['metric'] for r in first] and again[0] == first[0]


@pytest.mark.parametrize('content', ['{', '[]', '{"mine": 1}'])
def test_a_note_of_a_run_or_a_model_that_is_damaged_is_one_line(data, tmp_path, capsys, content):
    assert train(data, tmp_path/'run') == 0
    for name in ('run.json', 'model/cramlit.json'): (tmp_path/'run'/name).write_text(content)
    command = 'report', '--runs', str(tmp_path/'run'), '--out', str(tmp_path/'figures')
    assert main(command) == 1 and 'run.json is damaged' in capsys.readouterr().err.splitlines()[-1]
    if content == '{"mine": 1}': return  # a folder of another program may be fine-tuned
    command = 'glue', '--model', str(tmp_path/'run'/'model'), '--scale', 'tiny', '--out', str(tmp_path/'x')
    assert main(command) == 1 and 'cramlit.json is damaged' in capsys.readouterr().err.splitlines()[-1]


def test_more_gpus_than_there_are_take_no_memory(capsys):
    assert main(['plan', '--scale', 'tiny', '--gpu', 'a100', '--gpus', '1000000000']) == 2
    assert 'at most 100,000' in capsys.readouterr().err


@pytest.mark.parametrize('args, says', [
    (['plan', '--scale', 'tiny', '--gpu', 'a100', '--price', 'nan'], '--price nan: must be finite'),
    (['plan', '--scale', 'tiny', '--gpu', 'a100', '--budget', '9'*400], 'expected a duration'),
    (['pretrain', '--data', 'data', '--out', 'out', '--nproc', '-3', '--scale', 'tiny'], '--nproc -3')])
def test_numbers_that_are_none_are_refused(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2 and says in capsys.readouterr().err and not os.listdir(tmp_path)


def test_a_report_that_cannot_be_drawn_ends_no_run(data, tmp_path, monkeypatch, capsys):
    def wrong(run): raise ValueError("'nonsense' is not a valid value for backend")
    monkeypatch.setattr('cramlit.reporting.run_report.write_page', wrong)
    assert train(data, tmp_path/'run') == 0
    assert 'report.html: ' in capsys.readouterr().err and (tmp_path/'run'/'model'/'config.json').exists()


def test_the_checkout_that_a_git_hook_names_is_not_ours(tmp_path, monkeypatch):
    from cramlit.core.results import _git
    ours = _git('rev-parse', 'HEAD')
    monkeypatch.setenv('GIT_DIR', str(tmp_path/'elsewhere'))
    assert _git('rev-parse', 'HEAD') == ours
