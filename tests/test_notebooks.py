"""`nbdev_test` on every notebook, one case each, and what a reader may expect of a stored notebook."""
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forked import Command

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').rglob('[!.]*.ipynb'))


CHAPTERS = [p for p in NOTEBOOKS if re.match(r'\d\d_', p.stem) and p.stem != '00_method' or p.parent.name in ('engine', 'tools')]
PLAIN = ['index', '03_paths']  # run by plain Jupyter as well
PLACE = 'spherical-lfm/spherical_lfm'


def cells_of(path: Path) -> list: return json.loads(path.read_text())['cells']


def source(cell: dict) -> str: return ''.join(cell['source'])


def plain_jupyter(name: str):
    "Run a notebook as a reader would, in a kernel."
    return subprocess.run([str(Path(sys.executable).parent/'jupyter'), 'execute', f'{name}.ipynb'], cwd=ROOT/'nbs', capture_output=True, text=True, timeout=900,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})


@pytest.fixture(scope='module')
def runs():
    "All notebooks, two at a time, unless another worker has the other core: each runs on one thread."
    with ThreadPoolExecutor(1 if 'PYTEST_XDIST_WORKER' in os.environ else 2) as pool:
        yield {**{p: pool.submit(lambda p: Command('nbdev_test', p, OMP_NUM_THREADS='1').wait(900), p) for p in NOTEBOOKS}, **{n: pool.submit(plain_jupyter, n) for n in PLAIN}}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_nbdev_test(runs, path):
    result = runs[path].result()
    assert result.returncode == 0 and 'Success' in result.stdout, result.stderr[-3000:]
    assert 0 < result.peak < 3*2**20, f'{path.stem} took {result.peak/1024:.0f} MiB'


@pytest.mark.parametrize('name', PLAIN)
def test_jupyter_execute(runs, name):
    result = runs[name].result()
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_reader_finds_question_links_and_exercises(path):
    cells = cells_of(path)
    first, setup = source(cells[0]), source(cells[1])
    assert 'colab.research' not in first and 'mybinder' not in first, 'scripts/links.py adds links where they lead somewhere'
    assert setup == source(cells_of(NOTEBOOKS[0])[1]) and 'google.colab' in setup and PLACE in setup
    if path.stem == 'index': return
    assert '**The question.**' in first and 'Next: [' in source(cells[-1]) or path.stem == 'map'
    if path.parent.name in ('engine', 'tools') and path.stem not in ('latents', 'cli'): return
    solutions = [c for c in cells if c['cell_type'] == 'code' and '#| code-fold: true' in source(c)]
    assert any('## Exercises' in source(c) for c in cells) and solutions
    for c in solutions: assert c['metadata'] == {'jupyter': {'source_hidden': True}}, 'solutions are hidden in Jupyter too'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_says_what_it_shows(path):
    for c in cells_of(path):
        if c['cell_type'] == 'code' and any('image/png' in o.get('data', {}) for o in c['outputs']): assert re.search(r'^#\| fig-alt: ".{30,}"$', source(c), re.M), f'no alt text: {source(c)[:80]}'
        if c['cell_type'] == 'markdown': assert not re.search(r'!\[.{0,20}\]\(', source(c)), source(c)[:80]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_as_a_chapter(path):
    cells = cells_of(path)
    code = [c for c in cells if c['cell_type'] == 'code']
    first = ''.join(cells[0]['source'])
    assert first.startswith('# ') and '\n> ' in first, 'a chapter opens with a heading and one line that says what it is about'
    if path in CHAPTERS: assert any('#| default_exp' in ''.join(c['source']) for c in code)
    assert any(o for c in code for o in c['outputs']), 'outputs are stored'
    for c in code:
        assert c['execution_count'] is None
        text = json.dumps([o for o in c['outputs'] if 'image/png' not in o.get('data', {})])
        assert not re.search(r'(/(home|root|tmp|work|Users)/|0x[0-9a-f]{8,}|Traceback)', text), f'noise in the outputs of {"".join(c["source"])[:60]!r}'
        assert not any(o['output_type'] == 'error' or o.get('name') == 'stderr' for o in c['outputs'])
