"The planner: arithmetic against torch's own count, and a measured rate in place of an assumed one"
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cramlit.core.recipes import CramlitError, UsageError, recipe_hash
from cramlit.core.scales import get_recipe
from cramlit.efficiency.planner import (
    GPUS,
    forward_flops,
    gpu_called,
    measured_ceiling,
    measured_rate,
    plan,
    training_flops,
)
from cramlit.model.encoder import MaskedLM
from cramlit.running.command import main
from cramlit.training import memory
from cramlit.training.distributed import World
from cramlit.training.memory import (
    NCCL,
    RESERVED,
    choose_micro_batch,
    gpu_memory,
    largest_share,
    largest_state,
    micro_batch_for,
    peak_memory,
    phases,
    room_for,
)


def run(capsys, *args):
    code = main(['plan', *args, '--json'])
    out, err = capsys.readouterr()
    return code, {r['metric']: r for r in map(json.loads, out.splitlines())}, err


SMALL = ['--recipe', '24hbert', '--scale', 'laptop']


def test_a_plan_is_printed_where_the_gpu_cannot_be_used(capsys, monkeypatch):
    def unusable(): raise CramlitError('their driver is older than it needs')
    monkeypatch.setattr('cramlit.core.devices.pick_device', unusable)
    code, row, err = run(capsys, *SMALL, '--gpu', 'titan-v')
    assert code == 0 and row['days'] and 'the plan is not checked on this machine: their driver' in err


def test_a_plan_by_a_gpu(capsys):
    args = '--gpu', 'titan-v', '--gpus', '2', '--budget', '12h', '--price', '0.5'
    code, row, err = run(capsys, *SMALL, *args)
    assert code == 0, err
    assert set(row) >= {'parameters', 'flops_per_token', 'peak_memory_bytes', 'micro_batch_size',
                        'tokens_per_second', 'steps', 'days', 'energy_kwh', 'cost'}
    assert row['days']['value'] == .5 and row['cost']['value'] == 12
    assert row['energy_kwh']['value'] == pytest.approx(2*12*.25)
    rate = row['tokens_per_second']
    assert rate['kind'] == 'planned' and 'MFU of 0.28' in rate['rests_on']
    assert row['parameters']['kind'] == 'computed'
    assert rate['value'] == pytest.approx(2*.28*110e12/row['flops_per_token']['value'])
    assert row['peak_memory_bytes']['value'] < 12*2**30


def test_the_parts_add_up():
    rows = plan(get_recipe('24hbert', 'laptop'), gpu=GPUS['titan-v'])
    def total(metric): return sum(r['value'] for r in rows if r['metric'] == metric)
    assert total('flops_per_token_part') == pytest.approx(total('flops_per_token'))
    assert total('peak_memory_part_bytes') == total('peak_memory_bytes') > 0


def test_a_plan_by_a_measured_rate(capsys, tmp_path):
    recipe = get_recipe('24hbert', 'laptop')
    ids = dict(stage='pretrain', recipe='24hbert', recipe_hash=recipe_hash(recipe), processes=2)
    rows = [dict(metric='tokens_per_second', value=v, unit='tokens/s', **ids) for v in (900., 1000., 5000.)]
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    code, row, err = run(capsys, *SMALL, '--measured', str(tmp_path/'rows.jsonl'), '--gpus', '4')
    assert code == 0, err
    rate = row['tokens_per_second']
    assert rate['value'] == 2000 and rate['rests_on'] == 'a measured rate'
    assert row['energy_kwh']['value'] is None and row['cost']['value'] is None
    code, _, err = run(capsys, '--scale', 'tiny', '--measured', str(tmp_path/'rows.jsonl'))
    assert code == 2 and 'was measured with 24hbert' in err and 'Traceback' not in err
    tokens = recipe.packing.seq_len*recipe.batch.global_batch_size
    assert row['steps']['value'] == pytest.approx(2000*86400/tokens)


def test_a_run_counts_tokens_without_padding_and_a_plan_with_it(tmp_path):
    recipe = get_recipe('24hbert', 'laptop')
    ids = dict(stage='pretrain', recipe='24hbert', recipe_hash=recipe_hash(recipe), processes=2)
    measured = dict(tokens_per_second=700., sequences_per_second=8.)
    rows = [dict(metric=k, value=v, unit='1/s', **ids) for k, v in measured.items()]
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert measured_rate(tmp_path/'rows.jsonl', recipe) == 4*recipe.packing.seq_len


@pytest.mark.parametrize('args, code, says', [
    ((), 2, 'name a GPU'), (('--gpu', 'titanv'), 2, "Did you mean 'titan-v'?"),
    (('--gpu', 'v100', '--mfu', '2'), 2, 'between 0 and 1'), (('--gpu', 'v100', '--gpus', '0'), 2, 'above 0'),
    (('--measured', 'nowhere.jsonl'), 1, 'nowhere.jsonl'),
    (('--gpu', 'v100', '--budget', 'soon'), 2, 'expected a duration'),
])
def test_mistakes(capsys, args, code, says):
    got, _, err = run(capsys, *SMALL, *args)
    assert got == code and says in err and 'Traceback' not in err


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    recipe, memory = get_recipe('24hbert', 'laptop'), 1.2e9
    n = room_for(recipe, 4096, memory)
    fits = [sum(peak_memory(recipe, 4096, size).values()) <= memory - .8e9 for size in (n, n + 8)]
    assert n > 8 and fits == [True, False]


def test_the_micro_batch_shares_out_the_global_batch():
    def micro(gpus):
        rows = plan(get_recipe('24hbert'), gpus, gpu=GPUS['titan-v'])
        return next(r['value'] for r in rows if r['metric'] == 'micro_batch_size')
    assert micro(8) == 32  # more would fit, and does not divide 512
    with pytest.raises(UsageError, match='cannot be shared out among 5 GPUs'): micro(5)


@pytest.mark.parametrize('name, matrices', [('24hbert', 2), ('modern', 3)])
def test_flops_by_hand(name, matrices):
    recipe = get_recipe(name, 'laptop', [
        'model.num_layers=2', 'model.hidden_size=4', 'model.num_heads=1', 'model.intermediate_size=8',
        'packing.seq_len=16', 'masking.rate=0.25', 'masking.max_predictions=9'])
    # queries, attention, its output, feed-forward: for all tokens, then for a quarter of them
    rest, head = 2*16 + 2*2*16*4 + 2*16 + 2*matrices*4*8, 2*16 + 2*4*100
    assert training_flops(recipe, 100) == pytest.approx(3*(2*2*2*16 + 1.25*rest + .25*head))
    assert training_flops(recipe, 100, last_layer=1.) == pytest.approx(3*(2*2*2*16 + 2*rest + .25*head))
    assert training_flops(recipe, 100, 1., 1.) == pytest.approx(3*(2*2*2*16 + 2*rest + head))


def test_the_flops_of_bert_large_as_they_are_quoted():
    parts = forward_flops(get_recipe('24hbert', 'paper'), 30528, last_layer=1., head=.15)
    attention = parts.pop('attention scores and weighted sum')
    head = parts.pop('head: transform') + parts.pop('head: decoder')
    assert [round(x/1e6, 1) for x in (sum(parts.values()), attention, head)] == [604., 12.6, 9.7]


@pytest.mark.parametrize('name, settings', [
    ('24hbert', []), ('bert-base', []), ('modern', []), ('modern', ['model.window=8']),
    ('cramming', ['model.num_layers=1'])])
def test_flops_as_torch_counts_them(name, settings):
    recipe = get_recipe(name, 'tiny', settings)
    ids = torch.zeros(2, 32, dtype=torch.int64)
    positions = torch.zeros(2, round(32*recipe.masking.rate), dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), counter, sdpa_kernel(SDPBackend.MATH):
        MaskedLM(recipe.model, 128)(ids, None, positions, positions).backward()
    assert counter.get_total_flops()/2/32 == pytest.approx(training_flops(recipe, 128))


def test_a_plan_of_the_modern_recipe():
    rows = {r['metric']: r['value'] for r in plan(get_recipe('modern'), 8, gpu=GPUS['titan-v'])}
    assert 3.2e8 < rows['parameters'] < 3.5e8 and rows['micro_batch_size'] >= 16


def test_every_gpu_has_a_source():
    assert all(g.source and g.tflops > 0 and g.watts > 0 for g in GPUS.values())
    with pytest.raises(UsageError): plan(get_recipe('24hbert', 'laptop'))


def test_the_share_of_the_busiest_gpu_by_hand():
    base = get_recipe('24hbert', 'gpu')
    share, every = largest_share(base, 30528, 8)
    assert every/8 < 14e6 and share == 30528*768, 'the embedding matrix is more than an eighth of the network'
    assert largest_share(base, 30528, 1) == (every, every)
    share, every = largest_share(get_recipe('24hbert'), 30528, 8)
    assert 1/8 <= share/every < 1/8 + .001, 'in the large one it is less'
    assert largest_state(base, 30528, 8) == (2*30528*768, 2*largest_share(base, 30528, 1)[0])
    modern = get_recipe('modern')
    state, whole = largest_state(modern, 30528, 8)
    share, every = largest_share(modern, 30528, 8)
    assert state/whole > 1.4*share/every, 'who owns the embeddings has two moments for each of them'


@pytest.fixture
def by_hand(monkeypatch):
    "One process has 335 parameters, of which the busiest of several GPUs updates 50"
    def peak(recipe, vocab_size, n, training=True):
        fixed = {'parameters': 1340, 'gradients': 1340, 'optimizer state': 2680, 'temporary': 0}
        return fixed | dict(activations=100*n if training else n)
    monkeypatch.setattr(memory, 'peak_memory', peak)
    monkeypatch.setattr(memory, 'largest_share', lambda recipe, vocab_size, gpus: (50, 335))
    monkeypatch.setattr(memory, 'largest_state', lambda recipe, vocab_size, gpus: (100, 670))


def test_what_is_on_a_gpu_by_hand(by_hand):
    recipe = get_recipe('24hbert')
    one, eight = gpu_memory(recipe, 128, 4), gpu_memory(recipe, 128, 4, 8)
    assert sum(one.values()) == 1340 + 1340 + 2680 + 400 + RESERVED
    assert NCCL == 671_088_640 == eight['NCCL'] and eight['optimizer state'] == 400
    # a message of 2 bytes for each of 335, 4 for each of 50 before the update; 400 of activations are gone
    assert eight['exchange'] == 670 + 200 - 400
    assert gpu_memory(recipe, 128, 16, 8)['exchange'] == 0, 'the activations took more'
    assert gpu_memory(recipe, 128, 4, 8, training=False)['exchange'] == 0
    steps = phases(recipe, 128, 4, 8)
    assert steps['resumed'] - steps['first step'] == 400, 'the moments'
    fixed = 2*1340 + 400 + NCCL + RESERVED
    assert steps['validation'] == fixed + 64, '64 sequences at least'
    assert phases(recipe, 128, 100, 8)['validation'] == fixed + 100


def test_room_is_what_a_gpu_has_left(by_hand):
    # 2 · 1340 + 2680 + 100 a sequence on one GPU; on eight 2 · 1340 + 400 + 100, and NCCL
    recipe = get_recipe('24hbert')
    assert room_for(recipe, 128, RESERVED + 5360 + 100*83) == 80
    assert room_for(recipe, 128, RESERVED + NCCL + 3080 + 100*83, 8) == 80
    assert room_for(recipe, 128, RESERVED) == 0


def test_the_paper_s_recipe_fits_into_12_and_11_gb_in_every_phase():
    recipe = get_recipe('24hbert')
    for gpus in (1, 8):
        for name in ('titan-v', '2080-ti'):
            assert max(phases(recipe, 30528, 32, gpus).values()) < GPUS[name].usable*2**30
    assert all(.9*g.memory < g.usable < g.memory for g in GPUS.values())


@pytest.mark.slow
@pytest.mark.parametrize('gpu', GPUS.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize('name', ['24hbert', 'modern'])
def test_the_largest_micro_batch_fits_in_every_phase(name, gpu):
    recipe, usable = get_recipe(name), gpu.usable*2**30
    for gpus in (1, 8):
        largest = micro_batch_for(recipe, 30528, usable, gpus)
        assert largest >= 16 and max(phases(recipe, 30528, largest, gpus).values()) < usable


def test_mfu_of_the_datasheet_and_of_the_ceiling(tmp_path):
    recipe = get_recipe('24hbert', 'laptop')
    def mfu(*args, **more):
        return {r['unit']: r['value'] for r in plan(recipe, 2, *args, **more) if r['metric'] == 'mfu'}
    each = 1000*training_flops(recipe, 4096)  # FLOP/s of a GPU that takes 1,000 tokens a second
    found = mfu(gpu=GPUS['titan-v'], rate=1000., ceiling=50e12)
    assert found == {'of the datasheet peak': pytest.approx(each/110e12),
                     'of the measured ceiling': pytest.approx(each/50e12)}
    assert mfu(gpu=GPUS['titan-v']) == {'of the datasheet peak': pytest.approx(.28),
                                        'of the measured ceiling': None}
    assert mfu(rate=1000.) == {'of the datasheet peak': None, 'of the measured ceiling': None}


def test_the_ceiling_of_a_plan_is_what_was_measured_in_16_bits(capsys, tmp_path):
    rows = [dict(metric='ceiling', value=v, unit='FLOP/s', precision=p)
            for p, v in (('fp32', 9e13), ('fp16', 5e13), ('bf16', None))]
    path = tmp_path/'rows.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    assert measured_ceiling(path) == 5e13
    code, row, err = run(capsys, *SMALL, '--gpu', 'titan-v', '--ceiling', str(path))
    assert code == 0 and row['mfu']['unit'] == 'of the measured ceiling', err
    assert row['mfu']['value'] == pytest.approx(.28*110e12/5e13)
    path.write_text(json.dumps(rows[0]) + '\n')
    with pytest.raises(CramlitError, match='holds no ceiling'): measured_ceiling(path)


def test_a_gpu_is_known_by_what_its_driver_calls_it():
    known = dict(zip(('NVIDIA TITAN V', 'NVIDIA GeForce RTX 2080 Ti', 'NVIDIA H100 80GB HBM3', 'NVIDIA H200'),
                     ('titan-v', '2080-ti', 'h100', 'h200'), strict=True))
    assert {name: gpu_called(name).name for name in known} == known
    assert gpu_called('2 × AMD EPYC') is None
    assert gpu_called(' + '.join(['NVIDIA H200']*8)).name == 'h200'
    for other in ('NVIDIA A100-SXM4-80GB MIG 1g.10gb', 'NVIDIA H100 96GB HBM3', 'NVIDIA A100-SXM-64GB',
                  'Tesla V100-FHHL-16GB', 'NVIDIA H100 80GB HBM3 + NVIDIA T4'):
        assert gpu_called(other) is None, other


def test_processes_on_one_gpu_share_its_memory(by_hand, monkeypatch):
    recipe = get_recipe('24hbert', overrides=['batch.micro_batch_size=0'])
    monkeypatch.setattr(memory, 'free_memory', lambda device: 2*(RESERVED + 5360 + 100*67))
    assert choose_micro_batch(recipe, 128, World(sharing=2)) == 64


def test_a_run_keeps_its_micro_batch_or_says_why_not(by_hand, monkeypatch, capsys):
    recipe = get_recipe('24hbert', overrides=['batch.micro_batch_size=0', 'batch.global_batch_size=192'])
    def chosen(earlier, memory_for):
        monkeypatch.setattr(memory, 'free_memory', lambda device: RESERVED + 5360 + 100*(memory_for + 3))
        return choose_micro_batch(recipe, 128, World(), earlier), capsys.readouterr().err
    assert chosen(0, 104) == (96, '') and chosen(24, 104) == (24, '')
    size, said = chosen(96, 48)
    assert size == 48 and 'micro-batch of 96 sequences no longer fits: from here on it is 48' in said
    size, said = chosen(80, 104)
    assert size == 96 and 'does not divide the share' in said
    with pytest.raises(UsageError, match='does not fit'): chosen(0, -3)
