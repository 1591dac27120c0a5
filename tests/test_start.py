"Training from stock models: the loss they had, a run known by its weights, and folders that are refused"
import json
import os
import shutil
from string import ascii_lowercase

import pytest
import torch
from safetensors.torch import load_file, save_file
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


def untied(folder):
    stock('bert', folder, tie_word_embeddings=False)


def pickled(folder):
    torch.save(load_file(folder/'model.safetensors'), folder/'pytorch_model.bin')
    (folder/'model.safetensors').unlink()


def converted(folder):
    "As the message about a pickle says"
    pickled(folder)
    AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    assert (folder/'pytorch_model.bin').exists()


def names_of_2018(folder):
    def old(name): return name.replace('Norm.weight', 'Norm.gamma').replace('Norm.bias', 'Norm.beta')
    weights = load_file(folder/'model.safetensors')
    save_file({old(name): w for name, w in weights.items()}, folder/'model.safetensors', {'format': 'pt'})


def vocabulary_only(folder):
    (folder/'vocab.txt').write_text('\n'.join(ENTRIES) + '\n')
    for name in ('tokenizer.json', 'tokenizer_config.json'): (folder/name).unlink()


def no_weights(folder):
    "Only what a trainer has written beside them, which no conversion makes weights of"
    (folder/'model.safetensors').unlink()
    torch.save(dict(lr=1e-4), folder/'training_args.bin')


class Evil:
    def __reduce__(self): return exec, ("import pathlib; pathlib.Path('was_run').touch()",)


def a_pickle_that_runs_code(folder):
    (folder/'model.safetensors').unlink()
    torch.save({'weight': Evil()}, folder/'pytorch_model.bin')


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def a_later_tokenizer(folder):
    edit(folder/'tokenizer.json', model=dict(type='WordPieceV2'))


def half_a_tokenizer(folder):
    (folder/'tokenizer.json').write_text((folder/'tokenizer.json').read_text()[:200])


def a_slow_tokenizer(folder):
    vocabulary_only(folder)
    kinds = dict(word_tokenizer_type='basic', subword_tokenizer_type='character')
    config = dict(tokenizer_class='BertJapaneseTokenizer', do_lower_case=False, **kinds)
    (folder/'tokenizer_config.json').write_text(json.dumps(config))


def no_mask(folder): edit(folder/'tokenizer_config.json', mask_token=None)


def test_a_weight_that_is_nan_is_refused(tmp_path):
    stock('bert', tmp_path/'bert')
    weights = load_file(tmp_path/'bert'/'model.safetensors')
    next(w for w in weights.values() if w.ndim > 1)[-1] = float('nan')
    save_file(weights, tmp_path/'bert'/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(CramlitError, match='NaN or infinite'): load_weights(tmp_path/'bert', 100)


@pytest.mark.parametrize('change', [converted, names_of_2018, vocabulary_only])
def test_folders_of_older_libraries_are_read(change, text, tmp_path, capsys):
    folder = tmp_path/'a model [old] für alle'
    model = stock('bert', folder)
    before = load_weights(folder, 100)
    change(folder)
    weights = load_weights(folder, 100)
    assert all(torch.equal(weights[k], w) for k, w in before.items())
    assert torch.equal(weights['embeddings.word.weight'], model.get_input_embeddings().weight)
    code, err = command(capsys, 'prepare', '--init', folder, *args(text), '--out', tmp_path/'data')
    assert code == 0, err
    rest = ['--data', tmp_path/'data', '--out', tmp_path/'run', '--steps', 1]
    code, err = command(capsys, 'pretrain', '--init', folder, *args(text), *rest)
    assert code == 0 and (tmp_path/'run'/'model'/'model.safetensors').exists(), err
    assert 'Writing model shards' not in err


@pytest.mark.parametrize('change, says', [
    (untied, 'tie_word_embeddings=False cannot be read'),
    (pickled, 'pytorch_model.bin is a pickle'),
    (no_weights, 'has no weights (*.safetensors)'),
    (a_pickle_that_runs_code, ').save_pretrained('),
    (a_later_tokenizer, 'cannot be loaded by transformers'),
    (half_a_tokenizer, 'cannot be loaded by transformers'),
    (a_slow_tokenizer, 'BertJapaneseTokenizer'),
    (no_mask, 'has no mask token'),
])
def test_folders_that_will_not_train_are_one_line(change, says, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stock('bert', tmp_path/'bert')
    change(tmp_path/'bert')
    capsys.readouterr()
    code, err = command(capsys, 'prepare', '--init', tmp_path/'bert', *args(text), '--out', tmp_path/'data')
    assert code in (1, 2) and says in err and 'Traceback' not in err, err
    assert os.listdir(tmp_path) == ['bert']


def test_a_token_that_was_added_later_makes_another_tokenizer(text, recipe, tmp_path, capsys):
    folder, data = tmp_path/'bert', tmp_path/'data'
    stock('bert', folder, vocab_size=101)
    assert command(capsys, 'prepare', '--init', folder, *args(text), '--out', data)[0] == 0
    init_from(folder, data, recipe, [f'corpus.source={text}'])
    tok = BertTokenizerFast.from_pretrained(folder)
    tok.add_tokens(['river'])
    tok.save_pretrained(folder)
    with pytest.raises(UsageError, match='another tokenizer'):
        init_from(folder, data, recipe, [f'corpus.source={text}'])


def test_a_vocabulary_with_a_hole_is_trained_and_exported(text, tmp_path, capsys):
    folder = tmp_path/'bert'
    stock('bert', folder)
    file = json.loads((folder/'tokenizer.json').read_text())
    for n in range(40): del file['model']['vocab'][f'w{n}']  # ids up to 99 stay, for 60 entries
    (folder/'tokenizer.json').write_text(json.dumps(file))
    sizes = ['-o', 'tokenizer.vocab_size=64']
    code, err = command(capsys, 'prepare', '--init', folder, *args(text), *sizes, '--out', tmp_path/'data')
    assert code == 0, err
    assert open_data(tmp_path/'data').padded_vocab_size == 128
    rest = ['--data', tmp_path/'data', '--out', tmp_path/'run', '--steps', 1]
    code, err = command(capsys, 'pretrain', '--init', folder, *args(text), *rest)
    assert code == 0, err


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
