"""Plant the faults of `scripts/faults.py` one at a time in a copy, run the tests that should see each, print a table.

    python scripts/plant_faults.py                       all of them, two at a time: some five minutes
    python scripts/plant_faults.py --only warm-up sit    those whose module or name holds one of these
    python scripts/plant_faults.py --json table.json     the table as a file as well

A fault is *seen* if at least one of its tests fails, *stale* if its old text does not stand exactly once in its
module and in its notebook. Every fault has a process of its own that finds the large libraries imported already; the
package comes from the copy.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
COPIED = ('spherical_lfm', 'nbs', 'tests', 'scripts', 'pyproject.toml', 'settings.ini')
LIBRARIES = ['pytest', 'torch', 'torchvision', 'accelerate', 'datasets', 'diffusers.models.autoencoders.autoencoder_kl',
             'timm', 'torch_fidelity',
             'lpips', 'scipy.stats', 'scipy.optimize', 'skimage.metrics', 'sklearn.datasets', 'pandas',
             'matplotlib.pyplot', 'tqdm.auto']

OPTIONS = ['-x', '-q', '--assert=plain', '-p', 'no:cacheprovider', '-p', 'no:unraisableexception', '-o', 'addopts=']


def source_of(module: str, root: Path = ROOT) -> Path:
    "The file of a module, given by its dotted name below the package."
    return root/'spherical_lfm'/f'{module.replace(".", "/")}.py'


def notebook_of(module: str, root: Path = ROOT) -> Path:
    "The notebook that a module is exported from."
    source = source_of(module, root)
    head = source.read_text().split('File to edit: ', 1)[1].split('.ipynb', 1)[0]
    return (source.parent/f'{head}.ipynb').resolve()


def exported(cell: dict) -> bool:
    "Whether a cell goes into the package."
    return cell['cell_type'] == 'code' and any(line.startswith(('#| export', '#|export'))
                                               for line in ''.join(cell['source']).splitlines()[:3])


def stale(fault: Fault, root: Path = ROOT) -> str:
    "Why a fault cannot be planted; empty if it can."
    counts = [source_of(fault.module, root).read_text().count(fault.old)]
    cells = json.loads(notebook_of(fault.module, root).read_text())['cells']
    counts.append(sum(''.join(c['source']).count(fault.old) for c in cells if exported(c)))
    places = [f'{n} times in the {place}' for n, place in zip(counts, ('module', 'notebook')) if n != 1]
    return f'old text found {" and ".join(places)}' if places else ''


def node(test: str) -> str:
    "The pytest id of a short one."
    file, _, name = test.partition('::')
    return f'tests/test_{file}.py::{name}'


def plant(fault: Fault, root: Path):
    "Put a fault into the module and into the notebook of a copy."
    module, book = source_of(fault.module, root), notebook_of(fault.module, root)
    module.write_text(module.read_text().replace(fault.old, fault.new))
    content = json.loads(book.read_text())
    for cell in content['cells']:
        if exported(cell): cell['source'] = ''.join(cell['source']).replace(fault.old, fault.new)
    book.write_text(json.dumps(content))


def copy(to: Path) -> Path:
    "What the tests need, without what was built."
    for name in COPIED:
        source = ROOT/name
        if source.is_dir(): shutil.copytree(source, to/name, ignore=shutil.ignore_patterns('__pycache__', '.*'))
        else: shutil.copy(source, to/name)
    os.symlink(ROOT/'data', to/'data')
    return to


def failing(tests: list, root: Path) -> list[str]:
    "Which of these tests fail in a copy; runs in a process of its own."
    import pytest
    os.chdir(root)
    sys.path[:0] = [str(root), str(root/'tests')]
    sys.dont_write_bytecode = True
    seen: list[str] = []

    class Listener:
        "Remembers what failed."
        def pytest_runtest_logreport(self, report):
            if report.failed: seen.append(report.nodeid)

        def pytest_collectreport(self, report):
            if report.failed: seen.append(f'{report.nodeid} (not collected)')
    listed = [node(t) for t in tests if not t.startswith('nb:')]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        status = pytest.main([*OPTIONS, *listed], plugins=[Listener()]) if listed else 0
    if status not in (0, 1): seen.append(f'pytest ended with {int(status)}')
    for book in (t.removeprefix('nb:') for t in tests if t.startswith('nb:')):
        run = subprocess.run([Path(sys.executable).parent/'nbdev_test', '--path', f'nbs/{book}.ipynb'], cwd=root,
                             capture_output=True, text=True,
                             env=os.environ | {'PYTHONPATH': str(root)})
        if run.returncode: seen.append(book)
    return seen


def judge(fault: Fault | None, tests: tuple = ()) -> dict:
    "One row of the table; without a fault, whether the tests pass in an untouched copy."
    began = time.perf_counter()
    if fault is not None and (reason := stale(fault)): return {'verdict': 'stale', 'by': [reason], 'seconds': 0.}
    with tempfile.TemporaryDirectory(prefix='slfm-fault-') as tmp:
        root = copy(Path(tmp))
        if fault is not None: plant(fault, root)
        by = failing(list(fault.seen_by if fault is not None else tests), root)
    odd = any('not collected' in b or 'pytest ended' in b for b in by)
    verdict = 'broken' if odd else 'seen' if by else 'not seen'
    return {'verdict': verdict, 'by': by, 'seconds': round(time.perf_counter() - began, 1)}


def _may_have_children():
    "Some tests start processes of their own, which the workers of a pool are otherwise not allowed."
    multiprocessing.current_process()._config['daemon'] = False


def pool(jobs: int):
    "Processes that start with the libraries imported, each for one fault."
    os.environ |= {'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'PYTHONDONTWRITEBYTECODE': '1',
                   'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'}
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([n for n in LIBRARIES if importlib.util.find_spec(n.split('.')[0])])
    return context.Pool(jobs, _may_have_children, maxtasksperchild=1)


def main():
    "Plant what was asked for and print the table."
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--only', nargs='+', default=[''], help='only faults whose module or name holds one of these')
    parser.add_argument('--jobs', type=int, default=2, help='faults at a time')
    parser.add_argument('--json', type=Path, help='write the table to this file as well')
    args = parser.parse_args()
    chosen = [f for f in FAULTS if any(words in f'{f.module} {f.name}' for words in args.only)]
    tests = sorted({t for f in chosen for t in f.seen_by})
    rows = []
    with pool(args.jobs) as workers:
        healthy = workers.apply(judge, (None, tuple(tests)))
        if healthy['by']: sys.exit(f'these tests fail without any fault: {", ".join(healthy["by"])}')
        for fault, found in zip(chosen, workers.imap(judge, chosen)):
            rows.append({'module': fault.module, 'fault': fault.name, 'claim': fault.claim, **found})
            by = ', '.join(found['by'])
            verdict, seconds = found['verdict'], found['seconds']
            print(f'{verdict:>8} {seconds:5.1f} s  {fault.module:>13}: {fault.name}  [{by}]', flush=True)
    counts = {v: sum(r['verdict'] == v for r in rows) for v in ('seen', 'not seen', 'stale', 'broken')}
    print(f'{len(rows)} faults: ' + ', '.join(f'{n} {v}' for v, n in counts.items()))
    if args.json: args.json.write_text(json.dumps({'counts': counts, 'rows': rows}, indent=1) + '\n')
    sys.exit(counts['seen'] != len(rows))


if __name__ == '__main__': main()
