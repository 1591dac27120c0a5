"Ideas and their laboratory: nothing changed is nothing changed, what is passed by is passed by, and a study goes on"
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_config

import cramlit.experiments.ideas as ideas
import cramlit.experiments.laboratory as laboratory
from cramlit.reporting.beyond import ideas_table, write_ideas
from cramlit.core.recipes import UsageError, validate
from cramlit.experiments.ideas import BASELINE, IDEAS, PLAIN, WINDOW, Idea, body, cut_to, hidden_and_half, skipping, visible, within_window
from cramlit.experiments.laboratory import Experiment, experiment, half_as_wide, idea_trials, train_with, try_ideas
from cramlit.data.batches import Batch, train_batches
from cramlit.data.masking import IGNORE, count_predictions
from cramlit.model.encoder import MaskedLM, gather
from cramlit.data.packing import open_data, prepare
from cramlit.core.devices import Precision
from cramlit.core.scales import RECIPES, SCALES, get_recipe
from cramlit.training.schedule import Clock
from cramlit.training.training import pretrain
from cramlit.training.training import validate as validation_loss

FLOAT = Precision(torch.float32, 'exact')
SMALL = 'corpus.holdout=0.1', 'tokenizer.vocab_size=128', 'validation.max_sequences=64', 'validation.every=0.25'
V = 128


@pytest.fixture(scope='module')
def modern(text):
    return get_recipe('modern', 'tiny', [f'corpus.source={text}', *SMALL])


@pytest.fixture(scope='module')
def rows(modern, tmp_path_factory):
    folder = tmp_path_factory.mktemp('stream')/'data'
    prepare(modern, folder)
    return folder


@pytest.fixture
def exactly(monkeypatch):
    "Both loops in float32"
    for module in ('cramlit.training.training', 'cramlit.experiments.laboratory', 'cramlit.training.optimizers'): monkeypatch.setattr(f'{module}.choose_precision', lambda device: FLOAT)


def network(cfg, seed=0):
    torch.manual_seed(seed)
    return MaskedLM(cfg, V).double().eval()


def questions(S=32, K=9, B=8, padding=False):
    "A batch of random words with K of each row hidden, as arguments of the network"
    g = torch.Generator().manual_seed(1)
    ids, positions = torch.randint(5, V, (B, S), generator=g), torch.stack([torch.randperm(S - 8, generator=g)[:K] for _ in range(B)])
    mask = torch.arange(S).expand(B, S) < S - 8*(torch.arange(B)[:, None] % 2) if padding else None
    return ids.scatter(1, positions, 4), mask, positions, ids.gather(1, positions)


def logs(run):
    return pd.read_json(run/'metrics.jsonl', lines=True)


@pytest.mark.parametrize('settings', [(), ('batch.micro_batch_size=8',), ('optim.clip=0.5', 'optim.method=adamw', 'schedule.length=2')], ids=str)
def test_the_baseline_is_pretraining(rows, modern, text, tmp_path, exactly, settings):
    r = get_recipe('modern', 'tiny', [f'corpus.source={text}', *SMALL, *settings])
    pretrain(r, rows, tmp_path/'run', steps=40)
    found = {row['metric']: row['value'] for row in experiment(IDEAS[BASELINE], r, rows, tmp_path/'idea', steps=40, scale='tiny')}
    ours, theirs = (logs(tmp_path/n)[['step', 'tokens', 'loss', 'lr', 'validation_loss']] for n in ('idea', 'run'))
    pd.testing.assert_frame_equal(ours, theirs, rtol=1e-6, atol=0)
    assert ours.loss.notna().sum() == 2 and ours.validation_loss.notna().sum() == 5
    assert found['validation_loss'] == pytest.approx(ours.validation_loss.iloc[-1], rel=1e-9) and found['tokens'] == 40*32*32 and found['steps'] == 40


def test_the_baseline_is_pretraining_with_dropout_and_padding_too(data, recipe, tmp_path, exactly):
    pretrain(recipe, data, tmp_path/'run', steps=20)
    experiment(IDEAS[BASELINE], recipe, data, tmp_path/'idea', steps=20)
    pd.testing.assert_series_equal(logs(tmp_path/'idea').loss, logs(tmp_path/'run').loss, rtol=1e-6)


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_stays_one_at_every_moment_and_ends_as_itself(name, scale):
    r = get_recipe(name, scale)
    for change in (ideas.mask_less, ideas.grow_batch, ideas.grow_rows, ideas.more_candidates):
        for f in np.linspace(0, .999, 50): validate(change(r, f))
    G, S, K = r.batch.global_batch_size, r.packing.seq_len, r.masking.rate
    assert np.mean([ideas.mask_less(r, f).masking.rate for f in np.linspace(0, 1, 101)]) == pytest.approx(K)
    assert int(count_predictions(S, ideas.mask_less(r, 0.).masking)) == round(1.5*K*S)
    assert [ideas.grow_batch(r, f).batch.global_batch_size for f in (0, .3, .34, .6, .67, .99)] == [G//4]*2 + [G//2]*2 + [G]*2
    assert ideas.grow_rows(r, .67) is r and ideas.grow_rows(r, .6).packing.seq_len == S//2 and ideas.grow_rows(r, .6).batch.global_batch_size == 2*G
    assert ideas.more_candidates(r, 0.).batch.global_batch_size == 3*G//2


def test_all_ideas_end_with_the_recipes_own_forward_pass(modern):
    model = network(modern.model)
    for idea in IDEAS.values():
        for f in (PLAIN, .9, 1.): assert idea.model(model, f) is model
    early = [n for n, idea in IDEAS.items() if idea.model(model, .49) is not model]
    assert early == ['[MASK] later', 'tokens dropped midway', 'short window first']
    assert IDEAS['short window first'].model(model, .5) is model and IDEAS['[MASK] later'].model(model, .79) is not model


@pytest.mark.parametrize('name,settings', [('24hbert', ()), ('bert-base', ()), ('modern', ()), ('modern', ('model.window=8', 'model.global_every=2'))])
@pytest.mark.parametrize('padding', [False, True])
def test_nobody_left_out_is_the_plain_forward_pass(name, settings, padding):
    model, q = network(get_recipe(name, 'tiny', [*settings, 'model.num_layers=4']).model), questions(padding=padding)
    everyone = torch.stack([torch.randperm(32) for _ in range(8)])
    torch.testing.assert_close(skipping(model, range(3), everyone, *q), model(*q))
    torch.testing.assert_close(skipping(model, [], everyone[:, :5], *q), model(*q))


@pytest.mark.parametrize('settings', [(), ('model.window=8', 'model.global_every=4')])
def test_hidden_tokens_are_not_there_in_the_first_layers_and_the_others_keep_their_places(settings):
    model, (ids, _, positions, _) = network(get_recipe('modern', 'tiny', [*settings, 'model.num_layers=4']).model), questions()
    seen = visible(ids, positions)
    assert all(sorted([*s, *p]) == list(range(32)) for s, p in zip(seen.tolist(), positions.tolist(), strict=True))
    of = lambda ids, layers: gather(body(model, layers, seen, ids, None), seen)
    other = ids.scatter(1, positions, 9)
    assert torch.equal(of(ids, range(3)), of(other, range(3))) and not torch.equal(of(ids, range(2)), of(other, range(2)))
    # a row is the same as one in which the hidden tokens are hidden from attention by a mask
    mask = torch.ones_like(ids, dtype=torch.bool).scatter(1, positions, False)
    x = model.embeddings(ids)
    for block, local in zip(model.blocks[:3], model.contexts.local, strict=False): x = block(x, model.contexts(ids, mask, local))
    torch.testing.assert_close(of(ids, range(3)), gather(x, seen))
    # and hidden tokens come out of the first layers as they went in
    torch.testing.assert_close(gather(body(model, range(3), seen, ids, None), positions), gather(model.embeddings(ids), positions))


def test_where_tokens_are_left_out():
    assert [list(ideas.lower_half(n)) for n in (1, 2, 3, 4, 6)] == [[], [0], [0, 1], [0, 1], [0, 1, 2]]
    assert [list(ideas.middle(n)) for n in (1, 2, 3, 4, 6)] == [[], [0], [1], [1, 2], [2, 3, 4]]
    assert ideas.lower_half(24) == range(12) and ideas.middle(12) == range(5, 11)


def test_the_dropped_half_is_random_and_never_hidden():
    ids, _, positions, _ = questions()
    torch.manual_seed(3); a = hidden_and_half(ids, positions)
    torch.manual_seed(3); b = hidden_and_half(ids, positions)
    c = hidden_and_half(ids, positions)
    assert a.shape == (8, 9 + 11) and torch.equal(a, b) and not torch.equal(a.sort().values, c.sort().values)
    for kept, hidden in zip(a.tolist(), positions.tolist(), strict=True): assert len(set(kept)) == 20 and set(hidden) <= set(kept)


def test_gradients_reach_all_weights_through_what_is_left_out():
    cfg, q = get_recipe('modern', 'tiny', ['model.num_layers=3']).model, questions()
    for change in (ideas.mask_later, ideas.drop_midway, within_window):
        model = network(cfg)
        change(model, *q).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()), change


def test_rows_with_padding_are_refused(data, recipe):
    model, q = network(recipe.model), questions(padding=True)
    with pytest.raises(UsageError, match='packing.mode=stream'): ideas.mask_later(model, *q)
    with pytest.raises(UsageError, match='packing.mode=stream'): cut_to(open_data(data), 16)
    assert cut_to(open_data(data), 32).train is not None and torch.isfinite(ideas.drop_midway(model, *q))


def test_a_window_is_put_back_even_after_an_error():
    model, q = network(get_recipe('modern', 'tiny').model), questions()
    before, plain = (model.contexts.half, model.contexts.local), model(*q)
    narrow = within_window(model, *q)
    wide = MaskedLM(get_recipe('modern', 'tiny', [f'model.window={WINDOW}', 'model.global_every=9']).model, V).double()
    wide.load_state_dict(model.state_dict()); wide.contexts.local = [True]*2
    torch.testing.assert_close(narrow, wide(*q))
    with pytest.raises(TypeError): within_window(model)
    assert (model.contexts.half, model.contexts.local) == before and torch.equal(model(*q), plain) and abs(narrow - plain) > 1e-6


def test_cut_rows_are_the_stored_ones(rows, modern):
    data = open_data(rows)
    cut = cut_to(data, 16).train
    assert len(cut) == 2*len(data.train) and np.array_equal(cut[np.arange(20)].reshape(10, 32), data.train[np.arange(10)])
    assert np.array_equal(cut[[5, 2]], np.stack([data.train[[2]][0, 16:], data.train[[1]][0, :16]]))
    assert sum(b.input_ids.numel() for b in train_batches(cut_to(data, 16), ideas.grow_rows(modern, 0.), 0)) == 32*32


def test_the_hardest_rows_are_taken():
    model, (ids, _, positions, labels) = network(get_recipe('modern', 'tiny').model).float(), questions(B=9)
    labels[:, 6:] = torch.where(torch.arange(9)[:, None] < 4, IGNORE, labels[:, 6:])  # rows with fewer questions are no easier for that
    batch = Batch(ids, None, positions, labels)
    loss = [model(ids[i:i+1], None, positions[i:i+1], labels[i:i+1]).item()/(labels[i] != IGNORE).sum().item() for i in range(9)]
    taken = ideas.hardest(model, batch, FLOAT)
    assert {tuple(r) for r in taken.input_ids.tolist()} == {tuple(ids[i].tolist()) for i in np.argsort(loss)[-6:]}
    assert taken.attention_mask is None and taken.labels.shape == (6, 9)


def run_of(rows, recipe, out, steps):
    out.mkdir()
    return Experiment(recipe, open_data(rows), out, Clock(0., steps))


def test_the_loss_is_that_of_the_mean_of_the_tails_weights(rows, modern, tmp_path):
    states = []
    def note(r, f):
        states.append({k: v.clone() for k, v in model.state_dict().items()})  # before each step
        return r
    torch.manual_seed(42)
    model, run = MaskedLM(modern.model, open_data(rows).padded_vocab_size), run_of(rows, modern, tmp_path/'a', 8)
    loss = train_with(Idea('tail', recipe=note, average=.5), run, model, FLOAT)
    tail = [*states[4:], model.state_dict()]  # after steps 4 … 8, which are at a half of the budget or later
    mean = MaskedLM(modern.model, run.data.padded_vocab_size)
    mean.load_state_dict({k: torch.stack([s[k] for s in tail]).mean(0) for k in tail[0]})
    assert loss == pytest.approx(validation_loss(mean, run.data, modern, FLOAT, run.world), rel=1e-6) != validation_loss(model, run.data, modern, FLOAT, run.world)


def test_what_is_trained_on_is_counted(rows, modern, tmp_path):
    tokens = {}
    for n in ('batch growing', 'rows growing', 'hard rows', 'mask rate falling'):
        tokens[n] = [r['value'] for r in experiment(IDEAS[n], modern, rows, tmp_path/n, steps=6) if r['metric'] == 'tokens'][0]
    assert tokens == {'batch growing': 2*(8 + 16 + 32)*32, 'rows growing': 6*32*32, 'hard rows': 6*32*32, 'mask rate falling': 6*32*32}


def test_everything_is_inside_the_budget(rows, modern, tmp_path, monkeypatch):
    ticks = count()
    monkeypatch.setattr(laboratory, 'Clock', partial(Clock, now=lambda: .01*next(ticks)))
    found = {r['metric']: r['value'] for r in experiment(IDEAS[BASELINE], modern, rows, tmp_path/'a', budget=1.)}
    assert .8 < found['seconds'] <= 1. and found['steps'] > 8
    with pytest.raises(UsageError, match='too short'): experiment(IDEAS[BASELINE], modern, rows, tmp_path/'b', budget=.02)


def test_a_run_that_dies_says_so_and_is_not_taken_for_a_start(rows, modern, tmp_path):
    bad = replace(modern, optim=replace(modern.optim, lr=1e30, muon_lr=1e30))
    found = {r['metric']: r for r in experiment(IDEAS['weights averaged at the tail'], bad, rows, tmp_path/'a', steps=60)}
    assert found['validation_loss']['value'] is None and 'finite gradient' in found['validation_loss']['stopped']


def test_what_a_recipes_rows_do_not_allow_is_left_out():
    assert {t.name for t in idea_trials('24hbert', 'tiny')} == set(IDEAS) - {'[MASK] later', 'rows growing'}
    trials = idea_trials('modern', 'tiny', ((), half_as_wide('modern', 'tiny')))
    assert [t.name for t in trials] == list(IDEAS)*4 and [t.seed for t in trials] == [42]*18 + [43]*18
    assert [t.recipe.model.hidden_size for t in trials[:18]] == [64]*9 + [32]*9


def test_half_as_wide_is_possible_everywhere(monkeypatch):
    for name in RECIPES:
        for scale in SCALES: get_recipe(name, scale, half_as_wide(name, scale))
    for heads, hidden, fewer in ((7, 224, 1), (1, 64, 1), (6, 192, 3)):
        monkeypatch.setattr(laboratory, 'get_recipe', lambda *_, s=(f'model.num_heads={heads}', f'model.hidden_size={hidden}'): get_recipe('modern', 'tiny', s))
        m = get_recipe('modern', 'tiny', half_as_wide('modern', 'tiny')).model
        assert (m.num_heads, m.hidden_size, m.intermediate_size) == (fewer, hidden//2, 128)


def test_a_study_goes_on_and_becomes_a_table(text, tmp_path, monkeypatch):
    few = {n: IDEAS[n] for n in (BASELINE, 'batch growing', 'weights averaged at the tail')}
    monkeypatch.setattr(laboratory, 'IDEAS', few)
    shapes = [(f'corpus.source={text}', *SMALL, f'model.hidden_size={h}') for h in (64, 32)]
    with parallel_config(backend='sequential'): found = try_ideas('modern', 'tiny', tmp_path/'data', tmp_path/'out', shapes)
    done = {p: p.stat().st_mtime_ns for p in sorted((tmp_path/'out'/'trials').glob('*/rows.jsonl'))}
    first, more = ([r for r in found if r['study'] == s and r['metric'] == 'validation_loss'] for s in ('ideas', 'once more'))
    assert [(r['trial'], r['shape'], r['seed']) for r in first] == [(n, s, seed) for seed in (42, 43) for s in ('2 × 64', '2 × 32') for n in few]
    mean = lambda n, s: np.mean([r['value'] for r in first if (r['trial'], r['shape']) == (n, s)])
    ahead = [n for n in few if all(mean(n, s) < mean(BASELINE, s) for s in ('2 × 64', '2 × 32'))]
    assert [(r['trial'], r['shape'], r['seed']) for r in more] == [(n, '2 × 64', seed) for seed in (44, 45) for n in few if ahead and n in [BASELINE, *ahead]]
    assert len(done) == 3*2*2 + len(more)
    lost, *kept = done
    lost.unlink()
    with parallel_config(backend='sequential'): again = try_ideas('modern', 'tiny', tmp_path/'data', tmp_path/'out', shapes)
    assert all(p.stat().st_mtime_ns == done[p] for p in kept) and lost.exists()
    losses = lambda rows: [r['value'] for r in rows if r['metric'] == 'validation_loss']
    assert losses(again) == losses(found) and len(set(losses(found))) > 4
    table = ideas_table(found)
    assert list(table.index) == list(few) and list(table['in stock transformers?']) == ['yes']*3
    assert table.loc[BASELINE, '2 × 32: change'] == '' and table.loc['batch growing', '2 × 32: change'][0] in '+-' and table.loc['batch growing', '2 × 64: steps'] == '3'
    files = write_ideas(found, tmp_path/'out'/'trials', tmp_path/'figures')
    note = files[0].read_text()
    assert ('with 2 fresh seeds' if ahead else 'No idea was ahead') in note and any('fresh seeds' in c for c in table.columns) == bool(ahead)
    assert 'need rows without padding: [MASK] later, rows growing' in note and '**batch growing**: a quarter' in note and 'Of 4 comparisons' in note
    assert {p.name for p in files} == {f'beyond_ideas.{s}' for s in ('md', 'csv', 'tex')} | {f'ideas_by_time.{s}' for s in ('svg', 'pdf')}


def test_a_run_without_a_loss_leaves_an_empty_cell():
    ids = dict(stage='trial', study='ideas', recipe='modern', shape='2 × 64', stock=False, seed=1, global_batch_size=1, lr=1., warmup=0., schedule_length=1., stopped='')
    rows = [dict(metric=m, value=v, trial=n, **ids) for n, loss in ((BASELINE, 3.), ('hard rows', None)) for m, v in dict(validation_loss=loss, steps=5.).items()]
    table = ideas_table(rows)
    assert list(table.loc['hard rows']) == ['', '', '', '5', 'no'] and table.loc[BASELINE, '2 × 64: MLM loss, nats'] == '3.000'
