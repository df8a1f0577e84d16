"""Hooks of mkdocs. The site has the tree of the repository, so that one relative link works on a forge and in the site;
formulas become MathML, which browsers show without a script."""

import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*.md", "results/*.md", "results/bench/*.md")
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
PLACES = {"results/README.md": "results/overview/index.html"}  # results/index.html is a file of its own


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The Markdown pages of the repository, and whatever files they link to, at the paths that they have there."""
    for file in files.documentation_pages():
        files.remove(file)
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    linked = {(page.parent / target).resolve() for page in pages for target in LINK.findall(page.read_text("utf8"))}
    for path in sorted(pages | {path for path in linked if path.is_file() and path.is_relative_to(ROOT)}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=PLACES.get(name)))
    return files


def on_page_content(html: str, **_: object) -> str:
    return FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    formula = unescape(match[2])
    if match[1] == "span":
        return convert(formula)
    return f'<div class="formula">{convert(formula, display="block")}</div>'
