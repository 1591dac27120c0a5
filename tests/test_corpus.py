"Sources: every kind of bad input is one clear line, and leaves nothing behind"
import gzip
import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cramlit.data.corpus as corpus
from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.results import cache_dir, sha256
from cramlit.data.corpus import (
    clean,
    documents,
    fetch_member,
    holdout_position,
    install_enwik8,
    pages,
    unique,
    wikipedia,
)
from cramlit.running.command import main

SENTENCE = 'The river walks slowly under the old stone house near the road.'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('CRAMLIT_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def prepare(source, folder, *more):
    "The exit code of `cramlit prepare` of a source into folder/out"
    return main(['prepare', '--source', str(source), '--scale', 'tiny', '--out', str(folder/'out'), *more])


def cut_gzip(path):
    return write(path, gzip.compress(os.urandom(9000).hex().encode())[:2000])


def spoilt_gzip(path):
    data = bytearray(gzip.compress(os.urandom(9000).hex().encode()))
    data[200:220] = bytes(20)
    return write(path, bytes(data))


def cut_parquet(path):
    return write(path, parquet(path.with_name('whole'), text=['a']).read_bytes()[:-7])


BAD = {
    'binary': (lambda d: write(d/'x.txt', b'\x7fELF\0\0\0'), 'x.txt is a binary file'),
    'utf-8': (lambda d: write(d/'x.txt', b'good \xe9 bad'), 'x.txt is not UTF-8 at byte 5'),
    'json': (lambda d: write(d/'x.jsonl', '{"text": "a"}\n\n{"text": \n'), 'x.jsonl, line 3: not JSON'),
    'json without text': (lambda d: write(d/'x.jsonl', '{"text": "a"}\n{"body": "b"}\n'),
                          'x.jsonl, line 2: no field "text"'),
    'json list': (lambda d: write(d/'x.jsonl', '["a"]\n'), 'x.jsonl, line 1: not JSON lines but one'),
    'json number as text': (lambda d: write(d/'x.jsonl', '{"text": 4}\n'), 'x.jsonl, line 1'),
    'json utf-8': (lambda d: write(d/'x.jsonl', b'{"text": "a"}\n{"text": "\xff"}\n'),
                   'x.jsonl, line 2: not UTF-8'),
    'damaged gzip': (lambda d: spoilt_gzip(d/'x.jsonl.gz'), 'x.jsonl.gz'),
    'truncated gzip': (lambda d: cut_gzip(d/'x.jsonl.gz'), 'x.jsonl.gz is truncated or damaged'),
    'parquet without text': (lambda d: parquet(d/'x.parquet', body=['a']), 'x.parquet has no column "text"'),
    'parquet of numbers': (lambda d: parquet(d/'x.parquet', text=[1]), 'only text (int64)'),
    'truncated parquet': (lambda d: cut_parquet(d/'x.parquet'), 'x.parquet is not a whole parquet file'),
    'unknown kind': (lambda d: write(d/'x.docx', 'a'), 'x.docx is of no known kind'),
    'empty folder': (lambda d: d, 'holds no text'),
}


@pytest.mark.parametrize('encoding', ['gbk', 'of-nobody'])
def test_an_encoding_that_cannot_be_read_is_one_line(encoding, tmp_path):
    (tmp_path/'dump.xml').write_text(f'<?xml version="1.0" encoding="{encoding}"?><mediawiki/>')
    with pytest.raises(CramlitError, match='dump.xml is XML in an encoding that cannot be read.*UTF-8'):
        list(pages(tmp_path/'dump.xml'))


def test_a_dump_of_a_script_without_spaces_has_text(tmp_path):
    prose = '长江是亚洲最长的河流，流经中国的许多省份。'*3
    page = f'<page><title>长江</title><ns>0</ns><revision><text>{prose}\n* [[河]]</text></revision></page>'
    (tmp_path/'dump.xml').write_text(f'<mediawiki>{page}</mediawiki>', encoding='utf-8')
    document, = wikipedia(tmp_path/'dump.xml')
    assert document.text == prose


@pytest.mark.parametrize('kind', BAD)
def test_bad_source_is_one_line_and_nothing_is_left(kind, tmp_path, capsys):
    make, says = BAD[kind]
    (tmp_path/'in').mkdir()
    source = make(tmp_path/'in')
    code = prepare(source, tmp_path)
    err = capsys.readouterr().err
    assert code in (1, 2) and says in err and 'Traceback' not in err, err
    assert os.listdir(tmp_path) == ['in']


@pytest.mark.parametrize('text', ['', ' \n\n '])
def test_empty_corpus(text, tmp_path, capsys):
    write(tmp_path/'x.txt', text)
    assert prepare(tmp_path/'x.txt', tmp_path) == 1
    assert 'has no text in it' in capsys.readouterr().err and os.listdir(tmp_path) == ['x.txt']


def test_every_kind_of_file_is_read(tmp_path):
    write(tmp_path/'a.txt', '\ufeffone')
    write(tmp_path/'b.jsonl', '{"text": "two"}\n{"text": ""}\n')
    (tmp_path/'c.jsonl.gz').write_bytes(gzip.compress(b'{"text": "three"}\n', mtime=0))
    parquet(tmp_path/'d.parquet', text=['four', None], more=[1, 2])
    (tmp_path/'deep').mkdir()
    write(tmp_path/'deep'/'e.txt', 'five')
    assert [d.text for d in documents(str(tmp_path))] == ['one', 'two', 'three', 'four', 'five']
    two_files = os.pathsep.join([str(tmp_path/'b.jsonl'), str(tmp_path/'a.txt')])
    assert [d.text for d in documents(two_files)] == ['two', 'one']
    assert [d.id for d in documents(str(tmp_path/'b.jsonl'))] == ['b.jsonl:1']


def test_a_folder_in_the_layout_of_the_hub(tmp_path):
    folder, configs = tmp_path/'wikipedia', {'20231101.en': 'english', '20231101.de': 'deutsch'}
    card = '---\nconfigs:\n'
    for config, text in configs.items():
        (folder/config).mkdir(parents=True)
        parquet(folder/config/'train-00000-of-00001.parquet', id=['1'], title=['T'], text=[text])
        card += f'- config_name: {config}\n  data_files:\n  - split: train\n    path: {config}/train-*\n'
    (folder/'README.md').write_text(card + '---\n')
    assert [d.text for d in documents(f'hub:{folder}:20231101.de')] == ['deutsch']
    with pytest.raises(CramlitError, match='cannot read the data set'):
        list(documents(f'hub:{folder}:20231101.fr'))


def test_a_hub_that_breaks_off_is_one_line(monkeypatch):
    def records(*args, **kwargs):
        yield dict(text='one')
        yield dict(text=None)
        raise ConnectionError('the line is dead')
    monkeypatch.setattr('datasets.load_dataset', records)
    stream = documents('hub:some/set')
    assert next(stream).text == 'one'
    with pytest.raises(CramlitError, match="the data set 'some/set' .*: the line is dead"): list(stream)


def test_duplicates_go_and_first_ones_stay(tmp_path):
    for name in 'abc': write(tmp_path/f'{name}.txt', 'same' if name != 'b' else 'other')
    assert [d.id for d in unique(documents(str(tmp_path)))] == ['a.txt', 'b.txt']


def test_clean_takes_markup_and_leaves_prose():
    text = clean("{{Infobox|a={{b}}}}\n'''Paris''' is the [[big city|capital]] of [[France]].<ref>book</ref> "
                 '[[Image:x.jpg|thumb|a [[b]] c]]\n== Heading ==\n* an item\n{|\n| cell\n|}\n'
                 'It lies on the [http://seine.fr Seine] and is &amp;mdash; old.\n[[fr:Paris]]')
    assert text.split('\n') == ['Paris is the capital of France.', 'It lies on the Seine and is — old.']


@pytest.mark.parametrize('name, content, says', [
    ('enwik8', b'<mediawiki>', 'is not enwik8: sha256'), ('enwik8', None, 'No such file'),
    ('enwik8.gz', gzip.compress(b'x'*5000, mtime=0)[:20], 'truncated or damaged'),
])
def test_a_file_that_is_not_enwik8_is_refused(name, content, says, cache, tmp_path):
    if content is not None: write(tmp_path/name, content)
    with pytest.raises(CramlitError, match=says): install_enwik8(tmp_path/name)
    assert not [p for p in cache.rglob('*') if p.is_file()]


def test_damaged_zip_is_refused(cache, tmp_path):
    with zipfile.ZipFile(tmp_path/'whole.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('enwik8', b'abc'*9999)
    write(tmp_path/'enwik8.zip', (tmp_path/'whole.zip').read_bytes()[:60])
    with pytest.raises(CramlitError, match='truncated or damaged'): install_enwik8(tmp_path/'enwik8.zip')


PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "thing"
version = "1.0"
[tool.setuptools]
packages = ["thing"]
package-data = {thing = ["*"]}
"""


def package(folder):
    "A wheel as a package index would give it, and its sha256"
    root = folder/'src'
    (root/'thing').mkdir(parents=True)
    (root/'pyproject.toml').write_text(PYPROJECT)
    (root/'thing'/'__init__.py').write_text('')
    (root/'thing'/'member.bin').write_bytes(b'data')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-build-isolation', '--no-deps',
                    '-w', str(folder/'index'), str(root)], check=True)
    return sha256(next((folder/'index').iterdir()))


def test_fetching_checks_the_checksum_and_keeps_what_is_whole(cache, tmp_path, monkeypatch):
    def fetch(digest, member): return fetch_member('thing==1.0', digest, member, source=False)
    digest = package(tmp_path)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path/'index'))
    with pytest.raises(CramlitError, match='cannot fetch thing==1.0'): fetch('0'*64, 'member.bin')
    assert not [p for p in cache.rglob('*') if p.is_file()]
    with pytest.raises(CramlitError, match='has no member nothing.bin'): fetch(digest, 'nothing.bin')
    assert fetch(digest, 'member.bin').read_bytes() == b'data'
    monkeypatch.setenv('PIP_FIND_LINKS', '/nowhere')
    assert fetch(digest, 'member.bin').read_bytes() == b'data'


def test_fetching_says_what_and_how_large(cache, tmp_path, monkeypatch, capsys):
    digest = package(tmp_path)
    files = partial(SimpleHTTPRequestHandler, directory=tmp_path/'index')
    with ThreadingHTTPServer(('127.0.0.1', 0), files) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        settings = dict(PIP_NO_INDEX='1', PIP_NO_CACHE_DIR='1', NO_PROXY='127.0.0.1', no_proxy='127.0.0.1',
                        PIP_FIND_LINKS=f'http://127.0.0.1:{server.server_port}/')
        for name, value in settings.items(): monkeypatch.setenv(name, value)
        try: fetch_member('thing==1.0', digest, 'member.bin', source=False)
        finally:
            server.shutdown()
            thread.join()
    err = capsys.readouterr().err
    assert 'cramlit: fetching member.bin, which thing==1.0 on the package index has' in err
    assert re.search(r'^cramlit: Downloading .*thing-1.0.*whl \([\d.]+ (bytes|kB)\)$', err, re.M), err


def test_no_network_is_one_line(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('PIP_EXTRA_INDEX_URL', '')
    monkeypatch.setenv('PIP_NO_INDEX', '0')
    monkeypatch.setenv('PIP_FIND_LINKS', '')
    monkeypatch.setenv('PIP_RETRIES', '0')
    assert prepare('enwik8', tmp_path) == 1
    err = capsys.readouterr().err
    assert 'Check the network' in err and 'Traceback' not in err
    assert not (tmp_path/'out').exists() and not [p for p in cache.rglob('*') if p.is_file()]


def test_no_hub_is_one_line(tmp_path):
    command = [sys.executable, '-m', 'cramlit.running.command', 'prepare', '--source', 'hub:nobody/nothing',
               '--scale', 'tiny', '--out', str(tmp_path/'out')]
    offline = {**os.environ, 'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert "cannot read the data set 'nobody/nothing'" in done.stderr
    assert not (tmp_path/'out').exists()


def test_output_that_cannot_be_written(text, tmp_path, capsys):
    (tmp_path/'file').write_text('in the way')
    small = ['-o', 'tokenizer.vocab_size=128', '-o', 'corpus.holdout=0.1']
    assert prepare(text, tmp_path/'file', *small) == 1
    assert 'cannot write' in capsys.readouterr().err


def test_a_text_that_stands_in_both_splits_does_not_exist(text):
    docs = list(documents(str(text)))
    where = {d.text: holdout_position(d.text) for d in docs}
    assert len({holdout_position(d.text) for d in docs}) == len(where)
    assert all(0 <= p < 1 for p in where.values())


def test_cache_is_where_the_user_says(cache):
    assert cache_dir() == cache


def test_missing_path_is_misuse(tmp_path):
    with pytest.raises(UsageError, match='does not exist'): list(documents(str(tmp_path/'nowhere')))


def test_lines_of_json_are_not_all_read_at_once(tmp_path):
    with open(tmp_path/'x.jsonl', 'w') as f:
        for i in range(5): f.write(json.dumps(dict(text=f'{i} {SENTENCE}')) + '\n')
        f.write('broken')
    stream = documents(str(tmp_path/'x.jsonl'))
    assert next(stream).text.startswith('0')


def test_pip_may_say_more_than_a_pipe_holds(cache, tmp_path, monkeypatch):
    loud = tmp_path/'python'
    loud.write_text(f'#!{sys.executable}\nimport sys\nprint("x"*300_000, file=sys.stderr)\n'
                    'print("ERROR: no such thing", file=sys.stderr)\nsys.exit(1)\n')
    loud.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(loud))
    with pytest.raises(CramlitError, match='thing==1.0 from the package index: ERROR: no such thing'):
        fetch_member('thing==1.0', '0'*64, 'member.bin')


def test_each_call_has_its_own_number_of_documents(text):
    counts = Counter()
    for _ in range(2): assert len(list(documents(str(text), 3, counts))) == 3
    assert counts['documents'] == 6


def test_a_split_that_does_not_exist_is_named(text):
    with pytest.raises(UsageError, match="split.*'lines'.*Did you mean 'line'"):
        list(documents(str(text), split='lines'))


def test_a_data_set_of_several_configurations_asks_for_one():
    e = ValueError('Config name is missing.\nPlease pick one among: [\'20231101.en\', \'20231101.de\']')
    assert corpus._why(e).endswith("'20231101.de']. Give one as hub:NAME:CONFIG")


def test_a_packed_parquet_file_is_of_no_known_kind(tmp_path):
    (tmp_path/'b.parquet.gz').write_bytes(gzip.compress(b'PAR1'))
    with pytest.raises(UsageError, match='all but .parquet packed or not'):
        list(documents(str(tmp_path/'b.parquet.gz')))
