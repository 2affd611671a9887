"""The docs site: built offline, then looked at by a headless Chromium."""
import functools
import http.server
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT/'_docs'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
STORY = ('concentration', 'sphere', 'paths', 'tokenizers', 'probes', 'decoder', 'sit', 'training', 'sampling', 'solvers',
         'fidelity', 'experiments', 'prediction', 'flow_map')
ENGINE = ('checks', 'processes', 'files', 'runs', 'images', 'shards', 'latents', 'weights', 'features', 'plots', 'report')
TOOLS = ('cli', 'studies', 'pipeline', 'bench', 'plan')
MODULES = (*STORY, *(f'engine.{m}' for m in ENGINE), *(f'tools.{m}' for m in TOOLS))


NOTEBOOKS = sorted(p.relative_to(ROOT/'nbs').with_suffix('').as_posix() for p in (ROOT/'nbs').rglob('[!.]*.ipynb'))


def reading_order() -> list: # notebooks below nbs, without their endings
    contents = yaml.safe_load((ROOT/'nbs'/'sidebar.yml').read_text())['website']['sidebar']['contents']
    return [n.removesuffix('.ipynb') for c in contents for n in ([c] if isinstance(c, str) else c['contents'])]


def address(name: str) -> str: return re.sub(r'^\d+_', '', Path(name).name) + '.html'


class Elements(HTMLParser):
    "Ids, links and whatever a page loads."
    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in ('script', 'img', 'link', 'iframe', 'source') and (at := a.get('src') or a.get('href')) and a.get('rel') not in ('index', 'search', 'next', 'prev', 'author', 'canonical'): self.loads.append(at)


@pytest.fixture(scope='module')
def site():
    result = subprocess.run([sys.executable, str(ROOT/'scripts'/'build_docs.py')], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    assert 'no example' not in result.stdout, result.stdout
    return {str(p.relative_to(SITE)): p.read_text() for p in SITE.rglob('*.html')}


@pytest.fixture(scope='module')
def elements(site): return {name: Elements(text) for name, text in site.items()}


@pytest.fixture(scope='module')
def browser(site):
    if CHROMIUM is None: pytest.skip('no Chromium on this machine: install chromium to look at the site')
    playwright = pytest.importorskip('playwright.sync_api', reason='the dev extra brings playwright')
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-background-networking', '--disable-component-update', '--disable-sync'])
        yield chromium, f'http://127.0.0.1:{server.server_port}/'
        chromium.close()
    server.shutdown()


@pytest.fixture
def visit(browser):
    chromium, root = browser
    contexts = []
    def open_page(name: str, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on('console', lambda m: page.complaints.append(f'console: {m.text}') if m.type == 'error' else None)
        page.on('pageerror', lambda e: page.complaints.append(f'error: {e}'))
        page.on('request', lambda r: page.complaints.append(f'request to {r.url}') if not r.url.startswith((root, 'data:', 'blob:')) else None)
        page.on('response', lambda r: page.complaints.append(f'{r.status} for {r.url}') if r.status >= 400 else None)
        page.goto(root + name)
        return page
    yield open_page
    for c in contexts: c.close()


def test_a_page_per_notebook_and_module(site):
    assert sorted(reading_order()) == NOTEBOOKS, 'sidebar.yml lists every notebook once'
    for name in reading_order(): assert address(name) in site
    for m in MODULES: assert f'api/{m}.html' in site
    assert 'search.html' in site and (SITE/'searchindex.js').exists()


def test_links_and_anchors(site, elements):
    for name, page in elements.items():
        here = (SITE/name).parent
        for link in page.links:
            if re.match(r'[a-z]+:', link): continue
            path, _, anchor = link.partition('#')
            target = (here/path).resolve() if path else SITE/name
            if target.suffix != '.html' and not target.is_dir(): assert target.exists(), f'{name} links to {link}'; continue
            key = str(target.relative_to(SITE.resolve()))
            assert key in elements, f'{name} links to {link}'
            assert not anchor or anchor in elements[key].ids, f'{name} links to {link}, which has no such anchor'


def test_nothing_from_another_host(elements):
    for name, page in elements.items():
        for at in page.loads: assert not re.match(r'(https?:)?//', at), f'{name} loads {at}'


def test_reference_is_complete(site, elements):
    import importlib
    import inspect
    for m in MODULES:
        module, page = importlib.import_module(f'spherical_lfm.{m}'), site[f'api/{m}.html']
        for name in module.__all__:
            obj = getattr(module, name)
            if getattr(obj, '__module__', module.__name__) != module.__name__: continue # passed on from another chapter
            assert f'spherical_lfm.{m}.{name}' in elements[f'api/{m}.html'].ids, f'{m}.{name} is not on its page'
            if not callable(obj):
                assert re.search(rf'^#: .+\n{name}(:[^\n]*)? = ', inspect.getsource(module), re.M), f'{m}.{name} has no comment that says what it is'
                continue
            assert inspect.getdoc(obj), f'{m}.{name} has no docstring'
            entry = page.partition(f'id="spherical_lfm.{m}.{name}"')[2].partition('<dt class="sig sig-object py" id="spherical_lfm.')[0]
            parameters = [p for p in inspect.signature(obj).parameters if p not in ('self', 'cls')] if inspect.isfunction(obj) else []
            for p in parameters: assert f'>{p}</span>' in entry, f'{m}.{name} does not say what {p} is'
            if inspect.isfunction(obj): assert 'Source in the repository' in entry and re.search('<strong>(Example|In use)</strong>', entry), f'{m}.{name} lacks an example or its source'


def test_public_methods_have_docstrings():
    import importlib
    import inspect
    for m in MODULES:
        module = importlib.import_module(f'spherical_lfm.{m}')
        for name in module.__all__:
            cls = getattr(module, name)
            if not inspect.isclass(cls) or cls.__module__ != module.__name__: continue
            for method, f in vars(cls).items():
                if method.startswith('_') or not (inspect.isfunction(f) or isinstance(f, (property, classmethod, staticmethod))): continue
                assert inspect.getdoc(getattr(f, 'fget', None) or getattr(f, '__func__', f)), f'{m}.{name}.{method} has no docstring'


LOOK = '''() => {
  const seen = e => e.checkVisibility() && e.getBoundingClientRect().width > 0;
  const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const lum = ([r, g, b]) => [r, g, b].map(v => v/255).map(v => v <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4).reduce((a, v, i) => a + v*[.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > .99) return c.slice(0, 3); } return [255, 255, 255]; };
  const contrast = new Map();
  for (const e of document.querySelectorAll('article *, .sidebar-drawer *')) {
    if (!seen(e) || e.closest('svg, math, .copybtn') || ![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    const style = getComputedStyle(e), [a, b] = [lum(rgb(style.color)), lum(behind(e))].sort((x, y) => y - x), ratio = (a + .05)/(b + .05);
    const size = parseFloat(style.fontSize), large = size >= 24 || size >= 18.6 && +style.fontWeight >= 700;
    if (ratio < (large ? 3 : 4.5)) contrast.set(style.color + ' on ' + behind(e), ratio.toFixed(2) + ' ' + e.textContent.trim().slice(0, 40));
  }
  return {
    contrast: [...contrast], title: document.title, description: document.querySelector('meta[name=description]')?.content, language: document.documentElement.lang,
    headings: [...document.querySelectorAll('article h1, article h2, article h3, article h4, article h5')].map(h => +h.tagName[1]),
    unnamed: [...document.images].filter(i => !i.alt.trim() || /^_?images|\\.(png|svg)$/.test(i.alt.trim())).map(i => i.src), unnamedDrawings: [...document.querySelectorAll('article figure svg')].filter(s => !s.getAttribute('aria-label')).length,
    unlabelled: [...document.querySelectorAll('article input')].filter(i => !i.labels?.length && !i.getAttribute('aria-label')).length,
    formulas: [...document.querySelectorAll('article math')].filter(m => m.checkVisibility()).map(m => m.getBoundingClientRect()).filter(r => r.width < 2 || r.height < 4).length + [...document.querySelectorAll('article math')].filter(m => m.textContent.includes('\\\\')).length,
    raw: [...document.querySelectorAll('article p, article li, article td')].map(p => { const c = p.cloneNode(true); c.querySelectorAll('code, math, pre').forEach(x => x.remove()); return c.textContent; }).filter(t => /\\$|\\\\[a-z]+|\\{py:/.test(t)),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  };
}'''
PAGES = [*map(address, NOTEBOOKS)] + [f'api/{m}.html' for m in MODULES]


@pytest.mark.parametrize('name', PAGES)
def test_page(visit, name):
    for scheme, width in (('light', 1280), ('dark', 390)):
        page = visit(name, color_scheme=scheme, viewport={'width': width, 'height': 900})
        found = page.evaluate(LOOK)
        assert not page.complaints, page.complaints
        assert not found['contrast'], (scheme, found['contrast'])
        assert found['wide'] <= 0, f'{found["wide"]} pixels wider than the window of {width}'
        assert found['headings'][0] == 1 and found['headings'].count(1) == 1
        assert all(b <= a + 1 for a, b in zip(found['headings'], found['headings'][1:])), found['headings']
        assert not found['unnamed'] and not found['unnamedDrawings'] and not found['unlabelled'], found
        assert found['title'] and 40 <= len(found['description']) <= 200 and found['language'] == 'en', found
        assert found['formulas'] == 0 and not found['raw'], found


def test_formulas_are_drawn(visit):
    page = visit('sphere.html')
    assert page.evaluate("[...document.querySelectorAll('article math')].filter(m => m.getBoundingClientRect().height > 8).length") > 30
    fraction = page.evaluate("(() => { const f = document.querySelector('mfrac'), [a, b] = [...f.children].map(c => c.getBoundingClientRect()); return b.top - a.top })()")
    assert fraction > 5, 'a denominator stands below its numerator'


def test_search_finds_exp_map(visit):
    page = visit('index.html')
    page.fill('.sidebar-search', 'exp_map')
    page.press('.sidebar-search', 'Enter')
    page.wait_for_selector('#search-results li a')
    page.wait_for_function("document.querySelectorAll('#search-results li').length > 2")
    found = page.eval_on_selector_all('#search-results li a', 'all => all.map(a => a.getAttribute("href"))')
    assert any('api/sphere.html' in a for a in found) and any(a.startswith('sphere.html') for a in found), found
    assert not page.complaints, page.complaints


def test_sidebar_is_in_reading_order(visit):
    page = visit('index.html')
    found = [a.rpartition('/')[2].partition('#')[0] or 'index.html' for a in page.eval_on_selector_all('.sidebar-tree a.reference', 'all => all.map(a => a.href)')]
    assert found == [address(s) for s in reading_order()] + [f'{m}.html' for m in MODULES]


def test_next_leads_through_the_book(visit):
    page, trail = visit('index.html'), ['index.html']
    while (link := page.query_selector('.related-pages a.next-page')) and 'api/' not in page.url:
        page.goto(link.evaluate('a => a.href'))
        trail.append(page.url.rpartition('/')[2])
    assert trail[:-1] == [address(s) for s in reading_order()]
    assert page.query_selector('.related-pages a.prev-page')


def test_theme_and_copy_buttons(visit):
    page = visit('paths.html', color_scheme='light', viewport={'width': 1280, 'height': 900})
    background = lambda: page.evaluate('getComputedStyle(document.body).backgroundColor')
    shades = {background()}
    for _ in range(2):
        page.click('.theme-toggle-content button')
        shades.add(background())
    assert len(shades) == 2, 'the toggle changes between light and dark'
    assert page.evaluate("document.querySelectorAll('div.highlight').length === document.querySelectorAll('div.highlight button.copybtn').length")
    assert page.evaluate("[...document.querySelectorAll('details.hide')].every(d => !d.open)") and page.query_selector('details.hide'), 'solutions are hidden'


def set_slider(page, widget: str, name: str, value: float) -> dict:
    "Move a slider and read what the widget says of itself."
    page.eval_on_selector(f'#slfm-{widget} [name={name}]', f'e => {{ e.value = {value}; e.dispatchEvent(new Event("input")) }}')
    return {k: float(v) for k, v in page.eval_on_selector(f'#slfm-{widget}', 'e => ({...e.dataset})').items()}


def test_widgets_agree_with_the_package(visit):
    from spherical_lfm.concentration import chi_mean, chi_variance, linear_radial_share
    page = visit('sphere.html')
    for degrees in (30, 90, 160):
        set_slider(page, 'sphere', 'theta', degrees)
        found = set_slider(page, 'sphere', 't', .5)
        assert math.isclose(found['chord'], math.cos(math.radians(degrees)/2), abs_tol=2e-3) and math.isclose(found['arc'], 1, abs_tol=2e-3)
        found = set_slider(page, 'sphere', 't', 0)
        assert math.isclose(found['share'], math.sin(math.radians(degrees)/2)**2, abs_tol=5e-3)
    page.click('#slfm-sphere [name=play]')
    page.wait_for_function("+document.querySelector('#slfm-sphere [name=t]').value > .05")
    page = visit('concentration.html')
    for power in (2, 5, 9):
        found, d = set_slider(page, 'shell', 'd', power), 2**power
        assert math.isclose(found['mean'], chi_mean(d)/d**.5, abs_tol=2e-3) and math.isclose(found['cv'], chi_variance(d)**.5/chi_mean(d), abs_tol=3e-3)
    for ratio in (.35, .94, 1.5):
        found = set_slider(page, 'share', 'ratio', ratio)
        assert math.isclose(found['start'], linear_radial_share(0., 1., ratio).item(), abs_tol=1e-6) and math.isclose(found['end'], linear_radial_share(1., 1., ratio).item(), abs_tol=1e-6)
    page = visit('probes.html')
    page.select_option('#slfm-swap [name=what]', '1')
    found = set_slider(page, 'swap', 'share', 2)
    assert (found['row'], found['column']) == (1, 2)
    assert page.eval_on_selector('#slfm-swap .photo', 'e => getComputedStyle(e).backgroundPosition') == '40% 50%'
    assert not page.complaints


def test_version_is_shown(site):
    from spherical_lfm import __version__
    assert all(f'spherical_lfm {__version__}' in site[p] for p in PAGES)


def test_quarto_settings_agree():
    import configparser
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini')
    settings = settings['DEFAULT']
    quarto, nbdev = (yaml.safe_load((ROOT/'nbs'/n).read_text()) for n in ('_quarto.yml', 'nbdev.yml'))
    assert set(quarto['metadata-files']) == {'nbdev.yml', 'sidebar.yml'}
    assert nbdev['project']['output-dir'] == settings['doc_path']
    assert nbdev['website'] == {'title': settings['title'], 'site-url': settings['doc_host'] + settings['doc_baseurl'], 'description': settings['description'], 'repo-branch': settings['branch'], 'repo-url': settings['git_url']}
    assert (ROOT/'nbs'/quarto['website']['favicon']).exists()
    order = reading_order()
    chapters = [s for s in order if re.match(r'\d\d_', s)]
    assert order[0] == 'index' and chapters == sorted(chapters) and order[1:1 + len(chapters)] == chapters


def test_chapters_lead_on():
    order = reading_order()
    for here, after in zip(order[1:], order[2:]):
        cells = json.loads((ROOT/'nbs'/f'{here}.ipynb').read_text())['cells']
        there = os.path.relpath(f'{after}.ipynb', Path(here).parent)
        assert f']({there})' in ''.join(cells[-1]['source']), f'{here} does not end with a link to {after}'


def test_nbdev_processes_every_notebook():
    "The half of `nbdev_docs` that comes before Quarto: directives, documentation of symbols, front matter."
    result = subprocess.run([sys.executable, '-c', 'from nbdev.serve import proc_nbs; print(proc_nbs(n_workers=0, force=True))'], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    made = ROOT/result.stdout.split()[-1]
    assert {p.relative_to(made).with_suffix('').as_posix() for p in made.rglob('[!.]*.ipynb')} == set(reading_order()) and {'_quarto.yml', 'nbdev.yml', 'sidebar.yml'} <= {p.name for p in made.iterdir()}
    assert any('z_t' in str(c) for c in json.loads((made/'03_paths.ipynb').read_text())['cells'])
