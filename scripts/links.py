"""Links to where the repository is published; nothing while settings.ini says `published = False`."""
import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def settings(
    root: Path = ROOT # folder with settings.ini
) -> configparser.SectionProxy:
    "What settings.ini says."
    parser = configparser.ConfigParser(delimiters=['='])
    parser.read(root/'settings.ini', encoding='utf8')
    return parser['DEFAULT']


def published(
    root: Path = ROOT # folder with settings.ini
) -> bool:
    "Whether `git_url` can be opened by anybody."
    return settings(root).getboolean('published', fallback=False)


def notebook_links(
    stem: str,        # notebook without its ending
    root: Path = ROOT # folder with settings.ini
) -> str: # Markdown; empty while unpublished
    "Colab, Binder and the notebook in the repository."
    if not published(root): return ''
    known = settings(root)
    place, branch = known['git_url'].removeprefix('https://github.com/'), known['branch']
    file = f'nbs/{stem}.ipynb'
    colab = f'https://colab.research.google.com/github/{place}/blob/{branch}/{file}'
    binder = f'https://mybinder.org/v2/gh/{place}/{branch}?urlpath=lab/tree/{file}'
    here = f'{known["git_url"]}/blob/{branch}/{file}'
    return f'[Run on Colab]({colab}) · [Run on Binder]({binder}) · [Repository]({here})'


def source_link(
    file: str,        # path from the root
    lines: str = '',  # '#L1-L2'
    text: str = '',   # what the link says; empty takes the path
    root: Path = ROOT # folder with settings.ini
) -> str: # Markdown
    "A place in the repository; while unpublished the place in words."
    known = settings(root)
    if published(root): return f'[{text or file}]({known["git_url"]}/blob/{known["branch"]}/{file}{lines})'
    span = lines.removeprefix('#').replace('L', '').replace('-', ' to ')
    label = f', line{"s" * ("to" in span)} {span}' if span else ''
    return (f'{text}: ' if text else '') + f'`{file}`{label}'
