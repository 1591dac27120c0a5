"A run that is interrupted, wherever, ends as if nothing had happened"
import io
import json
import math
import subprocess
import sys
from contextlib import redirect_stderr
from functools import partial

import filelock
import pytest

import cramlit.training.training as train
from cramlit.core.recipes import CramlitError, Interrupted, UsageError, override
from cramlit.data.batches import RULERS, validation_rows
from cramlit.data.packing import open_data
from cramlit.training.checkpoints import checkpoints, find_damage
from cramlit.training.distributed import World
from cramlit.training.schedule import Clock
from cramlit.training.training import Run, acquire_run_dir, pretrain, resume

BUDGET = 20.  # seconds on a clock whose hand the test moves


def value(rows, metric):
    return next(r['value'] for r in rows if r['metric'] == metric)


def log(run):
    return [json.loads(line) for line in (run/'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def validations(run):
    return [line['step'] for line in log(run) if 'validation_loss' in line]


class Hand:
    "A clock on which loading takes 100 s, a step 1 s, an evaluation 0.5 s and nothing else takes any time"
    def __init__(self, monkeypatch):
        self.now, self.steps, self.stop_at = 0., 0, ()
        monkeypatch.setattr(train, 'Clock', partial(Clock, now=lambda: self.now))
        self.slow(monkeypatch, 'verify', 100.)
        self.slow(monkeypatch, 'validate', .5)
        real = train.accumulate

        def step(*args):
            self.now, self.steps = self.now + 1, self.steps + 1
            return real(*args)
        monkeypatch.setattr(train, 'accumulate', step)

    def slow(self, monkeypatch, name, seconds):
        real = getattr(train, name)

        def slowly(*args):
            self.now += seconds
            return real(*args)
        monkeypatch.setattr(train, name, slowly)


@pytest.fixture
def hand(monkeypatch):
    return Hand(monkeypatch)


def stop(run):
    run.mkdir(exist_ok=True)
    (run/'stop').touch()


def test_a_run_by_the_clock_can_be_stopped_after_every_step_and_ends(recipe, data, tmp_path, hand):
    "Each part loads for 100 s, five times the budget, and evaluates before it goes on"
    recipe, run, parts = override(recipe, ['validation.every=0.2']), tmp_path/'run', 0
    while True:
        stop(run)
        try: rows = pretrain(recipe, data, run, budget=BUDGET)
        except Interrupted: parts += 1
        else: break
        assert parts < 30
    assert (run/'rows.jsonl').exists() and parts == value(rows, 'steps') >= 15
    assert log(run)[-1]['validation_loss'] == value(rows, 'tuning_loss')
    assert value(rows, 'seconds') <= BUDGET + 1, 'at most the step that was under way is too much'
    assert validations(run) == sorted(set(validations(run))) and len(validations(run)) == 6


def kept_for_the_end(data, recipe, seconds):
    "Half as long again as the last evaluations take, where one by `tune` takes so many seconds"
    tune, *others = (len(validation_rows(open_data(data), recipe, ruler)) for ruler in RULERS)
    return 1.5*seconds*(1 + sum(others)/tune)


def test_loading_and_the_first_evaluation_are_not_in_the_budget(recipe, data, tmp_path, hand):
    "Of 20 s some are kept for the end, and 0.5 are spent on an evaluation at 90 %; a step takes 1 s"
    recipe = override(recipe, ['validation.every=0.9'])
    steps = math.ceil(BUDGET - kept_for_the_end(data, recipe, .5) - .5)
    assert value(pretrain(recipe, data, tmp_path/'run', budget=BUDGET), 'steps') == steps < 19
    assert log(tmp_path/'run')[0]['seconds'] == 0


def test_nothing_left_after_a_restart_is_an_end_and_not_a_refusal(recipe, data, tmp_path, hand, monkeypatch):
    "The machine that goes on is so slow that the time it keeps for the end is more than what is left"
    run = tmp_path/'run'
    stop(run)
    with pytest.raises(Interrupted): pretrain(recipe, data, run, budget=BUDGET)
    hand.slow(monkeypatch, 'validate', 1000.)
    rows = pretrain(recipe, data, run, budget=BUDGET)
    assert value(rows, 'steps') == 1 and value(rows, 'validation_loss') > 0 and (run/'rows.jsonl').exists()


def test_only_a_new_run_is_refused_and_may_be_given_more(recipe, data, tmp_path, hand):
    with pytest.raises(UsageError, match='too short for a single step'):
        pretrain(recipe, data, tmp_path/'run', budget=.7)
    assert value(pretrain(recipe, data, tmp_path/'run', budget=5.), 'steps') > 1


@pytest.mark.parametrize('by', [dict(steps=20), dict(budget=BUDGET)])
def test_what_is_due_in_the_step_of_a_stop_is_made_up_for(recipe, data, tmp_path, monkeypatch, hand, by):
    "Whole runs and runs that are stopped in every step have the same lines and the same milestones"
    recipe = override(recipe, ['validation.every=0.25', 'checkpoint.milestones=0.25,0.5,0.99'])
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    pretrain(recipe, data, whole, **by)
    for _ in range(40):
        stop(cut)
        try: pretrain(recipe, data, cut, **by)
        except Interrupted: continue
        break
    assert len(validations(whole)) == 5 and validations(cut) == sorted(set(validations(cut)))
    if 'steps' in by:
        losses = [[(x['step'], x['validation_loss']) for x in log(run) if 'validation_loss' in x]
                  for run in (whole, cut)]
        assert losses[0] == losses[1]
    kept = [sorted(p.name for p in (run/'milestones').iterdir()) for run in (whole, cut)]
    assert kept[0] == kept[1] == ['0.25', '0.5', '0.99']


def test_milestones_that_fall_into_a_restart_are_kept(recipe, data, tmp_path, monkeypatch, hand):
    "The slower machine finds more of the budget spent than there was when the run was stopped"
    recipe, run = override(recipe, ['checkpoint.milestones=0.2,0.9', 'validation.every=0.3']), tmp_path/'run'
    real = train.accumulate

    def stopping(*args):
        if hand.steps == 3: stop(run)
        return real(*args)
    monkeypatch.setattr(train, 'accumulate', stopping)
    with pytest.raises(Interrupted): pretrain(recipe, data, run, budget=BUDGET)
    slower = 14/kept_for_the_end(data, recipe, 1.)
    hand.slow(monkeypatch, 'validate', slower - .5)  # 14 s for the end, and 4 of 6 s are spent
    rows = pretrain(recipe, data, run, budget=BUDGET)
    assert value(rows, 'steps') < 10
    assert sorted(p.name for p in (run/'milestones').iterdir()) == ['0.2', '0.9']
    assert all(checkpoints(p) for p in (run/'milestones').iterdir())


def test_a_run_killed_before_its_first_step_logs_the_beginning_once(recipe, data, tmp_path, monkeypatch):
    recipe = override(recipe, ['validation.every=0.9'])

    def killed(*args): raise KeyboardInterrupt
    monkeypatch.setattr(train, 'accumulate', killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): pretrain(recipe, data, tmp_path/'run', steps=2)
    monkeypatch.undo()
    pretrain(recipe, data, tmp_path/'run', steps=2)
    assert validations(tmp_path/'run') == [0, 2]


def test_a_run_killed_before_its_rows_logs_its_end_once(recipe, data, tmp_path, monkeypatch):
    recipe = override(recipe, ['validation.every=0.9'])

    def killed(*args): raise KeyboardInterrupt
    monkeypatch.setattr(train, 'write_rows', killed)
    with pytest.raises(KeyboardInterrupt): pretrain(recipe, data, tmp_path/'run', steps=2)
    monkeypatch.undo()
    rows = pretrain(recipe, data, tmp_path/'run', steps=2)
    assert validations(tmp_path/'run') == [0, 2] and value(rows, 'steps') == 2


def test_nothing_is_asked_of_git_after_the_first_step(recipe, data, tmp_path, monkeypatch):
    "A commit that is made meanwhile, or a git that is gone, is nothing to a run that is under way"
    asked, real = [], train.provenance
    monkeypatch.setattr(train, 'provenance', lambda: asked.append('before') or real())
    step = train.accumulate
    monkeypatch.setattr(train, 'accumulate', lambda *args: asked.append('step') or step(*args))
    pretrain(recipe, data, tmp_path/'run', steps=1)
    assert asked == ['before', 'step']


HOLD = """
import sys, time
from pathlib import Path
from filelock import FileLock
lock = FileLock(Path(sys.argv[1])/'.lock')
lock.acquire()
print('held', flush=True)
time.sleep(600)
"""


def test_two_processes_in_one_folder_and_a_killed_one_is_no_hindrance(recipe, data, tmp_path):
    (tmp_path/'run').mkdir()
    halves = override(recipe, ['batch.micro_batch_size=16'])
    command = [sys.executable, '-c', HOLD, str(tmp_path/'run')]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(CramlitError, match='another process works in .*run'):
            pretrain(recipe, data, tmp_path/'run', steps=1)
        with pytest.raises(CramlitError, match='another process works in .*run'):
            train.pretrain_in(2, [], halves, data, tmp_path/'run', 0., 1, '')
        assert [p.name for p in (tmp_path/'run').iterdir()] == ['.lock']
    finally:
        other.kill()
        other.communicate()
    assert value(pretrain(recipe, data, tmp_path/'run', steps=1), 'steps') == 1


def test_a_run_that_fails_lets_go_of_its_folder(recipe, data, tmp_path, monkeypatch):
    def broken(*args): raise CramlitError('broken')
    monkeypatch.setattr(train, 'accumulate', broken)
    with pytest.raises(CramlitError, match='broken') as kept:  # and with it all that its frames hold
        pretrain(recipe, data, tmp_path/'run', steps=1)
    monkeypatch.undo()
    assert value(pretrain(recipe, data, tmp_path/'run', steps=1), 'steps') == 1 and kept


def test_a_file_system_without_locks_is_said_and_used(recipe, data, tmp_path, monkeypatch, capsys):
    def unsupported(self, timeout): raise NotImplementedError
    monkeypatch.setattr(filelock.FileLock, 'acquire', unsupported)
    assert value(pretrain(recipe, data, tmp_path/'run', steps=1), 'steps') == 1
    assert 'without locks' in capsys.readouterr().err


@pytest.mark.parametrize('at', ['the first line of the log', 'a checkpoint', 'a line of the log', 'rows'])
def test_a_full_disk_is_one_line_and_one_goes_on(recipe, data, tmp_path, monkeypatch, small_files, at):
    recipe, run = override(recipe, ['checkpoint.every=0.25', 'validation.every=0.5']), tmp_path/'run'
    if at == 'the first line of the log': small_files(30)
    places = {'a checkpoint': ('accumulate', 20_000), 'a line of the log': ('should_stop_early', 100),
              'rows': ('result_rows', 100)}
    if at in places:
        name, size = places[at]
        real, calls = getattr(train, name), []

        def filling(*args):
            calls.append(1)
            if len(calls) == (5 if name == 'accumulate' else 1): small_files(size)
            return real(*args)
        monkeypatch.setattr(train, name, filling)
    with (redirect_stderr(io.StringIO()),  # pytest catches it with a file
          pytest.raises(CramlitError, match='Free some space, then repeat the command') as e):
        pretrain(recipe, data, run, steps=8)
    assert '\n' not in str(e.value) and not list(tmp_path.rglob('*.tmp'))
    assert all(find_damage(p) == '' for p in checkpoints(run/'checkpoints'))
    small_files(None)
    monkeypatch.undo()
    assert value(pretrain(recipe, data, run, steps=8), 'steps') == 8
    assert validations(run) == [0, 4, 8]


def older(info):
    "As run.json was before it had a number, and before some settings were there"
    del info['format'], info['recipe']['schedule']['length'], info['recipe']['model']['window']
    info['recipe_hash'] = 'as it was'


def younger(info): info['recipe']['optim']['of_tomorrow'] = 1
def newer_format(info): info['format'] = 99
def broken(info): del info['recipe']


@pytest.mark.parametrize('change, match', [
    (older, ''), (younger, 'of_tomorrow'), (newer_format, 'newer version'), (broken, 'cannot be compared')])
def test_run_json_of_other_versions(recipe, data, tmp_path, change, match):
    pretrain(recipe, data, tmp_path/'run', steps=1)
    path = tmp_path/'run'/'run.json'
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    if match:
        with pytest.raises(UsageError, match=match) as e: pretrain(recipe, data, tmp_path/'run', steps=1)
        assert str(path) in str(e.value) and json.loads(path.read_text()) == info
    else:
        pretrain(recipe, data, tmp_path/'run', steps=1)
        assert json.loads(path.read_text())['recipe']['schedule']['length'] == 1


def test_a_number_is_the_same_run_however_it_is_written(recipe, data, tmp_path):
    for budget in (50, 50.):
        run = Run(recipe, open_data(data), tmp_path/'run', Clock(budget))
        acquire_run_dir(run)
        (tmp_path/'run'/'checkpoints'/'step-00000001').mkdir(parents=True, exist_ok=True)


class Told(World):
    "A process that is told a number by the main one"
    said = 3

    def broadcast(self, value): return self.said


def test_ranks_go_on_from_what_the_main_one_has_chosen_or_say_that_they_cannot(recipe, data, tmp_path):
    run = tmp_path/'run'
    pretrain(override(recipe, ['checkpoint.every=0.1', 'checkpoint.keep=9']), data, run, steps=4)
    model = train.MaskedLM(recipe.model, open_data(data).padded_vocab_size)
    optimizer = train.make_optimizer(model, recipe.optim)
    scaler = train.torch.amp.GradScaler('cpu', enabled=False)
    other = Run(recipe, open_data(data), run, Clock(steps=4), world=Told(1, 2))
    resume(other, model, optimizer, scaler)
    assert other.step == 3
    Told.said = 7
    with pytest.raises(CramlitError, match='rank 1 cannot go on from where rank 0 does: .*step-00000007'):
        resume(other, model, optimizer, scaler)
