"Training: budgets, interruption, continuation, misfits"
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import PATIENCE
from safetensors.torch import load_file
from torch._inductor.exc import InductorError

import cramlit.training.checkpoints as checkpoint
import cramlit.training.training as train
from cramlit.core.devices import Precision, take_gpu
from cramlit.core.recipes import CramlitError, Interrupted, UsageError, override
from cramlit.core.results import read_rows, result_row, write_rows
from cramlit.data.batches import train_batches
from cramlit.data.packing import open_data
from cramlit.model.encoder import MaskedLM
from cramlit.training.checkpoints import checkpoints, find_damage, load_run
from cramlit.training.distributed import World
from cramlit.training.memory import out_of_memory
from cramlit.training.schedule import Clock
from cramlit.training.tracking import append_lines, prediction_writer
from cramlit.training.training import Hook, pretrain, should_stop_early


def weights(run):
    return load_file(checkpoints(run/'checkpoints')[-1]/'model.safetensors')


def value(rows, metric):
    return next(r['value'] for r in rows if r['metric'] == metric)


def log(run):
    return [json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()]


def saved(run):
    "What the newest checkpoint says of the run"
    return json.loads((checkpoints(run/'checkpoints')[-1]/'state.json').read_text())['state']


def text_tokens(data, recipe, step):
    "Tokens in the batches of a step, padding not counted"
    data = open_data(data)
    pad = data.manifest['special_ids']['pad']
    return sum(int((b.input_ids != pad).sum()) for b in train_batches(data, recipe, step))


def same(a, b):
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_same_seed_same_weights_other_seed_others(recipe, data, tmp_path):
    a, b = (pretrain(recipe, data, tmp_path/n, steps=5) for n in 'ab')
    c = pretrain(replace(recipe, seed=1), data, tmp_path/'c', steps=5)
    assert value(a, 'validation_loss') == value(b, 'validation_loss') != value(c, 'validation_loss')
    same(weights(tmp_path/'a'), weights(tmp_path/'b'))


def test_time_spent_survives_a_restart(recipe, data, tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    (run/'stop').touch()  # the wish to stop, as a launcher leaves it
    with pytest.raises(Interrupted): pretrain(recipe, data, run, budget=600)
    spent = saved(run)['spent']
    (run/'stop').touch()
    with pytest.raises(Interrupted): pretrain(recipe, data, run, budget=600)
    assert 0 < spent < saved(run)['spent'] and saved(run)['step'] == 2


def test_a_run_whose_time_is_up_is_finished_not_refused(recipe, data, tmp_path):
    run = tmp_path/'run'
    run.mkdir()
    (run/'stop').touch()
    with pytest.raises(Interrupted): pretrain(recipe, data, run, budget=50)
    newest = checkpoints(run/'checkpoints')[-1]/'state.json'
    state = json.loads(newest.read_text())
    state['state']['spent'] = 49.9  # less is left than the evaluation takes that is set aside
    state['state']['reserve'] = 1.
    del state['state_sha256']  # what is changed here is no damage
    newest.write_text(json.dumps(state))
    rows = pretrain(recipe, data, run, budget=50)
    assert value(rows, 'steps') == 1 and value(rows, 'validation_loss') > 0 and (run/'rows.jsonl').exists()


def test_time_is_set_aside_for_a_checkpoint_with_moments(recipe, data, tmp_path, monkeypatch):
    "On a clock on which saving and a step take a second each, and nothing else takes any time"
    save, accumulate, ticks = train._save_checkpoint, train.accumulate, []
    monkeypatch.setattr(train, 'Clock', partial(Clock, now=lambda: float(len(ticks))))
    monkeypatch.setattr(train, '_save_checkpoint', lambda *args: ticks.append(1) or save(*args))
    monkeypatch.setattr(train, 'accumulate', lambda *args: ticks.append(1) or accumulate(*args))
    run = tmp_path/'run'
    run.mkdir()
    (run/'stop').touch()
    with pytest.raises(Interrupted): pretrain(recipe, data, run, budget=50)
    assert saved(run)['reserve'] == 1.5*3  # of the first save, weights alone; the last one has two moments


def test_budget_is_kept_with_validation_and_saving(recipe, data, tmp_path, monkeypatch):
    "On a clock on which a step takes a second, and nothing else takes any time"
    real, accumulate, rates, steps = train.set_lr, train.accumulate, [], []
    monkeypatch.setattr(train, 'Clock', partial(Clock, now=lambda: float(len(steps))))
    monkeypatch.setattr(train, 'accumulate', lambda *args: steps.append(1) or accumulate(*args))

    def noted(optimizer, lr):
        rates.append(lr)
        real(optimizer, lr)
    monkeypatch.setattr(train, 'set_lr', noted)
    rows = pretrain(recipe, data, tmp_path/'run', budget=20)
    assert value(rows, 'steps') == len(rates) == 20
    assert rates[-1] < max(rates)/2
    assert log(tmp_path/'run')[-1]['validation_loss'] == value(rows, 'tuning_loss')


def test_interrupted_run_ends_like_an_unbroken_one(recipe, data, tmp_path, monkeypatch):
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
    same(weights(tmp_path/'whole'), weights(tmp_path/'broken'))
    steps, tokens = ([line[k] for line in log(tmp_path/'broken')] for k in ('step', 'tokens'))
    counted = [text_tokens(data, recipe, step) for step in range(12)]
    assert steps == sorted(steps) and tokens == [sum(counted[:step]) for step in steps]


def test_a_folder_is_let_go_when_nothing_is_being_written_there(recipe, data, tmp_path, monkeypatch):
    "as in a notebook: interrupted while a checkpoint is on its way to a slow disk, and called again at once"
    recipe = override(recipe, ['checkpoint.every=0.25'])
    write, real, calls = checkpoint.write_checkpoint, train.accumulate, []

    def slowly(*args):
        time.sleep(1)
        return write(*args)

    def broken_off(*args):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(checkpoint, 'write_checkpoint', slowly)
    monkeypatch.setattr(train, 'accumulate', broken_off)
    with pytest.raises(KeyboardInterrupt): pretrain(recipe, data, tmp_path/'run', steps=4)
    assert saved(tmp_path/'run')['step'] == 1, 'the checkpoint that was on its way is whole'


@pytest.mark.parametrize('numbers', [[signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP]])  # twice when closed
def test_a_signal_saves_the_step_that_was_under_way(recipe, data, tmp_path, monkeypatch, numbers):
    real, calls = train.accumulate, []

    def signalled(*args):
        calls.append(1)
        if len(calls) == 5:
            for number in numbers: os.kill(os.getpid(), number)
        return real(*args)
    monkeypatch.setattr(train, 'accumulate', signalled)
    with pytest.raises(Interrupted, match='after step 5 and saved'):
        pretrain(recipe, data, tmp_path/'broken', steps=12)
    pretrain(recipe, data, tmp_path/'broken', steps=12)
    assert len(calls) == 12
    pretrain(recipe, data, tmp_path/'whole', steps=12)
    same(weights(tmp_path/'whole'), weights(tmp_path/'broken'))


def test_a_second_signal_leaves_at_once(recipe, data, tmp_path, monkeypatch):
    def twice(*args):
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setattr(train, 'accumulate', twice)
    with pytest.raises(KeyboardInterrupt): pretrain(recipe, data, tmp_path/'run', steps=12)
    assert [p.name for p in checkpoints(tmp_path/'run'/'checkpoints')] == ['step-00000000']


def test_a_signal_at_the_very_end_is_not_forgotten(recipe, data, tmp_path, monkeypatch):
    "What follows a run, other runs for instance, does not go on as if nobody had asked to stop"
    real = train.validate

    def signalled(model, data, recipe, precision, world, ruler):
        if ruler == 'report': os.kill(os.getpid(), signal.SIGTERM)
        return real(model, data, recipe, precision, world, ruler)
    monkeypatch.setattr(train, 'validate', signalled)
    with pytest.raises(Interrupted, match='had just been finished'):
        pretrain(recipe, data, tmp_path/'run', steps=3)
    rows = read_rows(tmp_path/'run'/'rows.jsonl')
    assert pretrain(recipe, data, tmp_path/'run', steps=3) == rows


def test_milestones_are_kept_once(recipe, data, tmp_path):
    recipe = override(recipe, ['checkpoint.milestones=0.25,0.5', 'checkpoint.every=0.9'])
    pretrain(recipe, data, tmp_path/'run', steps=8)
    kept = {m: [p.name for p in checkpoints(tmp_path/'run'/'milestones'/m)] for m in ('0.25', '0.5')}
    assert kept == {'0.25': ['step-00000002'], '0.5': ['step-00000004']}


def test_a_damaged_shard_is_refused_before_the_first_step(recipe, data, tmp_path):
    shutil.copytree(data, tmp_path/'data')
    shard = next((tmp_path/'data').glob('train-*.npy'))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CramlitError, match=f'{shard.name} does not match its checksum'):
        pretrain(recipe, tmp_path/'data', tmp_path/'run', steps=2)
    assert not (tmp_path/'run').exists()


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(recipe, data, text, tmp_path):
    settings = [f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128',
                'validation.max_sequences=64']
    command = [sys.executable, '-m', 'cramlit', 'pretrain', '--scale', 'tiny', '--data', str(data),
               '--out', str(tmp_path/'run'), '--steps', '50000', *(x for s in settings for x in ('-o', s))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = tmp_path/'run'/'metrics.jsonl'
    for _ in range(10*PATIENCE):
        if process.poll() is not None or metrics.exists() and metrics.read_text().count('\n') > 2: break
        time.sleep(.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and 'same command goes on' in err and 'Traceback' not in err


def test_a_run_above_the_threshold_is_stopped_early(recipe, data, tmp_path):
    recipe = override(recipe, ['validation.stop_loss=1', 'validation.every=0.1'])
    rows = pretrain(recipe, data, tmp_path/'run', steps=20)
    assert value(rows, 'steps') < 20 and 'above 1.0' in rows[0]['stopped']
    assert should_stop_early(float('inf'), 0, recipe, lambda ruler: 0.)


def test_the_limit_is_one_of_the_papers_ruler_which_is_asked_only_where_there_is_one(recipe):
    limited, asked = override(recipe, ['validation.stop_loss=5', 'validation.stop_after=0.5']), []

    def evaluate(ruler):
        asked.append(ruler)
        return 4.9
    assert should_stop_early(7., .6, limited, evaluate) == '' and asked == ['paper']
    for r, fraction in ((limited, .4), (recipe, .6)):
        assert should_stop_early(7., fraction, r, evaluate) == ''
    assert asked == ['paper']


def test_a_run_ends_with_a_loss_by_each_ruler(recipe, data, tmp_path):
    rows = {r['metric']: r for r in pretrain(recipe, data, tmp_path/'run', steps=5)}
    model, opened = load_run(tmp_path/'run')[0], open_data(data)
    full = Precision(torch.float32, '')
    for metric, ruler in (('validation_loss', 'report'), ('tuning_loss', 'tune'), ('paper_loss', 'paper')):
        again = train.validate(model, opened, recipe, full, World(), ruler)
        assert rows[metric]['value'] == pytest.approx(again, abs=.02), metric
    assert len({rows[m]['value'] for m in ('validation_loss', 'tuning_loss', 'paper_loss')}) == 3
    assert rows['validation_loss']['ruler'] == rows['tuning_loss']['ruler'] == opened.ruler_id


def test_gradients_that_are_not_finite_end_the_run_with_a_diagnosis(
        recipe, data, tmp_path, monkeypatch, capsys):
    real, calls = train.accumulate, []

    def explode(micro, batches, grads):
        real(micro, batches, grads)
        calls.append(1)
        if len(calls) > 5: grads.flat[0] = math.nan
    monkeypatch.setattr(train, 'accumulate', explode)
    recipe = override(recipe, ['validation.every=0.9'])
    rows = pretrain(recipe, data, tmp_path/'run', steps=60)
    why = rows[0]['stopped']
    assert '20 steps in a row had no finite gradient' in why
    assert str(data) in capsys.readouterr().err and not any(str(data) in str(r) for r in rows)
    assert value(rows, 'skipped_steps') == 20 and value(rows, 'steps') < 30


def test_a_loss_that_is_no_number_at_the_end_alone_is_said_as_well(recipe, data, tmp_path):
    def ruin(model):
        with torch.no_grad(): next(model.parameters()).fill_(math.nan)
    rows = pretrain(recipe, data, tmp_path/'run', steps=5, hook=Hook(before_final_evaluation=ruin))
    assert value(rows, 'steps') == 5 and value(rows, 'validation_loss') is None
    assert {r['stopped'] for r in rows} == {'the validation loss at the end is nan'}
    assert saved(tmp_path/'run')['stopped'] == rows[0]['stopped']


def test_a_loss_scale_below_one_ends_the_run(recipe, data, tmp_path, monkeypatch):
    real, half = train.accumulate, Precision(torch.float16, 'the test is about its loss scale')

    def overflow(micro, batches, grads):
        real(micro, batches, grads)
        grads.flat[0] = float('inf')
    monkeypatch.setattr(train, 'accumulate', overflow)
    monkeypatch.setattr(train, 'choose_precision', lambda device: half)
    rows = pretrain(override(recipe, ['validation.every=0.9']), data, tmp_path/'run', steps=60)
    assert 'the loss scale has fallen below 1' in rows[0]['stopped']
    assert value(rows, 'skipped_steps') == 17  # 2^16 halved 17 times is below 1


def test_a_run_that_began_without_a_loss_scale_goes_on_with_one(recipe, data, tmp_path, monkeypatch):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'stop').touch()  # it is read after the first step
    with pytest.raises(Interrupted): pretrain(recipe, data, tmp_path/'run', steps=4)
    half = Precision(torch.float16, 'of another GPU')
    monkeypatch.setattr(train, 'choose_precision', lambda device: half)
    rows = pretrain(recipe, data, tmp_path/'run', steps=4)
    assert value(rows, 'steps') == 4 and rows[0]['precision'] == 'float16'


@pytest.mark.parametrize('where, error', [
    ('warm_up', torch.OutOfMemoryError('CUDA out of memory')),
    ('update', torch.OutOfMemoryError('CUDA out of memory')),
    ('update', RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))])
def test_a_micro_batch_that_does_not_fit_is_one_line(recipe, data, tmp_path, monkeypatch, where, error):
    def full(*args): raise error
    if where == 'warm_up': monkeypatch.setattr(train, 'form_of', lambda device: 'compiled')
    monkeypatch.setattr(train, where, full)
    says = '0, which chooses' if isinstance(error, torch.OutOfMemoryError) else 'machine.* a smaller number'
    with pytest.raises(CramlitError, match=f'do not fit into the memory.*{says}'):
        pretrain(recipe, data, tmp_path/'run', steps=4)
    chosen = override(recipe, ['batch.micro_batch_size=0'])  # what it chose was too large
    with pytest.raises(CramlitError, match='give -o batch.micro_batch_size a smaller number, with'):
        pretrain(chosen, data, tmp_path/'chosen', steps=4)


@pytest.mark.parametrize('fault', ['CUDA error: out of memory', 'CUBLAS_STATUS_ALLOC_FAILED when calling'])
def test_memory_may_be_too_little_outside_of_torch(fault):
    assert out_of_memory(RuntimeError(fault)) and not out_of_memory(RuntimeError('an illegal address'))


def test_a_network_that_torch_cannot_compile_is_one_line(recipe, data, tmp_path, monkeypatch):
    def uncompiled(*args): raise InductorError(ValueError('no such operation'), None)
    monkeypatch.setattr(train, 'form_of', lambda device: 'compiled')
    monkeypatch.setattr(train, 'micro_step', lambda *args: uncompiled)
    with pytest.raises(CramlitError, match='cannot compile.*no such operation.*TORCH_COMPILE_DISABLE=1'):
        pretrain(recipe, data, tmp_path/'run', steps=4)


def test_a_full_disk_ends_the_run_and_the_checkpoint_before_is_whole(recipe, data, tmp_path, monkeypatch):
    recipe = override(recipe, ['checkpoint.every=0.2'])
    whole, calls = checkpoint.save_file, []

    def full(*args):
        calls.append(1)
        if len(calls) > 3: raise OSError(28, 'No space left on device')
        whole(*args)
    monkeypatch.setattr(checkpoint, 'save_file', full)
    with pytest.raises(CramlitError, match='No space left.*Free some space.*MB'):
        pretrain(recipe, data, tmp_path/'run', steps=10)
    monkeypatch.undo()
    assert [find_damage(p) for p in checkpoints(tmp_path/'run'/'checkpoints')] == ['']
    assert value(pretrain(recipe, data, tmp_path/'run', steps=10), 'steps') == 10


@pytest.mark.parametrize('settings, match', [
    (['packing.seq_len=16'], 'prepared with packing.seq_len'),
    (['tokenizer.vocab_size=256'], 'prepared with tokenizer.vocab_size'),
])
def test_data_of_another_recipe_is_refused(recipe, data, tmp_path, settings, match):
    with pytest.raises(UsageError, match=match):
        pretrain(override(recipe, settings), data, tmp_path/'run', steps=1)
    assert not (tmp_path/'run').exists()


def test_the_folder_of_the_data_is_no_folder_for_a_run(recipe, data):
    with pytest.raises(UsageError, match='has manifest.json and no run.json'):
        pretrain(recipe, data, data, steps=1)
    assert not (data/'run.json').exists()


def test_folder_of_another_run_is_refused(recipe, data, tmp_path):
    pretrain(recipe, data, tmp_path/'run', steps=1)
    with pytest.raises(UsageError, match=r'another recipe \(optim.lr=0.002'):
        pretrain(override(recipe, ['optim.lr=1e-4']), data, tmp_path/'run', steps=1)


def test_a_run_from_before_a_setting_was_there_goes_on(recipe, data, tmp_path):
    pretrain(recipe, data, tmp_path/'run', steps=3)
    info = json.loads((tmp_path/'run'/'run.json').read_text())
    del info['recipe']['schedule']['length']
    info['recipe_hash'] = 'as it was'
    (tmp_path/'run'/'run.json').write_text(json.dumps(info))
    pretrain(recipe, data, tmp_path/'run', steps=3)
    assert json.loads((tmp_path/'run'/'run.json').read_text())['recipe']['schedule']['length'] == 1


@pytest.mark.parametrize('kw', [dict(), dict(budget=.001), dict(steps=-3)])
def test_no_time_for_a_step(recipe, data, tmp_path, kw):
    with pytest.raises(UsageError, match='budget'): pretrain(recipe, data, tmp_path/'run', **kw)


def test_a_hook_that_names_nothing_changes_nothing(recipe, data, tmp_path):
    recipe = override(recipe, ['batch.micro_batch_size=8'])
    pretrain(recipe, data, tmp_path/'plain', steps=5)
    pretrain(recipe, data, tmp_path/'hooked', steps=5, hook=Hook())
    same(weights(tmp_path/'plain'), weights(tmp_path/'hooked'))


def test_a_hook_may_change_batches_from_step_to_step(recipe, data, tmp_path):
    def grow(r, fraction):
        size = 8 if fraction < .5 else 16 if fraction < .75 else 32
        return replace(r, batch=replace(r.batch, global_batch_size=size, micro_batch_size=8))
    sizes = []

    def loss(model, batch, precision, fraction):
        sizes.append((fraction, len(batch.input_ids)))
        return train.summed_loss(model, batch, precision, fraction)
    rows = pretrain(recipe, data, tmp_path/'run', steps=8, hook=Hook(recipe=grow, loss=loss))
    now = [grow(recipe, step/8) for step in range(8)]
    assert value(rows, 'tokens') == sum(text_tokens(data, r, step) for step, r in enumerate(now))
    assert [f for f, _ in sizes] == [0, .125, .25, .375, .5, .5, .625, .625] + [.75]*4 + [.875]*4
    assert {n for _, n in sizes} == {8}


def test_a_hooks_loss_is_a_mean_over_what_it_picks(recipe, data, tmp_path, monkeypatch):
    "Half of the sequences of a step, picked by the loss, are a batch of half the size"
    def first_half(model, batch, precision, fraction):
        return train.summed_loss(model, batch.map(lambda t: t[:len(t)//2]), precision, fraction)
    recipe = override(recipe, ['model.dropout=0', 'model.attention_dropout=0'])
    monkeypatch.setattr(train, 'choose_precision', lambda device: Precision(torch.float32, 'compared'))
    real = train.train_batches

    def halves(*args):
        for b in real(*args): yield b.map(lambda t: t[:len(t)//2])
    pretrain(recipe, data, tmp_path/'picked', steps=3, hook=Hook(loss=first_half))
    monkeypatch.setattr(train, 'train_batches', halves)
    pretrain(recipe, data, tmp_path/'halved', steps=3)
    a, b = weights(tmp_path/'picked'), weights(tmp_path/'halved')
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)


def test_a_hook_sees_every_step_and_has_the_last_word_on_the_weights(recipe, data, tmp_path):
    fractions = []

    def zero(model):
        for p in model.parameters(): p.data.zero_()
    hook = Hook(after_step=lambda model, fraction: fractions.append(fraction), before_final_evaluation=zero)
    rows = pretrain(recipe, data, tmp_path/'run', steps=4, hook=hook)
    assert fractions == [.25, .5, .75, 1]
    assert value(rows, 'validation_loss') == pytest.approx(math.log(128))
    assert not any(w.any() for w in weights(tmp_path/'run').values())


def test_a_compiled_run_is_the_eager_one(recipe, data, tmp_path, monkeypatch, capsys):
    "Every shape of batch, by a compiler that only traces; on a GPU tests/test_gpu.py compiles in earnest"
    recipe = override(recipe, ['batch.micro_batch_size=4', 'model.dropout=0', 'model.attention_dropout=0'])
    pretrain(recipe, data, tmp_path/'eager', steps=3)
    assert 'not compiled (a compiled step is slower on a CPU)' in capsys.readouterr().err
    made, real = [], torch.compile

    def traced(model, dynamic, fullgraph):
        made.append((dynamic, fullgraph))
        return real(model, backend='eager', dynamic=dynamic, fullgraph=fullgraph)
    monkeypatch.setattr(torch, 'compile', traced)
    monkeypatch.setattr(train, 'form_of', lambda device: 'compiled')
    pretrain(recipe, data, tmp_path/'compiled', steps=3)
    assert made == [(False, True)]
    a, b = weights(tmp_path/'eager'), weights(tmp_path/'compiled')
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-6)


def test_the_log_has_the_first_step_and_the_last_and_the_bar_is_full(recipe, data, tmp_path, capsys):
    pretrain(recipe, data, tmp_path/'run', steps=45)
    lines = [json.loads(line) for line in (tmp_path/'run'/'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines if 'loss' in line] == [1, 20, 40, 45]
    assert 'pretrain 100% ' in capsys.readouterr().err


def test_an_open_micro_batch_is_chosen_recorded_and_kept(recipe, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, 'choose_precision', lambda device: Precision(torch.float32, 'less rounding'))
    still = ['model.dropout=0', 'model.attention_dropout=0', 'batch.global_batch_size=24']
    auto = override(recipe, [*still, 'batch.micro_batch_size=0'])
    rows = {}
    for size in (0, 4):
        r = override(auto, [f'batch.micro_batch_size={size}'])
        rows[size] = pretrain(r, data, tmp_path/str(size), steps=5)
    assert 'micro-batches of 24 sequences' in capsys.readouterr().err
    assert {r['micro_batch_size'] for r in rows[0]} == {24} and 'micro_batch_size' not in rows[4][0]
    a, b = ([r['value'] for r in rows[size] if r['unit'] == 'nats'] for size in (0, 4))
    assert a == pytest.approx(b, rel=1e-5), 'the same but for rounding'
    info = json.loads((tmp_path/'0'/'run.json').read_text())
    assert info['micro_batch_size'] == 24 and info['recipe']['batch']['micro_batch_size'] == 0

    (tmp_path/'stopped').mkdir()
    (tmp_path/'stopped'/'stop').touch()  # it is read after the first step
    with pytest.raises(Interrupted): pretrain(auto, data, tmp_path/'stopped', steps=5)
    path = tmp_path/'stopped'/'run.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(micro_batch_size=8)))
    went_on = pretrain(auto, data, tmp_path/'stopped', steps=5)
    assert {r['micro_batch_size'] for r in went_on} == {8}
    path.write_text(path.read_text().replace('"micro_batch_size": 8', '"micro_batch_size": "many"'))
    with pytest.raises(UsageError, match='cannot be compared'):
        pretrain(auto, data, tmp_path/'stopped', steps=5)


@pytest.mark.parametrize('training', [True, False])
def test_validation_leaves_a_model_in_its_mode(recipe, data, training):
    opened = open_data(data)
    model = MaskedLM(recipe.model, opened.padded_vocab_size).train(training)
    train.validate(model, opened, recipe, Precision(torch.float32, 'of a test'), World())
    assert model.training == training


def test_a_log_that_cannot_grow_has_whole_lines(tmp_path, small_files):
    path = tmp_path/'metrics.jsonl'
    append_lines(path, [dict(step=1)])
    whole = path.read_text()
    small_files(len(whole) + 10)
    with pytest.raises(CramlitError, match='Nothing half-written was left'):
        append_lines(path, [dict(step=2, loss='x'*200)])
    small_files(None)
    assert path.read_text() == whole


def test_predictions_of_a_network_that_says_nan_are_not_written(recipe, data, tmp_path):
    opened = open_data(data)
    model = MaskedLM(recipe.model, opened.padded_vocab_size)
    listen = prediction_writer(tmp_path, opened, recipe, model, Precision(torch.float32, 'of a test'))
    listen(dict(step=1, seconds=1., validation_loss=None))
    assert not (tmp_path/'samples.jsonl').exists()
    listen(dict(step=2, seconds=2., validation_loss=3.))
    assert (tmp_path/'samples.jsonl').exists()


def test_a_number_of_numpy_is_a_number_in_a_row(tmp_path):
    rows = [result_row('m', np.float32(1.5), 'x'), result_row('n', np.int64(3), 'x')]
    write_rows(tmp_path/'rows.jsonl', rows)
    assert [r['value'] for r in read_rows(tmp_path/'rows.jsonl')] == [1.5, 3]


def test_without_gpus_there_is_none_to_wait_for(tmp_path):
    with pytest.raises(CramlitError, match='no GPU to take'): take_gpu(tmp_path)
