"Muon beside AdamW, and both on shares: who updates what, what travels, loss scales, and runs that go on"
import math
import socket
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import cramlit.training.optimizers as optimizers
from cramlit.core.devices import Precision
from cramlit.core.recipes import CramlitError
from cramlit.core.scales import get_recipe
from cramlit.model.encoder import MaskedLM
from cramlit.training.checkpoints import load_checkpoint, tensors_of, write_checkpoint
from cramlit.training.distributed import Gradients, World, keep_share, share_out, step_together, whole_state
from cramlit.training.optimizers import hidden_matrices, make_optimizer, newton_schulz, set_lr
from cramlit.training.training import update

ALONE = World()


def test_a_closure_is_called_and_its_loss_given_back():
    cfg = get_recipe('modern', 'tiny')
    model = MaskedLM(cfg.model, 64)
    optimizer = make_optimizer(model, cfg.optim)
    def closure():
        loss = sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss
    before = model.embeddings.word.weight.detach().clone()
    assert optimizer.step(closure).item() > 0 and not torch.equal(before, model.embeddings.word.weight)
    assert optimizer.step() is None


def setup(name='modern', world=ALONE, message=torch.float32, seed=0):
    recipe = get_recipe(name, 'tiny')
    torch.manual_seed(seed)
    model = MaskedLM(recipe.model, 64)
    return model, make_optimizer(model, recipe.optim), Gradients(model, world, message)


def take_steps(numbers, name='modern', world=ALONE, message=torch.float32, folder=None):
    "Steps whose gradients have the same sum in any number of processes"
    model, optimizer, grads = setup(name, world, message, seed=0 if folder is None else 1)
    if folder: load_checkpoint(folder, model, optimizer)
    keep_share(grads, optimizer)
    for n in numbers:
        torch.manual_seed(100 + n)
        grads.flat.copy_(torch.randn_like(grads.flat))
        here = torch.arange(len(grads.flat)) % world.size == world.rank
        grads.flat *= here  # each value is one process's alone, so that no sum is rounded
        grads.totals.fill_(1/world.size)
        grads.all_reduce(0., False)
        set_lr(optimizer, 1 - n/6)
        step_together(grads, optimizer.step)
    return model, optimizer, grads


def test_a_step_without_a_token_to_predict_is_a_sentence():
    with pytest.raises(CramlitError, match='no token to predict'): setup()[2].all_reduce(0., False)


def weights_of(model):
    return {k: w.clone() for k, w in model.state_dict().items()}


def overflow(world, where):
    "Weights that moved, and the loss scale, after the gradient of one value is inf in one process"
    model, optimizer, grads = setup(world=world, message=torch.float16)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    scaler.scale(torch.zeros(()))  # makes the scale
    grads.flat.fill_(1024/world.size)
    grads.totals.fill_(1/world.size)
    if world.rank == where: grads.flat[where*(len(grads.flat) - 1)] = float('inf')
    grads.all_reduce(0., False)
    before = weights_of(model)
    norm = update(grads, optimizer, scaler, 0.)
    return norm, sum(not torch.equal(before[k], w) for k, w in model.state_dict().items()), scaler.get_scale()


def worker(rank, size, port, out):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=size)
    world, sent = World(rank, size), Counter()

    def counted(real):
        def send(x, *args, **kwargs):
            sent[x.dtype] += x.numel()*x.element_size()
            return real(x, *args, **kwargs)
        return send
    for name in ('reduce', 'broadcast', 'all_reduce'): setattr(dist, name, counted(getattr(dist, name)))

    found = {}
    for name in ('modern', '24hbert'):
        model, optimizer, grads = take_steps(range(3), name, world)
        state = optimizer.state_dict()['state']
        found[name] = weights_of(model), sum(v.numel() for s in state.values() for v in s.values())
        with whole_state(grads, optimizer):
            if rank == 0: write_checkpoint(out/name, tensors_of(model, optimizer), {'step': 3})
        assert {*optimizer.state_dict()['state']} == {*state}
        dist.barrier()
        found[f'{name} again'] = weights_of(take_steps(range(3, 6), name, world, folder=out/name)[0])
        of_one = out/f'{name} of one'
        found[f'{name} from one'] = weights_of(take_steps(range(3, 6), name, world, folder=of_one)[0])
    for message in (torch.float32, torch.bfloat16, torch.float16):
        sent.clear()
        found[message] = weights_of(take_steps(range(1), '24hbert', world, message)[0]), dict(sent)
    found['overflow'] = [overflow(world, where) for where in (0, 1, size)]
    torch.save(found, f'{out}/{rank}.pt')
    dist.destroy_process_group()


def equal(a, b):
    for k, w in b.items(): assert torch.equal(a[k], w), k


@pytest.fixture(scope='module', params=[2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def together(request, tmp_path_factory):
    "What each of several processes found, and their folder"
    out = tmp_path_factory.mktemp('together')
    for name in ('modern', '24hbert'):
        write_checkpoint(out/f'{name} of one', tensors_of(*take_steps(range(3), name)[:2]), {'step': 3})
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (request.param, port, out), nprocs=request.param)
    return [torch.load(out/f'{rank}.pt', weights_only=True) for rank in range(request.param)], out


@pytest.mark.parametrize('name', ['modern', '24hbert'])
def test_processes_share_the_work_and_end_with_the_weights_of_one(together, name):
    model, optimizer, _ = take_steps(range(3), name)
    state = optimizer.state_dict()['state']
    whole = sum(v.numel() for s in state.values() for v in s.values())
    for found in together[0]: equal(found[name][0], weights_of(model))
    kept = [found[name][1] for found in together[0]]
    assert sum(kept) == whole and max(kept) < whole
    if len(kept) == 2: assert max(kept) < .52*whole


@pytest.mark.parametrize('name', ['modern', '24hbert'])
def test_a_run_goes_on_in_another_number_of_processes_bit_by_bit(together, name):
    found, out = together
    whole = weights_of(take_steps(range(6), name)[0])
    equal(weights_of(take_steps(range(3, 6), name, folder=out/name)[0]), whole)
    for f in found:
        equal(f[f'{name} again'], whole)
        equal(f[f'{name} from one'], whole)


def test_bytes_of_a_step(together):
    "Gradients once, weights once, five totals; half of it in 16 bits"
    n = sum(p.numel() for p in setup('24hbert')[0].parameters())
    for found in together[0]:
        assert found[torch.float32][1] == {torch.float32: 2*4*n, torch.float64: 40}
        assert found[torch.bfloat16][1] == {torch.bfloat16: 2*2*n, torch.float64: 40}
        assert found[torch.float16][1] == {torch.float16: 2*n, torch.bfloat16: 2*n, torch.float64: 40}


@pytest.mark.parametrize('message', [torch.bfloat16, torch.float16])
def test_16_bits_give_all_processes_the_same_weights_near_those_of_32(together, message):
    start = weights_of(setup('24hbert')[0])
    for found in together[0]:
        (half, _), (full, _), (first, _) = found[message], found[torch.float32], together[0][0][message]
        equal(half, first)
        moved = max((w - start[k]).abs().max() for k, w in full.items())
        assert 0 < max((w - half[k]).abs().max() for k, w in full.items()) < .01*moved


def test_one_process_overflows_and_all_skip_and_all_halve(together):
    for found in together[0]:
        *bad, good = found['overflow']
        for norm, moved, scale in bad: assert not math.isfinite(norm) and not moved and scale == 512.
        assert good[0] > 0 and good[1] > 0 and good[2] == 1024.


@pytest.mark.parametrize('form', ['eager', 'aot_eager'])
def test_buckets_leave_during_the_last_backward_pass_and_not_before(monkeypatch, form):
    "In one order, each when the gradients in it are final; the embedding matrix is the last one"
    left = []

    def reduce(x, owner, async_op):
        left.append((owner, x.clone()))
        return SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(dist, 'reduce', reduce)
    monkeypatch.setattr(dist, 'all_reduce', lambda x: None)
    model, _, grads = setup('24hbert', World(0, 2), torch.bfloat16)
    if form != 'eager': model = torch.compile(model, backend=form, dynamic=False)
    ids, positions = torch.randint(0, 64, (2, 16)), torch.arange(4).expand(2, 4)

    def backward():
        loss = model(ids, None, positions, ids[:, :4])
        assert len(left) == 0, 'it is sent before there is a gradient'
        loss.backward()
    backward()
    assert left == []
    with grads.last_backward(): backward()
    assert [owner for owner, _ in left] == [b.owner for b in grads.buckets]
    assert left[-1][1].numel() == grads.buckets[-1].numel > 64*32
    for (_, x), g in zip(left, grads.slices, strict=True): assert torch.equal(x, g.bfloat16())
    grads.totals.fill_(1.)
    grads.all_reduce(0., False)
    assert len(left) == len(grads.buckets)
    for b, g in zip(grads.buckets, grads.slices, strict=True): assert bool(g.any()) == (b.owner == 0)


def test_a_run_goes_on_bit_by_bit(tmp_path):
    whole, *_ = take_steps(range(6))
    write_checkpoint(tmp_path, tensors_of(*take_steps(range(3))[:2]), {'step': 3})
    equal(weights_of(take_steps(range(3, 6), folder=tmp_path)[0]), weights_of(whole))


@pytest.mark.parametrize('size', [1, 2, 8, 100])
def test_shares_are_even_and_whole(size):
    with torch.device('meta'): model = MaskedLM(get_recipe('24hbert', 'paper').model, 30528)
    buckets = share_out(model.parameters(), size)
    assert [id(p) for b in buckets for p in b.params] == [id(p) for p in model.parameters()]
    assert all(b.params[0].ndim == 2 and all(p.ndim == 1 for p in b.params[1:]) for b in buckets)
    shares = [sum(b.numel for b in buckets if b.owner == rank) for rank in range(size)]
    if size <= 8: assert max(shares) < 1.02*sum(shares)/size


def test_newton_schulz_in_float16_takes_gradients_of_any_size(monkeypatch):
    torch.manual_seed(0)
    g, found = torch.randn(2, 24, 16), {}
    for dtype in (torch.float32, torch.float16):
        monkeypatch.setattr(optimizers, 'choose_precision', lambda device, dtype=dtype: Precision(dtype, ''))
        found[dtype] = [newton_schulz(scale*g) for scale in (1e-12, 1., 1e9)]
    wanted = found[torch.float32][1]
    for x in sum(found.values(), []): torch.testing.assert_close(x, wanted, atol=5e-3, rtol=0)


@pytest.mark.parametrize('bad', [False, True])
def test_a_loss_scale_is_taken_out_before_the_step(bad):
    model, optimizer, grads = setup()
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    before = weights_of(model)
    scaler.scale(torch.zeros(()))  # makes the scale
    torch.manual_seed(100)
    grads.flat.copy_(torch.randn_like(grads.flat)*1024)
    if bad: grads.flat[-1] = float('inf')
    update(grads, optimizer, scaler, 0.)
    equal(weights_of(model), before if bad else weights_of(take_steps(range(1))[0]))
    assert scaler.get_scale() == (512. if bad else 1024.)


def test_every_group_has_a_peak_and_every_weight_one_group():
    for name in ('24hbert', 'modern'):
        recipe = get_recipe(name, 'tiny')
        model = MaskedLM(recipe.model, 64)
        groups = make_optimizer(model, recipe.optim).param_groups
        assert all(g['peak'] == g['lr'] for g in groups)
        assert sorted(id(p) for g in groups for p in g['params']) == sorted(id(p) for p in model.parameters())
        if name == '24hbert': continue
        assert [id(p) for p in groups[0]['params']] == [id(p) for p, _ in hidden_matrices(model)]
        assert groups[0]['peak'] == recipe.optim.muon_lr
