"""The list of planted faults is true: every old text stands once in module and notebook, every test named exists."""
import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'scripts'))
from faults import FAULTS  # noqa: E402
from plant_faults import node, notebook_of, plant, source_of, stale  # noqa: E402

MODULES = sorted({f.module for f in FAULTS})
STORY = {'sphere', 'concentration', 'tokenizers', 'probes', 'decoder', 'paths', 'sit', 'training', 'sampling', 'solvers', 'fidelity',
         'experiments', 'prediction', 'flow_map'}


def test_the_list_covers_every_module():
    assert len(FAULTS) >= 110 and len({(f.module, f.name) for f in FAULTS}) == len(FAULTS)
    assert STORY <= set(MODULES)


@pytest.mark.parametrize('module', MODULES)
def test_every_fault_can_be_planted(module):
    "What has changed in the code changes in scripts/faults.py as well."
    outdated = {f.name: reason for f in FAULTS if f.module == module and (reason := stale(f))}
    assert not outdated, outdated
    for f in FAULTS: assert f.old != f.new and f.claim and f.seen_by, f.name


def test_every_test_that_is_named_exists():
    known = {}
    for f in FAULTS:
        for test in f.seen_by:
            if test.startswith('nb:'):
                assert (ROOT/'nbs'/f'{test[3:]}.ipynb').exists(), test
                continue
            file, _, name = node(test).partition('::')
            names = known.setdefault(file, {n.name for n in ast.parse((ROOT/file).read_text()).body
                                            if isinstance(n, ast.FunctionDef)})
            assert name.partition('[')[0] in names, f'{f.module}: {f.name}: {test}'


def test_planting_changes_module_and_notebook(tmp_path):
    import shutil
    for name in ('spherical_lfm', 'nbs'): shutil.copytree(ROOT/name, tmp_path/name)
    fault = FAULTS[0]
    plant(fault, tmp_path)
    assert stale(fault, tmp_path) == 'old text found 0 times in the module and 0 times in the notebook'
    changed = {p.name for p in (*(tmp_path/'spherical_lfm').rglob('*.py'), *(tmp_path/'nbs').rglob('*.ipynb'))
               if p.read_bytes() != (ROOT/p.relative_to(tmp_path)).read_bytes()}
    assert changed == {source_of(fault.module).name, notebook_of(fault.module).name}
