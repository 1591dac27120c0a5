"The planner: arithmetic against torch's own count, and a measured rate in place of an assumed one"
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cramlit.running.command import main
from cramlit.core.recipes import UsageError, recipe_hash
from cramlit.model.encoder import MaskedLM
from cramlit.efficiency.planner import CARDS, peak_memory, plan, room_for, training_flops
from cramlit.core.scales import get_recipe


def run(capsys, *args):
    code = main(['plan', *args, '--json'])
    out, err = capsys.readouterr()
    return code, {r['metric']: r for r in map(json.loads, out.splitlines())}, err


SMALL = ['--recipe', '24hbert', '--scale', 'laptop']


def test_a_plan_by_a_card(capsys):
    code, row, err = run(capsys, *SMALL, '--gpu', 'titan-v', '--gpus', '2', '--budget', '12h', '--price', '0.5')
    assert code == 0, err
    assert set(row) >= {'parameters', 'flops_per_token', 'peak_memory_bytes', 'micro_batch_size', 'tokens_per_second', 'steps', 'days', 'energy_kwh', 'cost'}
    assert row['days']['value'] == .5 and row['cost']['value'] == 12 and row['energy_kwh']['value'] == pytest.approx(2*12*.25)
    assert row['tokens_per_second']['kind'] == 'planned' and 'MFU of 0.28' in row['tokens_per_second']['rests_on'] and row['parameters']['kind'] == 'computed'
    assert row['tokens_per_second']['value'] == pytest.approx(2*.28*110e12/row['flops_per_token']['value'])
    assert row['peak_memory_bytes']['value'] < 12*2**30


def test_the_parts_add_up():
    rows = plan(get_recipe('24hbert', 'laptop'), card=CARDS['titan-v'])
    total = lambda metric: sum(r['value'] for r in rows if r['metric'] == metric)
    assert total('flops_per_token_part') == pytest.approx(total('flops_per_token')) and total('peak_memory_part_bytes') == total('peak_memory_bytes') > 0


def test_a_plan_by_a_measured_rate(capsys, tmp_path):
    ids = dict(stage='pretrain', recipe='24hbert', recipe_hash=recipe_hash(get_recipe('24hbert', 'laptop')), processes=2)
    rows = [dict(metric='tokens_per_second', value=v, unit='tokens/s', **ids) for v in (900., 1000., 5000.)]
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    code, row, err = run(capsys, *SMALL, '--measured', str(tmp_path/'rows.jsonl'), '--gpus', '4')
    assert code == 0, err
    assert row['tokens_per_second']['value'] == 2000 and row['tokens_per_second']['rests_on'] == 'a measured rate'
    assert row['energy_kwh']['value'] is None and row['cost']['value'] is None
    code, _, err = run(capsys, '--scale', 'tiny', '--measured', str(tmp_path/'rows.jsonl'))
    assert code == 2 and 'was measured with 24hbert' in err and 'Traceback' not in err
    recipe = get_recipe('24hbert', 'laptop')
    assert row['steps']['value'] == pytest.approx(2000*86400/recipe.packing.seq_len/recipe.batch.global_batch_size)


@pytest.mark.parametrize('args, code, says', [
    ((), 2, 'name a card'), (('--gpu', 'titanv'), 2, "Did you mean 'titan-v'?"), (('--gpu', 'v100', '--mfu', '2'), 2, 'between 0 and 1'),
    (('--gpu', 'v100', '--gpus', '0'), 2, 'above 0'), (('--measured', 'nowhere.jsonl'), 1, 'nowhere.jsonl'),
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
    value = lambda **more: {r['metric']: r['value'] for r in plan(get_recipe('24hbert'), card=CARDS['titan-v'], **more)}['micro_batch_size']
    assert value(gpus=8) == 32  # 40 would fit, and do not divide 512
    with pytest.raises(UsageError, match='cannot be shared out among 5 cards'): value(gpus=5)


@pytest.mark.parametrize('name, matrices', [('24hbert', 2), ('modern', 3)])
def test_operations_by_hand(name, matrices):
    recipe = get_recipe(name, 'laptop', ['model.num_layers=2', 'model.hidden_size=4', 'model.num_heads=1', 'model.intermediate_size=8',
                                         'packing.seq_len=16', 'masking.rate=0.25', 'masking.max_predictions=9'])
    rest = 2*16 + 2*2*16*4 + 2*16 + 2*matrices*4*8  # queries, attention, its output, feed-forward: for all tokens, then for a quarter of them
    assert training_flops(recipe, 100) == pytest.approx(3*(2*2*2*16 + 1.25*rest + .25*(2*16 + 2*4*100)))


@pytest.mark.parametrize('name, settings', [('24hbert', []), ('bert-base', []), ('modern', []), ('modern', ['model.window=8']), ('cramming', ['model.num_layers=1'])])
def test_operations_as_torch_counts_them(name, settings):
    recipe = get_recipe(name, 'tiny', settings)
    ids, positions = torch.zeros(2, 32, dtype=torch.int64), torch.zeros(2, round(32*recipe.masking.rate), dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        MaskedLM(recipe.model, 128)(ids, None, positions, positions).backward()
    assert counter.get_total_flops()/2/32 == pytest.approx(training_flops(recipe, 128))


def test_a_plan_of_the_modern_recipe():
    rows = {r['metric']: r['value'] for r in plan(get_recipe('modern'), 8, card=CARDS['titan-v'])}
    assert 3.2e8 < rows['parameters'] < 3.5e8 and rows['micro_batch_size'] >= 16


def test_every_card_has_a_source():
    assert all(c.source and c.tflops > 0 and c.watts > 0 for c in CARDS.values())
    with pytest.raises(UsageError): plan(get_recipe('24hbert', 'laptop'))
