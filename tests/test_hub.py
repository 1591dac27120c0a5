"Models as stock folders: equal logits, both ways, and folders that cannot be used"
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

import cramlit.training.checkpoints as checkpoint
from cramlit.core.recipes import CramlitError, Model, UsageError
from cramlit.data.packing import prepare
from cramlit.model.encoder import MaskedLM
from cramlit.model.stock_models import family, from_stock, our_config, to_stock
from cramlit.running.command import main
from cramlit.training.checkpoints import export_run, load_run
from cramlit.training.training import pretrain

SPECIAL = dict(pad=0, cls=2, sep=3)
ROTARY = dict(first_norm=False, position='rotary', ffn='geglu', rope_theta=500.)
SHAPES = [
    ('roberta-prelayernorm', dict(norm='pre', embedding_norm=True)),
    ('megatron-bert', dict(norm='pre', embedding_norm=False)),
    ('bert', dict(norm='post')),
    ('modernbert', dict(bias=False, **ROTARY)),
    ('modernbert', dict(bias=True, **ROTARY)),
    ('modernbert', dict(window=4, local_rope_theta=50., bias=False, **ROTARY)),
    ('modernbert', dict(window=6, global_every=2, **ROTARY)),
]


def shaken(model):
    "Every weight away from its initial value, so that no two can be confused"
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.1)
    return model.eval()


@torch.no_grad()
def difference(ours, stock, ids, mask):
    "The largest difference of two logits, where there is text"
    theirs = stock(input_ids=ids, attention_mask=mask.long()).logits
    return (ours.logits(ids, mask) - theirs)[mask].abs().max()


@pytest.mark.parametrize('name, parts', SHAPES)
def test_logits_equal_the_stock_class_with_padding_and_both_ways(name, parts):
    cfg = Model(3, 32, 4, 64, max_positions=20, **parts)
    ours = shaken(MaskedLM(cfg, 64))
    stock = to_stock(ours, cfg, SPECIAL)
    assert family(cfg) == name == stock.config.model_type
    ids = torch.randint(5, 64, (3, 20))
    mask = torch.arange(20)[None] < torch.tensor([20, 13, 4])[:, None]
    ids[~mask] = 0
    assert difference(ours, stock, ids, mask) < 1e-4
    with torch.no_grad(): assert ours.logits(ids, mask)[mask].std() > .1
    back, cfg_back = from_stock(stock)
    assert cfg_back == cfg
    assert all(torch.equal(x, y) for x, y in zip(ours.parameters(), back.parameters(), strict=True))


@pytest.mark.parametrize('parts', [{}, dict(embedding_norm=False), dict(norm='post')])
def test_a_network_without_biases_leaves_with_zeros(parts):
    cfg = Model(2, 32, 4, 64, max_positions=20, bias=False, **parts)
    ours, ids = shaken(MaskedLM(cfg, 64)), torch.arange(5, 25)[None]
    assert difference(ours, to_stock(ours, cfg, SPECIAL), ids, torch.ones_like(ids).bool()) < 1e-4


@pytest.mark.parametrize('changed, says', [
    (dict(layer_types=['full_attention', 'full_attention', 'sliding_attention']), 'layer_types'),
    (dict(norm_bias=True), 'attention_bias=False'),
    (dict(hidden_activation='relu'), 'hidden_activation=relu'),
    (dict(decoder_bias=False), 'decoder_bias=False'),
    (dict(mlp_bias=True), 'mlp_bias=True'),
])
def test_a_modernbert_that_is_not_ours_is_refused(changed, says):
    shape = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    stock = AutoConfig.for_model('modernbert', vocab_size=64, pad_token_id=0, **shape, **changed)
    with pytest.raises(UsageError, match=says): our_config(stock)


@pytest.mark.parametrize('parts', [
    dict(ffn='geglu'),
    dict(position='rotary'),
    dict(first_norm=False),
    dict(norm='post', **ROTARY),
    dict(embedding_norm=False, **ROTARY),
])
def test_a_network_without_an_equivalent_class_is_refused(parts):
    with pytest.raises(UsageError, match='no stock class of transformers'): family(Model(**parts))


@pytest.fixture(scope='module')
def run(recipe, data, tmp_path_factory):
    out = tmp_path_factory.mktemp('run')/'run'
    pretrain(recipe, data, out, steps=2)
    return out


@pytest.fixture
def model(run, data, tmp_path):
    return export_run(run, data/'tokenizer', tmp_path/'model')


def test_a_run_leaves_as_a_folder_that_stock_transformers_loads(run, model):
    tok = AutoTokenizer.from_pretrained(model)
    stock = AutoModelForMaskedLM.from_pretrained(model).eval()
    ours, _ = load_run(run)
    sentences = ['the river walks', 'a stone house sees the old green road']
    batch = tok(sentences, return_tensors='pt', padding=True)
    assert difference(ours, stock, batch.input_ids, batch.attention_mask.bool()) < 1e-4
    assert {p.suffix for p in model.iterdir()} <= {'.json', '.safetensors'} and tok.model_max_length == 128


def test_a_run_without_a_checkpoint_cannot_leave(run, data, tmp_path):
    tokenizer, to = data/'tokenizer', tmp_path/'model'
    shutil.copytree(run, tmp_path/'run')
    shutil.rmtree(tmp_path/'run'/'checkpoints')
    with pytest.raises(CramlitError, match='no checkpoint yet'): export_run(tmp_path/'run', tokenizer, to)
    with pytest.raises(CramlitError, match='has no run.json'): export_run(tmp_path, tokenizer, to)
    assert not to.exists()


def test_a_failed_export_keeps_the_old_one(run, data, model, tmp_path, monkeypatch):
    before = (model/'config.json').read_bytes()

    class Full:
        def save_pretrained(self, to): raise OSError(28, 'No space left on device')

    monkeypatch.setattr('cramlit.training.checkpoints.to_stock', lambda *args: Full())
    with pytest.raises(CramlitError, match='No space left'): export_run(run, data/'tokenizer', model)
    assert (model/'config.json').read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['model']


def test_an_export_that_was_killed_on_its_way_is_made_again(run, data, tmp_path, monkeypatch):
    "After any number of files have come to their place"
    real, tokenizer = os.rename, data/'tokenizer'
    names = {p.name for p in export_run(run, tokenizer, tmp_path/'whole').iterdir()}
    for n in range(1, 2*len(names)):
        to, moved, least = tmp_path/f'{n}', [], n % len(names)
        if n >= len(names):  # beside an earlier one, which goes aside first
            shutil.copytree(tmp_path/'whole', to)
            for p in to.iterdir(): p.write_bytes(p.read_bytes() + b' ')

        def killed(a, b, least=least, to=to, moved=moved):
            if to in (Path(a).parent, Path(b).parent):
                if len(moved) == least: raise KeyboardInterrupt
                moved.append(b)
            real(a, b)
        monkeypatch.setattr(checkpoint.os, 'rename', killed)
        with pytest.raises(KeyboardInterrupt): export_run(run, tokenizer, to)
        monkeypatch.setattr(checkpoint.os, 'rename', real)
        assert {p.name for p in export_run(run, tokenizer, to).iterdir()} - {'superseded'} == names


def change_config(m, **changes):
    config = json.loads((m/'config.json').read_text())
    (m/'config.json').write_text(json.dumps(config | changes))


def no_config(m): (m/'config.json').unlink()
def no_weights(m): (m/'model.safetensors').unlink()
def small_vocabulary(m): change_config(m, vocab_size=100)
def short(m): change_config(m, max_position_embeddings=33)
def broken_config(m): (m/'config.json').write_text('{')
def broken_weights(m): (m/'model.safetensors').write_bytes((m/'model.safetensors').read_bytes()[:500])


@pytest.mark.parametrize('harm, says', [
    (no_config, 'has no config.json'),
    (no_weights, 'has no weights'),
    (small_vocabulary, 'do not belong together'),
    (short, 'which has 32 positions'),
    (broken_config, 'cannot be loaded by transformers'),
    (broken_weights, 'are damaged'),
])
def test_a_folder_that_is_no_model_is_one_line(model, tmp_path, capsys, harm, says):
    harm(model)
    task = ['--scale', 'tiny', '--tasks', 'sentence_rating']
    code = main(['glue', '--model', str(model), *task, '--out', str(tmp_path/'out')])
    err = capsys.readouterr().err
    assert code in (1, 2) and says in err and 'Traceback' not in err
    assert not (tmp_path/'out').exists()


def test_an_architecture_that_is_not_ours_is_refused():
    config = AutoConfig.for_model('distilbert', vocab_size=64, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    stock = AutoModelForMaskedLM.from_config(config)
    with pytest.raises(UsageError, match='a distilbert model cannot be read'): from_stock(stock)


def test_a_tokenizer_of_another_vocabulary_is_refused(run, tmp_path, text, recipe):
    prepare(replace(recipe, tokenizer=replace(recipe.tokenizer, vocab_size=64)), tmp_path/'data')
    with pytest.raises(CramlitError, match='do not belong together'):
        export_run(run, tmp_path/'data'/'tokenizer', tmp_path/'model')
    assert not (tmp_path/'model').exists()
