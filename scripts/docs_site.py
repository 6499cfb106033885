"""Hooks of mkdocs.yml: add pages for README, CONTRIBUTING, SECURITY, CHANGELOG and LICENSE, and generated pictures.

Run `python -m mkdocs build`; the command `mkdocs` does not find the modules of this repository.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.draw_pictures import pictures

ROOT = Path(__file__).resolve().parent.parent
# Files outside docs/, with their pages.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
}
# The text group is missing if it ends in an image.
_LINK = re.compile(r"(?P<text>\[[^\[\]]*)?\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages for files outside docs/, and the generated pictures."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        plain = f"# License\n\n```text\n{text}```\n"
        content = with_site_links(text, PurePosixPath()) if source.endswith(".md") else plain
        files.append(File.generated(config, page, content=content))
    for path, picture in pictures().items():
        files.append(File.generated(config, path, content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Converts links that leave docs/ into links within the site."""
    del config, files
    return markdown if page.file.generated_by else with_site_links(markdown, PurePosixPath("docs"))


def with_site_links(markdown: str, folder: PurePosixPath) -> str:
    """Converts the links of a page in `folder` to links within the site, except in code.

    A link to a repository file without a page becomes plain text, since the site does not contain the file.
    """
    pieces = _CODE.split(markdown)
    # Odd pieces are code.
    pieces[::2] = [_LINK.sub(lambda found: _link(found, folder), prose) for prose in pieces[::2]]
    text = "".join(pieces)
    return text.replace('<img src="docs/', '<img src="') if folder == PurePosixPath() else text


def _link(found: re.Match[str], folder: PurePosixPath) -> str:
    text, target, anchor = found["text"] or "", found["target"], found["anchor"] or ""
    path = None if ":" in target else _normal(folder / target)
    if path is None or not (ROOT / path).exists():
        return found[0]
    if path in PAGES:
        return f"{text}]({PAGES[path]}{anchor})"
    if path.startswith("docs/"):
        return f"{text}]({path.removeprefix('docs/')}{anchor})"
    return text[1:]


def _normal(path: PurePosixPath) -> str | None:
    """A path relative to the repository root, without `..`; None if it is outside."""
    parts: list[str] = []
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            return None
    return "/".join(parts)
