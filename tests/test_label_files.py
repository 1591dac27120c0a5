"Label files as they are in the wild: read, counted as left out, or refused with file and line"
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_protocol import stock_folder

from cramlit.core.recipes import CramlitError, UsageError
from cramlit.evaluation.glue import load_ax, load_glue
from cramlit.running.command import main

SST2 = 'sentence\tlabel\n'
QQP = 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n'
MNLI = 'index\tsentence1\tsentence2\tgold_label\n'
RTE = 'index\tsentence1\tsentence2\tlabel\n'


def folder_of(root, name, train, dev='', **more):
    "A task's folder of TSVs; texts are written as UTF-8, bytes as they are"
    place = root/name
    place.mkdir(parents=True, exist_ok=True)
    for split, text in dict(train=train, dev=dev or train, **more).items():
        (place/f'{split}.tsv').write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(root)


def table_of(root, name, split='train', rows=4, file='', **columns):
    "A parquet file in the hub's columns, of CoLA's when nothing else is said"
    usual = dict(sentence=[f'The river {i}.' for i in range(rows)], label=[i % 2 for i in range(rows)])
    (root/name).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(usual | columns), root/name/(file or f'{split}-00000-of-00001.parquet'))
    return str(root)


def refused(folder, task='sst2'):
    "What is said of a folder that is not to be read, on one line"
    with pytest.raises(CramlitError) as e: load_glue(task, folder)
    assert '\n' not in str(e.value)
    return str(e.value)


INSIDE = ['\u2028', '\u2029', '\x85', '\x0b', '\x0c', '\x1c', '\r', '"', "''", ' NA ', 'NaN']


@pytest.mark.parametrize('inside', INSIDE)
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_a_line_ends_at_a_line_feed_and_nowhere_else(inside, end, tmp_path):
    lines = ['sentence\tlabel', f'"a{inside}b\t1', f'{inside}c"\t0']
    task = load_glue('sst2', folder_of(tmp_path, 'SST-2', end.join(lines) + end))
    assert task.train.first == [f'"a{inside}b', f'{inside}c"'] and task.train.labels == [1, 0]


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-32'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_encodings_that_say_what_they_are_are_read(encoding, end, tmp_path):
    text = (SST2 + 'Die Größe zählt – 日本\t1\nça va\t0\n').replace('\n', end)
    task = load_glue('sst2', folder_of(tmp_path, 'SST-2', text.encode(encoding)))
    assert task.train.first == ['Die Größe zählt – 日本', 'ça va'] and task.train.labels == [1, 0]


@pytest.mark.parametrize('encoding, says', [
    ('latin-1', 'line 3: byte e9 is not UTF-8'), ('cp1252', 'line 3: byte e9 is not UTF-8'),
    ('mac-roman', 'line 3: byte 8e is not UTF-8'), ('utf-16-le', 'line 1: a NUL byte'),
    ('utf-16-be', 'line 1: a NUL byte')])
def test_encodings_that_can_only_be_guessed_are_refused_with_the_line(encoding, says, tmp_path):
    wrong = (SST2 + 'plain\t1\ncafé\t0\n').encode(encoding)
    said = refused(folder_of(tmp_path, 'SST-2', SST2 + 'plain\t1\n', wrong))
    assert f"{tmp_path/'SST-2'/'dev.tsv'}, {says}" in said


def test_a_utf16_file_that_was_cut_is_refused(tmp_path):
    whole = (SST2 + 'plain\t1\n').encode('utf-16')
    assert 'train.tsv, line' in refused(folder_of(tmp_path, 'SST-2', whole[:-1]))


@pytest.mark.parametrize('task, folder, header, good, bad', [
    ('sst2', 'SST-2', SST2, 'a\t1', 'b\t-1'), ('sst2', 'SST-2', SST2, 'a\t1', 'b\t2'),
    ('sst2', 'SST-2', SST2, 'a\t1', 'b\t'), ('cola', 'CoLA', '', 'x\t1\t\ta', 'x\t-1\t\tb'),
    ('rte', 'RTE', RTE, '0\ta\tb\tentailment', '1\ta\tb\t0'),
    ('rte', 'RTE', RTE, '0\ta\tb\tentailment', '1\ta\tb\t-'),
    ('stsb', 'STS-B', 'sentence1\tsentence2\tscore\n', 'a\tb\t5.000', 'a\tb\t-1'),
    ('stsb', 'STS-B', 'sentence1\tsentence2\tscore\n', 'a\tb\t0', 'a\tb\tnan'),
    ('stsb', 'STS-B', 'sentence1\tsentence2\tscore\n', 'a\tb\t2.5', 'a\tb\tinf'),
    ('stsb', 'STS-B', 'sentence1\tsentence2\tscore\n', 'a\tb\t2.5', 'a\tb\t5.1')])
def test_a_label_that_is_none_is_refused_with_file_and_line(task, folder, header, good, bad, tmp_path):
    good = f'{header}{good}\n'
    line = good.count('\n') + 1
    for train, dev, file in ((good, f'{good}{bad}\n', 'dev'), (f'{good}{bad}\n', good, 'train')):
        said = refused(folder_of(tmp_path, folder, train, dev), task)
        assert f'{file}.tsv, line {line}: the label' in said


@pytest.mark.parametrize('label', [-1, 2, None, 0.5])
def test_labels_of_tables_are_checked_as_well(label, tmp_path):
    table_of(tmp_path, 'cola', 'validation')
    labels = pa.array([0, 1, label, 1], type=pa.float64() if isinstance(label, float) else pa.int64())
    said = refused(table_of(tmp_path, 'cola', label=labels), 'cola')
    assert 'train-00000-of-00001.parquet, row 3: the label' in said


def test_malformed_questions_are_counted_and_left_out_of_training(tmp_path, capsys):
    good = [f'{i}\t1\t2\tWho is {i}?\tWhat is {i}?\t{i % 2}' for i in range(9)]
    tab = '9\t1\t2\tWhat\tis a tab?\tWhere is it?\t1'
    broken = ['9\t1\t2\tWhy is this line cut', 'short half?\t0', tab, '']
    fine = '9\t1\t2\tWho is 9?\tWhat is 9?\t1\t\t'  # empty columns at the end do no harm
    text = QQP + '\n'.join([*good, *broken, fine, '', ''])
    train = load_glue('qqp', folder_of(tmp_path, 'QQP', text)).train
    assert train.first == [f'Who is {i}?' for i in range(10)] and train.labels == [i % 2 for i in range(10)]
    said = capsys.readouterr().err.splitlines()[0]
    assert 'train.tsv: 4 of 14 lines have too few or too many columns (the first: line 11)' in said


def test_every_test_line_has_an_answer(tmp_path, capsys):
    lines = ['id\tquestion1\tquestion2', '0\ta\tb', '1\tcut', '', '3\tx\ty\tz', '4\tWho\rknows?\t"b', '', '']
    train = QQP + '0\t1\t2\ta\tb\t0\n1\t1\t2\ta\tb\t1\n'
    test = load_glue('qqp', folder_of(tmp_path, 'QQP', train, test='\r\n'.join(lines))).test['test']
    assert test.first == ['a', 'cut', '', 'x', 'Who\rknows?'] and test.second == ['b', '', '', 'y', '"b']
    assert test.labels == [-1]*5 and '3 of 5 lines' in capsys.readouterr().err


def test_what_the_judges_of_mnli_did_not_agree_on_is_counted_and_left_out(tmp_path, capsys):
    good = [f'{i}\ta\tb {i}\tneutral' for i in range(4)]
    train = MNLI + '\n'.join(good) + '\n'
    dash = MNLI + '\n'.join([*good, '8\ta\tb\t-', '9\ta\tb\t-']) + '\n'
    root = folder_of(tmp_path, 'MNLI', train, dev_matched=dash, dev_mismatched=train)
    task = load_glue('mnli', root)
    assert [len(e) for e in task.validation.values()] == [4, 4]
    assert 'dev_matched.tsv: 2 of 6 lines are labelled - (the first: line 6)' in capsys.readouterr().err


@pytest.mark.parametrize('lines', [
    ['gj04\t1\t\tShe left.', 'gj04\t0\t*\tShe leave.'],
    ['sentence\tlabel\tidx', 'She left.\t1\t0', 'She leave.\t0\t1'],
    ['label\tsentence', '1\tShe left.', '0\tShe leave.'],
    ['source\tlabel\tstar\tsentence', 'gj04\t1\t\tShe left.', 'gj04\t0\t*\tShe leave.'],
    ['\ufeffgj04\t1\t\tShe left.', 'gj04\t0\t*\tShe leave.']])
def test_cola_with_and_without_a_header(lines, tmp_path):
    train = load_glue('cola', folder_of(tmp_path, 'CoLA', '\n'.join(lines))).train
    assert train.first == ['She left.', 'She leave.'] and train.labels == [1, 0]


@pytest.mark.parametrize('line', ['1\tShe left.', 'She left.', 'gj04\t1\t\tShe left.\tand more', 'version https://x'])
def test_cola_with_columns_that_nobody_named_is_refused(line, tmp_path):
    said = refused(folder_of(tmp_path, 'CoLA', f'{line}\n{line}\n'), 'cola')
    assert 'train.tsv, line 1 has no column' in said and 'source, label, star, sentence' in said


def test_tables_that_were_written_as_tsv_are_read_with_their_numbers(tmp_path):
    rows = 'premise\thypothesis\tlabel\tidx\na\tb\t2\t0\nc\td\t0\t1\n'
    root = folder_of(tmp_path, 'MNLI', rows, dev_matched=rows, dev_mismatched=rows)
    task = load_glue('mnli', root)
    assert task.train.second == ['b', 'd'] and task.train.labels == [2, 0]


@pytest.mark.parametrize('dev', [b'', b'\n\n', b'sentence\tlabel\n', '\ufeff'.encode(), b'<html>\n<p>\n'])
def test_an_empty_or_foreign_file_is_refused(dev, tmp_path):
    root = folder_of(tmp_path, 'SST-2', SST2 + 'a\t1\n')
    (tmp_path/'SST-2'/'dev.tsv').write_bytes(dev)
    said = refused(root)
    assert 'dev.tsv has no examples' in said or 'dev.tsv, line 1 has no column sentence, label' in said


def test_a_file_of_which_most_is_broken_is_refused(tmp_path):
    said = refused(folder_of(tmp_path, 'SST-2', SST2 + 'a\t1\nb\nc\nd\n'))
    assert 'train.tsv: 3 of 4 lines' in said and '(the first: line 3)' in said


def test_a_null_text_is_counted_and_a_test_row_stays(tmp_path, capsys):
    texts = ['a', None, 'b', 'c']
    for split in ('train', 'validation', 'test'): table_of(tmp_path, 'cola', split, sentence=texts)
    task = load_glue('cola', str(tmp_path))
    assert task.train.first == ['a', 'b', 'c'] and task.train.labels == [0, 0, 1]
    assert task.test['test'].first == ['a', '', 'b', 'c']
    assert '1 of 4 rows have a null (the first: row 2)' in capsys.readouterr().err


def test_a_table_that_is_not_what_it_should_be_is_named(tmp_path):
    table_of(tmp_path, 'cola', 'validation')
    assert 'row 1: 0 is not text' in refused(table_of(tmp_path, 'cola', sentence=[0, 1, 2, 3]), 'cola')
    rte = dict(sentence1=['a'], sentence2=['b'], sentence=['c'])
    said = refused(table_of(tmp_path, 'rte', **rte, label=pa.array([None], pa.int64())), 'rte')
    assert 'rte/train-00000-of-00001.parquet, row 1: the label None' in said
    empty = dict(label=pa.array([], pa.int64()), sentence=pa.array([], pa.string()))
    assert 'has no examples' in refused(table_of(tmp_path, 'cola', **empty), 'cola')
    (tmp_path/'cola'/'train-00000-of-00001.parquet').write_bytes(b'PAR1 and no more')
    assert 'cannot read' in refused(str(tmp_path), 'cola')


def test_a_split_in_several_files_is_read_whole_or_not_at_all(tmp_path):
    table_of(tmp_path, 'cola', 'validation')
    for i in range(3): table_of(tmp_path, 'cola', rows=i + 1, file=f'train-0000{i}-of-00003.parquet')
    assert len(load_glue('cola', str(tmp_path)).train) == 6
    (tmp_path/'cola'/'train-00001-of-00003.parquet').unlink()
    assert 'has 2 of the 3 parts of train' in refused(str(tmp_path), 'cola')


def test_a_split_in_one_file_without_a_number(tmp_path):
    for split in ('train', 'validation', 'test'): table_of(tmp_path, 'cola', file=f'{split}.parquet')
    assert len(load_glue('cola', str(tmp_path)).test['test']) == 4


NAMES = ['glue [v1]', 'glüe & co', 'a b', '100%20', 'lang=en', 'x#y?', 'file:glue', '*', "it's"]


@pytest.mark.parametrize('name', NAMES)
def test_paths_are_taken_as_they_are(name, tmp_path, monkeypatch):
    for root in (tmp_path/'tsv'/name, tmp_path/'tables'/name): root.mkdir(parents=True)
    folder_of(tmp_path/'tsv'/name, 'CoLA', 'x\t1\t\ta\n', test='index\tsentence\n0\ta\n')
    for split in ('train', 'validation', 'test'): table_of(tmp_path/'tables'/name, 'cola', split)
    table_of(tmp_path/'tables'/name, 'ax', 'test', premise=['a']*4, hypothesis=['b']*4)
    for form, n in (('tsv', 1), ('tables', 4)):
        monkeypatch.chdir(tmp_path/form)
        for path in (name, f'{tmp_path}/{form}/{name}'): assert len(load_glue('cola', path).train) == n
    assert len(load_ax(name)) == 4


def test_a_folder_that_is_not_glue_is_named(tmp_path):
    (tmp_path/'notes.txt').write_text('no GLUE')
    folder_of(tmp_path/'glue', 'CoLA', 'x\t1\t\ta\n')
    with pytest.raises(UsageError, match='does not exist'): load_glue('cola', str(tmp_path/'nowhere'))
    with pytest.raises(UsageError, match='is not a folder'): load_glue('cola', str(tmp_path/'notes.txt'))
    assert 'has neither CoLA/' in refused(str(tmp_path), 'cola')
    assert 'Give the folder above it' in refused(str(tmp_path/'glue'/'CoLA'), 'cola')
    (tmp_path/'CoLA').mkdir()
    assert 'CoLA/train.tsv is missing' in refused(str(tmp_path), 'cola')


@pytest.mark.parametrize('name', ['sst2', 'sst-2', 'SST-2', 'Sst2'])
def test_folders_are_found_whatever_the_size_of_their_letters(name, tmp_path):
    assert load_glue('sst2', folder_of(tmp_path, name, SST2 + 'a\t1\n')).train.first == ['a']


def test_local_files_need_neither_a_home_nor_the_cache_of_the_hub(tmp_path):
    for split in ('train', 'validation'): table_of(tmp_path/'tables', 'cola', split)
    folder_of(tmp_path/'tsv', 'CoLA', 'x\t1\t\ta\n')
    code = ('import sys; from cramlit.evaluation.protocol import load_tasks; '
            'found = [load_tasks("glue", ["cola"], folder)[0] for folder in sys.argv[1:]]; '
            'print([len(t.train) for t in found], "datasets" in sys.modules)')
    variables = 'HOME', 'HF_HOME', 'HF_DATASETS_CACHE', 'XDG_CACHE_HOME', 'CRAMLIT_CACHE'
    paths = dict(PATH=os.environ['PATH'], PYTHONPATH=str(Path(load_glue.__code__.co_filename).parents[2]))
    run = subprocess.run([sys.executable, '-c', code, f'{tmp_path}/tables', f'{tmp_path}/tsv'],
                         env=paths | dict.fromkeys(variables, '/proc/no'), capture_output=True, text=True)
    assert run.stdout.strip() == '[4, 1] False', run.stderr


@pytest.mark.parametrize('error, advice', [
    (OSError(30, 'Read-only file system', '/home/x'), 'Set HF_HOME'),
    (PermissionError(13, 'Permission denied'), 'Set HF_HOME'),
    (RuntimeError('Could not determine home directory.'), 'Set HF_HOME'),
    (ConnectionError('no route'), 'Check the network')])
def test_advice_fits_the_reason_why_the_hub_cannot_be_read(error, advice, monkeypatch):
    import datasets

    def load_dataset(*args, **more): raise error
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert advice in refused('', 'cola')


@pytest.mark.parametrize('train, says', [
    ('café\t1\n'.encode('latin-1'), 'not UTF-8'), ('sentence\tlabel\na\t-1\n', 'line 2: the label is -1'),
    ('sentence\tlabel\n', 'no examples'), ('a\nb\n', 'no column')])
def test_the_command_says_so_in_one_line_before_any_training(train, says, tmp_path, capsys):
    model = stock_folder('bert', tmp_path/'model')
    capsys.readouterr()
    root = folder_of(tmp_path/'glüe [v1]', 'SST-2', train, SST2 + 'a\t1\n')
    code = main(['glue', '--model', str(model), '--suite', 'glue', '--glue-dir', root, '--tasks', 'sst2',
                 '--scale', 'tiny', '--seeds', '1', '--out', str(tmp_path/'out')])
    said = capsys.readouterr().err.splitlines()
    assert code == 1 and len(said) == 1 and 'train.tsv' in said[0] and says in said[0]
    assert not (tmp_path/'out').exists()


def test_a_bag_of_words_with_nothing_to_learn_from_is_the_majority(tmp_path):
    from cramlit.evaluation.glue import bag_of_words, majority
    for train in (SST2 + 'good\t1\nfine\t1\n', SST2 + '...\t1\n?\t0\n!\t1\n'):
        task = load_glue('sst2', folder_of(tmp_path, 'SST-2', train, SST2 + 'good\t1\nbad\t0\n'))
        assert bag_of_words(task, 0, 0) == majority(task, 0)
