"Models leave with a card, load without this package, and arrive at an imitation of the hub"
import base64
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from huggingface_hub import ModelCard

from cramlit.core.recipes import CramlitError
from cramlit.core.results import read_rows, result_row, write_rows
from cramlit.core.scales import get_recipe, get_scale
from cramlit.model.stock_models import weights_digest
from cramlit.reporting.model_card import export_with_card, find_scores, model_card, push
from cramlit.running.command import main
from cramlit.training.checkpoints import export_run, load_run
from cramlit.training.training import pretrain

TOKEN = 'hf_ThisIsNoTokenOfAnybody'


@pytest.fixture(scope='module')
def run(recipe, data, tmp_path_factory):
    out = tmp_path_factory.mktemp('private folder')/'run'
    pretrain(recipe, data, out, steps=3, scale='tiny')
    export_run(out, data/'tokenizer', out/'model')
    ids = dict(stage='glue', suite='glue', scale='paper', aggregate='median', variant='pretrained', seeds=5,
               labels_from='human', spread_low=1., spread_high=3., split='validation')
    rows = [result_row('matthews', 2., '%', **ids, weights=weights_digest(out/'model'), task='cola'),
            result_row('accuracy', 99., '%', **ids, weights='of another', task='sst2')]
    write_rows(out.parent/'glue'/'rows.jsonl', rows)
    return out


@pytest.fixture(scope='module')
def exported(run, tmp_path_factory):
    return export_with_card(run, tmp_path_factory.mktemp('exported')/'bert')


ALONE = '''
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'cramlit': raise ImportError('cramlit was asked for')
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder = sys.argv[1]
tok, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
batch = tok(['the river walks', 'a stone house sees the old green road'], return_tensors='pt', padding=True)
with torch.no_grad(): logits = model(**batch).logits
classes = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)(**batch).logits
filled = pipeline('fill-mask', model=folder)(f'the {tok.mask_token} house')
assert 'cramlit' not in sys.modules
print(json.dumps(dict(ids=batch['input_ids'].tolist(), mask=batch['attention_mask'].tolist(),
                      logits=logits.tolist(), classes=list(classes.shape), filled=len(filled))))
'''


def test_stock_transformers_loads_it_where_cramlit_cannot_be_imported(run, exported):
    done = subprocess.run([sys.executable, '-I', '-c', ALONE, str(exported)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    ids, mask = torch.tensor(got['ids']), torch.tensor(got['mask']).bool()
    with torch.no_grad(): ours = load_run(run)[0].logits(ids, mask)
    assert (ours - torch.tensor(got['logits']))[mask].abs().max() < 1e-4
    assert got['classes'] == [2, 3] and got['filled'] == 5


def test_the_card_says_what_the_hub_expects_and_what_was_done(run, exported, tmp_path):
    card = ModelCard.load(exported/'README.md')
    assert card.data.library_name == 'transformers' and card.data.pipeline_tag == 'fill-mask'
    assert 'roberta-prelayernorm' in card.data.tags
    result, = card.data.eval_results
    found = result.dataset_type, result.dataset_config, result.metric_type, result.metric_value
    assert found == ('nyu-mll/glue', 'cola', 'matthews_correlation', 2.)
    for s in ('2.0 (1.0–3.0)', '[MASK]', 'name it here before you publish', 'Energy: not measured', '3 steps',
              '| optim.lr | 0.002 |', 'architecture\n`roberta-prelayernorm`'):
        assert s in card.text, s
    assert 'sst2' not in card.text and 'not GLUE' not in card.text and 'stopped early' not in card.text
    assert '{{' not in card.content and '{%' not in card.content
    other = result_row('accuracy', 1., '%', stage='glue', aggregate='median', weights='of another')
    write_rows(tmp_path/'other'/'rows.jsonl', [other])
    with pytest.raises(CramlitError, match='no scores of these weights'):
        export_with_card(run, tmp_path/'new', str(tmp_path/'other'))


def test_rows_of_others_beside_a_run_are_no_hindrance_unless_they_are_given(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path/'run')
    write_rows(tmp_path/'glue'/'rows.jsonl', read_rows(run.parent/'glue'/'rows.jsonl'))
    (tmp_path/'broken').mkdir()
    for text in ('{"metric": "x"\n', '{"of": "another program"}\n', ''):
        (tmp_path/'broken'/'rows.jsonl').write_text(text)
        scores = find_scores(tmp_path/'run', weights_digest(run/'model'))
        assert [r['value'] for r in scores] == [2.]
        assert 'passed over' in capsys.readouterr().err
        with pytest.raises(CramlitError):
            find_scores(tmp_path/'run', weights_digest(run/'model'), str(tmp_path/'broken'))


def test_a_card_without_scores_and_of_a_run_that_stopped_early(run):
    info, rows = json.loads((run/'run.json').read_text()), read_rows(run/'rows.jsonl')
    stopped = [r | dict(stopped='the loss was too high') for r in rows]
    text = model_card('name', info | dict(init='12ab'), stopped, [], '[MASK]').text
    for s in ('Not evaluated yet', '**The run stopped early:** the loss was too high', 'fingerprint `12ab`'):
        assert s in text, s


def test_the_hub_is_told_no_score_of_a_part_of_the_examples(run):
    info, rows = json.loads((run/'run.json').read_text()), read_rows(run/'rows.jsonl')
    whole, = read_rows(run.parent/'glue'/'rows.jsonl')[:1]
    part = whole | dict(scale='laptop', value=77.)
    both = model_card('name', info, rows, [whole, part], '[MASK]')
    assert [r.metric_value for r in both.data.eval_results] == [2.]
    card = model_card('name', info, rows, [part], '[MASK]')
    assert card.data.eval_results is None and '77.0' in card.text


def test_a_card_names_what_depends_on_the_recipe(run):
    info, rows = json.loads((run/'run.json').read_text()), read_rows(run/'rows.jsonl')

    def card(name, *settings, **more):
        recipe = asdict(get_recipe(name, 'tiny', settings))
        text = model_card('name', info | dict(recipe=recipe) | more, rows, [], '[MASK]').text
        return ' '.join(text.split())
    muon = card('24hbert', 'optim.method=muon', 'optim.muon_lr=0.0123')
    assert 'Muon, for the matrices in the layers, rises to 0.0123, and that of AdamW' in muon
    adamw = card('24hbert', 'packing.seq_len=32', 'model.max_positions=128')
    assert 'Muon' not in adamw.partition('All settings')[0] and 'rises to 0.002 over' in adamw
    assert 'has 128 positions, and **only the first 32 were trained** here' in adamw
    assert 'position embeddings that are still random' in adamw and 'state of the first token' in adamw
    modern = card('modern', 'packing.seq_len=32')
    assert 'mean of all states' in modern and 'angles it has not seen' in modern
    equal = card('24hbert', 'packing.seq_len=128', 'model.max_positions=128')
    assert 'were trained**' not in equal and 'started from is not known' not in equal
    begun = card('24hbert', 'packing.seq_len=32', init='12')
    assert 'started from is not known to this program: **name it, with its licence' in begun
    assert 'still random' not in begun and 'positions as the model it started from has them' in begun
    hub = card('24hbert', 'corpus.source=hub:wikimedia/wikipedia:20231101.de')
    assert 'GFDL and CC BY-SA' in hub


def test_the_card_says_what_the_classifier_of_the_scores_sees(run):
    info, rows = json.loads((run/'run.json').read_text()), read_rows(run/'rows.jsonl')
    ids = dict(suite='surrogate', scale='tiny', task='a', split='validation', variant='pretrained', unit='%',
               metric='accuracy', value=1., spread_low=0., spread_high=2., seeds=2)
    for pooling, said in (('cls', 'the state of the first token'), ('mean', 'the mean of all states')):
        text = model_card('name', info, rows, [ids | dict(pooling=pooling)], '[MASK]').text
        text = ' '.join(text.split())
        assert f"The classifier, BERT's, sees {said}." in text


def test_a_card_gives_each_task_the_grid_it_had(run):
    info, rows = json.loads((run/'run.json').read_text()), read_rows(run/'rows.jsonl')
    ids = dict(suite='glue', split='validation', variant='pretrained', unit='%', metric='accuracy', value=1.,
               spread_low=0., spread_high=2., seeds=5)

    def card(*tasks, **more):
        text = model_card('name', info, rows, [ids | dict(task=t) | more for t in tasks], '[MASK]').text
        return ' '.join(text.split())
    paper, laptop = (get_scale(name).finetune for name in ('paper', 'laptop'))
    rates = ', '.join(f'{x:g}' for x in paper.lrs)
    small, both = card('cola', scale='paper'), card('cola', 'mnli', 'qqp', scale='paper')
    assert f'learning rate ({rates}), 5 seeds' in small and 'mnli' not in small
    large = paper.large
    assert (f'learning rate ({rates}) (mnli, qqp: epochs ({large.epochs[0]:g}' in both
            and f"learning rate ({', '.join(f'{x:g}' for x in large.lrs)})), 5 seeds" in both)
    assert 'the best configuration' in both and 'chosen by hand' not in both
    one = card('cola', scale='laptop')
    assert len(laptop.lrs)*len(laptop.epochs)*len(laptop.batch_sizes) == 1
    assert 'chosen by hand' in one and 'the best configuration' not in one


@pytest.mark.parametrize('lowercase, accents, said', [
    ('true', 'auto', 'lower-cased and without accents'),
    ('true', 'false', 'lower-cased and with accents'),
    ('false', 'auto', 'with capitals and with accents'),
    ('false', 'true', 'with capitals and without accents')])
def test_a_card_says_which_letters_the_tokenizer_keeps(run, lowercase, accents, said):
    info, rows = json.loads((run/'run.json').read_text()), read_rows(run/'rows.jsonl')
    settings = [f'tokenizer.lowercase={lowercase}', f'tokenizer.strip_accents={accents}']
    recipe = asdict(get_recipe('24hbert', 'tiny', settings))
    text = ' '.join(model_card('name', info | dict(recipe=recipe), rows, [], '[MASK]').text.split())
    assert f'learned from the same text, {said}.' in text


def test_an_export_where_ascii_cannot_spell_the_folder(run, tmp_path):
    to = tmp_path/'Geschenk für alle [1]'
    plain = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    command = [sys.executable, '-m', 'cramlit', 'export', '--run', str(run), '--to', str(to)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | plain)
    line, = done.stderr.strip().splitlines()
    assert done.returncode == 2 and 'set PYTHONUTF8=1' in line and os.listdir(tmp_path) == []
    plain |= dict(PYTHONUTF8='1')
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | plain)
    assert done.returncode == 0, done.stderr
    assert '# Geschenk für alle [1]' in (to/'README.md').read_text(encoding='utf-8')


def test_no_folder_of_this_machine_leaves(run, exported, recipe):
    assert str(recipe.corpus.source) in (run/'run.json').read_text()
    assert 'local' not in (exported/'tokenizer_config.json').read_text()
    for p in exported.iterdir():
        if p.suffix not in ('.json', '.md'): continue
        for folder in ('/tmp', 'private folder', os.sep + 'text'): assert folder not in p.read_text(), p.name
    assert json.loads((exported/'cramlit.json').read_text())['recipe']['corpus']['source'] == 'text'


def test_what_cannot_leave_is_one_line_and_nothing_is_lost(run, exported, tmp_path, recipe, data, capsys):
    def export(*args): return main(['export', *map(str, args)]), capsys.readouterr().err
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'poem').write_text('a poem')
    assert export('--run', run, '--to', tmp_path/'mine')[0] == 2
    assert (tmp_path/'mine'/'poem').read_text() == 'a poem'
    assert export('--run', run, '--to', tmp_path/'mine'/'poem')[0] == 2
    code, err = export('--run', tmp_path/'nowhere', '--to', tmp_path/'new')
    assert code == 1 and 'is not a run' in err
    pretrain(recipe, data, tmp_path/'bare', steps=1)
    code, err = export('--run', tmp_path/'bare', '--to', tmp_path/'new')
    assert code == 1 and 'bare/model, with the tokenizer, is missing' in err
    (tmp_path/'bare'/'rows.jsonl').unlink()
    code, err = export('--run', tmp_path/'bare', '--to', tmp_path/'new')
    assert code == 1 and 'is not finished' in err and not (tmp_path/'new').exists()
    before = (exported/'README.md').read_text()
    (exported/'README.md').write_text(before + 'The text is mine.\n')
    code, err = export('--run', run, '--to', exported)
    assert code == 0 and 'left as it is' in err
    assert 'The text is mine.' in (exported/'README.md').read_text() and not list(exported.parent.glob('.*'))
    (exported/'README.md').unlink()
    assert export('--run', run, '--to', exported)[0] == 0 and (exported/'README.md').read_text() == before
    code, err = export('--run', run, '--to', run/'model')
    assert code == 2 and "run's own model" in err and not (run/'model'/'README.md').exists()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def test_an_export_that_differs_is_moved_aside_with_all_that_was_put_beside_it(run, tmp_path, capsys):
    to = tmp_path/'gift'
    export_with_card(run, to)
    assert {p.stat().st_mode for p in to.iterdir()} == {(to/'config.json').stat().st_mode}
    for n in (1, 2):
        (to/'model.safetensors').write_bytes(b'other weights')
        (to/'notes').mkdir()
        (to/'notes'/'mine').write_text('mine')
        before = {p: b for p, b in contents(to).items() if p.parts[0] != 'superseded'}
        capsys.readouterr()
        export_with_card(run, to)
        assert f'it is now in {to}/superseded/{n}' in capsys.readouterr().err
        assert contents(to/'superseded'/str(n)) == before
        assert not (to/'notes').exists() and weights_digest(to) == weights_digest(run/'model')


def test_the_folder_that_is_given_is_filled_and_nothing_beside_it_is_touched(run, tmp_path, monkeypatch):
    kinds = ['plain', 'new disk', 'disk']
    for name in kinds: (tmp_path/name/'here').mkdir(parents=True)
    (tmp_path/'new disk'/'here'/'lost+found').mkdir()
    (tmp_path/'new disk'/'here'/'.git').mkdir()
    (tmp_path/'link').symlink_to(tmp_path/'disk'/'here')
    before = {name: (tmp_path/name).stat().st_mtime_ns for name in kinds}
    inodes = {name: (tmp_path/name/'here').stat().st_ino for name in kinds}
    monkeypatch.chdir(tmp_path/'plain'/'here')
    for to in ('.', tmp_path/'new disk'/'here', tmp_path/'link'): export_with_card(run, to)
    assert (tmp_path/'link').is_symlink()
    for name in kinds:
        here = tmp_path/name/'here'
        assert (tmp_path/name).stat().st_mtime_ns == before[name] and here.stat().st_ino == inodes[name]
        assert weights_digest(here) == weights_digest(run/'model')
        assert '# here' in (here/'README.md').read_text()
    assert os.listdir(tmp_path/'new disk'/'here'/'.git') == []


LIMITED = '''
import resource, sys
from cramlit.running.command import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),)*2)
sys.exit(main(sys.argv[2:]))
'''


@pytest.mark.parametrize('size, old', [(100, 'none'), (5_000, 'empty'), (100_000, 'other')])
def test_a_full_disk_is_one_line_and_the_old_export_stays(run, tmp_path, size, old):
    to = tmp_path/'gift'
    if old == 'other':
        export_with_card(run, to)
        (to/'model.safetensors').write_bytes(b'other weights')
    elif old == 'empty': to.mkdir()
    before = contents(tmp_path)
    command = [sys.executable, '-c', LIMITED, str(size), 'export', '--run', str(run), '--to', str(to)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    line, = done.stderr.strip().splitlines()
    assert f'cannot write {to}: File too large' in line and 'Free some space' in line
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ([] if old == 'none' else ['gift'])
    if old != 'none': assert not [p for p in os.listdir(to) if p.startswith('.')]


def test_a_move_that_fails_half_way_is_taken_back(run, tmp_path, monkeypatch):
    to = tmp_path/'gift'
    export_with_card(run, to)
    (to/'model.safetensors').write_bytes(b'other weights')
    before, rename, calls = contents(to), os.rename, []

    def fails_once(a, b):
        calls.append(a)
        if len(calls) == 9: raise PermissionError(13, 'Permission denied')
        rename(a, b)
    monkeypatch.setattr(os, 'rename', fails_once)
    with pytest.raises(CramlitError, match='Permission denied'): export_with_card(run, to)
    assert contents(to) == before


def test_without_the_network_by_ones_own_wish(exported, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(CramlitError, match='HF_HUB_OFFLINE is set'): push(exported, 'me/bert')


class Hub(BaseHTTPRequestHandler):
    "An imitation of the hub, as far as an upload needs one"
    def log_message(self, *args): pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        for k, v in (('Content-Type', 'application/json'), ('Content-Length', str(len(data)))):
            self.send_header(k, v)
        self.end_headers()
        self.wfile.write(data)

    def handle_one(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        hub = self.server
        hub.seen.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        if hub.refuse:
            return self.answer(hub.refuse, dict(error=f"you sent {self.headers.get('Authorization')}"))
        if self.path == '/api/repos/create':
            return self.answer(409 if hub.exists else 200, dict(url=f'{hub.url}/me/bert', id='me/bert'))
        if self.path.startswith('/api/models/me/bert/preupload'):
            how = dict(uploadMode='regular', shouldIgnore=False, oid=None)
            files = [dict(path=f['path'], **how) for f in json.loads(body)['files']]
            return self.answer(200, dict(files=files))
        if self.path.startswith('/api/models/me/bert/commit'):
            commit = dict(commitUrl=f'{hub.url}/me/bert/commit/1', commitOid='1', success=True, hookOutput='')
            return self.answer(200, commit)
        if self.path == '/api/models/me/bert':
            return self.answer(200, dict(id='me/bert', private=hub.private, sha='0'))
        if self.path == '/api/validate-yaml': return self.answer(200, dict(errors=[], warnings=[]))
        self.answer(404, dict(error=f'{self.path} is not known here'))

    do_GET = do_POST = handle_one


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.url, server.seen = f'http://127.0.0.1:{server.server_port}', []
    server.refuse, server.exists, server.private = 0, False, False
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def arrived(hub):
    "Files of all commits"
    bodies = [body for _, path, _, body in hub.seen if '/commit/' in path]
    lines = [json.loads(line) for body in bodies for line in body.splitlines()]
    files = [x['value'] for x in lines if x['key'] == 'file']
    return {f['path']: base64.b64decode(f['content']) for f in files}


def hidden(hub, *texts):
    "The token is in headers, and nowhere else"
    for _, path, headers, body in hub.seen:
        assert headers.pop('authorization') == f'Bearer {TOKEN}' and TOKEN not in str(headers)
        assert TOKEN not in path and TOKEN.encode() not in body
    return not any(TOKEN in t for t in texts)


def test_all_files_arrive_and_the_token_is_in_the_header_only(exported, hub, caplog, capfd):
    assert push(exported, 'me/bert', endpoint=hub.url) == f'{hub.url}/me/bert'
    assert arrived(hub) == {p.name: p.read_bytes() for p in exported.iterdir()}
    assert hub.seen and hidden(hub, caplog.text, *capfd.readouterr())
    assert json.loads(hub.seen[0][3]).get('visibility') != 'private'


def test_private_means_private(exported, hub):
    hub.exists = True
    with pytest.raises(CramlitError, match='there already and public'):
        push(exported, 'me/bert', private=True, endpoint=hub.url)
    assert not arrived(hub)
    hub.exists, hub.private = False, True
    push(exported, 'me/bert', private=True, endpoint=hub.url)
    asked = [json.loads(body) for _, path, _, body in hub.seen if path == '/api/repos/create']
    assert all(a['visibility'] == 'private' for a in asked) and 'README.md' in arrived(hub)


@pytest.mark.parametrize('status, says', [
    (401, 'does not accept the token'), (403, 'may not write there'), (418, 'status 418')])
def test_a_refusal_is_one_line_without_the_token(exported, hub, status, says, caplog, capfd):
    hub.refuse = status
    with pytest.raises(CramlitError, match=says) as e: push(exported, 'me/bert', endpoint=hub.url)
    assert e.value.__suppress_context__ and hidden(hub, str(e.value), caplog.text, *capfd.readouterr())


def test_no_network_and_no_token(exported, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    with pytest.raises(CramlitError, match='cannot be reached') as e:
        push(exported, 'me/bert', endpoint='http://127.0.0.1:9')
    assert TOKEN not in str(e.value)
    monkeypatch.setattr('cramlit.reporting.model_card.get_token', lambda: None)
    with pytest.raises(CramlitError, match='there is no token'): push(exported, 'me/bert')


def test_the_command_sends(run, tmp_path, hub, monkeypatch, capfd):
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', hub.url)  # read from HF_ENDPOINT at import
    to = tmp_path/'bert'
    code = main(['export', '--run', str(run), '--to', str(to), '--push', 'me/bert', '--json'])
    out, err = capfd.readouterr()
    assert code == 0 and json.loads(out)['sent_to'] == 'me/bert' and f'{hub.url}/me/bert' in err
    assert hidden(hub, out, err)
    assert set(arrived(hub)) == {p.name for p in to.iterdir()}
    card = (to/'README.md').read_text()
    assert "model='me/bert'" in card
    compile(card.split('```python')[1].split('```')[0], 'card', 'exec')
