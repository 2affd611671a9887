"""Repository hygiene: README, licence, security, data."""
import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(['git', '-C', str(ROOT), 'ls-files', '-z'], capture_output=True, text=True).stdout.split('\0')[:-1]


@pytest.mark.skipif(not TRACKED, reason='not a git checkout')
def test_no_pickles_no_large_files():
    for name in TRACKED:
        assert not name.endswith(('.pt', '.pth', '.pkl', '.ckpt', '.bin')), name
        assert (ROOT/name).stat().st_size < 4_000_000, name


def test_code_opens_nothing_that_executes():
    for path in [*(ROOT/'spherical_lfm').rglob('*.py'), *(ROOT/'scripts').glob('*.py')]:
        text = path.read_text()
        for call in re.findall(r'torch\.load\([^\n]*', text): assert 'weights_only=True' in call, f'{path.name}: {call}'
        for banned in ('trust_remote_code=True', 'shell=True', 'os.system', 'allow_pickle=True', 'pickle.load'): assert banned not in text, f'{path.name}: {banned}'


def test_readme_is_rendered_from_the_index():
    result = subprocess.run([sys.executable, str(ROOT/'scripts'/'render_readme.py'), '--check'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_links_of_the_readme_exist():
    for target in re.findall(r'\]\((?!http)([^)#]+)\)', (ROOT/'README.md').read_text()): assert (ROOT/target).exists(), target


def test_python_example_of_the_readme_runs():
    blocks = re.findall(r'```python\n(.*?)```', (ROOT/'README.md').read_text(), re.S)
    assert blocks
    subprocess.run([sys.executable, '-c', '\n'.join(blocks)], cwd=ROOT, check=True, timeout=300, capture_output=True)


def test_paper_figures_are_a_tidy_table():
    rows = list(csv.DictReader((ROOT/'data'/'paper.csv').open()))
    assert {r['table'] for r in rows} == {'geometry', 'ablation', 'generation', 'reconstruction'}
    for r in rows: assert float(r['value']) > 0 and r['source']


def test_picture_of_the_sphere_is_what_its_script_draws():
    sys.path.insert(0, str(ROOT/'scripts'))
    from draw_pictures import IMAGES, sphere
    numbers = lambda text: [float(v) for v in re.findall(r'(?<![\w#])-?\d+\.\d', text)]
    kept, drawn = numbers((IMAGES/'sphere.svg').read_text()), numbers(sphere())
    assert len(kept) == len(drawn) and all(abs(a - b) < .25 for a, b in zip(kept, drawn))


def test_the_commit_of_a_result(tmp_path):
    "Of the checkout itself, dirty unless only stored results differ; none for a package that lies in another repository."
    from spherical_lfm.engine.report import _commit
    git = lambda *words: subprocess.run(['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b', *words], check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path/'data'/'results').mkdir(parents=True), (tmp_path/'site').mkdir()
    for name in ('code.py', 'data/results/a.json'): (tmp_path/name).write_text('1')
    git('init', '-q'), git('add', '-A'), git('commit', '-qm', 'first')
    head = git('rev-parse', '--short=12', 'HEAD')
    assert _commit(tmp_path) == head and _commit(tmp_path/'site') is None
    (tmp_path/'data'/'results'/'a.json').write_text('2')
    assert _commit(tmp_path) == head
    (tmp_path/'code.py').write_text('2')
    assert _commit(tmp_path) == f'{head}-dirty'
