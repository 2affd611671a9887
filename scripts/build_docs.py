"""Build the docs site from the notebooks into _docs, without Quarto.

nbdev's `proc_nbs` applies directives and writes the documentation of every exported symbol; nbconvert turns the result into
HTML; formulas become MathML at build time, so that the pages need no script and nothing from outside.
"""
import html
import json
import re
import shutil
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbdev.serve import proc_nbs
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT/'_docs'
STYLE = '''
body{margin:0;font:17px/1.6 system-ui,sans-serif;color:#1f2328;display:grid;grid-template-columns:15rem minmax(0,52rem);gap:2.5rem}
nav{position:sticky;top:0;height:100vh;overflow:auto;padding:1.5rem 1rem;background:#f6f8fa;box-sizing:border-box}
nav a{display:block;padding:.2rem .5rem;color:inherit;text-decoration:none;border-radius:.3rem}nav a.here{background:#dbe7f5;font-weight:600}
nav input{width:100%;box-sizing:border-box;margin:.5rem 0;padding:.3rem}nav small{color:#57606a}
main{padding:1.5rem 1rem 6rem}pre{background:#f6f8fa;padding:.7rem 1rem;overflow:auto;font-size:.82em;line-height:1.45;border-radius:.4rem}
code{font-size:.88em}:not(pre)>code{background:#f0f2f4;padding:.1em .3em;border-radius:.25em}img{max-width:100%}
.jp-OutputArea-output pre,.output pre{background:none;border-left:3px solid #d0d7de;border-radius:0}
table{border-collapse:collapse;font-size:.9em;margin:1rem 0;display:block;overflow-x:auto}td,th{padding:.3rem .7rem;border-bottom:1px solid #d0d7de;text-align:left}
math[display=block]{margin:1rem 0;overflow-x:auto}.anchor-link,.jp-InputPrompt,.jp-OutputPrompt,.prompt{display:none}a{color:#0969da}blockquote{margin-left:0;color:#57606a;font-size:1.1em}
@media(max-width:800px){body{grid-template-columns:1fr}nav{position:static;height:auto}}
'''
SEARCH = '''
const box=document.getElementById('q'),hits=document.getElementById('hits');
box.oninput=()=>{const q=box.value.trim().toLowerCase();hits.replaceChildren();if(q.length<2)return;
for(const [name,url] of INDEX.filter(([n])=>n.toLowerCase().includes(q)).slice(0,12)){const a=document.createElement('a');a.href=url;a.textContent=name;hits.append(a)}};
'''


def with_mathml(text: str) -> str:
    "Markdown with $...$ and $$...$$ outside code replaced by MathML."
    def one(match, display):
        mathml = convert(match[1].strip(), display=display)
        return ' '.join(mathml.split())
    parts = re.split(r'(```.*?```|`[^`\n]+`)', text, flags=re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r'\$\$(.+?)\$\$', lambda m: f'\n{one(m, "block")}\n', parts[i], flags=re.S)
        parts[i] = re.sub(r'(?<!\\)\$([^$\n]+?)\$', lambda m: one(m, 'inline'), parts[i])
    return ''.join(parts)


def symbols() -> dict:
    "Exported names and the pages that define them, from the index that nbdev writes."
    scope = {}
    exec((ROOT/'spherical_lfm'/'_modidx.py').read_text(), scope)
    return {name.rpartition('.')[2] if name.count('.') == 2 else '.'.join(name.split('.')[2:]): url.partition('/')[2] if url.startswith('spherical_lfm/') else url
            for module in scope['d']['syms'].values() for name, (url, _) in module.items()}


def link_symbols(page: str, known: dict, here: str) -> str:
    "Turn `name` in code font into a link where the name is an exported symbol of another page."
    def link(match):
        url = known.get(match[1].removesuffix('()'))
        return match[0] if url is None or url.startswith(here + '#') else f'<a href="{url}">{match[0]}</a>'
    parts = re.split(r'(<pre.*?</pre>|<a .*?</a>|<h\d.*?</h\d>)', page, flags=re.S)
    return ''.join(p if i % 2 else re.sub(r'<code>([\w.()]+)</code>', link, p) for i, p in enumerate(parts))


def title_of(notebook) -> str:
    "The first heading of a notebook."
    return next(line.removeprefix('# ') for c in notebook.cells if c.cell_type == 'markdown' for line in c.source.splitlines() if line.startswith('# '))


def documentation(cell):
    "A `show_doc` cell as the text it printed, without Pandoc attributes; any other cell as it is."
    if cell.cell_type != 'code' or 'show_doc(' not in cell.source: return cell
    text = ''.join(o.data.get('text/markdown', '') for o in cell.outputs if 'data' in o)
    return nbformat.v4.new_markdown_cell(re.sub(r'\{(target|\.)[^}]*\}', '', text))


def build():
    "Render every processed notebook into a page."
    processed = proc_nbs(n_workers=0, force=True)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    sources = {p.stem: nbformat.read(p, 4) for p in sorted((ROOT/'nbs').glob('*.ipynb'))}
    order = ['index', *(s for s in sources if s != 'index')]
    address = {stem: re.sub(r'^\d+_', '', stem) + '.html' for stem in order}
    titles = {stem: title_of(sources[stem]) for stem in order}
    known = {k: re.sub(r'^\d+_', '', v) for k, v in symbols().items()}
    exporter = HTMLExporter(template_name='basic')
    index = sorted([k, v] for k, v in known.items()) + [[titles[s], address[s]] for s in order]
    for stem in order:
        notebook = nbformat.read(processed/f'{stem}.ipynb', 4)
        front = next(c.source for c in sources[stem].cells if c.cell_type == 'markdown') # nbdev turns title and description into front matter
        notebook.cells = [nbformat.v4.new_markdown_cell(front), *(documentation(c) for c in notebook.cells if c.cell_type != 'raw')]
        for cell in notebook.cells:
            cell.source = '\n'.join(line for line in cell.source.splitlines() if not line.startswith('#|'))
            if cell.cell_type == 'markdown': cell.source = with_mathml(cell.source)
        body, _ = exporter.from_notebook_node(notebook)
        for other, url in address.items(): body = body.replace(f'href="{other}.ipynb"', f'href="{url}"')
        body = link_symbols(body, known, address[stem])
        links = ''.join(f'<a href="{address[s]}"{" class=here" if s == stem else ""}>{html.escape(titles[s])}</a>' for s in order)
        (OUT/address[stem]).write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<title>{html.escape(titles[stem])} – spherical_lfm</title><style>{STYLE}{HtmlFormatter(style="default").get_style_defs(".highlight")}</style></head>'
            f'<body><nav><strong>spherical_lfm</strong><input id="q" type="search" placeholder="find a symbol or chapter" aria-label="search"><div id="hits"></div>{links}</nav>'
            f'<main>{body}</main><script>const INDEX={json.dumps(index)};{SEARCH}</script></body></html>')
    if (ROOT/'nbs'/'images').exists(): shutil.copytree(ROOT/'nbs'/'images', OUT/'images')
    print(f'{len(order)} pages in {OUT.relative_to(ROOT)}')


if __name__ == '__main__': build()
