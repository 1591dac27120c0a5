"Checkpoints: full disks, damage, and other people's folders"
import json

import pytest
import torch

import cramlit.training.checkpoints as checkpoint
from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.scales import get_recipe
from cramlit.model.encoder import MaskedLM
from cramlit.training.checkpoints import (
    checkpoints,
    export_run,
    load_checkpoint,
    tensors_of,
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
    with pytest.raises(CramlitError, match='MB needed.*No space left'):
        write_checkpoint(tmp_path, tensors_of(*parts), {'step': 2})
    assert [p.name for p in tmp_path.iterdir()] == ['step-00000001']
    assert load_checkpoint(tmp_path, parts[0]) == {'step': 1}


@pytest.mark.parametrize('harm', ['truncate', 'remove', 'state'])
def test_damage_is_named_and_the_one_before_is_used(parts, tmp_path, capsys, harm):
    for n in (1, 2): write_checkpoint(tmp_path, tensors_of(*parts), {'step': n})
    newest = checkpoints(tmp_path)[-1]
    if harm == 'truncate':
        content = (newest/'optimizer.safetensors').read_bytes()
        (newest/'optimizer.safetensors').write_bytes(content[:-9])
    if harm == 'remove': (newest/'model.safetensors').unlink()
    if harm == 'state': (newest/'state.json').write_text('{')
    assert load_checkpoint(tmp_path, *parts) == {'step': 1}
    assert str(newest) in capsys.readouterr().err


def test_a_half_written_checkpoint_is_not_seen(parts, tmp_path):
    (tmp_path/'.step-00000009.tmp').mkdir()
    assert load_checkpoint(tmp_path, *parts) is None


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
