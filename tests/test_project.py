"The project agrees with itself: configuration, imports, documentation, sizes"
import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from fastcore.docments import docments

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').glob('[0-9]*.ipynb'))
PAPER = sorted((ROOT/'nbs'/'paper').glob('*.ipynb'))
MODULES = sorted(p.stem for p in (ROOT/'cramlit').glob('[a-z]*.py'))


def code_cells(path):
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'code']


def exported(path):
    return [''.join(c['source']) for c in code_cells(path) if re.match(r'#\| *export', ''.join(c['source']))]


def module_of(path):
    "The module a chapter exports, empty for one that exports nothing"
    return next((m[1] for c in code_cells(path) if (m := re.search(r'#\| *default_exp (\w+)', ''.join(c['source'])))), '')


def imports(source):
    tree = ast.parse('\n'.join(line for line in source.splitlines() if not line.startswith(('%', '!'))))
    return {n.module.split('.')[1] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('cramlit.')}


def functions(module):
    for f in ast.walk(ast.parse((ROOT/'cramlit'/f'{module}.py').read_text())):
        if isinstance(f, ast.FunctionDef): yield f


@pytest.fixture(scope='module')
def toml():
    return tomllib.loads((ROOT/'pyproject.toml').read_text())


@pytest.fixture(scope='module')
def settings():
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini')
    return parser['DEFAULT']


def test_the_front_page_lists_every_chapter():
    readme = (ROOT/'README.md').read_text()
    assert [p.name for p in NOTEBOOKS if f'(nbs/{p.name})' not in readme] == []


def test_settings_and_pyproject_agree(settings, toml):
    project, nbdev = toml['project'], toml['tool']['nbdev']
    assert settings['lib_name'] == project['name'] and settings['version'] == project['version'] and settings['description'] == project['description']
    assert '>=' + settings['min_python'] == project['requires-python']
    assert settings['requirements'].split() == project['dependencies']
    assert settings['dev_requirements'].split() == project['optional-dependencies']['dev']
    assert settings['docs_requirements'].split() == project['optional-dependencies']['docs']
    assert settings['track_requirements'].split() == project['optional-dependencies']['track']
    assert settings['console_scripts'] == f"cramlit={project['scripts']['cramlit']}"
    assert settings['nbs_path'] == nbdev['nbs_path'] and settings['lib_path'] == nbdev['lib_path'] and settings['readme_nb'] == nbdev['readme_nb']
    assert settings['allowed_cell_metadata_keys'].split() == nbdev['allowed_cell_metadata_keys'] == ['tags']
    assert settings.getboolean('clean_ids') == nbdev['clean_ids'] and not settings.getboolean('update_pyproject')
    assert import_module('cramlit').__version__ == project['version']


def locked():
    lines = (ROOT/'requirements.lock').read_text().splitlines()
    return dict(line.split('==') for line in lines if line and not line.startswith('#'))


def test_lock_pins_every_requirement_and_torch(toml):
    from packaging.requirements import Requirement
    pins = {name.lower().replace('_', '-'): version for name, version in locked().items()}
    for text in toml['project']['dependencies'] + sum((toml['project']['optional-dependencies'][extra] for extra in ('dev', 'docs')), []):
        r = Requirement(text)
        if r.name != 'pip': assert r.specifier.contains(pins[r.name]), r
    assert pins['torch'] == '2.13.0'


def test_the_lock_is_installed_and_made_for_the_oldest_python():
    from importlib.metadata import distribution

    from packaging.specifiers import SpecifierSet
    for name, pin in locked().items():
        d = distribution(name)
        assert d.version.split('+')[0] == pin and SpecifierSet(d.metadata.get('Requires-Python') or '').contains('3.11.0'), name


def test_conda_environment_takes_the_same_lock():
    env = yaml.safe_load((ROOT/'environment.yml').read_text())
    pip = next(d['pip'] for d in env['dependencies'] if isinstance(d, dict))
    assert env['channels'] == ['conda-forge'] and pip == ['-r requirements.lock', '-e .'] and 'python=3.11' in env['dependencies']


def test_data_flows_one_way():
    order = {module_of(p): i for i, p in enumerate(NOTEBOOKS) if module_of(p)}
    assert set(order) == set(MODULES)
    for i, p in enumerate(NOTEBOOKS):
        assert module_of(p) or not exported(p), f'{p.name} exports to no module'
        for name in set().union(*(imports(''.join(c['source'])) for c in code_cells(p))):
            assert order[name] < i, f'{p.name} imports {name}, which comes later'


@pytest.mark.parametrize('path', PAPER, ids=lambda p: p.stem)
def test_paper_notebooks_have_typed_parameters_and_no_exports(path):
    tagged = [''.join(c['source']) for c in code_cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and not exported(path)
    for line in tagged[0].splitlines(): assert re.fullmatch(r'\w+: (str|int|float|bool) = \S+.*# .+', line), line


@pytest.mark.parametrize('path', NOTEBOOKS + PAPER, ids=lambda p: p.stem)
def test_notebooks_are_small_and_explain_themselves(path):
    cells = json.loads(path.read_text())['cells']
    first = next(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    assert re.match(r'# .+\n\n> .+', first) and path.stat().st_size < 250_000
    assert sum(s.count('\n') + 1 for s in exported(path)) <= 275
    if path in NOTEBOOKS:
        assert sum(len(''.join(c['source']).split()) for c in cells if c['cell_type'] == 'markdown') >= 150
        assert any('assert' in s or 'test_' in s for s in (''.join(c['source']) for c in cells if c['cell_type'] == 'code'))


@pytest.mark.parametrize('module', MODULES)
def test_functions_are_short(module):
    for f in functions(module): assert f.end_lineno - f.lineno + 1 <= (60 if (module, f.name) == ('train', 'train') else 32), f.name


@pytest.mark.parametrize('module', MODULES)
def test_public_functions_are_documented(module):
    m = import_module(f'cramlit.{module}')
    for name in m.__all__:
        f = getattr(m, name)
        if not callable(f) or getattr(f, '__module__', '') != m.__name__: continue
        assert f.__doc__, f'{module}.{name} has no docstring'


def test_docments_reach_the_help():
    assert 'folder made by `cramlit prepare`' in docments(import_module('cramlit.running.command').pretrain)['data']


@pytest.mark.parametrize('word', ['import pickle', 'shell=True', 'trust_remote_code=True', 'import *'])
def test_what_is_never_done(word):
    assert not [p.name for p in (ROOT/'cramlit').glob('*.py') if word in p.read_text()]


def test_the_wheel_holds_everything(tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', str(tmp_path), str(ROOT)],
                   check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist())
    assert {f'cramlit/{m}.py' for m in MODULES} | {f'cramlit/paper/{p.name}' for p in PAPER} | {'cramlit/published/published.csv'} <= names
    entry = next(n for n in names if n.endswith('entry_points.txt'))
    assert 'cramlit = cramlit.running.command:main' in zipfile.ZipFile(next(tmp_path.glob('*.whl'))).read(entry).decode()
