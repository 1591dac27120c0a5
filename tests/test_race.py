"The race: which entries are let in, the verdict on known numbers, a race of two entries, and the page"
import json
import shutil
from pathlib import Path

import joblib
import pandas as pd
import pytest
from scipy.stats import ttest_1samp, ttest_ind, ttest_rel

from cramlit.core.recipes import CramlitError, UsageError
from cramlit.core.results import read_json_lines, write_rows
from cramlit.experiments import speedrun
from cramlit.experiments.speedrun import (
    SEEDS,
    TRACKS,
    Entry,
    Track,
    judge,
    read_entries,
    read_entry,
    run_race,
)
from cramlit.reporting.studies import write_race
from cramlit.running.command import main

PAGE = Path(__file__).parent.parent/'paper_figures'/'race'
FIELDS = dict(track='tiny', recipe='24hbert', settings=[], steps=4, date='2026-11-28', author='a test',
              change='nothing', sources=[])


def write(path, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(FIELDS | changes))
    return path


@pytest.mark.parametrize('changes, says', [
    (dict(steps=0), 'steps must be a whole number above 0'), (dict(steps=True), 'steps must be'),
    (dict(steps='10'), 'steps must be'), (dict(settings='seed=1'), 'settings must be a list of texts'),
    (dict(settings=[1]), 'settings must be'), (dict(date='28.11.2026'), 'date must be'),
    (dict(date='20261128'), 'date must be'), (dict(date='2026-W48-6'), 'date must be'),
    (dict(settings=['batch.micro_batch_size=0']), 'name a number'),
    (dict(author=None), 'author must be a text'), (dict(change='a | b'), 'change must be'),
    (dict(change='<script>'), 'change must be'), (dict(extra=1), 'and no others'),
    (dict(track='tinny'), "Did you mean 'tiny'?"), (dict(recipe='moder'), "Did you mean 'modern'?"),
    (dict(settings=['seed=7']), 'the same for all entries'), (dict(settings=['optim.lr=-1']), 'optim.lr'),
    (dict(settings=['corpus.source=mine.txt']), 'the same for all entries'),
    (dict(settings=[' corpus.source=mine.txt']), 'the same for all entries'),
    (dict(settings=['packing.seq_len=64']), 'the same for all entries'),
    (dict(settings=['validation.max_sequences=1']), 'the same for all entries'),
    (dict(settings=['model.ffn=geglu']), 'no stock class')])
def test_what_cannot_be_an_entry_is_refused(changes, says, tmp_path):
    with pytest.raises(UsageError) as e: read_entry(write(tmp_path/'mine.json', **changes))
    assert says in str(e.value) and str(tmp_path/'mine.json') in str(e.value)


@pytest.mark.parametrize('text', ['', '[]', '{"track": ', '{"track": "tiny"}', '\xff'])
def test_what_is_no_entry_at_all(text, tmp_path):
    (tmp_path/'mine.json').write_bytes(text.encode('latin-1'))
    with pytest.raises(UsageError, match=r'mine\.json'): read_entry(tmp_path/'mine.json')
    with pytest.raises(UsageError, match='nowhere'): read_entry(tmp_path/'nowhere.json')


def test_a_name_stands_for_what_decides_the_losses(tmp_path):
    def name(**changes): return read_entry(write(tmp_path/'mine.json', **changes)).id
    assert name() == name(author='another', change='other words', sources=['x'], date='2026-12-01')
    others = [name(steps=5), name(recipe='modern'), name(settings=['optim.lr=1e-3']), name(track='laptop')]
    assert len({name(), *others}) == 5
    assert {t.seed for t in map(read_entry(tmp_path/'mine.json').trial, SEEDS)} == set(SEEDS)
    recipe = read_entry(write(tmp_path/'mine.json', track='laptop')).trial().recipe
    assert recipe.validation.stop_loss == 0 and recipe.validation.max_sequences == 1024


def known(name, steps, losses, turns, before=(0., 0., 0.), ruler='r'):
    "An entry with rows of known numbers"
    e = Entry(name, 'tiny', '24hbert', [], steps, '2026-11-28', 'a test', name, [])
    origin = dict(commit='abc', dirty=False, versions={}, hardware='none', id=e.id)
    rows = [origin | dict(metric='validation_loss', value=x, seed=s, ruler=ruler)
            for s, x in zip(SEEDS, losses, strict=False)]
    for metric, values in (('seconds_per_step', turns), ('seconds_before', before)):
        rows.append(origin | dict(metric=metric, value=0., kind='calibrated', turns=list(values)))
    return e, rows


FIRST = known('first', 10, [4.3, 4.1, 4.2, 4.25, 4.16], [.3, .3, .3])  # 3 s, target 4.2
LOW = [4.1, 4.12, 4.08, 4.11, 4.09]


def verdict_of(*found): return judge([e for e, _ in found], [r for _, rows in found for r in rows])


def test_the_verdict_on_known_numbers():
    fast, faster = [.3, .33, .36], [.2, .21, .22]
    v = verdict_of(FIRST, known('fast', 5, LOW, fast), known('faster', 4, LOW, faster, (.1, .2, .1)),
                   known('high', 2, [4.19, 4.21, 4.2, 4.18, 4.2], faster), known('slow', 9, LOW, fast),
                   known('four seeds', 3, LOW[:4], faster), known('nan', 1, [*LOW[:4], None], faster))
    assert list(v.record) == [True, True, True, False, False, False, False]
    assert v.seconds['first'] == 3 and v.seconds['fast'] == pytest.approx(1.65)
    assert v.seconds['faster'] == pytest.approx(.98) and v.low['first'] != v.low['first']
    for name, losses in (('fast', LOW), ('high', [4.19, 4.21, 4.2, 4.18, 4.2])):
        p = ttest_1samp(losses, 4.2, alternative='less').pvalue
        assert v.p_target[name] == pytest.approx(p)
        welch = ttest_ind(losses, [4.3, 4.1, 4.2, 4.25, 4.16], equal_var=False, alternative='less').pvalue
        assert v.p_first[name] == pytest.approx(welch)
    a, b = 4*pd.Series(faster) + pd.Series([.1, .2, .1]), 5*pd.Series(fast)
    assert v.p_faster['faster'] == pytest.approx(ttest_rel(a, b, alternative='less').pvalue)
    half = b.sem()*4.302652729696142  # t(2) at 97.5 %
    assert (v.low['fast'], v.high['fast']) == pytest.approx((b.mean() - half, b.mean() + half))
    assert v.why['four seeds'] == v.why['nan'] == '4 seeds have a loss, and 5 are needed'
    assert verdict_of(known('first', 10, LOW[:4], fast)).record['first'], 'more seeds are still to come'
    assert v.why['high'].startswith('not below the target (p = ')
    assert v.why['slow'].startswith('not faster than the record (p = ')
    assert v.p_target['four seeds'] == v.p_target['nan'] == 1


def test_losses_of_other_text_are_not_compared_and_an_entry_without_rows_waits():
    with pytest.raises(CramlitError, match='other held-out text'):
        verdict_of(FIRST, known('alien', 5, LOW, [.1, .2, .3], ruler='another'))
    e, _ = known('waiting', 5, LOW, [.1, .2, .3])
    assert list(judge([FIRST[0], e], FIRST[1]).index) == ['first'] and judge([e], []).empty


@pytest.fixture(scope='module')
def small(text, tmp_path_factory):
    "A race of two entries on the session's small text, run once"
    tmp = tmp_path_factory.mktemp('race')
    settings = (f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128',
                'validation.max_sequences=64', *TRACKS['tiny'].settings[2:])
    with pytest.MonkeyPatch.context() as patch, joblib.parallel_config('sequential'):
        patch.setitem(TRACKS, 'tiny', Track('tiny', 3., 1, settings))
        patch.setattr(speedrun, 'TURNS', 2)
        first = write(tmp/'1_first.json')
        second = write(tmp/'2_second.json', recipe='modern', steps=8, settings=['model.cooccurrence=3'])
        page, out = tmp/'page', tmp/'out'
        page.mkdir()
        (page/'README.md').write_text('# Rules\n\n<!-- tiny -->\n<!-- end of tiny -->\n')
        entries, rows = run_race([str(first), str(second)], 'tiny', page, out)
        yield dict(page=page, out=out, first=first, second=second, entries=entries, rows=rows, tmp=tmp)


def losses(rows, name):
    return [r['value'] for r in rows if r['entry'] == name and r['metric'] == 'validation_loss']


def test_a_race_has_rows_of_every_seed_and_a_clock(small):
    rows = small['rows']
    assert rows == read_json_lines(small['page']/'tiny.jsonl')
    for name in ('1_first', '2_second'):
        found = losses(rows, name)
        assert len(found) == len(set(found)) == 5
        mine = [r for r in rows if r['entry'] == name]
        assert {r['seed'] for r in mine if 'seed' in r} == set(SEEDS)
        assert all('commit' in r and 'hardware' in r for r in mine)
    kept = read_json_lines(small['out']/'tiny'/'rows.jsonl')
    assert {r['trial'] for r in kept} == {'1_first', '2_second'}
    assert not list(small['out'].rglob('superseded'))
    clock = {(r['entry'], r['metric']): r for r in rows if r.get('kind') == 'calibrated'}
    assert len(clock) == 4 and clock['1_first', 'seconds_per_step']['turns'] == [3/4]*2  # by definition
    none, counts = (clock[name, 'seconds_before']['turns'] for name in ('1_first', '2_second'))
    assert none == [0., 0.] and min(counts) > 0


def test_the_stock_model_has_the_loss_that_was_trained(small, monkeypatch):
    for r in small['rows']:
        if r['metric'] == 'tuning_loss' and r['seed'] == SEEDS[0]:
            assert r['stock_loss'] == pytest.approx(r['value'], abs=1e-4)
    monkeypatch.setattr(speedrun, 'stock_loss', lambda *_: 9.)
    with pytest.raises(CramlitError, match=r'that of its stock model 9\.0000'):
        speedrun.run_entry(small['entries'][0], small['out']/'tiny')


def test_a_seed_that_diverged_is_judged_and_does_not_end_the_race(small, monkeypatch):
    real = speedrun.run_trials
    def some_diverge(*args, **more):
        return [r | dict(value=None) if 'loss' in r['metric'] and r.get('seed') in lost else r
                for r in real(*args, **more)]
    monkeypatch.setattr(speedrun, 'run_trials', some_diverge)
    for lost in (SEEDS[:1], SEEDS):
        rows = speedrun.run_entry(small['entries'][1], small['out']/'tiny')
        assert losses(rows, '2_second').count(None) == len(lost)
        assert {r['stock_loss'] is None for r in rows} == {len(lost) == len(SEEDS)}
    with pytest.raises(CramlitError, match='a seed of the first entry diverged'): speedrun.target(rows)


def test_an_entry_of_another_track_is_refused_before_anything_is_copied(tmp_path):
    mine, other = write(tmp_path/'mine.json'), write(tmp_path/'other.json', track='gpu')
    with pytest.raises(UsageError, match=r'other\.json is of track gpu: give --track gpu'):
        run_race([str(mine), str(other)], 'tiny', tmp_path/'page', tmp_path/'out')
    assert not (tmp_path/'page').exists()


@pytest.mark.parametrize('name, date, least', [('9_new', '2026-11-27', '2026-11-28'),
                                               ('0_new', '2026-11-28', '2026-11-29')])
def test_an_entry_does_not_come_before_the_first_one(name, date, least, tmp_path):
    page = tmp_path/'page'
    write(page/'entries'/'tiny'/'1_first.json')
    with pytest.raises(UsageError, match=f'{name}.*1_first.*give it a date of at least {least}'):
        run_race([str(write(tmp_path/f'{name}.json', steps=5, date=date))], 'tiny', page, tmp_path/'out')
    assert [e.name for e in read_entries(page, 'tiny')] == ['1_first']


def test_files_may_be_given_in_any_order(tmp_path, monkeypatch):
    def none(*_): raise KeyboardInterrupt
    monkeypatch.setattr(speedrun, 'run_entry', none)
    files = [write(tmp_path/'2_second.json', steps=5), write(tmp_path/'1_first.json')]
    with pytest.raises(KeyboardInterrupt): run_race(map(str, files), 'tiny', tmp_path/'page', tmp_path/'out')
    assert [e.name for e in read_entries(tmp_path/'page', 'tiny')] == ['1_first', '2_second']


def test_rows_that_another_process_writes_meanwhile_are_kept(tmp_path, monkeypatch):
    page, files = tmp_path/'page', [write(tmp_path/'1_first.json'), write(tmp_path/'2_second.json', steps=5)]
    def rows_of(entry):
        return [dict(metric='validation_loss', value=4., unit='nats', seed=s, id=entry.id, entry=entry.name)
                for s in SEEDS]
    def run(entry, out):  # the other process has run the second entry when this one is done with the first
        if entry.name == '1_first': write_rows(page/'tiny.jsonl', rows_of(read_entry(files[1])))
        return rows_of(entry)
    def clock(entries, out, turns):
        if len(entries) == 2: write_rows(page/'tiny.jsonl', [*read_json_lines(page/'tiny.jsonl'), extra])
        return [dict(metric='seconds_per_step', value=0., unit='s', id=e.id, entry=e.name, turns=[],
                     kind='calibrated') for e in entries]
    extra = dict(metric='validation_loss', value=3., unit='nats', seed=1, id='other', entry='other')
    monkeypatch.setattr(speedrun, 'run_entry', run)
    monkeypatch.setattr(speedrun, 'time_entries', clock)
    _, rows = run_race(map(str, files), 'tiny', page, tmp_path/'out')
    assert rows == read_json_lines(page/'tiny.jsonl') and extra in rows
    assert [r['entry'] for r in rows if r.get('kind') == 'calibrated'] == ['1_first', '2_second']
    found = [(r['entry'], r['seed']) for r in rows if r.get('seed') in SEEDS]
    assert len(found) == len(set(found)) == 10


def test_what_has_been_run_is_not_run_again(small, monkeypatch, capsys):
    def never(*_): raise AssertionError('run again')
    monkeypatch.setattr(speedrun, 'run_entry', never)
    monkeypatch.setattr(speedrun, 'time_entries', never)
    assert run_race([], 'tiny', small['page'], small['out'])[1] == small['rows']


def test_a_repetition_elsewhere_finds_the_same_digits(small, capsys):
    entries, rows = run_race([str(small['first'])], 'tiny', small['page'], small['tmp']/'again')
    assert rows == small['rows'] and '1_first: the losses are those of the page' in capsys.readouterr().err
    new = speedrun.run_entry(entries[0], small['tmp']/'again'/'tiny')  # they had been run, and not found
    assert [r['value'] for r in new if r['metric'] == 'validation_loss'] == losses(rows, '1_first')
    other = [r | dict(value=r['value'] + 1e-9) if r['seed'] == 102 else r for r in new]
    speedrun._compare_digits(entries[0], other, new)
    assert 'differ with the seeds [102]; the page keeps its own' in capsys.readouterr().err


def test_an_interrupted_race_keeps_what_it_has(small, monkeypatch, tmp_path):
    page, run = tmp_path/'page', speedrun.run_entry
    for name in ('first', 'second'):
        to = page/'entries'/'tiny'/small[name].name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(small[name].read_text())
    def until_the_second(entry, out):
        if entry.name == '2_second': raise KeyboardInterrupt
        return run(entry, out)
    monkeypatch.setattr(speedrun, 'run_entry', until_the_second)
    with pytest.raises(KeyboardInterrupt): run_race([], 'tiny', page, small['out'])
    assert {r['entry'] for r in read_json_lines(page/'tiny.jsonl')} == {'1_first'}
    monkeypatch.setattr(speedrun, 'run_entry', run)
    _, rows = run_race([], 'tiny', page, small['out'])
    assert losses(rows, '2_second') == losses(small['rows'], '2_second')


def test_calibrating_anew_replaces_the_clock_and_nothing_else(small):
    _, rows = run_race([], 'tiny', small['page'], small['out'], calibrate=True)
    def rest(rows): return [r for r in rows if r.get('kind') != 'calibrated']
    assert rest(rows) == rest(small['rows']) and len(rows) == len(small['rows'])


def test_a_new_entry_is_timed_in_the_same_turns_as_all_others(small, monkeypatch, tmp_path):
    page = tmp_path/'page'
    shutil.copytree(small['page'], page)
    third = write(tmp_path/'3_third.json', steps=3)
    def as_the_first(entry, out):
        mine = [r for r in small['rows'] if r['entry'] == '1_first' and 'seed' in r]
        return [r | dict(entry=entry.name, id=entry.id) for r in mine]
    def names(entries, out, turns):
        about = dict(metric='seconds_per_step', value=0., turns=[], kind='calibrated')
        return [about | dict(entry=e.name, id=e.id) for e in entries]
    monkeypatch.setattr(speedrun, 'run_entry', as_the_first)
    monkeypatch.setattr(speedrun, 'time_entries', names)
    _, rows = run_race([str(third)], 'tiny', page, small['out'])
    assert [r['entry'] for r in rows if r.get('kind') == 'calibrated'] == ['1_first', '2_second', '3_third']


def test_the_command_takes_a_file_and_draws_the_page(small, capsys):
    given = '--track', 'tiny', '--page', str(small['page']), '--out', str(small['out'])
    assert main(['race', str(small['second']), *given, '--json']) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(r['trial'], r['metric']) for r in rows] == [('1_first', 'seconds_to_target'),
                                                         ('2_second', 'seconds_to_target')]
    assert rows[0]['value'] == pytest.approx(3) and rows[0]['record'] and 'README.md' in err
    page = (small['page']/'README.md').read_text()
    assert page.startswith('# Rules') and page.count('<!-- tiny -->') == 1
    assert '[1_first](entries/tiny/' in page
    other = write(small['tmp']/'other'/'2_second.json', steps=9)
    assert main(['race', str(other), *given]) == 2
    assert 'is another entry: rename' in capsys.readouterr().err
    twin = write(small['tmp']/'twin.json')
    assert main(['race', str(twin), *given]) == 2
    assert 'runs the same as 1_first' in capsys.readouterr().err
    assert main(['race', *given[2:], '--track', 'gpu']) == 2
    assert 'no entry in' in capsys.readouterr().err


def test_the_page_of_the_race_is_made_of_its_rows(tmp_path):
    "Tables and figures as they are committed, and every entry is one that could be run today"
    for track in TRACKS:
        entries = read_entries(PAGE, track)
        if not entries: continue
        rows = PAGE/f'{track}.jsonl'
        (tmp_path/'README.md').write_text((PAGE/'README.md').read_text())
        files = write_race(entries, read_json_lines(rows) if rows.exists() else [], tmp_path)
        texts = [path for path in files if path.suffix in ('.md', '.csv')]
        for path in [*texts, tmp_path/'README.md']:
            assert path.read_text() == (PAGE/path.name).read_text(), path.name
