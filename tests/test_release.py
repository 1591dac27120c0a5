"What a release needs: light imports, a source archive and a wheel that install, files that other tools read"
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from conftest import PATIENCE

ROOT = Path(__file__).parent.parent
EXTRAS = '''datasets pyarrow joblib pandas sklearn scipy tabulate matplotlib plotext papermill nbclient
    jupyter_client IPython trackio tensorboard wandb nbdev sphinx'''.split()
HEAVY = ['torch', 'transformers', 'tokenizers', 'numpy', 'rich', 'fastcore', 'psutil', *EXTRAS]
WITHOUT_TORCH = '''core.recipes core.results core.scales core.randomness data.corpus data.tokenizer
    data.masking data.packing evaluation.glue evaluation.surrogate_tasks training.schedule
    running.pipeline running.command'''.split()
IMPORTER = '''
import json
import cramlit
from cramlit.core.recipes import recipe_from_dict
from cramlit.running.command import main
recipe, data, run = sys.argv[1:]
recipe = recipe_from_dict(json.loads(recipe))
cramlit.prepare(recipe, data)
cramlit.pretrain(recipe, data, run, steps=2)
cramlit.export_all(run, data + '/tokenizer')
assert main(['plan', '--gpu', 't4']) == 0
assert main(['watch', run]) == 1
'''


def run_without(blocked, code, *args):
    "Run code in a fresh Python that cannot import some packages"
    code = f'import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n{code}'
    command = [sys.executable, '-c', code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize('module', WITHOUT_TORCH)
def test_a_module_without_networks_needs_no_torch(module):
    done = run_without(['torch', 'transformers'], f'import cramlit.{module}')
    assert not done.returncode, done.stderr


def test_import_and_help_load_nothing_heavy():
    done = run_without(HEAVY, "import cramlit.running.command as c; sys.exit(c.main(['--help']))")
    assert not done.returncode and 'pretrain' in done.stdout, done.stderr
    assert 'halted; None in sys.modules' in run_without(HEAVY, 'import cramlit.model.encoder').stderr


def test_an_importer_needs_no_extra(recipe, tmp_path):
    "From text to a stock model, and a plan, with nothing but the base requirements"
    done = run_without(EXTRAS, IMPORTER, json.dumps(asdict(recipe)), tmp_path/'data', tmp_path/'run')
    assert not done.returncode, done.stderr
    assert (tmp_path/'run'/'model'/'model.safetensors').exists()
    assert "plotext is missing: pip install 'cramlit[report]'" in done.stderr  # what `watch` needs
    assert "not counted: joblib is missing: pip install 'cramlit[eval]'" in done.stderr


def test_the_source_archive_installs_in_an_empty_environment(tmp_path):
    build = [sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)  # the wheel is made of the archive
    archive, wheel = next(tmp_path.glob('*.tar.gz')), next(tmp_path.glob('*.whl'))
    with tarfile.open(archive) as t: names = {n.partition('/')[2] for n in t.getnames()}
    assert {'LICENSE', 'README.md', 'pyproject.toml', 'cramlit/training/training.py', 'cramlit/__main__.py',
            'nbs/paper/pretrain.ipynb', 'paper_figures/published.csv'} <= names
    assert not [n for n in names if n.startswith(('runs', '_docs', '.venv'))]
    venv.create(tmp_path/'env')
    python = tmp_path/'env'/'bin'/'python'
    clean = dict(cwd=tmp_path, env={}, capture_output=True, text=True, timeout=PATIENCE)
    install = ['install', '--quiet', '--no-deps', '--no-index', wheel]
    subprocess.run([sys.executable, '-m', 'pip', '--python', python, *install], check=True, **clean)
    where = subprocess.run([python, '-c', 'import cramlit; print(cramlit.__file__)'], **clean).stdout
    assert str(tmp_path/'env') in where
    assert 'pretrain' in subprocess.run([python.with_name('cramlit'), '--help'], **clean).stdout


def test_hooks_are_local_and_their_programs_exist():
    config = yaml.safe_load((ROOT/'.pre-commit-config.yaml').read_text())
    for repo in config['repos']:
        assert repo['repo'] == 'local'
        for hook in repo['hooks']:
            assert {'id', 'name', 'entry', 'language'} <= set(hook) and hook['language'] == 'system'
            program, *args = hook['entry'].split()
            assert shutil.which(program, path=str(Path(sys.executable).parent)), program
            assert all((ROOT/a).exists() for a in args if '/' in a)
            re.compile(hook.get('files', ''))


def test_the_workflow_runs_targets_that_exist():
    text = (ROOT/'.github'/'workflows'/'test.yml').read_text()
    jobs = yaml.safe_load(text)['jobs']
    targets = set(re.findall(r'^([a-z-]+):', (ROOT/'Makefile').read_text(), re.M))
    commands = [step['run'] for job in jobs.values() for step in job['steps'] if 'run' in step]
    assert commands and all(c.split()[0] == 'make' and set(c.split()[1:]) <= targets for c in commands)
    assert 'secrets' not in text and jobs['test']['strategy']['matrix']['python'][0] == '3.11'


def test_the_citation_says_what_the_project_says():
    citation = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert {'message', 'title', 'type', 'authors'} <= set(citation) and citation['cff-version'] == '1.2.0'
    for name in ('version', 'license'): assert str(citation[name]) == project[name]
    for work in [citation, *citation['references']]: assert work['authors'] and work['title']


def test_the_change_log_has_this_version():
    version = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['version']
    text, number = (ROOT/'CHANGELOG.md').read_text(), re.escape(version)
    assert re.search(rf'^## \[{number}\]|^## \[Unreleased\]\n\nTowards {number}\b', text, re.M)
