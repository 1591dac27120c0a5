"The modern recipe from text to a stock model, and networks that have none"
import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from cramlit.running.command import main
from cramlit.training.checkpoints import export_run, load_run
from cramlit.data.packing import prepare
from cramlit.core.scales import get_recipe
from cramlit.training.training import pretrain

SETTINGS = ['corpus.holdout=0.1', 'tokenizer.vocab_size=128', 'validation.max_sequences=64']


@pytest.fixture(scope='module')
def modern(text, tmp_path_factory):
    "A run of the recipe, from the command line"
    out = tmp_path_factory.mktemp('modern')
    settings = ['--recipe', 'modern', '--scale', 'tiny', *(x for o in [f'corpus.source={text}', *SETTINGS] for x in ('-o', o))]
    assert main(['prepare', *settings, '--out', str(out/'data')]) == 0
    assert main(['pretrain', *settings, '--data', str(out/'data'), '--out', str(out/'run')]) == 0
    return out


def test_it_learns_and_leaves_as_a_stock_modernbert(modern):
    losses = [x['validation_loss'] for x in map(json.loads, (modern/'run'/'metrics.jsonl').read_text().splitlines()) if 'validation_loss' in x]
    assert losses[-1] < losses[0] - .5
    tok, stock = AutoTokenizer.from_pretrained(modern/'run'/'model'), AutoModelForMaskedLM.from_pretrained(modern/'run'/'model').eval()
    ours, info = load_run(modern/'run')
    assert type(stock).__name__ == 'ModernBertForMaskedLM' and info['recipe']['optim']['method'] == 'muon'
    batch = tok(['the river walks', 'a stone house sees the old green road'], return_tensors='pt', padding=True)
    with torch.no_grad(): a, b = ours.logits(batch.input_ids, batch.attention_mask.bool()), stock(**batch).logits
    assert (a - b)[batch.attention_mask.bool()].abs().max() < 1e-4


def test_it_is_fine_tuned_by_stock_classes(modern, tmp_path):
    tok, classifier = AutoTokenizer.from_pretrained(modern/'run'/'model'), AutoModelForSequenceClassification.from_pretrained(modern/'run'/'model', num_labels=3)
    pair = tok('the river walks', 'a stone house', return_tensors='pt')
    assert set(pair) == {'input_ids', 'attention_mask'} and classifier(**pair).logits.shape == (1, 3)
    assert torch.equal(classifier.model.layers[0].attn.Wqkv.weight, AutoModelForMaskedLM.from_pretrained(modern/'run'/'model').model.layers[0].attn.Wqkv.weight)
    assert main(['glue', '--model', str(modern/'run'/'model'), '--scale', 'tiny', '--tasks', 'sentence_rating', '--out', str(tmp_path/'glue')]) == 0


def test_its_rows_are_full(modern):
    from cramlit.data.packing import open_data
    data = open_data(modern/'data')
    assert (data.train[range(20)] != data.manifest['special_ids']['pad']).all()


def test_a_network_without_a_twin_is_refused_by_the_command_and_trained_from_python(text, data, tmp_path, capsys):
    settings = [f'corpus.source={text}', *SETTINGS, 'model.ffn=geglu']
    code = main(['pretrain', '--scale', 'tiny', '--data', str(data), '--out', str(tmp_path/'run'), *(x for o in settings for x in ('-o', o))])
    err = capsys.readouterr().err
    assert code == 2 and 'cannot be exported' in err and 'needs model.ffn=gelu' in err and 'Traceback' not in err and not (tmp_path/'run').exists()
    assert pretrain(get_recipe('24hbert', 'tiny', settings), data, tmp_path/'run', steps=2)


def test_windows_leave_too(text, tmp_path):
    recipe = get_recipe('modern', 'tiny', [f'corpus.source={text}', *SETTINGS, 'model.window=8', 'model.num_layers=4'])
    prepare(recipe, tmp_path/'data')
    pretrain(recipe, tmp_path/'data', tmp_path/'run', steps=2)
    stock = AutoModelForMaskedLM.from_pretrained(export_run(tmp_path/'run', tmp_path/'data'/'tokenizer', tmp_path/'model')).eval()
    ids = torch.randint(5, 100, (2, 30))
    with torch.no_grad(): assert (load_run(tmp_path/'run')[0].logits(ids, None) - stock(input_ids=ids).logits).abs().max() < 1e-4
