"The network: the last block for the asked tokens only, positions, windows, and what may be seen"
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cramlit.core.recipes import Model, Recipe, UsageError, validate
from cramlit.data.masking import IGNORE
from cramlit.model.encoder import MaskedLM, gather
from cramlit.core.scales import SCALES, get_recipe

ROTARY = dict(first_norm=False, position='rotary', ffn='geglu', bias=False)
KINDS = {'pre': {}, 'post': dict(norm='post'), 'no embedding norm': dict(embedding_norm=False), 'rotary': ROTARY, 'windows': ROTARY | dict(window=6, global_every=2),
         'last layer wide': ROTARY | dict(window=6), 'gated with a table': dict(ffn='geglu'), 'rotary after norm': dict(norm='post', position='rotary')}


def make(layers=4, **parts):
    torch.manual_seed(0)
    return MaskedLM(Model(layers, 16, 2, 24, max_positions=40, dropout=0., attention_dropout=0., initializer_range=.3, **parts), 50).double()


def batch(padded):
    torch.manual_seed(1)
    ids, positions, labels = torch.randint(5, 50, (3, 24)), torch.randint(0, 9, (3, 5)), torch.randint(5, 50, (3, 5))
    labels[0, 3:] = IGNORE
    return ids, torch.arange(24)[None] < torch.tensor([24, 9, 15])[:, None] if padded else None, positions, labels


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('layers', [1, 2, 4])
@pytest.mark.parametrize('kind', KINDS)
def test_the_sparse_path_is_the_dense_one(kind, layers, padded):
    model, (ids, mask, positions, labels) = make(layers, **KINDS[kind]), batch(padded)
    dense = F.cross_entropy(gather(model.logits(ids, mask), positions).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction='sum')
    sparse = model(ids, mask, positions, labels)
    assert sparse.item() == pytest.approx(dense.item(), rel=1e-6)  # the loss is taken in float32
    weights = [p for n, p in model.named_parameters()]
    exact = F.cross_entropy(model.logits(ids, mask, positions).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction='sum')
    for a, b in zip(torch.autograd.grad(dense, weights), torch.autograd.grad(exact, weights), strict=True): torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('kind', KINDS)
def test_padding_is_invisible_and_makes_no_nan(kind):
    model, (ids, mask, _, _) = make(**KINDS[kind]), batch(True)
    other = ids.masked_fill(~mask, 7)
    a, b = model.logits(ids, mask), model.logits(other, mask)
    assert a.isfinite().all() and b.isfinite().all()
    torch.testing.assert_close(a[mask], b[mask])


@pytest.mark.parametrize('window, reach', [(4, 2), (8, 4)])
def test_a_local_layer_sees_half_a_window_on_each_side(window, reach):
    model = make(3, **ROTARY, window=window, global_every=3)
    for block in model.blocks[:1]: block.attention.out.weight.data.zero_()  # the first layer is a wide one: it passes nothing on
    ids = torch.arange(5, 29)[None]
    changed = ids.clone(); changed[0, 12] = 40
    seen = (model.logits(ids, None) - model.logits(changed, None)).abs().amax(-1)[0] > 1e-9
    assert seen.nonzero().flatten().tolist() == list(range(12 - 2*reach, 12 + 2*reach + 1))  # two local layers


def test_only_distances_count_with_rotary_positions():
    model = make(2, **ROTARY)
    ids, mask = torch.randint(5, 50, (1, 30)), torch.zeros(1, 30, dtype=torch.bool)
    moved, where = ids.roll(9, 1), mask.clone()
    mask[0, :20], where[0, 9:29] = True, True
    torch.testing.assert_close(model.logits(ids, mask)[mask], model.logits(moved, where)[where], atol=1e-5, rtol=1e-4)  # angles are float32
    model = make(2)
    assert (model.logits(ids, mask)[mask] - model.logits(moved, where)[where]).abs().max() > .1


def test_tables_follow_the_model_and_are_not_saved():
    model = make(2, **ROTARY, window=6)
    assert model.contexts.wide.dtype == torch.float64 and not [n for n in model.state_dict() if 'views' in n]


@pytest.mark.parametrize('settings, says', [
    (['model.position=rotary', 'model.num_heads=64'], 'pairs of values'), (['model.position=sinus'], 'absolute or rotary'), (['model.ffn=swiglu'], 'gelu or geglu'),
    (['model.window=7'], 'even, half of it on each side'), (['model.global_every=0'], 'at least 1'), (['model.rope_theta=0'], 'above 1'),
    (['model.norm=post', 'model.first_norm=false'], 'true with model.norm=post'), (['optim.method=sgd'], 'adamw or muon'), (['optim.muon_lr=0'], 'above 0'),
    (['masking.rate=0.9'], 'at least 29, which is masking.rate=0.9 of packing.seq_len=32'), (['optim.momentum=1'], 'below 1'),
])
def test_impossible_shapes_are_named(settings, says):
    with pytest.raises(UsageError, match=says): get_recipe('24hbert', 'tiny', settings)


def test_a_recipe_may_have_settings_of_its_own_at_a_scale():
    modern, other = get_recipe('modern', 'laptop'), get_recipe('24hbert', 'laptop')
    assert (modern.model.intermediate_size, modern.batch.global_batch_size) == (256, 64) != (other.model.intermediate_size, other.batch.global_batch_size)
    assert modern.tokenizer == other.tokenizer and get_recipe('modern', 'laptop', ['batch.global_batch_size=128']).batch.global_batch_size == 128
    assert all(set(s.per_recipe) <= set(('modern', 'cramming', 'mosaicbert')) for s in SCALES.values())
    assert validate(replace(Recipe(), model=modern.model))
