"""Hooks of mkdocs.yml: they add pages for README, CONTRIBUTING, CHANGELOG and LICENSE, and the pictures drawn by code.

`python -m mkdocs build` finds the modules of this repository; the command `mkdocs` alone does not.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from scripts.draw_pictures import pictures

ROOT = Path(__file__).resolve().parent.parent
# What stands beside docs/, and its page.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
}
# The text is missing where it ends in an image.
_LINK = re.compile(r"(?P<text>\[[^\[\]]*)?\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that stand beside docs/, and the pictures that are drawn for the site."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        plain = f"# License\n\n```text\n{text}```\n"
        content = with_site_links(text, PurePosixPath()) if source.endswith(".md") else plain
        files.append(File.generated(config, page, content=content))
    for path, picture in pictures().items():
        files.append(File.generated(config, path, content=picture))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns a page's links out of docs/ into links within the site."""
    del config, files
    return markdown if page.file.generated_by else with_site_links(markdown, PurePosixPath("docs"))


def with_site_links(markdown: str, folder: PurePosixPath) -> str:
    """A page of `folder` with its links as the site has them; what stands in code stays.

    Links to files of the repository that are no pages become their text: the site has no copy of them.
    """
    pieces = _CODE.split(markdown)
    # Odd pieces are the code between.
    pieces[::2] = [_LINK.sub(lambda found: _link(found, folder), prose) for prose in pieces[::2]]
    text = "".join(pieces)
    return text.replace('<img src="docs/', '<img src="') if folder == PurePosixPath() else text


def _link(found: re.Match[str], folder: PurePosixPath) -> str:
    text, target, anchor = found["text"] or "", found["target"], found["anchor"] or ""
    place = None if ":" in target else _normal(folder / target)
    if place is None or not (ROOT / place).exists():
        return found[0]
    if place in PAGES:
        return f"{text}]({PAGES[place]}{anchor})"
    if place.startswith("docs/"):
        return f"{text}]({place.removeprefix('docs/')}{anchor})"
    return text[1:]


def _normal(path: PurePosixPath) -> str | None:
    """A path from the repository's root, without `..`; None outside of it."""
    parts: list[str] = []
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
        else:
            return None
    return "/".join(parts)
