"The bench: every variant does the same work, rates follow from the parts, and what cannot be timed says why"
import pytest
import torch

from cramlit.efficiency import benchmark as bench
from cramlit.efficiency.benchmark import BATCHES, Loop, Turn, alternate, endless, lengthen, make_parts, our_loop, plain_loop, speed_rows
from cramlit.data.packing import open_data
from cramlit.efficiency.planner import get_card, plan
from cramlit.core.devices import Precision
from cramlit.core.results import provenance
from cramlit.efficiency.benchmark import DenseHead, saving_rows, text_batches, without
from cramlit.training.training import summed_loss
from cramlit.reporting.tables import shown, table1, table2, write_table1

CPU = torch.device('cpu')
FP32 = Precision(torch.float32, 'compared in full precision')


@pytest.fixture
def data(data):
    return open_data(data)


@pytest.fixture
def parts(recipe, data):
    torch.manual_seed(0)
    return make_parts(recipe, data.padded_vocab_size, CPU)


def test_the_plain_loop_trains_the_same_network(recipe, data):
    torch.manual_seed(0)
    loop = plain_loop(recipe, data, data.padded_vocab_size, CPU)
    model = next(c.cell_contents for c in loop.micro.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    before = [p.clone() for p in model.parameters()]
    assert sum(p.numel() for p in before) == pytest.approx(sum(p.numel() for p in make_parts(recipe, data.padded_vocab_size, CPU).model.parameters()), abs=300)
    loop.micro(); loop.update()
    assert any((a != b).any() for a, b in zip(before, model.parameters(), strict=True))


def test_fused_or_not_the_gradient_is_the_same(parts, recipe, data):
    parts.model.eval()
    grads = []
    for fused in (True, False):
        parts.grads.buffer.zero_()
        our_loop(parts, endless(data, recipe), fused).micro()
        grads.append(parts.grads.flat.clone())
    assert torch.allclose(*grads, atol=2e-2*grads[0].abs().max()) and grads[0].abs().max() > 0


def test_the_dense_head_has_the_same_loss(parts, recipe, data):
    parts.model.eval()
    batch = next(endless(data, recipe))
    assert summed_loss(DenseHead(parts.model), batch, FP32)[0].item() == pytest.approx(summed_loss(parts.model, batch, FP32)[0].item(), rel=1e-5)


def test_every_variant_sees_as_many_tokens(parts, recipe, data):
    tokens = {name: build().recipe.batch.micro_batch_size*build().recipe.packing.seq_len for name, build in without(parts, data).items()}
    large = next(n for n in tokens if n.startswith('large batches'))
    assert tokens.pop(large) == 8*32 and set(tokens.values()) == {32*32}
    batch = next(text_batches(data, recipe))
    assert batch.input_ids.shape == (32, 32) and (batch.labels >= 0).any()
    longer, long = lengthen(data, recipe, 4)
    assert torch.equal(torch.from_numpy(longer.train[[1]][0]), torch.from_numpy(data.train[[4, 5, 6, 7]].ravel())) and long.packing.seq_len == 128


def test_a_rate_is_the_sum_of_its_parts(recipe):
    assert Turn(recipe, .5, 2.).rate(128) == pytest.approx(128*32/(4*.5 + 2))


def test_loops_take_turns(recipe):
    order = []
    def build(name): return lambda: Loop(lambda: order.append(name), lambda: None, recipe)
    alternate({'a': build('a'), 'b': build('b')}, CPU, turns=2, repeats=1)
    assert ''.join(order) == 'aabbaabb'  # one to warm up, one that counts


def test_speed_rows_say_what_is_measured_and_what_is_projected(recipe, data, tmp_path):
    from dataclasses import replace
    rows = [r for name in ('bert-base', 'bert-large') for r in speed_rows(replace(recipe, name=name), data, data.padded_vocab_size, CPU, dict(scale='tiny'), turns=1)]
    kinds = {r['metric']: r['kind'] for r in rows}
    assert kinds == dict(seconds_per_micro_batch='measured', seconds_per_update='measured', tokens_per_second='projected', days_for_256m_samples='projected')
    at = {(r['variant'], r['metric'], r.get('global_batch_size')): r['value'] for r in rows}
    for G in BATCHES: assert at['plain', 'days_for_256m_samples', G] == pytest.approx(256e6*128/at['plain', 'tokens_per_second', G]/86400)
    table = table1(rows)
    assert table.loc['BERT-large, batch 4096', 'published optimised, days'] == '2.74' and table.loc['BERT-base, batch 256', 'published official, days'] == '5.85'
    assert table.loc['BERT-base, batch 128', 'published official, days'] == '' and table.loc['BERT-base, batch 128', 'plain, tokens/s'].startswith('≈')
    assert '2 × 64' in write_table1(rows, tmp_path)[0].read_text()


def test_a_network_that_does_not_fit_is_left_out_with_the_reason(recipe, data, monkeypatch, tmp_path):
    from dataclasses import replace
    monkeypatch.setattr(bench, 'free_memory', lambda device: 1e6)
    rows = speed_rows(replace(recipe, name='bert-large'), data, data.padded_vocab_size, CPU, dict(scale='tiny'))
    assert all(r['value'] is None and 'needs about' in r['why'] for r in rows)
    assert 'BERT-large was not timed' in write_table1(rows, tmp_path)[0].read_text() and table1(rows).loc['BERT-large, batch 128', 'plain, days'] == ''


def test_savings_have_a_line_for_each_optimisation(recipe, data):
    rows = saving_rows(recipe, data, CPU, 60., dict(scale='tiny'), compiled=False, turns=1)
    hours = {r['optimisation']: r for r in rows if r['metric'] == 'hours_of_24'}
    for name in ('sparse prediction', 'fused attention and optimiser', 'rows prepared and in memory', 'large batches', 'short rows', 'sparse validation'):
        assert any(n.startswith(name) for n in hours), name
    rate = {r['optimisation']: r['value'] for r in rows if r['metric'] == 'tokens_per_second'}
    assert hours['sparse prediction']['value'] == pytest.approx(24*(1 - rate['sparse prediction']/rate['']))
    assert list(table2(rows).index)[0] == 'the complete loop' and len(table2(rows)) == len(hours) + 1


def test_without_a_compiler_the_compiled_step_is_left_out_with_the_reason(recipe, data, monkeypatch, tmp_path):
    from cramlit.reporting.tables import write_table2
    class Broken(torch.nn.Module):
        def forward(self, *batch): raise RuntimeError('no compiler')
    monkeypatch.setattr(torch, 'compile', lambda model: Broken())
    rows = saving_rows(recipe, data, CPU, 60., dict(scale='tiny'), compiled=True, turns=1)
    text = write_table2(rows, tmp_path)[0].read_text()
    assert 'Not timed: compiled step, RuntimeError: no compiler.' in text and 'sparse prediction' in text


def test_several_devices_share_the_rows_and_not_the_update(recipe, data, monkeypatch):
    provenance()  # asks for the names of the cards, and keeps them
    turn = Turn(recipe, .5, 2.)
    monkeypatch.setattr(bench, 'alternate', lambda *a: {'cramlit': [turn]})
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    rows = speed_rows(recipe, data, data.padded_vocab_size, CPU, {})
    rate = next(r['value'] for r in rows if r['metric'] == 'tokens_per_second' and r['global_batch_size'] == 4096)
    assert rate == pytest.approx(4096*32/(4096/8/32*.5 + 2)) and turn.together() == pytest.approx(8*4*32/(4/32*.5 + 2))


def test_kinds_look_different():
    row = dict(value=1., kind='measured')
    assert len({shown(row | dict(kind=k)) for k in ('measured', 'projected', 'planned')}) == 3


def test_a_plan_is_checked_against_the_device(recipe, monkeypatch):
    rows = plan(recipe, 2, 60., rate=1000.)
    monkeypatch.setattr(bench, 'measured_step', lambda *a: (800., 50_000_000))
    found = {r['metric']: r['value'] for r in bench.check_plan(recipe, rows, CPU)}
    peak = next(r['value'] for r in rows if r['metric'] == 'peak_memory_bytes')
    other = plan(recipe, 1, 60., get_card('h200'))
    assert bench.check_plan(recipe, other, CPU) == []  # another card's plan is left alone
    assert found['plan_error_tokens_per_second'] == pytest.approx(25.) and found['plan_error_peak_memory_bytes'] == pytest.approx(100*(peak/5e7 - 1))
