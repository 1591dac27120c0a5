"The whole pipeline at scale tiny: from enwik8 to the table, skipped when done, redone when forced"
import json
import subprocess
import sys

import pytest

from cramlit.command import main
from cramlit.pipeline import paper_notebook, workspace


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp('tiny')/'out'
    assert main(['reproduce', '--scale', 'tiny', '--out', str(out)]) == 0
    return out


def test_table_figures_and_model_are_there(finished):
    names = {p.name for p in (finished/'paper_figures').iterdir()}
    assert names >= {f'table4_glue.{s}' for s in ('md', 'csv', 'tex')} | {f'{f}.{s}' for f in ('loss_curve', 'lr_schedule') for s in ('svg', 'pdf')}
    table = (finished/'paper_figures'/'table4_glue.md').read_text()
    assert all(v in table for v in ('majority', 'bag-of-words', 'from-scratch', 'pretrained', 'not GLUE', 'Commit:', 'Hardware:'))
    assert (finished/'24hbert'/'pretrain'/'model'/'config.json').exists()


def test_done_stages_are_skipped_and_one_can_be_forced(finished, capsys):
    table = finished/'table4_glue'/'table4_glue.ipynb'
    weights = finished/'24hbert'/'pretrain'/'model'/'model.safetensors'
    before = table.stat().st_mtime_ns, weights.stat().st_mtime_ns
    assert main(['reproduce', '--scale', 'tiny', '--out', str(finished), '--json']) == 0
    out, err = capsys.readouterr()
    assert err.count('skipped') == 5 and (table.stat().st_mtime_ns, weights.stat().st_mtime_ns) == before
    rows = [json.loads(line) for line in out.splitlines()]
    assert {'metric', 'value', 'unit'} <= rows[0].keys() and any(r['metric'] == 'average' for r in rows)
    assert main(['reproduce', '--scale', 'tiny', '--out', str(finished), '--force', 'table4_glue']) == 0
    assert table.stat().st_mtime_ns > before[0] and weights.stat().st_mtime_ns == before[1]


def test_report_draws_from_the_rows(finished, tmp_path):
    assert main(['report', '--runs', str(finished), '--out', str(tmp_path/'figures')]) == 0
    assert (tmp_path/'figures'/'table4_glue.csv').read_text() == (finished/'paper_figures'/'table4_glue.csv').read_text()


def test_a_paper_notebook_runs_with_plain_papermill_from_any_folder(finished, tmp_path):
    subprocess.run([sys.executable, '-m', 'papermill', str(paper_notebook('figure_pretraining')), 'out.ipynb', '-p', 'scale', 'tiny', '-p', 'out', str(finished),
                    '--no-progress-bar'], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path/'paper_figures'/'tiny'/'loss_curve.svg').exists()


def test_keys_depend_on_code_recipe_and_scale(tmp_path, monkeypatch):
    import cramlit.pipeline as pipeline
    ws = workspace('tiny', tmp_path)
    key = ws.key('finetune', '24hbert')
    assert key == workspace('tiny', tmp_path/'elsewhere').key('finetune', '24hbert')
    assert key != ws.key('finetune', 'bert-base') and key != workspace('laptop', tmp_path).key('finetune', '24hbert')
    real = pipeline.code_of
    monkeypatch.setattr(pipeline, 'code_of', lambda nb: real(nb) | ({'train': 'changed'} if 'pretrain' in str(nb) else {}))
    assert ws.key('prepare', '24hbert') == workspace('tiny', tmp_path).key('prepare', '24hbert') and ws.key('finetune', '24hbert') != key
