"The fast path computes the same, never makes the host wait, and meets no shape that was not foreseen"
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cramlit.core.devices import Precision
from cramlit.core.randomness import permute
from cramlit.core.recipes import CramlitError, UsageError, override
from cramlit.core.scales import get_recipe
from cramlit.data.batches import train_batches
from cramlit.data.corpus import Document, documents
from cramlit.data.masking import IGNORE, count_predictions
from cramlit.data.packing import open_data, prepare
from cramlit.data.tokenizer import encode_documents, load_tokenizer, sentences
from cramlit.model.encoder import MaskedLM
from cramlit.model.kernels import Dropout, summed_cross_entropy
from cramlit.training import training as train
from cramlit.training.distributed import Gradients, World
from cramlit.training.training import accumulate, micro_step

CPU = torch.device('cpu')
FP32 = Precision(torch.float32, 'compared in full precision')
OFF = torch.amp.GradScaler(enabled=False)


@pytest.fixture(scope='module')
def opened(data):
    return open_data(data)


class NothingAsked(TorchDispatchMode):
    "Whatever a host does with a value, it must read it first"
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert op not in reads, f'{op} makes the host wait'
        return op(*args, **(kwargs or {}))


@pytest.fixture
def read(monkeypatch):
    "Readings that pass by the dispatcher when a tensor is on the CPU already, by name as they happen"
    seen = []

    def noted(name, real):
        def method(self, *args, **kwargs):
            seen.append(name)
            return real(self, *args, **kwargs)
        return method

    for name in ('tolist', 'numpy', 'cpu', '__array__'):
        monkeypatch.setattr(torch.Tensor, name, noted(name, getattr(torch.Tensor, name)))
    return seen


@pytest.mark.parametrize('name, settings', [
    ('24hbert', []),
    ('bert-base', []),
    ('modern', []),
    ('modern', ['model.window=8', 'model.num_layers=4']),
    ('mosaicbert', []),
])
def test_a_micro_step_asks_nothing_of_the_device(name, settings, opened, read):
    r = get_recipe(name, 'tiny', ['batch.micro_batch_size=8', *settings])
    model = MaskedLM(r.model, opened.padded_vocab_size)
    grads, batches = Gradients(model), list(train_batches(opened, r, 0))
    read.clear()
    with NothingAsked(): accumulate(micro_step(model, r, FP32, OFF, grads), batches, grads)
    assert not read and grads.flat.norm() > 0
    with pytest.raises(AssertionError, match='makes the host wait'), NothingAsked(): grads.totals[0].item()


@pytest.mark.parametrize('name', ['24hbert', 'modern'])
def test_validation_asks_once_however_many_batches_there_are(name, recipe, opened, read, monkeypatch):
    r = get_recipe(name, 'tiny', ['batch.micro_batch_size=8'])
    batches = list(train_batches(opened, r, 0))
    assert len(batches) == 4
    monkeypatch.setattr(train, 'validation_batches', lambda *args: iter(batches))
    model = MaskedLM(r.model, opened.padded_vocab_size)
    read.clear()
    with NothingAsked(): loss = train.validate(model, opened, r, FP32, World())
    assert read == ['tolist'] and 4 < loss < 6


def foreseen_forms(r):
    "Whole sequences without a mask, and sequences cut at multiples of 16 with one"
    B, S = r.batch.micro_batch_size, r.packing.seq_len
    K = int(count_predictions(S, r.masking))
    widths = {min(S, -(-w//16)*16) for w in range(1, S + 1)}
    shapes = [(torch.Size([B, S]), True), *((torch.Size([B, w]), False) for w in widths)]
    return {(shape, whole, torch.Size([B, K]), torch.Size([B, K])) for shape, whole in shapes}


def forms(batches):
    return {(b.input_ids.shape, b.attention_mask is None, b.positions.shape, b.labels.shape) for b in batches}


@pytest.mark.parametrize('mode, seq_len', [
    ('document', 24), ('document', 32), ('document', 50), ('stream', 24), ('stream', 32),
])
def test_no_batch_has_a_shape_that_was_not_foreseen(mode, seq_len, recipe, data, tmp_path):
    r = override(recipe, [f'packing.mode={mode}', f'packing.seq_len={seq_len}',
                          f'tokenizer.path={data}/tokenizer', 'batch.micro_batch_size=4'])
    prepare(r, tmp_path/'data')
    d, foreseen = open_data(tmp_path/'data'), foreseen_forms(r)
    batches = [b for step in range(40) for b in train_batches(d, r, step)]
    assert forms(batches) <= foreseen
    assert len({b.positions.shape for b in batches}) == 1
    assert all(b.attention_mask is None or b.attention_mask.shape == b.input_ids.shape for b in batches)
    met = {(b.input_ids.shape[1], b.attention_mask is None) for b in batches}
    assert met == {(seq_len, True)} if mode == 'stream' else {(16, False), (seq_len, False)} <= met


def scores_by_sequence(batches, model):
    "Masked sequence, positions and labels → scores of the masked tokens"
    found = {}
    for b in batches:
        with torch.no_grad(): scores = model.logits(b.input_ids, b.attention_mask, b.positions)
        for i, ids in enumerate(b.input_ids):
            text = ids if b.attention_mask is None else ids[b.attention_mask[i]]
            key = tuple(text.tolist()), tuple(b.positions[i].tolist()), tuple(b.labels[i].tolist())
            found.setdefault(key, []).append(scores[i][b.labels[i] != IGNORE])
    return found


@pytest.mark.parametrize('name', ['24hbert', 'modern'])
def test_a_sequence_has_the_same_masks_and_scores_however_the_batch_is_cut(name, opened):
    r = get_recipe(name, 'tiny', ['model.window=8', 'model.num_layers=4'] if name == 'modern' else [])
    torch.manual_seed(0)
    model = MaskedLM(r.model, opened.padded_vocab_size).eval()
    nn.init.normal_(model.embeddings.word.weight, std=.2)  # scores that differ enough to be compared

    def found(size, world):
        cut = override(r, [f'batch.micro_batch_size={size}'])
        batches = [b for rank in range(world) for b in train_batches(opened, cut, 1, rank, world)]
        return scores_by_sequence(batches, model)

    whole = found(32, 1)
    assert sum(map(len, whole.values())) == 32
    for size, world in ((2, 1), (2, 2), (8, 1), (8, 2)):
        part = found(size, world)
        assert part.keys() == whole.keys()
        for key in whole: torch.testing.assert_close(part[key], whole[key], atol=1e-5, rtol=1e-4)


def test_documents_tokenised_whole_are_their_sentences_tokenised_one_by_one(text, data):
    tok = load_tokenizer(data/'tokenizer')
    docs = list(documents(str(text)))*3  # more than are taken at a time
    expected = [[tok(s, add_special_tokens=False).input_ids for s in sentences(d.text)] for d in docs]
    got = list(encode_documents(docs, tok))
    assert len(docs) > 128 and [d for d, _ in got] == docs and [p for _, p in got] == expected


def test_a_text_may_name_special_tokens(data):
    tok = load_tokenizer(data/'tokenizer')
    named, last = 'The stone [SEP] house. A [MASK] river sees people.', 'Cold light.'
    (_, a), (_, b) = encode_documents([Document('0', named), Document('1', last)], tok)
    assert not {2, 3, 4} & {i for piece in a for i in piece}, 'they are words'
    assert b == [tok(last, add_special_tokens=False).input_ids], 'what follows is not shifted'


def test_a_tokenizer_that_pads_with_another_special_token_is_refused(data, tmp_path):
    tok = load_tokenizer(data/'tokenizer')
    tok.pad_token = tok.sep_token
    tok.save_pretrained(tmp_path/'shared')
    with pytest.raises(CramlitError, match='uses its pad token for another special token'):
        load_tokenizer(tmp_path/'shared')


def test_a_tokenizer_that_would_truncate_does_not(recipe, data, tmp_path):
    tok = load_tokenizer(data/'tokenizer')
    tok.backend_tokenizer.enable_truncation(8)
    tok.backend_tokenizer.enable_padding(length=500)
    tok.backend_tokenizer.save(str(tmp_path/'tokenizer.json'))
    load_tokenizer(data/'tokenizer').save_pretrained(tmp_path/'cut')
    (tmp_path/'tokenizer.json').replace(tmp_path/'cut'/'tokenizer.json')
    assert json.loads((tmp_path/'cut'/'tokenizer.json').read_text())['truncation']['max_length'] == 8
    made = prepare(override(recipe, [f"tokenizer.path={tmp_path/'cut'}"]), tmp_path/'data')
    assert made['splits'] == open_data(data).manifest['splits']


def test_a_wrong_label_is_an_error_as_in_torch():
    logits = torch.randn(3, 8)
    with pytest.raises((RuntimeError, IndexError)):
        summed_cross_entropy(logits, torch.tensor([1, -1, 2]), IGNORE)
    found = summed_cross_entropy(logits, torch.tensor([1, IGNORE, 2]), IGNORE)
    torch.testing.assert_close(found, F.cross_entropy(logits[[0, 2]], torch.tensor([1, 2]), reduction='sum'))


@pytest.mark.parametrize('p', [.999995, 1.])
def test_a_dropout_of_almost_everything_is_that_of_torch(p):
    torch.manual_seed(0)
    kept = Dropout(p)(torch.ones(1000))
    assert (kept == 0).float().mean() > .99


def test_a_permutation_has_no_place_for_what_is_outside_of_it():
    for wrong in ([1000], [-1]):
        with pytest.raises(IndexError, match='indices must be in 0..999'): permute(np.array(wrong), 1000, 1)
    assert permute(np.array([], dtype=int), 1000, 1).size == 0
    assert sorted(permute(range(10), 10, 1)) == list(range(10))


def test_batches_need_a_micro_batch(data, recipe):
    left_open = override(recipe, ['batch.micro_batch_size=0'])
    with pytest.raises(UsageError, match='choose one for train_batches'):
        next(train_batches(open_data(data), left_open, 0))
