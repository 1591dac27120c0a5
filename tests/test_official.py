"""What the official code of the paper does, and that ours does the same

tests/data/official.json holds what its functions returned, run once, at commit 52adf225 of
IntelLabs/academic-budget-bert.
"""
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cramlit.data.packing as packing
from cramlit.core.randomness import make_key
from cramlit.core.recipes import Packing
from cramlit.core.scales import get_recipe
from cramlit.data.masking import IGNORE, count_predictions, mask_rows
from cramlit.data.packing import paper_rows
from cramlit.data.tokenizer import padded_vocab
from cramlit.model.encoder import MaskedLM
from cramlit.training.optimizers import make_optimizer
from cramlit.training.schedule import lr_factor

OFFICIAL = json.loads((Path(__file__).parent/'data'/'official.json').read_text())


def numbered(lengths):
    "Sentences of these lengths whose tokens say where they stand in the document"
    ends = np.cumsum([0, *lengths]).tolist()
    return [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]


def test_the_recipe_packs_as_the_official_code_does():
    assert get_recipe('24hbert').packing == Packing('paper', 128, 0.1)


def test_sequences_have_the_official_lengths():
    want, cfg = OFFICIAL['packing'], Packing('paper', short_seq_prob=0.)
    for lengths, full in zip(want['sentences'], want['full'], strict=True):
        assert [len(r) for r in paper_rows(numbered(lengths), cfg, 7)] == full


@pytest.mark.parametrize('target', OFFICIAL['packing']['targets'])
def test_the_length_of_a_short_document_is_a_minimum(target, monkeypatch):
    monkeypatch.setattr(packing, 'target_length', lambda cfg, key: int(target))
    want = OFFICIAL['packing']
    for lengths, rows in zip(want['sentences'], want['targets'][target], strict=True):
        assert [len(r) for r in paper_rows(numbered(lengths), Packing('paper'), 7)] == rows


def test_each_surplus_token_is_dropped_from_an_end_of_its_own():
    want, cfg = OFFICIAL['packing'], Packing('paper', short_seq_prob=0.)
    rows = begin = left = surplus = 0
    squares = []
    for seed in range(40):
        for d, lengths in enumerate(want['sentences']):
            pieces, i = numbered(lengths), 0
            for row in paper_rows(pieces, cfg, make_key(seed, d)[0]):
                first = pieces[i][0]
                while i < len(pieces) and pieces[i][-1] < row[-1]: i += 1
                i += 1
                assert row == list(range(row[0], row[0] + len(row)))
                over, cut = pieces[i - 1][-1] + 1 - first - len(row), row[0] - first
                rows, begin = rows + 1, begin + (cut == 0)
                left, surplus = left + cut, surplus + over
                if over: squares.append((cut - over/2)**2/(over/4))
    assert rows == want['cuts']['rows']
    assert abs(begin/rows - want['cuts']['begin_with_a_sentence']) < .015
    assert abs(left/surplus - want['cuts']['left_of_surplus']) < .01
    assert abs(np.mean(squares) - want['cuts']['spread']) < .06


def test_as_many_tokens_are_predicted():
    cfg = get_recipe('24hbert').masking
    assert count_predictions(np.arange(3, 129), cfg).tolist() == OFFICIAL['packing']['predictions']


# the network

WANT = OFFICIAL['network']


def network():
    "Ours in the official network's small shape"
    s, r = WANT['shape'], get_recipe('24hbert')
    cfg = replace(r.model, num_layers=s['num_hidden_layers'], hidden_size=s['hidden_size'],
                  num_heads=s['num_attention_heads'], intermediate_size=s['intermediate_size'],
                  max_positions=s['max_position_embeddings'])
    return MaskedLM(cfg, s['vocab_size'])


def filled(name, shape):
    "Weights that only a name decides; the official network had the same in the same places"
    random = np.random.RandomState(zlib.crc32(name.encode()))
    w = random.standard_normal(shape).astype(np.float32)*np.float32(.15)
    return torch.from_numpy(w + np.float32('norm.weight' in name))


def test_the_networks_have_the_same_tensors():
    assert set(dict(network().named_parameters())) == {*WANT['decayed'], *WANT['not_decayed']}
    assert WANT['without_gradient'][-1] == 'cls.predictions.bias'  # theirs: declared, and never added


def test_logits_loss_and_gradients_agree():
    net = network().eval()
    with torch.no_grad():
        for name, p in net.named_parameters(): p.copy_(filled(name, tuple(p.shape)))
    ids, labels = torch.tensor(WANT['ids']), torch.tensor(WANT['labels'])
    mask = torch.arange(ids.shape[1]) < torch.tensor(WANT['lengths'])[:, None]
    used, K = labels >= 0, int((labels >= 0).sum(1).max())
    positions = torch.argsort((~used).int(), dim=1, stable=True)[:, :K]
    slots = torch.where(used.gather(1, positions), labels.gather(1, positions), IGNORE)
    loss = net(ids, mask, positions, slots)/used.sum()
    loss.backward()
    assert abs(loss.item() - WANT['loss']) < 1e-5
    logits = net.logits(ids, mask, positions)[slots != IGNORE]
    torch.testing.assert_close(logits, torch.tensor(WANT['logits']), atol=1e-4, rtol=1e-4)
    norms = {name: p.grad.norm().item() for name, p in net.named_parameters()}
    assert norms == pytest.approx(WANT['gradient_norms'], rel=1e-3, abs=1e-6)


def test_all_weights_start_alike():
    torch.manual_seed(1)
    net = network()
    for name, p in net.named_parameters():
        spread, largest = WANT['start'][name]
        assert p.std(correction=0).item() == pytest.approx(spread, rel=.15), name
        assert p.abs().max().item() == pytest.approx(largest, rel=.3), name
    weights = dict(net.named_parameters())
    blocks = [n for n in weights if n.startswith('blocks.0.') and n.endswith('weight') and 'norm' not in n]
    same = [n for n in blocks if torch.equal(weights[n], weights[n.replace('blocks.0', 'blocks.3')])]
    assert same == WANT['same_in_all_layers']


def test_the_same_weights_decay():
    net, r = network(), get_recipe('24hbert')
    name_of = {id(p): name for name, p in net.named_parameters()}
    decayed = {d: set() for d in (True, False)}
    for group in make_optimizer(net, r.optim).param_groups:
        decayed[group['weight_decay'] > 0] |= {name_of[id(p)] for p in group['params']}
    assert decayed[True] == set(WANT['decayed']) and decayed[False] == set(WANT['not_decayed'])


def test_the_learning_rate_of_a_day_is_the_same():
    want, warmup = OFFICIAL['schedule'], get_recipe('24hbert').schedule.warmup
    assert [lr_factor(h/24, warmup) for h in want['hours']] == pytest.approx(want['factor'], abs=1e-12)


def test_rows_of_the_embedding_matrix():
    assert padded_vocab(30522) == 30528


def test_masks_replace_as_often():
    r, special = get_recipe('24hbert').masking, dict(pad=0, unk=1, cls=2, sep=3, mask=4)
    rows = np.random.default_rng(0).integers(5, 30522, (4000, 128))
    rows[:, 0], rows[:, -1] = special['cls'], special['sep']
    m = mask_rows(rows, make_key(0, np.arange(4000)), r, special, 30522)
    assert not np.isin(m.positions, (0, 127)).any()
    shown = np.take_along_axis(m.input_ids, m.positions, 1)
    masked, kept = (shown == special['mask']).mean(), (shown == m.labels).mean()
    assert abs(masked - .8) < .005 and abs(kept - .1) < .005


def test_the_choice_of_tokens_does_not_look_at_words():
    r, special = get_recipe('24hbert').masking, dict(pad=0, unk=1, cls=2, sep=3, mask=4)
    words, pieces = np.full((50, 128), 7), np.full((50, 128), 8)  # all of them whole words, or pieces of one
    for rows in (words, pieces): rows[:, 0], rows[:, -1] = special['cls'], special['sep']
    keys = make_key(0, np.arange(50))
    chosen = [mask_rows(rows, keys, r, special, 30522).positions for rows in (words, pieces)]
    assert (chosen[0] == chosen[1]).all()
    assert 0 < (np.diff(np.sort(chosen[1], axis=1)) > 1).mean(), 'a word is masked in parts'


def test_the_values_of_the_published_command():
    r = get_recipe('24hbert')
    m, o, b, v = r.model, r.optim, r.batch, r.validation
    assert (m.num_layers, m.hidden_size, m.num_heads, m.intermediate_size) == (24, 1024, 16, 4096)
    assert (m.norm, m.ffn, m.position) == ('pre', 'gelu', 'absolute')
    assert (m.dropout, m.attention_dropout, m.initializer_range) == (.1, .1, .02)
    assert m.layer_norm_eps == 1e-12
    assert (o.method, o.beta1, o.beta2, o.eps, o.weight_decay, o.clip) == ('adamw', .9, .98, 1e-6, .01, 0)
    assert (b.global_batch_size, b.micro_batch_size, r.schedule.warmup, r.seed) == (4096, 32, .06, 42)
    assert (v.stop_loss, v.stop_after*24*60) == (6, 180)


def test_what_the_chapter_calls_the_same_is_held_by_a_test_of_this_file():
    chapter = Path(__file__).parent.parent/'nbs'/'guides'/'92_official_code.ipynb'
    cells = [''.join(c['source']) for c in json.loads(chapter.read_text())['cells']]
    table, = (c for c in cells if c.startswith('| what | where | held by |'))
    held = [line.rstrip('| ').rsplit('|', 1)[1].strip(' `') for line in table.splitlines()[2:]]
    assert len(held) > 25 and all(name.startswith('test_') and name in globals() for name in held)
