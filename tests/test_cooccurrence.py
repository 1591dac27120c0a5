"Embeddings from co-occurrence counts: the counts by hand, and a run that begins with them"
import json

import numpy as np
import pytest
import torch

from cramlit.core.recipes import override
from cramlit.data.packing import open_data
from cramlit.model.cooccurrence import WINDOW, cooccurrence_embeddings, count_pairs, positive_pmi
from cramlit.training import training
from cramlit.training.training import pretrain


def test_counts_and_information_are_those_worked_out_pair_by_pair(data):
    rows, special = open_data(data).train, open_data(data).manifest['special_ids']
    V = open_data(data).padded_vocab_size
    want = np.zeros((V, V))
    for row in rows[::1]:
        for i, a in enumerate(row):
            for b in row[i + 1:i + 1 + WINDOW]:
                if a in special.values() or b in special.values(): continue
                want[a, b] += 1
                want[b, a] += 1
    counts = count_pairs(rows, V, special)
    assert np.array_equal(counts.to_dense().numpy(), want)
    each = want.sum(1)
    with np.errstate(divide='ignore', invalid='ignore'):
        pmi = np.log(want*want.sum()/np.outer(each, each))
    assert np.allclose(positive_pmi(counts).to_dense().numpy(), np.where(pmi > 0, pmi, 0), atol=1e-5)


def test_vectors_are_a_factor_of_the_matrix(data):
    opened = open_data(data)
    special = list(opened.manifest['special_ids'].values())
    pmi = positive_pmi(count_pairs(opened.train, opened.padded_vocab_size, opened.manifest['special_ids']))
    vectors, seen = cooccurrence_embeddings(opened, 32, 0)
    assert torch.isfinite(vectors).all() and seen.any() and not seen[special].any()
    u, s, _ = torch.linalg.svd(pmi.to_dense())
    want = (u*s.sqrt())[:, :8]
    deviation, mean = torch.std_mean(want[seen], 0)
    want = (want - mean)/deviation
    cosines = torch.nn.functional.cosine_similarity(vectors[:, :8][seen], want[seen], dim=0)
    assert (cosines.abs() > .99).all()  # the sign of a singular vector means nothing


def test_a_run_begins_with_them_and_goes_on_without_counting_again(data, recipe, tmp_path, monkeypatch):
    counting = override(recipe, {'model.cooccurrence': 3., 'checkpoint.every': .5})
    calls, real = [], training.cooccurrence_embeddings

    def counted(*args):
        calls.append(1)
        return real(*args)
    monkeypatch.setattr(training, 'cooccurrence_embeddings', counted)
    whole = pretrain(counting, data, tmp_path/'whole', steps=6)
    assert len(calls) == 1
    first = next(json.loads(x) for x in (tmp_path/'whole'/'metrics.jsonl').read_text().splitlines())
    pretrain(recipe, data, tmp_path/'random', steps=6)
    other = next(json.loads(x) for x in (tmp_path/'random'/'metrics.jsonl').read_text().splitlines())
    assert first['validation_loss'] != other['validation_loss'] and len(calls) == 1

    (tmp_path/'cut').mkdir()
    (tmp_path/'cut'/'stop').touch()
    with pytest.raises(training.Interrupted): pretrain(counting, data, tmp_path/'cut', steps=6)
    again = pretrain(counting, data, tmp_path/'cut', steps=6)
    assert len(calls) == 2  # once in each of the two runs, not when one goes on
    losses = [next(r['value'] for r in rows if r['metric'] == 'validation_loss') for rows in (whole, again)]
    assert losses[0] == losses[1]


def test_their_time_is_the_budgets(data, recipe, tmp_path, monkeypatch):
    run = training.Run(override(recipe, {'model.cooccurrence': 1.}), open_data(data), tmp_path/'run',
                       training.Clock(60.))
    times = iter((10., 12.5))
    run.clock.now = lambda: next(times)
    model = training.MaskedLM(run.recipe.model, run.data.padded_vocab_size)
    before = model.embeddings.word.weight.clone()
    training.begin_with_counts(run, model)
    vectors, seen = cooccurrence_embeddings(run.data, run.recipe.model.hidden_size, run.recipe.seed)
    after = model.embeddings.word.weight.detach()
    assert run.clock.spent == 2.5
    assert torch.equal(after[~seen], before[~seen])
    assert torch.equal(after[seen], run.recipe.model.initializer_range*vectors[seen])
