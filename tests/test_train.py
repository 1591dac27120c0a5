"Training: budgets, interruption, continuation, misfits"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from cramlit.training.checkpoints import checkpoints, find_damage
from cramlit.core.recipes import CramlitError, Interrupted, UsageError, override
from cramlit.core.devices import Precision
from cramlit.training.training import should_stop_early
from cramlit.training.training import pretrain


def weights(run):
    return load_file(checkpoints(run/'checkpoints')[-1]/'model.safetensors')


def value(rows, metric):
    return next(r['value'] for r in rows if r['metric'] == metric)


def test_same_seed_same_weights_other_seed_others(recipe, data, tmp_path):
    a, b = (pretrain(recipe, data, tmp_path/n, steps=5) for n in 'ab')
    c = pretrain(replace(recipe, seed=1), data, tmp_path/'c', steps=5)
    assert value(a, 'validation_loss') == value(b, 'validation_loss') != value(c, 'validation_loss')
    wa, wb = weights(tmp_path/'a'), weights(tmp_path/'b')
    assert all(torch.equal(wa[k], wb[k]) for k in wa)


def test_time_spent_survives_a_restart(recipe, data, tmp_path):
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'stop').touch()  # the wish to stop, as a launcher leaves it
    with pytest.raises(Interrupted): pretrain(recipe, data, tmp_path/'run', budget=5)
    lines = lambda: [json.loads(line) for line in (tmp_path/'run'/'metrics.jsonl').read_text().splitlines()]
    before, spent = len(lines()), json.loads((checkpoints(tmp_path/'run'/'checkpoints')[-1]/'state.json').read_text())['state']['spent']
    pretrain(recipe, data, tmp_path/'run', budget=5)
    assert 0 < spent <= lines()[before]['seconds']


def test_budget_is_kept_with_validation_and_saving(recipe, data, tmp_path, monkeypatch):
    import cramlit.training.training as train
    real, rates = train.set_lr, []
    monkeypatch.setattr(train, 'set_lr', lambda optimizer, lr: (rates.append(lr), real(optimizer, lr)))
    rows = pretrain(recipe, data, tmp_path/'run', budget=4)
    assert value(rows, 'steps') == len(rates) > 1
    assert 2 < value(rows, 'seconds') < 6, 'the budget is 4 s; the margin is for machines that do other things too'
    assert rates[-1] < max(rates)/2
    lines = [json.loads(line) for line in (tmp_path/'run'/'metrics.jsonl').read_text().splitlines()]
    assert lines[-1]['validation_loss'] == value(rows, 'validation_loss')


def test_interrupted_run_ends_like_an_unbroken_one(recipe, data, tmp_path, monkeypatch):
    import cramlit.training.training as train
    recipe = override(recipe, ['validation.every=0.25', 'checkpoint.every=0.25'])
    pretrain(recipe, data, tmp_path/'whole', steps=12)
    real, calls = train.accumulate, []

    def broken_off(*args):
        calls.append(1)
        if len(calls) == 8: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train, 'accumulate', broken_off)
    with pytest.raises(KeyboardInterrupt): pretrain(recipe, data, tmp_path/'broken', steps=12)
    pretrain(recipe, data, tmp_path/'broken', steps=12)
    assert len(calls) == 8 + 6, 'it should go on from the checkpoint at step 6'
    a, b = weights(tmp_path/'whole'), weights(tmp_path/'broken')
    assert all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)['step'] for line in (tmp_path/'broken'/'metrics.jsonl').read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_signal_saves_the_step_that_was_under_way(recipe, data, tmp_path, monkeypatch):
    import cramlit.training.training as train
    real, calls = train.accumulate, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 5: os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(train, 'accumulate', signalled)
    with pytest.raises(Interrupted, match='after step 5 and saved'): pretrain(recipe, data, tmp_path/'broken', steps=12)
    pretrain(recipe, data, tmp_path/'broken', steps=12)
    assert len(calls) == 12
    pretrain(recipe, data, tmp_path/'whole', steps=12)
    a, b = weights(tmp_path/'whole'), weights(tmp_path/'broken')
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_second_signal_leaves_at_once(recipe, data, tmp_path, monkeypatch):
    import cramlit.training.training as train
    monkeypatch.setattr(train, 'accumulate', lambda *a: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt): pretrain(recipe, data, tmp_path/'run', steps=12)
    assert [p.name for p in checkpoints(tmp_path/'run'/'checkpoints')] == ['step-00000000']


def test_milestones_are_kept_once(recipe, data, tmp_path):
    recipe = override(recipe, ['checkpoint.milestones=0.25,0.5', 'checkpoint.every=0.9'])
    pretrain(recipe, data, tmp_path/'run', steps=8)
    kept = {m: [p.name for p in checkpoints(tmp_path/'run'/'milestones'/m)] for m in ('0.25', '0.5')}
    assert kept == {'0.25': ['step-00000002'], '0.5': ['step-00000004']}


def test_a_damaged_shard_is_refused_before_the_first_step(recipe, data, tmp_path):
    shutil.copytree(data, tmp_path/'data')
    shard = next((tmp_path/'data').glob('train-*.npy'))
    content = bytearray(shard.read_bytes()); content[-1] ^= 1; shard.write_bytes(content)
    with pytest.raises(CramlitError, match=f'{shard.name} does not match its checksum'): pretrain(recipe, tmp_path/'data', tmp_path/'run', steps=2)
    assert not (tmp_path/'run').exists()


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(recipe, data, text, tmp_path):
    command = [sys.executable, '-m', 'cramlit.running.command', 'pretrain', '--scale', 'tiny', '--data', str(data), '--out', str(tmp_path/'run'), '--steps', '2000',
               *(x for s in (f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128', 'validation.max_sequences=64') for x in ('-o', s))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    log = tmp_path/'run'/'metrics.jsonl'
    for _ in range(600):
        if process.poll() is not None or log.exists() and log.read_text().count('\n') > 2: break
        time.sleep(.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and 'same command goes on' in err and 'Traceback' not in err


def test_stops_a_hopeless_run(recipe, data, tmp_path):
    recipe = override(recipe, ['validation.stop_loss=1', 'validation.every=0.1'])
    rows = pretrain(recipe, data, tmp_path/'run', steps=20)
    assert value(rows, 'steps') < 20 and 'above 1.0' in rows[0]['stopped']
    assert should_stop_early(float('inf'), 0, recipe)


def test_numbers_that_are_none_end_the_run_with_a_diagnosis(recipe, data, tmp_path):
    rows = pretrain(override(recipe, ['optim.lr=1e30', 'validation.every=0.9']), data, tmp_path/'run', steps=60)
    assert '20 steps in a row had no finite gradient' in rows[0]['stopped'] and 'train_batches' in rows[0]['stopped']
    assert value(rows, 'skipped_steps') == 20 and value(rows, 'steps') < 30


def test_a_loss_scale_at_its_floor_ends_the_run(recipe, data, tmp_path, monkeypatch):
    import cramlit.training.training as train
    real = train.accumulate

    def overflow(*args): real(*args); args[-1].flat[0] = float('inf')
    monkeypatch.setattr(train, 'accumulate', overflow)
    monkeypatch.setattr(train, 'choose_precision', lambda device: Precision(torch.float16, 'the test is about its loss scale'))
    rows = pretrain(override(recipe, ['validation.every=0.9']), data, tmp_path/'run', steps=60)
    assert 'the loss scale is stuck at its floor' in rows[0]['stopped'] and value(rows, 'skipped_steps') == 17  # 2^16 halved 17 times is below 1


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_is_whole(recipe, data, tmp_path, monkeypatch):
    import cramlit.training.checkpoints as checkpoint
    whole, calls = checkpoint.save_file, []

    def full(*args):
        calls.append(1)
        if len(calls) > 3: raise OSError(28, 'No space left on device')
        whole(*args)
    monkeypatch.setattr(checkpoint, 'save_file', full)
    with pytest.raises(CramlitError, match='MB needed.*No space left'): pretrain(override(recipe, ['checkpoint.every=0.2']), data, tmp_path/'run', steps=10)
    monkeypatch.undo()
    assert [find_damage(p) for p in checkpoints(tmp_path/'run'/'checkpoints')] == ['']
    assert value(pretrain(override(recipe, ['checkpoint.every=0.2']), data, tmp_path/'run', steps=10), 'steps') == 10


@pytest.mark.parametrize('settings, match', [
    (['packing.seq_len=16'], 'prepared with packing.seq_len'),
    (['tokenizer.vocab_size=256'], 'prepared with tokenizer.vocab_size'),
])
def test_data_of_another_recipe_is_refused(recipe, data, tmp_path, settings, match):
    with pytest.raises(UsageError, match=match): pretrain(override(recipe, settings), data, tmp_path/'run', steps=1)
    assert not (tmp_path/'run').exists()


def test_folder_of_another_run_is_refused(recipe, data, tmp_path):
    pretrain(recipe, data, tmp_path/'run', steps=1)
    with pytest.raises(UsageError, match='another recipe'): pretrain(override(recipe, ['optim.lr=1e-4']), data, tmp_path/'run', steps=1)


@pytest.mark.parametrize('kw', [dict(), dict(budget=.001), dict(steps=-3)])
def test_no_time_for_a_step(recipe, data, tmp_path, kw):
    with pytest.raises(UsageError, match='budget'): pretrain(recipe, data, tmp_path/'run', **kw)
