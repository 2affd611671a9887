"""Execute notebooks in place and store their outputs, skipping cells marked `#| eval: false`.

    python scripts/run_notebooks.py                  all notebooks
    python scripts/run_notebooks.py nbs/02_sphere.ipynb
"""
import argparse
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


class Client(NotebookClient):
    "A notebook client that leaves cells marked `#| eval: false` as they are."
    async def async_execute_cell(self, cell, *args, **kwargs):
        if re.search(r'^#\|\s*eval:\s*false', cell.source, re.M | re.I): return cell
        return await super().async_execute_cell(cell, *args, **kwargs)


def run(path: Path):
    "Execute one notebook in its folder; progress bars and warnings on stderr are not kept."
    notebook = nbformat.read(path, 4)
    Client(notebook, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {'jupyter': {'source_hidden': True}} if '#| code-fold: true' in cell.source else {} # solutions
        if cell.cell_type != 'code': continue
        cell.execution_count = None
        cell.outputs = [o for o in cell.outputs if not (o.output_type == 'stream' and o.name == 'stderr' or 'application/vnd.jupyter.widget-view+json' in o.get('data', {}))]
        for o in cell.outputs:
            if 'execution_count' in o: o.execution_count = None
            if 'metadata' in o: o.metadata = {}
    notebook.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    nbformat.write(notebook, path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('notebooks', nargs='*', type=Path, help='which ones; none means all')
    for path in parser.parse_args().notebooks or sorted((ROOT/'nbs').rglob('[!.]*.ipynb')):
        print(path.name, flush=True)
        run(path)
