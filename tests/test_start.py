"Training from stock models: the loss they had, a run known by its weights, and folders that are refused"
import json
import shutil
from string import ascii_lowercase

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertTokenizerFast,
)

from cramlit.core.recipes import CramlitError, UsageError
from cramlit.data.packing import open_data
from cramlit.model.stock_models import init_from, load_weights
from cramlit.running.command import main
from cramlit.training.checkpoints import load_run
from cramlit.training.schedule import Clock
from cramlit.training.training import Run, acquire_run_dir

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
FAMILIES = {
    'bert': dict(max_position_embeddings=64),
    'roberta-prelayernorm': dict(max_position_embeddings=65, type_vocab_size=2, pad_token_id=0),
    'megatron-bert': dict(max_position_embeddings=64),
    'modernbert': dict(max_position_embeddings=64, pad_token_id=0),
}
LETTERS = [*ascii_lowercase, *(f'##{c}' for c in ascii_lowercase)]
ENTRIES = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', *LETTERS, *(f'w{i}' for i in range(42))]


def stock(kind, folder, auto=AutoModelForMaskedLM, **more):
    "A random stock model whose weights are far from their start, with a tokenizer of 100 entries"
    tok = BertTokenizerFast(vocab={w: i for i, w in enumerate(ENTRIES)})
    torch.manual_seed(1)
    settings = dict(vocab_size=len(tok), **SHAPE, **FAMILIES.get(kind, {})) | more
    model = auto.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.1)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return model.eval()


def command(capsys, *args):
    code = main([str(a) for a in args])
    return code, capsys.readouterr().err


def args(text):
    settings = [f'corpus.source={text}', 'corpus.holdout=0.1', 'validation.max_sequences=64']
    return ['--scale', 'tiny', *(x for o in [*settings, 'model.dropout=0'] for x in ('-o', o))]


@pytest.mark.parametrize('kind', FAMILIES)
def test_a_stock_model_is_trained_further_on_the_users_text(kind, text, tmp_path, capsys):
    folder = tmp_path/kind
    model = stock(kind, folder)
    code, err = command(capsys, 'prepare', '--init', folder, *args(text), '--out', tmp_path/'data')
    assert code == 0, err
    rest = [*args(text), '--data', tmp_path/'data', '--out', tmp_path/'run', '--steps', 4]
    train = ['pretrain', '--init', folder, *rest]
    code, err = command(capsys, *train)
    assert code == 0, err
    info = json.loads((tmp_path/'run'/'run.json').read_text())
    shape = info['recipe']['model']
    assert info['vocab_size'] == 128 and shape['hidden_size'] == 32 and shape['dropout'] == 0
    assert len(info['init']) == 16

    batch = torch.randint(5, 100, (2, 20))
    after = AutoModelForMaskedLM.from_pretrained(tmp_path/'run'/'model').eval()
    with torch.no_grad(): new, old = after(input_ids=batch).logits, model(input_ids=batch).logits
    assert type(after) is type(model) and 1e-4 < (new[..., :100] - old).abs().max() < 3
    assert new[..., 100:].max() < -50

    assert command(capsys, *train)[0] == 0  # a finished run answers from its rows
    assert command(capsys, 'pretrain', *rest, '-o', 'model.num_layers=2')[0] == 2
    stock(kind, folder, initializer_range=.3)
    other = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad(): next(other.parameters())[7].add_(1.)
    other.save_pretrained(folder)
    code, err = command(capsys, *train)
    assert code == 2 and ('another init' in err or 'another recipe' in err)


def test_an_interrupted_run_goes_on_to_the_same_weights(text, tmp_path, capsys):
    folder = tmp_path/'bert'
    stock('bert', folder)
    assert command(capsys, 'prepare', '--init', folder, *args(text), '--out', tmp_path/'data')[0] == 0
    options = [*args(text), '-o', 'checkpoint.every=0.3', '--data', tmp_path/'data', '--steps', 8]

    def train(out): return command(capsys, 'pretrain', '--init', folder, *options, '--out', out)[0]

    assert train(tmp_path/'whole') == 0
    (tmp_path/'cut').mkdir()
    (tmp_path/'cut'/'stop').touch()
    assert train(tmp_path/'cut') == 75
    assert train(tmp_path/'cut') == 0
    a, b = (load_run(tmp_path/r)[0].state_dict() for r in ('whole', 'cut'))
    assert all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_other_weights_and_none_are_another_run(recipe, data, tmp_path):
    def make(init): return Run(recipe, open_data(data), tmp_path/'run', Clock(steps=5), init=init)

    acquire_run_dir(make('a'))
    acquire_run_dir(make('a'))
    for other in ('b', ''):
        with pytest.raises(UsageError, match='another init'): acquire_run_dir(make(other))


def test_folders_that_will_not_do_are_one_line(text, recipe, data, tmp_path, capsys):
    stock('bert', tmp_path/'bert')
    stock('distilbert', tmp_path/'distil', dim=32, n_layers=1, n_heads=2, hidden_dim=32)
    shutil.copytree(tmp_path/'bert', tmp_path/'empty')
    (tmp_path/'empty'/'model.safetensors').unlink()
    options = [*args(text), '--data', data, '--out', tmp_path/'run', '--steps', 1]
    cases = {
        'nowhere': 'has no config.json',
        'bert': 'was prepared with another tokenizer',
        'distil': 'a distilbert model cannot be read',
        'empty': 'has no weights',
    }
    for folder, says in cases.items():
        code, err = command(capsys, 'pretrain', '--init', tmp_path/folder, *options)
        assert code in (1, 2) and says in err and 'Traceback' not in err, (folder, err)
        assert not (tmp_path/'run').exists()
    wider = ['-o', 'model.hidden_size=64']
    code, err = command(capsys, 'pretrain', '--init', tmp_path/'bert', *options, *wider)
    assert code == 2 and 'model.hidden_size=64 is not possible' in err


@pytest.mark.parametrize('auto', [AutoModel, AutoModelForSequenceClassification])
def test_weights_without_the_head_are_refused(auto, tmp_path):
    stock('bert', tmp_path/'bert', auto)
    with pytest.raises(CramlitError, match='lacks weights that a masked language model needs'):
        load_weights(tmp_path/'bert', 128)


def test_a_network_that_ours_does_not_compute_is_refused(tmp_path):
    stock('bert', tmp_path/'bert', type_vocab_size=1)
    with pytest.raises(CramlitError, match='type_vocab_size=1 cannot be read|have no place in our network'):
        load_weights(tmp_path/'bert', 128)
    stock('bert', tmp_path/'other')
    config = tmp_path/'other'/'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(intermediate_size=48)))
    with pytest.raises(CramlitError, match='other cannot be loaded'): load_weights(tmp_path/'other', 128)
    stock('roberta-prelayernorm', tmp_path/'roberta', pad_token_id=1)
    load_weights(tmp_path/'roberta', 128)  # another padding id, after which positions begin


def test_vocabularies_of_the_same_entries_but_other_rules_are_told_apart(text, recipe, tmp_path, capsys):
    folder, data = tmp_path/'bert', tmp_path/'data'
    stock('bert', folder)
    assert command(capsys, 'prepare', '--init', folder, *args(text), '--out', data)[0] == 0
    tok = BertTokenizerFast.from_pretrained(folder)
    BertTokenizerFast(vocab=tok.get_vocab(), do_lower_case=False).save_pretrained(folder)
    with pytest.raises(UsageError, match='another tokenizer'):
        init_from(folder, data, recipe, [f'corpus.source={text}'])
