"""The documentation: what it shows runs, and what it names exists."""

import ast
import re
from pathlib import Path

import pytest

import mbnorm

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```python([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = "no-run"


def blocks_of(page):
    """Return the code blocks of a page, each with what follows the language on its first line."""
    text = page.read_text(encoding="utf-8")
    # lines before it, so that a traceback names the page's line
    return [
        (match[1].split(), "\n" * text[: match.start(2)].count("\n") + match[2])
        for match in FENCE.finditer(text)
    ]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in PAGES if blocks_of(page)]


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page != README], ids=name_of)
def test_the_blocks_of_a_page_run_in_their_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for options, code in blocks_of(page):
        program = compile(code, page, "exec")
        if NOT_RUN not in options:
            exec(program, names)


@pytest.mark.parametrize("code", [code for _, code in blocks_of(README)])
def test_each_block_of_the_readme_runs_by_itself(code):
    exec(compile(code, README, "exec"), {})


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_what_is_not_run_names_what_exists(page):
    for options, code in blocks_of(page):
        assert set(options) <= {NOT_RUN}
        if NOT_RUN in options:
            # mbnorm's own names, whatever else the block needs
            names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
            own = [n.attr for n in names if isinstance(n.value, ast.Name) and n.value.id == "mbnorm"]
            assert [name for name in own if not hasattr(mbnorm, name)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def anchors_of(page):
    """Return the anchors of a page's headings, as GitHub and the documentation make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    words = (re.sub(r"[^\w -]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {line.replace(" ", "-") for line in words}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_to_a_heading_lead_to_one(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+#[^)\s]+)\)", text)]
    local = [(page.parent / target if target else page, name) for target, _, name in links]
    assert [f"{to}#{name}" for to, name in local if to.exists() and name not in anchors_of(to)] == []


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r":: mbnorm\.(\w+)", page))
    assert set(mbnorm.__all__) - shown == set()


OTHER_WORDS = "|".join(
    [
        *("whoever", "told", "alike", "is worth", "are worth", "weighs", "for good", "for ever", "mends?"),
        *("off by(?! default)", "the past(?! statistics)"),
    ]
)
"""Words for what the glossary names, or that a reader may take for something else."""


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_pages_use_the_words_of_the_glossary(page):
    assert re.findall(rf"\b(?:{OTHER_WORDS})\b", page.read_text(encoding="utf-8")) == []


def test_the_readme_fits_on_a_page():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120


def test_blocks_keep_their_options_and_line_numbers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n```python no-run\nimport absent\n```\n")
    assert blocks_of(page) == [([], "\n\n\nx = 1\n"), ([NOT_RUN], "\n" * 7 + "import absent\n")]
