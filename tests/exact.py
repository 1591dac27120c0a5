"""What torchrun starts in the tests: `cramlit pretrain` in full precision, with every step in the log

STEP_CLOCK=R: a step takes a second by every clock, nothing else takes any, and that of rank R goes wrong
POISON=A-B: the gradient of rank 1 is NaN in these steps
LR_LOG=FILE: the rates of each rank
MEMORY_LOG=FILE: resident memory at each step, in kB, files not counted
MESSAGE=bfloat16: gradients travel in 16 bits
LATE=R: rank R does not see the newest checkpoint in a list of them, as on a disk of another machine
STOP_AT=F-NAME: a signal of this name when the run's own clock has first read a fraction F of its time
"""
import functools
import os
import re
import signal
import sys
from pathlib import Path

import torch

import cramlit.training.checkpoints as saved
import cramlit.training.training as train
from cramlit.core.devices import Precision
from cramlit.running.command import main
from cramlit.training.distributed import Gradients
from cramlit.training.schedule import Clock

rank = int(os.environ.get('RANK', 0))
train.choose_precision = lambda device: Precision(torch.float32, 'the test compares curves')
train.train = functools.partial(train.train, log_every=1)

set_lr, accumulate, steps = train.set_lr, train.accumulate, []


def step_clock():
    "By how many steps were taken; where it goes wrong, it jumps by an hour at the seventh"
    return len(steps) + 3600.*(os.environ['STEP_CLOCK'] == str(rank) and len(steps) > 6)


def counted(*args):
    steps.append(1)
    accumulate(*args)


def log_lr(optimizer, factor):
    with open(f"{os.environ['LR_LOG']}.{rank}", 'a') as f: f.write(f'{factor!r}\n')
    set_lr(optimizer, factor)


def log_memory(optimizer, factor):
    resident = re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1]
    with open(os.environ['MEMORY_LOG'], 'a') as f: f.write(resident + '\n')
    set_lr(optimizer, factor)


def poisoned(micro, batches, grads):
    steps.append(1)
    first, last = map(int, os.environ['POISON'].split('-'))
    poison = float('nan') if rank == 1 and first <= len(steps) <= last else 0.

    def bad_micro(batch):
        grads.flat[0] += poison  # before the backward pass, which sends what it has finished
        micro(batch)
    accumulate(bad_micro, batches, grads)


def stopped_by_the_clock(fraction, name, sent=[]):  # noqa: B006  remembered from one reading to the next
    read = Clock.seconds.fget

    def seconds(clock):
        now = read(clock)
        if now >= fraction*(clock.budget - clock.reserve) and not sent:
            sent.append(name)
            os.kill(os.getpid(), signal.Signals[name])
        return now
    Clock.seconds = property(seconds)


if 'LR_LOG' in os.environ: train.set_lr = log_lr
if 'MEMORY_LOG' in os.environ: train.set_lr = log_memory
if 'MESSAGE' in os.environ:
    message = getattr(torch, os.environ['MESSAGE'])
    train.Gradients = lambda model, world, _: Gradients(model, world, message)
if 'STEP_CLOCK' in os.environ:
    train.accumulate, train.Clock = counted, functools.partial(Clock, now=step_clock)
if 'POISON' in os.environ: train.accumulate = poisoned
if os.environ.get('LATE') == str(rank):
    every = saved.checkpoints
    saved.checkpoints = train.checkpoints = lambda folder: every(folder)[:-1]
if 'STOP_AT' in os.environ:
    fraction, name = os.environ['STOP_AT'].split('-')
    stopped_by_the_clock(float(fraction), name)
sys.exit(main(['pretrain', *sys.argv[1:]]))
