"The rules of the house: configuration, numbers, imports, documentation, what is packed"
import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PARTS = 'core data model training evaluation efficiency experiments reporting running guides'.split()
CHAPTERS = sorted((ROOT/'nbs').glob('*/[0-9]*.ipynb'), key=lambda p: p.name)
PAPER = sorted((ROOT/'nbs'/'paper').glob('*.ipynb'))
WIDTH = 110

every_chapter = pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: p.stem)
every_notebook = pytest.mark.parametrize('path', CHAPTERS + PAPER, ids=lambda p: p.stem)


def cells(path, kind='code'):
    return [c for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def code(path):
    return [''.join(c['source']) for c in cells(path)]


def module_of(path):
    "The module a chapter exports, such as data.packing; empty for one that exports nothing"
    return next((m[1] for s in code(path) if (m := re.search(r'^#\| *default_exp +([\w.]+)', s, re.M))), '')


def imports(source):
    "Full names of what code imports"
    python = '\n'.join('' if line.lstrip().startswith(('%', '!')) else line for line in source.splitlines())
    found = set()
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f'{node.module}.{a.name}' for a in node.names)}
    return found


MODULES = [m for m in map(module_of, CHAPTERS) if m]
every_module = pytest.mark.parametrize('module', MODULES)


@pytest.fixture(scope='module')
def toml():
    return tomllib.loads((ROOT/'pyproject.toml').read_text())


@pytest.fixture(scope='module')
def settings():
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini')
    return parser['DEFAULT']


# numbers and modules

@every_chapter
def test_a_chapter_stands_in_its_part(path):
    assert re.fullmatch(r'\d\d_[a-z0-9_]+', path.stem)
    assert PARTS.index(path.parent.name) == int(path.name[0])
    if module_of(path): assert module_of(path) == f'{path.parent.name}.{path.stem[3:]}'
    else: assert not [s for s in code(path) if re.match(r'#\| *export', s)]


def test_no_number_twice_and_no_chapter_elsewhere():
    numbers = [p.name[:2] for p in CHAPTERS]
    assert len(numbers) == len(set(numbers))
    folders = {p.parent.name for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    assert folders == {*PARTS, 'paper', 'nbs'}
    assert [p.name for p in (ROOT/'nbs').glob('*.ipynb')] == ['index.ipynb']


@every_chapter
def test_a_chapter_imports_only_from_lower_numbers(path):
    number = {f'cramlit.{module_of(p)}': p.name[:2] for p in CHAPTERS}
    for s in code(path):
        for name in imports(s) & set(number): assert number[name] < path.name[:2], f'imports {name}'


def test_the_package_has_no_stale_module():
    files = {str(p.relative_to(ROOT/'cramlit')) for p in (ROOT/'cramlit').rglob('*.py')}
    parts = {m.split('.')[0] for m in MODULES}
    made = {f'{m.replace(".", "/")}.py' for m in MODULES} | {f'{p}/__init__.py' for p in parts}
    assert files == made | {'__init__.py', '__main__.py', '_modidx.py'}


def test_the_front_page_lists_every_chapter():
    readme = (ROOT/'README.md').read_text()
    assert [p.name for p in CHAPTERS if f'(nbs/{p.parent.name}/{p.name})' not in readme] == []


# what a notebook looks like

@every_notebook
def test_a_notebook_says_what_it_is_about(path):
    first = ''.join(cells(path, 'markdown')[0]['source'])
    assert re.match(r'# [^\n]+\n\n> [^\n]+$', first.split('\n\n', 2)[0] + '\n\n' + first.split('\n\n')[1])
    assert path.stat().st_size < 250_000


@every_notebook
def test_code_is_not_wide(path):
    wide = [line for s in code(path) for line in s.splitlines() if len(line) > WIDTH]
    assert not wide, f'{len(wide)} lines, such as {wide[0]}'


@every_chapter
def test_a_chapter_explains_and_checks(path):
    text = '\n'.join(''.join(c['source']) for c in cells(path, 'markdown'))
    headings = re.findall(r'^## (.+)$', text, re.M)
    if 'Exercises' in headings:
        assert 'Summary' in headings and headings.index('Summary') < headings.index('Exercises')
        kinds = {kind for c in cells(path) for o in c['outputs'] for kind in o.get('data', {})}
        assert kinds & {'image/png', 'image/svg+xml'}, 'a picture is missing'
    if module_of(path): assert any(re.search(r'\bassert\b|test_\w+\(', s) for s in code(path))


@every_notebook
def test_outputs_are_results(path):
    for o in (o for c in cells(path) for o in c['outputs']):
        assert o['output_type'] != 'error' and o.get('name') != 'stderr'
        assert 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})
        said = ''.join(o.get('data', {}).get('text/plain', ''))
        assert not said.startswith('<Figure') or 'image/png' in o['data'], 'a figure that is not drawn'
    assert 'IPY_MODEL' not in path.read_text()  # the state of widgets that nobody sees


@pytest.mark.parametrize('path', PAPER, ids=lambda p: p.stem)
def test_paper_notebooks_have_typed_parameters_and_import_modules(path):
    tagged = [''.join(c['source']) for c in cells(path) if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and not module_of(path)
    for line in tagged[0].splitlines():
        assert re.fullmatch(r'\w+: (str|int|float|bool) = \S+.*# .+', line), line
    for s in code(path): assert 'cramlit' not in imports(s), 'a stage depends on modules'


# what a function looks like

def source_of(module):
    return (ROOT/'cramlit'/f'{module.replace(".", "/")}.py').read_text()


def public_functions(module):
    "Public functions of a module, methods of its public classes and what `patch` adds to them"
    public = import_module(f'cramlit.{module}').__all__
    for node in ast.parse(source_of(module)).body:
        if isinstance(node, ast.FunctionDef):
            patched = 'patch' in map(ast.unparse, node.decorator_list) and not node.name.startswith('_')
            if node.name in public or patched: yield node.name, node
        if not isinstance(node, ast.ClassDef) or node.name not in public: continue
        for f in node.body:
            if isinstance(f, ast.FunctionDef) and (f.name[0] != '_' or f.name in ('__init__', '__call__')):
                yield f'{node.name}.{f.name}', f


@every_module
def test_public_names_are_documented(module):
    m = import_module(f'cramlit.{module}')
    assert m.__doc__
    for name in m.__all__:
        f = getattr(m, name)
        if callable(f) and getattr(f, '__module__', '') == m.__name__: assert f.__doc__, name
    assert not [name for name, f in public_functions(module)
                if not ast.get_docstring(f) and not name.endswith('__init__')]


@every_module
def test_arguments_of_public_functions_are_explained(module):
    "No number, text or switch goes without a comment beside it"
    source = source_of(module).splitlines()
    for name, f in public_functions(module):
        kinds = {a.arg: ast.unparse(a.annotation) for a in f.args.args if a.annotation}
        plain = [a for a in f.args.args if kinds.get(a.arg) in ('str', 'int', 'float', 'bool')]
        silent = [a.arg for a in plain if '#' not in source[a.lineno - 1]]
        assert not silent, f'{name}: {silent}'


NEVER = ('import pickle', 'torch.load(', 'allow_pickle=True', 'shell=True', 'trust_remote_code=True',
         'import *', 'unittest')


@pytest.mark.parametrize('word', NEVER)
def test_what_is_never_done(word):
    assert not [str(p) for p in (ROOT/'cramlit').rglob('*.py') if word in p.read_text()]


def test_the_short_names_are_there_and_cost_nothing():
    import cramlit
    assert set(cramlit._WHERE) == set(cramlit.__all__) <= set(dir(cramlit)) and 9 < len(cramlit.__all__) < 16
    for name, module in cramlit._WHERE.items():
        assert getattr(cramlit, name) is getattr(import_module(f'cramlit.{module}'), name)
        assert getattr(cramlit, name).__module__ == f'cramlit.{module}'
    assert 'data: folder made by `prepare`' in cramlit.pretrain.__doc__  # which `help` shows
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"): _ = cramlit.pretrian
    loaded = 'import sys; before = set(sys.modules); import cramlit; print(*set(sys.modules) - before)'
    out = subprocess.check_output([sys.executable, '-c', loaded], cwd=ROOT, text=True)
    assert out.split() == ['cramlit']


# configuration

def test_settings_and_pyproject_agree(settings, toml):
    project, nbdev = toml['project'], toml['tool']['nbdev']
    assert settings['lib_name'] == project['name']
    for name in ('version', 'description'): assert settings[name] == project[name]
    assert '>=' + settings['min_python'] == project['requires-python']
    assert settings['requirements'].split() == project['dependencies']
    for extra, needs in project['optional-dependencies'].items():
        assert settings[f'{extra}_requirements'].split() == needs
    assert settings['console_scripts'] == f"cramlit={project['scripts']['cramlit']}"
    for name in ('nbs_path', 'lib_path', 'readme_nb'): assert settings[name] == nbdev[name]
    assert settings['allowed_cell_metadata_keys'].split() == nbdev['allowed_cell_metadata_keys'] == ['tags']
    assert settings.getboolean('clean_ids') == nbdev['clean_ids']
    assert not settings.getboolean('update_pyproject')
    assert import_module('cramlit').__version__ == project['version']


def locked():
    lines = (ROOT/'requirements.lock').read_text().splitlines()
    pins = dict(line.split('==') for line in lines if line and not line.startswith('#'))
    return {canonicalize_name(name): version for name, version in pins.items()}


def needed(project):
    "Every requirement of the package with its extra [dev], those of its requirements too"
    extras = project['optional-dependencies']
    todo = [Requirement(r) for r in [*project['dependencies'], 'cramlit[dev]', 'setuptools', 'wheel']]
    seen = {}
    while todo:
        r = todo.pop()
        key = canonicalize_name(r.name), frozenset(r.extras)
        if r.name == 'pip' or key in seen: continue
        seen[key] = r
        if r.name == 'cramlit': todo += [Requirement(x) for extra in r.extras for x in extras[extra]]
        else:
            for text in distribution(r.name).requires or []:
                q, extras_of_r = Requirement(text), r.extras or {''}
                if not q.marker or any(q.marker.evaluate(dict(extra=e)) for e in extras_of_r): todo.append(q)
    own = ('cramlit', 'nvidia-', 'cuda-', 'triton')  # a torch for GPUs brings its own
    return [r for r in seen.values() if not r.name.startswith(own)]


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason='the lock is made for the oldest Python')
def test_the_lock_is_complete_and_holds_nothing_else(toml):
    pins, needs = locked(), needed(toml['project'])
    assert set(pins) == {canonicalize_name(r.name) for r in needs}
    for r in needs: assert r.specifier.contains(pins[canonicalize_name(r.name)]), r
    assert pins['torch'] == '2.13.0'


def test_the_lock_is_installed_and_made_for_the_oldest_python():
    for name, pin in locked().items():
        d = distribution(name)
        assert d.version.split('+')[0] == pin, name
        assert SpecifierSet(d.metadata.get('Requires-Python') or '').contains('3.11.0'), name


def test_conda_environment_takes_the_same_lock():
    env = yaml.safe_load((ROOT/'environment.yml').read_text())
    pip = next(d['pip'] for d in env['dependencies'] if isinstance(d, dict))
    assert env['channels'] == ['conda-forge'] and pip == ['-r requirements.lock', '-e .']
    assert 'python=3.11' in env['dependencies']


def test_the_wheel_holds_everything(tmp_path):
    command = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation']
    subprocess.run([*command, '-w', tmp_path, ROOT], check=True, capture_output=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob('*.whl')))
    names = set(wheel.namelist())
    modules = {str(p.relative_to(ROOT)) for p in (ROOT/'cramlit').rglob('*.py')}
    files = {f'cramlit/{name}' for name in ('published/published.csv', 'py.typed')}
    assert modules | files | {f'cramlit/paper/{p.name}' for p in PAPER} <= names
    assert not [n for n in names if not n.startswith(('cramlit/', 'cramlit-'))]
    entry = next(n for n in names if n.endswith('entry_points.txt'))
    assert 'cramlit = cramlit.running.command:main' in wheel.read(entry).decode()
