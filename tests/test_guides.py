"The guides: what a reader is told to copy does what it says"
import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import make_text

GUIDE = Path(__file__).parent.parent/'nbs'/'guides'/'90_own_corpus.ipynb'


def block(language):
    "The first block of code in the guide's text, with two steps in place of a minute"
    cells = json.loads(GUIDE.read_text())['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    code = re.search(rf'```{language}\n(.+?)```', text, re.S)[1]
    assert '--budget 60s' in code or 'budget=60' in code
    return code.replace('--budget 60s', '--steps 2').replace('budget=60', 'steps=2')


def test_the_way_in_a_shell(tmp_path):
    make_text(tmp_path/'texte', 400)
    code = f'set -e; cramlit() {{ {sys.executable} -m cramlit "$@"; }}\n' + block('sh')
    done = subprocess.run(['bash', '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'mein-bert'/'README.md').exists() and (tmp_path/'run'/'report.html').exists()


def test_the_way_in_python(tmp_path):
    make_text(tmp_path/'texte', 400)
    command = [sys.executable, '-c', block('python')]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'run'/'model'/'model.safetensors').exists()
