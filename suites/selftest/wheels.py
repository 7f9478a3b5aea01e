"""Wheels made by hand, so that environments are really built and nothing is fetched."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

#: Stands for numpy in a built environment: a path to this interpreter's own.
NUMPY = "thisnumpy"


def wheel(folder: Path, name: str, version: str, files: Mapping[str, str]) -> Path:
    """Write one; ``files`` go to site-packages."""
    info = f"{name}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*content, f"{info}/RECORD"))
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in {**content, f"{info}/RECORD": record}.items():
            archive.writestr(inside, text)
    return path


def this_numpy(folder: Path) -> Path:
    """A wheel that makes this interpreter's numpy importable where it is installed."""
    return wheel(folder, NUMPY, "1.0", {f"{NUMPY}.pth": f"{Path(np.__file__).parents[1]}\n"})
