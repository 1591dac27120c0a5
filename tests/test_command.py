"The command line: exit codes, messages, JSON, and nothing left behind"
import json
import os
import subprocess
import sys

import pytest

from cramlit.running.command import main


def run(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize('args, code, says', [
    ([], 2, 'usage'),
    (['pretrian'], 2, "Did you mean 'pretrain'?"),
    (['pretrain', '--data', 'd', '--out', 'o', '--recipe', '24hbret'], 2, "Did you mean '24hbert'?"),
    (['pretrain', '--data', 'd', '--out', 'o', '--scale', 'laptob'], 2, "Did you mean 'laptop'?"),
    (['pretrain', '--data', 'd', '--out', 'o', '-o', 'optim.lrate=1'], 2, "Did you mean 'optim.lr'?"),
    (['pretrain', '--data', 'd', '--out', 'o', '-o', 'optim.lr=fast'], 2, 'expected a number'),
    (['pretrain', '--data', 'd', '--out', 'o', '--budget', 'soon'], 2, 'expected a duration'),
    (['pretrain', '--data', 'd', '--out', 'o', '--budget', '1m', '--steps', '3'], 2, 'not both'),
    (['pretrain', '--data', 'd', '--out', 'o', '--steps', 'x'], 2, 'invalid int'),
    (['pretrain', '--data', 'nowhere', '--out', 'o', '--steps', '3'], 1, 'nowhere'),
    (['prepare', '--source', 'nowhere.txt', '--scale', 'tiny', '--out', 'o'], 2, 'nowhere.txt'),
    (['glue', '--model', 'nowhere', '--out', 'o'], None, 'nowhere'),
    (['glue', '--model', 'nowhere', '--suite', 'glu', '--out', 'o'], 2, "Did you mean 'glue'?"),
    (['report', '--runs', 'nowhere', '--out', 'o'], 1, 'nowhere'),
    (['reproduce', '--scale', 'tiny', '--out', 'o', '--only', 'pretran'], 2, "Did you mean 'pretrain'?"),
])
def test_mistakes_are_one_line_and_leave_nothing(args, code, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *args)
    assert got == code if code else got in (1, 2)
    assert says in err and 'Traceback' not in err and out == ''
    assert os.listdir(tmp_path) == []


def test_help_is_made_of_the_comments(capsys):
    code, out, _ = run(capsys, 'pretrain', '--help')
    assert code == 0 and 'folder made by `cramlit prepare`' in out


def test_prepare_and_pretrain_as_rows(text, tmp_path, capsys):
    small = ['--scale', 'tiny', '-o', 'tokenizer.vocab_size=128', '-o', 'corpus.holdout=0.1', '-o', 'validation.max_sequences=64']
    code, out, err = run(capsys, 'prepare', '--source', text, *small, '--out', tmp_path/'data', '--json')
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert {'metric', 'value', 'unit', 'recipe'} <= rows[0].keys()
    assert next(r['value'] for r in rows if r['metric'] == 'train_rows') > 50
    code, out, err = run(capsys, 'pretrain', *small, '-o', f'corpus.source={text}', '--data', tmp_path/'data', '--out', tmp_path/'run',
                         '--steps', 2, '--seed', 3, '--json')
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert {r['metric'] for r in rows} >= {'validation_loss', 'unigram_entropy', 'tokens_per_second', 'steps'}
    assert {r['seed'] for r in rows} == {3} and (tmp_path/'run'/'model'/'model.safetensors').exists()


def test_the_installed_command_exists():
    done = subprocess.run([sys.executable, '-m', 'cramlit.running.command', '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and 'reproduce' in done.stdout


@pytest.mark.parametrize('colour', [True, False])
def test_a_terminal_gets_a_table_and_a_pipe_gets_lines(colour):
    import pexpect
    command = [sys.executable, '-m', 'cramlit.running.command', 'plan', '--scale', 'tiny', '--gpu', 't4']
    env = {k: v for k, v in os.environ.items() if k not in ('NO_COLOR', 'FORCE_COLOR')} | dict(TERM='xterm-256color', COLUMNS='120')
    if not colour: env['NO_COLOR'] = '1'
    screen = pexpect.run(' '.join(command), env=env, timeout=120, encoding='utf-8')
    assert '──' in screen and ('\x1b[36m' in screen) == colour
    pipe = subprocess.run(command, env=env, capture_output=True, text=True).stderr
    assert '──' not in pipe and '\x1b' not in pipe and 'parameters' in pipe and len(pipe.splitlines()) > 5
