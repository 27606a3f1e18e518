"""MkDocs hooks: links that lead out of docs/.

On GitHub `../launch/colab.ipynb` is a file of the repository. On the site there is none, so the file is carried along,
under repository/, and the link leads to it; sources get .txt behind their names, for browsers to show them. A link to
what is not there is left to MkDocs, which refuses it.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

# [text](target#anchor); no target of ours holds a bracket.
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
# What a browser shows, or offers to save, by its own name.
_SHOWN = (".json", ".ipynb", ".png", ".html", ".txt")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that pages link to."""
    for page in files.documentation_pages():
        for match in _LINK.finditer(page.content_string):
            path = _outside(match[2], page.src_uri, config)
            if path and not files.get_file_from_path(_carried(path)):
                source = str(_root(config) / path)
                files.append(
                    File.generated(
                        config, _carried(path), abs_src_path=source, inclusion=InclusionLevel.NOT_IN_NAV
                    )
                )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have these links lead to where the files were carried."""

    def turned(match: re.Match[str]) -> str:
        path = _outside(match[2], page.file.src_uri, config)
        if not path:
            return match[0]
        here = posixpath.dirname(page.file.src_uri)
        return match[1] + posixpath.relpath(_carried(path), here or ".") + match[3]

    return _LINK.sub(turned, markdown)


def _root(config: MkDocsConfig) -> Path:
    return Path(config.docs_dir).parent


def _outside(target: str, page: str, config: MkDocsConfig) -> str:
    """The path from the repository's root of a file that lies outside docs/; "" for every other link."""
    if not target.startswith("."):
        return ""
    docs = os.path.basename(config.docs_dir)
    path = posixpath.normpath(posixpath.join(docs, posixpath.dirname(page), target))
    inside = path.startswith((f"{docs}/", "../"))
    return "" if inside or not (_root(config) / path).is_file() else path


def _carried(path: str) -> str:
    return f"repository/{path}" if path.endswith(_SHOWN) else f"repository/{path}.txt"
