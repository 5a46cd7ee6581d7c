"""Every relative link and every anchor of the pages leads somewhere, and docs/README.md names every page."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + DOCS


def text_of(page: Path) -> str:
    """Without code, in which brackets are no links and # begins a comment."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)`[^`\n]*`(?!`)", lambda code: re.sub(r"[\[\]()]", "", code[0]), prose)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, no punctuation, hyphens for spaces, a number behind one that is taken."""
    found, taken = set(), Counter()
    for title in re.findall(r"^#{1,6} (.+)$", text_of(page), re.MULTILINE):
        title = re.sub(r"\]\(.*?\)", "", title)  # of a link its text
        name = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
        found.add(f"{name}-{taken[name]}" if taken[name] else name)
        taken[name] += 1
    return found


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if "://" not in link]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent == ROOT else f"docs/{page.name}")
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}: there is no such file"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}: there is no such heading"


def test_links_are_found():
    """The pages are written with links that the expression above finds."""
    assert sum(len(links(page)) for page in PAGES) > 60
    assert "building-the-extension" in anchors(ROOT / "docs" / "kernels.md")


def test_the_index_names_every_page():
    named = {link.partition("#")[0] for link in links(ROOT / "docs" / "README.md")}
    assert {page.name for page in DOCS} - {"README.md"} <= named


def test_every_picture_is_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page) if link.endswith(".png")}
    assert {path.resolve() for path in (ROOT / "docs").rglob("*.png")} == shown
