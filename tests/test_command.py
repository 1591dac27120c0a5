"The command line: exit codes, messages, JSON, and nothing left behind"
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import PATIENCE
from fastcore.docments import docments
from packaging.requirements import Requirement

import cramlit
from cramlit.core.recipes import Interrupted, settings_of
from cramlit.core.scales import get_recipe
from cramlit.running import command
from cramlit.running.command import COMMANDS, EXTRAS, StoppedEarly, main

RUN = ['pretrain', '--data', 'd', '--out', 'o']


def run(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize('args, code, says', [
    ([], 2, 'usage'),
    (['pretrian'], 2, "Did you mean 'pretrain'?"),
    ([*RUN, '--recipe', '24hbret'], 2, "Did you mean '24hbert'?"),
    ([*RUN, '--scale', 'laptob'], 2, "Did you mean 'laptop'?"),
    ([*RUN, '-o', 'optim.lrate=1'], 2, "Did you mean 'optim.lr'?"),
    ([*RUN, '-o', 'optim.lr=fast'], 2, 'expected a number'),
    ([*RUN, '--budget', 'soon'], 2, 'expected a duration'),
    ([*RUN, '--budget', '1m', '--steps', '3'], 2, 'not both'),
    ([*RUN, '--steps', 'x'], 2, 'invalid int'),
    (['pretrain', '--data', 'nowhere', '--out', 'o', '--steps', '3'], 1, 'nowhere'),
    (['prepare', '--source', 'nowhere.txt', '--scale', 'tiny', '--out', 'o'], 2, 'nowhere.txt'),
    (['glue', '--model', 'nowhere', '--out', 'o'], None, 'nowhere'),
    (['glue', '--model', 'nowhere', '--suite', 'glu', '--out', 'o'], 2, "Did you mean 'glue'?"),
    (['glue', '--model', 'nowhere', '--submit', 'z.zip', '--out', 'o'], 2, 'takes all tasks of GLUE'),
    (['report', '--runs', 'nowhere', '--out', 'o'], 1, 'nowhere'),
    (['reproduce', '--scale', 'tiny', '--out', 'o', '--only', 'pretran'], 2, "Did you mean 'pretrain'?"),
])
def test_mistakes_are_one_line_and_leave_nothing(args, code, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *args)
    assert got == code if code else got in (1, 2)
    assert says in err and 'Traceback' not in err and out == ''
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('name', COMMANDS)
def test_help_is_made_of_the_comments(name, capsys):
    code, out, _ = run(capsys, name, '--help')
    assert code == 0 and COMMANDS[name].__doc__ in ' '.join(out.split()) and '--json' in out
    arguments = {k: v for k, v in docments(COMMANDS[name]).items() if k != 'return'}
    shown = ''.join(out.split())  # wrapped at any place, within a hyphenated name too
    for argument, comment in arguments.items():
        assert comment and ''.join(comment.split(';')[0].split()) in shown, argument


def test_prepare_and_pretrain_as_rows(text, tmp_path, capsys):
    small = ['--scale', 'tiny']
    for setting in ('tokenizer.vocab_size=128', 'corpus.holdout=0.1', 'validation.max_sequences=64'):
        small += ['-o', setting]
    code, out, err = run(capsys, 'prepare', '--source', text, *small, '--out', tmp_path/'data', '--json')
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert {'metric', 'value', 'unit', 'recipe'} <= rows[0].keys()
    assert next(r['value'] for r in rows if r['metric'] == 'train_rows') > 50
    code, out, err = run(capsys, 'pretrain', *small, '-o', f'corpus.source={text}', '--data', tmp_path/'data',
                         '--out', tmp_path/'run', '--steps', 2, '--seed', 3, '--json')
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert {r['metric'] for r in rows} >= {'validation_loss', 'unigram_entropy', 'tokens_per_second', 'steps'}
    assert {r['seed'] for r in rows} == {3}
    assert (tmp_path/'run'/'model'/'model.safetensors').exists() and (tmp_path/'run'/'report.html').exists()


@pytest.mark.parametrize('error, alone, in_torchrun', [
    (Interrupted('saved'), 75, 0), (StoppedEarly('the loss is nan'), 1, 0), (KeyboardInterrupt(), 1, 1)])
def test_torchrun_does_not_start_again_what_has_stopped(error, alone, in_torchrun, monkeypatch, capsys):
    def fail(folder: str): raise error
    monkeypatch.setitem(COMMANDS, 'verify', fail)
    assert main(['verify', 'x']) == alone
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    assert main(['verify', 'x']) == in_torchrun
    assert capsys.readouterr().err.count('cramlit: ') == 2


@pytest.mark.parametrize('name, says', [
    ('verify', 'starts anew'), ('search', 'goes on where it stopped'), ('race', 'goes on where it stopped')])
def test_ctrl_c_is_one_line_that_says_what_the_same_command_does(name, says, monkeypatch, capsys):
    def fail(folder: str): raise KeyboardInterrupt
    monkeypatch.setitem(COMMANDS, name, fail)
    assert main([name, 'x']) == 1
    assert capsys.readouterr().err == f'cramlit: interrupted; the same command {says}\n'


def test_what_was_forced_goes_on_without_force(monkeypatch, capsys):
    def fail(force: str = ''): raise KeyboardInterrupt
    monkeypatch.setitem(COMMANDS, 'reproduce', fail)
    says = 'cramlit: interrupted; the same command without --force goes on where it stopped\n'
    for forced in (['--force', 'x'], ['--force=x']):
        assert main(['reproduce', *forced]) == 1
        assert capsys.readouterr().err == says


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_and_sighup_count_as_ctrl_c_so_that_workers_are_ended_too(monkeypatch, capsys, number):
    def command(folder: str):
        try: signal.raise_signal(number)
        finally: signal.raise_signal(signal.SIGHUP)  # as a shell that is closed sends it once more
    monkeypatch.setitem(COMMANDS, 'verify', command)
    before = signal.getsignal(number)
    assert main(['verify', 'x']) == 1
    assert capsys.readouterr().err == 'cramlit: interrupted; the same command starts anew\n'
    assert signal.getsignal(number) == before


def test_what_nohup_has_started_hears_no_sighup(monkeypatch, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    def command(folder: str):
        signal.raise_signal(signal.SIGHUP)
        return []
    monkeypatch.setitem(COMMANDS, 'verify', command)
    try: assert main(['verify', 'x']) == 0
    finally: signal.signal(signal.SIGHUP, before)


def test_a_missing_extra_is_named_and_a_missing_report_is_no_failure(monkeypatch, capsys, data, tmp_path):
    def fail(folder: str): raise ModuleNotFoundError(name='sklearn.metrics')
    monkeypatch.setitem(COMMANDS, 'verify', fail)
    assert main(['verify', 'x']) == 1
    assert capsys.readouterr().err == "cramlit: sklearn is missing: pip install 'cramlit[eval]'\n"
    monkeypatch.setitem(sys.modules, 'plotext', None)
    monkeypatch.delitem(sys.modules, 'cramlit.reporting.run_report', raising=False)
    assert command._finish(str(tmp_path), str(data), [dict(stopped='')], bare=True) == [dict(stopped='')]
    assert "report.html: plotext is missing: pip install 'cramlit[report]'" in capsys.readouterr().err


def test_the_extras_bring_what_the_hint_says():
    project = tomllib.loads((Path(__file__).parent.parent/'pyproject.toml').read_text())['project']
    named = dict(sklearn='scikit-learn', jupyter_client='papermill', nbclient='papermill')
    for extra, modules in EXTRAS.items():
        brought = {Requirement(r).name for r in project['optional-dependencies'][extra]}
        assert {named.get(m, m) for m in modules.split()} <= brought


def test_python_dash_m_is_the_command():
    done = subprocess.run([sys.executable, '-m', 'cramlit', '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and 'reproduce' in done.stdout


def test_a_terminal_gets_colour_and_a_pipe_gets_none():
    import pexpect
    args = [sys.executable, '-m', 'cramlit', 'plan', '--scale', 'tiny', '--gpu', 't4']
    env = {k: v for k, v in os.environ.items() if k not in ('NO_COLOR', 'FORCE_COLOR')}
    env |= dict(TERM='xterm-256color', COLUMNS='120')
    screens = [pexpect.run(' '.join(args), env=env | more, timeout=PATIENCE, encoding='utf-8')
               for more in ({}, dict(NO_COLOR='1'))]
    assert ['\x1b[36m' in s for s in screens] == [True, False]
    pipe = subprocess.run(args, env=env, capture_output=True, text=True)
    for shown in (*screens, pipe.stdout): assert 'parameters' in shown and len(shown.splitlines()) > 5
    assert '\x1b' not in pipe.stdout + pipe.stderr
    cells = [line.split('\t') for line in pipe.stdout.splitlines()]  # one line a result, in full
    assert {len(c) for c in cells} == {4} and all(not c[2] or float(c[2]) >= 0 for c in cells)


def test_whoever_has_seen_enough_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, '-m', 'cramlit', 'config'], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 141 and done.stderr == b''


def test_config_prints_what_overrides_read(capsys):
    modern = ['--recipe', 'modern', '--scale', 'gpu', '-o', 'checkpoint.milestones=0.25,0.5']
    assert main(['config', *modern]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = get_recipe('modern', 'gpu', {'checkpoint.milestones': (.25, .5)})
    assert len(lines) == len(settings_of(wanted))
    assert settings_of(get_recipe('24hbert', 'tiny', lines)) == settings_of(wanted)


@pytest.mark.parametrize('args, says', [
    (['pretrain', '--lr', '1e-3', '--data', 'x', '--out', 'y'], 'Give it as -o optim.lr=…'),
    (['prepare', '--seq-len=64', '--out', 'y'], 'Give it as -o packing.seq_len=…'),
    (['plan', '--budgt', '3'], 'Did you mean --budget?'),
    (['verify', 'x', '--overwrite'], 'cramlit verify --help lists what there is')])
def test_an_option_that_does_not_exist(args, says, capsys):
    assert main(args) == 2
    shown = capsys.readouterr().err
    assert says in shown and len(shown.splitlines()) == 1


def test_version_and_help(capsys):
    assert main(['--version']) == 0 and capsys.readouterr().out == f'cramlit {cramlit.__version__}\n'
    for name in COMMANDS:
        assert main([name, '--help']) == 0
        shown = capsys.readouterr().out
        assert f'Example: cramlit {name} ' in shown and '(str)' not in shown and "(default: '')" not in shown
        example = shown.rpartition(f'cramlit {name} ')[2].split()
        command._parser(name).parse_args(example)  # ends the test when it cannot be read


def test_scores_on_a_terminal_are_tasks_by_variants():
    ids = dict(stage='glue', aggregate='median', metric='headline', unit='%')
    found = ('a', 'majority', 50.), ('a', 'pretrained', 61.25), ('b', 'pretrained', None)
    rows = [ids | dict(task=task, variant=variant, value=value) for task, variant, value in found]
    table = command._tasks_table(rows)
    assert [c.header for c in table.columns] == ['task, %', 'majority', 'pretrained']
    assert [list(c.cells) for c in table.columns] == [['a', 'b'], ['50.0', '–'], ['61.2', '–']]


def test_values_on_a_terminal_are_as_one_says_them():
    said = [command._for_people(*given) for given in (
        (22267.3, 'steps'), (9_996_415_256, 'bytes'), (4096, 'bytes'), (1.8239e9, 'FLOPs'), (2.807, 'days'),
        (335_152_128, 'parameters'), (None, 'kWh'))]
    assert said == [('22,300', 'steps'), ('9.996', 'GB'), ('4,096', 'bytes'), ('1.824', 'GFLOPs'),
                    ('2.807', 'days'), ('335,152,128', 'parameters'), ('–', 'kWh')]
    rows = [dict(recipe='modern', part=part, metric=metric, value=1, unit=unit)
            for part, metric, unit in (('', 'energy_kwh', 'kWh'), ('head', 'memory_part_bytes', 'bytes'))]
    table = command._rows_table(rows)
    assert [c.header for c in table.columns] == ['modern', 'what', 'value', 'unit']
    assert [list(c.cells) for c in table.columns][:2] == [['', 'head'], ['energy', 'memory part']]


def test_commands_that_need_several_extras_name_the_one_that_has_them(monkeypatch, capsys):
    def fail(folder: str): raise ModuleNotFoundError(name='pandas')
    for name, extra in (('verify', 'report'), ('search', 'reproduce')):
        monkeypatch.setitem(COMMANDS, name, fail)
        assert main([name, 'x']) == 1
        assert capsys.readouterr().err == f"cramlit: pandas is missing: pip install 'cramlit[{extra}]'\n"


def test_what_a_run_has_learned_in_words():
    def said(loss): return command._verdict([dict(metric='validation_loss', value=loss),
                                             dict(metric='unigram_entropy', value=6.6)])
    assert said(4.6) == ('validation loss 4.600 nats a token, perplexity 99: '
                         '2.00 nats below the unigram baseline')
    assert 'not yet more than how frequent tokens are' in said(6.55)
    assert said(None) == 'the run has no validation loss'
    assert said(1000.) == ('validation loss 1000.000 nats a token: '
                           'not yet more than how frequent tokens are, which gives 6.600')


@pytest.mark.parametrize('args, code', [(['config', '--scale', 'tiny'], 0), (['config', '--scale', 'no'], 2)])
def test_a_process_without_standard_streams(args, code, monkeypatch):
    for name in ('stdout', 'stderr'): monkeypatch.setattr(sys, name, None)
    assert main(args) == code


@pytest.mark.parametrize('args, said', [
    (['watch', 'run', 'extra'], "watch does not expect 'extra'"),
    (['watch', 'run', '--pdb'], 'no option --pdb'),
    (['watch', 'run', '--json', '--html'], 'exclude one another'),
    (['plan', '--gpu', 'a100', '--gpus', '-1'], '--gpus -1'),
    (['plan', '--gpu', 'a100', '--mfu', '2'], '--mfu 2')])
def test_what_a_command_cannot_do_is_said_by_name(capsys, args, said):
    assert main(args) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize('args, said', [
    (['--only', 'budgets', '--headline'], '--only budgets is no stage of --headline'),
    (['--force', 'pretrain', '--only', 'table1_time'], 'does not run pretrain')])
def test_a_dry_run_refuses_what_the_run_refuses(capsys, tmp_path, args, said):
    for more in ([], ['--dry-run']):
        assert main(['reproduce', '--scale', 'tiny', '--out', str(tmp_path/'w'), *args, *more]) == 2
        assert said in capsys.readouterr().err


def test_a_foreign_run_is_one_line(capsys, tmp_path):
    (tmp_path/'run.json').write_text('{"recipe": {}, "budget": 1, "steps": 0}')
    for option in ('--once', '--json', '--html'):
        assert main(['watch', str(tmp_path), option]) == 2
        assert 'is no run' in capsys.readouterr().err


def test_what_comes_next_keeps_settings_and_suite():
    planned = dict(recipe='modern', scale='gpu', Override=['packing.seq_len=64'])
    assert '-o packing.seq_len=64' in command._next('plan', planned)[0]
    for scale, has in (('gpu', True), ('laptop', False)):
        given = dict(out='run', bare=False, scale=scale)
        assert ('--suite glue' in command._next('pretrain', given)[-1]) == has
