"""Sphinx settings of the site; `build_docs.py` writes the pages."""
import configparser
import re
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
settings = configparser.ConfigParser(delimiters=['='])
settings.read(ROOT/'settings.ini')
settings = settings['DEFAULT']

project = settings['title']
author = settings['author']
project_copyright = settings['copyright']
version = release = settings['version']
language = 'en'

extensions = ['myst_nb', 'sphinx.ext.viewcode', 'sphinx_copybutton']
nb_execution_mode = 'off'  # outputs are those stored in the notebooks
nb_mime_priority_overrides = [('html', 'text/html', 5), ('html', 'image/svg+xml', 6)]
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'deflist']
myst_dmath_double_inline = True
myst_heading_anchors = 4
suppress_warnings = ['mystnb.unknown_mime_type']
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!spherical_lfm\.).*')]  # types of other libraries in signatures

html_theme = 'furo'
html_title = f'{project} {version}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_show_sourcelink = False
html_favicon = '_static/favicon.svg'
html_theme_options = {'top_of_page_buttons': []}
if settings.getboolean('published', fallback=False):
    html_theme_options |= {'source_repository': settings['git_url'], 'source_branch': settings['branch'], 'source_directory': 'nbs/'}
pygments_style, pygments_dark_style = 'a11y-high-contrast-light', 'a11y-high-contrast-dark'
copybutton_exclude = '.linenos, .gp, .go'
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
viewcode_line_numbers = True


def mathml(tex: str, display: str) -> str:
    "MathML of a formula, with letters of other alphabets as characters: browsers ignore the attribute that would style them."
    tex = re.sub(r'\\(mathbb|mathcal)\s+(\w)', r'\\\1{\2}', tex)
    tex = re.sub(r'\\[bB]ig(?=\\[lr]Vert)', '', tex)
    return ' '.join(convert(tex, display=display).split())


def inline_math(self, node):
    "A formula in running text, as MathML: browsers draw it without a script."
    self.body.append(mathml(node.astext(), 'inline'))
    raise SkipNode


def display_math(self, node):
    "A formula of its own line."
    self.body.append(f'<div class="math-block" tabindex="0">{mathml(node.astext(), "block")}</div>')
    raise SkipNode


def describe(app, pagename, templatename, context, doctree):
    "The description that search engines show: the line under the title."
    context['metatags'] = context.get('metatags', '') + f'<meta name="description" content="{app.config.descriptions.get(pagename, settings["description"])}" />'


def setup(app):
    app.add_html_math_renderer('mathml', inline_renderers=(inline_math, None), block_renderers=(display_math, None))
    app.add_config_value('descriptions', {}, 'html')
    app.connect('html-page-context', describe)


html_math_renderer = 'mathml'
