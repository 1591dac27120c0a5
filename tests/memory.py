"""Memory that `prepare` needs for a synthetic text of some size, stage by stage

python tests/memory.py OUT [--megabytes 1000] [--kind txt | jsonl.gz | xml] [-o SETTING]

The words follow Zipf's law, and new ones come up to the end, as in real text; no document is there twice.
"""
import argparse
import gzip
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

import cramlit.data.packing as packing
from cramlit.core.scales import get_recipe

SYLLABLES = [c + v + e for c in 'bdfgklmnprstvz' for v in 'aeiou' for e in ('', 'n', 'r', 's', 'l')]


def spelled(number):
    "A word for each number, the short ones first"
    word = ''
    while True:
        number, rest = divmod(number, len(SYLLABLES))
        word = SYLLABLES[rest] + word
        if not number: return word
        number -= 1


def paragraphs(rng, words=200_000, exponent=1.3):
    "Endless documents of three paragraphs with eight sentences each"
    known = np.array([spelled(n) for n in range(words)])
    while True:
        ranks = np.minimum(rng.zipf(exponent, 24*14), 10**9)
        chosen = [known[r - 1] if r <= words else spelled(int(r)) for r in ranks]
        sentences = [' '.join(chosen[i:i + 14]).capitalize() + '.' for i in range(0, len(chosen), 14)]
        yield '\n'.join(' '.join(sentences[i:i + 8]) for i in (0, 8, 16))


def write(path, kind, megabytes, seed=0):
    "A file that holds so much text, packed or not"
    begin, as_kind, end = {
        'txt': ('', lambda n, text: text + '\n\n', ''),
        'jsonl.gz': ('', lambda n, text: json.dumps(dict(text=text)) + '\n', ''),
        'xml': ('<mediawiki>\n', lambda n, text: f'<page><title>Article {n}</title><ns>0</ns><revision><text>'
                f'{text}</text></revision></page>\n', '</mediawiki>\n')}[kind]
    opened = gzip.open(path, 'wt', 1, 'utf-8') if kind == 'jsonl.gz' else open(path, 'w', encoding='utf-8')
    left, n = megabytes*10**6, 0
    with opened as f:
        f.write(begin)
        for text in paragraphs(np.random.default_rng(seed)):
            n += 1
            left -= f.write(as_kind(n, text))
            if left <= 0: break
        f.write(end)
    return n


def megabytes_now(): return int(Path('/proc/self/statm').read_text().split()[1])*resource.getpagesize()/1e6
def megabytes_most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e6


def said(name, function):
    "The function, saying how much memory there is after it"
    def outer(*args, **kwargs):
        began = time.monotonic()
        result = function(*args, **kwargs)
        print(f'{name}: {time.monotonic() - began:.0f} s, now {megabytes_now():.0f} MB, '
              f'most so far {megabytes_most():.0f} MB', flush=True)
        return result
    return outer


def measure(source, out, settings=()):
    "Prepare a source; the most memory that this process ever had, MB, and the counts of documents"
    print(f'before: {megabytes_now():.0f} MB')
    for name in ('_write_documents', 'train_tokenizer', 'write_shards'):
        setattr(packing, name, said(name, getattr(packing, name)))
    manifest = packing.prepare(get_recipe('24hbert', 'tiny', [f'corpus.source={source}', *settings]), out)
    return megabytes_most(), manifest['documents']


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='a folder to make')
    parser.add_argument('--megabytes', type=int, default=1000)
    parser.add_argument('--kind', choices=('txt', 'jsonl.gz', 'xml'), default='txt')
    parser.add_argument('-o', action='append', default=[], help='change one setting')
    given = parser.parse_args()
    given.out.mkdir()
    source = given.out/f'text.{given.kind}'
    documents = write(source, given.kind, given.megabytes)
    print(f'{given.megabytes} MB, {documents} documents', file=sys.stdout, flush=True)
    most, counts = measure(source, given.out/'data', given.o)
    print(f'{given.megabytes} MB of {given.kind}: at most {most:.0f} MB of memory; {counts}')
