"""Kill a small run at random moments, and compare its weights with those of an undisturbed one

python tests/torture.py OUT [--kills 20] [--big paper] [-o SETTING]

As a script it also takes the times that the chapter on checkpoints shows. Another mode stops runs by the
clock at moments near their end: whatever is left of the budget, each must finish.

SIGKILL cannot be caught, so nothing can be saved after it. The run saves every 20 steps, which no one would
do, so that many kills fall into a save.
"""
import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cramlit.core.results import sha256
from cramlit.core.scales import get_recipe
from cramlit.data.packing import prepare
from cramlit.model.encoder import MaskedLM
from cramlit.training.checkpoints import Saver, checkpoints
from cramlit.training.optimizers import make_optimizer

EVERY = 20  # steps between two checkpoints


def launch(data, out, length, settings, program=('-m', 'cramlit', 'pretrain'), **env):
    "Start or continue a run of the smallest scale in a process of its own"
    command = [sys.executable, *program, '--scale', 'tiny', *length]
    command += ['--data', str(data), '--out', str(out)]
    for s in settings: command += ['-o', s]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f'{out}.log', 'ab') as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | env)


def start(data, out, steps, every, settings):
    return launch(data, out, ['--steps', str(steps)],
                  [*settings, f'checkpoint.every={every/steps}', 'validation.every=0.5'])


def end(process):
    process.kill()
    process.wait()


def wait_for(process, ready, seconds=3600.):
    "Wait until something is so; False when the process ended first"
    until = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None: return False
        if time.monotonic() > until:
            end(process)
            raise TimeoutError(f'a run made no progress in {seconds:.0f} s')
        time.sleep(.002)
    return True


def kill_again_and_again(kills, data, out, settings, seed=0):
    "Run to the end through so many SIGKILLs; how many there were, and how many of them fell into a save"
    rng, done, in_save = random.Random(seed), 0, 0
    def newest(): return [None, *checkpoints(out/'checkpoints')][-1]
    def saving(): return list(out.glob('checkpoints/.step-*.tmp'))
    while True:
        before = newest()
        process = start(data, out, EVERY*(kills + 1)*4, EVERY, settings)
        # it is left alone until it has written one more checkpoint, so that it gets on
        if done < kills and wait_for(process, lambda old=before: newest() not in (old, None)):
            if done % 2:  # every other time a few milliseconds after a save has begun
                wait_for(process, saving)
                time.sleep(rng.uniform(0, .005))
            else: time.sleep(rng.uniform(0, .3))
            end(process)
            done += 1
            in_save += bool(saving())
        elif process.wait(): raise RuntimeError(f'the run in {out} failed after {done} kills')
        else: return done, in_save


def torture(kills, out, settings=()):
    "How many kills, how many of them in a save, and whether the weights are those of an undisturbed run"
    data, steps = out/'data', EVERY*(kills + 1)*4
    prepare(get_recipe('24hbert', 'tiny', settings), data)
    if start(data, out/'whole', steps, EVERY, settings).wait():
        raise RuntimeError('the undisturbed run failed')
    done, in_save = kill_again_and_again(kills, data, out/'killed', settings)
    last = [sha256(checkpoints(out/n/'checkpoints')[-1]/'model.safetensors') for n in ('whole', 'killed')]
    return dict(kills=done, in_save=in_save, identical=last[0] == last[1])


def stop_near_the_end(data, out, budget, fraction, settings=(), kill=False, **env):
    "Stop a run when its clock reads a fraction of its time, and let it go on; in how many parts it was made"
    at = f'{fraction}-{"SIGKILL" if kill else "SIGTERM"}'
    for part in range(1, 10):
        more = dict(STOP_AT=at) if part == 1 else {}
        program = [str(Path(__file__).with_name('exact.py'))]
        process = launch(data, out, ['--budget', f'{budget}s'], [*settings, 'checkpoint.every=0.05'], program,
                         **env, **more)
        code = process.wait()
        if (out/'rows.jsonl').exists() and code == 0: return part
        if code not in (75, *([-signal.SIGKILL, -signal.SIGTERM] if part == 1 else [])): break
    said = Path(f'{out}.log').read_text(encoding='utf-8', errors='replace')[-2000:]
    raise RuntimeError(f'the run in {out} cannot be finished: code {code} in part {part}: {said}')


def torture_by_the_clock(moments, out, settings=(), budget=20.):
    """Runs that are stopped near their end, half of them by SIGKILL, with no git to be found; all must finish

    Each is stopped by what its own clock reads, so that a busy machine stops it no earlier and no later.
    Two at a time, since much of it is waiting. A part takes the budget, and what a process needs to start.
    """
    data, nowhere = out/'data', out/'no-programs'
    prepare(get_recipe('24hbert', 'tiny', settings), data)
    nowhere.mkdir()

    def stop(n):
        fraction, kill = .7 + .3*n/(moments - 1), n % 2 == 1  # the last at the very end
        return stop_near_the_end(data, out/f'run-{n}', budget, fraction, settings, kill, PATH=str(nowhere))
    with ThreadPoolExecutor(2) as pool: return list(pool.map(stop, range(moments)))


def seconds_to_first_step(step, data, out, settings):
    "From the start of a process to the end of its first step; goes on from one less than a multiple of 20"
    length = 200_000, 100_000
    process = start(data, out, *length, settings)
    wait_for(process, lambda: checkpoints(out/'checkpoints'))
    end(process)
    first, = checkpoints(out/'checkpoints')
    renamed = first.rename(first.with_name(f'step-{step:08d}'))
    saved = json.loads((renamed/'state.json').read_text())
    saved['state']['step'] = step
    del saved['state_sha256']  # it is changed on purpose
    (renamed/'state.json').write_text(json.dumps(saved))
    log = out/'metrics.jsonl'
    log.unlink()
    began, process = time.monotonic(), start(data, out, *length, settings)
    wait_for(process, lambda: log.exists() and '"loss"' in log.read_text())
    took = time.monotonic() - began
    end(process)
    return took


def seconds_of(work):
    began = time.monotonic()
    work()
    return time.monotonic() - began


def save_costs(recipe, out, times=5):
    "Of each save: seconds of the copy, of the writing, and lost to training, which goes on meanwhile"
    model, saver, costs = MaskedLM(recipe.model, recipe.tokenizer.vocab_size), Saver(), []
    optimizer = make_optimizer(model, recipe.optim)
    ids = torch.randint(recipe.tokenizer.vocab_size, (1, 64))
    def work(): model(ids, None, torch.arange(9)[None], ids[:, :9]).backward()
    work()
    optimizer.step()  # the moments are made in the first step
    in_peace = statistics.median(seconds_of(work) for _ in range(5))
    for n in range(times):
        copy = seconds_of(lambda n=n: saver.save(out, model, optimizer, dict(step=n), keep=1))
        began, done = time.monotonic(), 0
        while saver.thread.is_alive():
            work()
            done += 1
        saver.wait()
        write = time.monotonic() - began
        costs.append(dict(copy=copy, write=write, lost=copy + max(0., write - done*in_peace)))
    shutil.rmtree(out)
    return costs


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='a folder to make')
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--big', default='paper', help='scale whose checkpoints are timed')
    parser.add_argument('-o', action='append', default=[], help='change one setting of the small recipe')
    given = parser.parse_args()
    print(torture(given.kills, given.out, given.o))
    for step in (19, 99_999):
        took = seconds_to_first_step(step, given.out/'data', given.out/f'from-{step}', given.o)
        print(f'from the start to the first step after step {step}: {took:.2f} s')
    costs = save_costs(get_recipe('24hbert', given.big), given.out/'saving')
    for what in ('copy', 'write', 'lost'):
        values = [c[what] for c in costs]
        print(f'{what}: {statistics.median(values):.2f} s ({min(values):.2f} – {max(values):.2f})')
    print(f"lost, of ten minutes: {statistics.median(c['lost'] for c in costs)/6:.2f} %")
