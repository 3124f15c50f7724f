"""Pages name what is there: files, tests, and the layers that imports keep to. Each package has a page."""

import re
from pathlib import Path

import pytest
from test_layers import LAYERS

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in (ROOT / "sagellm").glob("*/__init__.py"))
DESIGN = ROOT / "docs" / "design.md"
PAGES = [DESIGN, *(package / "README.md" for package in PACKAGES)]
LINES = 50
"""Of a package's page, at most."""

FILE = re.compile(r"`([\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|c|md|mlir|yaml|toml)))`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
TEST = re.compile(r"`(test_\w+)`")


def named(page: Path) -> set[str]:
    return set(FILE.findall(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_a_package_has_a_page_that_names_its_files(package):
    page = package / "README.md"
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    assert not files - named(page), f"{page.relative_to(ROOT)} leaves out files"
    assert len(page.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_a_page_names_is_there(page):
    beside = (page.parent, ROOT / "sagellm", ROOT)
    missing = {name for name in named(page) if not any((folder / name).exists() for folder in beside)}
    links = LINK.findall(page.read_text(encoding="utf-8"))
    missing |= {link for link in links if not (page.parent / link).exists()}
    assert not missing


def test_tests_that_pages_name_are_there():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)\(", text))
    for page in PAGES:
        assert not set(TEST.findall(page.read_text(encoding="utf-8"))) - defined, page


def test_the_page_has_the_layers_that_imports_keep_to():
    block = DESIGN.read_text(encoding="utf-8").partition("```layers\n")[2].partition("```")[0]
    shown = [set(line.split()) for line in reversed(block.splitlines())]
    assert shown == [{name for name in layer if not name.startswith("__")} for layer in LAYERS]


def test_the_design_page_leads_to_every_package():
    links = set(LINK.findall(DESIGN.read_text(encoding="utf-8")))
    assert {f"../sagellm/{package.name}/README.md" for package in PACKAGES} <= links
