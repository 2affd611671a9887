"""Render README.md from nbs/index.ipynb; with --check, only say whether it is up to date."""
import argparse
import re
import sys
from pathlib import Path

import nbformat
from links import notebook_links

ROOT = Path(__file__).resolve().parent.parent


def shown(
    cell # code cell
) -> list[str]: # Markdown
    "A code cell and what it printed or, if its code is not to be seen, its Markdown alone."
    lines = [line for line in cell.source.splitlines() if not line.startswith('#|')]
    printed = ''.join(o.text for o in cell.outputs if o.output_type == 'stream')
    tables = [o.data['text/markdown'] for o in cell.outputs if 'text/markdown' in o.get('data', {})]
    code = [] if '#| echo: false' in cell.source else ['```python\n' + '\n'.join(lines).strip('\n') + '\n```']
    if printed: code.append('```text\n' + printed.rstrip('\n') + '\n```')
    return code + tables


def readme() -> str:
    "Markdown of the index notebook: text as it is, code in fences, what it wrote below; links relative to the root."
    parts = []
    for cell in nbformat.read(ROOT/'nbs'/'index.ipynb', 4).cells:
        if cell.cell_type == 'markdown': parts.append(cell.source)
        elif '#| hide' not in cell.source: parts += shown(cell)
    if links := notebook_links('index'): parts.insert(1, links)
    text = '\n\n'.join(parts)
    text = re.sub(r'\]\(((?:\w+/)*\w+\.ipynb)', r'](nbs/\1', text)
    return text.replace('](images/', '](nbs/images/') + '\n'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='fail if README.md differs')
    if parser.parse_args().check:
        if (ROOT/'README.md').read_text() != readme():
            sys.exit('README.md is not what nbs/index.ipynb renders to: run make readme')
    else: (ROOT/'README.md').write_text(readme())
