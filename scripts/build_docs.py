"""Build the docs site from the notebooks into _docs, without Quarto and without a network.

Notebook directives mean what they mean to nbdev and Quarto; API pages are written from signatures, docstrings and parameter
comments; Sphinx with the theme Furo renders both. Formulas become MathML at build time, so that no page needs anything from another host.
"""
import argparse
import ast
import functools
import html
import importlib
import inspect
import re
import shutil
import sys
import textwrap
from pathlib import Path

import nbformat
import yaml
from fastcore.docments import docments
from links import notebook_links, source_link
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace, patch_docutils

ROOT = Path(__file__).resolve().parent.parent
OUT, PAGES, RENDERED = ROOT/'_docs', ROOT/'build'/'docs', ROOT/'build'/'site'/'html' # MyST-NB leaves notebooks beside what it renders


def sidebar() -> list: # [(section or None, [names])]
    "Sections and notebooks in reading order, from the sidebar that Quarto reads: paths below nbs, without their endings."
    contents = yaml.safe_load((ROOT/'nbs'/'sidebar.yml').read_text())['website']['sidebar']['contents']
    def name(path): return path.removesuffix('.ipynb')
    return [(None, [name(c)]) if isinstance(c, str) else (c['section'], [*map(name, c['contents'])]) for c in contents]


def page_of(name: str) -> str:
    "Address of a notebook's page: its name without folder and number."
    return re.sub(r'^\d+_', '', name.rpartition('/')[2])


def module_of(name: str) -> str:
    "Dotted module that a notebook exports, below the package: `engine/files` -> `engine.files`."
    folder, _, last = name.rpartition('/')
    return '.'.join(filter(None, (folder, page_of(last))))


def file_of(module: str) -> Path:
    "Source of a module."
    return ROOT/'spherical_lfm'/f'{module.replace(".", "/")}.py'


#: Modules of the package in the reading order of their notebooks.
MODULES = [m for _, names in sidebar() for m in map(module_of, names) if file_of(m).exists()]


def slug(heading: str) -> str:
    "Anchor of a heading."
    return re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-')


def exported() -> dict: # name -> dotted name
    "Every exported name, methods of exported classes as `Class.method`."
    known = {}
    for module in MODULES:
        mod = importlib.import_module(f'spherical_lfm.{module}')
        for name in mod.__all__:
            if name in known: continue # a name that a later module passes on
            known[name] = f'spherical_lfm.{module}.{name}'
            if inspect.isclass(obj := getattr(mod, name)):
                known |= {f'{name}.{m}': f'spherical_lfm.{module}.{name}.{m}' for m in public_methods(obj)}
    return known


def public_methods(cls) -> dict: # name -> function or property
    "Documented methods that a class defines itself."
    return {n: m for n, m in vars(cls).items() if not n.startswith('_') and (inspect.isfunction(m) or isinstance(m, (property, classmethod, staticmethod))) and inspect.getdoc(getattr(m, 'fget', None) or m)}


class Page:
    "A notebook as a page: directives applied, links and names resolved."
    def __init__(self, name: str, known: dict):
        self.name, self.known = name, known
        self.source = nbformat.read(ROOT/'nbs'/f'{name}.ipynb', 4)
        first = self.source.cells[0].source.splitlines()
        self.title = first[0].removeprefix('# ')
        self.description = next((line.removeprefix('> ') for line in first if line.startswith('> ')), '')

    def text(self, source: str) -> str:
        "Markdown with links between notebooks as links between pages, and names in code font as links to their documentation."
        def name(match): return f'{{py:obj}}`{match[1]} <{self.known[match[1]]}>`' if match[1] in self.known else match[0]
        def link(match): return f']({page_of(match[1])}.ipynb{"#" + slug(match[2][1:].replace("-", " ")) if match[2] else ""})'
        parts = re.split(r'(^```.*?^```|^#.*?$|\[[^\]]*\]\([^)]*\))', source, flags=re.S | re.M)
        for i, part in enumerate(parts): parts[i] = re.sub(r'\]\(([\w./]+)\.ipynb(#[^)]+)?\)', link, part) if i % 2 else re.sub(r'(?<!`)`([A-Za-z_][\w.]*)(?:\(\))?`(?!`)', name, part)
        return ''.join(parts).replace('](../images/', '](images/')

    def code(self, cell):
        "A code cell for the renderer, or None if its directives say that no page shows it."
        lines = cell.source.splitlines()
        directives = dict(re.match(r'#\|\s*([\w-]+):?\s*(.*)$', line).groups() for line in lines if line.startswith('#|'))
        source = '\n'.join(line for line in lines if not line.startswith('#|')).strip('\n')
        if not source or directives.keys() & {'hide', 'export', 'exporti', 'default_exp'}: return None
        tags = [tag for directive, value, tag in (('echo', 'false', 'remove-input'), ('output', 'false', 'remove-output'), ('code-fold', 'true', 'hide-cell')) if directives.get(directive) == value]
        metadata = {'tags': tags, 'mystnb': {}}
        if 'fig-alt' in directives: metadata['mystnb']['image'] = {'alt': directives['fig-alt'].strip('"')}
        if 'hide-cell' in tags: metadata['mystnb'] |= {'code_prompt_show': directives.get('code-summary', 'Solution').strip('"'), 'code_prompt_hide': 'Hide'}
        return nbformat.v4.new_code_cell(source, outputs=cell.outputs, metadata=metadata)

    @functools.cached_property
    def codes(self) -> list: # [(cell, cell for the renderer)]
        "Every cell, a visible one of code also as it is rendered: asked for by every exported name."
        return [(c, self.code(c) if c.cell_type == 'code' else None) for c in self.source.cells]

    def cell(self, cell):
        "A cell for the renderer; Markdown that a hidden cell wrote counts as text, so that its links are resolved."
        if cell.cell_type == 'markdown': return nbformat.v4.new_markdown_cell(self.text(cell.source))
        written = [o.data['text/markdown'] for o in cell.outputs if 'text/markdown' in o.get('data', {})]
        if written and '#| echo: false' in cell.source: return nbformat.v4.new_markdown_cell(self.text('\n\n'.join(written)))
        return self.code(cell)

    def write(self, extra: str = ''):
        "Write the page for Sphinx."
        cells = [self.cell(c) for c in self.source.cells]
        if links := notebook_links(self.name): cells.insert(1, nbformat.v4.new_markdown_cell(links))
        if extra: cells.append(nbformat.v4.new_markdown_cell(extra))
        nbformat.write(nbformat.v4.new_notebook(cells=[c for c in cells if c], metadata=self.source.metadata), PAGES/f'{page_of(self.name)}.ipynb')

    def examples(self, name: str) -> list: # [(code, language, anchor of its section)]
        "Visible cells and command lines that use an exported name, shortest first."
        section, found, call = '', [], re.compile(rf'(?<![\w.\'"]){name}\b')
        for c, code in self.codes:
            if c.cell_type == 'markdown':
                section = ([section] + [slug(h) for h in re.findall(r'^##+ (.+)$', c.source, re.M)])[-1]
                if name.startswith('slfm_'): found += [(line.strip(), 'sh', section) for line in re.findall(rf'(?:^|`)({name} [^`\n]+)', c.source, re.M)]
            elif code and not c.source.startswith('#| export') and call.search(code.source): found.append((code.source, 'python', section))
        return sorted(found, key=lambda f: len(f[0]))


def escape(text: str) -> str:
    "Plain text of a docstring or comment as Markdown, code in backticks left alone."
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(p if i % 2 else re.sub(r'([<*\[\]$|])', r'\\\1', p) for i, p in enumerate(parts))


def annotation(obj) -> str:
    "A type as it would be written."
    return '' if obj is inspect.Parameter.empty or obj is None else obj if isinstance(obj, str) else re.sub(r'(?:\w+\.)+(?=\w)', '', inspect.formatannotation(obj))


def code_font(obj) -> str:
    "A type in code font, fit for a table."
    return f'`{typed}`'.replace('|', '\\|') if (typed := annotation(obj)) else ''


@functools.cache
def statements(file: Path) -> list: # [(first line, last line, names that are read)]
    "Statements of a file; of a block, its first line."
    def read(node): return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.With, ast.For, ast.If)):
            heads = [i.context_expr for i in node.items] if isinstance(node, ast.With) else [node.iter] if isinstance(node, ast.For) else [node.test]
            found.append((node.lineno, node.lineno, set().union(*map(read, heads))))
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Return)): found.append((node.lineno, node.end_lineno, read(node)))
    return found


def use(name: str, file: Path) -> tuple | None: # (code, line)
    "The shortest statement of a file that uses the name."
    found = [(first, last) for first, last, names in statements(file) if name in names]
    if not found: return None
    first, last = min(found, key=lambda f: (f[1] - f[0], f[0]))
    return textwrap.dedent('\n'.join(file.read_text().splitlines()[first - 1:last])), first


class Elided:
    "Stands for a default that is too long for a signature."
    def __repr__(self): return '…'


class Reference:
    "The reference page of one module."
    def __init__(self, module: str, pages: list, known: dict):
        self.module, self.pages, self.known = module, pages, known
        self.mod = importlib.import_module(f'spherical_lfm.{module}')
        self.chapter = next(p for p in pages if module_of(p.name) == module)
        tree = ast.parse(inspect.getsource(self.mod))
        assigned = ((n, t) for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)) for t in getattr(n, 'targets', None) or [n.target])
        self.constants = {t.id: n for n, t in assigned if isinstance(t, ast.Name)}
        self.lines = inspect.getsource(self.mod).splitlines()
        self.without_example = []

    def parameters(self, obj) -> str:
        "Table of parameters, and what is returned."
        docs = {k: v for k, v in docments(obj, full=True, returns=True).items() if k not in ('self', 'cls')}
        returns = docs.pop('return', None)
        rows = ['| parameter | type | default | meaning |', '|---|---|---|---|'] if docs else []
        for name, d in docs.items(): rows.append(f'| `{name}` | {code_font(d["anno"])} | {self.default(d["default"])} | {escape(" ".join((d["docment"] or "").split()))} |')
        out = '\n'.join(rows) + '\n\n' if rows else ''
        if returns and (typed := code_font(returns['anno'])) + (said := escape(returns['docment'] or '')): out += f'**Returns** {typed} {said}\n\n'
        return out

    def default(self, value) -> str:
        "A default as it is written, long ones left out."
        if value is inspect.Parameter.empty: return ''
        text = getattr(value, '__name__', repr(value))
        return '`…`' if len(text) > 60 or text.startswith('<') else f'`{text}`'.replace('|', '\\|')

    def prose(self, obj) -> str:
        "A docstring, what it says of errors in a paragraph of its own."
        doc = ' '.join((inspect.getdoc(obj) or '').split())
        errors = ' '.join(re.findall(r'[Rr]aises [^.]*(?:\.\w[^.]*)*\.?', doc))
        rest = re.sub(r'[;,.]?\s*[Rr]aises [^.]*(?:\.\w[^.]*)*\.?', '.', doc).strip(' .')
        return f'{escape(rest)}.\n\n' + (f'**Errors** {escape(errors.removeprefix("Raises ").removeprefix("raises "))}\n\n' if errors else '')

    def example(self, name: str) -> str:
        "A use of the name: from its own chapter, from another one, or else from the package or the tests."
        for page in [self.chapter, *(p for p in self.pages if p is not self.chapter)]:
            for code, language, section in page.examples(name)[:1]:
                return f'**Example** from [{page.title}](../{page_of(page.name)}.ipynb{f"#{section}" if section else ""})\n\n```{language}\n{code.rstrip()}\n```\n\n'
        for file in [*sorted((ROOT/'spherical_lfm').rglob('[a-z]*.py')), *sorted((ROOT/'scripts').glob('*.py')), *sorted((ROOT/'tests').glob('*.py'))]:
            if found := use(name, file):
                code, line = found
                where = file.relative_to(ROOT).as_posix()
                place = source_link(where, f'#L{line}')
                return f'**In use** in {place}\n\n```python\n{code}\n```\n\n'
        self.without_example.append(name)
        return ''

    def source(self, obj) -> str:
        "Link to the lines on the repository."
        lines, start = inspect.getsourcelines(obj)
        span = f'#L{start}-L{start + len(lines) - 1}'
        return source_link(file_of(self.module).relative_to(ROOT).as_posix(), span, 'Source in the repository') + '\n'

    def signature(self, name: str, obj) -> str:
        "Name with parameters, types and defaults; a long default is left out."
        parameters = [p.replace(annotation=inspect.Parameter.empty) for n, p in inspect.signature(obj).parameters.items() if n not in ('self', 'cls')]
        parameters = [p.replace(default=Elided()) if p.default is not p.empty and (len(repr(p.default)) > 40 or callable(p.default)) else p for p in parameters]
        return f'{name}{inspect.Signature(parameters)}'

    def entry(self, name: str) -> str:
        "One exported name."
        obj = getattr(self.mod, name)
        if name in self.constants and not inspect.isfunction(obj):
            node = self.constants[name]
            comment = self.lines[node.lineno - 2].partition('#:')[2]
            code = '\n'.join(self.lines[node.lineno - 1:node.end_lineno])
            return f'````{{py:data}} {name}\n:module: spherical_lfm.{self.module}\n\n{escape(comment.strip())}\n\n```python\n{code}\n```\n````\n\n'
        if inspect.isclass(obj):
            body = f'`````{{py:class}} {self.signature(name, obj)}\n:module: spherical_lfm.{self.module}\n\n{self.prose(obj)}{self.parameters(obj)}{self.example(name)}{self.source(obj)}\n'
            for m, f in public_methods(obj).items():
                if isinstance(f, property): body += f'````{{py:property}} {m}\n\n{self.prose(f.fget)}````\n\n'
                else:
                    plain = getattr(f, '__func__', f)
                    body += f'````{{py:method}} {self.signature(m, plain)}\n{":classmethod:" if isinstance(f, classmethod) else ""}\n\n{self.prose(plain)}{self.parameters(plain)}````\n\n'
            return body + '`````\n\n'
        return f'`````{{py:function}} {self.signature(name, obj)}\n:module: spherical_lfm.{self.module}\n\n{self.prose(obj)}{self.parameters(obj)}{self.example(name)}{self.source(obj)}`````\n\n'

    def write(self):
        "Write the page for Sphinx."
        names = [n for n in self.mod.__all__ if getattr(getattr(self.mod, n), '__module__', self.mod.__name__) == self.mod.__name__]
        text = f'# spherical_lfm.{self.module}\n\n> {self.chapter.description}\n\nTaught in [{self.chapter.title}](../{page_of(self.chapter.name)}.ipynb).\n\n```{{py:module}} spherical_lfm.{self.module}\n```\n\n'
        (PAGES/'api'/f'{self.module}.md').write_text(text + ''.join(map(self.entry, names)))


def toctree(caption: str | None, entries: list) -> str:
    "A hidden part of the sidebar."
    return '```{toctree}\n:hidden:\n' + (f':caption: {caption}\n' if caption else '') + '\n' + '\n'.join(entries) + '\n```\n\n'


def build(strict: bool = True) -> int:
    "Write the pages, render them, and say how many there are; with `strict` every warning is an error."
    for left in (PAGES, RENDERED): shutil.rmtree(left, ignore_errors=True)
    (PAGES/'api').mkdir(parents=True)
    known, sections = exported(), sidebar()
    pages = [Page(name, known) for _, names in sections for name in names]
    numbered = {p.name: f'{p.name[:2]} {p.title} <{page_of(p.name)}>' if p.name[:2].isdigit() else page_of(p.name) for p in pages}
    trees = toctree(None, ['Start <self>']) + ''.join(toctree(section, [numbered[n] for n in names]) for section, names in sections[1:])
    trees += toctree('Reference', [f'api/{m}' for m in MODULES])
    for page in pages: page.write(trees if page.name == 'index' else '')
    references = [Reference(m, pages, known) for m in MODULES]
    for r in references: r.write()
    shutil.copytree(ROOT/'nbs'/'images', PAGES/'images')
    descriptions = {page_of(p.name): html.escape(p.description, quote=True) for p in pages} | {f'api/{m}': f'Reference of spherical_lfm.{m}: signatures, parameters, errors, examples, source.' for m in MODULES}
    with patch_docutils(ROOT/'scripts'/'site'), docutils_namespace():
        app = Sphinx(PAGES, ROOT/'scripts'/'site', RENDERED, ROOT/'build'/'doctrees', 'html', confoverrides={'descriptions': descriptions}, freshenv=True, warningiserror=strict, status=None, parallel=2)
        app.build()
    shutil.rmtree(OUT, ignore_errors=True)
    shutil.move(RENDERED, OUT)
    missing = [f'{r.module}.{n}' for r in references for n in r.without_example]
    if missing: print('no example in any notebook:', ', '.join(missing))
    print(f'{len(pages) + len(references)} pages in {OUT.relative_to(ROOT)}')
    return app.statuscode


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--lenient', action='store_true', help='let warnings pass')
    sys.exit(build(not parser.parse_args().lenient))
