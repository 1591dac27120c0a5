"What only a GPU can show: compiled is eager, the CPU never waits, the model fits, ranks share a GPU"
import gc
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from cramlit.core.devices import Precision, pick_device
from cramlit.core.recipes import override
from cramlit.core.scales import get_recipe
from cramlit.data.batches import Batch, train_batches
from cramlit.data.masking import IGNORE, count_predictions
from cramlit.data.packing import open_data
from cramlit.data.tokenizer import padded_vocab
from cramlit.model.encoder import MaskedLM
from cramlit.training.distributed import Gradients
from cramlit.training.optimizers import make_optimizer
from cramlit.training.training import accumulate, form_of, micro_step, update, warm_up

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
FP32 = Precision(torch.float32, 'compared in full precision')
HALF = Precision(torch.float16, 'as on the GPUs of the paper')
NO_DROPOUT = ['model.dropout=0', 'model.attention_dropout=0']
LEFT = 11.5*2**30  # bytes of a GPU of 12 GiB that are left when CUDA itself has taken its part


def compiles():
    return torch.cuda.is_available() and form_of(pick_device()) == 'compiled'


needs_compiler = pytest.mark.skipif(not compiles(), reason='needs compute capability 8')
FORMS = ['eager', pytest.param('compiled', marks=needs_compiler)]


@pytest.fixture
def small(recipe):
    return override(recipe, ['batch.micro_batch_size=8'])


class Step:
    "A small model with its micro-step in one form, and the batches of a step in pinned memory"
    def __init__(self, recipe, folder, form, precision=FP32):
        self.data, device = open_data(folder), pick_device()
        torch.manual_seed(0)
        self.model = MaskedLM(recipe.model, self.data.padded_vocab_size).to(device)
        self.grads = Gradients(self.model)
        self.batches = [b.map(torch.Tensor.pin_memory) for b in train_batches(self.data, recipe, 0)]
        scaler = torch.amp.GradScaler('cuda', enabled=precision.scaled)
        self.micro = micro_step(self.model, recipe, precision, scaler, self.grads, form)

    def gradient(self, seed=0):
        "Of a step, from the start of a stream of random numbers"
        torch.manual_seed(seed)
        accumulate(self.micro, self.batches, self.grads)
        return self.grads.flat.clone()


def near(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance*b.abs().max().item())


@pytest.mark.parametrize('form', FORMS)
def test_the_seed_says_what_is_dropped(form, small, data):
    step = Step(small, data, form)
    a, again, other = step.gradient(1), step.gradient(1), step.gradient(2)
    near(again, a, 1e-4)
    assert (other - a).abs().max() > 1e-2*a.abs().max()
    torch.manual_seed(1)  # and without a new seed the next step goes on in the stream
    gradients = []
    for _ in range(2):
        accumulate(step.micro, step.batches, step.grads)
        gradients.append(step.grads.flat.clone())
    near(gradients[0], a, 1e-4)
    assert (gradients[1] - gradients[0]).abs().max() > 1e-2*a.abs().max()


@contextmanager
def alarm():
    "Whatever makes the CPU wait raises RuntimeError"
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try: yield
    finally: torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('name', ['24hbert', 'modern'])
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('precision', [FP32, HALF], ids=['fp32', 'fp16'])
def test_the_cpu_never_waits_in_a_step(name, form, precision, data):
    step = Step(get_recipe(name, 'tiny', ['batch.micro_batch_size=8']), data, form, precision)
    step.gradient()  # libraries are loaded and programs made at the first use
    with alarm(): accumulate(step.micro, step.batches, step.grads)
    with alarm(), pytest.raises(RuntimeError): step.grads.totals[0].item()


@needs_compiler
def test_compiled_is_eager_within_rounding(small, data):
    r = override(small, NO_DROPOUT)
    eager, compiled = Step(r, data, 'eager'), Step(r, data, 'compiled')
    assert len({(b.input_ids.shape, b.attention_mask is None) for b in eager.batches}) > 1
    near(compiled.gradient(), eager.gradient(), 1e-3)
    near(compiled.grads.totals, eager.grads.totals, 1e-4)


@needs_compiler
def test_after_the_warm_up_nothing_is_compiled(small, data):
    step = Step(small, data, 'compiled')
    warm_up(step.micro, small, step.grads)
    assert not step.grads.buffer.any()
    torch._dynamo.utils.counters.clear()
    for n in range(5): accumulate(step.micro, train_batches(step.data, small, n), step.grads)
    assert not torch._dynamo.utils.counters['stats']


@contextmanager
def a_gpu_of(size):
    "No more of the GPU than so many bytes"
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1., size/total))
    try: yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.)
        gc.collect()
        torch.cuda.empty_cache()


def full_size_step(micro_batch_size):
    "Steps of 24hBERT as published on random tokens, two micro-batches each; bytes that were reserved at most"
    B = micro_batch_size
    size = f'batch.micro_batch_size={B}', f'batch.global_batch_size={2*B}'
    r = get_recipe('24hbert', 'paper', [*size, 'optim.lr=1e-6'])
    S, K = r.packing.seq_len, int(count_predictions(r.packing.seq_len, r.masking))
    device, vocab_size = pick_device(), padded_vocab(r.tokenizer.vocab_size)
    torch.cuda.reset_peak_memory_stats()
    model = MaskedLM(r.model, vocab_size).to(device)
    grads, optimizer = Gradients(model), make_optimizer(model, r.optim)
    scaler = torch.amp.GradScaler('cuda', init_scale=2.**10)
    micro = micro_step(model, r, HALF, scaler, grads, 'eager')  # as a GPU without a compiler takes it
    batches = []
    for mask in (None, torch.ones(B, S, dtype=torch.bool)):  # the largest: without a mask, and with one
        ids = torch.randint(vocab_size, (B, S))
        positions, labels = torch.arange(K).expand(B, K).contiguous(), ids[:, :K].contiguous()
        batches.append(Batch(ids, mask, positions, labels))
    assert all((b.labels != IGNORE).all() for b in batches)
    for _ in range(2):  # the moments are made in the first
        accumulate(micro, [b.map(torch.Tensor.pin_memory) for b in batches], grads)
        loss, *_ = grads.all_reduce(0., False)
        norm = update(grads, optimizer, scaler, r.optim.clip)
    assert 0 < norm < float('inf') and 8 < loss < 14
    return torch.cuda.max_memory_reserved()


def test_the_published_micro_batch_fits_into_12_gb(capsys):
    with a_gpu_of(LEFT): peak = full_size_step(32)
    assert peak <= LEFT
    largest = 0
    for size in count(16, 16):
        with a_gpu_of(LEFT):
            try: full_size_step(size)
            except torch.OutOfMemoryError: break
            largest = size
        if size == 1024: break  # enough; the GPU is not the limit
    with capsys.disabled():
        print(f'\n24hbert: 32 sequences take {peak/2**30:.1f} GiB; '
              f'{largest} is the largest micro-batch in 12 GB')
    assert largest >= 32


def test_eight_ranks_share_one_gpu(text, data, tmp_path):
    "By gloo, since NCCL refuses; and the loss is that of one rank"
    overrides = [f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128',
                 'validation.max_sequences=37', 'batch.micro_batch_size=4', *NO_DROPOUT]
    settings = [x for o in overrides for x in ('-o', o)]
    env = os.environ | dict(CUDA_VISIBLE_DEVICES='0', OMP_NUM_THREADS='1')
    losses = []
    for nproc in (8, 1):
        folders = ['--data', str(data), '--out', str(tmp_path/f'of-{nproc}')]
        options = ['--scale', 'tiny', *folders, '--steps', '20', '--nproc', str(nproc), '--json', *settings]
        command = [sys.executable, '-m', 'cramlit', 'pretrain', *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f'{nproc} × cuda' in done.stderr
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert {r['processes'] for r in rows} == {nproc}
        losses.append(next(r['value'] for r in rows if r['metric'] == 'validation_loss'))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # products are in 16 bits
