"""SGLang's source as text: what a name in it is, without importing it. Of the installation beside us, or of a wheel."""

import ast
import zipfile
from collections.abc import Callable, Collection, Iterator
from functools import cache, cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import Self

from sglang.srt.mezo.core.errors import ConfigError

_MOST_STEPS = 20  # of a name that one module has from the next
_FIELDS = "sglang/srt/arg_groups/fields/"

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.expr | None


class UpstreamSource:
    """Modules of one version of SGLang.

    Args:
        version: as its metadata says.
        read: the text of a file by its path, such as ``sglang/srt/utils/__init__.py``; None where there is none.
        paths: of all files.
    """

    def __init__(self, version: str, read: Callable[[str], str | None], paths: Collection[str]):
        self.version = version
        self._read = read
        self._paths = paths
        self._tree = cache(self._parse)

    @classmethod
    def installed(cls) -> Self:
        found = distribution("sglang")
        root = Path(str(found.locate_file("")))

        def read(path: str) -> str | None:
            return (root / path).read_text(encoding="utf-8") if (root / path).is_file() else None

        return cls(found.version, read, [str(path) for path in found.files or ()])

    @classmethod
    def of_wheel(cls, path: Path) -> Self:
        try:
            wheel = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ConfigError("against", str(path), f"a wheel that can be read ({error})") from error
        if path.name.count("-") < 2:
            raise ConfigError("against", str(path), "a wheel by its own name, such as sglang-0.5.23-py3-none-any.whl")
        names = set(wheel.namelist())

        def read(name: str) -> str | None:
            return wheel.read(name).decode() if name in names else None

        return cls(path.name.split("-")[1], read, names)

    def signature(self, module: str, name: str) -> str | None:
        """What a name of a module is, in words; None where it is not there.

        The parameters of a function, or "class", "property", "module", "value".

        A dot leads to a member of a class, one that a base class has, or that a method gives to ``self``.
        """
        if not name:
            return None if self._tree(module) is None else "module"
        found = self._find(module, name, _MOST_STEPS)
        if found is None and name in (f"ServerArgs.{field}" for field in self._assembled):
            return "value"
        return None if found is None else _described(found[1])

    @cached_property
    def _assembled(self) -> set[str]:
        """Fields of ServerArgs that SGLang puts together from several files."""
        files = [path for path in self._paths if path.startswith(_FIELDS) and path.endswith(".py")]
        bodies = [node for path in files for node in ast.walk(ast.parse(self._read(path) or ""))]
        return {
            node.target.id for node in bodies if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }

    def _parse(self, module: str) -> tuple[ast.Module, bool] | None:
        """The module, and whether it is a package."""
        path = module.replace(".", "/")
        for file, is_package in ((f"{path}/__init__.py", True), (f"{path}.py", False)):
            if (text := self._read(file)) is not None:
                return ast.parse(text), is_package
        return None

    def _find(self, module: str, name: str, steps: int) -> tuple[str, Definition] | None:
        """The module that has a definition, and the definition."""
        first, _, rest = name.partition(".")
        parsed = self._tree(module)
        if parsed is None and self._tree(f"{module}.{first}") is not None:  # of a folder without __init__.py
            return f"{module}.{first}", None
        if parsed is None or steps == 0:
            return None
        found = self._in_module(module, *parsed, first, steps)
        if found is None or not rest:
            return found
        home, owner = found
        return self._member(home, owner, rest, steps) if isinstance(owner, ast.ClassDef) else None

    def _in_module(
        self, module: str, tree: ast.Module, is_package: bool, name: str, steps: int
    ) -> tuple[str, Definition] | None:
        for node in _statements(tree.body):
            if _defines(node, name):
                return module, _definition(node)
            if isinstance(node, ast.ImportFrom):
                source = _absolute(module, is_package, node)
                for alias in node.names:
                    if alias.name == "*" and (found := self._find(source, name, steps - 1)) is not None:
                        return found
                    if (alias.asname or alias.name) == name:
                        if (found := self._find(source, alias.name, steps - 1)) is not None:
                            return found
                        if self._tree(f"{source}.{alias.name}") is not None:
                            return module, None
                        if not source.startswith("sglang"):
                            return module, None
        return (module, None) if self._tree(f"{module}.{name}") is not None else None

    def _member(self, module: str, owner: ast.ClassDef, name: str, steps: int) -> tuple[str, Definition] | None:
        for node in _statements(owner.body):
            if _defines(node, name):
                return module, _definition(node)
        for node in ast.walk(owner):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == name:
                return module, None
        for base in owner.bases:
            if isinstance(base, ast.Name) and (found := self._find(module, f"{base.id}.{name}", steps - 1)) is not None:
                return found
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Also those under conditions, such as the try of an import."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, field, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _defines(node: ast.stmt, name: str) -> bool:
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return node.name == name
        case ast.Assign():
            return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
        case ast.AnnAssign():
            return isinstance(node.target, ast.Name) and node.target.id == name
        case _:
            return False


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    above = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*above, *([node.module] if node.module else [])])


def _definition(statement: ast.stmt) -> Definition:
    """What a statement that ``_defines`` a name gives it."""
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        return statement.value
    assert isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    return statement


def _described(node: Definition) -> str:
    match node:
        case ast.ClassDef():
            return "class"
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            if any(isinstance(one, ast.Name) and one.id.endswith("property") for one in node.decorator_list):
                return "property"
            return _parameters(node.args)
        case _:
            return "value"


def _parameters(arguments: ast.arguments) -> str:
    """Names alone, with = where there is a default: what a caller depends on."""
    placed = [*arguments.posonlyargs, *arguments.args]
    first_default = len(placed) - len(arguments.defaults)
    names = [f"{one.arg}=" if index >= first_default else one.arg for index, one in enumerate(placed)]
    if arguments.vararg is not None:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    names += [
        one.arg if default is None else f"{one.arg}="
        for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults)
    ]
    if arguments.kwarg is not None:
        names.append(f"**{arguments.kwarg.arg}")
    return f"({', '.join(names)})"
