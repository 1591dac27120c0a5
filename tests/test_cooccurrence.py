"Training that begins with counts: the counts by hand, where the heads look, and a run that begins with them"
import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from cramlit.core.recipes import UsageError, override
from cramlit.core.scales import get_recipe
from cramlit.data.batches import train_batches
from cramlit.data.packing import open_data
from cramlit.model.cooccurrence import begin_with_counts, cooccurrence_embeddings, count_pairs, positive_pmi
from cramlit.model.encoder import MaskedLM, rotate
from cramlit.training import training
from cramlit.training.training import pretrain


def test_a_vocabulary_smaller_than_the_network_is_wide_is_refused(data, recipe):
    wide = override(recipe, ['model.hidden_size=512', 'model.num_heads=8', 'model.cooccurrence=3'])
    opened = open_data(data)
    model = MaskedLM(wide.model, opened.padded_vocab_size)
    with pytest.raises(UsageError, match='at least model.hidden_size=512 tokens, and the vocabulary has 128'):
        begin_with_counts(model, wide.model, opened, 0)


def test_counts_and_information_are_those_worked_out_pair_by_pair(data):
    rows, special = open_data(data).train, open_data(data).manifest['special_ids']
    V = open_data(data).padded_vocab_size
    want = np.zeros((V, V))
    for row in rows[::1]:
        for a, b in pairwise(row):
            if a not in special.values() and b not in special.values(): want[a, b] += 1
    counts = count_pairs(rows, V, special)
    assert np.array_equal(counts.to_dense().numpy(), want)
    expected = np.outer(want.sum(1), want.sum(0))/want.sum()
    pmi = np.where(want > 0, np.log((want + 1)/(expected + 1)), 0)
    assert np.allclose(positive_pmi(counts).to_dense().numpy(), pmi.clip(0), atol=1e-5)


def test_vectors_are_a_factor_of_the_matrix(data):
    opened = open_data(data)
    special = list(opened.manifest['special_ids'].values())
    pmi = positive_pmi(count_pairs(opened.train, opened.padded_vocab_size, opened.manifest['special_ids']))
    vectors, pairs = cooccurrence_embeddings(opened, 32, 0)
    seen = pairs > 0
    assert torch.isfinite(vectors).all() and seen.any() and not seen[special].any()
    u, s, _ = torch.linalg.svd(torch.cat([pmi, pmi.mT], 1).to_dense(), full_matrices=False)
    want = (u*s.sqrt())[:, :8]
    deviation, mean = torch.std_mean(want[seen], 0)
    want = (want - mean)/deviation
    cosines = torch.nn.functional.cosine_similarity(vectors[:, :8][seen], want[seen], dim=0)
    assert (cosines.abs() > .99).all()  # the sign of a singular vector means nothing


def test_a_run_begins_with_them_and_goes_on_without_counting_again(data, recipe, tmp_path, monkeypatch):
    counting = override(recipe, {'model.cooccurrence': 3., 'checkpoint.every': .5})
    calls, real = [], training.begin_with_counts

    def counted(*args):
        calls.append(1)
        return real(*args)
    monkeypatch.setattr(training, 'begin_with_counts', counted)
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
    training.begin(run, model)
    assert run.clock.spent == 2.5
    vectors, pairs = cooccurrence_embeddings(run.data, run.recipe.model.hidden_size, run.recipe.seed)
    assert torch.equal(model.embeddings.word.weight, run.recipe.model.initializer_range*vectors)
    frequent = pairs.argmax()
    assert model.head.bias is None or model.head.bias.argmax() == frequent


@pytest.mark.parametrize('settings', [(), ('model.num_heads=4',), ('model.first_norm=true',)])
def test_two_heads_look_at_the_neighbours_of_a_masked_token(data, settings):
    recipe, opened = get_recipe('modern', 'tiny', ('packing.mode=document', *settings)), open_data(data)
    torch.manual_seed(0)
    model = MaskedLM(recipe.model, opened.padded_vocab_size)
    begin_with_counts(model, override(recipe, 'model.cooccurrence=3').model, opened, 0)
    batch, attention = next(train_batches(opened, recipe, 0)), model.blocks[0].attention
    words = ~torch.isin(batch.input_ids, torch.tensor(list(opened.manifest['special_ids'].values())))
    b, k = (batch.labels != -100).nonzero(as_tuple=True)
    at = batch.positions[b, k]
    with torch.no_grad():
        context = model.contexts(batch.input_ids, batch.attention_mask, False)
        states = model.blocks[0].attention_norm(model.embeddings(batch.input_ids))
        q, keys, _ = attention.project(states, None)
        scores = (rotate(q, context.query_rotary) @ rotate(keys, context.key_rotary).mT)[b, :, at]
    for head, side in enumerate((-1, 1)):
        beside = words[b, (at + side).clamp(0, words.shape[1] - 1)]
        assert beside.sum() > 50
        looks = scores[:, head].argmax(1) == at + side
        assert looks[beside].float().mean() > .6  # by chance 0.03; rare words have short vectors here
