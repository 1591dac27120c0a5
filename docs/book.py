"""The book as its pages see it: parts and chapters in order, and each notebook without the marks of nbdev

python docs/book.py writes llms.txt
"""
import ast
import re
from pathlib import Path

import nbformat
from book_map import PARTS, title
from docutils.utils.math.latex2mathml import tex2mathml

from cramlit.running.pipeline import STAGES, is_noise

ROOT = Path(__file__).resolve().parent.parent
RESULTS = 'paper_figures/laptop'


def contents(
    folder: str,                  # nbs/core, nbs/paper, paper_figures/laptop/notebooks
) -> list[tuple[str, str, str]]:  # of each notebook the path from the root, number and title, one line
    found = []
    for path in sorted((ROOT/folder).glob('*.ipynb')):
        heading, line = title(path)
        number = f'{path.name[:2]} ' if path.name[:2].isdigit() else ''
        found.append((str(path.relative_to(ROOT)), number + heading, line))
    return found


def stages() -> list[tuple[str, str]]:  # of each notebook the path from the root and its title
    "The paper's notebooks in the order in which they run: as they ran where they have, else as they are"
    found = []
    for name, stage in STAGES.items():
        heading, _ = title(ROOT/'nbs'/'paper'/f'{name}.ipynb')
        each = stage.recipes == 'each'
        ran = sorted((ROOT/RESULTS/'notebooks').glob(f'{name}_*.ipynb' if each else f'{name}.ipynb'))
        for path in ran:
            recipe = f': {path.stem.removeprefix(name)[1:]}' if each else ''
            found.append((str(path.relative_to(ROOT)), heading + recipe))
        if not ran: found.append((f'nbs/paper/{name}.ipynb', heading))
    return found


def with_results(
    text: str,  # of a notebook under nbs/paper
    name: str,  # of its stage
) -> str:
    "A stage's notebook with links to where it has run, below its title"
    nb = nbformat.reads(text, as_version=4)
    ran = [f'[{title}](../../{path})' for path, title in stages()
           if path.startswith(RESULTS) and Path(path).stem.startswith(name)]
    if ran: nb.cells.insert(1, nbformat.v4.new_markdown_cell('As it ran: ' + ' · '.join(ran)))
    return nbformat.writes(nb)


def menu() -> dict[str, dict[str, dict[str, str]]]:  # group → part, or '' → page without a suffix → its title
    "What stands at the side"
    def pages(found): return {path.removesuffix('.ipynb'): title for path, title, *_ in found}
    *parts, guides = PARTS
    return {'Guide': {'': {'README': 'Front page'} | pages(contents(f'nbs/{guides}'))},
            'Chapters': {part.capitalize(): pages(contents(f'nbs/{part}')) for part in parts},
            'Results': {'': {f'{RESULTS}/README': 'All tables and figures',
                             'paper_figures/laptop_slower/README': 'On a slower machine',
                             'paper_figures/evening/README': 'What a budget buys',
                             'paper_figures/race/README': 'The race to a loss'},
                        'Stages in order': pages(stages())},
            'Reference': {'': {'genindex': 'Index of names', 'CONTRIBUTING': 'How to help',
                               'CHANGELOG': 'Changes', 'LABBOOK': 'Lab book'}}}


def llms_text() -> str:
    "The book's contents in one short text, for programs that read"
    heading, line = title(ROOT/'nbs'/'index.ipynb')
    about = 'Notebooks are the source: each chapter explains, defines and exports one module.'
    parts = [f'# {heading}', f'> {line}', about]
    sections = [(part.capitalize(), f'nbs/{part}') for part in PARTS]
    sections.append(("The paper's notebooks", 'nbs/paper'))
    for name, folder in sections:
        lines = [f'- [{title}]({path}): {line}' for path, title, line in contents(folder)]
        parts += [f'## {name}', '\n'.join(lines)]
    parts += ['## Results',
              f'- [At scale laptop]({RESULTS}/README.md): all tables and figures on one page\n'
              '- [At scale evening](paper_figures/evening/README.md): what a budget buys']
    return '\n\n'.join(parts) + '\n'


def only_imports(source: str) -> bool:
    return all(isinstance(node, ast.Import|ast.ImportFrom) for node in ast.parse(source).body)


TAGS = dict(hide='remove-cell', default_exp='remove-cell', hide_input='remove-input',
            hide_output='remove-output')  # what a mark of nbdev is for MyST-NB


LABELS = re.compile(r"""(?:title|[xy]label|label)[=(]f?(['"])(.+?)\1""")


def alt_text(
    source: str,  # of a cell that draws
) -> str:
    "What is written in a figure, for those who cannot see it: its titles, axes and curves"
    written = dict.fromkeys(re.sub(r'\{.*?\}', '…', label) for _, label in LABELS.findall(source))
    labels = [' '.join(label.replace('\\n', ' ').split()) for label in written if re.search(r'\w', label)]
    return 'Figure: ' + '; '.join(labels) if labels else 'Figure, drawn by the code above'


def anchor(link: re.Match) -> str:
    "A link to a heading, whose name Jupyter writes as it is, as MyST and GitHub write it"
    return link[1] + re.sub(r'[^\w-]', '', link[2].lower())


def read_notebook(
    text: str,                     # of a notebook
) -> nbformat.NotebookNode:
    "A notebook without the marks of nbdev, which become tags, and with what its module offers at the end"
    nb = nbformat.reads(text, as_version=4)
    nb.cells = [c for c in nb.cells if c.cell_type != 'raw']
    module = ''
    for cell in nb.cells:
        if cell.cell_type != 'code':
            cell.source = re.sub(r'(\]\((?!\w+:)[^)\s]*#)([^)\s]+)', anchor, cell.source)
            continue
        marks = dict(re.findall(r'^#\| *(\w+) *(.*)', cell.source, re.M))
        module = marks.get('default_exp', module)
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
        tags = [TAGS[mark] for mark in marks if mark in TAGS]
        if 'export' in marks: tags.append('exported')
        if 'export' in marks and only_imports(cell.source):
            tags.append('hide-input')
            cell.metadata['mystnb'] = dict(code_prompt_show='Imports', code_prompt_hide='Imports')
        cell.metadata['tags'] = tags
        if any('image/png' in o.get('data', {}) for o in cell.outputs):
            cell.metadata.setdefault('mystnb', {})['image'] = dict(alt=alt_text(cell.source))
        cell.outputs = [o for o in cell.outputs if not is_noise(o)]
    if module:
        offers = ['```{eval-rst}', f'.. automodule:: cramlit.{module}', '   :members:', '```']
        text = '\n'.join([f'## What `cramlit.{module}` offers', '', *offers])
        nb.cells.append(nbformat.v4.new_markdown_cell(text))
    return nb


def mathml(
    text: str,               # LaTeX
    as_block: bool = False,  # on a line of its own
) -> str:
    "A formula that a browser shows by itself; two commands have other names in docutils"
    text = re.sub(r'\\[bB]ig(?![a-zA-Z])', '', text.replace(r'\dots', r'\ldots'))
    return tex2mathml(text, as_block=as_block)


if __name__ == '__main__': (ROOT/'llms.txt').write_text(llms_text())
