"""Data flows one way: which package may import which, read from every file's imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("reference", "backends", "harness", "suites", "reports")

#: Package -> what it may import of the others; a value may name single modules.
ALLOWED: dict[str, tuple[str, ...]] = {
    "reference": ("reference",),
    "backends": ("reference", "backends.api", "backends.shared"),
    "harness": ("harness", "reference", "backends.api", "backends.index"),
    "reports": (
        *("reports", "harness.store", "harness.rows", "harness.stats", "reference.schemes"),
        *("harness.machine.known", "harness.roofline", "reference.config"),
    ),
    "suites": PACKAGES,
}

#: Third-party packages a folder may import anywhere; single files below may import more.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "reference": ("numpy",),
    "backends": ("numpy",),
    "harness": ("numpy", "packaging", "psutil", "rich", "threadpoolctl", "tomli"),
    "reports": ("rich",),
}

#: File, or folder apart from its __init__, -> more that it, and only it, may import.
EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "harness/commands/": ("reports",),  # the commands of the entry point join measuring and reporting
    "harness/isolation/archive.py": ("backends",),  # ships the package, imports nothing of it
    "harness/isolation/worker.py": ("backends",),  # checks where it comes from
    "harness/machine/work.py": ("torch",),  # the probe's, in a process of its own or the backend's
    "reports/heatmap.py": ("matplotlib",),
    "reports/plots.py": ("matplotlib",),
    # A command joins asking and answering, as the entry point does.
    "reports/command_report.py": ("harness", "backends.api", "reference.errors"),
    "reports/command_recommend.py": ("harness",),
    "reports/command_compare.py": ("harness", "reference.errors"),
    "reports/command_ab.py": ("harness", "reference.errors"),
    "reports/ab_work.py": ("harness",),
    "reports/verdict/": ("numpy", "reference.errors"),
    "reference/tokenizer_pile.py": ("tokenizers",),
    "backends/numpy_reference.py": ("threadpoolctl",),
    # Loaded by load() only; test_no_runtime_at_import holds the modules themselves to that.
    "backends/torch_eager/": ("torch",),
    "backends/triton_cuda/": ("torch", "triton"),
    "backends/shared/": ("torch", "transformers"),
    "backends/transformers_rwkv.py": ("torch", "transformers"),
    "backends/rwkv_pip.py": ("rwkv", "torch"),
    "backends/bigdl_llm.py": ("bigdl", "torch", "transformers"),
    "backends/ipex_llm_rwkv.py": ("ipex_llm", "torch", "transformers"),
    "backends/tvm_mlc/": ("tvm",),
    "backends/ncnn_rwkv/": ("ncnn", "pnnx", "torch"),
    "backends/mlx_rwkv/": ("mlx",),
    "backends/onnx_cpu/": ("onnx", "onnxruntime"),
    "backends/faster_rwkv.py": ("fasterrwkv",),
    "backends/rwkv_cpp.py": ("rwkv_cpp",),
}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def forbidden(path: Path) -> list[str]:
    """Imports of a file that its package must not have."""
    relative = path.relative_to(ROOT).as_posix()
    package = relative.split("/")[0]
    own = relative.removesuffix(".py").replace("/", ".")
    folder = "" if path.name == "__init__.py" else relative.rpartition("/")[0] + "/"
    more = (*EXCEPTIONS.get(relative, ()), *EXCEPTIONS.get(folder, ()))
    ours = (*ALLOWED[package], *more)
    theirs = (*THIRD_PARTY.get(package, ()), *more)
    bad = []
    for name in imports(path):
        top = name.split(".")[0]
        if top in PACKAGES:
            inside = own.rsplit(".", 1)[0] + "." if own.count(".") > 1 else own  # a package backend's own files
            allowed = any(name == a or name.startswith(f"{a}.") for a in ours) or name.startswith(inside)
        else:
            allowed = top in sys.stdlib_module_names or package == "suites" or top in theirs
        if not allowed:
            bad.append(name)
    return bad


@pytest.mark.parametrize("package", PACKAGES)
def test_no_forbidden_arrow(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {path.relative_to(ROOT).as_posix(): bad for path in files if (bad := forbidden(path))}
    assert not wrong


def test_the_check_sees_a_forbidden_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    folder = tmp_path / "reference"
    folder.mkdir()
    (folder / "bad.py").write_text("def f():\n    import torch\n    from harness import cli\n")
    assert sorted(forbidden(folder / "bad.py")) == ["harness.cli", "torch"]


@pytest.mark.parametrize("name", ["harness.cli", "backends.torch_eager", "harness.run", "reference", "harness.listing"])
def test_no_runtime_at_import(name: str) -> None:
    """Importing never pulls a heavy runtime; only ``load`` does."""
    code = (
        f"import sys, {name}; print(*(m for m in ('torch', 'pandas', 'matplotlib', 'tokenizers') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
