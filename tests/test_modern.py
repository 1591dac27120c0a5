"The modern recipe from text to a stock model, and networks without an equivalent class"
import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from cramlit.core.scales import get_recipe
from cramlit.data.packing import open_data, prepare
from cramlit.running.command import main
from cramlit.training.checkpoints import export_run, load_run
from cramlit.training.training import pretrain

SETTINGS = ['corpus.holdout=0.1', 'tokenizer.vocab_size=128', 'validation.max_sequences=64']


def options(settings):
    return [x for o in settings for x in ('-o', o)]


@pytest.fixture(scope='module')
def modern(text, tmp_path_factory):
    "A run of the recipe, from the command line"
    out = tmp_path_factory.mktemp('modern')
    settings = ['--recipe', 'modern', '--scale', 'tiny', *options([f'corpus.source={text}', *SETTINGS])]
    assert main(['prepare', *settings, '--out', str(out/'data')]) == 0
    assert main(['pretrain', *settings, '--data', str(out/'data'), '--out', str(out/'run')]) == 0
    return out


def test_it_learns_and_leaves_as_a_stock_modernbert(modern):
    lines = [json.loads(line) for line in (modern/'run'/'metrics.jsonl').read_text().splitlines()]
    losses = [x['validation_loss'] for x in lines if 'validation_loss' in x]
    assert losses[-1] < losses[0] - .5
    tok = AutoTokenizer.from_pretrained(modern/'run'/'model')
    stock = AutoModelForMaskedLM.from_pretrained(modern/'run'/'model').eval()
    ours, info = load_run(modern/'run')
    assert type(stock).__name__ == 'ModernBertForMaskedLM' and info['recipe']['optim']['method'] == 'muon'
    sentences = ['the river walks', 'a stone house sees the old green road']
    batch = tok(sentences, return_tensors='pt', padding=True)
    text = batch.attention_mask.bool()
    with torch.no_grad(): a, b = ours.logits(batch.input_ids, text), stock(**batch).logits
    assert (a - b)[text].abs().max() < 1e-4


def test_it_is_fine_tuned_by_stock_classes(modern, tmp_path):
    folder = modern/'run'/'model'
    pair = AutoTokenizer.from_pretrained(folder)('the river walks', 'a stone house', return_tensors='pt')
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert set(pair) == {'input_ids', 'attention_mask'} and classifier(**pair).logits.shape == (1, 3)
    about = json.loads((folder/'tokenizer_config.json').read_text())  # what transformers 4 goes by
    assert about['model_input_names'] == ['input_ids', 'attention_mask']
    masked_lm = AutoModelForMaskedLM.from_pretrained(folder)
    a, b = (m.model.layers[0].attn.Wqkv.weight for m in (classifier, masked_lm))
    assert torch.equal(a, b)
    task = ['--scale', 'tiny', '--tasks', 'sentence_rating']
    assert main(['glue', '--model', str(folder), *task, '--out', str(tmp_path/'glue')]) == 0


def test_its_sequences_are_full(modern):
    data = open_data(modern/'data')
    assert (data.train[range(20)] != data.manifest['special_ids']['pad']).all()


def test_without_an_equivalent_class_the_command_refuses_and_python_trains(text, data, tmp_path, capsys):
    settings, run = [f'corpus.source={text}', *SETTINGS, 'model.ffn=geglu'], tmp_path/'run'
    code = main(['pretrain', '--scale', 'tiny', '--data', str(data), '--out', str(run), *options(settings)])
    err = capsys.readouterr().err
    assert code == 2 and 'cannot be exported' in err and 'needs model.ffn=gelu' in err
    assert 'Traceback' not in err and not run.exists()
    assert pretrain(get_recipe('24hbert', 'tiny', settings), data, run, steps=2)


def test_windows_leave_too(text, tmp_path):
    settings = [f'corpus.source={text}', *SETTINGS, 'model.window=8', 'model.num_layers=4']
    recipe = get_recipe('modern', 'tiny', settings)
    prepare(recipe, tmp_path/'data')
    pretrain(recipe, tmp_path/'data', tmp_path/'run', steps=2)
    folder = export_run(tmp_path/'run', tmp_path/'data'/'tokenizer', tmp_path/'model')
    ours, stock = load_run(tmp_path/'run')[0], AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = torch.randint(5, 100, (2, 30))
    with torch.no_grad(): assert (ours.logits(ids, None) - stock(input_ids=ids).logits).abs().max() < 1e-4
