"What a release needs: light imports, a source archive and a wheel that install, and files that other tools read"
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = 'command config corpus docs_site glue keyed masking packing pipeline report results scales schedule standin tokenizer'.split()
BLOCK = '''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}: raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Blocked())
'''


def run_without(blocked, code):
    return subprocess.run([sys.executable, '-c', BLOCK.format(blocked=blocked) + code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize('module', WITHOUT_TORCH)
def test_a_module_without_networks_needs_no_torch(module):
    done = run_without(['torch', 'transformers'], f'import cramlit.{module}')
    assert not done.returncode, done.stderr


def test_import_and_help_load_nothing_heavy():
    heavy = ['torch', 'transformers', 'datasets', 'numpy', 'pandas', 'matplotlib', 'sklearn', 'scipy', 'papermill', 'pyarrow', 'IPython']
    done = run_without(heavy, "import cramlit; from cramlit.command import main; sys.exit(main(['--help']))")
    assert not done.returncode and 'pretrain' in done.stdout, done.stderr
    assert 'is blocked' in run_without(heavy, 'import cramlit.model').stderr


def test_the_source_archive_installs_in_an_empty_environment(tmp_path):
    subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path, ROOT], check=True, capture_output=True)  # the wheel from the archive
    archive, wheel = next(tmp_path.glob('*.tar.gz')), next(tmp_path.glob('*.whl'))
    with tarfile.open(archive) as t: names = {n.partition('/')[2] for n in t.getnames()}
    assert {'LICENSE', 'README.md', 'pyproject.toml', 'cramlit/train.py', 'nbs/paper/pretrain.ipynb', 'paper_figures/published.csv'} <= names
    assert not [n for n in names if n.startswith(('runs', '_docs', '.venv'))]
    venv.create(tmp_path/'env')
    python = tmp_path/'env'/'bin'/'python'
    clean = dict(cwd=tmp_path, env={}, capture_output=True, text=True, timeout=120)  # without a PYTHONPATH that leads here
    subprocess.run([sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', wheel], check=True, **clean)
    assert str(tmp_path/'env') in subprocess.run([python, '-c', 'import cramlit; print(cramlit.__file__)'], **clean).stdout
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
    citation, project = yaml.safe_load((ROOT/'CITATION.cff').read_text()), tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    assert {'cff-version', 'message', 'title', 'type', 'authors'} <= set(citation) and citation['cff-version'] == '1.2.0'
    assert str(citation['version']) == project['version'] and citation['license'] == project['license']
    for work in [citation, *citation['references']]: assert work['authors'] and work['title']


def test_the_change_log_has_this_version():
    version = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['version']
    text = (ROOT/'CHANGELOG.md').read_text()
    assert re.search(rf'^## \[{re.escape(version)}\]|^## \[Unreleased\]\n\nTowards {re.escape(version)}\b', text, re.M)
