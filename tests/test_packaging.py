"""The package as others install and import it: types, light imports, source and wheel distributions."""
import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [str(p.relative_to(ROOT/'spherical_lfm').with_suffix('')) for p in sorted((ROOT/'spherical_lfm').rglob('[a-z]*.py'))]
TOOLS = {'nbdev', 'execnb', 'jupyter', 'IPython', 'ipykernel', 'nbclient', 'nbformat', 'pytest', 'hypothesis', 'sphinx', 'playwright'}


def python(code: str, **options):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, **options)


def test_types():
    result = subprocess.run([sys.executable, '-m', 'mypy'], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and 'Success' in result.stdout, result.stdout[-3000:]
    assert (ROOT/'spherical_lfm'/'py.typed').exists()


def test_import_is_light():
    found = python('import torch, sys; before = set(sys.modules); import spherical_lfm, spherical_lfm.sphere, spherical_lfm.paths; print(*sorted({m.partition(".")[0] for m in set(sys.modules) - before}))')
    assert set(found.stdout.split()) <= {'spherical_lfm', 'math', '__future__'}, f'beyond torch, these were imported: {found.stdout}'


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "A source distribution of what git knows, and the wheel made of it."
    out = tmp_path_factory.mktemp('dist')
    result = subprocess.run([sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(out), str(ROOT)], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]
    return next(out.glob('*.tar.gz')), next(out.glob('*.whl'))


def test_distributions_hold_what_is_needed(built):
    sdist, wheel = built
    names = set(zipfile.ZipFile(wheel).namelist())
    for needed in ('py.typed', 'sphere.py', 'engine/files.py', 'tools/cli.py', '_modidx.py', 'data/paper.csv', 'data/digits/spherical/tokenizer.json', 'data/results/digits_comparison.json'): assert f'spherical_lfm/{needed}' in names, needed
    assert not any(n.startswith(('tests/', 'nbs/', 'scripts/', 'build/', 'runs/', 'material/')) for n in names)
    inside = {n.partition('/')[2] for n in tarfile.open(sdist).getnames()}
    assert {'pyproject.toml', 'README.md', 'LICENSE', 'spherical_lfm/sphere.py', 'data/paper.csv'} <= inside


def test_wheel_works_away_from_the_checkout(built, tmp_path):
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', str(tmp_path/'site'), str(built[1])], check=True, timeout=300)
    result = python('import spherical_lfm; from spherical_lfm.tokenizers import digits_images, load_tokenizer; print(spherical_lfm.__file__); t = load_tokenizer("digits", spherical=True); print(tuple(t.encode(digits_images("test")[0][:2]).shape))',
                    cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(tmp_path/'site')})
    where, shape = result.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path/'site') and shape == '(2, 16, 4, 4)', result.stderr


def test_requirements_bring_what_is_imported():
    "Imports of a module are brought by the requirements, those inside functions by these or by an extra; no notebook or test tool is among the former."
    if sys.version_info >= (3, 11): import tomllib  # noqa: I001
    else: tomllib = pytest.importorskip('tomli')
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    name = lambda requirement: re.match(r'[\w-]+', requirement)[0].replace('-', '_')
    core = {{'pillow': 'PIL', 'scikit_learn': 'sklearn', 'pyyaml': 'yaml'}.get(n, n) for n in map(name, project['dependencies'])} | set(sys.stdlib_module_names) | {'spherical_lfm'}
    extra = {name(d) for e in project['optional-dependencies'].values() for d in e}
    assert not core & TOOLS
    for module in MODULES:
        tree = ast.parse((ROOT/'spherical_lfm'/f'{module}.py').read_text())
        for node in ast.walk(tree):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for i in imported: assert i.partition('.')[0] in (core if node in tree.body else core | extra), f'{module} imports {i}, which no requirement brings'
    versions = {c.rpartition(' ')[2] for c in project['classifiers'] if c.startswith('Programming Language :: Python :: 3.')}
    assert versions == {'3.10', '3.11', '3.12', '3.13'} and project['requires-python'] == '>=3.10'
