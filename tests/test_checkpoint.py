"Checkpoints: full disks, damage, and other people's folders"
import errno
import json
import os
import shutil

import pytest
import torch

import cramlit.training.checkpoints as checkpoint
from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.scales import get_recipe
from cramlit.model.encoder import MaskedLM
from cramlit.training.checkpoints import (
    checkpoints,
    export_run,
    find_damage,
    load_checkpoint,
    tensors_of,
    verify_folder,
    write_checkpoint,
)
from cramlit.training.optimizers import make_optimizer
from cramlit.training.training import pretrain


@pytest.fixture
def parts():
    recipe = get_recipe('24hbert', 'tiny')
    torch.manual_seed(0)
    model = MaskedLM(recipe.model, 64)
    return model, make_optimizer(model, recipe.optim)


def test_full_disk_keeps_the_old_checkpoint(parts, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, tensors_of(*parts), {'step': 1})

    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(checkpoint, 'save_file', full)
    with pytest.raises(CramlitError, match='No space left.*Free some space.*MB'):
        write_checkpoint(tmp_path, tensors_of(*parts), {'step': 2})
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001']
    assert load_checkpoint(tmp_path, parts[0]) == {'step': 1}


@pytest.mark.parametrize('harm', ['truncate', 'remove', 'state', 'list', 'files'])
def test_damage_is_named_and_the_one_before_is_used(parts, tmp_path, capsys, harm):
    for n in (1, 2): write_checkpoint(tmp_path, tensors_of(*parts), {'step': n})
    newest = checkpoints(tmp_path)[-1]
    if harm == 'truncate':
        content = (newest/'optimizer.safetensors').read_bytes()
        (newest/'optimizer.safetensors').write_bytes(content[:-9])
    if harm == 'remove': (newest/'model.safetensors').unlink()
    if harm == 'state': (newest/'state.json').write_text('{')
    if harm == 'list': (newest/'state.json').write_text('[1]')
    if harm == 'files': (newest/'state.json').write_text('{"state": {}, "files": [1]}')
    assert load_checkpoint(tmp_path, *parts) == {'step': 1}
    assert str(newest) in capsys.readouterr().err


def test_a_changed_number_in_the_state_is_damage(parts, tmp_path, capsys):
    state = dict(spent=70., seeds={10: (1, 2), 9: ()})
    for n in (1, 2): write_checkpoint(tmp_path, tensors_of(*parts), state | dict(step=n))
    assert load_checkpoint(tmp_path, *parts)['step'] == 2
    newest = checkpoints(tmp_path)[-1]
    (newest/'state.json').write_text((newest/'state.json').read_text().replace('70.0', '60.0'))
    assert load_checkpoint(tmp_path, *parts)['step'] == 1
    assert 'state.json does not match its checksum' in capsys.readouterr().err
    whole = json.loads((newest/'state.json').read_text())
    del whole['state_sha256']  # as before there was one
    (newest/'state.json').write_text(json.dumps(whole))
    assert load_checkpoint(tmp_path, *parts)['spent'] == 60.


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(parts, tmp_path):
    for n in (1, 2): write_checkpoint(tmp_path, tensors_of(*parts), {'step': n})
    (checkpoints(tmp_path)[-1]/'model.safetensors').write_bytes(b'')
    write_checkpoint(tmp_path, tensors_of(*parts), {'step': 3})
    (checkpoints(tmp_path)[-1]/'model.safetensors').write_bytes(b'')
    assert load_checkpoint(tmp_path, *parts) == {'step': 1}


def test_a_file_that_the_disk_does_not_give_back_is_damage(parts, tmp_path, monkeypatch, capsys):
    for n in (1, 2): write_checkpoint(tmp_path, tensors_of(*parts), {'step': n})
    real = checkpoint.sha256

    def failing(path):
        if path.parent.name == 'step-00000002': raise OSError(errno.EIO, 'Input/output error')
        return real(path)
    monkeypatch.setattr(checkpoint, 'sha256', failing)
    assert load_checkpoint(tmp_path, *parts) == {'step': 1}
    assert 'model.safetensors cannot be read (Input/output error)' in capsys.readouterr().err


def test_a_checkpoint_that_is_rotated_away_while_it_is_checked_is_no_damage(parts, tmp_path, monkeypatch):
    for n in (1, 2): write_checkpoint(tmp_path, tensors_of(*parts), {'step': n})
    real = checkpoint.find_damage

    def meanwhile(path):
        if path.name == 'step-00000001': shutil.rmtree(path)
        return real(path)
    monkeypatch.setattr(checkpoint, 'find_damage', meanwhile)
    assert [r['value'] for r in verify_folder(tmp_path)] == [0, 1]


def test_a_half_written_checkpoint_is_not_seen(parts, tmp_path):
    (tmp_path/'.step-00000009.tmp').mkdir()
    assert load_checkpoint(tmp_path, *parts) is None


@pytest.mark.parametrize('killed_at', range(1, 12))
def test_a_kill_while_a_step_is_saved_again_leaves_one_of_the_two(parts, tmp_path, monkeypatch, killed_at):
    "Whatever changes names or removes is where it is killed, once before and once after each"
    write_checkpoint(tmp_path, tensors_of(*parts), {'step': 1, 'taken': 'first'})
    calls = []

    def dying(real):
        def call(*args, **kw):
            calls.append(1)
            if 2*len(calls) - 1 == killed_at: raise KeyboardInterrupt
            real(*args, **kw)
            if 2*len(calls) == killed_at: raise KeyboardInterrupt
        return call
    monkeypatch.setattr(checkpoint.os, 'replace', dying(os.replace))
    monkeypatch.setattr(checkpoint.shutil, 'rmtree', dying(shutil.rmtree))
    try: write_checkpoint(tmp_path, tensors_of(*parts), {'step': 1, 'taken': 'again'}, keep=1)
    except KeyboardInterrupt: pass
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, *parts)['taken'] in ('first', 'again')
    assert [find_damage(p) for p in checkpoints(tmp_path)] == ['']*len(checkpoints(tmp_path))
    write_checkpoint(tmp_path, tensors_of(*parts), {'step': 1, 'taken': 'at last'}, keep=1)
    assert load_checkpoint(tmp_path, *parts)['taken'] == 'at last'
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001']


def test_with_keep_1_a_damaged_later_one_does_not_push_out_the_whole_one(parts, tmp_path):
    for n in (1, 3): write_checkpoint(tmp_path, tensors_of(*parts), {'step': n})
    (tmp_path/'step-00000003'/'model.safetensors').unlink()
    assert load_checkpoint(tmp_path, *parts) == {'step': 1}
    write_checkpoint(tmp_path, tensors_of(*parts), {'step': 2}, keep=1)
    assert load_checkpoint(tmp_path, *parts) == {'step': 2}


def test_a_disk_that_does_not_keep_what_was_written_costs_no_checkpoint(parts, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, tensors_of(*parts), {'step': 1}, keep=1)
    real = checkpoint.save_file

    def lying(tensors, path):
        real(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    monkeypatch.setattr(checkpoint, 'save_file', lying)
    with pytest.raises(CramlitError, match='read back'):
        write_checkpoint(tmp_path, tensors_of(*parts), {'step': 2}, keep=1)
    assert load_checkpoint(tmp_path, *parts) == {'step': 1}


@pytest.mark.parametrize('names', ['model', 'optimizer'])
def test_a_disk_that_is_full_in_earnest_keeps_the_old_checkpoint(parts, tmp_path, small_files, names):
    "safetensors has an error of its own for what the system refuses"
    write_checkpoint(tmp_path, tensors_of(*parts), {'step': 1})
    largest = max(p.stat().st_size for p in (tmp_path/'step-00000001').iterdir())
    small_files(largest - 1 if names == 'optimizer' else 1000)
    with pytest.raises(CramlitError, match='Free some space.*earlier ones are whole'):
        write_checkpoint(tmp_path, tensors_of(*parts), {'step': 2})
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001']
    assert load_checkpoint(tmp_path, *parts) == {'step': 1}


def test_nothing_is_pickled(parts, tmp_path):
    path = write_checkpoint(tmp_path, tensors_of(*parts), {'step': 1})
    assert {p.suffix for p in path.iterdir()} == {'.safetensors', '.json'}
    assert json.loads((path/'state.json').read_text())['state'] == {'step': 1}


def test_an_export_replaces_an_export_and_nothing_else(recipe, data, tmp_path):
    pretrain(recipe, data, tmp_path/'run', steps=1)
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.tex').write_text('years of work')
    with pytest.raises(UsageError, match='choose another folder'):
        export_run(tmp_path/'run', data/'tokenizer', tmp_path/'mine')
    assert [p.name for p in (tmp_path/'mine').iterdir()] == ['thesis.tex']
    for _ in range(2): export_run(tmp_path/'run', data/'tokenizer', tmp_path/'model')
    assert (tmp_path/'model'/'model.safetensors').exists()
