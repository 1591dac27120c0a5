"A run that is interrupted, wherever, ends as if nothing had happened"
import json
from functools import partial

import pytest

import cramlit.training.training as train
from cramlit.core.recipes import Interrupted, UsageError, override
from cramlit.training.checkpoints import checkpoints
from cramlit.training.schedule import Clock
from cramlit.training.training import pretrain

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
    assert log(run)[-1]['validation_loss'] == value(rows, 'validation_loss')
    assert value(rows, 'seconds') <= BUDGET + 1, 'at most the step that was under way is too much'
    assert validations(run) == sorted(set(validations(run))) and len(validations(run)) == 6


def test_loading_and_the_first_evaluation_are_not_in_the_budget(recipe, data, tmp_path, hand):
    "Of 20 s, 0.75 are kept for the end and 0.5 are spent on an evaluation at 90 %; a step takes 1 s"
    recipe = override(recipe, ['validation.every=0.9'])
    assert value(pretrain(recipe, data, tmp_path/'run', budget=BUDGET), 'steps') == 19
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
    hand.slow(monkeypatch, 'validate', 9.)  # 14 s for the end, and 4 of 6 s are spent
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
