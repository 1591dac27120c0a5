"Shared by the tests: small local text, prepared once"
import random
import resource
import signal
from pathlib import Path

import pytest

from cramlit.core.scales import get_recipe
from cramlit.data.packing import prepare

# a shell's background jobs ignore Ctrl-C, and those of `nohup` SIGHUP, and so would the processes of tests
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# seconds until what has not happened counts as hanging: a machine may be twenty times overbooked
PATIENCE = 900


def pytest_collection_modifyitems(items):
    # the longest file is begun first, so that no worker is left alone with it
    items.sort(key=lambda item: item.path.name != 'test_pipeline.py')


WORDS = ('the a of river stone house walks sees old green slowly near under people make time light cold '
         'music road').split()


def make_text(folder: Path, documents: int = 80, seed: int = 0) -> Path:
    "A folder of text files with random sentences of a small vocabulary"
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for i in range(documents):
        sentences = []
        for _ in range(rng.randint(4, 12)):
            words = rng.choices(WORDS, k=rng.randint(4, 14))
            sentences.append(' '.join(words).capitalize() + '.')
        (folder/f'{i:03}.txt').write_text(' '.join(sentences))
    return folder


@pytest.fixture(scope='session')
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp('corpus')/'text')


@pytest.fixture(scope='session')
def recipe(text):
    settings = [f'corpus.source={text}', 'corpus.holdout=0.1', 'tokenizer.vocab_size=128',
                'validation.max_sequences=64']
    return get_recipe('24hbert', 'tiny', settings)


@pytest.fixture(scope='session')
def data(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp('prepared')/'data'
    prepare(recipe, folder)
    return folder


@pytest.fixture
def two_workers(monkeypatch):
    "Independent jobs go to two processes, as on two cores that have nothing else to do"
    monkeypatch.setenv('LOKY_MAX_CPU_COUNT', '2')


@pytest.fixture
def small_files():
    "A call lets no file grow above so many bytes, as if the disk were full; None gives room again"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    yield limit
    limit(None)
