"""What must stay as it is while modules are renamed and merged: data, losses, weights, answers, logits

python tests/golden.py          compares with tests/data/golden.json, prints differences; exit code 1 on any
python tests/golden.py --write  writes that file anew

Run it with this checkout as the current folder and in PYTHONPATH. Everything is calculated on the CPU, in
float32, with one thread, and the runs are counted in steps. On the kind of machine that wrote the file every
bit must agree. On another one the shards must, numbers must be close, and hashes of weights are passed over.
"""
import argparse
import functools
import hashlib
import json
import math
import re
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

# every import from cramlit: here, and nowhere else
import cramlit
from cramlit.core.devices import Precision, choose_precision, pick_device
from cramlit.core.scales import get_recipe, get_scale
from cramlit.data.packing import open_data, prepare
from cramlit.evaluation.finetuning import Job, run_job
from cramlit.evaluation.surrogate_tasks import sentence_rating
from cramlit.training.checkpoints import export_run, load_run
from cramlit.training.training import pretrain, train

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT/'tests'/'data'/'golden.json'
# what a key of the file stands for: a recipe and what is changed in it
RECIPES = {'24hbert': ('24hbert', ()), 'modern': ('modern', ()),
           # as 24hbert was before it was as the paper's code
           'plain': ('24hbert', ('packing.mode=document', 'model.init=normal', 'model.decoder_bias=true'))}
STEPS = {'tiny': 200, 'laptop': 60}
OVERRIDES = {'tiny': (), 'laptop': ('corpus.max_documents=1500',)}
SAME_MACHINE_ONLY = ('weights', 'weights_without_names', 'float32_bytes')  # hashes of what was calculated
RELATIVE = 1e-5  # how far numbers may be apart on another machine


# the surroundings

def machine():
    "What decides the last bits of a sum: the processor, how torch uses it, and torch's version"
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        text = ''
    found = [re.search(rf'^{k}\s*: (.*)$', text, re.M) for k in ('model name', 'cpu family', 'model')]
    name, family, model = (m[1] if m else 'unknown' for m in found)
    capability = torch.backends.cpu.get_cpu_capability()
    return dict(cpu=f'{name}, family {family}, model {model}, {capability}', torch=torch.__version__)


@contextmanager
def replaced(old, new):
    "Put `new` in the place of the function `old` in every module of cramlit that has it, for a while"
    def put(new, old):
        modules = [m for name, m in sys.modules.items() if name.split('.')[0] == 'cramlit']
        places = [(m, k) for m in modules for k, v in list(vars(m).items()) if v is old]
        for m, k in places:
            setattr(m, k, new)
        return len(places)
    assert put(new, old), f'no module of cramlit has {old}'
    try:
        yield
    finally:
        put(old, new)


@contextmanager
def exact():
    "One thread, the CPU, float32 everywhere, Newton and Schulz's rounds in Muon included"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    full = Precision(torch.float32, 'results are compared bit by bit')
    try:
        with (replaced(choose_precision, lambda device: full),
              replaced(pick_device, lambda: torch.device('cpu')),
              torch.random.fork_rng(devices=[])):
            yield
    finally:
        torch.set_num_threads(threads)


class Enough(Exception):
    "A run has taken as many steps as were asked for"


def logged_train(stop):
    "`train` with a line in the log for each step; with `stop` above 0 it ends after that step by `Enough`"
    def listen(line):
        if stop and 'loss' in line and line['step'] >= stop:
            raise Enough

    @functools.wraps(train)
    def wrapper(run, *args, **options):
        run.listeners.append(listen)
        try:
            return train(run, *args, **options | dict(log_every=1))
        except Enough:
            run.saver.wait()
            raise
    return wrapper


# what is measured

def recipe_of(name, scale):
    recipe, settings = RECIPES[name]
    return get_recipe(recipe, scale, (*OVERRIDES[scale], *settings))


def sha256_of(*parts):
    h = hashlib.sha256()
    for p in parts:
        h.update(p)
    return h.hexdigest()


def data_of(name, scale, folder):
    "Prepare a recipe's data in a folder"
    prepare(recipe_of(name, scale), folder)
    data = open_data(folder)
    shards = {p.name: sha256_of(p.read_bytes()) for p in sorted(folder.glob('*.npy'))}
    splits = dict(train=data.train, validation=data.validation)
    return dict(
        shards=shards,
        tokenizer=sha256_of((folder/'tokenizer'/'tokenizer.json').read_bytes()),
        rows={k: len(v) for k, v in splits.items()},
        first_rows={k: v[np.arange(3)].tolist() for k, v in splits.items()},
        unigram_entropy=data.manifest['unigram_entropy'])


def weights_of(run):
    "Two hashes of a run's last weights: with their names, and without, for names may change"
    model, _ = load_run(run)
    form = {n: f'{w.dtype} {tuple(w.shape)}'.encode() for n, w in model.state_dict().items()}
    byte = {n: w.contiguous().view(torch.uint8).numpy().tobytes() for n, w in model.state_dict().items()}
    each = {n: sha256_of(form[n], byte[n]) for n in form}
    return dict(
        weights=sha256_of(*(f'{n} {each[n]}\n'.encode() for n in sorted(each))),
        weights_without_names=sha256_of(*(f'{h}\n'.encode() for h in sorted(each.values()))))


def losses_of(run):
    "Each loss in a run's log, in order"
    lines = [json.loads(line) for line in (run/'metrics.jsonl').read_text().splitlines()]
    return dict(
        validation_losses=[[x['step'], x['validation_loss']] for x in lines if 'validation_loss' in x],
        losses=[x['loss'] for x in lines if 'loss' in x and 'skipped' not in x])


def training_of(name, scale, data, run, stop=0):
    "Train a recipe on prepared data; with `stop` above 0 only that run's first steps, without weights"
    with exact(), replaced(train, logged_train(stop)):
        try:
            rows = pretrain(recipe_of(name, scale), data, run, steps=STEPS[scale], scale=scale)
        except Enough:
            return losses_of(run)
    assert {r['precision'] for r in rows} == {'float32'}
    return losses_of(run) | weights_of(run)


def finetuning_of(model):
    "Fine-tune an exported model on one task of the stand-in suite, as scale tiny does"
    t, task = get_scale('tiny').finetune, sentence_rating()
    job = Job(task.name, 'pretrained', t.epochs[0], t.batch_sizes[0], t.lrs[0], 42, t.weight_decay, t.warmup,
              t.max_length, 128, 128)
    with exact():
        out = run_job(job, model, task)
    return dict(
        task=sha256_of(json.dumps(asdict(task), sort_keys=True).encode()),
        job=asdict(job),
        scores=out['scores'],
        predictions=out['predictions'])


def logits_of(model):
    "What stock transformers says to a fixed batch of numbers"
    from transformers import AutoModelForMaskedLM
    with exact(), torch.no_grad():
        net = AutoModelForMaskedLM.from_pretrained(str(model), use_safetensors=True).eval()
        ids = np.random.default_rng(0).integers(0, net.config.vocab_size, (4, 32))
        logits = net(input_ids=torch.from_numpy(ids)).logits
    assert logits.dtype == torch.float32
    corner = [[float(f'{x:.8g}') for x in row] for row in logits[0, :4, :8].tolist()]
    return dict(
        architecture=type(net).__name__,
        float32_bytes=sha256_of(logits.contiguous().numpy().tobytes()),
        corner=corner)


@contextmanager
def timed(what):
    start = time.monotonic()
    yield
    print(f'{what}: {time.monotonic() - start:.1f} s', file=sys.stderr)


def everything(folder):
    "All that is compared, made in an empty folder"
    out = dict(machine=machine(), data={}, training={}, finetuning={}, logits={})
    for scale in STEPS:
        for name in RECIPES:
            key, data, run = f'{name} {scale}', folder/f'data-{name}-{scale}', folder/f'run-{name}-{scale}'
            with timed(f'data, {key}'):
                out['data'][key] = data_of(name, scale, data)
            with timed(f'training, {key}'):
                out['training'][key] = training_of(name, scale, data, run)
            if scale != 'tiny':
                continue
            model = export_run(run, data/'tokenizer', folder/f'model-{name}')
            with timed(f'logits, {key}'):
                out['logits'][key] = logits_of(model)
            if name != 'plain':
                continue
            with timed(f'fine-tuning, {key}'):
                out['finetuning'][key] = finetuning_of(model)
    return out


# how it is compared

def differences(want, got, same_machine, path=''):
    "A line for each thing that is not as stored; `want` and `got` are parts of what `everything` returns"
    inner = functools.partial(differences, same_machine=same_machine)
    if isinstance(want, dict) and isinstance(got, dict):
        lines = [f'{path}/{k}: missing' for k in want if k not in got]
        lines += [f'{path}/{k}: new' for k in got if k not in want]
        both = [k for k in want if k in got and (same_machine or k not in SAME_MACHINE_ONLY)]
        return lines + [x for k in both for x in inner(want[k], got[k], path=f'{path}/{k}')]
    if isinstance(want, list) and isinstance(got, list):
        lines = [f'{path}: {len(got)} values, stored {len(want)}'] if len(want) != len(got) else []
        pairs = enumerate(zip(want, got, strict=False))
        return lines + [x for i, (w, g) in pairs for x in inner(w, g, path=f'{path}/{i}')]
    numbers = isinstance(want, float) and isinstance(got, float)
    if want == got:
        return []
    if numbers and not same_machine and math.isclose(want, got, rel_tol=RELATIVE, abs_tol=RELATIVE):
        return []
    return [f'{path}: {got!r}, stored {want!r}']


def stored():
    return json.loads(FILE.read_text())


def compare(want, got):
    "A line for each difference between two results of `everything`"
    same = want['machine'] == got['machine']
    parts = [k for k in want if k != 'machine']
    return [x for k in parts for x in differences(want[k], got.get(k, {}), same, k)]


def as_text(result):
    "JSON with as many numbers of a list on a line as there is room for"
    def fill(m):
        edges = dict(initial_indent=m[1], subsequent_indent=m[1] + ' ')
        return textwrap.fill(m[2], 110, break_on_hyphens=False, **edges)
    text = json.dumps(result, indent=1)
    text = re.sub(r'\[[^\[\]{}]*\]', lambda m: re.sub(r'\s+', ' ', m[0]), text)
    return re.sub(r'^( *)(\[.{100,}|".{100,})$', fill, text, flags=re.M) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--write', action='store_true', help='write the file anew')
    write = parser.parse_args().write
    if not Path(cramlit.__file__).resolve().is_relative_to(ROOT):
        print(f'cramlit comes from {cramlit.__file__}: put this checkout into PYTHONPATH', file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        got = everything(Path(folder))
    if write:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(as_text(got))
        return 0
    want = stored()
    if want['machine'] != got['machine']:
        print(f'stored on {want["machine"]}, this is {got["machine"]}: compared within {RELATIVE:g}')
    lines = compare(want, got)
    print('\n'.join(lines) if lines else 'no difference')
    return 1 if lines else 0


if __name__ == '__main__':
    sys.exit(main())
