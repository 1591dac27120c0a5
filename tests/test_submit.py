"GLUE submissions: from a folder in either public form to a valid zip, and refusals before any training"
import io
import zipfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from joblib import parallel_config
from test_glue import ROWS, make_parquet, make_tsv

from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.scales import get_scale
from cramlit.evaluation.finetuning import run_job
from cramlit.evaluation.glue import GLUE, SUBMISSION_FILES, Examples, check_submission, load_ax, load_glue
from cramlit.evaluation.protocol import jobs, submit
from cramlit.running.command import main
from cramlit.training.checkpoints import export_run
from cramlit.training.training import pretrain


@pytest.fixture(scope='module')
def model(recipe, data, tmp_path_factory):
    out = tmp_path_factory.mktemp('model')
    pretrain(recipe, data, out/'run', steps=2)
    return export_run(out/'run', data/'tokenizer', out/'model')


def whole(make, root):
    "All of GLUE, AX included, in one of its two forms"
    for name in GLUE: make(root, name)
    pairs = [f'premise {i}' for i in range(3)], [f'hypothesis {i}' for i in range(3)]
    if make is make_parquet:
        (root/'ax').mkdir()
        table = pa.table(dict(premise=pairs[0], hypothesis=pairs[1], label=[-1]*3, idx=[0, 1, 2]))
        pq.write_table(table, root/'ax'/'test-00000-of-00001.parquet')
    else:
        (root/'diagnostic').mkdir()
        lines = [f'{i}\t{a}\t{b}' for i, (a, b) in enumerate(zip(*pairs, strict=True))]
        text = '\n'.join(['index\tsentence1\tsentence2', *lines]) + '\n'
        (root/'diagnostic'/'diagnostic.tsv').write_text(text)
    return root


COUNTS = {n: 3 if n == 'AX.tsv' else ROWS for n in SUBMISSION_FILES}  # of these files, not as published


def answer(model, root, out, to, counts=COUNTS):
    with parallel_config('threading', n_jobs=1):
        return submit(model, out, get_scale('tiny'), to, str(root), 1, counts)


def glue(model, root, out, *more):
    with parallel_config('threading', n_jobs=1):
        return main(['glue', '--model', str(model), '--suite', 'glue', '--glue-dir', str(root),
                     '--scale', 'tiny', '--seeds', '1', '--out', str(out), *more])


def test_a_runs_own_folder_is_refused(model, tmp_path):
    (tmp_path/'run.json').write_text('{}')
    with pytest.raises(UsageError, match='run'): answer(model, tmp_path, tmp_path, tmp_path/'x.zip')
    assert [p.name for p in tmp_path.iterdir()] == ['run.json']


@pytest.mark.parametrize('make', [make_tsv, make_parquet])
def test_from_a_glue_folder_to_the_benchmarks_zip(make, model, tmp_path):
    root, to = whole(make, tmp_path/'glue'), tmp_path/'out.zip'
    rows = answer(model, root, tmp_path/'out', to)
    counts = {r['file']: r['value'] for r in rows if r['metric'] == 'answers'}
    assert counts == COUNTS
    with zipfile.ZipFile(to) as z: files = {n: z.read(n).decode().splitlines() for n in z.namelist()}
    assert set(files) == set(SUBMISSION_FILES)
    assert all(lines[0] == 'index\tprediction' for lines in files.values())
    task = load_glue('mnli', str(root))
    task = replace(task, test=task.test | {'ax': load_ax(str(root))})
    job, = jobs(task, get_scale('tiny').finetune, 1, ('pretrained',))
    found = run_job(job, model, task)['predictions']
    for name, split in (('MNLI-m.tsv', 'test_matched'), ('MNLI-mm.tsv', 'test_mismatched'), ('AX.tsv', 'ax')):
        words = [GLUE['mnli'].classes[p] for p in found[split]]
        assert files[name][1:] == [f'{i}\t{word}' for i, word in enumerate(words)]
    kept = sorted((tmp_path/'out'/'jobs').iterdir())
    assert len(kept) == 2*9 + 9
    before, times = to.read_bytes(), [p.stat().st_mtime_ns for p in kept]
    assert answer(model, root, tmp_path/'out', to) == rows
    assert to.read_bytes() == before
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path/'out'/'jobs').iterdir())] == times


def test_under_the_papers_protocol_three_tasks_are_answered_by_networks_that_learned_mnli(model, tmp_path):
    root, to = whole(make_tsv, tmp_path/'glue'), tmp_path/'out.zip'
    with parallel_config('threading', n_jobs=1):
        rows = submit(model, tmp_path/'out', get_scale('tiny'), to, str(root), 1, COUNTS, 'paper')
    answered = {r['task']: r['variant'] for r in rows if r['metric'] == 'answers'}
    assert {task for task, variant in answered.items() if variant == 'mnli-first'} == {'mrpc', 'stsb', 'rte'}
    assert set(answered) == set(GLUE) and len(list((tmp_path/'out'/'jobs').iterdir())) == 2*9 + 3 + 9


def test_what_is_missing_is_named_before_any_training(model, tmp_path, capsys):
    root = whole(make_tsv, tmp_path/'glue')
    for name in ('QNLI/test.tsv', 'MNLI/test_mismatched.tsv', 'WNLI/train.tsv', 'diagnostic/diagnostic.tsv'):
        (root/name).unlink()
    submission = '--submit', str(tmp_path/'out.zip')
    with pytest.raises(CramlitError) as e: answer(model, root, tmp_path/'out', tmp_path/'out.zip')
    err = str(e.value)
    expected = 'qnli: no test set', 'mnli: no test_mismatched set', 'wnli: ', 'train.tsv is missing', 'AX: '
    for part in expected: assert part in err
    assert 'cola' not in err and not (tmp_path/'out').exists() and not (tmp_path/'out.zip').exists()
    for more in (['--submit', str(tmp_path)], ['--seeds', '-1']):
        assert glue(model, root, tmp_path/'out', *submission, *more) == 2
    capsys.readouterr()
    for more in (['--tasks', 'cola'], ['--suite', 'surrogate']):
        assert glue(model, root, tmp_path/'out', *submission, *more) == 2
        assert 'all tasks of GLUE' in capsys.readouterr().err


def test_a_test_set_that_was_cut_short_is_refused_before_any_training(model, tmp_path, capsys):
    root = whole(make_parquet, tmp_path/'glue')
    assert glue(model, root, tmp_path/'out', '--submit', str(tmp_path/'out.zip')) == 1
    err = capsys.readouterr().err
    assert 'CoLA.tsv: the test set has 4 examples, 1,063 are published' in err
    assert 'AX.tsv: the ax set has 3 examples, 1,104 are published' in err
    for name in SUBMISSION_FILES: assert name in err
    assert not (tmp_path/'out').exists() and not (tmp_path/'out.zip').exists()
    with pytest.raises(CramlitError, match='QNLI.tsv: the test set has 4 examples, 5 are published'):
        answer(model, root, tmp_path/'out', tmp_path/'out.zip', COUNTS | {'QNLI.tsv': 5})


def test_no_line_of_a_test_set_goes_missing(tmp_path, capsys):
    root = make_tsv(tmp_path, 'rte')
    (root/'RTE'/'test.tsv').write_text('index\tsentence1\tsentence2\n0\ta\tb\n1\tcut off\n2\tc\td\n\n')
    test = load_glue('rte', str(root)).test['test']
    assert test == Examples(['a', 'cut off', 'c'], ['b', '', 'd'], [-1]*3)
    assert '1 of 3 lines' in capsys.readouterr().err


def test_a_zip_with_other_files_or_folders_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z:
        z.writestr('answers/CoLA.tsv', 'index\tprediction\n0\t1\n')
    with pytest.raises(CramlitError, match='(?s)CoLA.tsv is missing.*answers/CoLA.tsv does not belong there'):
        check_submission(tmp_path/'a.zip', dict.fromkeys(SUBMISSION_FILES, 1))
    with pytest.raises(CramlitError, match='not a zip'): check_submission(tmp_path/'nowhere.zip', {})


def test_a_damaged_zip_is_refused(tmp_path):
    path = tmp_path/'a.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('CoLA.tsv', ''.join(f'{i}\t{i % 2}\n' for i in range(1000)))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[100] ^= 255  # inside the compressed answers
    encrypted = bytearray(whole)
    for start in (6, whole.index(b'PK\x01\x02') + 8): encrypted[start] |= 1
    latin = io.BytesIO()
    with zipfile.ZipFile(latin, 'w') as z: z.writestr('CoLA.tsv', 'ungültig'.encode('latin-1'))
    for damaged in (whole[:-10], whole[:200], bytes(flipped), bytes(encrypted), latin.getvalue(), b''):
        path.write_bytes(damaged)
        with pytest.raises(CramlitError, match='a.zip is not a zip of text files'): check_submission(path, {})
    path.write_bytes(whole)
    with pytest.raises(CramlitError, match='no submission'):
        check_submission(path, dict.fromkeys(SUBMISSION_FILES, 1))
