"""What the official code of the paper does, and that ours does the same

tests/data/official.json holds what its functions returned, run once, at commit 52adf225 of
IntelLabs/academic-budget-bert.
"""
import json
from pathlib import Path

import numpy as np
import pytest

import cramlit.data.packing as packing
from cramlit.core.randomness import make_key
from cramlit.core.recipes import Packing
from cramlit.core.scales import get_recipe
from cramlit.data.masking import count_predictions
from cramlit.data.packing import paper_rows

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
