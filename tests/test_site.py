"The site: every link leads somewhere, nothing comes from other servers, and a real browser shows and searches it"
import json
import re
import shutil
import subprocess
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup
from websocket import create_connection

from cramlit.docs_site import STABILITY, build_site, module_of, public

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT/'nbs').glob('[0-9]*.ipynb'))
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
QUIET = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update',
         '--disable-sync', '--remote-debugging-port=0', '--remote-allow-origins=*']


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    return build_site(ROOT, tmp_path_factory.mktemp('docs')/'site')


@pytest.fixture(scope='module')
def pages(site):
    return {p: BeautifulSoup(p.read_text(), 'html.parser') for p in sorted(site.rglob('*.html')) if p.name != '404.html'}


def test_all_links_and_anchors_lead_somewhere(site, pages):
    ids = {p: {t['id'] for t in page.find_all(id=True)} for p, page in pages.items()}
    broken, seen = [], 0
    for p, page in pages.items():
        for tag in page.find_all(['a', 'link', 'img', 'script']):
            to = urlsplit(tag.get('href') or tag.get('src') or '')
            if to.scheme or to.netloc: continue
            target, seen = (p.parent/unquote(to.path)).resolve() if to.path else p, seen + 1
            anchor = to.fragment and not to.fragment.startswith('__')  # __ is the theme's own
            if not target.is_file() or (anchor and target in ids and to.fragment not in ids[target]): broken.append((p.name, to.geturl()))
    assert not broken and seen > 1000


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for p, page in pages.items():
        for tag in page.find_all(['link', 'img', 'script', 'iframe', 'source']):
            url = tag.get('href') or tag.get('src') or ''
            assert not url.startswith(('http', '//')) or tag.get('rel') == ['canonical'], (p.name, url)
    assert not [p.name for p in site.rglob('*.css') if re.search(r'(url\(|@import)\s*["\']?(https?:)?//', p.read_text())]


@pytest.mark.parametrize('chapter', CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_is_a_page(site, pages, chapter):
    page, cells = pages[site/'nbs'/f'{chapter.stem}.html'], json.loads(chapter.read_text())['cells']
    code = [pre.get_text() for pre in page.article.find_all('pre')]
    assert not [c for c in code if re.search(r'^#\| *(export|hide|default_exp)', c, re.M)] or chapter.stem == '21_site'
    assert len(page.article.find_all('img')) == sum('image/png' in o.get('data', {}) for c in cells for o in c.get('outputs', []))
    prose = [t for p in page.article.find_all('p') for t in p.find_all(string=True) if not t.find_parent('code')]
    assert not [t for t in prose if '$' in t], 'a formula was left as it was'
    offered = dict(public(module_of(cells))) if module_of(cells) else {}
    for name, f in offered.items(): assert f.__doc__.split('\n')[0] in page.find(id=f'offers-{name}').find_next('p').get_text() or '`' in f.__doc__


def test_chapters_stand_at_the_side_in_order(site, pages):
    hrefs = [a['href'].removeprefix('./') for a in pages[site/'index.html'].find_all('a', class_='md-nav__link', href=True)]
    assert [h for h in hrefs if re.match(r'nbs/\d', h)] == [f'nbs/{p.stem}.html' for p in CHAPTERS]
    assert hrefs.index('paper_figures/laptop/index.html') < hrefs.index('nbs/00_config.html')


def test_every_module_has_one_word_for_its_stability(site, pages):
    words = [m for modules in STABILITY.values() for m in modules]
    assert sorted(words) == sorted(p.stem for p in (ROOT/'cramlit').glob('[a-z]*.py'))
    listed = {a['href'] for a in pages[site/'api.html'].article.find_all('a', href=True)}
    assert sum('#offers-' in href for href in listed) == sum(len(list(public(m))) for m in words)


def test_quarto_finds_its_configuration():
    quarto, generated = (yaml.safe_load((ROOT/'nbs'/name).read_text()) for name in ('_quarto.yml', 'nbdev.yml'))
    assert quarto['project']['type'] == 'website' and 'nbdev.yml' in quarto['metadata-files']
    assert (ROOT/'nbs'/quarto['format']['html']['css']).exists() and generated['project']['output-dir'] == '_docs'


class Browser:
    "Chromium through its DevTools: JavaScript in, values and errors out"
    def __init__(self, profile: Path):
        self.process = subprocess.Popen([CHROMIUM, *QUIET, f'--user-data-dir={profile}', 'about:blank'], stderr=subprocess.DEVNULL)
        port = profile/'DevToolsActivePort'
        until(lambda: port.exists() and port.read_text().count('\n'))
        address, path = port.read_text().split()
        self.socket, self.ids, self.errors = create_connection(f'ws://127.0.0.1:{address}{path}', timeout=30), count(), []
        target = next(t for t in self('Target.getTargets')['targetInfos'] if t['type'] == 'page')['targetId']
        self.session = self('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self(f'{domain}.enable')

    session = None

    def __call__(self, method, **params):
        n = next(self.ids)
        self.socket.send(json.dumps(dict(id=n, method=method, params=params) | ({'sessionId': self.session} if self.session else {})))
        while (answer := json.loads(self.socket.recv())).get('id') != n: self.hear(answer)
        assert 'error' not in answer, answer
        return answer['result']

    def hear(self, event):
        "Keep what is wrong: exceptions, errors in the console, and requests that leave this machine"
        p = event.get('params', {})
        if event['method'] == 'Runtime.exceptionThrown' or p.get('entry', {}).get('level') == 'error' or p.get('type') == 'error': self.errors.append(event)
        if event['method'] == 'Network.requestWillBeSent' and not p['request']['url'].startswith(('http://127.0.0.1', 'data:', 'blob:')): self.errors.append(event)

    def js(self, code):
        return self('Runtime.evaluate', expression=code, returnByValue=True, awaitPromise=True)['result'].get('value')

    def open(self, url, width, height=900):
        self('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self('Page.navigate', url=url)
        until(lambda: self.js('location.href').split('#')[0] == url and self.js('document.readyState') == 'complete')


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.05)
    return value


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if not CHROMIUM: pytest.skip('no chromium here: apt-get install chromium')
    b = Browser(tmp_path_factory.mktemp('profile'))
    yield b
    b.process.terminate()
    b.process.wait()


@pytest.fixture(scope='module')
def address(site):
    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Silent, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def test_a_browser_shows_chapters_and_results_on_a_telephone(site, pages, browser, address):
    wide = {}
    for p in pages:
        if 'paper' in p.parent.parts or (p.parent.name == 'laptop' and p.name != 'index.html'): continue  # without outputs; parts of the page of results
        browser.open(f'{address}/{p.relative_to(site)}', 390)
        wide[p.name] = browser.js('document.scrollingElement.scrollWidth')
        assert browser.js('[...document.images].every(i => i.complete && i.naturalWidth)'), p.name
    assert not {name: w for name, w in wide.items() if w > 390} and not browser.errors


def test_a_browser_searches_and_turns_dark(browser, address):
    browser.open(f'{address}/index.html', 1300)
    assert browser.js('matchMedia("(min-width: 1000px)").matches')
    before = browser.js('getComputedStyle(document.body).backgroundColor')
    browser.js('document.querySelector("#__palette_1").click()')
    until(lambda: browser.js('getComputedStyle(document.body).backgroundColor') != before)
    browser.js('document.querySelector(".md-search__button").click()')
    until(lambda: browser.js('document.activeElement.shadowRoot !== null'))
    browser('Input.insertText', text='WordPiece')
    found = '[...document.querySelectorAll("*")].flatMap(e => [...e.shadowRoot?.querySelectorAll("a") ?? []]).map(a => a.href)'
    assert any('02_tokenizer.html' in href for href in until(lambda: browser.js(found)))
    assert not browser.errors
