"The fast path: as quick as it is, it computes the same, asks for nothing, and meets no shape that it does not know"
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cramlit.core.devices import Precision
from cramlit.core.recipes import override
from cramlit.core.scales import get_recipe
from cramlit.data.batches import train_batches
from cramlit.data.corpus import Document, documents
from cramlit.data.masking import IGNORE, count_predictions
from cramlit.data.packing import open_data, prepare
from cramlit.data.tokenizer import encode_documents, load_tokenizer, sentences
from cramlit.efficiency import benchmark as bench
from cramlit.efficiency.benchmark import OtherLoss, dense_head, make_setup, our_step, plain_kernels, uncut
from cramlit.model.encoder import MaskedLM
from cramlit.reporting import speed
from cramlit.running.command import main
from cramlit.training import training as train
from cramlit.training.distributed import Gradients, World
from cramlit.training.optimizers import set_lr
from cramlit.training.schedule import lr_factor
from cramlit.training.training import accumulate, micro_step, update

CPU = torch.device('cpu')
FP32 = Precision(torch.float32, 'compared in full precision')
OFF = torch.amp.GradScaler(enabled=False)
NO_DROPOUT = ['model.dropout=0', 'model.attention_dropout=0']


@pytest.fixture(scope='module')
def opened(data):
    return open_data(data)


def curve(contender, setup, steps):
    "The training loss of each step under the recipe's schedule"
    losses = []
    for step in range(steps):
        set_lr(setup.optimizer, lr_factor(step/steps, setup.recipe.schedule.warmup))
        contender.passes(contender.batches(step))
        loss, _, _ = setup.grads.all_reduce(World(), 0., False)
        losses.append(loss)
        update(setup.grads, setup.optimizer, OFF, setup.recipe.optim.clip)
    return np.array(losses)


def test_the_fast_and_the_naive_way_have_one_loss_curve(recipe, opened):
    quick = override(recipe, [*NO_DROPOUT, 'batch.micro_batch_size=8'])
    naive = override(quick, ['batch.micro_batch_size=32'])
    made = []
    for r in (quick, naive):
        torch.manual_seed(0)
        made.append(replace(make_setup(r, opened.padded_vocab_size, CPU), precision=FP32))
    dense = replace(made[1], model=OtherLoss(plain_kernels(made[1].model), dense_head))
    for group in dense.optimizer.param_groups: group.update(fused=False, foreach=False)
    fast, plain = our_step(made[0], opened), our_step(dense, opened, uncut)
    widths = [b.input_ids.shape for step in range(20) for b in fast.batches(step)]
    assert (8, 16) in widths and (8, 32) in widths, 'cut and sorted'
    assert {b.input_ids.shape for b in plain.batches(0)} == {(32, 32)}, 'whole'
    a, b = curve(fast, made[0], 200), curve(plain, dense, 200)
    assert a[-1] < a[0] - .5, 'both should learn'
    assert abs(a[0]/b[0] - 1) < 1e-6
    assert np.abs(a/b - 1).max() < 1e-4, 'a tenth of it was seen: sums are made in other orders, and errors grow from step to step'


class NothingAsked(TorchDispatchMode):
    "Whatever a host does with a value, it must read it first"
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), f'{op} makes the host wait'
        return op(*args, **(kwargs or {}))


@pytest.fixture
def read(monkeypatch):
    "Readings that pass by the dispatcher when a tensor is on the CPU already, by name as they happen"
    seen = []
    for name in ('tolist', 'numpy', 'cpu', '__array__'):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, name=name, real=real, **kw: (seen.append(name), real(self, *args, **kw))[1])
    return seen


@pytest.mark.parametrize('name, settings', [('24hbert', []), ('bert-base', []), ('modern', []), ('modern', ['model.window=8', 'model.num_layers=4']), ('mosaicbert', [])])
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
    read.clear()
    with NothingAsked(): loss = train.validate(MaskedLM(r.model, opened.padded_vocab_size), opened, r, FP32, World())
    assert read == ['tolist'] and 4 < loss < 6


def foreseen_forms(r):
    "Whole rows without a mask, and rows cut at multiples of 16 with one"
    B, S, K = r.batch.micro_batch_size, r.packing.seq_len, int(count_predictions(r.packing.seq_len, r.masking))
    widths = {min(S, -(-w//16)*16) for w in range(1, S + 1)}
    shapes = [(torch.Size([B, S]), True), *((torch.Size([B, w]), False) for w in widths)]
    return {(shape, whole, torch.Size([B, K]), torch.Size([B, K])) for shape, whole in shapes}


def forms(batches):
    return {(b.input_ids.shape, b.attention_mask is None, b.positions.shape, b.labels.shape) for b in batches}


@pytest.mark.parametrize('mode, seq_len', [('document', 24), ('document', 32), ('document', 50), ('stream', 24), ('stream', 32)])
def test_no_batch_has_a_shape_that_was_not_foreseen(mode, seq_len, recipe, data, tmp_path):
    r = override(recipe, [f'packing.mode={mode}', f'packing.seq_len={seq_len}', f'tokenizer.path={data}/tokenizer', 'batch.micro_batch_size=4'])
    prepare(r, tmp_path/'data')
    d, foreseen = open_data(tmp_path/'data'), foreseen_forms(r)
    batches = [b for step in range(40) for b in train_batches(d, r, step)]
    assert forms(batches) <= foreseen
    assert len({b.positions.shape for b in batches}) == 1
    assert all(b.attention_mask is None or b.attention_mask.shape == b.input_ids.shape for b in batches)
    met = {(b.input_ids.shape[1], b.attention_mask is None) for b in batches}
    assert met == {(seq_len, True)} if mode == 'stream' else {(16, False), (seq_len, False)} <= met


def rows_of(batches, model):
    "What is asked in each row, and what is answered: masked words, positions and labels → scores"
    found = {}
    for b in batches:
        with torch.no_grad(): scores = model.logits(b.input_ids, b.attention_mask, b.positions)
        for i, ids in enumerate(b.input_ids):
            text = ids if b.attention_mask is None else ids[b.attention_mask[i]]
            key = tuple(text.tolist()), tuple(b.positions[i].tolist()), tuple(b.labels[i].tolist())
            found.setdefault(key, []).append(scores[i][b.labels[i] != IGNORE])
    return found


@pytest.mark.parametrize('name', ['24hbert', 'modern'])
def test_a_row_has_the_same_masks_and_scores_however_it_is_cut(name, opened):
    r = get_recipe(name, 'tiny', ['model.window=8', 'model.num_layers=4'] if name == 'modern' else [])
    torch.manual_seed(0)
    model = MaskedLM(r.model, opened.padded_vocab_size).eval()
    nn.init.normal_(model.embeddings.word.weight, std=.2)  # scores that differ enough to be compared
    whole = rows_of(uncut(opened, r, 1), model)
    assert sum(map(len, whole.values())) == 32
    for size in (2, 8, 32):
        for world in (1, 2) if size < 32 else (1,):
            cut = override(r, [f'batch.micro_batch_size={size}'])
            batches = [b for rank in range(world) for b in train_batches(opened, cut, 1, rank, world)]
            mine = rows_of(batches, model)
            assert mine.keys() == whole.keys()
            for key in whole: torch.testing.assert_close(mine[key], whole[key], atol=1e-5, rtol=1e-4)


def test_bench_writes_rows_that_agree_with_one_another(data, tmp_path, capsys, monkeypatch):
    for steps in ('stock_steps', 'our_steps'):  # a compiler needs minutes
        monkeypatch.setattr(speed, steps, partial(getattr(bench, steps), compiled=False))
    monkeypatch.setattr(bench, 'ceiling', partial(bench.ceiling, n=512))
    out = tmp_path/'out'
    args = ['--shape', 'tiny', '--turns', '1', '--json', '--data', str(data), '--out', str(out)]
    assert main(['bench', *args]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ids = {(r['stage'], r['shape'], r['scale'], r['recipe']) for r in rows}
    assert ids == {('bench', 'tiny', 'tiny', '24hbert')}
    at = {(r['metric'], r.get('variant')): r['value'] for r in rows if r['metric'] != 'share_of_step'}
    rate = {v: x for (m, v), x in at.items() if m == 'tokens_per_second'}
    left_out = {v.removeprefix('ours_without_') for v in rate if v.startswith('ours_without_')}
    assert left_out >= {'padding_cut', 'last_layer_cut', 'sparse_prediction', 'quick_operations', 'fused_optimiser',
                        'large_micro_batches', 'large_batches', 'short_sequences', 'prepared_rows'}
    assert {v for v in rate if not v.startswith('ours_without_')} == {'ours', 'stock_default', 'stock_eager'}
    tokens = 32*32e3  # of a step, in thousandths
    for name in set(rate) - {'ours_without_large_batches'}:
        assert rate[name]*at['ms_per_step', name] == pytest.approx(tokens), 'everybody processes the same sequences'
    for name in rate:
        assert at['mfu', name]/at['mfu', 'ours'] == pytest.approx(rate[name]/rate['ours'])
        assert at['peak_memory_bytes', name] > 0
        if name != 'ours': assert at['time_of_ours', name] == pytest.approx(rate['ours']/rate[name])
    for name in ('ours', 'stock_default'):
        shares = [r['value'] for r in rows if r['metric'] == 'share_of_step' and r['variant'] == name]
        assert sum(shares) == pytest.approx(1)
    assert {p.name for p in out.iterdir()} == {f'bench_tiny.{x}' for x in ('jsonl', 'md', 'tex', 'csv', 'svg', 'pdf')}
    assert [json.loads(line) for line in (out/'bench_tiny.jsonl').read_text().splitlines()] == rows
    text = (out/'bench_tiny.md').read_text()
    assert 'as stock as documented' in text and 'without sparse prediction' in text


def test_a_brief_bench_makes_what_it_times_and_nothing_else(data, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, 'stock_steps', partial(bench.stock_steps, compiled=False))
    monkeypatch.setattr(bench, 'ceiling', partial(bench.ceiling, n=512))
    def unwanted(*args): raise AssertionError('made for nothing')
    for name in ('plain_kernels', 'text_batches', 'lengthen'): monkeypatch.setattr(bench, name, unwanted)
    rows = speed.bench_steps('tiny', 1, True, data, tmp_path, [])
    assert {r['variant'] for r in rows if r.get('variant')} == {'stock_default', 'stock_eager', 'ours'}


@pytest.mark.parametrize('more, says', [(['--shape', 'laptpo'], "Did you mean 'laptop'?"), (['--turns', '0'], 'above zero')])
def test_bench_refuses_what_it_does_not_know(tmp_path, capsys, more, says):
    assert main(['bench', '--out', str(tmp_path/'out'), *more]) == 2
    assert says in capsys.readouterr().err and not (tmp_path/'out').exists()


def test_documents_tokenised_whole_are_their_sentences_tokenised_one_by_one(text, data):
    tok, docs = load_tokenizer(data/'tokenizer'), list(documents(str(text)))*3  # more than are taken at a time
    expected = [[tok(s, add_special_tokens=False).input_ids for s in sentences(d.text)] for d in docs]
    got = list(encode_documents(docs, tok))
    assert len(docs) > 128 and [d for d, _ in got] == docs and [p for _, p in got] == expected


def test_a_text_may_name_special_tokens(data):
    tok = load_tokenizer(data/'tokenizer')
    plain, named, last = ('The stone house. A river sees people.', 'The stone [SEP] house. A [SEP] river sees people.', 'Cold light.')
    (_, a), (_, b), (_, c) = encode_documents([Document('0', plain), Document('1', named), Document('2', last)], tok)
    assert [i for piece in a for i in piece] == [i for piece in b for i in piece], 'the separator is not part of any sentence'
    assert c == [tok(last, add_special_tokens=False).input_ids], 'what follows is not shifted'


def test_a_tokenizer_that_would_truncate_does_not(recipe, data, tmp_path):
    tok = load_tokenizer(data/'tokenizer')
    tok.backend_tokenizer.enable_truncation(8); tok.backend_tokenizer.enable_padding(length=500)
    tok.backend_tokenizer.save(str(tmp_path/'tokenizer.json'))
    load_tokenizer(data/'tokenizer').save_pretrained(tmp_path/'cut')
    (tmp_path/'tokenizer.json').replace(tmp_path/'cut'/'tokenizer.json')
    assert json.loads((tmp_path/'cut'/'tokenizer.json').read_text())['truncation']['max_length'] == 8
    made = prepare(override(recipe, [f"tokenizer.path={tmp_path/'cut'}"]), tmp_path/'data')
    assert made['splits'] == open_data(data).manifest['splits']
