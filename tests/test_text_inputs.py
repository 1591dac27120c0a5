"Text as people have it: odd names, packings, encodings, scripts, folders and disks"
import ast
import bz2
import errno
import gzip
import json
import lzma
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PATIENCE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import cramlit.data.corpus as corpus
import cramlit.data.packing as packing
from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.scales import get_recipe
from cramlit.data.corpus import Document, documents, unique
from cramlit.data.packing import open_data, read_documents
from cramlit.data.tokenizer import encode_documents, load_tokenizer, sentences, train_tokenizer
from cramlit.running.command import main

WORDS = 'river stone garden window letter morning village harbour winter summer candle forest market'.split()
SPECIAL = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
SMALL = ('--scale', 'tiny', '-o', 'corpus.max_documents=0', '-o', 'corpus.holdout=0.1')
HINDI = 'नदी किनारे गाँव बच्चे किताब सुबह पेड़ पुराना घर बाज़ार रास्ता पानी सूरज बादल गीत खेत माता भाई मित्र'.split()
URDU = 'دریا گاؤں بچے کتاب صبح درخت پرانا گھر بازار راستہ پانی سورج بادل گیت کھیت ماں بھائی دوست'.split()


def make_texts(n=80, seed=0, words=WORDS, end='.', capital=True, sentences=8):
    "Documents of sentences of nine words"
    rng = random.Random(seed)
    def sentence():
        s = ' '.join(rng.choices(words, k=9)) + end
        return s.capitalize() if capital else s
    return [' '.join(sentence() for _ in range(sentences)) for _ in range(n)]


def json_lines(texts, field='text'):
    return ''.join(json.dumps({field: t}, ensure_ascii=False) + '\n' for t in texts).encode()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def prepare(source, out, *more):
    "The exit code of `cramlit prepare`"
    sources = [str(s) for s in (source if isinstance(source, list) else [source])]
    return main(['prepare', '--source', *sources, *SMALL, '--out', str(out), *more])


def command(source):
    "`cramlit prepare` for a process of its own, without --out"
    return [sys.executable, '-m', 'cramlit.running.command', 'prepare', '--source', str(source), *SMALL]


def texts_of(source, **options): return [d.text for d in documents(str(source), **options)]


def recipe_of(source):
    "What `prepare` prepares for"
    return get_recipe('24hbert', 'tiny', [*SMALL[3::2], f'corpus.source={source}'])


def manifest_of(out): return json.loads((out/'manifest.json').read_text())


@pytest.fixture
def own(tmp_path): return write(tmp_path/'in'/'own.jsonl', json_lines(make_texts()))


# text is text

def test_control_tokens_in_a_text_are_words(tmp_path):
    docs = [t.replace('river', '[PAD] [MASK] and [CLS] or [SEP]') for t in make_texts(100)]
    source = write(tmp_path/'howto.jsonl', json_lines(docs))
    for mode in ('paper', 'stream'):
        assert prepare(source, tmp_path/mode, '-o', f'packing.mode={mode}') == 0
        data = open_data(tmp_path/mode)
        special, rows = data.manifest['special_ids'], data.train[np.arange(len(data.train))]
        length = (rows != special['pad']).sum(1)
        assert all((row[:n] != special['pad']).all() for row, n in zip(rows, length, strict=True))
        assert not (rows == special['mask']).any() and not (rows[:, 1:] == special['cls']).any()
    train = ['--data', str(tmp_path/'paper'), '--out', str(tmp_path/'run'), '--steps', '4']
    assert main(['pretrain', *SMALL, '-o', f'corpus.source={source}', *train]) == 0


def fast(rust): return PreTrainedTokenizerFast(
    tokenizer_object=rust, **{f'{name.strip("[]").lower()}_token': name for name in SPECIAL})


def test_a_tokenizer_on_bytes_sees_the_text_as_a_whole():
    rust, texts = Tokenizer(models.BPE()), make_texts()
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tok, docs = fast(rust), [Document(str(i), t) for i, t in enumerate(texts)]
    docs.append(Document('odd', 'Ünï. Cödé 🙂! 東京。大阪。\n\n  Two  spaces. "Quote." \u200b End'))
    for d, pieces in encode_documents(docs, tok):
        assert [i for p in pieces for i in p] == tok(d.text, add_special_tokens=False)['input_ids']
        assert len(pieces) == len(sentences(d.text))


def test_a_control_token_that_is_a_word_of_the_vocabulary_is_unknown():
    vocab = {w: i for i, w in enumerate([*SPECIAL, 'the', 'river'])}
    rust = Tokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (_, pieces), = encode_documents([Document('a', 'the [PAD] river [MASK] [SEP] the')], fast(rust))
    assert pieces == [[5, 1, 6, 1, 1, 5]]


def test_ids_with_gaps_have_room(tmp_path, own):
    assert prepare(own, tmp_path/'first', '-o', 'tokenizer.vocab_size=200') == 0
    folder = shutil.copytree(tmp_path/'first'/'tokenizer', tmp_path/'cut')
    saved = json.loads((folder/'tokenizer.json').read_text())
    vocab = saved['model']['vocab']
    top = max(vocab, key=vocab.get)
    vocab[top] = 70_000  # as when entries that were never used are taken out, and numbers kept
    (folder/'tokenizer.json').write_text(json.dumps(saved))
    assert prepare(own, tmp_path/'data', '-o', f'tokenizer.path={folder}') == 0
    assert open_data(tmp_path/'data').manifest['vocab_size'] == 70_001


# a source that has changed, and one that has not

CHANGES = {
    'grew': (lambda d: write(d/'own.jsonl', json_lines(make_texts(90))), 'own.jsonl has changed'),
    'corrected': (lambda d: write(d/'own.jsonl', (d/'own.jsonl').read_bytes().replace(b'river', b'ocean')),
                  'own.jsonl has changed'),
    'new': (lambda d: write(d/'deep'/'more.txt', 'More.'), 'more.txt is new'),
    'gone': (lambda d: (d/'second.txt').unlink(), 'second.txt is gone'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_data_of_files_that_have_changed_is_made_anew(own, tmp_path, capsys, change):
    write(own.parent/'second.txt', make_texts(1)[0])
    assert prepare(own.parent, tmp_path/'data') == 0
    before = manifest_of(tmp_path/'data')
    alter, says = CHANGES[change]
    alter(own.parent)
    capsys.readouterr()
    assert prepare(own.parent, tmp_path/'data') == 0
    err = capsys.readouterr().err
    assert f'was prepared, {tmp_path}' in err and f'{says}: it is prepared anew' in err
    assert before != manifest_of(tmp_path/'data') or change == 'new'  # too short a text to be in a row
    old, = (tmp_path/'data'/'superseded').iterdir()
    assert str(old) in err and manifest_of(old) == before
    packing.verify(open_data(old))
    packing.verify(open_data(tmp_path/'data'))
    assert prepare(own.parent, tmp_path/'data') == 0
    assert len(list((tmp_path/'data'/'superseded').iterdir())) == 1


def test_data_that_cannot_be_made_anew_stays_as_it_was(own, tmp_path, capsys):
    assert prepare(own, tmp_path/'data') == 0
    before = sorted(p.name for p in (tmp_path/'data').iterdir())
    write(own, b'no JSON')
    assert prepare(own, tmp_path/'data') == 1
    assert 'not JSON' in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path/'data').iterdir()) == before
    packing.verify(open_data(tmp_path/'data'))


def test_files_of_no_kind_do_not_count_as_a_change(own, tmp_path):
    assert prepare(own.parent, tmp_path/'data') == 0
    write(own.parent/'README.md', '# mine')
    write(own.parent/'.notes.txt', 'hidden')
    assert prepare(own.parent, tmp_path/'data') == 0


def test_data_prepared_inside_the_source_is_no_source(own, tmp_path, monkeypatch):
    monkeypatch.chdir(own.parent)
    for _ in range(2): assert prepare('.', 'data') == 0
    assert manifest_of(Path('data'))['documents']['documents'] == 80


def test_a_link_to_another_file_is_a_change(own, tmp_path, capsys):
    other, link = write(tmp_path/'other', json_lines(make_texts(seed=5))), own.parent/'link.jsonl'
    own.rename(tmp_path/'first')
    link.symlink_to(tmp_path/'first')
    assert prepare(link, tmp_path/'data') == 0 == prepare(link, tmp_path/'data')
    link.unlink()
    link.symlink_to(other)
    assert prepare(link, tmp_path/'data') == 0
    assert 'and 1 more are not as they were' in capsys.readouterr().err


def test_data_of_a_tokenizer_that_has_changed_is_made_anew(own, tmp_path, capsys):
    assert prepare(own, tmp_path/'first') == 0
    folder = shutil.copytree(tmp_path/'first'/'tokenizer', tmp_path/'tok')
    settings = ('-o', f'tokenizer.path={folder}')
    assert prepare(own, tmp_path/'data', *settings) == 0
    assert prepare(own, tmp_path/'data', *settings) == 0
    write(folder/'tokenizer.json', (folder/'tokenizer.json').read_text() + ' ')
    assert prepare(own, tmp_path/'data', *settings) == 0
    assert 'tokenizer.json has changed: it is prepared anew' in capsys.readouterr().err


def test_one_folder_under_many_names(own, tmp_path, monkeypatch, capsys):
    folder = own.parent
    (tmp_path/'link').symlink_to(folder)
    assert prepare(folder, tmp_path/'data') == 0
    monkeypatch.chdir(folder)
    for name in (f'{folder}/', f'{folder}/../in', '.', './', '../in/', tmp_path/'link', '../link/'):
        assert prepare(name, tmp_path/'data') == 0, name
        assert not packing.unlike(open_data(tmp_path/'data'), recipe_of(name))
    assert prepare(own, tmp_path/'data') == 2
    assert 'corpus.source' in capsys.readouterr().err


def test_a_file_that_changes_while_it_is_read(own, tmp_path, monkeypatch, capsys):
    whole = packing._build
    def build(recipe, folder):
        manifest = whole(recipe, folder)
        write(own, json_lines(make_texts(3)))
        return manifest
    monkeypatch.setattr(packing, '_build', build)
    assert prepare(own, tmp_path/'data') == 1
    assert 'while the text was read' in capsys.readouterr().err and not (tmp_path/'data').exists()


# names with a separator in them

def test_a_path_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd, plain = Path('dump-2024-01-01T12:00/wiki.jsonl'), Path('a.txt')
    write(odd, json_lines(['odd']))
    write(plain, 'plain')
    assert texts_of(odd) == ['odd']
    assert texts_of(f'{plain}:{odd}') == ['plain', 'odd'] == texts_of(f'{plain}:{odd.resolve()}:')
    write(Path('hub:one/train.jsonl'), json_lines(['hub']))
    assert texts_of('./hub:one') == ['hub']
    parts = ['hub:a/b:en', 'a.txt', 'enwik8', 'hub:c/d']
    assert corpus.split_source(':'.join(parts)) == parts
    for empty in ('', ' ', ':'):
        with pytest.raises(UsageError, match='empty'): texts_of(empty)


def test_several_sources_of_several_kinds(own, tmp_path):
    assert prepare([own, 'enwik8'], tmp_path/'data', '-o', 'corpus.max_documents=90') == 0
    assert manifest_of(tmp_path/'data')['documents']['documents'] == 90


# what a file holds

def test_suffixes(tmp_path):
    folder = tmp_path/'in'
    write(folder/'A.TXT', 'A')
    write(folder/'b.txt.gz', gzip.compress(b'b'))
    write(folder/'c.jsonl.bz2', bz2.compress(json_lines(['c1', 'c2'])))
    write(folder/'d.JSONL.XZ', lzma.compress(json_lines(['d'])))
    write(folder/'e.ndjson', json_lines(['e']))
    write(folder/'f.json', json_lines(['f']))
    write(folder/'g', json_lines(['g']))
    write(folder/'package.json', '{\n "name": "x",\n "text": "no"\n}')
    write(folder/'state.json', '{"name": "x"}')
    write(folder/'picture.png', b'\x89PNG\0')
    write(folder/'LICENSE', 'Apache')
    write(folder/'h.tar.gz', gzip.compress(b'\0'*512))
    (folder/'x.txt').mkdir()
    write(folder/'x.txt'/'i.txt', 'i')
    counts = corpus.Counter()
    assert texts_of(folder, counts=counts) == ['A', 'b', 'c1', 'c2', 'd', 'e', 'f', 'g', 'i']
    assert counts['files of other kinds'] == 5
    assert texts_of(folder/'x.txt') == ['i'] and texts_of(folder/'g') == ['g']


def test_zstd_is_read_or_the_package_is_named(tmp_path):
    try: import zstandard  # noqa: I001
    except ImportError:
        write(tmp_path/'a.txt.zst', b'\x28\xb5\x2f\xfd')
        with pytest.raises(CramlitError, match='install the package zstandard'):
            texts_of(tmp_path/'a.txt.zst')
        return
    raw = json_lines(make_texts())
    frames = zstandard.compress(raw[:3000]) + zstandard.compress(raw[3000:])
    write(tmp_path/'a.jsonl.zst', frames)
    assert len(texts_of(tmp_path/'a.jsonl.zst')) == 80
    write(tmp_path/'a.jsonl.zst', frames[:-9])
    with pytest.raises(CramlitError, match='truncated or damaged'): texts_of(tmp_path/'a.jsonl.zst')


def test_hidden_files_are_left_out(tmp_path):
    for name in ('a.txt', '._a.txt', '.DS_Store', '.ipynb_checkpoints/a-checkpoint.txt', '__MACOSX/a.txt'):
        write(tmp_path/'in'/name, name)
    assert texts_of(tmp_path/'in') == ['a.txt']
    hidden = write(tmp_path/'.cache'/'.b.txt', 'asked for')
    assert texts_of(hidden) == ['asked for']


def test_links_are_followed_once(tmp_path):
    write(tmp_path/'elsewhere'/'a.txt', 'a')
    folder = tmp_path/'in'
    folder.mkdir()
    (folder/'linked').symlink_to(tmp_path/'elsewhere')
    (folder/'again').symlink_to(tmp_path/'elsewhere')
    (tmp_path/'elsewhere'/'loop').symlink_to(folder)
    (folder/'b.txt').symlink_to(tmp_path/'elsewhere'/'a.txt')
    os.mkfifo(folder/'pipe.txt')
    assert texts_of(folder) == ['a', 'a']


def test_wikiextractor(tmp_path):
    form = '<doc id="{0}" url="x" title="T &amp; {0}">\nT & {0}\n\nBody {0}.\nMore.\n</doc>\n'
    docs = [form.format(i) for i in range(3)]
    write(tmp_path/'text'/'AA'/'wiki_00', ''.join(docs))
    write(tmp_path/'text'/'AA'/'wiki_01.bz2', bz2.compress(json_lines(['as JSON'])))
    found = list(documents(str(tmp_path/'text')))
    assert [d.text for d in found] == ['Body 0.\nMore.', 'Body 1.\nMore.', 'Body 2.\nMore.', 'as JSON']
    assert found[0].id == 'T & 0'
    write(tmp_path/'text'/'AA'/'wiki_00', ''.join(docs)[:-20])
    with pytest.raises(CramlitError, match='wiki_00 is truncated'): texts_of(tmp_path/'text')


PROSE = 'This is an article of some length with [[Batman: Year One]] and [[de:Fluss]] in it.' + ' So it is.'*6
PAGE = '<page><title>{}</title><ns>{}</ns>{}<revision><text xml:space="preserve">{}</text></revision></page>'
DUMP = ('<?xml version="1.0"?>\n<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo/>'
        + PAGE.format('River', 0, '', PROSE) + PAGE.format('Modul:River', 828, '', PROSE)
        + PAGE.format('Stream', 0, '<redirect title="River"/>', PROSE) + PAGE.format('Brook', 0, '', PROSE))


@pytest.mark.parametrize('name, pack', [
    ('enwiki-latest-pages-articles.xml', bytes), ('enwiki.xml.bz2', bz2.compress),
    ('enwiki.xml.gz', gzip.compress), ('enwik9', bytes), ('articles.xml-p1p41242.bz2', bz2.compress)])
def test_a_dump_of_wikipedia(tmp_path, name, pack):
    path = write(tmp_path/'in'/name, pack((DUMP + '</mediawiki>').encode()))
    for source in (path, path.parent):
        assert [d.id for d in documents(str(source))] == ['River', 'Brook']
    assert 'with Batman: Year One and in it' in texts_of(path)[0]


def test_a_dump_that_is_cut_off_or_broken(tmp_path, capsys):
    write(tmp_path/'a.xml', DUMP[:-200])
    assert [d.id for d in documents(str(tmp_path/'a.xml'))] == ['River']
    assert 'a.xml ends in the middle of a page' in capsys.readouterr().err
    write(tmp_path/'b.xml', DUMP.replace('<title>Brook', '<title></page>') + '</mediawiki>')
    with pytest.raises(CramlitError, match='b.xml is damaged XML .*line 2'): texts_of(tmp_path/'b.xml')
    write(tmp_path/'c.xml', '<project/>')
    with pytest.raises(UsageError, match='c.xml is of no known kind'): texts_of(tmp_path/'c.xml')


def test_enwik8_is_known_by_its_name_and_its_checksum(tmp_path, monkeypatch):
    monkeypatch.setenv('CRAMLIT_CACHE', str(tmp_path/'cache'))
    for name in ('enwik8-notes.txt', 'enwik8_clean.txt', 'enwik8.txt'):
        assert texts_of(write(tmp_path/name, 'A text like any other.')) == ['A text like any other.']
    write(tmp_path/'enwik8.gz', gzip.compress(DUMP.encode()))
    with pytest.raises(CramlitError, match='enwik8.gz is not enwik8.*rename it') as e:
        texts_of(tmp_path/'enwik8.gz')
    assert 'elete' not in str(e.value) and not list((tmp_path/'cache').rglob('*'))


# what is wrong with a file

WRONG = {  # kind: name of the file, its content, what is said
    'gz that is not': ('a.txt.gz', b'plain', 'a.txt.gz is truncated or damaged .Not a gzipped'),
    'cut bz2': ('a.jsonl.bz2', bz2.compress(json_lines(make_texts()))[:-9], 'truncated or damaged'),
    'no bz2': ('a.jsonl.bz2', b'BZh9junkjunk', 'a.jsonl.bz2 is truncated or damaged'),
    'cut xz': ('a.txt.xz', lzma.compress(b'a'*9999)[:-9], 'a.txt.xz is truncated or damaged'),
    'latin-1': ('a.txt', b'caf\xe9', 'a.txt is not UTF-8 at byte 3: convert it.*iconv'),
    'latin-1, far': ('a.txt', 'ä'.encode()*(1 << 19) + b'a' + 'ä'.encode()*(1 << 19) + b'\xe9.',
                     f'a.txt is not UTF-8 at byte {(1 << 21) + 1}:'),
    'a letter cut in two': ('a.txt', 'über ä'.encode()[:-1], 'a.txt is not UTF-8 at byte 6'),
    'latin-1 with a BOM': ('a.txt', b'\xef\xbb\xbfab\xe9 c', 'a.txt is not UTF-8 at byte 5'),
    'UTF-16 unmarked': ('a.txt', 'river'.encode('utf-16-le'), 'a.txt is a binary file.*UTF-16'),
    'one array': ('a.jsonl', json.dumps([{'text': 'a'}], indent=1), 'line 1: not JSON lines but'),
    'one array in a line': ('a.jsonl', b'[{"text": "a"}]', 'line 1: not JSON lines but'),
    'texts alone': ('a.jsonl', b'"text"', 'line 1: a text without a field'),
    'other field': ('a.jsonl', json_lines(['a'], 'content'),
                    'line 1: no field "text".*only content.*corpus.text_field'),
    'no parquet': ('a.parquet', b'PAR1junkPAR1', 'a.parquet is not a whole parquet file'),
    'a link to nothing': ('a.txt', None, 'cannot read .*a.txt: No such file.*link to nothing'),
}


@pytest.mark.parametrize('kind', WRONG)
def test_what_is_wrong_with_a_file_is_one_line(kind, tmp_path, capsys):
    name, content, says = WRONG[kind]
    (tmp_path/'in').mkdir()
    if content is None: (tmp_path/'in'/name).symlink_to('/nowhere/b.txt')
    else: write(tmp_path/'in'/name, content)
    assert prepare(tmp_path/'in', tmp_path/'out') == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith('cramlit: ') and 'space' not in last
    with pytest.raises(CramlitError, match=says): raise CramlitError(last)
    assert os.listdir(tmp_path) == ['in']


@pytest.mark.parametrize('what', ['a.txt', 'b.jsonl', 'c.parquet', 'd', 'in'])
def test_what_may_not_be_read(what, tmp_path, monkeypatch):
    folder = tmp_path/'in'
    write(folder/'a.txt', 'a')
    write(folder/'b.jsonl', json_lines(['b']))
    pq.write_table(pa.table(dict(text=['c'])), folder/'c.parquet')
    write(folder/'d', json_lines(['d']))
    if os.geteuid():
        for p in (folder/what, folder): p.chmod(0 if p.name == what else 0o755)
    else:  # root may read everything
        def refuse(path):
            if Path(path).name == what: raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        real, scan, parquet = corpus.open_unpacked, os.scandir, pq.ParquetFile
        monkeypatch.setattr(corpus, 'open_unpacked', lambda p: refuse(p) or real(p))
        monkeypatch.setattr(os, 'scandir', lambda p: refuse(p) or scan(p))
        monkeypatch.setattr(pq, 'ParquetFile', lambda p, **more: refuse(p) or parquet(p, **more))
    with pytest.raises(CramlitError, match=f'cannot read .*{what}: Permission denied. Ask for the right'):
        texts_of(folder)
    if os.geteuid(): (folder/what).chmod(0o755)


# encodings and characters

def test_encodings(tmp_path):
    text = 'Die Müller läuft.\nDer Bär schläft.'
    for name, data in (('a', text.encode('utf-16')), ('b', b'\xfe\xff' + text.encode('utf-16-be')),
                       ('c', text.encode('utf-32')), ('d', b'\xef\xbb\xbf' + text.encode()),
                       ('e', text.replace('\n', '\r\n').encode()), ('f', text.replace('\n', '\r').encode())):
        assert texts_of(write(tmp_path/f'{name}.txt', data)) == [text], name
    lines = json_lines([text, 'two']).decode()
    for encoding in ('utf-16', 'utf-8-sig'):
        assert texts_of(write(tmp_path/'a.jsonl', lines.encode(encoding))) == [text, 'two']


def test_line_ends_over_the_edge_of_a_piece(tmp_path):
    text = 'a'*((1 << 20) - 1) + '\r\n' + 'ü\u2028a'*9
    pieces = texts_of(write(tmp_path/'a.txt', text.encode()), split='line')
    assert pieces == ['a'*((1 << 20) - 1), 'ü\u2028a'*9]


def test_characters_that_are_none(tmp_path, capsys):
    texts = make_texts()
    texts[3] += ' \0\0\0 Tail \ud83d \u200b\u200d\ufeff end.'
    lines = ''.join(json.dumps(dict(text=t)) + '\n' for t in texts)
    late = make_texts(1, seed=9, sentences=200)[0].encode()[:9000] + b'\0\0 Tail.'
    write(tmp_path/'in'/'a.jsonl', lines)
    write(tmp_path/'in'/'b.txt', late)
    assert prepare(tmp_path/'in', tmp_path/'out') == 0
    counted = manifest_of(tmp_path/'out')['documents']
    assert counted['documents with NUL characters'] == 2
    assert counted['documents with halves of characters'] == 1
    odd = {'\0', '\ufeff', '\u200b', '\u200d', '\r'}
    assert not any(odd & set(piece) for piece in load_tokenizer(tmp_path/'out'/'tokenizer').get_vocab())


def test_an_ascii_locale(own, tmp_path):
    german = [t.replace('river', 'Fluß').replace('stone', 'Mühle') for t in make_texts()]
    folder = tmp_path/'Bücher'
    folder.mkdir()
    write(folder/'ä.jsonl', json_lines(german))
    ascii_only = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0', PYTHONIOENCODING='ascii')
    prepare_it = [*command(folder), '-o', 'tokenizer.lowercase=false', '--out', str(tmp_path/'out')]
    for _ in range(2):
        done = subprocess.run(prepare_it, env=os.environ | ascii_only, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert 'Fluß' in ' '.join(d.text for d in read_documents(tmp_path/'out'/'holdout.jsonl.gz'))


def test_every_text_file_is_opened_as_utf8():
    "Or as bytes: whatever a machine's own encoding is, no file of ours is written or read in it"
    found = []
    for path in Path(packing.__file__).parents[1].rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Call): continue
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            binary = name == 'open' and any(re.fullmatch('[rwax]b', text) for text in texts)
            owner = getattr(getattr(node.func, 'value', None), 'id', '')
            other = name == 'open' and owner in ('os', 'tarfile', 'bz2', 'gzip', 'lzma', 'z')
            said = any(k.arg in ('encoding', None) for k in node.keywords) or 'utf-8' in texts
            if name in ('open', 'read_text', 'write_text') and not (binary or other or said):
                found.append(f'{path}:{node.lineno}')
    assert not found


# records

def test_the_field_of_the_text(tmp_path):
    texts = make_texts()
    nested = [dict(doc=dict(text=t, n=i), text=5) for i, t in enumerate(texts)]
    write(tmp_path/'a.jsonl', ''.join(json.dumps(r) + '\n' for r in nested))
    pq.write_table(pa.Table.from_pylist(nested), tmp_path/'a.parquet')
    pq.write_table(pa.table({'doc.text': pa.array(texts).dictionary_encode()}), tmp_path/'b.parquet')
    write(tmp_path/'hub'/'train.jsonl', (tmp_path/'a.jsonl').read_bytes())
    for source in ('a.jsonl', 'a.parquet', 'b.parquet'):
        assert texts_of(tmp_path/source, field='doc.text') == texts, source
    assert texts_of(f'hub:{tmp_path/"hub"}', field='doc.text') == texts
    assert prepare(tmp_path/'a.jsonl', tmp_path/'out', '-o', 'corpus.text_field=doc.text') == 0
    for source in ('a.jsonl', 'a.parquet', f'hub:{tmp_path/"hub"}'):
        with pytest.raises(CramlitError, match='doc.body.*corpus.text_field'):
            texts_of(source if ':' in source else tmp_path/source, field='doc.body')


def test_a_null_text_is_counted_and_left_out(tmp_path):
    texts = [None if i == 40 else t for i, t in enumerate(make_texts())]
    write(tmp_path/'hub'/'train.jsonl', json_lines(texts))
    pq.write_table(pa.table(dict(text=texts)), tmp_path/'a.parquet')
    for i, source in enumerate((f'hub:{tmp_path/"hub"}', tmp_path/'hub'/'train.jsonl', tmp_path/'a.parquet')):
        assert prepare(source, tmp_path/f'out{i}') == 0
        counted = manifest_of(tmp_path/f'out{i}')['documents']
        assert (counted['documents'], counted['empty']) == (79, 1)


def test_white_space_does_not_make_a_document_another_one(tmp_path):
    texts = make_texts()
    twins = [y for x in texts
             for y in (x, x + '\n', x.replace('. ', '.\r\n'), ' ' + x.replace(' ', '\u00a0'))]
    docs = unique(documents(str(write(tmp_path/'a.jsonl', json_lines(twins)))))
    assert [d.text for d in docs] == texts


# one file, many documents

def test_one_file_with_many_articles(tmp_path):
    articles = [f'Title {i}\n{t}\n{t.upper()}' for i, t in enumerate(make_texts(30))]
    source = write(tmp_path/'wiki.txt', '\n\n'.join(articles) + '\n')
    assert texts_of(source) == articles == texts_of(source, split='blank')
    assert texts_of(source, split='file') == ['\n\n'.join(articles) + '\n']
    assert texts_of(source, split='line') == [line for a in articles for line in a.split('\n')]
    assert [d.id for d in documents(str(source))][:2] == ['wiki.txt:1', 'wiki.txt:2']
    a_line_each = write(tmp_path/'lines.txt', '\n'.join(make_texts(30)))
    assert texts_of(a_line_each) == make_texts(30)
    book = write(tmp_path/'book.txt', '\n\n'.join(make_texts(30)))
    assert len(texts_of(book)) == 1
    for i in range(20): write(tmp_path/'many'/f'{i:02}.txt', '\n\n'.join(articles))
    assert len(texts_of(tmp_path/'many')) == 20  # where there are many files, they are the documents
    assert len(texts_of(tmp_path/'many', split='blank')) == 600


def test_a_long_text_comes_in_parts(tmp_path):
    text = ' '.join(make_texts(5000))
    assert len(text) > 2*corpus.MAX_DOCUMENT
    for source in (write(tmp_path/'a.txt', text), write(tmp_path/'a.jsonl', json_lines([text]))):
        parts = texts_of(source)
        assert ''.join(parts) == text and len(parts) > 2 and all(p.rstrip().endswith('.') for p in parts)
    assert ''.join(texts_of(write(tmp_path/'b.txt', 'x'*(3 << 20)))) == 'x'*(3 << 20)


@pytest.mark.parametrize('scale', ['tiny', 'laptop', 'gpu', 'paper'])
def test_a_small_corpus_is_enough_at_every_scale(scale, tmp_path):
    ten = tmp_path/'ten'
    for i, t in enumerate(make_texts(10, sentences=60)): write(ten/f'{i}.txt', t)
    one = write(tmp_path/'one.txt', make_texts(1, sentences=400)[0])
    for source in (ten, one):
        out = tmp_path/f'out-{source.name}'
        assert main(['prepare', '--source', str(source), '--scale', scale, '--out', str(out)]) == 0
        data = open_data(out)
        held = ' '.join(d.text for d in read_documents(out/'holdout.jsonl.gz'))
        assert 1000 < len(held) < 20_000 and len(data.train) > len(data.validation)
        tok = load_tokenizer(out/'tokenizer')
        seen = tok.decode(data.train[:].ravel(), skip_special_tokens=True)
        assert not any(s.lower().rstrip('.') in seen for s in sentences(held))


def test_the_hold_out_of_short_titles_can_be_evaluated(tmp_path):
    for seed in range(6):
        source = write(tmp_path/f'{seed}.jsonl', json_lines(make_texts(60, seed, sentences=1)))
        settings = ['corpus.holdout=0.02', f'corpus.source={source}', 'corpus.max_documents=0']
        packing.prepare(get_recipe('24hbert', 'tiny', settings), tmp_path/f'out{seed}')
        data = open_data(tmp_path/f'out{seed}')
        from cramlit.data.batches import validation_batches
        assert sum((b.labels >= 0).sum() for b in validation_batches(data, get_recipe('24hbert', 'tiny'))) > 3


def test_a_hold_out_with_nothing_to_predict_is_one_line(own, tmp_path, capsys):
    from cramlit.data.batches import validation_batches
    tiny = get_recipe('24hbert', 'tiny')
    assert prepare(own, tmp_path/'data') == 0
    amharic = make_texts(40, words='ወንዝ ድንጋይ መስኮት ደብዳቤ ጠዋት መንደር'.split(), end='።')
    source = write(tmp_path/'amharic.jsonl', json_lines(amharic))
    capsys.readouterr()
    assert prepare(source, tmp_path/'out', '-o', f'tokenizer.path={tmp_path/"data"/"tokenizer"}') == 1
    assert 'knows no token of the' in capsys.readouterr().err and not (tmp_path/'out').exists()
    data = open_data(tmp_path/'data')
    class One:
        def __len__(self): return 1
        def __getitem__(self, index): return np.array([[2, 7, 3, 0]])
    with pytest.raises(CramlitError, match='no token of it is predicted'):
        next(validation_batches(replace(data, ruler=dict(tune=One())), tiny))


# sentences, accents, alphabets

@pytest.mark.parametrize('words, end, capital', [
    (WORDS, '.', True), (WORDS, '.', False), (WORDS, '.”', True), (WORDS, '!)', True), (WORDS, '…', True),
    (HINDI, ' है।', False), (URDU, ' ہے۔', False), (WORDS, '።', False), (WORDS, '。', False),
    (WORDS, '։', False)])
def test_sentences_of_many_scripts_end(words, end, capital):
    texts = make_texts(20, words=words, end=end, capital=capital)
    assert {len(sentences(t)) for t in texts} == {8}


def test_what_is_dropped_is_counted_and_said(tmp_path, capsys):
    without_ends = [t.replace('.', '').lower() for t in make_texts(60, sentences=14)]
    source = write(tmp_path/'a.jsonl', json_lines(without_ends))
    assert prepare(source, tmp_path/'document') == 0
    err = capsys.readouterr().err
    assert 'was dropped' in err and 'packing.mode=stream' in err
    train = manifest_of(tmp_path/'document')['splits']['train']
    assert train['kept_tokens'] == train['tokens'] - 2*train['rows'] < .5*train['text_tokens']
    assert prepare(source, tmp_path/'stream', '-o', 'packing.mode=stream') == 0
    assert 'was dropped' not in capsys.readouterr().err
    train = manifest_of(tmp_path/'stream')['splits']['train']
    assert train['text_tokens'] - train['kept_tokens'] < 32 and train['unknown_tokens'] == 0
    assert prepare(write(tmp_path/'b.jsonl', json_lines(make_texts())), tmp_path/'whole') == 0
    assert 'was dropped' not in capsys.readouterr().err


def test_accents_are_a_setting_and_stripping_them_is_said(tmp_path, capsys):
    words = 'má mà mả mã bán bàn bạn ban'.split()
    source = write(tmp_path/'vi.jsonl', json_lines(make_texts(60, words=words)))
    assert prepare(source, tmp_path/'auto') == 0
    err = capsys.readouterr().err
    assert 'tokenizer.strip_accents=false' in err and sum(word in err for word in words) >= 2
    tok = load_tokenizer(tmp_path/'auto'/'tokenizer')
    assert tok.tokenize('bán') == tok.tokenize('bàn'), 'what is said is so'
    texts = make_texts(60, words='लिखी लिखा किताब गीत खेत'.split(), end=' है।')
    assert prepare(write(tmp_path/'hi.jsonl', json_lines(texts)), tmp_path/'hi') == 0
    assert 'stripping accents' not in capsys.readouterr().err, 'vowel signs with a width of their own stay'
    tok = load_tokenizer(tmp_path/'hi'/'tokenizer')
    assert tok.tokenize('लिखी') != tok.tokenize('लिखा')
    assert prepare(source, tmp_path/'kept', '-o', 'tokenizer.strip_accents=false') == 0
    assert 'stripping accents' not in capsys.readouterr().err
    tok = load_tokenizer(tmp_path/'kept'/'tokenizer')
    assert tok.tokenize('bán') != tok.tokenize('bàn') and tok.tokenize('BAN') == tok.tokenize('ban')
    assert prepare(write(tmp_path/'en.jsonl', json_lines(make_texts())), tmp_path/'en') == 0
    assert 'stripping accents' not in capsys.readouterr().err
    assert prepare(source, tmp_path/'bad', '-o', 'tokenizer.strip_accents=maybe') == 2


def test_the_alphabet_follows_the_vocabulary(tmp_path, capsys):
    rng = random.Random(4)
    characters, weights = [chr(0x4e00 + i) for i in range(3000)], [1/(i + 30) for i in range(3000)]
    def sentence(): return ''.join(rng.choices(characters, weights, k=14)) + '。'
    texts = [''.join(sentence() for _ in range(60)) for _ in range(90)]
    source = write(tmp_path/'zh.jsonl', json_lines(texts))
    assert prepare(source, tmp_path/'out', '-o', 'tokenizer.vocab_size=4096') == 0
    err = capsys.readouterr().err
    train = manifest_of(tmp_path/'out')['splits']['train']
    assert train['unknown_tokens'] < .01*train['text_tokens'] and '% are unknown' in err
    assert prepare(source, tmp_path/'small', '-o', 'tokenizer.vocab_size=1500') == 0
    assert 'raise tokenizer.vocab_size' in capsys.readouterr().err
    tok = load_tokenizer(tmp_path/'small'/'tokenizer')
    assert len(tok) <= 1500 and all(c in tok.get_vocab() for c in characters[:300])  # rare ones are given up


# time and memory do not grow with more than the text

def in_time(code, seconds=150):
    "Run Python code within so much time of a CPU, however busy that is; what must not happen takes more"
    def limited(): resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    subprocess.run([sys.executable, '-c', code], check=True, preexec_fn=limited)


def test_packing_a_long_document_takes_linear_time():
    in_time('from cramlit.core.recipes import Packing\nfrom cramlit.data.packing import stream_rows\n'
            'n = sum(1 for _ in stream_rows([list(range(4_000_000))], Packing("stream", 32), 3))\n'
            'assert n == 133_333')


def test_text_without_a_space_takes_linear_time():
    in_time('import random\nfrom cramlit.core.recipes import Tokenizer\n'
            'from cramlit.data.tokenizer import *\nfrom cramlit.data.corpus import Document\n'
            'r = random.Random(0)\n'
            'data = ["".join(r.choices("abcdefghij", k=1_000_000)), "→"*1_000_000, "some river "*99]\n'
            'tok = train_tokenizer(lambda: data, Tokenizer(vocab_size=200))\n'
            'assert "river" in tok.get_vocab()\n'
            'assert len(list(encode_documents([Document("", t) for t in data], tok))) == 3')


def peak_memory(docs):
    "Megabytes of Python's memory while documents pass"
    tracemalloc.start()
    for _ in docs: pass
    peak = tracemalloc.get_traced_memory()[1]/1e6
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    line = 'A sentence that is neither long nor short, and ends.\n'
    write(tmp_path/'a.txt', line*1_000_000)
    assert peak_memory(documents(str(tmp_path/'a.txt'))) < 25
    page = PAGE.format('{}', 0, '', 'x'*30)
    with open(tmp_path/'b.xml', 'w') as f:
        f.write('<mediawiki>')
        for i in range(30_000): f.write(page.format(i))
        f.write('</mediawiki>')
    assert peak_memory(corpus.pages(tmp_path/'b.xml')) < 3
    numbered = (Document('', str(i)) for i in range(200_000))
    assert peak_memory(unique(numbered)) < 10


# the folder to fill

def test_the_working_directory(own, tmp_path, monkeypatch):
    (tmp_path/'empty').mkdir()
    monkeypatch.chdir(tmp_path/'empty')
    for _ in range(2): assert prepare('../in/own.jsonl', '.') == 0
    assert open_data('.') and '.prepare' not in os.listdir('.') and '.lock' not in os.listdir('.')


def test_a_link_and_a_disk(own, tmp_path):
    (tmp_path/'disk'/'lost+found').mkdir(parents=True)
    (tmp_path/'link').symlink_to(tmp_path/'disk')
    assert prepare(own, tmp_path/'link') == 0
    assert (tmp_path/'link').is_symlink() and (tmp_path/'disk'/'manifest.json').exists()


def test_a_folder_that_cannot_be_made(own, tmp_path, capsys):
    (tmp_path/'dangling').symlink_to('/nowhere/at/all')
    (tmp_path/'file').write_text('')
    reasons = {'dangling': 'link to nothing', 'file': 'it is a file', 'file/below': 'Not a directory'}
    for out, why in reasons.items():
        assert prepare(own, tmp_path/out) == 1
        err = capsys.readouterr().err
        assert 'cannot write' in err and why in err and 'space' not in err


def unshared(script, *args):
    "Run a shell script with mounts of its own; skips the test where that is not allowed"
    mounts = ['unshare', '-m']
    if subprocess.run([*mounts, 'true'], capture_output=True).returncode: pytest.skip('no mounts here')
    return subprocess.run([*mounts, 'bash', '-c', script, '-', *args], capture_output=True, text=True)


def test_a_mount_point(own, tmp_path):
    vol = tmp_path/'vol'
    vol.mkdir()
    twice = ' && '.join([f'"$@" --out {vol} >&2']*2)
    script = f'mount -t tmpfs none {vol} || exit 99; {twice} && ls -A {vol}'
    done = unshared(script, *command(own))
    if done.returncode == 99: pytest.skip('no mounts here')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ['holdout.jsonl.gz', 'manifest.json']


def test_a_parent_that_may_not_be_written(own, tmp_path):
    out = tmp_path/'parent'/'data'
    out.mkdir(parents=True)
    user = ['unshare', '-U', '--map-user=12345', '--map-group=12345']
    if subprocess.run([*user, 'true'], capture_output=True).returncode: pytest.skip('no users here')
    out.parent.chmod(0o555)
    done = subprocess.run([*user, *command(own), '--out', str(out)], capture_output=True, text=True)
    out.parent.chmod(0o755)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('kilobytes', [8, 24, 32])
def test_a_full_disk(own, tmp_path, kilobytes):
    vol = tmp_path/'vol'
    vol.mkdir()
    script = (f'mount -t tmpfs -o size={kilobytes}k none {vol} || exit 99\n'
              f'"$@" --out {vol}/deep/data; code=$?\nls -A {vol}; exit $code')
    done = unshared(script, *command(own), '-o', 'tokenizer.vocab_size=600')
    if done.returncode == 99: pytest.skip('no mounts here')
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and 'No space left' in last and 'Free some space' in last, done.stderr
    assert done.stdout == ''


@pytest.mark.parametrize('limit', [500, 3000, 8000])
def test_a_file_that_may_not_grow(own, tmp_path, limit):
    def limited(): resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run([*command(own), '--out', str(tmp_path/'out')], capture_output=True, text=True,
                          preexec_fn=limited)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and 'File too large' in last and 'Free some space' in last, done.stderr
    assert os.listdir(tmp_path) == ['in']


def test_a_process_that_was_killed_leaves_nothing_in_the_way(own, tmp_path, monkeypatch):
    out, move = tmp_path/'data', packing._move
    assert prepare(own, tmp_path/'whole') == 0
    write(out/'.prepare'/'train-00000.npy', b'half')
    assert prepare(own, out) == 0 and manifest_of(out) == manifest_of(tmp_path/'whole')
    shutil.rmtree(out)

    def killed(work, to):
        names = sorted(os.listdir(work))
        for name in names[:len(names)//2]:
            if name != 'manifest.json': os.replace(work/name, to/name)
        raise KeyboardInterrupt
    monkeypatch.setattr(packing, '_move', killed)
    assert prepare(own, out) == 1 and not (out/'manifest.json').exists()
    monkeypatch.setattr(packing, '_move', move)
    assert prepare(own, out) == 0 and manifest_of(out) == manifest_of(tmp_path/'whole')
    assert '.prepare' not in os.listdir(out)


def test_two_processes_in_one_folder(own, tmp_path):
    both = [subprocess.Popen([*command(own), '--out', str(tmp_path/'out')], stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    said = [p.communicate(timeout=PATIENCE)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sum('tokens of text' in s for s in said) == 1  # one has made it, and the other found it
    packing.verify(open_data(tmp_path/'out'))
    assert not [name for name in os.listdir(tmp_path/'out') if name.startswith('.')]


# what is not prepared data

def test_a_manifest_of_something_else(own, tmp_path, capsys):
    for content in ('{"name": "app", "icons": []}', '[]', '{"format": 1}', b'\xff\xfe\x00'):
        write(tmp_path/'app'/'manifest.json', content)
        with pytest.raises(CramlitError, match='manifest.json (was not written by|is damaged)'):
            open_data(tmp_path/'app')
        assert prepare(own, tmp_path/'app') == 1 and os.listdir(tmp_path/'app') == ['manifest.json']
        assert 'Traceback' not in capsys.readouterr().err


def test_a_tokenizer_that_is_missing_or_no_folder(own, tmp_path, capsys):
    assert prepare(own, tmp_path/'data') == 0
    path = tmp_path/'data'/'tokenizer'/'tokenizer.json'
    assert prepare(own, tmp_path/'b', '-o', f'tokenizer.path={path}') == 1
    assert 'give the folder that it lies in' in capsys.readouterr().err
    path.unlink()
    with pytest.raises(CramlitError, match='tokenizer.json is missing'): open_data(tmp_path/'data')


def test_data_of_other_versions(own, tmp_path, capsys):
    assert prepare(own, tmp_path/'data') == 0
    manifest = manifest_of(tmp_path/'data')
    for name in ('text_field', 'split'): manifest['corpus'].pop(name)
    manifest['tokenizer'].pop('strip_accents')
    manifest['format'] = 1
    its_own = open_data(tmp_path/'data').ruler_id
    manifest.pop('ruler')
    for half in packing.HALVES: (tmp_path/'data'/f'{half}-00000.npy').unlink()
    write(tmp_path/'data'/'manifest.json', json.dumps(manifest))
    (tmp_path/'data'/'sources.json').unlink()
    data = open_data(tmp_path/'data')  # may be trained on, and is validated on the same sequences
    assert data.ruler_id == its_own
    packing.verify(data)
    assert not packing.unlike(data, recipe_of(own))
    assert prepare(own, tmp_path/'data') == 2 and 'earlier version' in capsys.readouterr().err
    write(tmp_path/'data'/'manifest.json', json.dumps(manifest | dict(format=99)))
    with pytest.raises(CramlitError, match='newer version'): open_data(tmp_path/'data')


# the cache

def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    write(tmp_path/'file', '')
    monkeypatch.setenv('CRAMLIT_CACHE', str(tmp_path/'file'/'cache'))
    assert prepare('enwik8', tmp_path/'out') == 1
    err = capsys.readouterr().err
    assert 'Set CRAMLIT_CACHE' in err and 'fetching' not in err and not (tmp_path/'out').exists()


def test_no_home(tmp_path, monkeypatch, capsys):
    for name in ('CRAMLIT_CACHE', 'XDG_CACHE_HOME', 'HOME'): monkeypatch.delenv(name, raising=False)
    def nowhere(): raise RuntimeError('Could not determine home directory.')
    monkeypatch.setattr(Path, 'home', nowhere)
    assert prepare('enwik8', tmp_path/'out') == 1
    assert 'set CRAMLIT_CACHE' in capsys.readouterr().err and not (tmp_path/'out').exists()


def test_a_hub_that_cannot_keep_its_files(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', '/home/nobody/.cache')

    monkeypatch.setattr('datasets.load_dataset', refuse)
    with pytest.raises(CramlitError, match='Set HF_HOME to a folder that can be written'):
        texts_of('hub:some/set')


def test_training_a_tokenizer_uses_what_it_is_given():
    from cramlit.core.recipes import Tokenizer as Settings
    once = [' '.join(map(chr, range(0x4e00, 0x4e00 + 3000)))]
    a, b = (train_tokenizer(lambda: once, Settings(vocab_size=4096)) for _ in range(2))
    assert a.get_vocab() == b.get_vocab() and len(a) == 3005


def test_a_file_that_was_touched_while_it_was_read_is_read_once_more(own, tmp_path, monkeypatch, capsys):
    whole, calls = packing._build, []

    def build(recipe, folder):
        manifest = whole(recipe, folder)
        if not calls: os.utime(own, ns=(1, 1))
        calls.append(1)
        return manifest
    monkeypatch.setattr(packing, '_build', build)
    assert prepare(own, tmp_path/'data') == 0 == prepare(own, tmp_path/'data') and len(calls) == 2
    assert 'it is read once more' in capsys.readouterr().err
    packing.verify(open_data(tmp_path/'data'))


def spoiled(**changes):
    def change(manifest): manifest.update(changes)
    return change


def without(*path):
    def change(manifest):
        for key in path[:-1]: manifest = manifest[key]
        del manifest[path[-1]]
    return change


@pytest.mark.parametrize('change', [
    without('splits', 'train'), without('splits', 'train', 'files'), without('special_ids', 'cls'),
    without('ruler', 'tune'), without('splits', 'validation', 'files', 0, 'sha256'), spoiled(splits=3),
    spoiled(packing=[]), spoiled(special_ids={}), spoiled(format='x'), spoiled(seq_len='a'),
    spoiled(ruler=None)])
def test_a_manifest_with_anything_missing_or_of_another_kind_is_one_line(own, tmp_path, capsys, change):
    assert prepare(own, tmp_path/'data') == 0
    manifest = manifest_of(tmp_path/'data')
    change(manifest)
    write(tmp_path/'data'/'manifest.json', json.dumps(manifest))
    capsys.readouterr()
    train = ['pretrain', *SMALL, '--data', str(tmp_path/'data'), '--out', str(tmp_path/'run'), '--steps', '1']
    for args in (['verify', str(tmp_path/'data')], train):
        assert main(args) == 1
        err = capsys.readouterr().err
        assert str(tmp_path/'data') in err and 'Traceback' not in err
    assert not (tmp_path/'run').exists()


def test_a_zip_as_a_mac_makes_it(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.txt.zip', 'w') as z:
        z.writestr('a.txt', 'A text.')
        z.writestr('__MACOSX/._a.txt', b'\0\5')
    assert texts_of(tmp_path/'a.txt.zip') == ['A text.']


def test_a_source_that_can_be_read_only_once_is_refused(tmp_path):
    os.mkfifo(tmp_path/'text.txt')  # with nobody at its other end
    with pytest.raises(UsageError, match='is a pipe or a device'): list(documents(str(tmp_path/'text.txt')))


@pytest.mark.parametrize('source, says', [
    ('https://example.com/text.txt', 'is an address: fetch'), ('hub:', 'names no data set')])
def test_a_source_that_is_no_place_says_so(source, says):
    with pytest.raises(UsageError, match=says): list(documents(source))


def test_of_a_dump_of_the_history_the_last_version_counts(tmp_path):
    text = 'A river was quiet and the old man walked home slowly over the bridge. '*3
    versions = ''.join(f'<revision><text>{text} This is version {n}.</text></revision>' for n in range(3))
    end = '<page><title>B</title><revision><text>' + text + '</text></revision>'  # the file is cut off here
    (tmp_path/'wiki.xml').write_text(f'<mediawiki><page><title>A</title>{versions}</page>{end}')
    counts = Counter()
    first, second = documents(str(tmp_path/'wiki.xml'), counts=counts)
    assert 'version 2' in first.text and 'version 1' not in first.text and second.id == 'B'
    assert counts['earlier versions of pages'] == 2 and counts['pages cut off by the end of the file'] == 1


def test_articles_of_wikiextractor_without_a_title_in_double_quotes(tmp_path):
    (tmp_path/'wiki_00').write_text("<doc id='1' title='T'>\nA river.\n</doc>\n"
                                    "<doc id='2'>\nA house.\n</doc>\n")
    assert [d.text for d in documents(str(tmp_path/'wiki_00'))] == ['A river.', 'A house.']


def test_parquet_with_nulls_on_the_way_and_bytes_that_are_no_text(tmp_path):
    pq.write_table(pa.table({'doc': [{'text': 'A river.'}, None]}), tmp_path/'null.parquet')
    counts = Counter()
    docs = documents(str(tmp_path/'null.parquet'), counts=counts, field='doc.text')
    assert [d.text for d in docs] == ['A river.']
    assert counts['empty'] == 1
    as_bytes = pa.array([b'caf\xe9'], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 1, as_bytes.buffers())  # which nobody has looked at
    pq.write_table(pa.table({'text': strings}), tmp_path/'latin1.parquet')
    with pytest.raises(CramlitError, match='latin1.parquet has a text that is not UTF-8'):
        list(documents(str(tmp_path/'latin1.parquet')))
