"""The map of the book at the head of every chapter: python docs/book_map.py [--check]

Each chapter under nbs/PART/ gets a second cell that shows the nine parts, the chapters of its own part and
where the reader is. The cell is written by this program and by nobody else; a chapter that ends in exercises
is a concept chapter, every other one a reference.
"""
import json
import re
import sys
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent/'nbs'
PARTS = 'core data model training evaluation efficiency experiments reporting running guides'.split()
CELL = 'bookmap0'


def chapters(part: str) -> list[Path]:
    "The chapters of a part, in order"
    return sorted((NBS/part).glob('[0-9][0-9]_*.ipynb'))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def title(path: Path) -> tuple[str, str]:
    "A chapter's heading, and the line below it"
    text = next(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'markdown')
    heading, line = re.match(r'# (.+)\n+> (.+)', text).groups()
    return heading, line


def is_concept(path: Path) -> bool:
    text = '\n'.join(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'markdown')
    return bool(re.search(r'^## Exercises', text, re.M))


def book_map(path: Path) -> str:
    "The map as a chapter shows it, in Markdown"
    here = path.parent.name
    others = {p: f'[{p}](../{p}/{chapters(p)[0].name})' for p in PARTS if chapters(p)}
    parts = [f'**{p}**' if p == here else link for p, link in others.items()]
    mine = []
    for chapter in chapters(here):
        name = f'{chapter.name[:2]} {title(chapter)[0]}'
        mine.append(f'**{name}**' if chapter == path else f'[{name}]({chapter.name})')
    kind = 'Reference chapter: interface and examples'
    if is_concept(path): kind = 'Concept chapter: ideas, pictures, exercises'
    return f'You are here: {" → ".join(parts)}\n\n{" · ".join(mine)}\n\n*{kind}.*'


def update(path: Path) -> bool:
    "Write the map into a chapter; was it another one before?"
    nb = json.loads(path.read_text(encoding='utf-8'))
    source = book_map(path).splitlines(keepends=True)
    old = [c for c in nb['cells'] if c.get('id') == CELL]
    if old and old[0]['source'] == source: return False
    nb['cells'] = [c for c in nb['cells'] if c.get('id') != CELL]
    first = next(i for i, c in enumerate(nb['cells']) if c['cell_type'] == 'markdown')
    nb['cells'].insert(first + 1, dict(cell_type='markdown', id=CELL, metadata={}, source=source))
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return True


if __name__ == '__main__':
    changed = [path for part in PARTS for path in chapters(part) if update(path)]
    for path in changed: print(f'map renewed: {path.relative_to(NBS.parent)}')
    sys.exit(bool(changed) and '--check' in sys.argv)
