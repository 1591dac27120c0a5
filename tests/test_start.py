"Going on from stock models: the loss they had, a run that is known by its weights, and folders that will not do"
import json
import shutil
from string import ascii_lowercase

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, BertTokenizerFast

from cramlit.running.command import main
from cramlit.core.recipes import CramlitError, UsageError
from cramlit.training.checkpoints import load_run
from cramlit.data.packing import open_data
from cramlit.training.training import Run, acquire_run_dir
from cramlit.training.schedule import Clock
from cramlit.model.stock_models import load_weights, init_from

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
FAMILIES = {'bert': dict(max_position_embeddings=64), 'roberta-prelayernorm': dict(max_position_embeddings=65, type_vocab_size=2, pad_token_id=0),
            'megatron-bert': dict(max_position_embeddings=64), 'modernbert': dict(max_position_embeddings=64, pad_token_id=0)}


def stock(kind, folder, auto=AutoModelForMaskedLM, **more):
    "A random stock model whose weights are far from their start, with a tokenizer of 100 entries"
    tok = BertTokenizerFast(vocab={w: i for i, w in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', *ascii_lowercase,
                                                               *(f'##{c}' for c in ascii_lowercase), *(f'w{i}' for i in range(42))])})
    torch.manual_seed(1)
    model = auto.from_config(AutoConfig.for_model(kind, **dict(vocab_size=len(tok), **SHAPE, **FAMILIES.get(kind, {})) | more))
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.1)
    model.save_pretrained(folder), tok.save_pretrained(folder)
    return model.eval()


def command(capsys, *args):
    code = main([str(a) for a in args])
    return code, capsys.readouterr().err


def args(text): return ['--scale', 'tiny', '-o', f'corpus.source={text}', '-o', 'corpus.holdout=0.1', '-o', 'validation.max_sequences=64', '-o', 'model.dropout=0']


@pytest.mark.parametrize('kind', FAMILIES)
def test_a_stock_model_goes_on_with_the_users_text(kind, text, tmp_path, capsys):
    model, folder = stock(kind, tmp_path/kind), tmp_path/kind
    code, err = command(capsys, 'prepare', '--init', folder, *args(text), '--out', tmp_path/'data')
    assert code == 0, err
    go = ['pretrain', '--init', folder, *args(text), '--data', tmp_path/'data', '--out', tmp_path/'run', '--steps', 4]
    code, err = command(capsys, *go)
    assert code == 0, err
    info = json.loads((tmp_path/'run'/'run.json').read_text())
    assert info['vocab_size'] == 128 and info['recipe']['model']['hidden_size'] == 32 and info['recipe']['model']['dropout'] == 0 and len(info['init']) == 16
    batch = torch.randint(5, 100, (2, 20))
    after = AutoModelForMaskedLM.from_pretrained(tmp_path/'run'/'model').eval()
    with torch.no_grad(): change = (after(input_ids=batch).logits[..., :100] - model(input_ids=batch).logits).abs().max()
    assert type(after) is type(model) and 1e-4 < change < 3 and after(input_ids=batch).logits[..., 100:].max() < -50
    assert command(capsys, *go)[0] == 0  # a finished run answers from its rows
    code, err = command(capsys, *(a for a in go if a not in ('--init', folder)), '-o', 'model.num_layers=2')
    assert code == 2
    stock(kind, folder, initializer_range=.3)
    with torch.no_grad(): other = AutoModelForMaskedLM.from_pretrained(folder); next(other.parameters())[7].add_(1.)
    other.save_pretrained(folder)
    code, err = command(capsys, *go)
    assert code == 2 and ('another init' in err or 'another recipe' in err)


def test_an_interrupted_run_goes_on_to_the_same_weights(text, tmp_path, capsys):
    stock('bert', tmp_path/'bert')
    assert command(capsys, 'prepare', '--init', tmp_path/'bert', *args(text), '--out', tmp_path/'data')[0] == 0
    options = [*args(text), '-o', 'checkpoint.every=0.3', '--data', tmp_path/'data', '--steps', 8]
    go = lambda out: command(capsys, 'pretrain', '--init', tmp_path/'bert', *options, '--out', out)
    assert go(tmp_path/'whole')[0] == 0
    (tmp_path/'cut').mkdir()
    (tmp_path/'cut'/'stop').touch()
    assert go(tmp_path/'cut')[0] == 75 and go(tmp_path/'cut')[0] == 0
    a, b = (load_run(tmp_path/r)[0].state_dict() for r in ('whole', 'cut'))
    assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_other_weights_and_none_are_another_run(recipe, data, tmp_path):
    make = lambda init: Run(recipe, open_data(data), tmp_path/'run', Clock(steps=5), init=init)
    acquire_run_dir(make('a')), acquire_run_dir(make('a'))
    for other in ('b', ''):
        with pytest.raises(UsageError, match='another init'): acquire_run_dir(make(other))


def test_folders_that_will_not_do_are_one_line(text, recipe, data, tmp_path, capsys):
    stock('bert', tmp_path/'bert')
    go = lambda init, *more: command(capsys, 'pretrain', '--init', init, *args(text), '--data', data, '--out', tmp_path/'run', '--steps', 1, *more)
    cases = {tmp_path/'nowhere': 'has no config.json', tmp_path/'bert': 'was prepared with another tokenizer'}
    stock('distilbert', tmp_path/'distil', dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    cases[tmp_path/'distil'] = 'a distilbert model cannot be read'
    shutil.copytree(tmp_path/'bert', tmp_path/'empty')
    (tmp_path/'empty'/'model.safetensors').unlink()
    cases[tmp_path/'empty'] = 'has no weights'
    for folder, says in cases.items():
        code, err = go(folder)
        assert code in (1, 2) and says in err and 'Traceback' not in err and not (tmp_path/'run').exists(), (folder, err)
    code, err = go(tmp_path/'bert', '-o', 'model.hidden_size=64')
    assert code == 2 and 'model.hidden_size=64 is not possible' in err


@pytest.mark.parametrize('auto', [AutoModel, AutoModelForSequenceClassification])
def test_weights_without_the_head_are_refused(auto, tmp_path):
    stock('bert', tmp_path/'bert', auto)
    with pytest.raises(CramlitError, match='lacks weights that a masked language model needs'): load_weights(tmp_path/'bert', 128)


def test_a_network_that_ours_does_not_compute_is_refused(tmp_path):
    stock('bert', tmp_path/'bert', type_vocab_size=1)
    with pytest.raises(CramlitError, match='type_vocab_size=1 cannot be read|have no place in our network'): load_weights(tmp_path/'bert', 128)
    stock('bert', tmp_path/'other')
    config = tmp_path/'other'/'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(intermediate_size=48)))
    with pytest.raises(CramlitError, match='other cannot be loaded'): load_weights(tmp_path/'other', 128)
    stock('roberta-prelayernorm', tmp_path/'roberta', pad_token_id=1)
    load_weights(tmp_path/'roberta', 128)  # its positions begin after another padding id; the logits are compared inside


def test_vocabularies_of_the_same_words_but_other_rules_are_told_apart(text, recipe, tmp_path, capsys):
    stock('bert', tmp_path/'bert')
    assert command(capsys, 'prepare', '--init', tmp_path/'bert', *args(text), '--out', tmp_path/'data')[0] == 0
    tok = BertTokenizerFast.from_pretrained(tmp_path/'bert')
    BertTokenizerFast(vocab=tok.get_vocab(), do_lower_case=False).save_pretrained(tmp_path/'bert')
    with pytest.raises(UsageError, match='another tokenizer'): init_from(tmp_path/'bert', tmp_path/'data', recipe, [f'corpus.source={text}'])
