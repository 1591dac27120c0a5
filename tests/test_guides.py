"The guides: what a reader is told to copy does what it says"
import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import make_text

GUIDE = Path(__file__).parent.parent/'nbs'/'guides'/'90_own_corpus.ipynb'


def block(language):
    "The first block of code in the guide's text, with two steps in place of six minutes"
    cells = json.loads(GUIDE.read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    code = re.search(rf'```{language}\n(.+?)```', text, re.S)[1]
    assert '--budget 6m' in code or "budget='6m'" in code
    return code.replace('--budget 6m', '--steps 2').replace("budget='6m'", 'steps=2')


def make_book(folder):
    make_text(folder/'texts', 400)
    texts = [path.read_text() for path in sorted((folder/'texts').iterdir())]
    (folder/'book.txt').write_text('\n\n'.join(texts))


def test_the_way_in_a_shell(tmp_path):
    make_book(tmp_path)
    here = f'python() {{ "{sys.executable}" "$@"; }}; cramlit() {{ python -m cramlit "$@"; }}'
    code = f'set -e; {here}\n' + block('sh')
    done = subprocess.run(['bash', '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'token_str'") == 5 and (tmp_path/'run'/'report.html').exists()


def test_the_way_in_python(tmp_path):
    make_book(tmp_path)
    command = [sys.executable, '-c', block('python')]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'token_str'") == 5 and (tmp_path/'run'/'model'/'model.safetensors').exists()


def test_the_front_page_has_the_same_three_lines():
    assert block('sh').replace('--steps 2', '--budget 6m') in (GUIDE.parents[2]/'README.md').read_text()
