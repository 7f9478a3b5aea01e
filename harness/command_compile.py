"""``rwkv-bench compile``: RWKV-4 as a compiled TVM library and its params folder, as MLC-LLM's users have them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backends.api import Unsupported
from reference.errors import InputError

HELP = "checkpoint -> a compiled TVM library and its params folder"

EXAMPLES = """\
examples:
  rwkv-bench compile RWKV-4-1B5.pth out --quant q4f16_1
  rwkv-bench compile tiny out --target webgpu --quant q4f16_0
  rwkv-bench compile 169m out --quant q0f16 --rescale-every 6
  rwkv-bench run --backend tvm --library tvm=out --model RWKV-4-1B5.pth

OUT holds the library (a .tar of objects where the target's own tools link
it), the source of a GPU's kernels, and params/: mlc-chat-config.json,
ndarray-cache.json, its shards, and the tokenizer if it is found.
"""

#: The backend whose environment has the compiler, and the function of it that is called there.
BACKEND, FUNCTION = "tvm", "compile_model"

#: Seconds that a compilation may say nothing: the weights of a large model are quantized meanwhile.
SILENT_SECONDS = 3600.0

Say = Callable[[str], None]


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``compile``."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint (file or Hugging Face folder), tiny, or a preset")
    parser.add_argument("out", metavar="OUT", help="the folder to write; it must not exist, or be empty")
    parser.add_argument(
        "--target",
        default="llvm",
        metavar="TARGET",
        help="llvm (default: this CPU), cuda, metal, metal_x86_64, opencl, vulkan, webgpu, android, iphone",
    )
    parser.add_argument("--quant", default="q4f16_1", metavar="SCHEME", help="q0f32, q0f16, q4f16_1 (default), ...")
    parser.add_argument(
        "--rescale-every", type=int, default=0, metavar="N", help="halve the residual stream after every N layers"
    )
    parser.add_argument("--no-cache", action="store_true", help="compile anew, even where the cache has the library")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of a preset's synthetic weights")


def run(arguments: argparse.Namespace, say: Say) -> int:
    """Compile in the backend's environment; ``say`` prints what was made. Returns 0.

    Raises Unavailable without that environment, Unsupported for a scheme or target that it lacks, and
    :class:`reference.errors.InputError` for a model that cannot be read or a folder that cannot be written.
    """
    from backends.index import load_backend, place
    from harness.isolation import start
    from harness.models import open_model

    if arguments.rescale_every < 0:
        raise InputError(f"--rescale-every is {arguments.rescale_every}; 0 is never, 6 is usual")
    _check_folder(Path(arguments.out))
    backend = load_backend(BACKEND)
    if arguments.quant not in backend.INFO.schemes:
        raise Unsupported(f"{BACKEND} has no scheme {arguments.quant}; it has {', '.join(backend.INFO.schemes)}")
    model = open_model(arguments.model, arguments.seed)
    line = start.start(BACKEND, backend, timeout=SILENT_SECONDS)
    try:
        where = start.model_at(model.weights, model.seed, model.name, line.child.folder)
        wanted = {"folder": os.path.abspath(arguments.out), "scheme": arguments.quant, "target": arguments.target}
        wanted.update(rescale_every=arguments.rescale_every, cached=not arguments.no_cache)
        answer, _ = line.ask("call", backend=place(BACKEND), name=FUNCTION, model=where, arguments=wanted)
    finally:
        line.child.kill()
    say(_summary(arguments.out, arguments.quant, answer["told"]))
    return 0


def _check_folder(folder: Path) -> None:
    """Before minutes are spent: the same check is made again when it is written."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder}: exists already; choose another name or remove it first")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder}: its folder {folder.absolute().parent} does not exist")


def _summary(out: str, scheme: str, told: dict[str, Any]) -> str:
    size = sum(file.stat().st_size for file in Path(out, "params").iterdir())
    objects = f"{', '.join(told['objects'])} for {told['host']}"
    kernels = f"{told['kernels']} kernels, {len(told['entries'])} entry points"
    return f"{out}: {told['library']} ({objects}; {kernels}), params {scheme} {size / 1e6:,.1f} MB"
