"""Render README.md from nbs/index.ipynb; with --check, only say whether it is up to date."""
import argparse
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    "Markdown of the index notebook: text as it is, code in fences, printed output below it; links made relative to the root."
    parts = []
    for cell in nbformat.read(ROOT/'nbs'/'index.ipynb', 4).cells:
        lines = [line for line in cell.source.splitlines() if not line.startswith('#|')]
        if cell.cell_type == 'markdown': parts.append('\n'.join(lines))
        elif '#| hide' not in cell.source:
            parts.append('```python\n' + '\n'.join(lines).strip('\n') + '\n```')
            printed = ''.join(o.text for o in cell.outputs if o.output_type == 'stream')
            if printed: parts.append('```text\n' + printed.rstrip('\n') + '\n```')
    text = '\n\n'.join(parts)
    for name in sorted(p.name for p in (ROOT/'nbs').glob('*.ipynb')): text = text.replace(f']({name})', f'](nbs/{name})')
    return text.replace('](images/', '](nbs/images/') + '\n'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='fail if README.md differs')
    if parser.parse_args().check:
        if (ROOT/'README.md').read_text() != readme(): sys.exit('README.md is not what nbs/index.ipynb renders to: run make readme')
    else: (ROOT/'README.md').write_text(readme())
