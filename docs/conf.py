"How Sphinx builds the site: the root of the repository is its source, so that links hold in both places"
import configparser
import html
import shutil
import sys
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments
from sphinx.util.rst import escape

sys.path.insert(0, str(Path(__file__).parent))
import book  # noqa: E402

project = html_title = 'cramlit'
author = 'the cramlit authors'
extensions = ['myst_nb', 'sphinx.ext.autodoc']
root_doc = 'README'
include_patterns = ['*.md', 'nbs/*/*.ipynb', 'paper_figures/*/*.md', 'paper_figures/*/notebooks/*.ipynb']
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

settings = configparser.ConfigParser(delimiters=['='])
settings.read(Path(__file__).parent.parent/'settings.ini')
repository, html_baseurl = (settings['DEFAULT'].get(key, '').strip() for key in ('git_url', 'doc_host'))

html_theme = 'sphinx_book_theme'
html_theme_options = dict(show_toc_level=1, home_page_in_toc=True, navbar_persistent=[])
if repository:  # buttons that lead to the source of a page
    html_theme_options |= dict(repository_url=repository, use_repository_button=True,
                               use_edit_page_button=True)
templates_path = ['.']
html_sidebars = {'**': ['navbar-logo.html', 'search-button-field.html', 'menu.html']}
html_context = dict(menu=book.menu(), default_mode='auto')  # light or dark as the reader's system is
html_show_copyright = False
html_static_path, html_css_files = ['style.css'], ['style.css']
html_math_renderer = 'mathml'  # a browser shows it by itself: no script, and none from elsewhere


def toctree(caption: str, pages: dict[str, str]) -> str:
    entries = [f'{title} <{"" if page == "genindex" else "/"}{page}>' for page, title in pages.items()]
    return '\n'.join(['```{toctree}', ':hidden:', f':caption: {caption}', *entries, '```', ''])


def add_contents(app, docname, source):
    "The order of the pages, on the front page; titles for tables by themselves; a way to a stage's results"
    if docname == root_doc:
        for group, parts in book.menu().items():
            for part, pages in parts.items():
                others = {page: title for page, title in pages.items() if page != root_doc}
                source[0] += '\n\n' + toctree(part or group, others)
    if docname.startswith('paper_figures') and source[0][0] not in '#{':  # a table by itself
        source[0] = f'# {Path(docname).name}\n\n{source[0]}'
    if docname.startswith('nbs/paper/'): source[0] = book.with_results(source[0], Path(docname).name)


def add_description(app, pagename, templatename, context, doctree):
    "The line below a page's title, for search engines and for those who send a link"
    quote = next(doctree.findall(nodes.block_quote), None) if doctree else None
    if not quote: return
    line = html.escape(' '.join(quote.astext().split()))
    for key in ('name="description"', 'property="og:description"'):
        context['metatags'] += f'<meta {key} content="{line}">\n'


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
    "The front page under the name that servers and readers look for; all pages for search engines"
    if error: return
    out = Path(app.outdir)
    shutil.copy(out/'README.html', out/'index.html')
    if not html_baseurl: return
    at = html_baseurl.rstrip('/')
    pages = [f'<url><loc>{at}/{page}.html</loc></url>' for page in sorted(app.env.found_docs)]
    opening = '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'
    (out/'sitemap.xml').write_text('\n'.join([opening, *pages, '</urlset>']) + '\n')


def setup(app):
    app.connect('build-finished', add_index)
    app.connect('source-read', add_contents)
    app.connect('html-page-context', add_description)
    app.connect('autodoc-process-docstring', add_docments)
    app.add_html_math_renderer('mathml', (inline_math, None), (block_math, None))
