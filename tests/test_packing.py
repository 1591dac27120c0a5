"Prepared data: nothing lost, nothing crossed, damage named, nothing half-written"
import json
import os
import shutil

import numpy as np
import pytest

import cramlit.data.packing as packing
from cramlit.core.randomness import make_key
from cramlit.core.recipes import CramlitError, Packing, UsageError, override
from cramlit.core.scales import get_recipe
from cramlit.data.corpus import documents, holdout_position
from cramlit.data.packing import (
    document_rows,
    half_of_holdout,
    open_data,
    prepare,
    read_documents,
    ruler_rows,
    stream_rows,
    verify,
    write_shards,
)
from cramlit.data.tokenizer import load_tokenizer, sentences
from cramlit.running.command import main

IDS = dict(pad=0, unk=1, cls=2, sep=3, mask=4)


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path/'copy')


def truncate(d): (d/'train-00000.npy').write_bytes((d/'train-00000.npy').read_bytes()[:-5])
def remove(d): (d/'validation-00000.npy').unlink()
def reshape(d): np.save(d/'train-00000.npy', np.zeros((3, 32), np.uint16))
def pickle(d): np.save(d/'train-00000.npy', np.array([{}]), allow_pickle=True)
def cut_manifest(d): (d/'manifest.json').write_text('{"format": 1,')
def no_manifest(d): (d/'manifest.json').unlink()
def other_tokenizer(d):
    with open(d/'tokenizer'/'tokenizer.json', 'a') as f: f.write(' ')


@pytest.mark.parametrize('harm, says', [
    (truncate, 'train-00000.npy is missing or damaged'), (pickle, 'train-00000.npy is missing or damaged'),
    (remove, 'validation-00000.npy is missing or damaged'), (reshape, 'its manifest says'),
    (cut_manifest, 'manifest.json is damaged'), (no_manifest, 'no manifest.json'),
    (other_tokenizer, 'not the tokenizer that the shards were made with'),
])
def test_damage_is_named(copy, harm, says):
    harm(copy)
    with pytest.raises(CramlitError, match=says): open_data(copy)


def test_a_flipped_byte_is_found(copy):
    verify(open_data(copy))
    raw = bytearray((copy/'train-00000.npy').read_bytes())
    raw[-40] ^= 1
    (copy/'train-00000.npy').write_bytes(raw)
    with pytest.raises(CramlitError, match='train-00000.npy does not match its checksum'):
        verify(open_data(copy))


def test_prepared_again_is_the_same_and_other_settings_are_refused(recipe, data):
    before = (data/'train-00000.npy').stat().st_mtime_ns
    assert prepare(recipe, data) == open_data(data).manifest
    assert (data/'train-00000.npy').stat().st_mtime_ns == before
    with pytest.raises(UsageError, match='other settings .packing'):
        prepare(override(recipe, ['packing.seq_len=16']), data)


def test_same_input_same_bytes(recipe, data, tmp_path):
    assert prepare(recipe, tmp_path/'again') == open_data(data).manifest


def test_a_folder_with_other_things_is_refused(recipe, tmp_path):
    (tmp_path/'letter').write_text('dear')
    with pytest.raises(UsageError, match='not empty'): prepare(recipe, tmp_path)
    assert os.listdir(tmp_path) == ['letter']


@pytest.mark.parametrize('error, kind', [
    (OSError(28, 'No space left on device'), CramlitError), (KeyboardInterrupt(), KeyboardInterrupt),
])
def test_nothing_half_written(recipe, tmp_path, monkeypatch, error, kind):
    def full(*args): raise error
    monkeypatch.setattr(packing, 'write_shards', full)
    with pytest.raises(kind): prepare(recipe, tmp_path/'data')
    assert os.listdir(tmp_path) == []


def test_stream_rows_lose_at_most_one_row():
    docs = [list(range(100*i, 100*i + n)) for i, n in enumerate((5, 17, 1, 40, 8), 1)]
    rows = list(stream_rows(docs, Packing('stream', 10), sep=3))
    whole = [t for i, d in enumerate(docs) for t in ([3] if i else []) + d]
    assert all(len(r) == 8 for r in rows) and len(whole) - len(rows)*8 < 8
    assert [t for r in rows for t in r] == whole[:len(rows)*8]


def test_document_rows_are_whole_sentences_cut_at_one_end():
    pieces = [list(range(10*i, 10*i + 6)) for i in range(1, 30)]
    start = {p[0] for p in pieces}
    for key in range(50):
        for row in document_rows(pieces, Packing(seq_len=32, short_seq_prob=0), key):
            assert 1 < len(row) <= 30 and (row[0] in start or row[-1] % 10 == 5)


def test_short_rows_come_about_as_often_as_asked():
    pieces, cfg = [[i]*5 for i in range(200)], Packing(seq_len=64, short_seq_prob=.25)
    short = [max(map(len, document_rows(pieces, cfg, make_key(1, k)[0]))) < 62 for k in range(800)]
    assert abs(np.mean(short) - .25) < 4*(.25*.75/800)**.5


def test_many_tokens_take_four_bytes(tmp_path):
    split = write_shards([[70_000, 5], [6]], tmp_path, 'train', 6, IDS, 80_000)
    a = np.load(tmp_path/split['files'][0]['name'])
    assert a.dtype == np.uint32 and a.tolist() == [[2, 70_000, 5, 3, 0, 0], [2, 6, 3, 0, 0, 0]]
    assert split['tokens'] == 7


def test_shards_are_cut_and_numbered_through(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, 'SHARD_ROWS', 3)
    split = write_shards([[i] for i in range(10, 18)], tmp_path, 'train', 4, IDS, 100)
    rows = packing.Rows(tmp_path, split, 4)
    assert [f['rows'] for f in split['files']] == [3, 3, 2]
    assert rows[[7, 0, 3, 7]][:, 1].tolist() == [17, 10, 13, 17]
    full = write_shards([[i] for i in range(10, 16)], tmp_path, 'validation', 4, IDS, 100)
    assert [f['rows'] for f in full['files']] == [3, 3]
    assert write_shards([], tmp_path, 'empty', 4, IDS, 100) == dict(rows=0, tokens=0, files=[])


def test_rows_are_numbered_like_an_array(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, 'SHARD_ROWS', 3)
    split = write_shards([[i] for i in range(10, 18)], tmp_path, 'train', 4, IDS, 100)
    rows = packing.Rows(tmp_path, split, 4)
    whole = np.concatenate([np.load(tmp_path/f['name']) for f in split['files']]).astype(np.int64)
    for index in (0, -1, 7, np.int64(3), [-8, 7, 0], [], slice(2, -1), slice(None, None, -2), range(8),
                  whole[:, 1] > 14, np.array([[1, 2], [3, -4]]), np.uint8([7])):
        assert np.array_equal(rows[index], whole[index]), index
        assert rows[index].dtype == np.int64
    for index in (8, -9, [0, 8], [2**40], 1.5, [True, False], 'a', np.uint64([2**63 + 5])):
        with pytest.raises(IndexError): rows[index]
    assert [row[1] for row in rows] == list(range(10, 18))


def test_held_out_documents_are_never_trained_on(recipe, data):
    held = {d.text for d in read_documents(data/'holdout.jsonl.gz')}
    everything = {d.text for d in documents(recipe.corpus.source)}
    assert held == {t for t in everything if holdout_position(t) < recipe.corpus.holdout}
    assert 0 < len(held) < len(everything)
    tok, d = load_tokenizer(data/'tokenizer'), open_data(data)
    seen = ' '.join(tok.decode(r, skip_special_tokens=True) for r in d.train[range(len(d.train))])
    assert not any(s.lower().rstrip('.') in seen for t in held for s in sentences(t) if len(s.split()) > 8)


def test_manifest_counts_are_true(data):
    d = open_data(data)
    for split, rows in (('train', d.train), ('validation', d.validation)):
        every = rows[range(len(rows))]
        said = d.manifest['splits'][split]
        assert (said['rows'], said['tokens']) == (len(every), (every != 0).sum())
        assert (every[:, 0] == 2).all() and ((every == 3).sum(1) == 1).all()
        assert every.max() < d.manifest['vocab_size']


def test_the_ruler_takes_full_sequences_that_begin_in_turns_with_a_sentence_and_where_the_last_one_ends():
    lengths = np.random.default_rng(0).integers(1, 40, 60)
    ids = iter(range(1000, 9999))
    pieces = [[next(ids) for _ in range(n)] for n in lengths]
    rows, first = list(ruler_rows(pieces, 32)), {p[0] for p in pieces}
    assert len(rows) > 20 and all(len(r) == 30 and r == list(range(r[0], r[0] + 30)) for r in rows)
    assert all(r[0] in first for r in rows[::2])
    assert all(b[0] == a[-1] + 1 for a, b in zip(rows[::2], rows[1::2], strict=False))
    skipped = [b[0] - a[-1] - 1 for a, b in zip(rows[1::2], rows[2::2], strict=False)]
    assert 0 <= min(skipped) and max(skipped) < 40
    assert list(ruler_rows([[5], [6, 7]], 32)) == [[5, 6, 7]] and list(ruler_rows([[5]], 32)) == []


def test_the_halves_of_the_hold_out_are_whole_documents_or_of_few_documents_their_two_ends(data, tmp_path):
    held = {d.text for d in read_documents(data/'holdout.jsonl.gz')}
    tune, report = ([d.text for d in half_of_holdout(data, half)] for half in packing.HALVES)
    assert len({*tune, *report}) == len(tune) + len(report) and min(len(tune), len(report)) > 1
    assert {*tune, *report} == held
    with packing._writer(tmp_path/'holdout.jsonl.gz') as f:
        for text in ('One is. Two are. Three go. Four sit.', 'x'*9):
            f.write(packing._line(packing.Document('', text)))
    halves = [[d.text for d in half_of_holdout(tmp_path, half)] for half in packing.HALVES]
    assert halves == [['One is. Two are. ', 'xxxx'], ['Three go. Four sit.', 'xxxxx']]


def test_what_is_reported_on_is_in_no_row_that_choices_are_made_by(data):
    d, tok = open_data(data), load_tokenizer(data/'tokenizer')
    seen = [' '.join(tok.decode(r, skip_special_tokens=True) for r in rows[:])
            for rows in (d.train, d.validation, d.ruler['tune'])]
    reported = [s.lower().rstrip('.') for x in half_of_holdout(data, 'report') for s in sentences(x.text)]
    assert not any(s in text for s in reported if len(s.split()) > 8 for text in seen)
    assert len(d.ruler['tune']) > 2 < len(d.ruler['report'])


def test_a_flipped_byte_of_the_ruler_is_found(copy):
    raw = bytearray((copy/'report-00000.npy').read_bytes())
    raw[-40] ^= 1
    (copy/'report-00000.npy').write_bytes(raw)
    with pytest.raises(CramlitError, match='report-00000.npy does not match its checksum'):
        verify(open_data(copy))


def test_an_own_tokenizer_is_used_and_a_bad_one_refused(recipe, data, tmp_path, capsys):
    own = override(recipe, [f'tokenizer.path={data/"tokenizer"}', 'packing.mode=stream'])
    assert prepare(own, tmp_path/'data')['tokenizer_sha256'] == open_data(data).manifest['tokenizer_sha256']
    (tmp_path/'bad').mkdir()
    (tmp_path/'bad'/'tokenizer.json').write_text('{')
    code = main(['prepare', '--source', recipe.corpus.source, '--scale', 'tiny', '--out', str(tmp_path/'out'),
                 '-o', f'tokenizer.path={tmp_path/"bad"}', '-o', 'corpus.holdout=0.1'])
    assert code == 1 and 'holds no tokenizer' in capsys.readouterr().err
    assert not (tmp_path/'out').exists()


def test_text_too_small_for_the_split(tmp_path, capsys):
    (tmp_path/'x.txt').write_text('One sentence is not enough to hold anything out.')
    command = ['prepare', '--source', str(tmp_path/'x.txt'), '--scale', 'tiny', '--out', str(tmp_path/'out')]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert 'fell into the' in err and 'split' in err and os.listdir(tmp_path) == ['x.txt']


@pytest.mark.parametrize('title', ['', 'Of words. '])
def test_a_text_without_ends_of_sentences_is_cut_between_words(tmp_path, title):
    "Such as text8, whose hundred million letters are one line"
    words = (title + ' '.join(f'word{n % 97}' for n in range(5000))).split()
    (tmp_path/'x.txt').write_text(' '.join(words))
    recipe = override(get_recipe('modern', 'tiny'), [f"corpus.source={tmp_path/'x.txt'}"])
    packing.prepare(recipe, tmp_path/'out')
    held_out, = (d.text for d in packing.read_documents(tmp_path/'out'/'holdout.jsonl.gz'))
    tail = held_out.split()
    assert len(held_out) >= packing.MIN_HOLDOUT and tail == words[-len(tail):]
    assert len(open_data(tmp_path/'out').train) > 100


@pytest.mark.parametrize('text, parts', [
    ('Dr. A. Smith came. He left!', 2), ('It cost 3.5 dollars. "Really?" she asked.', 2), ('', 0), (' . ', 1),
    ('one line\nanother line', 2), ('The U.S. army won.', 1), ('In the year 1900. Then came 1901.', 2),
])
def test_sentences(text, parts):
    got = sentences(text)
    assert len(got) == parts and ''.join(got).replace(' ', '') == ''.join(text.split())


def test_manifest_is_plain_json(data):
    assert json.loads((data/'manifest.json').read_text())['format'] == packing.FORMAT
