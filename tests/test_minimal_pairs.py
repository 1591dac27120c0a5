"Pairs of sentences that words alone do not decide, and what a network holds to be likelier"
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from joblib import parallel_config
from transformers import AutoModel

from cramlit.core.recipes import CramlitError
from cramlit.data.corpus import documents, holdout_position, unique
from cramlit.data.packing import open_data
from cramlit.evaluation import minimal_pairs as module
from cramlit.evaluation.minimal_pairs import (
    Pair,
    choices,
    count_ngrams,
    masked_lm,
    minimal_pairs,
    ngram_choices,
    ngram_log_likelihoods,
    ngram_result,
    pair_results,
    pair_rows,
    pseudo_log_likelihood,
)
from cramlit.evaluation.surrogate_tasks import HOLDOUT
from cramlit.training.checkpoints import export_run
from cramlit.training.training import pretrain


def test_a_pair_differs_in_one_place_and_words_alone_are_right_in_half():
    pairs = minimal_pairs(100)
    assert Counter(p.kind for p in pairs) == dict(order=100, agreement=100)
    assert len({p.right for p in pairs}) == 200
    directions = Counter()
    for p in pairs:
        right, wrong = p.right.split(), p.wrong.split()
        places = [i for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b]
        if p.kind == 'order':
            assert sorted(right) == sorted(wrong) and [b - a for a, b in pairwise(places)] == [1]
        else:
            assert len(places) == 1
            directions[right[places[0]], wrong[places[0]]] += 1
    assert len(directions) > 4 and all(n == directions[b, a] for (a, b), n in directions.items())


def test_all_sentences_are_of_held_out_articles():
    texts = ' '.join(' '.join(d.text.split()) for d in unique(documents('enwik8'))
                     if holdout_position(d.text) < HOLDOUT)
    assert all(p.right in texts for p in minimal_pairs(100))


@pytest.fixture(scope='module')
def model_folder(recipe, data, tmp_path_factory):
    out = tmp_path_factory.mktemp('model')
    pretrain(recipe, data, out/'run', steps=2)
    return export_run(out/'run', data/'tokenizer', out/'model')


class Sees(torch.nn.Module):
    "Gives one token a high probability wherever another one stands to its left"
    device = 'cpu'

    def __init__(self, left, token, size):
        super().__init__()
        self.left, self.token, self.size = left, token, size

    def forward(self, input_ids, **_):
        logits = torch.zeros(*input_ids.shape, self.size)
        logits[:, 1:, self.token] = 9.*(input_ids[:, :-1] == self.left)
        return SimpleNamespace(logits=logits)


def test_what_a_network_expects_decides(model_folder):
    _, tok = masked_lm(model_folder, 0)
    a, b, c, d = sorted(w for w in tok.get_vocab() if w.isalpha() and len(w) > 2)[:4]
    size, expected = len(tok), tok.get_vocab()[b]
    model = Sees(tok.get_vocab()[a], expected, size)
    pairs = [Pair('order', f'{a} {b} {c}', f'{b} {a} {c}'), Pair('order', f'{b} {a} {c}', f'{a} {b} {c}'),
             Pair('order', f'{c} {d} {d}', f'{d} {c} {d}')]
    assert choices(model, tok, pairs) == [1., 0., .5]
    even, seen = -np.log(size), 9 - np.log(np.exp(9) + size - 1)
    assert pseudo_log_likelihood(model, tok, f'{c} {d} {d}') == pytest.approx(3*even, abs=1e-3)
    assert pseudo_log_likelihood(model, tok, f'{a} {b}') == pytest.approx(even + seen, abs=1e-3)


def test_choices_are_kept_by_what_decides_them(model_folder, tmp_path, monkeypatch):
    with parallel_config('sequential'):
        first = pair_results([(model_folder, None), (model_folder, 7)], 4, tmp_path)
        assert first[0]['key'] != first[1]['key'] and all(len(r['choices']) == 8 for r in first)
        monkeypatch.setattr(module, 'choices', lambda *a: pytest.fail('computed twice'))
        assert pair_results([(model_folder, 7), (model_folder, None)], 4, tmp_path) == first[::-1]


def test_rows_have_both_kinds_and_the_error_of_the_pairs():
    right = [1.]*90 + [0.]*10 + [1.]*60 + [0.]*40
    stamp = dict(commit='c', dirty=False, versions={}, hardware='h')
    whole, order, agreement = pair_rows(dict(choices=right, provenance=stamp), dict(seed=1, metric='other'))
    assert (whole['value'], order['value'], agreement['value']) == (75., 90., 60.)
    assert [r['metric'] for r in (whole, order, agreement)] == [
        'minimal_pairs', 'minimal_pairs_order', 'minimal_pairs_agreement']
    assert np.std(whole['resampled']) == pytest.approx(100*(.75*.25/200)**.5, rel=.25)
    assert agreement['seed'] == 1 and agreement['commit'] == 'c' and 'resampled' not in agreement


def test_a_network_without_a_head_for_masked_tokens_is_refused(model_folder, tmp_path):
    _, tok = masked_lm(model_folder, 0)
    AutoModel.from_pretrained(str(model_folder)).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    with pytest.raises(CramlitError, match='no head for masked tokens'): masked_lm(tmp_path)
    with parallel_config('sequential'), pytest.raises(CramlitError, match='no head for masked tokens'):
        pair_results([(tmp_path, None)], 2, tmp_path/'out')


def test_a_tokenizer_without_a_mask_is_refused(model_folder, tmp_path, monkeypatch):
    real = module.load_parts
    def without_mask(folder):
        config, tok = real(folder)
        tok.mask_token = None
        return config, tok
    monkeypatch.setattr(module, 'load_parts', without_mask)
    with pytest.raises(CramlitError, match='has no .MASK.'): masked_lm(model_folder)


def test_long_sentences_are_computed_in_parts(model_folder, monkeypatch):
    model, tok = masked_lm(model_folder)
    sentence = 'the river was near the old house and the stone'
    whole = pseudo_log_likelihood(model, tok, sentence)
    monkeypatch.setattr(module, 'COPIES', 3)
    assert pseudo_log_likelihood(model, tok, sentence) == pytest.approx(whole, rel=1e-5)


def likelihood_by_hand(data, ids, k):
    "The log-probability of a sentence by counts of up to k neighbouring tokens, in plain Python"
    special, counts = set(data.manifest['special_ids'].values()), [Counter() for _ in range(k + 1)]
    for row in data.train[:].tolist():
        for n in range(1, k + 1):
            runs = zip(*(row[i:] for i in range(n)), strict=False)
            counts[n].update(run for run in runs if not special & {*run})
    counts[0][()] = sum(counts[1].values())
    def probability(run):
        shorter = probability(run[1:]) if run[1:] else 1/data.padded_vocab_size
        return (counts[len(run)][run] + 5*shorter)/(counts[len(run) - 1][run[:-1]] + 5)
    return sum(np.log(probability(tuple(ids[max(0, i - k + 1):i + 1]))) for i in range(len(ids)))


@pytest.mark.parametrize('k', [1, 2, 3])
def test_neighbours_counted_in_the_training_text_decide(data, model_folder, k):
    prepared = open_data(data)
    _, tok = masked_lm(model_folder, 0)
    texts = [tok.decode([t for t in row if t not in tok.all_special_ids][:n])
             for row, n in zip(prepared.train[:40].tolist(), range(1, 41), strict=True)]
    texts = [' '.join(words) for text in texts for words in (text.split(), text.split()[::-1])]
    encoded = tok(texts, add_special_tokens=False)['input_ids']
    expected = [likelihood_by_hand(prepared, ids, k) for ids in encoded]
    assert ngram_log_likelihoods(prepared, texts, k) == pytest.approx(expected, rel=1e-9)
    pairs = [Pair('order', a, b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    found = ngram_choices(prepared, pairs, k)
    if k > 1:  # a single word has no neighbours
        assert found[2:] == [float(a > b) for a, b in zip(expected[4::2], expected[5::2], strict=True)]
        assert np.mean(found) > .6  # of words in their order against the same in reverse
    assert ngram_choices(prepared, [Pair('order', pairs[0].right, pairs[0].right)], k) == [.5]


def test_runs_of_tokens_are_counted_within_a_sequence(data):
    prepared = open_data(data)
    special = set(prepared.manifest['special_ids'].values())
    rows = prepared.train[:].tolist()
    runs = [r[i:i+3] for r in rows for i in range(len(r) - 2) if not special & {*r[i:i+3]}]
    counts, total = count_ngrams(prepared, np.array([runs[0], [prepared.padded_vocab_size - 1]*3]))
    assert counts.tolist() == [runs.count(runs[0]), 0] and counts[0] > 0 and total == len(runs)


def test_choices_of_counted_neighbours_are_kept(data, tmp_path, monkeypatch):
    prepared = open_data(data)
    first = [ngram_result(prepared, 4, k, tmp_path) for k in (2, 3)]
    assert first[0]['key'] != first[1]['key'] and all(len(r['choices']) == 8 for r in first)
    monkeypatch.setattr(module, 'ngram_choices', lambda *a: pytest.fail('computed twice'))
    assert [ngram_result(prepared, 4, k, tmp_path) for k in (2, 3)] == first


def test_a_score_that_is_no_number_is_no_choice(model_folder, monkeypatch):
    monkeypatch.setattr(module, 'pseudo_log_likelihood', lambda model, tok, sentence: float('nan'))
    assert choices(None, None, [Pair('order', 'a b', 'b a')]) == [.5]
