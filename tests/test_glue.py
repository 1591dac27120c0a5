"GLUE files in both public forms, bad ones included; metrics, baselines, surrogate tasks"
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cramlit.core.recipes import CramlitError, UsageError
from cramlit.evaluation import protocol
from cramlit.evaluation.glue import GLUE, Examples, Task, bag_of_words, load_glue, majority, score
from cramlit.evaluation.surrogate_tasks import SURROGATE_TASKS, load_surrogate
from cramlit.running.command import main

ROWS = 4


def label_word(src, i):
    return src.classes[i % len(src.classes)] if src.classes else str(i/2)


def splits_of(src):
    "Names of all splits of a task, as the hub has them"
    return ('train', *src.sets, *(s.replace('validation', 'test') for s in src.sets))


def make_tsv(root, name):
    "A task in the form of the benchmark's own archive"
    src = GLUE[name]
    folder = root/src.folder
    folder.mkdir(parents=True)
    for split in splits_of(src):
        test = split.startswith('test')
        if name == 'cola' and test: lines = ['index\tsentence', *(f'{i}\ts {i}' for i in range(ROWS))]
        elif name == 'cola': lines = [f'src\t{i % 2}\t\ts {i}' for i in range(ROWS)]
        else:
            lines = ['\t'.join(['index', *src.tsv, *([] if test else ['extra', src.label])])]
            for i in range(ROWS):
                label = [] if test else ['x', label_word(src, i)]
                lines.append('\t'.join([str(i), *(f'{c} "{i}' for c in src.tsv), *label]))
        (folder/f"{split.replace('validation', 'dev')}.tsv").write_text('\n'.join(lines) + '\n')
    return root


def make_parquet(root, name, drop=''):
    "A task in the form of the hub"
    src = GLUE[name]
    (root/name).mkdir(parents=True)
    for split in splits_of(src):
        labels = [i % len(src.classes) if src.classes else i/2 for i in range(ROWS)]
        if split.startswith('test'): labels = [-1]*ROWS
        columns = {c: [f'{c} {i}' for i in range(ROWS)] for c in src.hub}
        columns |= dict(label=labels, idx=list(range(ROWS)))
        table = pa.table({k: v for k, v in columns.items() if k != drop})
        pq.write_table(table, root/name/f'{split}-00000-of-00001.parquet')
    return root


@pytest.mark.parametrize('name', GLUE)
@pytest.mark.parametrize('make', [make_tsv, make_parquet])
def test_every_task_in_both_forms(name, make, tmp_path):
    task, src = load_glue(name, str(make(tmp_path/'glue', name))), GLUE[name]
    assert list(task.validation) == list(src.sets) and len(task.test) == len(src.sets)
    assert task.num_labels == max(1, len(src.classes))
    for e in (task.train, *task.validation.values()):
        assert len(e.first) == len(e.labels) == ROWS and (e.second is not None) == (len(src.hub) == 2)
        assert e.labels == [i/2 if not src.classes else i % len(src.classes) for i in range(ROWS)]
    assert all(set(e.labels) == {-1} for e in task.test.values())


def test_missing_file_and_column_are_named(tmp_path):
    root = make_tsv(tmp_path/'a', 'rte')
    (root/'RTE'/'dev.tsv').unlink()
    with pytest.raises(CramlitError, match='dev.tsv is missing'): load_glue('rte', str(root))
    (root/'RTE'/'dev.tsv').write_text('index\tsentence1\tlabel\n0\ta\tentailment\n')
    with pytest.raises(CramlitError, match='no column sentence2'): load_glue('rte', str(root))
    (root/'RTE'/'dev.tsv').write_text('index\tsentence1\tsentence2\tlabel\n0\ta\tb\tperhaps\n')
    expected = "label 'perhaps', expected entailment, not_entailment"
    with pytest.raises(CramlitError, match=expected): load_glue('rte', str(root))
    without = make_parquet(tmp_path/'b', 'rte', drop='sentence2')
    with pytest.raises(CramlitError, match='no column sentence2'): load_glue('rte', str(without))
    file = next((make_parquet(tmp_path/'c', 'rte')/'rte').glob('validation-*'))
    file.write_bytes(b'PAR')
    with pytest.raises(CramlitError, match='cannot read .*rte/valid'): load_glue('rte', str(tmp_path/'c'))
    file.unlink()
    missing = r'^[^ ]*/rte/validation-\*.parquet is missing$'
    with pytest.raises(CramlitError, match=missing): load_glue('rte', str(tmp_path/'c'))
    with pytest.raises(CramlitError, match='neither QQP/'): load_glue('qqp', str(root))
    with pytest.raises(UsageError, match='does not exist'): load_glue('qqp', str(tmp_path/'nowhere'))
    with pytest.raises(UsageError, match="Did you mean 'cola'"): load_glue('colla', str(root))


def test_short_lines_are_counted_not_swallowed(tmp_path, capsys):
    root = make_tsv(tmp_path, 'sst2')
    with open(root/'SST-2'/'train.tsv', 'a') as f: f.write('lonely\n')
    assert len(load_glue('sst2', str(root)).train) == ROWS and '1 of 5 lines' in capsys.readouterr().err


def test_metrics_by_their_definitions():
    p, y = np.array([1, 1, 0, 0, 1, 0]), [1, 0, 0, 1, 1, 0]
    tp, fp, fn, tn = 2, 1, 1, 2
    got = score(('accuracy', 'f1', 'matthews'), p, y)
    assert got['accuracy'] == pytest.approx(100*4/6)
    assert got['f1'] == pytest.approx(100*2*tp/(2*tp + fp + fn))
    under = (tp + fp)*(tp + fn)*(tn + fp)*(tn + fn)
    assert got['matthews'] == pytest.approx(100*(tp*tn - fp*fn)/np.sqrt(under))
    a, b = np.array([1., 2, 3, 5]), [1., 2, 4, 3]
    ranks = np.argsort(np.argsort(a)), np.argsort(np.argsort(b))
    got = score(('pearson', 'spearman'), a, b)
    assert got['pearson'] == pytest.approx(100*np.corrcoef(a, b)[0, 1])
    assert got['spearman'] == pytest.approx(100*np.corrcoef(*ranks)[0, 1])
    assert score(('matthews', 'f1'), np.zeros(4, int), [0, 1, 0, 1]) == dict(matthews=0, f1=0)
    assert score(('pearson',), np.ones(4), [0, 1, 0, 1]) == dict(pearson=0)


def test_baselines_by_hand():
    words = ['river', 'stone', 'house']
    e = Examples([f'the old {words[i % 3]} {i}' for i in range(64)], None, [i % 3 for i in range(64)])
    task = Task('toy', 3, ('accuracy',), e, {'v': e.sample(32)})
    right = sum(y == 0 for y in task.validation['v'].labels)
    assert majority(task, 0)['scores']['v']['accuracy'] == pytest.approx(100*right/32)
    assert bag_of_words(task, 0, 0)['scores']['v']['accuracy'] == 100
    train = Examples(['a b', 'a c', 'd b'], None, [1., 2., 3.])
    held_out = Examples(['d', 'a'], None, [3., 1.])
    scores = Task('s', 1, ('pearson', 'spearman'), train, {'v': held_out})
    assert majority(scores, 0)['scores']['v'] == dict(pearson=0, spearman=0)
    assert bag_of_words(scores, 0, 0)['scores']['v']['pearson'] == pytest.approx(100)


@pytest.mark.parametrize('name', SURROGATE_TASKS)
def test_surrogate_tasks_keep_train_and_validation_apart(name):
    def texts(e): return {text.lower() for text in (*e.first, *(e.second or []))}
    task = load_surrogate(name)
    for e in task.validation.values():
        assert len(e) >= 400 and not texts(task.train) & texts(e)
        if task.num_labels > 1: assert set(e.labels) == set(range(task.num_labels)) == set(task.train.labels)
    assert len(task.train) >= 1500


def test_what_the_task_calls_next_is_next(monkeypatch):
    "In articles with sentences that are not kept, and in editorials by the numbers of their source"
    import cramlit.evaluation.surrogate_tasks as surrogate
    from cramlit.data.corpus import Document
    names = [f'{a} {b}' for a in ('old', 'red') for b in ('mill', 'river', 'road', 'hut')]
    long = [f'The {name} was seen by nobody.' for name in names]
    paragraphs = [' '.join([*long[i:i+2], 'Too short.', *long[i+2:i+4]]) for i in (0, 4)]
    documents = [Document(str(i), '\n'.join(paragraphs)) for i in range(60)]
    monkeypatch.setattr(surrogate, 'documents', lambda source: documents)
    monkeypatch.setattr(surrogate, 'unique', lambda docs: docs)
    monkeypatch.setattr(surrogate, 'holdout_position', lambda text: 0.)
    rows = surrogate.continuations(surrogate._held_out_sentences(), 'article')
    nexts = [f'{first} {second}' for _, first, second, label in rows if label == 0]
    assert len(nexts) > 60 and all(any(n in p for p in paragraphs) for n in nexts)
    places = {}
    for number, _, text in surrogate.rated_sentences('nytEditorialSnippets'):
        places.setdefault(text, []).append(tuple(map(int, number.split(' ')[1].split('_'))))
    editorials = surrogate.continuations(surrogate._editorials(), 'editorial')
    for _, first, second, label in editorials:
        if label == 0: assert any((t, p + 1) in places[second] for t, p in places[first])
    assert {label for *_, label in editorials} == {0, 1, 2}


def test_kept_tasks_are_not_those_of_other_rules_or_of_another_reading(tmp_path, monkeypatch):
    import cramlit.evaluation.surrogate_tasks as surrogate
    monkeypatch.setenv('CRAMLIT_CACHE', str(tmp_path))
    assert [surrogate._cached('x', lambda made=made: made) for made in ('first', 'second')] == ['first']*2
    for name in ('VERSION', 'FORMAT'):
        monkeypatch.setattr(surrogate, name, 99)
        assert surrogate._cached('x', lambda made=name: made) == name


def test_surrogate_shapes_are_those_of_glue():
    tasks = {n: load_surrogate(n) for n in SURROGATE_TASKS}
    assert {t.num_labels for t in tasks.values()} == {1, 2, 3}
    assert any(len(t.validation) == 2 and t.num_labels == 3 for t in tasks.values())
    metrics = {m for t in tasks.values() for m in t.metrics}
    assert metrics == {'accuracy', 'f1', 'matthews', 'pearson', 'spearman'}
    assert not set(SURROGATE_TASKS) & set(GLUE)


def test_glue_from_the_command_with_a_local_copy(tmp_path, data, recipe, capsys):
    from cramlit.training.checkpoints import export_run
    from cramlit.training.training import pretrain
    pretrain(recipe, data, tmp_path/'run', steps=1)
    model = export_run(tmp_path/'run', data/'tokenizer', tmp_path/'model')
    make_tsv(tmp_path/'glue', 'mnli')
    code = main(['glue', '--model', str(model), '--suite', 'glue', '--glue-dir', str(tmp_path/'glue'),
                 '--tasks', 'mnli', '--scale', 'tiny', '--seeds', '1', '--json', '--out', str(tmp_path/'o')])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert '"task": "mnli"' in out and '"split": "validation_mismatched"' in out
    rows = [json.loads(line) for line in out.splitlines()]
    assert {r['pretraining_seed'] for r in rows} == {recipe.seed}
    assert all(len(r['weights']) == 8 for r in rows)


@pytest.mark.parametrize('suite, asked, scale', [('glue', [], 'paper'), ('surrogate', [], 'laptop'),
                                                 ('glue', ['--scale', 'tiny'], 'tiny')])
def test_glue_is_fine_tuned_by_the_papers_protocol_unless_told_otherwise(suite, asked, scale, monkeypatch):
    seen = []
    monkeypatch.setattr(protocol, 'evaluate', lambda model, out, how, *rest: seen.append(how.name) or [])
    main(['glue', '--model', 'm', '--suite', suite, *asked, '--out', 'o'])
    assert seen == [scale]
