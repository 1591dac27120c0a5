"The whole pipeline at scale tiny: from enwik8 to the table, skipped when done, redone when forced"
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cramlit.running.command import main
from cramlit.core.recipes import CramlitError
from cramlit.running.pipeline import STAGES, paper_notebook, workspace


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp('tiny')/'out'
    assert main(['reproduce', '--scale', 'tiny', '--out', str(out)]) == 0
    return out


def test_table_figures_and_model_are_there(finished):
    names = {p.name for p in (finished/'paper_figures').iterdir()}
    tables = 'table1_time', 'table2_savings', 'table3_search', 'table4_glue', 'table5_choices', 'appendix_pretraining', 'appendix_finetuning', 'appendix_hardware', \
        'beyond_recipes', 'beyond_ablation', 'beyond_scaling', 'beyond_ideas'
    figures = 'loss_curve', 'lr_schedule', 'search_grid', 'schedules', 'choices_by_time', 'loss_against_task', 'beyond_by_time', 'beyond_by_compute', \
        'ideas_by_time'
    made = {f'{t}.{s}' for t in tables for s in ('md', 'csv', 'tex')} | {f'{f}.{s}' for f in figures for s in ('svg', 'pdf')}
    assert names == made | {'README.md', 'table4_published.md'}
    assert names - {'README.md'} == {f'{n}.{s}' for stage in STAGES.values() for n in stage.makes for s in ('md', 'csv', 'tex', 'svg', 'pdf')} & names
    table = (finished/'paper_figures'/'table4_glue.md').read_text()
    assert all(v in table for v in ('majority', 'bag-of-words', 'from-scratch', 'pretrained', 'not GLUE', 'Commit:', 'Hardware:'))
    for recipe in ('24hbert', 'modern'):
        assert (finished/recipe/'pretrain'/'model'/'config.json').exists() and f'{recipe}, pretrained' in table
        assert recipe in (finished/'paper_figures'/'loss_curve.svg').read_text()
    sums = {json.loads((finished/r/'prepare'/'data'/'manifest.json').read_text())['tokenizer_sha256'] for r in ('24hbert', 'modern')}
    assert len(sums) == 1  # packed otherwise, of the same text with the same tokenizer


def test_the_index_shows_everything_and_misses_nothing(finished):
    index = (finished/'paper_figures'/'README.md').read_text()
    for stage in STAGES.values():
        for name in stage.makes: assert f'({name}.svg)' in index or (finished/'paper_figures'/f'{name}.md').read_text().strip() in index, name
    assert 'is missing' not in index and 'hours' in index and 'Hardware:' in index and '| prepare 24hbert | ' in index


def test_the_kinds_of_numbers_are_told_apart(finished):
    speed, hardware = ((finished/'paper_figures'/f'{n}.csv').read_text() for n in ('table1_time', 'appendix_hardware'))
    assert '≈' in speed and '14.11' in speed and 'plan ' in hardware and 'h200' in hardware


def test_done_stages_are_skipped_and_one_can_be_forced(finished, capsys):
    table = finished/'table4_glue'/'table4_glue.ipynb'
    weights = finished/'24hbert'/'pretrain'/'model'/'model.safetensors'
    before = table.stat().st_mtime_ns, weights.stat().st_mtime_ns
    assert main(['reproduce', '--scale', 'tiny', '--out', str(finished), '--json']) == 0
    out, err = capsys.readouterr()
    assert err.count('skipped') == len(STAGES) + 3 and (table.stat().st_mtime_ns, weights.stat().st_mtime_ns) == before
    rows = [json.loads(line) for line in out.splitlines()]
    assert {'metric', 'value', 'unit'} <= rows[0].keys() and any(r['metric'] == 'average' for r in rows)
    assert main(['reproduce', '--scale', 'tiny', '--out', str(finished), '--force', 'table4_glue']) == 0
    assert table.stat().st_mtime_ns > before[0] and weights.stat().st_mtime_ns == before[1]


def test_report_draws_from_the_rows(finished, tmp_path):
    assert main(['report', '--runs', str(finished), '--out', str(tmp_path/'figures')]) == 0
    for name in ('table1_time', 'table2_savings', 'table3_search', 'table4_glue', 'table5_choices'):
        assert (tmp_path/'figures'/f'{name}.csv').read_text() == (finished/'paper_figures'/f'{name}.csv').read_text()
    for name in ('loss_curve', 'search_grid', 'choices_by_time'): assert (tmp_path/'figures'/f'{name}.svg').exists()


def pretend(ran, notebook, parameters):
    "Note that a notebook was run, and write what it should make"
    ran.append(f"{notebook.stem} {parameters.get('recipe', '')}".strip())
    for name in STAGES[notebook.stem].makes:
        Path(parameters['figures']).mkdir(parents=True, exist_ok=True)
        (Path(parameters['figures'])/f'{name}.md').write_text(name)


def test_a_failing_notebook_stops_only_what_needs_it(tmp_path, monkeypatch, capsys):
    import cramlit.running.pipeline as pipeline
    ran = []
    def run_notebook(notebook, output, **parameters):
        pretend(ran, notebook, parameters)
        if notebook.stem in ('pretrain', 'table2_savings'): raise CramlitError(f'{notebook.name} failed with ValueError: no. The executed copy shows where: {output}')
    monkeypatch.setattr(pipeline, 'run_notebook', run_notebook)
    assert main(['reproduce', '--scale', 'tiny', '--recipe', '24hbert', '--out', str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert [r.split()[0] for r in ran] == [s for s in STAGES if s not in ('finetune', 'figure_pretraining', 'table4_glue')]
    assert '5 stages came to nothing' in err and str(tmp_path/'table2_savings'/'table2_savings.ipynb') in err and 'finetune 24hbert: not run, for want of pretrain' in err
    index = (tmp_path/'paper_figures'/'README.md').read_text()
    assert '**table2_savings is missing**: table2_savings.ipynb failed with ValueError' in index and '**table4_glue is missing**: not run, for want of finetune' in index


def test_the_headline_is_a_part(tmp_path, monkeypatch):
    import cramlit.running.pipeline as pipeline
    ran = []
    monkeypatch.setattr(pipeline, 'run_notebook', lambda notebook, output, **parameters: pretend(ran, notebook, parameters))
    assert main(['reproduce', '--scale', 'tiny', '--recipe', '24hbert', '--headline', '--out', str(tmp_path)]) == 1  # these notebooks leave no rows
    assert [r.split()[0] for r in ran] == ['prepare', 'pretrain', 'finetune', 'figure_pretraining', 'table4_glue']


def test_of_two_recipes_the_one_that_works_is_gone_on_with(tmp_path, monkeypatch, capsys):
    import cramlit.running.pipeline as pipeline
    ran = []
    def run_notebook(notebook, output, **parameters):
        pretend(ran, notebook, parameters)
        if (notebook.stem, parameters.get('recipe')) == ('pretrain', 'bert-base'): raise CramlitError('no')
    monkeypatch.setattr(pipeline, 'run_notebook', run_notebook)
    ws = workspace('tiny', tmp_path/'out', tmp_path/'figures', '24hbert,bert-base')
    with pytest.raises(CramlitError, match='4 stages came to nothing'): pipeline.reproduce(ws)
    assert 'finetune 24hbert' in ran and 'finetune bert-base' not in ran and {'search', 'table3_search', 'appendix_hardware'} <= set(ran)


def test_what_was_deleted_is_made_again_and_what_is_elsewhere_too(tmp_path, monkeypatch):
    import cramlit.running.pipeline as pipeline
    ran = []
    monkeypatch.setattr(pipeline, 'run_notebook', lambda notebook, output, **parameters: pretend(ran, notebook, parameters))
    for figures in ('a', 'b'):
        ws = workspace('tiny', tmp_path/'out', tmp_path/figures)
        with pytest.raises(CramlitError, match='no result rows'): pipeline.reproduce(ws)
    assert ws.done('table1_time') and ws.done('table4_glue')
    (tmp_path/'b'/'table1_time.md').write_text('of another workspace')
    (tmp_path/'b'/'submitted.csv').write_text('x')
    assert not ws.done('table1_time') and not ws.done('table4_glue') and ws.done('table2_savings')
    first, second = ran[:len(STAGES)], ran[len(STAGES):]
    assert [r.split()[0] for r in first] == list(STAGES) and second == [s.name for s in STAGES.values() if s.makes]


def test_only_the_paper_is_rehearsed(tmp_path, capsys):
    assert main(['reproduce', '--scale', 'laptop', '--rehearse', '--out', str(tmp_path/'out')]) == 2
    assert '--rehearse is for --scale paper' in capsys.readouterr().err and not (tmp_path/'out').exists()


@pytest.mark.slow
def test_the_rehearsal_walks_the_path_of_eight_cards(tmp_path):
    assert main(['reproduce', '--scale', 'paper', '--rehearse', '--out', str(tmp_path)]) == 0
    runs = [tmp_path/'24hbert'/'pretrain'/'rows.jsonl', *tmp_path.glob('search/trials/*/run/rows.jsonl'), *tmp_path.glob('choices/trials/*/run/rows.jsonl')]
    assert len(runs) == 1 + 4 + 9
    for rows in runs: assert {json.loads(line)['processes'] for line in rows.read_text().splitlines()} == {8}
    assert 'is missing' not in (tmp_path/'paper_figures'/'README.md').read_text()


def test_a_paper_notebook_runs_with_plain_papermill_from_any_folder(finished, tmp_path):
    subprocess.run([sys.executable, '-m', 'papermill', str(paper_notebook('figure_pretraining')), 'out.ipynb', '-p', 'scale', 'tiny', '-p', 'out', str(finished),
                    '--no-progress-bar'], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path/'paper_figures'/'tiny'/'loss_curve.svg').exists()


def test_keys_depend_on_code_recipe_and_scale(tmp_path, monkeypatch):
    import cramlit.running.pipeline as pipeline
    ws = workspace('tiny', tmp_path)
    key = ws.key('finetune', '24hbert')
    assert key == workspace('tiny', tmp_path/'elsewhere').key('finetune', '24hbert')
    assert key != ws.key('finetune', 'bert-base') and key != workspace('laptop', tmp_path).key('finetune', '24hbert')
    real = pipeline.code_of
    monkeypatch.setattr(pipeline, 'code_of', lambda nb: real(nb) | ({'train': 'changed'} if 'pretrain' in str(nb) else {}))
    assert ws.key('prepare', '24hbert') == workspace('tiny', tmp_path).key('prepare', '24hbert') and ws.key('finetune', '24hbert') != key
