"""The pages: README is one page, links lead somewhere, and what is named is there."""

import ast
import importlib.util
import re
import runpy

import pytest

from docs_blocks import HOW_TO, ROOT, blocks

RUN = {"quickstart", "server", "two commands", "tunings", "weights in a server", "prefix in a server"}
"""Groups of blocks: the first runs in test_packaging, the others in test_docs_run."""
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
MOST_LINES, MOST_COLUMNS = 170, 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    targets = [match[1] for match in LINK.finditer(page.read_text(encoding="utf-8"))]
    lost = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert lost == []


def test_the_readme_is_one_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > MOST_COLUMNS and not line.startswith("|")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_that_a_page_names_are_there(page):
    named = re.findall(
        r"(?:bash|python) ((?:scripts|examples|benchmarks)/[\w/]+\.(?:sh|py))", page.read_text(encoding="utf-8")
    )
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_what_programs_import_of_the_package_is_there():
    """Also inside of their functions; nobody else looks at a benchmark until it is run."""
    missing = []
    for path in (path for folder in ("benchmarks", "examples", "scripts") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.srt.mezo"):
                module = importlib.import_module(node.module)
                missing += [
                    f"{path.name}: {node.module}.{one.name}" for one in node.names if not _has(module, one.name)
                ]
    assert missing == []


def test_modules_that_are_named_in_a_string_are_there():
    """As in a command line: nothing imports them."""
    named = re.compile(r"sglang\.srt\.mezo((?:\.[a-z]\w*)+)")
    paths = [path for folder in ("benchmarks", "examples", "scripts") for path in (ROOT / folder).rglob("*.[ps][yh]")]
    lost = {
        f"{path.name}: {match[0]}"
        for path in [*paths, *PAGES]
        for match in named.finditer(path.read_text(encoding="utf-8"))
        if not _leads_somewhere(match[1][1:].split("."))
    }
    assert lost == set()
    assert not _leads_somewhere(["cli"]) and _leads_somewhere(["core", "noise", "direction"])


def _leads_somewhere(names: list[str]) -> bool:
    """Through packages to a module, or to a name that is written in one."""
    place = ROOT / "python" / "sglang" / "srt" / "mezo"
    for name in names:
        if (place / name).is_dir():
            place /= name
        elif (place / f"{name}.py").is_file():
            place /= f"{name}.py"
        else:
            source = place if place.is_file() else place / "__init__.py"
            return re.search(rf"\b{name}\b", source.read_text(encoding="utf-8")) is not None
    return True


def test_what_benchmarks_import_of_each_other_is_there():
    modules = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "benchmarks").rglob("*.py")}
    missing = [
        f"{importer}: {node.module}.{one.name}"
        for importer, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in modules
        for one in node.names
        if one.name not in _names_in(modules[node.module])
    ]
    assert missing == []


def _names_in(module: ast.Module) -> set[str]:
    """What it has when it has been imported."""
    names = set()
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.ImportFrom | ast.Import):
            names.update(one.asname or one.name for one in statement.names)
        else:
            names.update(node.id for node in ast.walk(statement) if isinstance(node, ast.Name))
    return names


def _has(module, name: str) -> bool:
    return hasattr(module, name) or importlib.util.find_spec(f"{module.__name__}.{name}") is not None


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.name)
def test_every_block_is_run_by_a_test_or_says_why_not(page):
    reasons = {"not run: needs the hub", "not run: needs a GPU", *(f"run: {group}" for group in RUN)}
    assert [block.where for block in blocks(page) if block.mark not in reasons] == []


def test_the_page_of_the_api_is_what_the_routes_say():
    made = runpy.run_path(str(ROOT / "scripts" / "api_page.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "python scripts/api_page.py"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and f"({page.name})" not in index
    ] == []
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"- {page.name}" not in navigation] == []
