"Is the package what the notebooks export, are they clean, and are README.md and llms.txt made of them?"
import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def state(pattern: str) -> dict[str, str]:
    files = [p for p in sorted(ROOT.glob(pattern)) if '.ipynb_checkpoints' not in p.parts]
    return {str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def check(pattern: str, command: list[str], remedy: str) -> bool:
    "Does `command` leave the files as they are? Says which it changed"
    before = state(pattern)
    subprocess.run([str(Path(sys.executable).parent/command[0]), *command[1:]], cwd=ROOT, check=True)
    after = state(pattern)
    changed = sorted(p for p in before | after if before.get(p) != after.get(p))
    if changed: print(f'not fresh: {", ".join(changed)}: {remedy}', file=sys.stderr)
    return not changed


if __name__ == '__main__':
    readme = 'python -m nbconvert --to markdown --log-level ERROR --output ../README.md nbs/index.ipynb'
    fresh = [check('cramlit/**/*.py', ['nbdev-export'], 'run make export and commit'),
             check('nbs/**/*.ipynb', ['nbdev-clean'], 'run make clean-notebooks and commit'),
             check('nbs/**/*.ipynb', ['python', 'docs/book_map.py'], 'run make map and commit'),
             check('README.md', readme.split(), 'run make readme and commit'),
             check('llms.txt', ['python', 'docs/book.py'], 'run make llms and commit')]
    sys.exit(not all(fresh))
