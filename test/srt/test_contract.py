"""The contract with SGLang: what we hook and call is in it, the installed version keeps it, other versions are told."""

import ast
import zipfile
from pathlib import Path

import pytest

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.engine.contract import Point, differences, points
from sglang.srt.mezo.engine.upstream_source import UpstreamSource

SOURCES = Path(__file__).resolve().parents[2] / "python" / "sglang" / "srt"
FILES = [*(SOURCES / "mezo").rglob("*.py"), *(SOURCES / "models").rglob("*.py")]
KNOWN = {(point.module, point.name) for point in points()}


def test_the_installed_version_keeps_the_contract():
    assert [str(difference) for difference in differences(UpstreamSource.installed())] == []


def imported() -> set[tuple[str, str]]:
    """What our files import of SGLang's."""
    nodes = [node for path in FILES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang.")]
    return {
        (node.module, alias.name)
        for node in froms
        if not node.module.startswith("sglang.srt.mezo")
        for alias in node.names
    }


def test_what_is_imported_is_in_the_contract():
    assert imported() - KNOWN == set()


def hooked() -> set[tuple[str, str]]:
    """What our files hook: Hook(module, attribute, ...), both of them literals or names of the file's."""
    found = set()
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Hook":
                module, attribute = (
                    names.get(part.id) if isinstance(part, ast.Name) else getattr(part, "value", None)
                    for part in node.args[:2]
                )
                if isinstance(module, str) and isinstance(attribute, str):
                    found.add((module, attribute))
    return found


def test_what_is_hooked_is_in_the_contract():
    found = hooked()
    assert len(found) > 40
    assert found - KNOWN == set()


def test_every_point_says_why():
    assert [point for point in points() if not point.why] == []


OLD = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/a.py": """
from sglang.srt.parts import Base, helper as renamed
from .parts.more import *
try:
    import fast
    LIMIT = 3
except ImportError:
    LIMIT = 4

class Thing(Base):
    size: int = 0

    def __init__(self, x, *args, deep=None, **kwargs):
        self.pool = x

    @property
    def width(self):
        return 1

    @staticmethod
    def make(a, /, b, c=1, *, d, e=2):
        return a

async def work(one, two=2):
    pass
""",
    "sglang/srt/parts/__init__.py": """
class Base:
    def run(self, batch):
        self.ran = batch

def helper(a):
    pass
""",
    "sglang/srt/parts/more.py": "def starred(z):\n    pass\n",
    "sglang/srt/folder/inner.py": "X = 1\n",
    "sglang/srt/arg_groups/fields/lora.py": "class Lora:\n    max_rank: int = 1\n",
    "sglang/srt/server_args.py": "class ServerArgs:\n    def resolve(self):\n        pass\n",
}


@pytest.fixture
def source(tmp_path) -> UpstreamSource:
    path = tmp_path / "sglang-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in OLD.items():
            wheel.writestr(name, text)
    return UpstreamSource.of_wheel(path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Thing", "class"),
        ("Thing.__init__", "(self, x, *args, deep=, **kwargs)"),
        ("Thing.width", "property"),
        ("Thing.make", "(a, b, c=, *, d, e=)"),
        ("Thing.size", "value"),
        ("Thing.pool", "value"),
        ("Thing.run", "(self, batch)"),
        ("Thing.ran", "value"),
        ("Thing.gone", None),
        ("work", "(one, two=)"),
        ("renamed", "(a)"),
        ("helper", None),
        ("starred", "(z)"),
        ("LIMIT", "value"),
        ("nothing", None),
        ("", "module"),
    ],
)
def test_what_a_name_is(source, name, what):
    assert source.version == "0.1.2"
    assert source.signature("sglang.srt.a", name) == what


def test_a_file_that_is_no_wheel_is_named(tmp_path):
    path = tmp_path / "sglang-0.1.2-py3-none-any.whl"
    path.write_text("not found")
    with pytest.raises(ConfigError, match="against=.* is not allowed: a wheel that can be read"):
        UpstreamSource.of_wheel(path)


def test_a_wheel_without_a_version_in_its_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "sglang.whl", "w") as wheel:
        wheel.writestr("sglang/__init__.py", "")
    with pytest.raises(ConfigError, match=r"against=.* is not allowed: a wheel by its own name"):
        UpstreamSource.of_wheel(tmp_path / "sglang.whl")


def test_what_lies_elsewhere(source):
    assert source.signature("sglang.srt.folder", "inner") == "value"
    assert source.signature("sglang.srt.folder", "outer") is None
    assert source.signature("sglang.srt.b", "Thing") is None and source.signature("sglang.srt.b", "") is None
    assert source.signature("sglang.srt.server_args", "ServerArgs.max_rank") == "value"
    assert source.signature("sglang.srt.server_args", "ServerArgs.min_rank") is None


def test_differences_are_told(source, monkeypatch):
    asked = [
        Point("sglang.srt.a", "work", "(one, two=)", "because"),
        Point("sglang.srt.a", "work", "(...)", "because"),
        Point("sglang.srt.a", "Thing.width", "value", "it is read, a property or not"),
        Point("sglang.srt.a", "work", "(one)", "it is called"),
        Point("sglang.srt.a", "Thing.gone", "value", "it is read"),
        Point("sglang.srt.a", "Thing", "(...)", "it is called"),
    ]
    monkeypatch.setattr("sglang.srt.mezo.engine.contract.points", lambda: asked)
    assert [str(difference) for difference in differences(source)] == [
        "sglang.srt.a.work is (one, two=) there, and (one) here: it is called",
        "sglang.srt.a.Thing.gone is not there: it is read",
        "sglang.srt.a.Thing is class there, and (...) here: it is called",
    ]
