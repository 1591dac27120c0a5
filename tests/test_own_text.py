"A text of one's own: from a file to a model with what the commands themselves say"
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, make_text

import cramlit as package
from cramlit.core.recipes import UsageError
from cramlit.core.scales import SCALES
from cramlit.data.corpus import files
from cramlit.data.packing import open_data
from cramlit.running.command import main

NAMES = 'river stone garden window letter morning village harbour winter summer candle forest market'.split()


def sentences(n, seed=0):
    rng = random.Random(seed)
    return [' '.join(rng.choices(NAMES, k=9)).capitalize() + '.' for _ in range(n)]


def book(kind, n=600):
    "A book: paragraphs with blank lines between, a paragraph a line, or lines of a fixed width"
    all_sentences = sentences(n)
    paragraphs = [' '.join(all_sentences[i:i + 6]) for i in range(0, n, 6)]
    if kind == 'blank': return '\n\n'.join('\n'.join(p.split('. ')) for p in paragraphs)
    if kind == 'line': return '\n'.join(paragraphs)
    words, lines = ' '.join(paragraphs).split(), ['']
    for word in words:
        if len(lines[-1]) + len(word) > 70: lines.append('')
        lines[-1] = f'{lines[-1]} {word}'.strip()
    return '\n'.join(lines)


def cramlit(capsys, *args):
    code = main([str(a) for a in args])
    return code, capsys.readouterr().err


def next_command(err):
    "The last command that was advised"
    return shlex.split([line for line in err.splitlines() if line.startswith('next: cramlit ')][-1])[2:]


def test_prepared_data_describe_themselves(tmp_path, monkeypatch, capsys):
    "Each command is the one that the command before it advises"
    monkeypatch.chdir(tmp_path)
    make_text(tmp_path/'texts')
    code, err = cramlit(capsys, 'prepare', '--source', 'texts', '--scale', 'tiny',
                        '-o', 'packing.mode=stream', '-o', 'tokenizer.vocab_size=128',
                        '-o', 'corpus.holdout=0.1', '-o', 'optim.lr=1e-3',
                        '-o', 'validation.max_sequences=64', '--out', 'my data')
    assert code == 0 and 'the text is in my data' in err
    args = next_command(err)
    assert args[0] == 'pretrain' and '-o' in args and not any('packing' in a or 'corpus' in a for a in args)
    code, err = cramlit(capsys, *args, '--steps', 2)
    assert 'as my data was prepared: tokenizer.vocab_size=128, packing.mode=stream' in err
    assert code == 0 and 'the model is in run/model' in err and 'run/report.html' in err
    recipe = json.loads(Path('run/run.json').read_text())['recipe']
    assert recipe['corpus']['source'] == 'texts' and recipe['packing']['mode'] == 'stream'
    assert recipe['optim']['lr'] == 1e-3 and next_command(err)[0] == 'glue'
    for way in ('texts/', './texts', tmp_path/'texts'):
        code, err = cramlit(capsys, *args, '-o', f'corpus.source={way}', '--steps', 2)
        assert code == 0, err
    wrongs = 'packing.seq_len=16', 'packing.mode=document', 'corpus.source=x', 'tokenizer.lowercase=false'
    for wrong in wrongs:
        code, err = cramlit(capsys, *args, '-o', wrong, '--steps', 2)
        assert code == 2 and f'was prepared with {wrong.partition("=")[0]}' in err and err.count('\n') == 1
    code, err = cramlit(capsys, 'export', '--run', 'run', '--to', 'gift')
    assert code == 0 and "pipeline('fill-mask', 'gift')" in err
    assert 'texts' in (tmp_path/'gift'/'README.md').read_text()


def test_from_python_prepared_data_describe_themselves_too(tmp_path, capsys):
    own = [f"corpus.source={make_text(tmp_path/'texts')}", 'corpus.holdout=0.1', 'tokenizer.vocab_size=128']
    package.prepare(package.get_recipe('24hbert', 'tiny', own), tmp_path/'data')
    rows = package.pretrain(package.get_recipe('24hbert', 'tiny'), tmp_path/'data', tmp_path/'run', steps=2)
    assert 'data was prepared: tokenizer.vocab_size=128' in capsys.readouterr().err
    assert rows[0]['metric'] == 'validation_loss'
    recipe = json.loads((tmp_path/'run'/'run.json').read_text())['recipe']
    assert recipe['corpus']['source'].endswith('texts') and recipe['tokenizer']['vocab_size'] == 128
    with pytest.raises(UsageError, match='was prepared with packing.seq_len=32, the recipe has 48'):
        odd = package.get_recipe('24hbert', 'tiny', 'packing.seq_len=48')
        package.pretrain(odd, tmp_path/'data', tmp_path/'other', steps=2)
    assert not (tmp_path/'other').exists()


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no device that is always full')
def test_messages_that_cannot_be_written_end_no_work(tmp_path):
    "The disk that takes the messages is full"
    make_text(tmp_path/'texts')
    texts, data, run = (str(tmp_path/name) for name in ('texts', 'data', 'run'))
    for args in (['prepare', '--source', texts, '-o', 'tokenizer.vocab_size=128', '--out', data],
                 ['pretrain', '--data', data, '--out', run, '--steps', '2']):
        with open('/dev/full', 'w') as full:
            done = subprocess.run([sys.executable, '-m', 'cramlit', *args, '--scale', 'tiny'], text=True,
                                  stdout=subprocess.PIPE, stderr=full, timeout=PATIENCE)
        assert done.returncode == 0 and 'tokens' in done.stdout
    assert (tmp_path/'run'/'model'/'model.safetensors').exists()


@pytest.mark.parametrize('scale', [s for s in SCALES if s != 'paper-rehearsal'])
@pytest.mark.parametrize('kind', ['blank', 'line', 'width', 'ten files'])
def test_a_book_or_ten_files_are_enough_at_every_scale(kind, scale, tmp_path, capsys):
    source = tmp_path/'book.txt'
    if kind == 'ten files': make_text(source := tmp_path/'ten', documents=10)
    else: source.write_text(book(kind))
    code, err = cramlit(capsys, 'prepare', '--source', source, '--scale', scale, '--out', tmp_path/'data',
                        '-o', 'tokenizer.vocab_size=256')
    assert code == 0, err
    data = open_data(tmp_path/'data')
    assert len(data.train) > 1 and len(data.validation) >= 1
    assert len(data.train) > len(data.validation)
    assert 'held out: 0,' not in err and 'held out: 0\n' not in err


@pytest.mark.parametrize('how, documents', [('blank', 100), ('line', 600), ('file', 1)])
def test_where_documents_end_can_be_said(how, documents, tmp_path, capsys):
    (tmp_path/'book.txt').write_text(book('blank'))
    code, err = cramlit(capsys, 'prepare', '--source', tmp_path/'book.txt', '--scale', 'tiny',
                        '--split-documents', how, '-o', 'corpus.max_documents=0', '--out', tmp_path/'data')
    assert code == 0, err
    assert open_data(tmp_path/'data').manifest['documents']['documents'] == documents


def test_a_blank_line_at_the_end_is_no_document(tmp_path):
    (tmp_path/'own.txt').write_text('One.\nTwo.\n\nThree.\n\n')
    for split, number in (('blank', 2), ('line', 3), ('file', 1)):
        assert len(list(files(tmp_path/'own.txt', split=split))) == number


def test_what_was_left_out_is_said_with_its_reason(tmp_path, capsys):
    texts = [' '.join(sentences(6, seed)) for seed in range(60)]
    lines = [json.dumps(dict(text=t)) for t in [*texts, *texts[:7], '', ' ']]
    (tmp_path/'own.jsonl').write_text('\n'.join(lines))
    code, err = cramlit(capsys, 'prepare', '--source', tmp_path/'own.jsonl', '--scale', 'tiny', '--out',
                        tmp_path/'data')
    assert code == 0 and '7 duplicates' in err and '2 empty' in err
    assert 'tokens of text' in err and '% are in the sequences' in err
