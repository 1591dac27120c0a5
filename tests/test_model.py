"The network: the last block for the masked tokens only, positions, windows, and what may be attended to"
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from cramlit.core.recipes import Model, Recipe, UsageError, recipe_from_dict, recipe_hash, validate
from cramlit.core.scales import SCALES, get_recipe
from cramlit.data.masking import IGNORE
from cramlit.model.encoder import MaskedLM, count_parameters, gather

ROTARY = dict(first_norm=False, position='rotary', ffn='geglu', bias=False)
KINDS = {
    'pre': {},
    'post': dict(norm='post'),
    'no embedding norm': dict(embedding_norm=False),
    'rotary': ROTARY,
    'windows': ROTARY | dict(window=6, global_every=2),
    'last layer global': ROTARY | dict(window=6),
    'gated, absolute positions': dict(ffn='geglu'),
    'rotary after norm': dict(norm='post', position='rotary'),
}


def make(layers=4, **parts):
    torch.manual_seed(0)
    no_dropout = dict(dropout=0., attention_dropout=0.)
    cfg = Model(layers, 16, 2, 24, max_positions=40, initializer_range=.3, **no_dropout, **parts)
    return MaskedLM(cfg, 50).double()


def batch(padded):
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (3, 24))
    positions = torch.randint(0, 9, (3, 5))
    labels = torch.randint(5, 50, (3, 5))
    labels[0, 3:] = IGNORE
    mask = torch.arange(24)[None] < torch.tensor([24, 9, 15])[:, None] if padded else None
    return ids, mask, positions, labels


def summed_loss(scores, labels):
    return F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction='sum')


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('layers', [1, 2, 4])
@pytest.mark.parametrize('kind', KINDS)
def test_the_sparse_path_is_the_dense_one(kind, layers, padded):
    model = make(layers, **KINDS[kind])
    ids, mask, positions, labels = batch(padded)
    dense = summed_loss(gather(model.logits(ids, mask), positions), labels)
    assert model(ids, mask, positions, labels).item() == pytest.approx(dense.item(), rel=1e-6)  # a float32
    sparse = summed_loss(model.logits(ids, mask, positions), labels)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(dense, weights), torch.autograd.grad(sparse, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('kind', KINDS)
def test_padding_is_invisible_and_makes_no_nan(kind):
    model = make(**KINDS[kind])
    ids, mask, _, _ = batch(True)
    a, b = model.logits(ids, mask), model.logits(ids.masked_fill(~mask, 7), mask)
    assert a.isfinite().all() and b.isfinite().all()
    torch.testing.assert_close(a[mask], b[mask])


@pytest.mark.parametrize('window, reach', [(4, 2), (8, 4)])
def test_a_local_layer_attends_to_half_a_window_on_each_side(window, reach):
    model = make(3, **ROTARY, window=window, global_every=3)
    model.blocks[0].attention.out.weight.data.zero_()  # the first layer is global: it passes nothing on
    ids = torch.arange(5, 29)[None]
    changed = ids.clone()
    changed[0, 12] = 40
    moved = (model.logits(ids, None) - model.logits(changed, None)).abs().amax(-1)[0] > 1e-9
    two_layers = range(12 - 2*reach, 12 + 2*reach + 1)
    assert moved.nonzero().flatten().tolist() == list(two_layers)


def test_only_distances_count_with_rotary_positions():
    ids, mask = torch.randint(5, 50, (1, 30)), torch.zeros(1, 30, dtype=torch.bool)
    shifted, shifted_mask = ids.roll(9, 1), mask.clone()
    mask[0, :20], shifted_mask[0, 9:29] = True, True

    def both(model):
        return model.logits(ids, mask)[mask], model.logits(shifted, shifted_mask)[shifted_mask]

    torch.testing.assert_close(*both(make(2, **ROTARY)), atol=1e-5, rtol=1e-4)  # angles are float32
    a, b = both(make(2))
    assert (a - b).abs().max() > .1


def test_rotary_tables_follow_the_model_and_are_not_saved():
    model = make(2, **ROTARY, window=6)
    tables = dict(model.contexts.named_buffers())
    assert {t.dtype for t in tables.values()} == {torch.float64} and len(tables) == 2
    assert not [n for n in model.state_dict() if n.startswith('contexts')]


@pytest.mark.parametrize('kind', KINDS)
def test_parameters_are_counted_by_part(kind):
    model = make(**KINDS[kind])
    counts = count_parameters(Model(4, 16, 2, 24, max_positions=40, **KINDS[kind]), 50)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts['blocks'] == sum(p.numel() for p in model.blocks.parameters())
    assert counts['positions and segments'] == (42*16 if model.embeddings.absolute else 0)


@pytest.mark.parametrize('settings, says', [
    (['model.position=rotary', 'model.num_heads=64'], 'pairs of values'),
    (['model.position=sinus'], 'absolute or rotary'),
    (['model.ffn=swiglu'], 'gelu or geglu'),
    (['model.window=7'], 'even, half of it on each side'),
    (['model.global_every=0'], 'at least 1'),
    (['model.rope_theta=0'], 'above 1'),
    (['model.norm=post', 'model.first_norm=false'], 'true with model.norm=post'),
    (['optim.method=sgd'], 'adamw or muon'),
    (['optim.muon_lr=0'], 'above 0'),
    (['optim.momentum=1'], 'below 1'),
    (['masking.rate=0.9'], 'at least 29, which is masking.rate=0.9 of packing.seq_len=32'),
])
def test_impossible_shapes_are_named(settings, says):
    with pytest.raises(UsageError, match=says): get_recipe('24hbert', 'tiny', settings)


def test_a_recipe_may_have_settings_of_its_own_at_a_scale():
    modern, other = get_recipe('modern', 'laptop'), get_recipe('24hbert', 'laptop')
    assert (modern.model.intermediate_size, modern.batch.global_batch_size) == (256, 64)
    assert (other.model.intermediate_size, other.batch.global_batch_size) == (512, 128)
    assert modern.tokenizer == other.tokenizer
    overridden = get_recipe('modern', 'laptop', ['batch.global_batch_size=128'])
    assert overridden.batch.global_batch_size == 128
    assert all(set(s.per_recipe) <= {'modern', 'cramming', 'mosaicbert'} for s in SCALES.values())
    assert validate(replace(Recipe(), model=modern.model))


def test_a_recipe_saved_before_a_field_was_there_is_what_it_was():
    old = asdict(replace(Recipe(name='24hbert'), seed=7))
    for later in ('init', 'decoder_bias'): del old['model'][later]
    read = recipe_from_dict(old)
    assert (read.model.init, read.model.decoder_bias, read.packing.mode) == ('normal', True, 'document')
    assert recipe_hash(read) == recipe_hash(Recipe(name='24hbert')) != recipe_hash(get_recipe('24hbert'))
