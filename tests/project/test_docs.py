"""The site, without building it: every public name, page and command has its place."""

import re
from collections import Counter
from pathlib import Path

import embax
from embax.cli._main import app

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.relative_to(DOCS).with_suffix("").as_posix(): path.read_text("utf-8") for path in DOCS.rglob("*.md")}
PACKAGE = Path(embax.__file__).parent

# As `.. autofunction:: embax.lookup`.
DIRECTIVE = re.compile(r"^\.\. (?:auto|py:)\w+:: (embax[\w.]*)", re.MULTILINE)
# As `from ._lift import lift as lift`; a name of another package is documented there.
EXPORT = re.compile(r"^from \.(?!\.)\S+ import (\w+) as \1$", re.MULTILINE)
TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def documented():
    """How often each name has a directive in the pages of the API."""
    return Counter(name for page, text in PAGES.items() if page.startswith("api/") for name in DIRECTIVE.findall(text))


def exported():
    """The public names of each package, but those that have a shorter one."""
    for package in embax.__all__:
        init = PACKAGE / package / "__init__.py"
        for name in EXPORT.findall(init.read_text("utf-8")) if init.exists() else ():
            here = getattr(getattr(embax, package), name)
            if name not in embax.__all__ or getattr(embax, name) is not here:
                yield f"embax.{package}.{name}"


def test_each_public_name_is_documented_once():
    names = documented()
    assert {f"embax.{name}" for name in embax.__all__} - names.keys() == set()
    assert [name for name, times in names.items() if times > 1] == []


def test_each_name_of_a_package_is_documented():
    assert set(exported()) - documented().keys() == set()


def test_each_page_is_in_one_table_of_contents():
    listed = Counter()
    for page, text in PAGES.items():
        for tree in TOCTREE.findall(text):
            for line in tree.splitlines():
                if line and not line.startswith(":"):
                    target = re.sub(r".*<(.*)>", r"\1", line)
                    listed[(Path(page).parent / target).as_posix()] += 1
    assert listed == Counter(PAGES.keys() - {"index"})


def test_each_command_has_a_section():
    sections = re.findall(r"^## embax (\w+)$", PAGES["api/cli"], re.MULTILINE)
    assert sections == [command.name for command in app.registered_commands]


def test_each_page_with_code_cells_is_run():
    cells = {page for page, text in PAGES.items() if "```{code-cell}" in text}
    assert cells
    assert [page for page in cells if not PAGES[page].startswith("---\njupytext:")] == []


def test_files_that_contributing_names_exist():
    text = (DOCS.parent / "CONTRIBUTING.md").read_text("utf-8")
    files = re.findall(r"^\|[^|]*\| `([\w/]+\.py)` \|$", text, re.MULTILINE)
    assert len(files) == 10
    assert [name for name in files if not (PACKAGE / name).exists()] == []
