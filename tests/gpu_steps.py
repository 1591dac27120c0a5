"The steps of `gpu_check.py`, and what the ranks of two of them do; rows are appended when they are known"
import argparse
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from unittest.mock import patch

import gpu_bundle
import torch
import torch.distributed as dist

from cramlit.core.devices import Precision, check_build, choose_precision, pick_device
from cramlit.core.recipes import Corpus, Interrupted, Packing, Recipe, Tokenizer, override
from cramlit.core.results import result_row
from cramlit.core.scales import get_recipe
from cramlit.data.batches import Batch, train_batches
from cramlit.data.packing import Data, open_data
from cramlit.data.tokenizer import padded_vocab
from cramlit.efficiency.benchmark import (
    Contender,
    Setup,
    ceiling,
    make_setup,
    our_step,
    profiled,
    random_batch,
    seconds,
    stock_step,
    take_a_step,
)
from cramlit.efficiency.planner import GPU, gpu_called, training_flops
from cramlit.model.encoder import MaskedLM
from cramlit.model.kernels import dropout
from cramlit.model.stock_models import stock_config
from cramlit.training import training
from cramlit.training.checkpoints import checkpoints, load_run, optimizer_tensors, restore_optimizer
from cramlit.training.distributed import World, join_world, kill_all, usable_cpus
from cramlit.training.memory import peak_memory
from cramlit.training.training import Hook, fingerprint, form_of, pretrain, validate

PRECISIONS = {'fp32': Precision(torch.float32, 'check'), 'fp16': Precision(torch.float16, 'check'),
              'bf16': Precision(torch.bfloat16, 'check')}
TOLERANCE = {'fp32': 1e-3, 'fp16': 3e-2, 'bf16': 1e-1}  # of the largest element of a gradient
NO_DROPOUT = ('model.dropout=0', 'model.attention_dropout=0')
SCALE = {'base': 'gpu', 'large': 'paper'}  # shape → where it is the size of recipe 24hbert
GIB = 2**30
EAGER = Hook()  # changes nothing, but that a run with one is not compiled: programs would take minutes
LARGER = ('model.num_layers=10', 'model.hidden_size=512', 'model.num_heads=8',
          'model.intermediate_size=2048')  # 0.4 GB with moments: what is sent takes time
MESSAGE = 335_000_000  # gradients of BERT-large: 1.34 GB in 32 bits


@dataclass(frozen=True)
class Here:
    "A step, where it runs, and until when"
    step: str
    out: Path
    folder: Path  # of prepared data
    until: float  # on the monotonic clock
    fast: bool
    device: torch.device

    @property
    def small(self) -> bool: return self.device.type == 'cpu'

    def left(self) -> float: return self.until - time.monotonic()

    def data(self, name: str) -> tuple[Recipe, Data]:
        "Prepared data with the recipe that it was prepared with"
        recipe, scale, _ = gpu_bundle.DATA[name]
        data = open_data(self.folder/name)
        m = data.manifest
        made_with = dict(corpus=Corpus(**m['corpus']), packing=Packing(**m['packing']),
                         tokenizer=Tokenizer(**m['tokenizer']))
        return replace(get_recipe(recipe, scale), **made_with), data

    def row(self, metric: str, value: float|None, unit: str, **ids):
        ids = dict(stage='gpu_check', step=self.step, kind='measured') | ids
        line = json.dumps(result_row(metric, value, unit, **ids) | gpu_bundle.carried_commit()) + '\n'
        with open(self.out/'rows.jsonl', 'a') as f: f.write(line)
        print(line, end='', flush=True)

    def time_for(self, seconds: float, check: str, **ids) -> bool:
        "Is there time for a check that takes so long? If not, a row says so"
        enough = self.small or self.left() > seconds
        if not enough: self.row('passed', None, '', check=check, why='no time was left', **ids)
        return enough

    @contextmanager
    def check(self, name: str, **ids):
        "A row that says whether what happens inside ends well, and why not"
        why = ''
        try: yield
        except Exception as e:
            traceback.print_exc()
            why = (f'{type(e).__name__}: {e}'.splitlines() or [type(e).__name__])[0][:300]
        self.row('passed', float(not why), '', check=name, why=why, **ids)
        gc.collect()
        if not self.small: torch.cuda.empty_cache()


# 1: what is here

def machine(here: Here):
    here.row('gpus', torch.cuda.device_count(), 'GPUs')
    cuda = not here.small
    here.row('cpus', usable_cpus(), 'CPUs', cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(),
             nccl='.'.join(map(str, torch.cuda.nccl.version())) if cuda else None,
             arch_list=torch.cuda.get_arch_list(), compiler=shutil.which('cc') or shutil.which('gcc'))
    if cuda:
        with here.check('torch_has_code_for_the_gpu'): check_build(here.device)
        free, total = torch.cuda.mem_get_info()
        here.row('memory_bytes', total, 'bytes', free=free)
        properties = torch.cuda.get_device_properties(here.device)
        here.row('capability', float(f'{properties.major}.{properties.minor}'), '',
                 multiprocessors=properties.multi_processor_count)
    for name, precision in PRECISIONS.items():
        with here.check('products', precision=name):
            top = ceiling(here.device, precision, 512 if here.small else 0)
            here.row('ceiling', top, 'FLOP/s', precision=name)
    with here.check('copies'): copies(here)
    form = form_of(here.device)  # tries the compiler
    here.row('form', None, '', why=f'{form}; {choose_precision(here.device).reason}')


def copies(here: Here):
    "GB/s of a copy, what is read not counted again as what is written"
    size = 2**24 if here.small else 2**30
    def room(device='cpu', **more): return torch.zeros(size, dtype=torch.uint8, device=device, **more)
    ways = dict(pageable_to_device=(room(here.device), room()))
    if not here.small:
        pinned = room(pin_memory=True)
        ways |= dict(on_device=(room(here.device), room(here.device)),
                     pinned_to_device=(room(here.device), pinned),
                     device_to_pinned=(pinned, room(here.device)))
    for way, (to, source) in ways.items():
        here.row('copy_rate', size/seconds(lambda a=to, b=source: a.copy_(b))/1e9, 'GB/s', way=way)


# 2: the same results in every form and precision

def forms(here: Here) -> list[str]:
    return ['eager', 'compiled'][:1 + (form_of(here.device) == 'compiled')]


def setup_of(recipe: Recipe, here: Here, precision: Precision, vocab_size: int = 0) -> Setup:
    torch.manual_seed(0)
    V = vocab_size or padded_vocab(recipe.tokenizer.vocab_size)
    return replace(make_setup(recipe, V, here.device), precision=precision)


def gradient(setup: Setup, step: Contender, batches: list[Batch], seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    step.passes(batches)
    return setup.grads.flat.clone()


def name_of(precision: Precision) -> str:
    return next(name for name, p in PRECISIONS.items() if p.dtype == precision.dtype)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    "The largest difference, as a part of the largest element"
    return ((a - b).abs().max()/b.abs().max()).item()


def functional(here: Here):
    os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':4096:8'  # for `resume`; it is read at the first product
    recipe, data = here.data('tiny')
    recipe = override(recipe, ['batch.micro_batch_size=8'])
    batches, V = list(train_batches(data, recipe, 0)), data.padded_vocab_size
    quiet, exact = override(recipe, NO_DROPOUT), dict[str, torch.Tensor]()
    eager = [(name, 'eager') for name in PRECISIONS]
    compiled = [(name, 'compiled') for name in ('fp32', name_of(choose_precision(here.device)))]
    def some_batches(*_): return batches[:1]  # given, so that no program is made for other shapes
    for precision, form in eager + compiled*('compiled' in forms(here)):
        ids, some = dict(precision=precision, form=form), batches if form == 'eager' else batches[:1]
        if form == 'compiled' and not here.time_for(20, 'gradient', **ids): continue
        with here.check('gradient', **ids):
            setup = setup_of(quiet, here, PRECISIONS[precision], V)
            g = gradient(setup, our_step(setup, data, some_batches, form=form), some)
            g /= g.norm()  # in 16 bits it is scaled
            if not exact:  # the first is eager, in 32 bits; the compiled ones have one batch
                of_one = gradient(setup, our_step(setup, data, some_batches, form=form), batches[:1])
                exact = dict(eager=g, compiled=of_one/of_one.norm())
            off = difference(g, exact[form])
            here.row('gradient_difference', off, 'of the largest element', **ids)
            assert off < TOLERANCE[precision], f'differs by {off:.2g} from eager in 32 bits'
        if form == 'compiled' and not here.time_for(20, 'randomness_by_seed', **ids): continue
        with here.check('randomness_by_seed', **ids):
            setup = setup_of(recipe, here, PRECISIONS[precision], V)
            step = our_step(setup, data, some_batches, form=form)
            a, again, other = (gradient(setup, step, some, seed) for seed in (1, 1, 2))
            assert difference(other, a) > 1e-2, 'two seeds gave one gradient'
            assert difference(again, a) < difference(other, a)/10, 'one seed gave two gradients'
        if not here.small:
            with here.check('no_host_waits', **ids): never_waits(step, some)
        if (precision, form) == eager[-1]:
            torch.use_deterministic_algorithms(True, warn_only=True)
            with here.check('resume'): resume(here)
            torch.use_deterministic_algorithms(False)


def never_waits(step: Contender, batches: list[Batch]):
    "Whatever makes the CPU wait for the GPU during the passes raises RuntimeError"
    pinned = [b.map(torch.Tensor.pin_memory) for b in batches]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: step.passes(pinned)
    finally: torch.cuda.set_sync_debug_mode('default')


def resume(here: Here):
    "A run that was stopped and goes on ends with the weights of one that was not"
    weights = {}
    for name in ('straight', 'again', 'stopped'):
        out = here.out/'trials'/f'resume-{name}'
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        recipe, data = here.data('tiny')
        if name == 'stopped':
            (out/'stop').touch()  # it is read after the first step
            with suppress(Interrupted): pretrain(recipe, data.folder, out, steps=6, hook=EAGER)
            assert len(checkpoints(out/'checkpoints')) > 1, 'it did not stop'
        pretrain(recipe, data.folder, out, steps=6, hook=EAGER)
        weights[name] = torch.cat([p.flatten() for p in load_run(out)[0].state_dict().values()])
    chance = difference(weights['again'], weights['straight'])
    off = difference(weights['stopped'], weights['straight'])
    here.row('difference_of_two_runs', chance, 'of the largest weight')
    here.row('difference_of_resumed_run', off, 'of the largest weight')
    assert off <= 4*chance, f'the resumed run ends {off:.2g} off, two equal runs {chance:.2g}'


# 3: the memory of the GPUs of the paper

def sized(here: Here, shape: str, rows: int, *settings: str, steps: int = 2) -> Recipe:
    "24hBERT's recipe in a shape, with steps of so many micro-batches"
    rows, scale = (8, 'tiny') if here.small else (rows, SCALE[shape])
    size = f'batch.micro_batch_size={rows}', f'batch.global_batch_size={rows*steps}'
    return get_recipe('24hbert', scale, [*size, *(['model.num_layers=1'] if here.small else ()), *settings])


def both_masks(recipe: Recipe) -> list[Batch]:
    "A batch without padding and one with it, all as wide as they can be"
    V = padded_vocab(recipe.tokenizer.vocab_size)
    return [random_batch(recipe, V, padded) for padded in (False, True)]


@contextmanager
def capped(here: Here, size: float|None):
    "No more of the GPU than so many bytes; None = all"
    if here.small: yield
    else:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        share = 1. if size is None else min(1., size/torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.set_per_process_memory_fraction(share)
        try: yield
        finally: torch.cuda.set_per_process_memory_fraction(1.)


def take_steps(setup: Setup, recipe: Recipe, steps: int = 2):
    "Real steps; a first loss scale may be too large, and only a step that is taken makes the moments"
    step = our_step(replace(setup, recipe=recipe), None, lambda *_: both_masks(recipe), form='eager')
    for n in range(16):
        step.passes(step.batches(n))
        step.update()
        if n >= steps - 1 and setup.optimizer.state: return
    raise AssertionError('no gradient of 16 steps was finite')


def peak(here: Here) -> int|None: return None if here.small else torch.cuda.max_memory_reserved()


def memory(here: Here):
    recipe = sized(here, 'large', 32)
    for cap in (11., 10.):  # of a Titan V and a 2080 Ti, less CUDA's context
        ids, saved = dict(shape='large', micro_batch_size=32, cap_gib=cap, precision='fp16', form='eager'), {}
        with here.check('fits', phase='fresh', **ids), capped(here, cap*GIB):
            setup = setup_of(recipe, here, PRECISIONS['fp16'])
            take_steps(setup, recipe)
            here.row('peak_memory_bytes', peak(here), 'bytes', phase='fresh', **ids)
            saved = dict(model={k: v.cpu() for k, v in setup.model.state_dict().items()},
                         optimizer={k: v.cpu() for k, v in optimizer_tensors(setup.optimizer).items()})
        setup = None
        with here.check('fits', phase='resumed', **ids), capped(here, cap*GIB):
            setup = setup_of(recipe, here, PRECISIONS['fp16'])
            setup.model.load_state_dict(saved['model'])
            restore_optimizer(setup.optimizer, saved['optimizer'])
            take_steps(setup, recipe)
            here.row('peak_memory_bytes', peak(here), 'bytes', phase='resumed', **ids)
        with here.check('fits', phase='validating', **ids), capped(here, cap*GIB):
            validated(here, setup)
            here.row('peak_memory_bytes', peak(here), 'bytes', phase='validating', **ids)
            take_steps(setup, recipe)
        with here.check('largest_micro_batch', **ids): largest(here, setup, cap)
        setup = None
    with here.check('predicted_memory'): predicted(here, recipe)


def validated(here: Here, setup: Setup):
    "A validation of two batches, as large as they are there"
    recipe = override(setup.recipe, ['batch.micro_batch_size=64', 'batch.global_batch_size=64'])
    batches = [random_batch(recipe, padded_vocab(recipe.tokenizer.vocab_size)) for _ in range(2)]
    with patch.object(training, 'validation_batches', lambda *_: batches):
        validate(setup.model, None, recipe, setup.precision, World(device=here.device))


def largest(here: Here, setup: Setup, cap: float|None):
    "By halving the interval between what fits and what does not, in eights"
    fits, too_many = 0, 2 if here.small else 33  # eights
    while too_many - fits > 1 and here.left() > 5:
        n = (fits + too_many)//2
        try:
            with capped(here, cap and cap*GIB): take_steps(setup, sized(here, 'large', 8*n), 1)
            fits = n
        except torch.OutOfMemoryError: too_many = n
    here.row('largest_micro_batch', 8*fits, 'sequences', cap_gib=cap, shape='large', precision='fp16',
             form='eager', bracket=8*(too_many - fits))


def predicted(here: Here, recipe: Recipe):
    "The planner's figure beside the measured one of a fresh run"
    V = padded_vocab(recipe.tokenizer.vocab_size)
    plan = sum(peak_memory(recipe, V, recipe.batch.micro_batch_size).values())
    with capped(here, None):
        take_steps(setup_of(recipe, here, PRECISIONS['fp16']), recipe)
        found = None if here.small else torch.cuda.max_memory_allocated()  # as the planner counts
        reserved = peak(here)
    here.row('predicted_memory_bytes', plan, 'bytes', shape='large', micro_batch_size=32)
    if found is None: return
    here.row('measured_memory_bytes', found, 'bytes', shape='large', micro_batch_size=32, reserved=reserved)
    assert abs(plan/found - 1) < .05, f'predicted {plan/GIB:.2f} GiB, measured {found/GIB:.2f}'


# 4: the compiler

def compile_(here: Here):
    if here.small and not (os.environ.get('CXX') or shutil.which('g++')):
        here.row('first_pass_seconds', None, 's', why='no C++ compiler')
        return
    if not here.small and 'compiled' not in forms(here):
        here.row('first_pass_seconds', None, 's', why='it is not compiled on this GPU')
        return
    best = PRECISIONS['fp32'] if here.small else choose_precision(here.device)
    base = sized(here, 'base', 32, *NO_DROPOUT)
    ids = dict(shape='base', micro_batch_size=base.batch.micro_batch_size)
    with here.check('compiled_is_eager', **ids):
        gradients, batches = {}, both_masks(base)[1:]
        for form in ('eager', 'compiled'):
            gradients[form] = first_passes(here, base, best, form, batches, ids)
        off = difference(gradients['compiled'], gradients['eager'])
        here.row('gradient_difference', off, 'of the largest element', **ids)
        assert off < TOLERANCE[name_of(best)], f'differs by {off:.2g} from eager'
    with here.check('compiled_dropout'): compiled_dropout(here)
    for rows in sizes(here):  # what is compiled here is timed in the next step
        large = sized(here, 'large', rows, steps=1)
        ids = dict(shape='large', micro_batch_size=rows)
        if here.small or not here.time_for(60, 'compiles', **ids): continue
        with here.check('compiles', **ids):
            first_passes(here, large, best, 'compiled', both_masks(large)[1:], ids)


def compiled_dropout(here: Here, p: float = .1):
    "Both passes have one mask, and neighbours are independent, unlike in pytorch/pytorch#198333"
    h = torch.ones(32, 128, 768, device=here.device, requires_grad=True)
    y = torch.compile(lambda h: 2*dropout(h, p))(h)
    y.sum().backward()
    kept = y != 0
    groups = kept.view(-1, 4)  # as many share a random number
    alike, independent = (groups == groups[:, :1]).all(1).float().mean().item(), p**4 + (1 - p)**4
    here.row('dropout_kept', kept.float().mean().item(), 'of the values', p=p)
    ids = dict(independent=independent)
    here.row('dropout_groups_alike', alike, 'of the groups of four', **ids)
    # what the fault was reported for; no dropout of ours is on such a view, so that nothing is asked of it
    turned = torch.compile(lambda h: dropout(h.transpose(1, 2).contiguous(), p))(h) != 0
    groups = turned.view(-1, 4)
    here.row('dropout_groups_alike', (groups == groups[:, :1]).all(1).float().mean().item(),
             'of the groups of four', **ids, layout='transposed')
    assert torch.equal(kept, h.grad != 0), 'forward and backward pass have different masks'
    assert abs(kept.float().mean().item() - 1 + p) < .002, 'another share is kept'
    assert abs(alike - independent) < .005, 'neighbours are dropped together'


def first_passes(here: Here, recipe: Recipe, precision: Precision, form: str, batches: list[Batch],
                 ids: dict) -> torch.Tensor:
    "Seconds of the first passes, graphs and breaks between them; the gradient of all of them"
    counters = torch._dynamo.utils.counters
    counters.clear()
    setup = setup_of(recipe, here, precision)
    step = our_step(setup, None, lambda *_: batches, form=form)
    for batch in batches:
        began = time.monotonic()
        step.passes([batch])
        if not here.small: torch.cuda.synchronize()
        padded = batch.attention_mask is not None
        here.row('first_pass_seconds', time.monotonic() - began, 's', form=form, padded=padded, **ids)
    found = gradient(setup, step, batches)
    if form == 'eager': return found
    breaks, graphs = counters['graph_break'], counters['stats']['unique_graphs']
    here.row('graph_breaks', sum(breaks.values()), 'breaks', **ids)
    here.row('graphs', graphs, 'graphs', **ids)
    assert not breaks, f'graph breaks: {[*breaks][:1]}'
    assert graphs, 'nothing was compiled'
    return found


def sizes(here: Here) -> tuple[int, ...]:
    "Sequences a micro-batch; of BERT-large 256 take 38 GB by the planner"
    return (256, 32) if here.small or torch.cuda.mem_get_info()[1] > 60*GIB else (32,)


# 5: speed

def milliseconds(here: Here, work, times: int = 8) -> float:
    "The median time of a piece of work, by the GPU's own clock"
    took = []
    for _ in range(2): work()
    for _ in range(times):
        if here.small:
            began = time.perf_counter()
            work()
            took.append(1e3*(time.perf_counter() - began))
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end))
    return median(took)


def contender(here: Here, recipe: Recipe, way: str) -> Contender:
    "Our step or that of stock transformers, eager or compiled"
    whose, form = way.split()
    V, best = padded_vocab(recipe.tokenizer.vocab_size), choose_precision(here.device)
    batches = both_masks(recipe)[1:]
    if whose == 'ours': return our_step(setup_of(recipe, here, best), None, lambda *_: batches, form=form)
    from transformers import AutoModelForMaskedLM
    special = dict(pad=0, unk=1, cls=2, sep=3, mask=4)
    config = stock_config(recipe.model, V, special)
    with here.device: model = AutoModelForMaskedLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0., fused=True)
    if form == 'compiled': model = torch.compile(model, dynamic=False)
    return replace(stock_step(model, optimizer, None, recipe, best), batches=lambda *_: batches)


def speed(here: Here):
    best = choose_precision(here.device)
    top = ceiling(here.device, best, 512 if here.small else 0)
    sheet = gpu_called(torch.cuda.get_device_name()) if not here.small else None
    shapes = list(product(sizes(here), ('large', 'base')))[:1 if here.small else None]
    form = forms(here)[-1]
    # first what matters most, then what takes no time to compile
    jobs = [*((*shapes[0], f'{who} {form}') for who in ('ours', 'stock')),
            *((*s, 'ours eager') for s in shapes),
            *((*s, f'{who} {form}') for s in shapes[1:] for who in ('ours', 'stock'))]
    found: dict[tuple[int, str, str], float] = {}
    for rows, shape, way in dict.fromkeys(jobs):
        recipe = sized(here, shape, rows, steps=1)
        ids = dict(shape=shape, micro_batch_size=recipe.batch.micro_batch_size, variant=way,
                   precision=str(best.dtype)[6:])
        if not here.time_for(40 if 'compiled' in way else 10, 'timed', **ids): continue
        with here.check('timed', **ids):
            try: found[rows, shape, way] = timed(here, recipe, way, top, sheet, ids, profile=not found)
            except torch.OutOfMemoryError:
                here.row('ms_per_micro_batch', None, 'ms', **ids, why='does not fit')
        ours, stock = (found.get((rows, shape, f'{who} {form}')) for who in ('ours', 'stock'))
        if way.startswith('stock') and ours and stock:
            here.row('times_as_fast_as_stock', stock/ours, 'times', **ids)


def timed(here: Here, recipe: Recipe, way: str, top: float, sheet: GPU|None, ids: dict,
          profile: bool) -> float:
    "Milliseconds of a micro-batch, and what follows from them"
    it = contender(here, recipe, way)
    batches = it.batches(0)
    take_a_step(it, lambda: batches)
    ms = milliseconds(here, lambda: it.passes(batches))
    here.row('ms_per_micro_batch', ms, 'ms', **ids)
    here.row('ms_per_update', milliseconds(here, it.update, 4), 'ms', **ids)
    tokens = recipe.batch.micro_batch_size*recipe.packing.seq_len
    flops = tokens*training_flops(recipe, padded_vocab(recipe.tokenizer.vocab_size))/ms*1e3  # a second
    here.row('tokens_per_second', tokens/ms*1e3, 'tokens/s', **ids, counts='passes alone')
    here.row('mfu', flops/top, 'of the measured ceiling', **ids)
    why = '' if sheet else 'no datasheet is known'
    here.row('mfu', flops/sheet.tflops/1e12 if sheet else None, 'of the datasheet peak', **ids, why=why)
    if profile:
        with here.check('profiled', **ids):
            for part, x in profiled(it, here.device)[0].items():
                here.row('share_of_step', x, 'of the time', **ids, part=part)
    return ms


# 6: several processes

def launch(here: Here, processes: int, work: str, *options: str, restarts: int = 0):
    "This program again, in several ranks"
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}',
                f'--max-restarts={restarts}']
    command = [sys.executable, *torchrun, __file__, here.step, '--rank', work, '--out', here.out, '--data',
               here.folder, '--until', str(here.until), *options]
    env = dict(OMP_NUM_THREADS='2', TORCH_ELASTIC_SHUTDOWN_TIMEOUT='3') | os.environ
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try: code = process.wait(max(1., here.left() - 8))
    except subprocess.TimeoutExpired: code = 'out of time'
    if code == 'out of time':
        process.send_signal(signal.SIGTERM)  # torchrun takes its processes with it
        with suppress(subprocess.TimeoutExpired): process.wait(5)
        kill_all(process.pid)  # one before 2.12 waits longer for them, whatever is said
    assert code == 0, f'{work} in {processes} processes ended with {code}'


def ranks(here: Here):
    if not here.small:
        with here.check('nccl_of_one_rank'):
            alone = dict(store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device('cuda', 0))
            dist.init_process_group('nccl', **alone)
            x = torch.ones(1024, device=here.device)
            dist.all_reduce(x)
            assert x.sum() == 1024
            dist.destroy_process_group()
    for name in ('tiny', 'tiny-modern'):  # AdamW and Muon
        with here.check('weights_equal', recipe=name, ranks=2):
            out = here.out/'trials'/f'ranks-{name}'
            shutil.rmtree(out, ignore_errors=True)
            launch(here, 2, 'train', '--into', str(out), '--recipe', name, '--steps', '8')
            same_weights(out, 2)


def same_weights(out: Path, size: int) -> str:
    found = {json.loads(p.read_text())['weights'] for p in out.glob('rank-*.json')}
    assert len([*out.glob('rank-*.json')]) == size, 'a rank did not come to its end'
    assert len(found) == 1, f'{size} ranks end with {len(found)} different weights'
    return found.pop()


def rank_train(here: Here, args):
    "A run in this rank, and a checksum of the weights with which it ends"
    recipe, data = here.data(args.recipe)
    rank, train = int(os.environ['RANK']), training.train
    whole = f"batch.global_batch_size={8*int(os.environ['WORLD_SIZE'])}"  # whatever the number of GPUs
    size = ['batch.micro_batch_size=4', whole, 'checkpoint.every=0.1']
    if here.step == 'gpus' and not here.small: size += LARGER
    def keep(*given, **more):
        loss = train(*given, **more)
        model = next(x for x in given if isinstance(x, MaskedLM))
        end = dict(weights=fingerprint({k: v.detach().cpu() for k, v in model.state_dict().items()}),
                   attempt=os.environ.get('TORCHELASTIC_RESTART_COUNT'))
        (args.into/f'rank-{rank}.json').write_text(json.dumps(end))
        return loss
    if args.kill and rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
        when_saved(args.into, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with patch.object(training, 'train', keep), suppress(Interrupted):
        pretrain(override(recipe, size), data.folder, args.into, steps=args.steps,
                 hook=None if args.compiled else EAGER)


def when_saved(run: Path, act):
    "Do something, in the background, when a run has saved a step"
    def wait():
        while not any(p.name > 'step-00000000' for p in run.glob('checkpoints/step-*')): time.sleep(.002)
        act()
    threading.Thread(target=wait, daemon=True).start()


# 7: training

def train(here: Here):
    budget = 10. if here.fast or here.small else 40.  # of 60 seconds; there is more to do than train
    roomy = not here.small and torch.cuda.mem_get_info()[1] > 20*GIB
    n = 128 if roomy else 64  # small steps: some hundred of them are needed to learn more than frequencies
    size = f'batch.micro_batch_size={n}', f'batch.global_batch_size={n}', 'optim.lr=5e-4'
    small = {'24hbert': 'tiny', 'modern': 'tiny-modern'}
    for name in small:
        with here.check('trains', recipe=name):
            recipe, data = here.data(small[name] if here.small else name)
            often = 'validation.every=0.5', 'validation.max_sequences=512', 'checkpoint.every=0.3'
            recipe = override(recipe, [*(() if here.small else size), *often])
            out = here.out/'trials'/f'train-{name}'
            shutil.rmtree(out, ignore_errors=True)
            when_saved(out, (out/'stop').touch)
            stopped = False
            # a packed stream has one program, packed documents have three, and each takes half a minute
            hook = EAGER if here.fast or recipe.packing.mode != 'stream' else None
            ids = dict(recipe=name, form='eager' if hook else form_of(here.device))
            try: rows = pretrain(recipe, data.folder, out, budget, scale='gpu', hook=hook)
            except Interrupted:
                stopped = True
                rows = pretrain(recipe, data.folder, out, budget, scale='gpu', hook=hook)
            values = {r['metric']: r['value'] for r in rows}
            for r in rows: here.row(r['metric'], r['value'], r['unit'], **ids, precision=r['precision'])
            assert stopped, 'it was not stopped'
            learned = values['validation_loss'] < values['unigram_entropy']
            assert learned, 'no better than the unigram baseline'


# beyond: several GPUs

def gpus(here: Here):
    size = torch.cuda.device_count() or 2
    def run(name: str, *options: str, restarts: int = 0) -> Path:
        out = here.out/'trials'/f'gpus-{name}'
        if name != 'goes-on': shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        if name == 'stopped': (out/'stop').touch()  # it is read after the first step
        what = '--into', str(out), '--recipe', 'tiny', '--steps', '50'
        launch(here, size, 'train', *what, *options, restarts=restarts)
        return out
    ids = dict(ranks=size)
    with here.check('bandwidth', **ids): launch(here, size, 'bandwidth')
    weights = ''
    with here.check('weights_equal', **ids): weights = same_weights(run('straight'), size)
    if here.time_for(60, 'stopped_and_resumed', **ids):
        with here.check('stopped_and_resumed', **ids):
            shutil.rmtree(here.out/'trials'/'gpus-goes-on', ignore_errors=True)
            run('stopped').rename(here.out/'trials'/'gpus-goes-on')
            same = same_weights(run('goes-on'), size) == weights
            here.row('same_as_without', float(same), '', after='a stop', **ids)
    if here.time_for(80, 'killed_rank', **ids):  # torchrun gives those of a lost rank 30 s to end
        with here.check('killed_rank', **ids):
            out = run('killed', '--kill', restarts=3)
            end = json.loads((out/'rank-1.json').read_text())
            assert end['attempt'] != '0', 'it ended before it was killed'
            same = same_weights(out, size) == weights
            here.row('same_as_without', float(same), '', after='a killed rank', **ids)
    if 'compiled' in forms(here) and here.time_for(100, 'compiled_weights_equal', **ids):
        with here.check('compiled_weights_equal', **ids):  # a packed stream has one program
            same_weights(run('compiled', '--compiled', '--recipe', 'tiny-modern'), size)


def rank_bandwidth(here: Here, args):
    "Bytes a second that a ring would move on each link to add up the gradients of BERT-large"
    with join_world() as world:
        for dtype in (torch.float32, torch.float16):
            x = torch.zeros(MESSAGE//1000 if here.small else MESSAGE, dtype=dtype, device=world.device)
            ms = milliseconds(here, lambda x=x: dist.all_reduce(x), 5)
            rate = 2*(world.size - 1)/world.size*x.nbytes/ms/1e6
            if world.main: here.row('all_reduce_rate', rate, 'GB/s', ranks=world.size, dtype=str(dtype)[6:],
                                    message_bytes=x.nbytes, backend=dist.get_backend(), ms=ms)


def count(here: Here): print(torch.cuda.device_count())


STEPS = dict(count=count, machine=machine, functional=functional, memory=memory, compile=compile_,
             speed=speed, ranks=ranks, training=train, gpus=gpus)
RANKS = dict(train=rank_train, bandwidth=rank_bandwidth)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('step', choices=STEPS)
    for name in ('out', 'data', 'into'): parser.add_argument(f'--{name}', type=Path)
    parser.add_argument('--until', type=float)
    parser.add_argument('--fast', action='store_true')
    parser.add_argument('--rank', choices=RANKS)  # of torchrun's
    parser.add_argument('--recipe')
    parser.add_argument('--steps', type=int)
    parser.add_argument('--compiled', action='store_true')
    parser.add_argument('--kill', action='store_true')  # one rank, once
    args = parser.parse_args()
    here = Here(args.step, args.out, args.data, args.until, args.fast, pick_device())
    if args.rank: RANKS[args.rank](here, args)
    else: STEPS[args.step](here)


if __name__ == '__main__': main()
