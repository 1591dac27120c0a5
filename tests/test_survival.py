"Kills, damaged folders, memory: what a run must outlive, and what it must not take"
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import PATIENCE
from torture import save_costs, torture, torture_by_the_clock

from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.scales import get_recipe
from cramlit.data.batches import train_batches
from cramlit.data.packing import Rows, open_data
from cramlit.training.checkpoints import checkpoints, verify_folder
from cramlit.training.training import pretrain

SETTINGS = ['corpus.holdout=0.1', 'tokenizer.vocab_size=128', 'validation.max_sequences=64']


@pytest.mark.slow
def test_twenty_kills_change_nothing(text, tmp_path):
    found = torture(20, tmp_path/'torture', [f'corpus.source={text}', *SETTINGS])
    assert found['kills'] == 20 and found['identical'] and found['in_save'] > 0


@pytest.mark.slow
def test_ten_runs_by_the_clock_that_are_stopped_near_their_end_finish(text, tmp_path):
    parts = torture_by_the_clock(10, tmp_path, [f'corpus.source={text}', *SETTINGS])
    assert len(parts) == 10 and min(parts) >= 2, 'all were stopped, and all have ended'


def test_the_cost_of_saving_is_taken(tmp_path):
    costs = save_costs(get_recipe('24hbert', 'tiny'), tmp_path/'saving', times=2)
    assert len(costs) == 2 and all(c['copy'] > 0 and c['write'] > 0 for c in costs)
    assert not (tmp_path/'saving').exists()


def test_what_a_save_costs_training_is_the_copy_and_what_its_steps_take_longer(tmp_path, monkeypatch):
    "By a clock on which a step takes 1 s in peace, and 3 s beside a save"
    now, left = [0.], [0]
    saves = iter([(.5, 2), (.25, 2), (.5, 4)])  # seconds of a copy, steps beside its writing

    class Model(torch.nn.Module):
        def forward(self, *args):
            now[0] += 3. if left[0] else 1.
            left[0] = max(0, left[0] - 1)
            return torch.zeros((), requires_grad=True)

    class Saver:
        def __init__(self): self.thread = SimpleNamespace(is_alive=lambda: left[0] > 0)
        def wait(self): pass
        def save(self, out, *args, **kwargs):
            out.mkdir(exist_ok=True)
            copy, left[0] = next(saves)
            now[0] += copy

    monkeypatch.setattr('torture.time', SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr('torture.MaskedLM', lambda *args: Model())
    monkeypatch.setattr('torture.make_optimizer', lambda *args: SimpleNamespace(step=lambda: None))
    monkeypatch.setattr('torture.Saver', Saver)
    costs = save_costs(get_recipe('24hbert', 'tiny'), tmp_path/'saving', times=3)
    assert [c['copy'] for c in costs] == [.5, .25, .5] and [c['write'] for c in costs] == [6., 6., 12.]
    assert [c['lost'] for c in costs] == [4.5, 4.25, 8.5]


def test_verify_names_all_that_is_damaged(recipe, data, tmp_path):
    pretrain(recipe, data, tmp_path/'run', steps=2)
    assert [r['value'] for r in verify_folder(tmp_path)] == [0, 2]
    for path in checkpoints(tmp_path/'run'/'checkpoints'):
        content = (path/'model.safetensors').read_bytes()
        (path/'model.safetensors').write_bytes(content[:-1] + b'x')
    with pytest.raises(CramlitError, match='2 of 2 damaged') as e: verify_folder(tmp_path)
    assert str(e.value).count('model.safetensors does not match its checksum') == 2
    with pytest.raises(UsageError): verify_folder(tmp_path/'nothing')


def anonymous_memory() -> int:
    "Bytes of this process that belong to no file"
    return 1024*int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])


@pytest.mark.slow
@pytest.mark.parametrize('steps', [400, 2000])
def test_memory_is_flat(text, data, tmp_path, steps):
    "After the first steps, with checkpoints and validation among them, resident memory does not grow"
    often = 'batch.micro_batch_size=8', 'checkpoint.every=0.05', 'validation.every=0.1'
    exact = str(Path(__file__).with_name('exact.py'))
    command = [sys.executable, exact, '--scale', 'tiny', '--data', str(data), '--out', str(tmp_path/'run')]
    for s in (f'corpus.source={text}', *SETTINGS, *often): command += ['-o', s]
    subprocess.run([*command, '--steps', str(steps)], check=True, stderr=subprocess.DEVNULL, timeout=PATIENCE,
                   env=os.environ | dict(MEMORY_LOG=str(tmp_path/'memory')))
    megabytes = [int(line)/1024 for line in (tmp_path/'memory').read_text().split()]
    assert len(megabytes) == steps
    early, late = np.median(megabytes[steps//4:steps//2]), np.median(megabytes[-steps//4:])
    assert late - early < 6, f'{early:.0f} MB, then {late:.0f} MB'


def test_the_loader_holds_little_of_a_large_corpus(recipe, data, tmp_path):
    "A corpus of 400 MB, read in random order"
    small, files = open_data(data), []
    rows = 400_000_000//4//2//recipe.packing.seq_len
    for i in range(4):
        files.append(dict(name=f'train-{i}.npy', rows=rows))
        shape = rows, recipe.packing.seq_len
        shard = np.lib.format.open_memmap(tmp_path/f'train-{i}.npy', mode='w+', dtype=np.uint16, shape=shape)
        shard[:] = small.train[[0]]
    del shard
    wide = replace(recipe, batch=replace(recipe.batch, global_batch_size=4096, micro_batch_size=32))
    before, peak = anonymous_memory(), 0
    large = replace(small, train=Rows(tmp_path, dict(files=files), recipe.packing.seq_len))
    assert len(large.train) == 4*rows
    for step in range(3):
        for _ in train_batches(large, wide, step): peak = max(peak, anonymous_memory() - before)
    assert peak < 64e6
