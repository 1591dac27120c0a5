"The bench: every contender does the same work, rates follow from the parts, what cannot be timed says why"
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType

from cramlit.core.devices import Precision
from cramlit.core.recipes import CramlitError, override
from cramlit.core.results import provenance
from cramlit.core.scales import get_recipe
from cramlit.data.masking import IGNORE
from cramlit.data.packing import open_data
from cramlit.efficiency import benchmark as bench
from cramlit.efficiency.benchmark import (
    BATCHES,
    OtherLoss,
    PlainAttention,
    Timing,
    bench_rows,
    dense_head,
    lengthen,
    make_setup,
    our_step,
    our_steps,
    plain_kernels,
    plain_scores,
    speed_rows,
    step_rows,
    stock_steps,
    take_a_step,
    take_turns,
    text_batches,
    time_step,
    uncut,
    validation_row,
    whole_last_layer,
)
from cramlit.efficiency.planner import get_gpu, plan
from cramlit.model.encoder import SelfAttention, gather
from cramlit.model.kernels import Dropout
from cramlit.reporting import speed
from cramlit.reporting.speed import (
    best_stock,
    rate_of,
    table1,
    table2,
    write_bench,
    write_table1,
    write_table2,
)
from cramlit.reporting.tables import shown
from cramlit.running.command import main
from cramlit.training.optimizers import set_lr
from cramlit.training.schedule import lr_factor
from cramlit.training.training import update

CPU = torch.device('cpu')
FP32 = Precision(torch.float32, 'compared in full precision')
OFF = torch.amp.GradScaler(enabled=False)


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    real = bench.ceiling
    monkeypatch.setattr(bench, 'ceiling', lambda device, precision: real(device, precision, 256))


@pytest.fixture
def data(data):
    return open_data(data)


@pytest.fixture
def setup(recipe, data):
    torch.manual_seed(0)
    return make_setup(recipe, data.padded_vocab_size, CPU)


@pytest.fixture
def calm(recipe, data):
    "Without dropout, in full precision"
    torch.manual_seed(0)
    still = override(recipe, ['model.dropout=0', 'model.attention_dropout=0'])
    return replace(make_setup(still, data.padded_vocab_size, CPU), precision=FP32)


def gradient(setup, contender):
    contender.passes(contender.batches(0))
    return setup.grads.flat.clone()


def test_stock_is_the_same_network_and_its_passes_make_gradients(recipe, data, setup):
    contender = stock_steps(recipe, data, data.padded_vocab_size, CPU, compiled=False)['stock_default']()
    params = [p for group in contender.optimizer.param_groups for p in group['params']]
    ours = sum(p.numel() for p in setup.model.parameters())
    assert sum(p.numel() for p in params) == pytest.approx(ours, abs=300)
    assert [len(b.labels) for b in contender.batches(0)] == [8]*4
    contender.passes(contender.batches(0))
    contender.update()
    assert all(p.grad.norm() > 0 for p in params if p.grad is not None)
    assert sum(p.grad is not None for p in params) > 30


def test_timing_leaves_the_weights_where_they_are(setup, data):
    before = [p.clone() for p in setup.model.parameters()]
    time_step(our_step(setup, data), CPU, 0.)
    assert all(torch.equal(a, b) for a, b in zip(before, setup.model.parameters(), strict=True))


def test_an_optimiser_that_is_not_fused_is_timed_with_a_loss_scale_too(setup, data):
    half = replace(setup, precision=Precision(torch.float16, 'as on GPUs of 2018'))
    contender = bench.our_steps(half, data)[bench.WITHOUT + 'fused_optimiser']()
    contender.passes(contender.batches(0))
    contender.update()


def test_another_contender_that_does_not_fit_is_left_out_and_ours_is_an_error(setup, data):
    def too_large(): raise torch.OutOfMemoryError('CUDA out of memory')
    ours = partial(our_step, setup, data)
    taken, why = bench.take_turns(dict(stock_eager=too_large, ours=ours), CPU, 2, 0.)
    assert len(taken['ours']) == 2 and why == dict(stock_eager='OutOfMemoryError: CUDA out of memory')
    with pytest.raises(torch.OutOfMemoryError): bench.take_turns(dict(ours=too_large), CPU, 2, 0.)


def test_an_update_can_be_repeated(setup, data):
    contender = our_step(setup, data)
    gradient(setup, contender)
    for _ in range(5): contender.update()
    first = setup.grads.flat.clone()
    for _ in range(500): contender.update()
    assert torch.equal(setup.grads.flat, first) and first.norm() > 0


@pytest.mark.parametrize('make', [
    lambda model: OtherLoss(model, dense_head), lambda model: OtherLoss(model, whole_last_layer),
    lambda model: OtherLoss(plain_kernels(model), plain_scores)])
def test_every_model_has_the_same_gradient(make, calm, data):
    expected = gradient(calm, our_step(calm, data))
    got = gradient(calm, our_step(replace(calm, model=make(calm.model)), data))
    torch.testing.assert_close(got, expected, atol=1e-5*expected.abs().max().item(), rtol=1e-3)
    assert expected.norm() > 0


def test_plain_kernels_are_plain(setup):
    plain = plain_kernels(setup.model)
    def kinds(model): return {type(m) for m in model.modules()}
    assert {PlainAttention, torch.nn.Dropout} <= kinds(plain) and not {SelfAttention, Dropout} & kinds(plain)
    assert {id(p) for p in plain.parameters()} == {id(p) for p in setup.model.parameters()}
    assert {SelfAttention, Dropout} <= kinds(setup.model), 'the network itself stays as it was'


@pytest.mark.parametrize('name', ['24hbert', 'modern'])
def test_plain_kernels_of_every_kind_of_attention(name, data):
    own = ['model.window=8', 'model.num_layers=4'] if name == 'modern' else []
    still = ['model.dropout=0', 'model.attention_dropout=0', 'batch.micro_batch_size=8']
    r = get_recipe(name, 'tiny', [*own, *still])
    calm = replace(make_setup(r, data.padded_vocab_size, CPU), precision=FP32)
    expected = gradient(calm, our_step(calm, data))
    plain = replace(calm, model=OtherLoss(plain_kernels(calm.model), plain_scores))
    torch.testing.assert_close(gradient(calm, our_step(plain, data)), expected, atol=1e-5, rtol=1e-3)


def test_every_variant_sees_as_many_tokens(setup, data):
    made = {name: build() for name, build in our_steps(setup, data, compiled=False).items()}
    tokens = {name: c.recipe.batch.global_batch_size*c.recipe.packing.seq_len for name, c in made.items()}
    assert tokens.pop('ours_without_large_batches') == 8*32 and set(tokens.values()) == {32*32}
    unfused = made['ours_without_fused_optimiser'].optimizer
    assert not any(g['fused'] or g['foreach'] for g in unfused.param_groups)
    assert all(g['fused'] for g in setup.optimizer.param_groups)
    assert list(our_steps(setup, data, brief=True)) == ['ours']


def test_batches_from_text_and_longer_ones(recipe, data):
    batch = next(text_batches(data, recipe)(data, recipe, 0))
    assert batch.input_ids.shape == (32, 32) and (batch.labels >= 0).any()
    pad = data.manifest['special_ids']['pad']
    longer, long = lengthen(data, recipe, 4)
    text = [i for i in data.train[[4, 5, 6, 7]].ravel() if i != pad]
    assert list(longer.train[[1]][0]) == text + [pad]*(128 - len(text)) and long.packing.seq_len == 128
    shapes = {b.input_ids.shape for b in uncut(longer, long, 0)}
    assert shapes == {(8, 128)}


def test_steps_are_timed_in_part_or_whole(recipe, setup, data):
    often = replace(setup, recipe=override(recipe, ['batch.micro_batch_size=8']))
    assert [len(our_step(often, data, most=n).batches(0)) for n in (0, 1, 3)] == [4, 1, 3]
    assert our_step(often, data, most=1).recipe == often.recipe
    t = time_step(our_step(often, data, most=3), CPU, 0.)
    assert t.timed == 24 and t.kind() == 'projected' and t.kind(24) == 'measured'


def test_a_rate_is_the_sum_of_its_parts(recipe):
    t = Timing(recipe, .5, 2., 32)
    assert t.step(128) == 4*.5 + 2 and t.rate(128) == pytest.approx(128*32/(4*.5 + 2)) and t.step() == 2.5


def test_contenders_take_turns(recipe, monkeypatch):
    order = []
    def timed(name, *args):
        order.append(name)
        return Timing(recipe, 1., 1., 32)
    monkeypatch.setattr(bench, 'time_step', timed)
    taken, why = take_turns({'a': lambda: 'a', 'b': lambda: 'b'}, CPU, turns=2)
    assert ''.join(order) == 'abab' and [len(t) for t in taken.values()] == [2, 2] and not why


def test_what_cannot_be_compiled_is_left_out_with_the_reason_and_nothing_else_is(recipe):
    def broken(): raise RuntimeError('no compiler')
    with pytest.raises(RuntimeError): take_turns({'ours': broken}, CPU, turns=1)
    compiled = dict.fromkeys(['stock_compiled', 'ours_with_compilation'], broken)
    taken, why = take_turns(compiled, CPU, turns=2)
    assert not taken and why == dict.fromkeys(compiled, 'RuntimeError: no compiler')


def test_speed_rows_say_what_is_measured_and_what_is_projected(recipe, data, tmp_path):
    rows = []
    for name in ('bert-base', 'bert-large'):
        named = replace(recipe, name=name)
        rows += speed_rows(named, data, data.padded_vocab_size, CPU, dict(scale='tiny'), turns=1, least=0.)
    metrics = ('tokens_per_second', 'ms_per_step', 'days_for_256m_samples')
    assert {r['kind'] for r in rows if r['metric'] in metrics} == {'projected'}
    assert {r['kind'] for r in rows if r['metric'].startswith('seconds_per')} == {'measured'}
    at = {(r['recipe'], r.get('variant'), r['metric'], r.get('global_batch_size')): r['value'] for r in rows}
    for G in BATCHES:
        rate = at['bert-base', 'stock_default', 'tokens_per_second', G]
        days = at['bert-base', 'stock_default', 'days_for_256m_samples', G]
        assert days == pytest.approx(256e6*32/rate/86400)
    table = table1(rows)
    assert table.loc['BERT-large, batch 4096', 'published optimised, days'] == '2.74'
    assert table.loc['BERT-base, batch 256', 'published official, days'] == '5.85'
    assert table.loc['BERT-base, batch 128', 'published official, days'] == ''
    assert table.loc['BERT-base, batch 128', 'stock, tokens/s'].startswith('≈')
    assert '2 × 64' in write_table1(rows, tmp_path)[0].read_text()
    assert rate_of(rows, 'bert-large', 4000) == at['bert-large', 'ours', 'tokens_per_second', 4096]


def test_a_network_that_does_not_fit_is_left_out_with_the_reason(recipe, data, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, 'free_memory', lambda device: 1e6)
    large = replace(recipe, name='bert-large')
    rows = speed_rows(large, data, data.padded_vocab_size, CPU, dict(scale='tiny'))
    assert all(r['value'] is None and 'needs about' in r['why'] for r in rows)
    assert rate_of(rows, 'bert-large', 1) == 0
    assert 'stock default not timed, needs about' in write_table1(rows, tmp_path)[0].read_text()
    assert table1(rows).loc['BERT-large, batch 128', 'stock, tokens/s'] == ''


def test_savings_have_a_line_for_each_optimisation(setup, data, tmp_path):
    ids, V = dict(stage='savings', scale='tiny'), data.padded_vocab_size
    rows = bench_rows(our_steps(setup, data, compiled=False), data, V, CPU, ids, turns=1, least=0.)
    rows.append(validation_row(setup, data, 60., ids))
    found = [r for r in rows if r['metric'] == 'hours_of_24']
    hours = {r['variant'].removeprefix('ours_without_'): r['value'] for r in found}
    wanted = {'sparse_prediction', 'last_layer_cut', 'padding_cut', 'quick_operations', 'fused_optimiser',
              'large_micro_batches', 'large_batches', 'short_sequences', 'prepared_rows', 'sparse_validation'}
    assert wanted <= set(hours) <= wanted | {'mixed_precision'}
    times = {r['variant']: r['value'] for r in rows if r['metric'] == 'time_of_ours'}
    for name in wanted - {'sparse_validation'}:
        assert hours[name] == pytest.approx(bench.hours_gained(times[f'ours_without_{name}']))
    table = table2(rows)
    assert list(table.index)[0] == 'ours' and len(table) == len(hours) + 1
    for name in ('large batches (8 sequences a step)', 'short sequences (128 tokens a sequence)'):
        assert f'without {name}' in table.index
    found.sort(key=lambda r: -r['value'])
    assert list(table['hours of 24 gained'])[1:] == [shown(r, 1) for r in found]
    assert 'without sparse validation' in write_table2(rows, tmp_path)[0].read_text()


def test_a_reason_is_written_below_the_table(setup, data, tmp_path, monkeypatch):
    def broken(): raise RuntimeError('no compiler')
    contenders = our_steps(setup, data, brief=True) | {'ours_with_compilation': broken}
    ids = dict(stage='savings', scale='tiny')
    rows = bench_rows(contenders, data, data.padded_vocab_size, CPU, ids, turns=1, least=0.)
    text = write_table2(rows, tmp_path)[0].read_text()
    assert 'Not timed: ours with compilation, RuntimeError: no compiler.' in text


def test_more_of_something_gains_when_it_is_faster(recipe, data, monkeypatch):
    times = {'ours': 2., 'ours_with_compilation': 1., 'ours_without_sparse_prediction': 4.}
    def take(contenders, *_): return {n: [Timing(recipe, times.get(n, 2.), 0., 32)] for n in contenders}, {}
    monkeypatch.setattr(bench, 'take_turns', take)
    monkeypatch.setattr(bench, 'profiled', lambda *args: ({}, 1))
    rows = bench_rows(dict.fromkeys(times, lambda: None), data, data.padded_vocab_size, CPU, {})
    hours = {r['variant']: r['value'] for r in rows if r['metric'] == 'hours_of_24'}
    assert hours == {'ours_with_compilation': 12., 'ours_without_sparse_prediction': 12.}


def test_a_ratio_is_of_neighbours_in_time(recipe, data, monkeypatch):
    pace = iter((1., 1., 4., 4., 1., 1.)*2)  # slow in the middle of each turn

    def timed(contender, *_): return Timing(recipe, contender*next(pace), 0., 32)
    monkeypatch.setattr(bench, 'time_step', timed)
    monkeypatch.setattr(bench, 'profiled', lambda *args: ({}, 1))
    contenders = {n: lambda t=t: t for n, t in dict(stock_default=3., stock_eager=2., ours=1.).items()}
    contenders['ours_without_x'] = lambda: 1.5
    rows = bench_rows(contenders, data, data.padded_vocab_size, CPU, {}, turns=1)
    ratios = {r['variant']: r['value'] for r in rows if r['metric'] == 'time_of_ours'}
    assert ratios == dict(stock_default=3., stock_eager=2., ours_without_x=1.5)
    mine = next(r for r in rows if r['metric'] == 'seconds_per_micro_batch' and r['variant'] == 'ours')
    assert (mine['spread_low'], mine['spread_high']) == (1., 4.)


def test_a_way_that_cannot_be_compiled_leaves_the_others_their_times(recipe, monkeypatch):
    def build(): raise CramlitError('torch cannot compile this network here')
    times = {'ours': lambda: 1., 'stock_compiled': build, 'ours_without_x': build}
    monkeypatch.setattr(bench, 'time_step', lambda contender, *_: Timing(recipe, contender, 0., 32))
    taken, why = take_turns(times, CPU, 1)
    assert [*taken] == ['ours'] and [*why] == ['stock_compiled', 'ours_without_x']
    assert all('cannot compile' in said for said in why.values())
    with pytest.raises(CramlitError): take_turns({'ours': build}, CPU, 1)


def test_an_update_is_timed_when_it_is_one():
    "The first loss scales of float16 may be too large, and then nothing is updated"
    weight, scale, taken = torch.nn.Parameter(torch.ones(3)), [float('inf'), float('nan'), 1.], []
    def passes(batches): weight.grad = torch.full((3,), scale[min(len(taken), 2)])
    optimizer = torch.optim.SGD([weight], lr=0.)
    contender = bench.Contender(None, None, passes, lambda: taken.append(1), optimizer, None)
    take_a_step(contender, list)
    assert len(taken) == 3
    scale[2] = float('inf')
    with pytest.raises(CramlitError, match='16 steps were not finite'): take_a_step(contender, list)


def test_a_profiler_without_times_says_so(recipe, data, monkeypatch):
    setup = make_setup(recipe, data.padded_vocab_size, CPU)
    class Silent(bench.profile):
        def events(self): return []
    monkeypatch.setattr(bench, 'profile', Silent)
    with pytest.raises(CramlitError, match='has no times'): bench.profiled(our_step(setup, data), CPU)


def test_shares_are_of_the_time_of_all_operations(recipe, data, monkeypatch):
    "What is inside of an update or a loss belongs to it, whatever its name; times of a GPU are not the CPU's"
    def event(name, us, outer=None, device=DeviceType.CPU):
        return SimpleNamespace(name=name, cpu_parent=outer, device_type=device, self_cpu_time_total=us,
                               self_device_time_total=0., self_cpu_memory_usage=0,
                               time_range=SimpleNamespace(end=0.))
    update, loss = event('update', 2.), event('CrossEntropyBackward', 0.)
    events = [update, event('aten::mul_', 4., event('step', 0., update)), loss, event('aten::mm', 12., loss),
              event('aten::mm', 30.), event('aten::addmm', 20.), event('aten::native_layer_norm', 8.),
              event('aten::add', 24.), event('sgemm', 1000., device=DeviceType.CUDA)]
    class Known(bench.profile):
        def events(self): return events
    monkeypatch.setattr(bench, 'profile', Known)
    setup = make_setup(recipe, data.padded_vocab_size, CPU)
    shares, _ = bench.profiled(our_step(setup, data), CPU)
    expected = {'update': .06, 'loss': .12, 'matrix products': .5, 'norms and activations': .08, 'other': .24}
    assert shares == pytest.approx(dict.fromkeys([*bench.PARTS, 'other'], 0.) | expected)


@pytest.mark.parametrize('lost', [[3.], [3., 1.]])
def test_a_contender_that_can_be_timed_and_not_profiled_keeps_its_times(
        recipe, data, monkeypatch, tmp_path, lost):
    def profiled(contender, device):
        if contender in lost: raise torch.OutOfMemoryError('CUDA out of memory')
        return {'loss': .25, 'other': .75, 'zeroing': 0.}, 1000
    monkeypatch.setattr(bench, 'time_step', lambda contender, *_: Timing(recipe, contender, 0., 32))
    monkeypatch.setattr(bench, 'profiled', profiled)
    contenders = {'stock_default': lambda: 3., 'ours': lambda: 1.}
    ids = dict(shape='tiny', scale='tiny', stage='bench')
    rows = bench_rows(contenders, data, data.padded_vocab_size, CPU, ids, turns=1)
    text = write_bench(rows, tmp_path, 'cramlit bench')[0].read_text()
    assert 'Ours is 3.00 times as fast as stock as documented' in text
    assert 'Not profiled: stock default, OutOfMemoryError: CUDA out of memory.' in text
    assert ('Not profiled: ours' in text) == (1. in lost) == (not (tmp_path/'bench_tiny.svg').exists())


@pytest.mark.parametrize('failing, said', [
    (['stock_default'], 'Ours is 2.00 times as fast as stock at its best (stock eager)'),
    (['stock_default', 'stock_eager'], 'Not timed: stock default, OutOfMemoryError')])
def test_a_benchmark_that_failed_in_part_has_table_and_figure(
        recipe, data, monkeypatch, tmp_path, failing, said):
    monkeypatch.setattr(bench, 'time_step', lambda contender, *_: Timing(recipe, contender, 0., 32))
    monkeypatch.setattr(bench, 'profiled', lambda *args: ({'loss': .25, 'other': .75}, 1000))
    def too_large(): raise torch.OutOfMemoryError('CUDA out of memory')
    contenders = {'stock_default': lambda: 3., 'stock_eager': lambda: 2., 'ours': lambda: 1.}
    contenders |= dict.fromkeys(failing, too_large)
    ids = dict(shape='tiny', scale='tiny', stage='bench')
    rows = bench_rows(contenders, data, data.padded_vocab_size, CPU, ids, turns=2)
    files = write_bench(rows, tmp_path, 'cramlit bench --shape tiny')
    text = files[0].read_text()
    assert said in text and 'as documented' not in text.partition('Medians')[0]
    assert 'Made by `cramlit bench --shape tiny`.' in text and tmp_path/'bench_tiny.svg' in files
    named = [r | dict(recipe='bert-base') for r in rows if r['metric'] != 'ceiling']
    speeds = write_table1([r | dict(stage='speed', shape='12 × 768') for r in named], tmp_path)[0].read_text()
    assert 'stock default not timed, OutOfMemoryError: CUDA out of memory' in speeds
    assert f'ours 1 s for {recipe.batch.micro_batch_size} sequences' in speeds


def test_a_contender_that_fails_in_a_later_turn_is_left_out_whole(recipe, data, monkeypatch):
    timed = []

    def time_step(contender, *_):
        timed.append(contender)
        if contender == 3. and timed.count(3.) == 2: raise torch.OutOfMemoryError('CUDA out of memory')
        return Timing(recipe, contender, 0., 32)
    monkeypatch.setattr(bench, 'time_step', time_step)
    monkeypatch.setattr(bench, 'profiled', lambda *args: ({}, 1))
    contenders = {'stock_default': lambda: 3., 'stock_eager': lambda: 2., 'ours': lambda: 1.}
    rows = bench_rows(contenders, data, data.padded_vocab_size, CPU, {}, turns=3)
    assert {r['variant'] for r in rows if r['metric'] == 'time_of_ours'} == {'stock_eager'}
    assert next(r for r in rows if r.get('why'))['variant'] == 'stock_default'


def test_stock_at_its_best_is_the_best_of_all():
    times = dict(stock_default=3., stock_eager=3.5, stock_compiled=4., ours_without_x=1.)
    rows = [dict(metric='time_of_ours', variant=name, value=x) for name, x in times.items()]
    assert best_stock(rows)['variant'] == 'stock_default' and best_stock([]) is None


def test_several_devices_share_the_sequences_and_not_the_update(recipe, monkeypatch):
    provenance()  # asks for the names of the GPUs, and keeps them
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 8)
    rows = step_rows([Timing(recipe, .5, 2., 4096)], {}, [4096])
    rate = next(r for r in rows if r['metric'] == 'tokens_per_second')
    assert rate['value'] == pytest.approx(4096*32/(4096/8/32*.5 + 2)) and rate['kind'] == 'projected'


def test_kinds_look_different():
    row = dict(value=1., kind='measured')
    assert len({shown(row | dict(kind=k)) for k in ('measured', 'projected', 'planned')}) == 3


def test_parts_of_a_step_are_found_by_scope_and_name():
    def event(*names):
        e = None
        for name in reversed(names): e = SimpleNamespace(name=name, cpu_parent=e)
        return e
    def part(*names): return bench._part_of(event(*names))
    assert part('aten::mm') == 'matrix products' and part('aten::mm', 'update') == 'update'
    assert part('aten::softmax') == 'attention' and part('aten::softmax', '_SummedCrossEntropy') == 'loss'
    assert part('aten::_log_softmax') == part('aten::mul', 'LogSoftmaxBackward0') == 'loss'
    assert part('## Call CompiledFxGraph f3a ##') == 'fused by the compiler'
    assert part('CompiledFunctionBackward') == 'fused by the compiler'
    assert part('aten::native_layer_norm') == 'norms and activations' and part('aten::foo') == 'other'


@pytest.mark.parametrize('op', ['_efficient_attention_forward', '_efficient_attention_backward',
                                '_cudnn_attention_forward', '_flash_attention_backward',
                                '_scaled_dot_product_flash_attention_for_cpu'])
def test_the_operations_that_launch_kernels_of_attention_are_attention(op):
    event = SimpleNamespace(name=f'aten::{op}', cpu_parent=None)
    assert hasattr(torch.ops.aten, op) and bench._part_of(event) == 'attention'


def test_a_contender_keeps_no_moments_between_its_turns_on_a_gpu(recipe, data, monkeypatch):
    setup = make_setup(recipe, data.padded_vocab_size, CPU)
    stocks = bench.stock_steps(recipe, data, data.padded_vocab_size, CPU, most=1, compiled=False)
    stock = stocks['stock_eager']
    for build in (lambda: bench.our_step(setup, data, most=1), stock):
        contender = build()
        params = [p for group in contender.optimizer.param_groups for p in group['params']]
        for kind, kept in (('cpu', True), ('cuda', False)):
            with bench.turn_of(build, SimpleNamespace(type=kind)) as c: bench.time_step(c, CPU, 0.)
            assert bool(contender.optimizer.state) == kept
        gradients = [p.grad for p in params if p.grad is not None]
        assert not gradients if build is stock else gradients  # ours are views of one buffer
        with bench.turn_of(build, CPU) as c: bench.time_step(c, CPU, 0.)  # and the next turn makes them anew


def test_a_plan_is_checked_against_the_device(recipe, monkeypatch):
    rows = plan(recipe, 2, 60., rate=1000.)
    monkeypatch.setattr(bench, 'measured_step', lambda *a: (800., 50_000_000))
    found = {r['metric']: r['value'] for r in bench.check_plan(recipe, rows, CPU)}
    peak = next(r['value'] for r in rows if r['metric'] == 'peak_memory_bytes')
    other = plan(recipe, 1, 60., get_gpu('h200'))
    assert bench.check_plan(recipe, other, CPU) == []  # another GPU's plan is left alone
    assert found['plan_error_tokens_per_second'] == pytest.approx(25.)
    assert found['plan_error_peak_memory_bytes'] == pytest.approx(100*(peak/5e7 - 1))


def test_a_plan_that_does_not_fit_says_so(recipe, monkeypatch):
    def full(*args): raise torch.OutOfMemoryError
    monkeypatch.setattr(bench, 'measured_step', full)
    row, = bench.check_plan(recipe, plan(recipe, 1, 60., rate=1000.), CPU)
    assert row['value'] is None and 'does not fit' in row['why']


def curve(contender, setup, steps):
    "The training loss of each step under the recipe's schedule"
    losses = []
    for step in range(steps):
        set_lr(setup.optimizer, lr_factor(step/steps, setup.recipe.schedule.warmup))
        contender.passes(contender.batches(step))
        loss, *_ = setup.grads.all_reduce(0., False)
        losses.append(loss)
        update(setup.grads, setup.optimizer, OFF, setup.recipe.optim.clip)
    return np.array(losses)


def dense_loss(model, b):
    "Every position scored by torch's own operations, and the masked ones picked out of them"
    scores = gather(model.logits(b.input_ids, b.attention_mask), b.positions)
    return F.cross_entropy(scores.flatten(0, 1), b.labels.flatten(), ignore_index=IGNORE, reduction='sum')


def test_our_step_and_the_step_without_everything_have_one_loss_curve(recipe, data):
    quick = override(recipe, ['model.dropout=0', 'model.attention_dropout=0', 'batch.micro_batch_size=4'])
    naive = override(quick, ['batch.micro_batch_size=32'])
    made = []
    for r in (quick, naive):
        torch.manual_seed(0)
        made.append(replace(make_setup(r, data.padded_vocab_size, CPU), precision=FP32))
    dense = replace(made[1], model=OtherLoss(plain_kernels(made[1].model), dense_loss))
    for group in dense.optimizer.param_groups: group.update(fused=False, foreach=False)
    fast, plain = our_step(made[0], data), our_step(dense, data, uncut)
    widths = [b.input_ids.shape for step in range(20) for b in fast.batches(step)]
    assert (4, 16) in widths and (4, 32) in widths, 'cut and sorted'
    assert {b.input_ids.shape for b in plain.batches(0)} == {(32, 32)}, 'whole'
    a, b = curve(fast, made[0], 200), curve(plain, dense, 200)
    assert a[-1] < a[0] - .5, 'both should learn'
    assert abs(a[0]/b[0] - 1) < 1e-6
    # a tenth of it was seen: sums are made in other orders, and errors grow from step to step
    assert np.abs(a/b - 1).max() < 1e-4


def test_bench_writes_rows_that_agree_with_one_another(data, tmp_path, capsys, monkeypatch):
    folder = data.folder
    for steps in ('stock_steps', 'our_steps'):  # a compiler needs minutes
        monkeypatch.setattr(speed, steps, partial(getattr(bench, steps), compiled=False))
    out = tmp_path/'out'
    args = ['--shape', 'tiny', '--turns', '1', '--json', '--data', str(folder), '--out', str(out)]
    assert main(['bench', *args]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ids = {(r['stage'], r['shape'], r['scale'], r['recipe']) for r in rows}
    assert ids == {('bench', 'tiny', 'tiny', '24hbert')}
    at = {(r['metric'], r.get('variant')): r['value'] for r in rows if r['metric'] != 'share_of_step'}
    rate = {v: x for (m, v), x in at.items() if m == 'tokens_per_second'}
    left_out = {v.removeprefix('ours_without_') for v in rate if v.startswith('ours_without_')}
    assert left_out >= {'padding_cut', 'last_layer_cut', 'sparse_prediction', 'quick_operations',
                        'fused_optimiser', 'large_micro_batches', 'large_batches', 'short_sequences',
                        'prepared_rows'}
    assert {v for v in rate if not v.startswith('ours_without_')} == {'ours', 'stock_default', 'stock_eager'}
    tokens = 32*32e3  # of a step, in thousandths
    # everybody processes the same sequences; of ours there are several timings, whose medians may be means
    for name in set(rate) - {'ours', 'ours_without_large_batches'}:
        assert rate[name]*at['ms_per_step', name] == pytest.approx(tokens)
    for name in rate:
        assert at['mfu', name]/at['mfu', 'ours'] == pytest.approx(rate[name]/rate['ours'])
        assert at['peak_memory_bytes', name] > 0
        assert (name == 'ours') == (('time_of_ours', name) not in at)
    for name in ('ours', 'stock_default'):
        shares = {r['part']: r['value'] for r in rows
                  if r['metric'] == 'share_of_step' and r['variant'] == name}
        for part in ('matrix products', 'update', 'loss', 'embeddings'): assert shares[part] > 0
    suffixes = ('jsonl', 'md', 'tex', 'csv', 'svg', 'pdf')
    assert {p.name for p in out.iterdir()} == {f'bench_tiny.{x}' for x in suffixes}
    assert [json.loads(line) for line in (out/'bench_tiny.jsonl').read_text().splitlines()] == rows
    text = (out/'bench_tiny.md').read_text()
    assert 'as stock as documented' in text and 'without sparse prediction' in text
    assert f'on {torch.get_num_threads()} thread' in text
    assert 'Made by `cramlit bench --shape tiny --turns 1' in text


def test_a_brief_bench_makes_what_it_times_and_nothing_else(data, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, 'stock_steps', partial(bench.stock_steps, compiled=False))
    def unwanted(*args): raise AssertionError('made for nothing')
    for name in ('plain_kernels', 'text_batches', 'lengthen'): monkeypatch.setattr(bench, name, unwanted)
    rows = speed.bench_steps('tiny', 1, True, data.folder, tmp_path, [])
    assert {r['variant'] for r in rows if r.get('variant')} == {'stock_default', 'stock_eager', 'ours'}


@pytest.mark.parametrize('more, says', [
    (['--shape', 'laptpo'], "Did you mean 'laptop'?"), (['--turns', '0'], 'above zero')])
def test_bench_refuses_what_it_does_not_know(tmp_path, capsys, more, says):
    assert main(['bench', '--out', str(tmp_path/'out'), *more]) == 2
    assert says in capsys.readouterr().err and not (tmp_path/'out').exists()
