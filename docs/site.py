"""MkDocs hook: the site's pages are the repository's, under the same paths, so that relative links hold in both.

Pages are the Markdown files that are documentation. Whatever else of the repository they link to, as a source file or a
picture, is copied beside them; folders, for which a site has no page, become plain text.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = (
    "*.md",
    "docs/*.md",
    "docs/behaviors/*.md",
    "recipes/README.md",
    "benchmarks/README.md",
    "benchmarks/results/**/README.md",
    "lightning_mics/*/README.md",
)
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()#\s]+)(#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of ``docs_dir`` by those of the repository; what the theme has added stays."""
    own = {path.relative_to(ROOT).as_posix() for pattern in PAGES for path in ROOT.glob(pattern)}
    linked = {target for page in own for target in _targets(ROOT / page) if (ROOT / target).is_file()}
    kept = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*kept, *(_file(path, config) for path in sorted(own | linked))])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take away links to folders that have no page."""
    folder = (ROOT / page.file.src_uri).parent

    def resolve(link: re.Match[str]) -> str:
        return link[1] if (folder / link[2]).is_dir() else link[0]

    return _LINK.sub(resolve, markdown)


def _targets(page: Path) -> set[str]:
    """What a page links to inside the repository."""
    links = (page.parent / link for _, link, _ in _LINK.findall(page.read_text()) if "://" not in link)
    return {str(link.resolve().relative_to(ROOT)) for link in links if link.resolve().is_relative_to(ROOT)}


def _file(path: str, config: MkDocsConfig) -> File:
    return File(path, str(ROOT), config.site_dir, config.use_directory_urls)
