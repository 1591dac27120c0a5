"Muon beside AdamW: shared work, loss scales, and runs that go on"
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cramlit.core.scales import get_recipe
from cramlit.model.encoder import MaskedLM
from cramlit.training.checkpoints import load_checkpoint, tensors_of, write_checkpoint
from cramlit.training.distributed import Gradients
from cramlit.training.optimizers import hidden_matrices, make_optimizer, set_lr
from cramlit.training.training import update


def take_steps(numbers, rank=0, size=1, folder=None):
    "Steps with gradients that are the same in every process; the weights, and Muon's momentum"
    recipe = get_recipe('modern', 'tiny')
    torch.manual_seed(0 if folder is None else 1)
    model = MaskedLM(recipe.model, 64)
    optimizer, grads = make_optimizer(model, recipe.optim, rank, size), Gradients(model)
    if folder: load_checkpoint(folder, model, optimizer)
    for n in numbers:
        torch.manual_seed(100 + n)
        grads.flat.copy_(torch.randn_like(grads.flat))
        set_lr(optimizer, 1 - n/6)
        optimizer.step()
    return model, optimizer


def worker(rank, size, port, out):
    dist.init_process_group('gloo', init_method=f'tcp://127.0.0.1:{port}', rank=rank, world_size=size)
    model, optimizer = take_steps(range(3), rank, size)
    torch.save([model.state_dict(), optimizer.state_dict()['state']], f'{out}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_end_with_the_same_weights_and_momentum(tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (2, port, str(tmp_path)), nprocs=2)
    model, optimizer = take_steps(range(3))
    for rank in range(2):
        weights, state = torch.load(tmp_path/f'{rank}.pt', weights_only=True)
        for name, w in model.state_dict().items(): assert torch.equal(weights[name], w), name
        for i, s in optimizer.state_dict()['state'].items():
            for k, v in s.items(): assert torch.equal(state[i][k], v)


def test_a_run_goes_on_bit_by_bit(tmp_path):
    whole, _ = take_steps(range(6))
    write_checkpoint(tmp_path, tensors_of(*take_steps(range(3))), {'step': 3})
    again, _ = take_steps(range(3, 6), folder=tmp_path)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True): assert torch.equal(a, b)


@pytest.mark.parametrize('bad', [False, True])
def test_a_loss_scale_is_taken_out_before_the_step(bad):
    recipe = get_recipe('modern', 'tiny')
    torch.manual_seed(0)
    model = MaskedLM(recipe.model, 64)
    optimizer, grads = make_optimizer(model, recipe.optim), Gradients(model)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(torch.zeros(()))  # makes the scale
    torch.manual_seed(100)
    grads.flat.copy_(torch.randn_like(grads.flat)*1024)
    if bad: grads.flat[-1] = float('inf')
    update(grads, optimizer, scaler, 0.)
    unscaled, _ = take_steps(range(1))
    for p, old, new in zip(model.parameters(), before, unscaled.parameters(), strict=True):
        assert torch.equal(p, old if bad else new)
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
