"""Export the notebooks and fail if that changed the package."""
import sys
from pathlib import Path

from nbdev.doclinks import nbdev_export

PACKAGE = Path(__file__).resolve().parent.parent/'spherical_lfm'


def contents() -> dict:
    "Bytes of every module."
    return {str(p.relative_to(PACKAGE)): p.read_bytes() for p in PACKAGE.rglob('*.py')}


if __name__ == '__main__':
    before = contents()
    nbdev_export()
    after = contents()
    differ = sorted(n for n in before.keys() | after if before.get(n) != after.get(n))
    if differ: sys.exit(f'notebooks and package disagreed in {", ".join(differ)}: the package is now as exported, commit it with the notebooks')
    print(f'notebooks and package agree ({len(after)} modules)')
