"The site: it builds without a complaint, every link leads somewhere, and nothing comes from other servers"
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT/'docs'))
import book  # noqa: E402

CHAPTERS = [path for part in book.PARTS for path, *_ in book.contents(f'nbs/{part}')]


def cells_of(path):
    return json.loads((ROOT/path).read_text())['cells']


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp('docs')/'site'
    command = [sys.executable, '-m', 'sphinx', '--quiet', '-c', str(ROOT/'docs'), str(ROOT), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


@pytest.fixture(scope='module')
def pages(built):
    paths = [p for p in sorted(built[0].rglob('*.html')) if '_static' not in p.parts]
    return {p: BeautifulSoup(p.read_text(), 'html.parser') for p in paths}


def test_it_builds_without_a_complaint(built):
    assert built[1] == ''


def test_all_links_and_anchors_lead_somewhere(pages):
    ids = {p: {t['id'] for t in page.find_all(id=True)} for p, page in pages.items()}
    broken, seen = [], 0
    for p, page in pages.items():
        for tag in page.find_all(['a', 'link', 'img', 'script']):
            to = urlsplit(tag.get('href') or tag.get('src') or '')
            if to.scheme or to.netloc: continue
            target, seen = (p.parent/unquote(to.path)).resolve() if to.path else p, seen + 1
            anchor = unquote(to.fragment)
            lost = anchor and target in ids and anchor not in ids[target]
            if not target.is_file() or lost: broken.append((p.name, to.geturl()))
    assert seen > 1000 and broken == []


def test_nothing_is_fetched_from_elsewhere(built, pages):
    for p, page in pages.items():
        for tag in page.find_all(['link', 'img', 'script', 'iframe', 'source']):
            assert not (tag.get('href') or tag.get('src') or '').startswith(('http', '//')), (p.name, tag)
    for css in built[0].rglob('*.css'):
        assert not re.search(r'(url\(|@import)\s*["\']?(https?:)?//', css.read_text()), css


@pytest.mark.parametrize('path', CHAPTERS, ids=lambda p: Path(p).stem)
def test_a_chapter_is_a_page(built, pages, path):
    page, cells = pages[built[0]/Path(path).with_suffix('.html')].article, cells_of(path)
    assert not re.search(r'^#\| *(export|hide|default_exp)', page.get_text(), re.M)
    shown = [o for c in cells if '#| hide' not in ''.join(c['source']) for o in c.get('outputs', [])]
    linked = sum(''.join(c['source']).count('![') for c in cells if c['cell_type'] == 'markdown')
    assert len(page.find_all('img')) == linked + sum('image/png' in o.get('data', {}) for o in shown)
    for img in page.find_all('img'): assert img['alt'] and not img['alt'].endswith(('.png', '.svg')), img
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    if '#| default_exp' in code:
        assert page.find('dt', class_='sig') and 'offers' in page.find_all('h2')[-1].get_text()
    for p in page.find_all('p'):
        assert not [t for t in p.find_all(string=True) if '$' in t and not t.find_parent(['code', 'pre'])]


def test_a_figure_says_in_words_what_is_written_in_it():
    code = "ax.set(xlabel='step', ylabel=f'loss of {n}\\nruns')\nax.set_title('rounds')"
    assert book.alt_text(code) == 'Figure: step; loss of … runs; rounds'
    assert book.alt_text('draw()').startswith('Figure,')


def test_chapters_stand_at_the_side_in_order(built, pages):
    links = [a['href'] for a in pages[built[0]/'index.html'].select('nav.bd-links a[href]')]
    chapters = [p.replace('.ipynb', '.html') for p in CHAPTERS]
    guides = [p for p in chapters if '/guides/' in p]
    assert [h for h in links if re.match(r'nbs/\w+/\d', h)] == guides + chapters[:-len(guides)]
    assert guides[0] == 'nbs/guides/90_own_corpus.html'
    assert links.index(f'{book.RESULTS}/README.html') > links.index(chapters[0])


def test_stages_stand_in_the_order_of_the_pipeline_as_they_ran(built, pages):
    names = [Path(path).stem for path, _ in book.stages()]
    order = [next(name for name in book.STAGES if n.startswith(name)) for n in names]
    assert list(dict.fromkeys(order)) == list(book.STAGES)
    ran = [path for path, _ in book.stages() if path.startswith(book.RESULTS)]
    assert ran and all(pages[built[0]/Path(path).with_suffix('.html')].select('.cell_output') for path in ran)


def test_the_part_of_a_page_is_open_and_the_others_are_folded(built, pages):
    menu = pages[built[0]/'nbs'/'data'/'13_masking.html'].select_one('nav.bd-links')
    opened = [d.summary.get_text() for d in menu.select('details details') if d.has_attr('open')]
    assert opened == ['Data'] and 'Masking' in menu.select_one('li.active').get_text()


def test_a_page_says_what_it_is_about(built, pages):
    head = pages[built[0]/'nbs'/'data'/'13_masking.html'].head
    assert head.select_one('meta[name=description]')['content'].startswith('Which tokens are masked')


def test_comments_beside_arguments_are_shown(built, pages):
    page = pages[built[0]/'nbs'/'running'/'81_command.html']
    offered = page.find(id='cramlit.running.command.pretrain').parent
    assert 'folder made by cramlit prepare' in offered.get_text()


def test_every_formula_is_understood():
    cells = [c for path in CHAPTERS for c in cells_of(path) if c['cell_type'] == 'markdown']
    text = '\n'.join(''.join(c['source']) for c in cells)
    text = re.sub(r'```.*?```|`[^`\n]+`', '', text, flags=re.S)
    formulas = re.findall(r'\$\$(.+?)\$\$|\$([^$\n]+)\$', text, re.S)
    assert len(formulas) > 100
    for block, inline in formulas: assert '<math' in book.mathml(block or inline, bool(block))


def test_quarto_finds_its_configuration():
    quarto = yaml.safe_load((ROOT/'nbs'/'_quarto.yml').read_text())
    assert quarto['project']['type'] == 'website' and (ROOT/'nbs'/quarto['format']['html']['css']).exists()
    for name in quarto['metadata-files']: assert name == 'sidebar.yml' or (ROOT/'nbs'/name).exists()
