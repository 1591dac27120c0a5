"Many processes, many machines, one clock, one result"
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PATIENCE
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

import cramlit.core.devices as devices
import cramlit.training.distributed as distributed
from cramlit.core.recipes import CramlitError, Interrupted
from cramlit.running import command
from cramlit.training.checkpoints import checkpoints, find_damage
from cramlit.training.distributed import Bucket, World, join_world, launch, processes, whole_state

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
PRETRAIN = [sys.executable, '-m', 'cramlit', 'pretrain']
EXACT = str(Path(__file__).with_name('exact.py'))
ONE_THREAD = os.environ | dict(OMP_NUM_THREADS='1')
NO_DROPOUT = ['model.dropout=0', 'model.attention_dropout=0']


def options(text, data, out, *more, settings=()):
    overrides = [f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128',
                 'validation.max_sequences=37', 'batch.micro_batch_size=4', *settings]
    folders = ['--data', str(data), '--out', str(out)]
    return ['--scale', 'tiny', *folders, *more, *(x for o in overrides for x in ('-o', o))]


def run(nproc, arguments, restarts=0, check=True, **env):
    how = '--standalone', '--nproc-per-node', str(nproc), '--max-restarts', str(restarts)
    command = [*TORCHRUN, *how, EXACT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=ONE_THREAD | env)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def log(out, key):
    return [line[key] for line in json_lines(out/'metrics.jsonl') if key in line]


def same(a, b, rel=1e-5):
    assert len(a) == len(b) and a
    assert max(abs(x - y)/y for x, y in zip(a, b, strict=True)) < rel


@pytest.fixture(scope='module')
def alone(text, data, tmp_path_factory):
    out = tmp_path_factory.mktemp('alone')/'run'
    run(1, options(text, data, out, '--steps', '50', settings=NO_DROPOUT))
    return out


@pytest.mark.parametrize('nproc', [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_the_curve_does_not_depend_on_the_number_of_processes(text, data, tmp_path, alone, nproc):
    run(nproc, options(text, data, tmp_path/'run', '--steps', '50', settings=NO_DROPOUT))
    for key in ('loss', 'validation_loss'): same(log(tmp_path/'run', key), log(alone, key))


@pytest.mark.parametrize('message', ['bfloat16', pytest.param('float16', marks=pytest.mark.slow)])
def test_messages_in_16_bits_move_the_curve_by_less_than_1e_4(text, data, tmp_path, alone, message):
    run(2, options(text, data, tmp_path/'run', '--steps', '50', settings=NO_DROPOUT), MESSAGE=message)
    for key in ('loss', 'validation_loss'): same(log(tmp_path/'run', key), log(alone, key), 1e-4)


def test_nor_on_the_micro_batch(text, data, tmp_path, alone):
    settings = [*NO_DROPOUT, 'batch.micro_batch_size=32']
    run(1, options(text, data, tmp_path/'run', '--steps', '50', settings=settings))
    same(log(tmp_path/'run', 'loss'), log(alone, 'loss'))


def test_the_command_starts_the_processes(text, data, tmp_path):
    arguments = options(text, data, tmp_path/'run', '--steps', '10', '--nproc', '2', '--json')
    done = subprocess.run([*PRETRAIN, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r['processes'] for r in rows} == {2} and (tmp_path/'run'/'model'/'model.safetensors').exists()
    assert '2 × cpu' in done.stderr


@pytest.mark.parametrize('more, match', [
    (['--nproc', '3'], 'cannot be shared by 3 processes'),
    (['--nproc', '2', '-o', 'packing.seq_len=16'], 'was prepared with'),
    (['--nproc', '-1'], 'expected a number above zero')])
def test_mistakes_are_found_before_anything_is_started(text, data, tmp_path, more, match):
    arguments = options(text, data, tmp_path/'run', '--steps', '10', *more)
    done = subprocess.run([*PRETRAIN, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and match in done.stderr and done.stderr.count('\n') == 1
    assert not (tmp_path/'run').exists()


def test_all_ranks_go_by_one_clock(text, data, tmp_path):
    run(2, options(text, data, tmp_path/'run', '--budget', '15'), STEP_CLOCK='1', LR_LOG=str(tmp_path/'lr'))
    a, b = ((tmp_path/f'lr.{r}').read_text().splitlines() for r in range(2))
    assert a == b and len(a) == 15


def test_all_ranks_skip_the_same_step(text, data, tmp_path):
    run(2, options(text, data, tmp_path/'run', '--steps', '10'), POISON='4-5')
    assert log(tmp_path/'run', 'skipped') == [1, 2]
    skipped, = (r['value'] for r in json_lines(tmp_path/'run'/'rows.jsonl') if r['metric'] == 'skipped_steps')
    assert skipped == 2


def test_too_many_bad_steps_end_the_run_with_a_diagnosis(text, data, tmp_path):
    done = run(2, options(text, data, tmp_path/'run', '--steps', '100'), check=False, POISON='3-99')
    assert done.returncode == 0, 'torchrun would start again what fails'
    assert done.stderr.count('the run stopped early: ') == 1
    assert 'lastly step 21' in done.stderr and 'train_batches' in done.stderr
    assert 'lastly step 21' in json_lines(tmp_path/'run'/'metrics.jsonl')[-1]['stopped']


def test_torchrun_takes_no_option_of_ours_for_its_own():
    "It takes the beginning of one of its options for the whole, wherever it stands, and knows two of each"
    own = [o for action in get_args_parser()._actions for o in action.option_strings]
    ours = [f'--{name}' for name in inspect.signature(command.pretrain).parameters if name != 'nproc']
    assert '--recipe' in ours and '--run-path' in own
    assert not [o for o in ours if any(other.startswith(o) for other in own)]


@pytest.mark.parametrize('env, match', [
    (dict(WORLD_SIZE='2'), 'RANK='), (dict(WORLD_SIZE='2', RANK='x'), 'RANK=x'),
    (dict(WORLD_SIZE='zwei'), 'zwei'),
    (dict(WORLD_SIZE='2', RANK='2'), 'RANK=2'), (dict(WORLD_SIZE='-1'), 'WORLD_SIZE=-1'),
    (dict(WORLD_SIZE='2', RANK='0'), 'LOCAL_RANK='),
    (dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', LOCAL_WORLD_SIZE='2'), 'MASTER_ADDR='),
    (dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', LOCAL_WORLD_SIZE='2', MASTER_ADDR='x', MASTER_PORT='y'),
     'did not meet'),
    (dict(WORLD_SIZE='1'), ''), (dict(WORLD_SIZE=''), ''), (dict(RANK='3', MASTER_PORT='29500'), '')])
def test_an_environment_that_torchrun_did_not_make(monkeypatch, env, match):
    "Schedulers and notebooks leave some of these variables"
    for k, v in env.items(): monkeypatch.setenv(k, v)
    if match:
        with pytest.raises(CramlitError, match=match) as e:
            with join_world(): pass
        assert 'unset WORLD_SIZE' in str(e.value)
    else:
        with join_world() as world: assert (world.rank, world.size) == (0, 1)


def test_a_world_of_one_does_not_keep_from_starting_more(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '1')
    assert processes(0) == processes(1) == (0, 1) and processes(4) == (None, 4)


@pytest.mark.parametrize('gpus, backend', [(0, 'gloo'), (1, 'gloo'), (2, 'nccl')])
def test_processes_wait_longer_for_one_another_than_a_compiler_takes(monkeypatch, gpus, backend):
    env = dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1', LOCAL_WORLD_SIZE='2')
    for k, v in env.items(): monkeypatch.setenv(k, v)
    asked, joined = [], {}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setattr(torch.cuda, 'set_device', asked.append)
    monkeypatch.setattr(distributed, 'check_build', lambda device: None)
    monkeypatch.setattr(distributed, '_rendezvous_store', lambda: None)
    def join(name, **kw): joined.update(kw, name=name)
    monkeypatch.setattr(distributed.dist, 'init_process_group', join)
    monkeypatch.setattr(distributed.dist, 'destroy_process_group', lambda: None)
    with join_world() as world: assert (world.rank, world.size) == (1, 2)
    assert joined['name'] == backend and joined['timeout'].total_seconds() >= 1800
    assert asked == [world.device]*(gpus > 0)
    assert joined['device_id'] == (world.device if backend == 'nccl' else None)


@pytest.mark.parametrize('error, left', [(Interrupted, True), (CramlitError, False)])
def test_a_stop_is_left_together_and_an_error_alone(monkeypatch, error, left):
    for k, v in dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1', LOCAL_WORLD_SIZE='2').items():
        monkeypatch.setenv(k, v)
    ends = []
    monkeypatch.setattr(distributed, '_rendezvous_store', lambda: None)
    monkeypatch.setattr(distributed.dist, 'init_process_group', lambda *args, **kw: None)
    monkeypatch.setattr(distributed.dist, 'destroy_process_group', lambda: ends.append(1))
    with pytest.raises(error), join_world(): raise error('why')
    assert bool(ends) == left


def test_nobody_leaves_before_the_main_process_has_all_moments(monkeypatch):
    "NCCL only queues a broadcast: a process that goes on, and ends, takes its own with it"
    model, order = torch.nn.Linear(2, 2), []
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(distributed.dist, 'broadcast', lambda x, owner: order.append('moments'))
    monkeypatch.setattr(World, 'all_reduce', lambda self, x: x)
    monkeypatch.setattr(World, 'broadcast', lambda self, value: order.append('all meet'))
    bucket = Bucket([*model.parameters()], owner=1)
    grads = SimpleNamespace(world=World(1, 2), buckets=[bucket], owns=lambda b: True)
    with whole_state(grads, optimizer): order.append('saved')
    assert order == ['moments']*6 + ['all meet', 'saved']


def test_a_system_without_affinity(tmp_path, monkeypatch):
    "As macOS is"
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    started = []

    def popen(command, env, **kw):
        started.append(env['OMP_NUM_THREADS'])
        raise OSError('enough')
    monkeypatch.setattr(subprocess, 'Popen', popen)
    with pytest.raises(OSError, match='enough'): launch(2, [], tmp_path)
    assert int(started[0]) >= 1


@pytest.mark.parametrize('answers', [[0], [1, 1]])
def test_an_allocator_that_refuses_is_left_as_it_was(monkeypatch, answers):
    "An older glibc takes no threshold of 1 GB"
    asked = []

    def mallopt(*args):
        asked.append(args)
        return answers[len(asked) - 1]
    monkeypatch.setattr(devices.ctypes, 'CDLL', lambda name: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(devices.sys, 'platform', 'linux')
    for name in ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_'): monkeypatch.setenv(name, '7')
    assert devices.keep_memory() == (answers != [0]) and len(asked) == len(answers)
    assert (os.environ['MALLOC_TRIM_THRESHOLD_'] == '7') == (answers == [0])


def wait(ready, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, 'nothing happened'
        time.sleep(.05)


@pytest.mark.slow
def test_a_lost_process_is_made_good(text, data, tmp_path):
    "One rank is killed; torchrun starts the group again, and the end is that of an unbroken run"
    settings = ['checkpoint.every=0.02']
    run(2, options(text, data, tmp_path/'whole', '--steps', '300', settings=settings))
    command = [*TORCHRUN, '--standalone', '--nproc-per-node', '2', '--max-restarts', '2', EXACT,
               *options(text, data, tmp_path/'run', '--steps', '300', settings=settings)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    wait(lambda: len(checkpoints(tmp_path/'run'/'checkpoints')) > 1)
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err[-3000:]
    newest = (checkpoints(tmp_path/n/'checkpoints')[-1] for n in ('whole', 'run'))
    a, b = (load_file(path/'model.safetensors') for path in newest)
    for k in a: assert torch.equal(a[k], b[k]), k


def test_another_number_of_processes_goes_on(text, data, tmp_path, alone):
    settings = [*NO_DROPOUT, 'checkpoint.every=0.2']
    run(1, options(text, data, tmp_path/'whole', '--steps', '50', settings=settings))
    arguments = options(text, data, tmp_path/'run', '--steps', '50', settings=settings)
    command = [*TORCHRUN, '--standalone', '--nproc-per-node', '2', EXACT, *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    wait(lambda: len(checkpoints(tmp_path/'run'/'checkpoints')) > 1)
    (tmp_path/'run'/'stop').touch()
    assert process.wait(PATIENCE) == 0
    if not (tmp_path/'run'/'rows.jsonl').exists(): (tmp_path/'run'/'stop').unlink(missing_ok=True)
    run(1, arguments)
    same(log(tmp_path/'run', 'loss'), log(tmp_path/'whole', 'loss'))


def test_a_rank_that_does_not_see_the_newest_checkpoint_goes_on_from_it(text, data, tmp_path):
    settings = ['checkpoint.every=0.2', 'checkpoint.keep=9']
    out, arguments = tmp_path/'run', options(text, data, tmp_path/'run', '--steps', '10', settings=settings)
    run(2, arguments)
    whole = load_file(checkpoints(out/'checkpoints')[-1]/'model.safetensors')
    for path in checkpoints(out/'checkpoints')[-2:]: shutil.rmtree(path)
    (out/'rows.jsonl').unlink()
    run(2, arguments, LATE='1')
    again = load_file(checkpoints(out/'checkpoints')[-1]/'model.safetensors')
    for k in whole: assert torch.equal(again[k], whole[k]), k


def start_two(text, data, out, steps):
    "The command with two processes, a few steps after its start"
    command = [*PRETRAIN, *options(text, data, out, '--steps', str(steps), '--nproc', '2')]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    metrics = out/'metrics.jsonl'
    wait(lambda: metrics.exists() and metrics.read_text().count('\n') > 2)
    return process


def test_ctrl_c_saves_on_all_ranks_and_the_same_command_goes_on(text, data, tmp_path):
    process = start_two(text, data, tmp_path/'run', 50000)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and 'same command goes on' in err and 'Traceback' not in err
    assert not (tmp_path/'run'/'stop').exists() and checkpoints(tmp_path/'run'/'checkpoints')


def test_a_second_ctrl_c_leaves_at_once_and_harms_nothing(text, data, tmp_path):
    process = start_two(text, data, tmp_path/'run', 50000)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(.001)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in (1, 75) and 'Traceback' not in err  # 75 when it was saved between the two
    assert {find_damage(p) for p in checkpoints(tmp_path/'run'/'checkpoints')} == {''}


def children_of(pid):
    return [int(n) for n in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError: return False


def test_a_second_ctrl_c_leaves_no_worker_behind_in_a_step_that_does_not_end(text, data, tmp_path):
    process = start_two(text, data, tmp_path/'run', 50000)
    torchrun, = children_of(process.pid)
    workers = children_of(torchrun)
    os.kill(workers[0], signal.SIGSTOP)
    try:
        process.send_signal(signal.SIGINT)
        wait(lambda: (tmp_path/'run'/'stop').exists())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
        assert process.returncode != 0 and len(workers) == 2
        wait(lambda: not any(alive(pid) for pid in workers))
    finally:
        for pid in filter(alive, workers): os.kill(pid, signal.SIGKILL)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def two_agents(arguments):
    "Two torchrun agents, each with an address of its own, meet by c10d; how they end and what they say"
    port, env = free_port(), ONE_THREAD | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1')

    def agent(address):
        meet = ['--rdzv-backend', 'c10d', '--rdzv-endpoint', f'127.0.0.1:{port}', '--rdzv-id', 'test']
        how = '--nnodes', '2', '--nproc-per-node', '1', *meet, '--local-addr', address
        command = [*TORCHRUN, *how, EXACT, *arguments]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    agents = [agent('127.0.0.1'), agent('127.0.0.2')]
    errors = [a.communicate(timeout=PATIENCE)[1] for a in agents]
    return [a.returncode for a in agents], errors


def test_two_machines(text, data, tmp_path):
    for n in range(5):  # somebody else may take the port between the question and its use
        run = tmp_path/f'run{n}'
        codes, errors = two_agents(options(text, data, run, '--steps', '50', settings=NO_DROPOUT))
        if not any('ddress already in use' in e for e in errors): break
    assert codes == [0, 0], errors
    assert {r['processes'] for r in json_lines(run/'rows.jsonl')} == {2}
