"The whole pipeline at scale tiny: from enwik8 to the tables, skipped when done, redone when forced"
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from conftest import PATIENCE

from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.results import locked, provenance, read_json_lines, result_row, write_rows
from cramlit.running import pipeline
from cramlit.running.command import main
from cramlit.running.pipeline import (
    CAPTIONS,
    Workspace,
    _publish_notebook,
    _publish_rows,
    code_of,
    page_origin,
    paper_notebook,
    workspace,
)
from cramlit.running.pipeline import STAGES as ALL_STAGES

ROOT = Path(__file__).parent.parent

FROM_PRETRAIN = ['pretrain', 'finetune', 'figure_pretraining', 'table4_glue']
STAGES = {name: s for name, s in ALL_STAGES.items() if not s.optional}
EACH = [s.name for s in STAGES.values() if s.recipes == 'each']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp('tiny')/'out'
    assert main(['reproduce', '--scale', 'tiny', '--out', str(out)]) == 0
    return out


def test_tables_figures_and_models_are_there(finished):
    figures = finished/'paper_figures'
    names = {p.name for p in figures.iterdir()}
    made = [name for stage in STAGES.values() for name in stage.makes]
    page = (figures/'README.md').read_text()
    for name in made:
        if (figures/f'{name}.svg').exists(): assert f'({name}.svg)\n\n*{CAPTIONS[name]}*' in page
        suffixes = {n.partition('.')[2] for n in names if n.partition('.')[0] == name}
        if name != 'table4_published': assert suffixes in ({'md', 'csv', 'tex'}, {'svg', 'pdf'}), name
    assert {n.partition('.')[0] for n in names} == {*made, 'README', 'notebooks', 'rows', 'logs'}
    for recipe in ('24hbert', 'modern'):
        log = (figures/'logs'/f'pretrain_{recipe}.jsonl').read_text()
        assert log == (finished/recipe/'pretrain'/'metrics.jsonl').read_text() and 'validation_loss' in log
    table = (figures/'table4_glue.md').read_text()
    for text in ('majority', 'bag-of-words', 'from-scratch', 'pretrained', 'not GLUE', 'Hardware:'):
        assert text in table
    tokenizers = set()
    for recipe in ('24hbert', 'modern'):
        assert (finished/recipe/'pretrain'/'model'/'config.json').exists()
        assert f'{recipe}, pretrained' in table and recipe in (figures/'loss_curve.svg').read_text()
        manifest = json.loads((finished/recipe/'prepare'/'data'/'manifest.json').read_text())
        tokenizers.add(manifest['tokenizer_sha256'])
    assert len(tokenizers) == 1  # packed otherwise, with the same tokenizer


def test_the_index_shows_everything_and_misses_nothing(finished):
    figures = finished/'paper_figures'
    index = (figures/'README.md').read_text()
    for stage in STAGES.values():
        for name in stage.makes:
            assert f'({name}.svg)' in index or (figures/f'{name}.md').read_text().strip() in index, name
    assert 'is missing' not in index and 'hours' in index and 'Hardware:' in index
    assert '| [prepare 24hbert](notebooks/prepare_24hbert.ipynb) | ' in index


def test_the_rows_of_a_page_are_beside_it_and_it_says_whose_they_are(finished):
    figures = finished/'paper_figures'
    rows = {p.stem: read_json_lines(p) for p in (figures/'rows').iterdir()}
    assert {'pretrain_24hbert', 'finetune_modern', 'table3_search', 'comparison', 'scaling'} <= set(rows)
    assert {(r['commit'], r['hardware']) for some in rows.values() for r in some} == {
        (provenance()['commit'], provenance()['hardware'])}
    said, = page_origin(rows)
    assert said.startswith('All numbers in `rows/` are of one state')
    assert said in (figures/'README.md').read_text()
    elsewhere = {name: [r | dict(commit='0ther') for r in some] for name, some in rows.items()}
    warning, table = page_origin(rows | dict(scaling=elsewhere['scaling']))
    assert '2 origins' in warning and table.splitlines()[-1].endswith(' | scaling |') and '| 0ther' in table
    parts = [rows['scaling'][0] | dict(trial='early'), elsewhere['scaling'][0] | dict(trial='late')]
    warning, table = page_origin(dict(scaling=parts))
    assert 'was run in parts' in warning and table.splitlines()[-1].endswith('| scaling (late) |')


def test_an_unfinished_stage_has_its_rows_beside_the_page(tmp_path):
    ws = workspace('tiny', tmp_path)
    rows = ws.folder('budgets')/'rows.jsonl'
    write_rows(rows, [result_row('steps', 1., 'steps')])
    question = pipeline._question(ws, 'budgets')
    note = dict(question=question, depends={}, made={}, done=False, seconds=60.)
    (rows.parent/'key.json').write_text(json.dumps(note))
    ws.figures.mkdir(exist_ok=True)
    (ws.figures/'budgets.md').write_text('**A table.**')
    page = pipeline.write_index(ws, {}).read_text()
    assert '**A table.**' in page and '| budgets | 1.0 | unfinished |' in page and 'earlier runs' not in page
    assert '**Not run**: figure_pretraining, ' in page and (ws.figures/'rows'/'budgets.jsonl').exists()
    kept = rows.read_text()
    rows.unlink()
    older = '**Tables and figures of budgets are of earlier runs**'
    assert older in pipeline.write_index(ws, {}).read_text()
    rows.write_text(kept)
    (rows.parent/'key.json').write_text(json.dumps(note | dict(scale='laptop')))
    assert older in pipeline.write_index(ws, {}).read_text(), 'these are rows of another scale'
    (rows.parent/'key.json').write_text(json.dumps(note))
    assert older not in pipeline.write_index(ws, {}).read_text()
    both = workspace('tiny', tmp_path, recipes='24hbert,modern')
    assert older in pipeline.write_index(both, {}).read_text()


def test_what_a_step_took_is_published_with_the_page(tmp_path):
    ws = workspace('laptop', tmp_path)
    timing = result_row('seconds_per_step', .04, 's', stage='calibrate', contestant='c0ffee')
    write_rows(ws.out/'texts'/'calibration.jsonl', [timing])
    page = pipeline.write_index(ws, {}).read_text()
    assert read_json_lines(ws.figures/'rows'/'calibration.jsonl') == [timing]
    assert 'Put into `runs/laptop/texts`' in page


def test_a_page_tells_what_an_earlier_run_has_left_on_it(tmp_path):
    ws = workspace('laptop', tmp_path)
    assert 'earlier runs' not in pipeline.write_index(ws, {}).read_text()
    (ws.figures/'scaling.md').write_text('**Loss against compute.**')
    page = pipeline.write_index(ws, {}).read_text()
    assert '**Tables and figures of scaling are of earlier runs**' in page


COMMITTED = [page for page in sorted((ROOT/'paper_figures').glob('*/README.md'))
             if page.read_text().startswith('# Results at scale')]


@pytest.mark.parametrize('page', COMMITTED, ids=lambda p: p.parent.name)
def test_a_committed_page_says_of_which_commits_and_machines_it_is(page):
    "A page says of its origin what its rows say; one from before rows were kept says that it is mixed"
    rows = {p.stem: read_json_lines(p) for p in sorted((page.parent/'rows').glob('*.jsonl'))}
    text = page.read_text()
    if not rows:
        assert 'earlier code on other machines' in text
        return
    origins = {(r['commit'], r['dirty'], r['hardware']) for some in rows.values() for r in some}
    for commit, dirty, hardware in origins:
        assert f'{commit}{" with changes" if dirty else ""}' in text and hardware in text
    assert ('All numbers in `rows/` are of one state' in text) == (len(origins) == 1)
    named = re.search(r'Tables and figures of (.+) are of earlier runs', text)
    earlier = named[1].split(', ') if named else []
    for stage in ALL_STAGES.values():  # and no other table is of a commit that no row has
        tables = [page.parent/f'{name}.md' for name in stage.makes if stage.name not in earlier]
        for path in filter(Path.exists, tables):
            for commits in re.findall(r'^Commit: (.+)$', path.read_text(), re.M):
                mine = {c.removesuffix('+changes') for c in commits.split(', ')}
                assert mine <= {c for c, *_ in origins}, path


def test_a_log_on_the_page_is_of_the_run_whose_rows_are_there(tmp_path, capsys):
    ws = workspace('tiny', tmp_path/'out', tmp_path/'figures')
    run, log = ws.folder('pretrain', '24hbert'), tmp_path/'figures'/'logs'/'pretrain_24hbert.jsonl'
    write_rows(run/'rows.jsonl', [dict(metric='steps', value=3., unit='steps')])
    (run/'metrics.jsonl').write_text('{"step": 3}\n')
    _publish_rows(ws, 'pretrain', '24hbert')
    assert log.read_text() == '{"step": 3}\n'
    (run/'metrics.jsonl').unlink()
    _publish_rows(ws, 'pretrain', '24hbert')
    assert log.exists() and not (tmp_path/'figures'/'superseded').exists()  # the same rows
    three = dict(metric='steps', value=3., unit='steps')
    write_rows(run/'rows.jsonl', [three, dict(metric='loss', value=1., unit='nats')])
    _publish_rows(ws, 'pretrain', '24hbert')
    assert log.exists() and not (tmp_path/'figures'/'superseded').exists()  # and more
    write_rows(run/'rows.jsonl', [dict(metric='steps', value=4., unit='steps')])
    _publish_rows(ws, 'pretrain', '24hbert')
    rows, aside = tmp_path/'figures'/'rows'/'pretrain_24hbert.jsonl', tmp_path/'figures'/'superseded'
    assert not log.exists() and read_json_lines(rows)[0]['value'] == 4.
    assert len(read_json_lines(aside/'1'/rows.name)) == 2
    assert (aside/'2'/rows.name).read_text() == '{"step": 3}\n'
    assert capsys.readouterr().err.count('was of other runs: it is now in') == 2
    log.parent.rmdir()
    log.parent.write_text('a file of the user')
    _publish_rows(ws, 'pretrain', '24hbert')
    assert log.parent.read_text() == 'a file of the user'


def test_executed_notebooks_are_there_to_be_read(finished):
    "Small, with their outputs, and without progress bars, messages and the paths of this machine"
    copies = {p.stem: p for p in (finished/'paper_figures'/'notebooks').iterdir()}
    for_each = {f'{stage}_{recipe}' for stage in EACH for recipe in ('24hbert', 'modern')}
    assert set(copies) == for_each | set(STAGES) - set(EACH)
    for path in copies.values():
        text = path.read_text()
        assert path.stat().st_size < 300_000 and str(finished) not in text and 'widget-view' not in text
        cells = json.loads(text)['cells']
        outputs = [o for c in cells for o in c.get('outputs', [])]
        assert outputs and not {'error', 'stderr'} & {o.get('name', o['output_type']) for o in outputs}
    given = ''.join(json.loads(copies['pretrain_modern'].read_text())['cells'][2]['source'])
    assert 'out = "runs/tiny"' in given and 'recipe = "modern"' in given
    assert 'image/svg+xml' in copies['figure_pretraining'].read_text()


def test_a_page_drawn_in_another_place_names_no_folder_of_the_machine_where_it_ran(tmp_path):
    ws, there = workspace('tiny', tmp_path/'out', tmp_path/'figures'), '/home/me/runs/tiny'
    given = dict(out=there, figures=f'{there}/paper_figures', glue_dir='/home/me/labels')
    links = nbformat.v4.new_markdown_cell('[a](../core/00_recipes.ipynb), [b](tuning.ipynb#c)')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(repr(given)), links])
    nb.metadata = dict(kernelspec={}, papermill=dict(parameters=given))
    ws.folder('scaling').mkdir(parents=True)
    nbformat.write(nb, ws.folder('scaling')/'scaling.ipynb')
    text = _publish_notebook(ws, 'scaling').read_text()
    assert '/home/me' not in text and 'runs/tiny' in text and 'paper_figures/tiny' in text
    assert '(../../../nbs/core/00_recipes.ipynb)' in text and '(../../../nbs/paper/tuning.ipynb#c)' in text


def test_the_kinds_of_numbers_are_told_apart(finished):
    speed = (finished/'paper_figures'/'table1_time.csv').read_text()
    hardware = (finished/'paper_figures'/'appendix_hardware.csv').read_text()
    assert '≈' in speed and '14.11' in speed and 'plan ' in hardware and 'h200' in hardware
    lines = pd.read_csv(finished/'paper_figures'/'table1_time.csv', index_col=0)
    assert 'cramlit, days' not in lines or torch.cuda.is_available()  # days of a CPU are nobody's
    assert lines['8 × Titan V, days'].dropna().str.startswith('plan ').all()
    hours = pd.read_csv(finished/'paper_figures'/'appendix_same_work.csv', index_col=0)['8 ×, hours']
    assert 20 < float(hours['titan-v'].removeprefix('plan ')) < 30  # 24, as the authors measured it


def test_done_stages_are_skipped_and_one_can_be_forced(finished, capsys):
    table = finished/'table4_glue'/'table4_glue.ipynb'
    weights = finished/'24hbert'/'pretrain'/'model'/'model.safetensors'
    before = table.stat().st_mtime_ns, weights.stat().st_mtime_ns
    assert main(['reproduce', '--scale', 'tiny', '--out', str(finished), '--json']) == 0
    out, err = capsys.readouterr()
    assert err.count('skipped') == len(STAGES) + len(EACH)
    assert (table.stat().st_mtime_ns, weights.stat().st_mtime_ns) == before
    rows = [json.loads(line) for line in out.splitlines()]
    assert {'metric', 'value', 'unit'} <= rows[0].keys() and any(r['metric'] == 'average' for r in rows)
    assert main(['reproduce', '--scale', 'tiny', '--out', str(finished), '--force', 'table4_glue']) == 0
    assert table.stat().st_mtime_ns > before[0] and weights.stat().st_mtime_ns == before[1]
    assert (finished/'superseded'/'table4_glue_1'/'table4_glue.ipynb').exists()


def test_report_draws_from_the_rows(finished, tmp_path):
    rows = read_json_lines(finished/'24hbert'/'finetune'/'rows.jsonl')
    write_rows(finished/'poolings'/'24hbert, cls'/'rows.jsonl', [r | dict(pooling='cls') for r in rows])
    try: assert main(['report', '--runs', str(finished), '--out', str(tmp_path/'figures')]) == 0
    finally: shutil.rmtree(finished/'poolings')
    for name in ('table1_time', 'table2_savings', 'table3_search', 'table4_glue', 'table5_choices'):
        again, first = tmp_path/'figures'/f'{name}.csv', finished/'paper_figures'/f'{name}.csv'
        assert again.read_text() == first.read_text()
    for name in ('loss_curve', 'search_grid', 'choices_by_time'):
        assert (tmp_path/'figures'/f'{name}.svg').exists()


def test_a_paper_notebook_runs_with_plain_papermill_from_any_folder(finished, tmp_path):
    command = [sys.executable, '-m', 'papermill', str(paper_notebook('figure_pretraining')), 'out.ipynb']
    given = ['-p', 'scale', 'tiny', '-p', 'out', str(finished), '-p', 'figures', str(tmp_path/'figures')]
    subprocess.run([*command, *given, '--no-progress-bar'], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path/'figures'/'loss_curve.svg').exists()


class Pretend:
    "In place of papermill: notes what was run, writes what it should make, and fails where it is told to"
    def __init__(self, *fails):
        self.ran, self.fails = [], fails

    def __call__(self, notebook, output, **parameters):
        name = f"{notebook.stem} {parameters.get('recipe', '')}".strip()
        self.ran.append(name)
        for made in ALL_STAGES[notebook.stem].makes:
            Path(parameters['figures']).mkdir(parents=True, exist_ok=True)
            (Path(parameters['figures'])/f'{made}.md').write_text(made)
        output.write_text(json.dumps(dict(cells=[], metadata=dict(kernelspec={}))))
        if name in self.fails: raise CramlitError(f'{notebook.name} failed with ValueError: no. See {output}')


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    "Every stage has a notebook of one line, and running it is pretended"
    def start(*fails):
        monkeypatch.setattr(pipeline, 'run_notebook', run := Pretend(*fails))
        return run
    def notebook(name):
        path = tmp_path/'notebooks'/f'{name}.ipynb'
        path.parent.mkdir(exist_ok=True)
        title = dict(cell_type='markdown', source=f'# {name}\n\n> What {name} is')
        cells = [title, dict(cell_type='code', source='x = 1')]
        if not path.exists(): path.write_text(json.dumps(dict(cells=cells)))
        return path
    monkeypatch.setattr(pipeline, 'paper_notebook', notebook)
    return start


def reproduce(ws, **how):
    "Run everything there is, and expect the complaint that pretended notebooks leave no rows"
    with pytest.raises(CramlitError, match='no result rows'): pipeline.reproduce(ws, **how)


def test_a_failing_notebook_stops_only_what_needs_it(tmp_path, pretend, capsys):
    run = pretend('pretrain 24hbert', 'table2_savings')
    out = tmp_path/'out'
    assert main(['reproduce', '--scale', 'tiny', '--recipe', '24hbert', '--out', str(out)]) == 1
    err = capsys.readouterr().err
    without = 'finetune', 'figure_pretraining', 'table4_glue'
    assert [r.split()[0] for r in run.ran] == [s for s in STAGES if s not in without]
    assert '5 stages came to nothing' in err and str(out/'table2_savings'/'table2_savings.ipynb') in err
    assert 'finetune 24hbert: not run, for want of pretrain 24hbert' in err
    index = (out/'paper_figures'/'README.md').read_text()
    assert '**table2_savings is missing**: table2_savings.ipynb failed with ValueError' in index
    assert '**table4_glue is missing**: not run, for want of finetune' in index


def test_the_headline_is_a_part(tmp_path, pretend):
    run = pretend()
    args = ['reproduce', '--scale', 'tiny', '--recipe', '24hbert', '--headline', '--out', str(tmp_path/'out')]
    assert main(args) == 1  # these notebooks leave no rows
    assert [r.split()[0] for r in run.ran] == ['prepare', *FROM_PRETRAIN]


def test_an_optional_stage_is_run_when_it_is_asked_for_and_table_4_follows_the_reference(tmp_path, pretend):
    run, ws = pretend(), workspace('tiny', tmp_path/'out', tmp_path/'figures')
    reproduce(ws)
    optional = set(ALL_STAGES) - set(STAGES)
    assert {'reference', 'packing', 'poolings', 'budgets'} == optional and not optional & set(run.ran)
    assert 'appendix_poolings' not in (ws.figures/'README.md').read_text()
    del run.ran[:]
    for name in ('poolings', 'reference'): reproduce(ws, only=name)
    assert run.ran == ['poolings', 'reference']
    assert 'appendix_poolings' in (ws.figures/'README.md').read_text()
    write_rows(ws.folder('reference')/'rows.jsonl', [result_row('headline', 50., '%')])
    del run.ran[:]
    pipeline.reproduce(ws)
    assert run.ran == ['table4_glue']


def test_one_stage_is_begun_with_what_it_needs(tmp_path, pretend, capsys):
    run, ws = pretend(), workspace('tiny', tmp_path/'out', tmp_path/'figures')
    reproduce(ws, only='figure_pretraining')
    assert run.ran == ['prepare 24hbert', 'pretrain 24hbert', 'figure_pretraining']
    err = capsys.readouterr().err
    assert '[3 of 3] figure_pretraining' in err and 'min left' not in err  # nothing was ever timed here
    assert 'loss_curve, lr_schedule' in err.rpartition('stage')[2]  # the table of stages


def timed(folder, question, minutes, done=True):
    (folder).mkdir(parents=True, exist_ok=True)
    (folder/'key.json').write_text(json.dumps(dict(question=question, done=done, seconds=60*minutes)))


def test_the_time_left_is_what_stages_took_here_or_what_is_planned(tmp_path):
    tiny = workspace('tiny', tmp_path/'tiny', recipes='24hbert,modern')
    laptop = workspace('laptop', tmp_path/'laptop', recipes='24hbert,modern')
    def left(ws, *tasks): return pipeline._time_left(ws, list(tasks))
    rest = ('prepare', 'modern'), ('pretrain', 'modern'), ('scaling', '')
    assert left(tiny, *rest) == ''
    assert left(laptop, *rest) == ', about 5 min left, and 1 stage never timed'  # 0.9 and the budget, 4

    question = pipeline._question(tiny, 'prepare', '24hbert')
    timed(tiny.folder('prepare', '24hbert'), question, 7)
    assert left(tiny, *rest) == ', about 7 min left, and 2 stages never timed'  # as for the other recipe
    timed(tiny.out/'superseded'/'prepare_modern_1', pipeline._question(tiny, 'prepare', 'modern'), 9)
    assert left(tiny, *rest) == ', about 8 min left, and 2 stages never timed'
    timed(tiny.out/'superseded'/'prepare_modern_2', question | dict(other='text'), 99)
    timed(tiny.folder('prepare', 'modern'), pipeline._question(tiny, 'prepare', 'modern'), 3, done=False)
    assert left(tiny, *rest) == ', at most 8 min left, and 2 stages never timed'  # it was begun
    timed(tiny.folder('scaling'), pipeline._question(tiny, 'scaling'), 200)
    assert left(tiny, *rest).startswith(', at most 3 h left')


def test_of_two_recipes_the_one_that_works_is_gone_on_with(tmp_path, pretend):
    run = pretend('pretrain bert-base')
    ws = workspace('tiny', tmp_path/'out', tmp_path/'figures', '24hbert,bert-base')
    with pytest.raises(CramlitError, match='4 stages came to nothing'): pipeline.reproduce(ws)
    with pytest.raises(CramlitError, match='the same command without --force runs only these'):
        pipeline.reproduce(ws, force='appendix')  # with it, what has been done since would be done again
    assert 'finetune 24hbert' in run.ran and 'finetune bert-base' not in run.ran
    assert {'table3_search', 'appendix'} <= set(run.ran)


def test_a_recipe_that_is_named_twice_is_one(tmp_path):
    assert workspace('tiny', tmp_path, '', ['modern', '24hbert', 'modern']).recipes == ('modern', '24hbert')


def test_what_was_deleted_is_made_again_and_what_is_elsewhere_too(tmp_path, pretend):
    run = pretend()
    for figures in ('a', 'b'): reproduce(ws := workspace('tiny', tmp_path/'out', tmp_path/figures))
    first, second = run.ran[:len(STAGES)], run.ran[len(STAGES):]
    assert [r.split()[0] for r in first] == list(STAGES)
    assert second == [s.name for s in STAGES.values() if s.makes]
    (tmp_path/'b'/'table1_time.md').write_text('of another workspace')
    (tmp_path/'b'/'submitted.csv').write_text('x')
    del run.ran[:]
    reproduce(ws)
    assert run.ran == ['table4_glue', 'table1_time']


def test_what_was_paid_for_is_kept_when_code_changes_and_else_moved_aside(tmp_path, pretend, capsys):
    run, ws = pretend(), workspace('tiny', tmp_path/'out', tmp_path/'figures')
    reproduce(ws)
    (model := ws.folder('pretrain', '24hbert')/'model').mkdir()
    notebook = tmp_path/'notebooks'/'pretrain.ipynb'
    notebook.write_text(notebook.read_text().replace('x = 1', 'x = 2'))
    del run.ran[:]
    reproduce(ws)
    assert [r.split()[0] for r in run.ran] == FROM_PRETRAIN and model.exists()
    assert 'pretrain 24hbert: pretrain.ipynb changed since. Finished runs are kept' in capsys.readouterr().err

    del run.ran[:]
    reproduce(ws, force='pretrain')
    assert [r.split()[0] for r in run.ran] == FROM_PRETRAIN and not model.exists()
    aside = {p.name for p in (ws.out/'superseded').iterdir()}
    assert {'pretrain_24hbert_1', 'finetune_24hbert_1'} <= aside and 'prepare_24hbert_1' not in aside
    assert (ws.out/'superseded'/'pretrain_24hbert_1'/'model').exists()

    # what is moved aside and not run again is named, and so is what would be neither
    capsys.readouterr()
    reproduce(ws, force='prepare', headline=True)
    assert 'not run by this command: table1_time, table2_savings, table3_search' in capsys.readouterr().err
    for how in (dict(), dict(headline=True)):
        with pytest.raises(UsageError, match='give --only budgets with it'):
            pipeline.reproduce(ws, force='budgets', **how)

    # another recipe, another budget
    reproduce(Workspace('laptop', ws.out, ws.figures, ws.recipes), only='pretrain')
    now = {p.name for p in (ws.out/'superseded').iterdir()}
    assert {'pretrain_24hbert_2', 'pretrain_24hbert_3', 'prepare_24hbert_2'} <= now - aside


def test_the_order_of_the_recipes_counts_and_one_more_costs_no_finished_run(tmp_path, pretend):
    run = pretend()
    def asked(recipes, stage):
        ws = workspace('tiny', tmp_path/'out', tmp_path/'figures', recipes)
        del run.ran[:]
        reproduce(ws, only=stage)
        return ws, run.ran[-1:] == [stage]
    ws, ran = asked('24hbert,modern', 'scaling')
    (kept := ws.folder('scaling')/'trials').mkdir()
    assert ran and not asked('24hbert,modern', 'scaling')[1]
    assert asked('modern,24hbert', 'scaling')[1], 'it is another recipe whose sizes are compared'
    assert asked('modern,24hbert,cramming', 'scaling')[1]
    assert kept.exists() and not (ws.out/'superseded').exists()
    for stage in ('table3_search', 'table5_choices'):
        asked('24hbert', stage)
        (finished := ws.folder(stage)/'trials').mkdir()
        assert asked('modern', stage)[1] and finished.exists()
    reproduce(Workspace('laptop', ws.out, ws.figures, ws.recipes), only='scaling')
    assert not kept.exists() and (ws.out/'superseded'/'scaling_1'/'trials').exists()


def test_a_forced_study_forgets_what_was_known_and_keeps_it(tmp_path, pretend):
    run, ws = pretend(), workspace('tiny', tmp_path/'out', tmp_path/'figures')
    reproduce(ws, only='scaling')
    known = ws.out/'known'/'scaling.jsonl'
    write_rows(known, [result_row('steps', 1., 'steps')])
    reproduce(ws, only='scaling', force='scaling')
    assert run.ran == ['scaling', 'scaling'] and not known.exists()
    assert (ws.out/'superseded'/'known_1'/'scaling.jsonl').exists()


def test_changed_labels_in_the_same_folder_are_other_labels(tmp_path):
    (tmp_path/'glue').mkdir()
    ws = workspace('gpu', tmp_path/'out', tmp_path/'figures', glue_dir=str(tmp_path/'glue'))
    before = pipeline._depends(ws, 'finetune', '24hbert')
    assert pipeline._depends(ws, 'finetune', '24hbert') == before
    (tmp_path/'glue'/'train.tsv').write_text('x')
    assert pipeline._depends(ws, 'finetune', '24hbert') != before


def test_an_interrupted_stage_goes_on_and_nobody_elses_folder_is_touched(tmp_path, pretend, monkeypatch):
    ws = workspace('tiny', tmp_path/'out', tmp_path/'figures')
    def interrupted(notebook, output, **parameters):
        (output.parent/'half').write_text('done')
        raise KeyboardInterrupt
    monkeypatch.setattr(pipeline, 'run_notebook', interrupted)
    with pytest.raises(KeyboardInterrupt): pipeline.reproduce(ws)
    run = pretend()
    assert ws.need('pretrain', '24hbert') and run.ran == ['prepare 24hbert', 'pretrain 24hbert']
    assert (ws.folder('prepare', '24hbert')/'half').exists() and not (ws.out/'superseded').exists()
    (ws.folder('scaling')).mkdir()
    (ws.folder('scaling')/'letter.txt').write_text('dear')
    args = ['reproduce', '--scale', 'tiny', '--recipe', '24hbert', '--out', str(ws.out)]
    assert main([*args, '--only', 'scaling']) == 2
    assert (ws.folder('scaling')/'letter.txt').exists()


def test_a_folder_in_which_another_process_works_is_left_to_it(tmp_path, pretend, capsys):
    run, out = pretend(), tmp_path/'out'
    with locked(out):
        assert main(['reproduce', '--scale', 'tiny', '--out', str(out)]) == 2
        assert not run.ran and 'another process works in' in capsys.readouterr().err
        main(['reproduce', '--scale', 'tiny', '--out', str(out), '--dry-run'])
        assert 'another process' not in capsys.readouterr().err  # it writes nothing
    main(['reproduce', '--scale', 'tiny', '--out', str(out)])
    assert run.ran and not (out/'.lock').exists()


def test_a_stage_depends_on_the_code_it_imports(tmp_path, monkeypatch):
    "Through modules of its own part and of others, at the top and inside functions"
    files = {'core/base': '', 'data/deep': '', 'data/near': 'from ..core.base import x\nfrom . import deep',
             'running/pipeline': 'from ..data.near import y'}
    for name, source in files.items():
        path = tmp_path/'cramlit'/f'{name}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(pipeline, '_package', lambda: tmp_path/'cramlit')

    def used(source):
        cells = [dict(cell_type='code', source=source), dict(cell_type='markdown', source='import x')]
        (tmp_path/'n.ipynb').write_text(json.dumps(dict(cells=cells)))
        return set(code_of(tmp_path/'n.ipynb')) - {''}
    deep = used('%matplotlib inline\ndef f():\n    from cramlit.data.near import y')
    assert deep == {'data.near', 'data.deep', 'core.base'}
    assert used('from cramlit.core import base') == used('import cramlit.core.base as b') == {'core.base'}
    assert used('from cramlit.running.pipeline import workspace') == set()


def test_keys_depend_on_code_recipe_and_scale(tmp_path, monkeypatch):
    ws = workspace('tiny', tmp_path)
    depends = pipeline._depends
    key = depends(ws, 'finetune', '24hbert')
    assert key == depends(workspace('tiny', tmp_path/'elsewhere'), 'finetune', '24hbert')
    assert key != depends(ws, 'finetune', 'bert-base')
    assert key != depends(workspace('laptop', tmp_path), 'finetune', '24hbert')
    real, new = pipeline.code_of, {'new': 'x'}
    monkeypatch.setattr(pipeline, 'code_of', lambda nb: real(nb) | (new if 'pretrain' in str(nb) else {}))
    changed = depends(ws, 'finetune', '24hbert')
    assert {name for name in key if key[name] != changed[name]} == {'pretrain 24hbert'}
    assert 'new' not in depends(ws, 'prepare', '24hbert')


def test_only_the_paper_is_rehearsed(tmp_path, capsys):
    assert main(['reproduce', '--scale', 'laptop', '--rehearse', '--out', str(tmp_path/'out')]) == 2
    assert '--rehearse is for --scale paper' in capsys.readouterr().err and not (tmp_path/'out').exists()


@pytest.mark.slow
def test_the_rehearsal_walks_the_path_of_eight_gpus(tmp_path):
    assert main(['reproduce', '--scale', 'paper', '--rehearse', '--out', str(tmp_path)]) == 0
    runs = [tmp_path/'24hbert'/'pretrain'/'rows.jsonl']
    for stage in ('table3_search', 'table5_choices'):
        runs += tmp_path.glob(f'{stage}/**/trials/*/run/rows.jsonl')
    assert len(runs) == 1 + 4 + 9
    for rows in runs:
        assert {json.loads(line)['processes'] for line in rows.read_text().splitlines()} == {8}
    assert 'is missing' not in (tmp_path/'paper_figures'/'README.md').read_text()


def test_a_local_copy_of_glue_reaches_the_stages_that_fine_tune(tmp_path, pretend, capsys):
    run, given = pretend(), {}

    def note(notebook, output, **parameters):
        given[notebook.stem] = parameters.get('glue_dir')
        return run(notebook, output, **parameters)
    pipeline.run_notebook = note  # taken back by `pretend`
    labelled, (a, b) = [s.name for s in STAGES.values() if s.labelled], (tmp_path/'a', tmp_path/'b')
    for place, expected in (('', list(STAGES)), (a, labelled), (a, []), (b, labelled)):
        del run.ran[:]
        reproduce(workspace('gpu', tmp_path/'out', tmp_path/'figures', glue_dir=place))
        assert [r.split()[0] for r in run.ran] == expected
        if expected: assert [given[name] for name in labelled] == [str(place)]*len(labelled)
    assert [name for name in STAGES if given[name] is not None] == labelled
    args = ['reproduce', '--out', str(tmp_path/'x'), '--glue-dir']
    assert main([*args, str(tmp_path)]) == 2 and 'surrogate' in capsys.readouterr().err
    assert main([*args, str(tmp_path/'nowhere'), '--scale', 'gpu']) == 2
    assert 'nowhere does not exist' in capsys.readouterr().err and not (tmp_path/'x').exists()


def test_the_plan_of_a_scale_runs_nothing_and_counts_all_pretraining(tmp_path, capsys):
    command = ['reproduce', '--scale', 'evening', '--out', str(tmp_path/'out'), '--dry-run', '--json']
    assert main(command) == 0 and not (tmp_path/'out').exists()
    rows = {r['part']: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) == {s.name for s in STAGES.values() if s.recipes != 'each'} | {'all'} | {
        f'{s} {r}' for s in EACH for r in ('24hbert', 'modern')}
    cores = rows['all']['at_a_time']
    assert rows['pretrain modern']['value'] == round(960/3600, 2)  # one run, by the clock
    assert rows['comparison']['runs'] == 30 and rows['comparison']['value'] == round(30*240/cores/3600, 2)
    assert rows['all']['value']*cores < 16  # an evening and a night of two cores
    assert main([*command, '--only', 'budgets']) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[0])
    assert last['part'] == 'budgets' and last['value'] == round(6*85*60/cores/3600, 2)
    assert main(['reproduce', '--scale', 'paper', '--out', str(tmp_path/'out'), '--dry-run', '--json']) == 0
    rows = {r['part']: r for r in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows['table3_search']['value'] == 24*rows['table3_search']['runs'], 'each has the whole machine'


AT_WORK = '''
import os, subprocess
worker = subprocess.Popen(['sleep', '1000000'])
with open('worker.tmp', 'w') as f: f.write(str(worker.pid))
os.rename('worker.tmp', 'worker')
worker.wait()
'''
COMMAND = '''
import sys
from cramlit.running.command import COMMANDS, main
from cramlit.running.pipeline import run_notebook

def reproduce(stage: str):
    "Run a stage"
    run_notebook(stage, 'copy.ipynb')

COMMANDS['reproduce'] = reproduce
sys.exit(main(sys.argv[1:]))
'''


@pytest.mark.parametrize('numbers', [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP]])
def test_a_signal_ends_a_stage_and_what_it_has_started_with_one_line(numbers, tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in ('x = 1', AT_WORK)])
    nb.cells[0].metadata['tags'] = ['parameters']
    nb.metadata['kernelspec'] = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, tmp_path/'stage.ipynb')
    (tmp_path/'command.py').write_text(COMMAND)
    command = [sys.executable, 'command.py', 'reproduce', 'stage.ipynb']
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
                               env=os.environ | dict(PYTHONPATH=str(ROOT)))
    until = time.monotonic() + PATIENCE
    while not (tmp_path/'worker').exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(.1)
    for number in numbers:  # a terminal's reaches no kernel either, which has a session of its own
        process.send_signal(number)
        time.sleep(.1)
    err = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1, err
    assert err == 'cramlit: interrupted; the same command goes on where it stopped\n'
    worker = int((tmp_path/'worker').read_text())
    until = time.monotonic() + PATIENCE
    while psutil.pid_exists(worker) and time.monotonic() < until: time.sleep(.1)
    assert not psutil.pid_exists(worker)


@pytest.mark.parametrize('when', ['before', 'after'])
def test_a_signal_while_no_cell_runs_is_not_forgotten(when, tmp_path, monkeypatch):
    def execute(*args, on_cell_start, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        if when == 'before': on_cell_start(cell={}, cell_index=0)
    monkeypatch.setattr('papermill.inspect_notebook', lambda path: {'x': 1})
    monkeypatch.setattr('papermill.execute_notebook', execute)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_notebook(tmp_path/'x.ipynb', tmp_path/'copy.ipynb', x=2)
