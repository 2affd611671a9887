"""`nbdev_test` on every notebook, one case each, and what a reader may expect of a stored notebook."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_nbdev_test(path):
    result = subprocess.run([str(Path(sys.executable).parent/'nbdev_test'), '--path', str(path)], cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | {'MPLBACKEND': 'agg'})
    assert result.returncode == 0 and 'Success' in result.stdout, result.stderr[-3000:]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_as_a_chapter(path):
    cells = json.loads(path.read_text())['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    first = ''.join(cells[0]['source'])
    assert first.startswith('# ') and '\n> ' in first, 'a chapter opens with a heading and one line that says what it is about'
    if path.stem != 'index': assert any('#| default_exp' in ''.join(c['source']) for c in code)
    assert any(o for c in code for o in c['outputs']), 'outputs are stored'
    for c in code:
        assert c['execution_count'] is None
        text = json.dumps([o for o in c['outputs'] if 'image/png' not in o.get('data', {})])
        assert not re.search(r'(/(home|root|tmp|work|Users)/|0x[0-9a-f]{8,}|Traceback)', text), f'noise in the outputs of {"".join(c["source"])[:60]!r}'
        assert not any(o['output_type'] == 'error' or o.get('name') == 'stderr' for o in c['outputs'])
