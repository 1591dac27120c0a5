"""What `gpu_check.py` needs where there is no network: this package, data, wheels, in one archive below 60 MB

    python tests/gpu_bundle.py --out runs/gpu_bundle    # makes the folder and runs/gpu_bundle.tar.gz

There, with PyTorch, transformers and tokenizers: unpack it, and python tests/gpu_check.py --out DIR
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = {  # folder → recipe, scale, and the documents that are taken for it
    'tiny': ('24hbert', 'tiny', 100), 'tiny-modern': ('modern', 'tiny', 100),
    '24hbert': ('24hbert', 'gpu', 2000), 'modern': ('modern', 'gpu', 2000)}
WHEELS = ('fastcore', 'filelock', 'packaging', 'tqdm')  # pure Python: they are imported as they are
LIMIT = 60e6  # bytes
COMMIT = 'gpu_commit.json'


def places() -> list[str]:
    "Where Python finds this package, and what was carried with it"
    wheels = (ROOT/'wheels').glob('*.whl')
    return [str(ROOT), *(str(p) for p in wheels if find_spec(p.name.partition('-')[0]) is None)]


def prepare_data(folder: Path, names=tuple(DATA), settings=('corpus.source=enwik8',)):
    "The data sets of the check, those that are not there yet"
    from cramlit.core.scales import get_recipe
    from cramlit.data.packing import prepare
    for name in names:
        if (folder/name/'manifest.json').exists(): continue
        recipe, scale, documents = DATA[name]
        some = f'corpus.max_documents={documents}', 'corpus.holdout=0.02'
        prepare(get_recipe(recipe, scale, [*some, *settings]), folder/name)


def take_wheels(folder: Path):
    "The wheels, in the versions of the lock file"
    lock = (ROOT/'requirements.lock').read_text()
    pins = [re.search(rf'^{name}==\S+', lock, re.M)[0] for name in WHEELS]
    subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:',
                    '--dest', folder, *pins], check=True)


def copy_code(folder: Path):
    "The package and the check, as they are in this checkout"
    for path in (*ROOT.glob('cramlit/**/*.py'), *ROOT.glob('tests/gpu_*.py')):
        to = folder/path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)
    from cramlit.core.results import provenance
    (folder/COMMIT).write_text(json.dumps({k: provenance()[k] for k in ('commit', 'dirty')}))


def carried_commit() -> dict:
    "Which commit was carried; empty in a checkout, which knows by itself"
    return json.loads((ROOT/COMMIT).read_text()) if (ROOT/COMMIT).exists() else {}


def pack(folder: Path) -> Path:
    "One archive of the folder; raises when it is too large to be carried"
    archive = folder.with_name(folder.name + '.tar.gz')
    with tarfile.open(archive, 'w:gz') as tar: tar.add(folder, folder.name)
    size = archive.stat().st_size
    if size > LIMIT: raise SystemExit(f'{archive} has {size/1e6:.0f} MB: take fewer documents')
    print(f'{archive}: {size/1e6:.1f} MB')
    return archive


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='the folder to make')
    out = parser.parse_args().out
    sys.path[:0] = places()
    copy_code(out)
    prepare_data(out/'gpu_data')
    take_wheels(out/'wheels')
    pack(out)


if __name__ == '__main__': main()
