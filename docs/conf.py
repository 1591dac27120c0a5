"How Sphinx builds the site: the root of the repository is its source, so that links hold in both places"
import shutil
import sys
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments
from sphinx.util.rst import escape

sys.path.insert(0, str(Path(__file__).parent))
import book  # noqa: E402

project = html_title = 'cramlit'
extensions = ['myst_nb', 'sphinx.ext.autodoc']
root_doc = 'README'
include_patterns = ['*.md', 'nbs/*/*.ipynb', 'paper_figures/*/*.md', f'{book.RESULTS}/notebooks/*.ipynb']
exclude_patterns = ['.*', '_docs', 'build', 'dist', 'runs', '**.ipynb_checkpoints']

nb_custom_formats = {'.ipynb': ['book.read_notebook', {}]}
nb_execution_mode = 'off'  # pages show what was committed
suppress_warnings = ['toc.not_included']  # a table by itself is reached from the results
nb_merge_streams, nb_ipywidgets_js = True, {}
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3
autodoc_member_order = 'bysource'
autodoc_typehints_format, add_module_names = 'short', False
maximum_signature_line_length = 100

html_theme = 'sphinx_book_theme'
html_theme_options = dict(show_navbar_depth=1, show_toc_level=1, home_page_in_toc=True, navbar_persistent=[])
html_show_copyright = False
html_static_path, html_css_files = ['style.css'], ['style.css']
html_math_renderer = 'mathml'  # a browser shows it by itself: no script, and none from elsewhere


def toctree(caption: str, entries: list[str]) -> str:
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', *entries, '```', ''])


def add_contents(app, docname, source):
    "What stands at the side: the parts in order, on the front page; executed notebooks below the results"
    def entries(folder):
        return [f'{title} </{path.removesuffix(".ipynb")}>' for path, title, _ in book.contents(folder)]
    if docname == root_doc:
        trees = [toctree('Results', [f'{book.RESULTS}/README', 'paper_figures/race/README'])]
        trees += [toctree(part.capitalize(), entries(f'nbs/{part}')) for part in book.PARTS]
        trees += [toctree("The paper's notebooks", entries('nbs/paper'))]
        trees += [toctree('About', ['Index of names <genindex>', 'CONTRIBUTING', 'CHANGELOG', 'LABBOOK'])]
        source[0] += '\n\n' + '\n'.join(trees)
    if docname.startswith('paper_figures') and source[0][0] not in '#{':  # a table by itself
        source[0] = f'# {Path(docname).name}\n\n{source[0]}'
    if docname == f'{book.RESULTS}/README' and entries(f'{book.RESULTS}/notebooks'):
        source[0] += '\n\n' + toctree('As they ran', entries(f'{book.RESULTS}/notebooks'))


def rst(text: str) -> str:
    "A comment or docstring of ours in the markup of autodoc"
    parts = text.split('`')
    return ''.join(f'``{part}``' if i % 2 else escape(part) for i, part in enumerate(parts))


def add_docments(app, what, name, obj, options, lines):
    "The comments beside arguments, after the docstring"
    lines[:] = [rst(line) for line in lines]
    if what not in ('function', 'method', 'class'): return
    try: found = docments(obj)
    except (TypeError, OSError, ValueError): return  # not written in Python
    lines.append('')
    for argument, comment in found.items():
        if not comment or argument == 'self': continue
        field = ':returns:' if argument == 'return' else f':param {argument}:'
        lines.append(f'{field} {rst(" ".join(comment.split()))}')


def inline_math(writer, node):
    writer.body.append(book.mathml(node.astext()))
    raise nodes.SkipNode


def block_math(writer, node):
    writer.body.append(f'<div class="math">{book.mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def add_index(app, error):
    "The front page under the name that servers and readers look for"
    out = Path(app.outdir)
    if not error: shutil.copy(out/'README.html', out/'index.html')


def setup(app):
    app.connect('build-finished', add_index)
    app.connect('source-read', add_contents)
    app.connect('autodoc-process-docstring', add_docments)
    app.add_html_math_renderer('mathml', (inline_math, None), (block_math, None))
