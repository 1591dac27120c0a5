"What a GPU will do, proved without one: programs, shapes, devices, clocks, ranks"
import json
import logging
import multiprocessing
import subprocess
import sys
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import PATIENCE
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cramlit.core.devices as devices
import cramlit.core.results as results
import cramlit.evaluation.protocol as protocol
import cramlit.training.memory as memory
import cramlit.training.training as train
from cramlit.core.devices import Precision
from cramlit.core.recipes import RECIPES, CramlitError, Interrupted, override
from cramlit.core.scales import get_recipe
from cramlit.data.batches import Batch, train_batches, validation_batches
from cramlit.data.packing import open_data, prepare
from cramlit.model.encoder import MaskedLM
from cramlit.training.checkpoints import read_checkpoint, tensors_of, write_checkpoint
from cramlit.training.distributed import Gradients, World, processes
from cramlit.training.optimizers import make_optimizer
from cramlit.training.schedule import Clock
from cramlit.training.training import (
    accumulate,
    compile_model,
    micro_step,
    pretrain,
    program_shapes,
    update,
    warm_up,
)

CPU = torch.device('cpu')
FP32 = Precision(torch.float32, 'compared in full precision')
OFF = torch.amp.GradScaler(enabled=False)
NO_DROPOUT = ['model.dropout=0', 'model.attention_dropout=0']
V = 128  # rows of the embedding matrix


@pytest.fixture(scope='module')
def opened(data):
    return open_data(data)


@pytest.fixture(autouse=True)
def no_traces():
    "pytest records what the compiler traces of itself, which takes longer than the compiling"
    logging.disable(logging.INFO)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def compiled_by(monkeypatch):
    "torch.compile with another backend"
    real = torch.compile

    def use(backend):
        monkeypatch.setattr(torch, 'compile', lambda model, **how: real(model, backend=backend, **how))
        return backend
    return use


def small(name, *settings):
    return get_recipe(name, 'tiny', ['batch.micro_batch_size=4', *settings])


def compiled_step(recipe, precision=FP32):
    torch.manual_seed(0)
    model = MaskedLM(recipe.model, V)
    grads = Gradients(model)
    return micro_step(model, recipe, precision, OFF, grads, 'compiled'), grads


# what is compiled

@pytest.mark.parametrize('name', RECIPES)
def test_every_shape_of_every_recipe_is_one_graph(name, compiled_by):
    recipe, counter = small(name), compiled_by(CompileCounter())
    shapes = program_shapes(recipe)
    assert len(shapes) == (1 if recipe.packing.mode == 'stream' else 3)
    micro, grads = compiled_step(recipe)
    warm_up(micro, recipe, grads)
    assert counter.frame_count == len(shapes) and not grads.buffer.any()


@pytest.mark.parametrize('name', {small(name).model: name for name in RECIPES}.values())
def test_the_way_of_a_gpu_is_one_graph_too(name, compiled_by):
    "On the meta device, where dropout and attention are PyTorch's"
    recipe, counter = small(name), compiled_by(CompileCounter())
    with torch.device('meta'): model = MaskedLM(recipe.model, V)
    program = compile_model(model, {16, 32})
    with torch.device('meta'):
        slots = torch.zeros(4, 5, dtype=torch.int64)
        for width, padding in program_shapes(recipe):
            ids = torch.zeros(4, width, dtype=torch.int64)
            program(ids, ids > 0 if padding else None, slots, slots.clone()).backward()
    assert counter.frame_count == len(program_shapes(recipe))


def test_a_second_recipe_of_a_process_is_compiled_as_well(compiled_by):
    "PyTorch would count the programs of all recipes together, and from its limit on make no more"
    counter = compiled_by(CompileCounter())
    with torch._dynamo.config.patch(recompile_limit=3):
        for made in (3, 6):
            recipe = small('24hbert', f'model.num_layers={made//3}')
            micro, grads = compiled_step(recipe)
            warm_up(micro, recipe, grads)
            assert counter.frame_count == made


def test_a_program_too_many_is_an_error_and_not_silence(compiled_by):
    compiled_by(CompileCounter())
    recipe = small('modern', 'model.num_layers=1')
    with torch._dynamo.config.patch(recompile_limit=2):
        micro, grads = compiled_step(recipe)
        warm_up(micro, recipe, grads)
        a, b = (Batch(torch.ones(size, 32, dtype=torch.int64), None, torch.zeros(size, 5, dtype=torch.int64),
                      torch.ones(size, 5, dtype=torch.int64)) for size in (3, 2))
        micro(a)
        with pytest.raises(FailOnRecompileLimitHit): micro(b)


@pytest.mark.parametrize('seq_len', [16, 24, 32, 50])
def test_no_batch_meets_a_compiler_in_another_shape(seq_len, recipe, data, tmp_path, monkeypatch):
    r = override(recipe, [f'packing.seq_len={seq_len}', f'tokenizer.path={data}/tokenizer',
                          'batch.micro_batch_size=4'])
    prepare(r, tmp_path/'data')
    opened, met, plain = open_data(tmp_path/'data'), set(), []

    def program(ids, mask, positions, labels):
        assert ids.is_contiguous() and (mask is None or mask.is_contiguous() and mask.shape == ids.shape)
        met.add((ids.shape[1], mask is not None))
        return ids[:, 0].sum() + (0 if mask is None else mask.sum()*0)
    monkeypatch.setattr(torch, 'compile', lambda model, **how: program)
    forward = compile_model(torch.nn.Identity(), {width for width, _ in program_shapes(r)})
    for step in range(40):
        for b in train_batches(opened, r, step):
            forward(*vars(b).values())
            plain.append(b.input_ids.shape[1])
    assert met == set(program_shapes(r)) and len(met) == min(3, 1 + -(-seq_len//16))
    assert seq_len <= 32 or len(set(plain)) > 2, 'and there were more'


def test_what_is_widened_is_masked(recipe, opened, monkeypatch):
    "A batch that was cut at 16 tokens has the same loss in a program for 32"
    monkeypatch.setattr(torch, 'compile', lambda model, **how: model)
    r = override(recipe, [*NO_DROPOUT, 'batch.micro_batch_size=4'])
    batches = [b for b in train_batches(opened, r, 0) if b.input_ids.shape[1] == 16]
    model = MaskedLM(r.model, V)
    wide = compile_model(model, {32})
    for b in batches: torch.testing.assert_close(wide(*vars(b).values()), model(*vars(b).values()))
    assert batches


@pytest.mark.slow
@pytest.mark.parametrize('name', ['24hbert', 'modern'])
def test_what_inductor_makes_of_a_step_is_the_step(name, opened):
    r = small(name, *NO_DROPOUT, 'model.num_layers=1')
    gradients = []
    for form in ('eager', 'compiled'):
        torch.manual_seed(0)
        model = MaskedLM(r.model, V)
        grads = Gradients(model)
        micro = micro_step(model, r, FP32, OFF, grads, form)
        accumulate(micro, train_batches(opened, r, 0), grads)
        gradients.append(grads.buffer.clone())
    eager, compiled = gradients
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5*eager.abs().max().item())


@pytest.mark.parametrize('capability, works, why', [
    ((7, 5), True, 'compute capability 7.5 is below 8.0'), ((8, 6), True, ''),
    ((9, 0), False, 'torch.compile fails, RuntimeError: Failed to find C compiler'),
])
def test_a_gpu_without_a_compiler_goes_on_without(capability, works, why, monkeypatch):
    def compiler(f):
        if not works: raise RuntimeError('Failed to find C compiler\nand much more')
        return f
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch, 'zeros', lambda *args, **how: 0)
    monkeypatch.setattr(torch, 'compile', compiler)
    assert devices.why_eager.__wrapped__(torch.device('cuda')) == why


# what goes to a GPU

def test_batches_are_contiguous(recipe, opened):
    "What is cut out of a wider table is copied from pageable memory, and the CPU waits"
    r = override(recipe, ['batch.micro_batch_size=4'])
    batches = [*train_batches(opened, r, 0), *validation_batches(opened, r)]
    assert any(b.input_ids.shape[1] < 32 for b in batches)
    assert all(t.is_contiguous() for b in batches for t in b.tensors())


def test_validation_of_long_sequences_takes_fewer_at_a_time(recipe, opened):
    "The table of scores grows with the tokens: 16 sequences of 512 have as many as 64 of 128"
    def largest(seq_len, micro):
        ids = np.random.default_rng(0).integers(5, V, (80, seq_len))
        r = override(recipe, [f'batch.micro_batch_size={micro}', 'validation.max_sequences=80'])
        return max(len(b.labels) for b in validation_batches(replace(opened, ruler=dict(tune=ids)), r))
    assert [largest(128, 4), largest(512, 4), largest(512, 32)] == [64, 16, 32]


class OneDevice(TorchDispatchMode):
    "Every operation works on tensors of one device, but for the copy that brings a batch there"
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if op is not torch.ops.aten._to_copy.default:
            assert {t.device.type for t in tensors} <= {'meta'}, f'{op} works beside the device'
        return out


@pytest.mark.parametrize('name', RECIPES)
def test_every_tensor_of_a_step_is_on_the_device(name, opened, monkeypatch):
    r = small(name)
    monkeypatch.setattr(train, 'autocast', lambda device, precision: nullcontext())  # knows no meta device
    with torch.device('meta'): model = MaskedLM(r.model, V)
    grads, batches = Gradients(model), list(train_batches(opened, r, 0))
    micro = micro_step(model, r, FP32, OFF, grads, 'eager')
    with OneDevice(): accumulate(micro, batches, grads)
    with OneDevice(), pytest.raises(AssertionError, match='beside the device'): torch.zeros(1) + 1


def pointers(model, optimizer):
    state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
    return [t.data_ptr() for p in model.parameters() for t in (p, p.grad)] + [t.data_ptr() for t in state]


@pytest.mark.parametrize('method', ['adamw', 'muon'])
def test_nothing_moves_in_memory(method, recipe, opened, tmp_path):
    "Weights, gradients and moments stay where they are, over clipped and skipped steps and a resume"
    r = override(recipe, [f'optim.method={method}', 'batch.micro_batch_size=8'])
    model = MaskedLM(r.model, V)
    grads, optimizer = Gradients(model), make_optimizer(model, r.optim)
    micro = micro_step(model, r, FP32, OFF, grads)

    def step(n, clip=0., spoil=False):
        accumulate(micro, train_batches(opened, r, n), grads)
        grads.all_reduce(0., False)
        if spoil: grads.flat[0] = float('nan')
        return update(grads, optimizer, OFF, clip)
    step(0)
    before = pointers(model, optimizer)
    assert step(1, clip=1e-3) > 1e-3
    assert not step(2, spoil=True) < float('inf')
    step(3)
    assert pointers(model, optimizer) == before
    path = write_checkpoint(tmp_path, tensors_of(model, optimizer), dict(step=4))
    read_checkpoint(path, model, optimizer)
    n = 2*len(list(model.parameters()))
    assert pointers(model, optimizer)[:n] == before[:n], 'moments are new, weights and gradients are not'
    before = pointers(model, optimizer)
    step(4)
    assert pointers(model, optimizer) == before


# who has which GPU

class Gpus:
    "GPUs that are not there: which thread is on which"
    def __init__(self, monkeypatch, count):
        self.now, self.busy, self.most = threading.local(), Counter(), Counter()
        self.two = threading.Barrier(2)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
        monkeypatch.setattr(torch.cuda, 'set_device', lambda i: setattr(self.now, 'gpu', i))
        monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: hasattr(self.now, 'gpu'))
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: self.now.gpu)

    def work(self, fails=False):
        gpu = self.now.gpu
        self.busy[gpu] += 1
        self.most[gpu] = max(self.most[gpu], self.busy[gpu])
        if not fails: self.two.wait(PATIENCE)  # two jobs work at a time, always
        self.busy[gpu] -= 1
        if fails: raise CramlitError('this job fails')
        return ''


def test_each_job_has_a_gpu_of_its_own_and_gives_it_back(monkeypatch):
    gpus = Gpus(monkeypatch, 2)
    monkeypatch.setattr(protocol, 'local_workers', nullcontext)  # threads stand for processes
    with joblib.parallel_config('threading', n_jobs=4):  # more workers than GPUs
        protocol.run_parallel([joblib.delayed(gpus.work)() for _ in range(12)], 12, 'jobs')
        with pytest.raises(CramlitError, match='fails'):
            protocol.run_parallel([joblib.delayed(gpus.work)(True)], 1, 'jobs')
        protocol.run_parallel([joblib.delayed(gpus.work)() for _ in range(4)], 4, 'jobs')
    assert gpus.most == {0: 1, 1: 1}


def test_a_worker_has_its_last_gpu_again_where_that_is_free(tmp_path, monkeypatch):
    gpus = Gpus(monkeypatch, 3)
    def takes():
        with devices.take_gpu(tmp_path): return gpus.now.gpu
    with devices.take_gpu(tmp_path), devices.take_gpu(tmp_path): assert takes() == 2
    assert [takes(), takes()] == [2, 2]
    with devices.take_gpu(tmp_path): assert takes() == 0


def test_gpus_that_torch_cannot_use_are_one_line(monkeypatch, tmp_path, capsys):
    "An old driver counts them, and cannot run what this torch was built for"
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i: pytest.fail('it starts CUDA'))
    results.provenance.cache_clear()
    assert 'hardware' in results.provenance()
    results.provenance.cache_clear()
    for ask in (devices.pick_device, lambda: processes(0), lambda: processes(4)):
        with pytest.raises(CramlitError, match=r'machine has \(4\).*make env TORCH=cu126'): ask()


def test_a_worker_that_is_killed_gives_its_gpu_back(tmp_path, monkeypatch):
    take = ('import os, pathlib, sys, torch\nfrom cramlit.core.devices import take_gpu\n'
            'torch.cuda.device_count, torch.cuda.set_device = (lambda: 1), print\n'
            'taken = take_gpu(pathlib.Path(sys.argv[1]))\nos._exit(9)')
    assert subprocess.run([sys.executable, '-c', take, str(tmp_path)]).returncode == 9
    Gpus(monkeypatch, 1)
    with devices.take_gpu(tmp_path): pass


def test_no_process_number_says_which_gpu(monkeypatch):
    "Nor is a GPU touched by asking: each rank would keep memory on the first one"
    Gpus(monkeypatch, 2)
    monkeypatch.setattr(multiprocessing.current_process(), 'name', 'LokyProcess-7')
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: pytest.fail('this makes a context'))
    assert devices.pick_device() == torch.device('cuda')


# the clock

@pytest.mark.parametrize('restarted', [False, True])
def test_compiling_is_not_on_the_clock(restarted, recipe, data, tmp_path, monkeypatch):
    "Each program takes ten budgets, and the learning rate still rises from 0 over its warm-up"
    now, rates, shapes = [0.], [], set()

    def compiler(model, **how):
        def program(ids, mask, *predictions):
            if (ids.shape, mask is None) not in shapes: now[0] += 1000.
            shapes.add((ids.shape, mask is None))
            return model(ids, mask, *predictions)
        return program

    def step(*args):
        now[0] += 1.
        return accumulate(*args)

    def note(optimizer, factor):
        rates.append(factor)
        set_lr(optimizer, factor)
        if restarted and len(rates) == 3: (tmp_path/'run'/'stop').touch()
    set_lr = train.set_lr
    monkeypatch.setattr(train, 'Clock', partial(Clock, now=lambda: now[0]))
    monkeypatch.setattr(torch, 'compile', compiler)
    monkeypatch.setattr(train, 'form_of', lambda device: 'compiled')
    monkeypatch.setattr(train, 'accumulate', step)
    monkeypatch.setattr(train, 'set_lr', note)
    r = override(recipe, ['schedule.warmup=0.06', 'batch.micro_batch_size=16', 'validation.every=0.9'])
    if restarted:
        with pytest.raises(Interrupted): pretrain(r, data, tmp_path/'run', budget=100.)
        shapes.clear()  # another process has no programs
    rows = pretrain(r, data, tmp_path/'run', budget=100.)
    assert len(rates) == 100 and rates[:7] == pytest.approx([n/6 for n in range(7)])
    assert now[0] >= 3000.*(1 + restarted)
    assert next(row['value'] for row in rows if row['metric'] == 'seconds') == 100


# ranks

HALF = Precision(torch.float16, 'as on the GPUs of the paper')


def two_ranks(rank, folder, recipe):
    "What each of two processes finds, as JSON"
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    world, found = World(rank, 2), {}
    train.choose_precision = lambda device: (HALF, FP32)[rank]
    found['precision'] = str(train.shared_precision(world).dtype)
    found['form'] = []
    for mine in ('compiled', ('compiled', 'eager')[rank]):
        train.form_of = lambda device, mine=mine: mine
        found['form'].append(train.shared_form(world))
    memory.free_memory = lambda device: (9e9, 6e9)[rank]
    memory.room_for = lambda recipe, vocab_size, bytes, gpus: int(bytes/1e9)  # sequences
    found['micro'] = [train.choose_micro_batch(recipe, V, world, (earlier, 99)[rank]) for earlier in (0, 2)]

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    grads, scaler = Gradients(model, world, HALF.dtype), train.make_scaler(recipe, HALF, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=.1, fused=True)
    found['scale'], found['weights'] = [scaler.get_scale()], [train.fingerprint(model.state_dict())]
    for step in range(3):
        grads.buffer.zero_()
        scaler.scale(model(torch.randn(4, 8)).square().mean()/100).backward()
        if step == 1 and rank == 1: grads.flat[5] = float('inf')
        grads.totals[1] = 1.
        grads.all_reduce(0., False)
        update(grads, optimizer, scaler, 0.)
        found['scale'].append(scaler.get_scale())
        found['weights'].append(train.fingerprint(model.state_dict()))

    train.check_same_weights(model, world)
    with torch.no_grad(): model.weight.view(torch.int32)[0, 0] ^= rank  # one bit, the last of one weight
    try: train.check_same_weights(model, world)
    except CramlitError as e: found['said'] = str(e)
    (Path(folder)/f'{rank}.json').write_text(json.dumps(found))
    dist.destroy_process_group()


def test_ranks_agree_or_say_so(tmp_path):
    "One overflows, both skip and halve; one bit differs, both stop; of different GPUs the least counts"
    recipe = small('24hbert', 'batch.global_batch_size=64')
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path), recipe), nprocs=2)
    a, b = (json.loads((tmp_path/f'{rank}.json').read_text()) for rank in range(2))
    assert a == b and a['precision'] == 'torch.float16'
    assert a['form'] == ['compiled', 'eager'], 'one that cannot compile keeps the other from it'
    assert a['micro'] == [4, 2], 'the larger GPU has room for 9; rank 0 knows of an earlier part with 2'
    assert a['scale'] == [2.**20, 2.**20, 2.**19, 2.**19], '2^16 for each of the 16 micro-batches of a step'
    start, first, skipped, last = a['weights']
    assert start != first == skipped != last
    assert a['said'].startswith('rank 1 of 2 has not the weights of rank 0')


def compiled_rank(rank, folder, recipe):
    "Whether a compiled model sends the gradients that it makes"
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.compile = partial(torch.compile, backend='aot_eager')  # a backward pass as on a GPU
    found = []
    for form in ('eager', 'compiled'):
        torch.manual_seed(0)
        model = MaskedLM(recipe.model, V)
        grads = Gradients(model, World(rank, 2))
        micro = micro_step(model, recipe, FP32, OFF, grads, form)
        torch.manual_seed(rank)
        ids = torch.randint(V, (2, 4, 32))
        slots = torch.arange(5).repeat(4, 1)
        accumulate(micro, [Batch(x, None, slots, x[:, :5].clone()) for x in ids], grads)
        assert grads.sent, 'the backward pass sends them'
        loss, *_ = grads.all_reduce(0., False)
        found.append((loss, grads.flat.clone()))
    (loss, flat), (other, compiled) = found
    assert loss == pytest.approx(other) and flat.any()
    torch.testing.assert_close(compiled, flat, rtol=0, atol=1e-6)
    dist.destroy_process_group()


def test_a_compiled_model_sends_its_gradients(tmp_path):
    recipe = small('modern', 'model.num_layers=1', 'batch.global_batch_size=16')
    torch.multiprocessing.spawn(compiled_rank, (str(tmp_path), recipe), nprocs=2)


def test_training_compares_weights_at_each_validation(recipe, data, tmp_path, monkeypatch):
    seen, validate = [], train.validate
    monkeypatch.setattr(train, 'check_same_weights', lambda model, world: seen.append('compared'))
    monkeypatch.setattr(train, 'validate', lambda *args: seen.append('validated') or validate(*args))
    pretrain(override(recipe, ['validation.every=0.5']), data, tmp_path/'run', steps=2)
    assert seen == ['compared', 'validated']*(len(seen)//2) and len(seen) >= 6
