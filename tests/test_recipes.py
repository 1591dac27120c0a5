"Recipes: whatever stands in a field is refused by its name, or can be trained"
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cramlit.core.devices import choose_precision
from cramlit.core.recipes import Recipe, UsageError, flat_fields, override, settings_of, validate
from cramlit.core.scales import get_recipe
from cramlit.data.batches import train_batches
from cramlit.model.encoder import MaskedLM
from cramlit.training.distributed import Gradients
from cramlit.training.optimizers import make_optimizer
from cramlit.training.schedule import lr_factor
from cramlit.training.training import accumulate, fingerprint, micro_step, passes_multiple, update

TINY = get_recipe('24hbert', 'tiny')
NUMERIC = [path for path, (_, limits) in flat_fields(TINY).items() if limits['kind'] in (int, float, tuple)]
ODD = [math.nan, math.inf, -math.inf, 0, 0., -0., -1, -1., 1, .5, 5e-324, 1e-300, 1e300, -1e300, 2**31, 2**64,
       10**30, 10**400, True, None, '1', 'nan', b'1', (), (math.nan,), [.5], {}, 1j, np.int64(1),
       np.float32(.5)]
SIZES = {'model.num_layers': [1, 2, 3], 'model.hidden_size': [1, 2, 8, 12, 24], 'model.num_heads': [1, 2, 4],
         'model.intermediate_size': [1, 5, 32], 'model.max_positions': [8, 32, 64],
         'packing.seq_len': [8, 9, 32], 'batch.global_batch_size': [1, 4, 6],
         'batch.micro_batch_size': [1, 2, 3]}  # of what is built
TRAINED = 'masking', 'model', 'optim', 'schedule', 'seed', 'validation.every', 'checkpoint.every'
COMMON = [0, 1, 2, 3, 0., 1e-9, .1, .5, .99, 1., 2.5, 100, 1e6]


def with_value(recipe, path, value):
    part, _, name = path.partition('.')
    if not name: return replace(recipe, **{part: value})
    return replace(recipe, **{part: replace(getattr(recipe, part), **{name: value})})


def take_steps(recipe, rows=16, vocab_size=64):
    "Two optimizer steps on random tokens"
    ids = np.random.default_rng(0).integers(5, vocab_size, (rows, recipe.packing.seq_len))
    ids[::2, recipe.packing.seq_len//2:] = 0
    special = dict(pad=0, unk=1, cls=2, sep=3, mask=4)
    data = SimpleNamespace(train=ids, manifest=dict(special_ids=special, vocab_size=vocab_size))
    torch.manual_seed(recipe.seed)
    model = MaskedLM(recipe.model, vocab_size)
    optimizer, grads = make_optimizer(model, recipe.optim), Gradients(model)
    scaler, precision = torch.amp.GradScaler('cpu', enabled=False), choose_precision(torch.device('cpu'))
    micro = micro_step(model, recipe, precision, scaler, grads)
    for step in (0, 10**6):
        for group in optimizer.param_groups:
            group['lr'] = group['peak']*lr_factor(.3/recipe.schedule.length, recipe.schedule.warmup)
        accumulate(micro, train_batches(data, recipe, step), grads)
        update(grads, optimizer, scaler, recipe.optim.clip)
    assert not passes_multiple(.5, .5, recipe.validation.every + recipe.checkpoint.every)


def refused(path, value):
    "Why a value is refused, which names the field; empty when it is not"
    try: validate(with_value(TINY, path, value))
    except UsageError as e:
        assert path in str(e) or path.rpartition('.')[2] in str(e), f'{path}={value!r}: {e}'
        return str(e)
    return ''


@pytest.mark.parametrize('path', NUMERIC)
def test_an_odd_value_is_refused_by_name_or_can_be_trained(path):
    taken = [value for value in ODD if not refused(path, value)]
    for value in taken:
        assert type(value) in (int, float, tuple), f'{path}={value!r} is of a wrong type'
        if path.startswith(TRAINED) and (path not in SIZES or value in (1, 2)):
            take_steps(with_value(TINY, path, value))


def test_texts_and_switches_have_their_types_too():
    for path, (_, limits) in flat_fields(TINY).items():
        if limits['kind'] not in (bool, str): continue
        for value in (None, 1, .5, [], b'auto', np.bool_(True)):
            with pytest.raises(UsageError, match=path.rpartition('.')[2]):
                validate(with_value(TINY, path, value))


def test_random_combinations_are_refused_by_name_or_can_be_trained():
    "Each has four fields of its own; of those that are possible some are trained"
    rng, possible = random.Random(0), list[Recipe]()
    names = [path.rpartition('.')[2] for path in settings_of(TINY)]
    for _ in range(600):
        recipe = get_recipe(rng.choice(['24hbert', 'modern', 'mosaicbert']), 'tiny')
        known = flat_fields(recipe)
        for path in rng.sample(sorted(known), 4):
            limits = known[path][1]
            values = SIZES.get(path, COMMON if path in NUMERIC else [True, False, *limits.get('among', ())])
            value = rng.choice(values)
            if limits['kind'] in (int, float): value = limits['kind'](value)
            recipe = with_value(recipe, path, (value,) if limits['kind'] is tuple else value)
        try: possible.append(validate(recipe))
        except UsageError as e: assert any(name in str(e) for name in names), e
    assert 50 < len(possible) < 550
    for recipe in possible[::len(possible)//30]: take_steps(recipe)


@pytest.mark.parametrize('text', [
    'nan', 'inf', '-inf', '-1', '1e300', '1e20', '1e-60', '1' + '0'*30, '1' + '0'*5000, '', 'x', '0x1',
    '1_0_', 'None', '[1]', '１', '1,2', '0.1,nan'], ids=lambda text: text[:40])
def test_what_is_typed_in_is_refused_by_name_or_can_be_trained(text):
    for path in NUMERIC:
        try: recipe = validate(override(TINY, [f'{path}={text}']))
        except UsageError as e: assert path.rpartition('.')[2] in str(e)
        else:
            assert all(math.isfinite(x) for x in settings_of(recipe).values() if isinstance(x, float))
            if path.startswith(TRAINED) and path not in SIZES: take_steps(recipe)


def test_evaluations_come_at_the_very_step_of_their_part():
    for steps in (100, 300, 1000):
        found = [n for n in range(1, steps + 1) if passes_multiple((n - 1)/steps, n/steps, .1)]
        assert found == [steps*k//10 for k in range(1, 11)]
    assert passes_multiple(-1, 0, 1.) and not passes_multiple(0, .9, 1.)


def test_a_fingerprint_takes_any_tensor():
    weights = dict(a=torch.tensor(2.), b=torch.nn.Parameter(torch.ones(2, 3).T))
    assert fingerprint(weights) == fingerprint({k: w.detach().contiguous() for k, w in weights.items()})
    assert fingerprint(weights) != fingerprint(weights | dict(a=torch.tensor(3.)))
