"The batch file of Slurm runs here, with stand-ins for Slurm's own commands, and is asked to leave"
import json
import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import PATIENCE

SBATCH = Path(__file__).parent.parent/'nbs'/'pretrain.sbatch'
ENV = dict(SLURM_CPUS_PER_TASK='16', SLURM_GPUS_ON_NODE='4', SLURM_NNODES='2', SLURM_JOB_ID='12345',
           SLURM_JOB_NODELIST='n[07-08]')
SCONTROL = '''
echo "$@" >> "$CALLS/scontrol"
[ "$1" != show ] || printf 'n07\\nn08\\n'
'''
# notes how it was called, then trains until there is a file `stop`, and saves
SRUN = '''
printf '%s\\n' "$@" > "$CALLS/srun"
env > "$CALLS/environment"
touch "$CALLS/started"
while [ ! -e "$OUT/stop" ]; do sleep .05; done
sleep .3
touch "$CALLS/saved"
'''


@pytest.fixture
def slurm(tmp_path):
    "Starts the batch file: stand-in for srun, options, environment → the process, and its notes"
    notes, started = tmp_path/'calls', []

    def start(srun, *options, **env):
        (tmp_path/'bin').mkdir()
        notes.mkdir()
        for name, body in (('srun', srun), ('scontrol', SCONTROL)):
            (tmp_path/'bin'/name).write_text(f'#!/bin/bash\n{body}')
            (tmp_path/'bin'/name).chmod(0o755)
        places = dict(PATH=f"{tmp_path/'bin'}:{os.environ['PATH']}", CALLS=str(notes),
                      OUT=str(tmp_path/'run'), DATA=str(tmp_path/'data'))
        process = subprocess.Popen(['bash', SBATCH, *options], env=os.environ | ENV | places | env,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process, notes
    yield start
    for process in started:  # a test that failed leaves nothing running
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)


def wait_for(path, process, seconds=PATIENCE):
    for _ in range(20*seconds):
        if path.exists(): return
        assert process.poll() is None, process.stderr.read()
        time.sleep(.05)
    raise AssertionError(f'{path} did not appear')


def test_the_run_saves_and_is_queued_again(slurm, tmp_path):
    process, notes = slurm(SRUN, '--seed', '7')
    wait_for(notes/'started', process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 0, process.stderr.read()
    assert (notes/'saved').exists(), 'it is not left before the run has saved'
    assert (notes/'scontrol').read_text().splitlines() == ['show hostnames n[07-08]', 'requeue 12345']

    called = (notes/'srun').read_text().splitlines()
    options = dict(zip(called, called[1:], strict=False))
    assert called[0] == 'torchrun' and options['-m'] == 'cramlit'
    assert (options['--nnodes'], options['--nproc-per-node']) == ('2', '4')
    assert options['--rdzv-endpoint'] == 'n07:29845', '29500 and 12345 modulo 1000'
    assert options['--out'] == str(tmp_path/'run') and called[-2:] == ['--seed', '7']
    lines = (notes/'environment').read_text().splitlines()
    told = dict(line.partition('=')[::2] for line in lines)
    assert told['SRUN_CPUS_PER_TASK'] == '16', 'else srun gives torchrun one CPU'
    assert told['TORCHINDUCTOR_COMPILE_THREADS'] == told['OMP_NUM_THREADS'] == '4', '16 CPUs, 4 processes'


def test_a_run_that_ends_while_it_is_asked_to_leave_is_not_queued_again(slurm):
    process, notes = slurm(SRUN + 'touch "$OUT/rows.jsonl"\n')
    wait_for(notes/'started', process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 0
    assert 'requeue' not in (notes/'scontrol').read_text()


def test_the_next_turn_does_not_stop_at_once(slurm, tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'stop').touch()  # a machine was lost before the run had seen it
    process, notes = slurm('[ ! -e "$OUT/stop" ] || exit 3')
    assert process.wait(PATIENCE) == 0


def test_a_failure_is_passed_on_and_folders_are_asked_for(slurm, tmp_path):
    process, notes = slurm('exit 3')
    assert process.wait(PATIENCE) == 3 and 'requeue' not in (notes/'scontrol').read_text()
    env = {k: v for k, v in os.environ.items() if k not in ('DATA', 'OUT')} | ENV
    done = subprocess.run(['bash', SBATCH], env=env, capture_output=True, text=True)
    assert done.returncode and 'cramlit prepare' in done.stderr


def test_torchrun_itself_saves_and_ends(slurm, data, text, tmp_path):
    settings = (f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128',
                'validation.max_sequences=64', 'batch.micro_batch_size=16')
    options = [x for o in settings for x in ('-o', o)]
    def taken(job):  # is its port, which is made of its number?
        with socket.socket() as s: return s.connect_ex(('localhost', 29500 + job % 1000)) == 0
    job = next(n for n in range(os.getpid(), os.getpid() + 999) if not taken(n))
    alone = dict(SLURM_GPUS_ON_NODE='2', SLURM_CPUS_PER_TASK='2', SLURM_NNODES='1', DATA=str(data),
                 SLURM_JOB_ID=str(job), CUDA_VISIBLE_DEVICES='')
    srun = 'exec "${@/n07:/localhost:}"'  # on this machine
    process, notes = slurm(srun, '--scale', 'tiny', '--steps', '100000', '--bare', *options, **alone)
    out = tmp_path/'run'
    wait_for(out/'checkpoints'/'step-00000000', process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 0, process.stderr.read()
    assert f"requeue {alone['SLURM_JOB_ID']}" in (notes/'scontrol').read_text()
    steps = sorted(out.glob('checkpoints/step-*'))
    assert len(steps) == 2 and not (out/'stop').exists()
    assert json.loads((steps[-1]/'state.json').read_text())['state']['step'] > 0
