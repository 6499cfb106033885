"""Tests of the documentation site: it is complete, has no broken links, and loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

import pytest

from scripts.docs_site import with_site_links
from tests.support.servers import REPOSITORY

OUTSIDE_DOCS = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "LICENSE", "mkdocs.yml"),
    *("scripts/docs_site.py", "scripts/draw_pictures.py"),
)


def build(root: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(output)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("site")
    built = build(REPOSITORY, output)
    assert built.returncode == 0, built.stderr
    return output


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the documentation that a test may break."""
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    for name in OUTSIDE_DOCS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


class Loaded(HTMLParser):
    """The resources that a browser fetches for a page, and the links of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.leads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a":
            self.leads.append(given.get("href") or "")
        elif tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(given.get("href") or "")
        elif given.get("src"):
            self.fetched.append(given["src"] or "")


def read(page: Path) -> Loaded:
    parser = Loaded()
    parser.feed(page.read_text(encoding="utf-8"))
    return parser


def test_site_loads_nothing_from_other_hosts(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    fetched = {target for page in pages for target in read(page).fetched}
    assert any(target.endswith(".css") for target in fetched)
    assert {target for target in fetched if "//" in target} == set()
    styles = " ".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*|@import[^;]*", styles) == []


def test_every_file_that_a_page_links_to_exists(site: Path) -> None:
    missing = [
        (page.name, target)
        for page in site.glob("*.html")
        if page.name != "404.html"  # Its links start with the address of the published site.
        for target in (*read(page).fetched, *read(page).leads)
        if target and "//" not in target and not target.startswith(("#", "mailto:", "data:"))
        if not (page.parent / target.partition("#")[0]).exists()
    ]
    assert missing == []


def test_readme_is_the_first_page_and_links_to_the_others(site: Path) -> None:
    leads = read(site / "index.html").leads
    assert "kvdistill" in (site / "index.html").read_text(encoding="utf-8")
    assert {"guide.html", "guide.zh.html", "configuration.html", "contributing.html", "license.html"} <= set(leads)


def test_broken_links_and_pages_outside_the_navigation_fail_the_build(copy: Path) -> None:
    page = copy / "docs" / "data.md"
    broken = "[gone](nowhere.md) [gone](guide.md#no-such-part)"
    page.write_text(f"{page.read_text(encoding='utf-8')}\n{broken}\n", encoding="utf-8")
    (copy / "docs" / "orphan.md").write_text("# Orphan\n", encoding="utf-8")
    built = build(copy, copy / "site")
    assert built.returncode != 0
    assert "'nowhere.md', but the target is not found" in built.stderr
    assert "does not contain an anchor '#no-such-part'" in built.stderr
    assert "orphan.md" in built.stderr


@pytest.mark.parametrize(
    ("written", "folder", "on_site"),
    [
        ("[a](docs/guide.md#x)", ".", "[a](guide.md#x)"),
        ("![a](docs/demo.png)", ".", "![a](demo.png)"),
        ('<img src="docs/demo.png" width="9">', ".", '<img src="demo.png" width="9">'),
        ("[a](CHANGELOG.md)", ".", "[a](changelog.md)"),
        ("[a](../CONTRIBUTING.md#check)", "docs", "[a](contributing.md#check)"),
        ("[a](../LICENSE)", "docs", "[a](license.md)"),
        ("[![a](docs/demo.png)](docs/guide.md)", ".", "[![a](demo.png)](guide.md)"),
        ("[a](../Makefile), [b](../scripts)", "docs", "a, b"),
        ("[a](../nowhere.txt)", "docs", "[a](../nowhere.txt)"),
        ("[a](https://docs/x.md)", ".", "[a](https://docs/x.md)"),
        ("`[a](docs/guide.md)`", ".", "`[a](docs/guide.md)`"),
        ("```\n[a](docs/guide.md)\n```", ".", "```\n[a](docs/guide.md)\n```"),
    ],
)
def test_links_are_rewritten_for_the_site(written: str, folder: str, on_site: str) -> None:
    assert with_site_links(written, PurePosixPath(folder)) == on_site
