"""The code a child gets: complete, free of our own dependencies, and in the language of the oldest Python."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.isolation.archive import HARNESS_FILES, code_archive, shipped

#: Oldest Python that a foreign environment may have.
OLDEST = (3, 9)

#: Run by our own interpreter alone, which is at least 3.10, or by an environment that asks for as much.
NEWER_ONLY = ("backends/torch_eager/", "backends/triton_cuda/", "backends/mlx_rwkv/")

#: Started by a child, or by the far end of a connection to a host; what they import must be in the archive.
ENTRIES = {"harness/isolation/worker.py": {"numpy"}, "harness/isolation/far.py": {"numpy", "packaging"}}

#: Names that came after 3.9, by what they are an attribute of or are imported from; None: builtins.
NEWER: dict[str | None, set[str]] = {
    None: {"aiter", "anext", "ExceptionGroup", "BaseExceptionGroup", "EncodingWarning"},
    "itertools": {"pairwise", "batched"},
    "contextlib": {"aclosing", "chdir"},
    "enum": {"StrEnum", "verify", "member", "nonmember"},
    "datetime": {"UTC"},
    "inspect": {"get_annotations"},
    "types": {"NoneType", "EllipsisType", "UnionType"},
    "typing": {"TypeAlias", "ParamSpec", "Concatenate", "TypeGuard", "Self", "Never", "assert_never", "override"},
    "sys": {"stdlib_module_names", "orig_argv", "exception"},
    "math": {"cbrt", "exp2", "sumprod"},
    "hashlib": {"file_digest"},
    "statistics": {"covariance", "correlation", "linear_regression"},
}
NEW_MODULES = {"tomllib"}


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_file_is_in_the_language_of_the_oldest_python(name: str) -> None:
    text = shipped()[name].read_text(encoding="utf-8")
    tree = ast.parse(text, name, feature_version=OLDEST)
    assert name.startswith(NEWER_ONLY) or list(newer(tree)) == []
    if text.strip().startswith('"""') and any(isinstance(node, (ast.FunctionDef, ast.AnnAssign)) for node in tree.body):
        assert "from __future__ import annotations" in text


def newer(tree: ast.AST) -> Iterator[str]:
    """What only a newer Python can run, by line."""
    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Match):
            yield line + "match"
        if isinstance(node, ast.Call):
            yield from (line + what for what in _new_arguments(node))
        if isinstance(node, ast.ImportFrom):
            yield from (line + a.name for a in node.names if a.name in NEWER.get(node.module or "", ()))
        if isinstance(node, ast.Attribute) and node.attr in NEWER.get(_type_name(node.value), ()):
            yield line + node.attr
        if isinstance(node, ast.Name) and node.id in NEWER[None]:
            yield line + node.id
    # Annotations are text; a union of types anywhere else is evaluated.
    for node in _evaluated(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            sides = {_type_name(node.left), _type_name(node.right)}
            if sides & {"None", "int", "str", "float", "bool", "bytes", "list", "dict", "tuple", "Path"}:
                yield f"line {node.lineno}: a union of types at run time"


def _new_arguments(node: ast.Call) -> Iterator[str]:
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    for keyword in node.keywords:
        known = {"zip": {"strict"}, "dataclass": {"slots", "kw_only", "match_args"}, "field": {"kw_only"}}
        if keyword.arg in known.get(called, set()):
            yield f"{called}({keyword.arg}=)"
        if called in ("bisect", "insort", "bisect_left", "bisect_right") and keyword.arg == "key":
            yield f"{called}(key=)"


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those of annotations."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from _evaluated(child)


def _type_name(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    "text",
    [
        "zip(a, b, strict=True)",
        "@dataclass(frozen=True, slots=True)\nclass A: ...",
        "x: int = isinstance(3, int | str)",
        "Optional = int | None",
        "import itertools\nitertools.pairwise(x)",
        "from itertools import pairwise",
        "def f():\n    match x:\n        case 1: ...",
    ],
)
def test_the_check_sees_what_is_newer(text: str) -> None:
    assert list(newer(ast.parse(text)))


def test_the_check_lets_annotations_be() -> None:
    assert list(newer(ast.parse("def f(a: int | None, b=1 | 2) -> str | None:\n    x: int | str = a | b"))) == []


@pytest.mark.parametrize("entry", ENTRIES)
def test_everything_reachable_is_in_it(entry: str) -> None:
    """By imports at the top of files, which run when a child starts; of others, the standard library at most."""
    files = shipped()
    wanted, seen, foreign = [entry], set(), set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        assert name in files, f"{name} is imported, but not shipped"
        seen.add(name)
        for module in _top_imports(ast.parse(files[name].read_text(encoding="utf-8"))):
            parts = module.split(".")
            if parts[0] in ("harness", "reference", "backends"):
                wanted += _files_of(parts)
            elif parts[0] not in sys.stdlib_module_names:
                foreign.add(parts[0])
            assert parts[0] not in NEW_MODULES, name
    assert foreign <= ENTRIES[entry]


def _top_imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names imported when the file is, a ``try`` or ``if`` included; not those for type checkers only."""
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        inner = [node] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, (ast.Try, ast.If)):
            inner = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
        for found in inner:
            if isinstance(found, ast.Import):
                yield from (alias.name for alias in found.names)
            else:
                yield from (f"{found.module}.{alias.name}" for alias in found.names)


def _files_of(parts: list[str]) -> list[str]:
    """Files that importing ``a.b.c`` runs; the last part may be a name inside ``a/b.py``."""
    root = Path(__file__).parents[2]
    found = [f"{'/'.join(parts[:n])}/__init__.py" for n in range(1, len(parts) + 1)]
    found += [f"{'/'.join(parts[:n])}.py" for n in range(2, len(parts) + 1)]
    return [name for name in found if (root / name).is_file()]


def test_every_named_file_is_there_and_in_the_archive() -> None:
    assert len(set(HARNESS_FILES)) == len(HARNESS_FILES)
    with zipfile.ZipFile(code_archive()) as archive:
        assert sorted(archive.namelist()) == sorted(shipped())
        assert {f"harness/{name}" for name in HARNESS_FILES} <= set(archive.namelist())


@pytest.mark.parametrize("module", ["harness.isolation.worker", "harness.isolation.far"])
def test_it_runs_from_the_archive_alone(module: str) -> None:
    """With numpy and packaging, and none of the other packages that this project has here."""
    blocked = ("psutil", "rich", "threadpoolctl", "safetensors", "tokenizers", "tomli", "torch", "transformers")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); sys.path.insert(0, {str(code_archive())!r}); "
        f"import {module}; print({module}.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(code_archive()))
