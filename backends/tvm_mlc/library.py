"""A compiled library and its params folder, opened with TVM's runtime alone.

FOLDER/*.so               the library; FOLDER may also be the library's own path
FOLDER/params/            what :mod:`backends.tvm_mlc.params` reads
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from backends.tvm_mlc import params
from backends.tvm_mlc.storage import Parameter, parameters
from reference.config import Config
from reference.errors import CheckpointError

#: What ``get_metadata`` of a library says it is; one that says otherwise is not loaded.
ARCHITECTURE, ABI = "rwkv4", 1

#: Entry points that a session needs.
ENTRIES = ("prefill", "decode", "create_kv_cache", "get_metadata")

#: Of TVM's affinity modes the one that takes all cores of the fastest kind.
_BIG_CORES = 1

SUFFIXES = (".so", ".dylib", ".dll")


class Library(NamedTuple):
    """An opened library.

    vm          TVM's virtual machine over it
    parameters  what its entry points take, and ``scheme`` what they mean
    """

    path: Path
    vm: Any
    config: Config
    scheme: str
    target: str
    rescale_every: int
    parameters: list[Parameter]


def runtime(threads: int | None = None) -> Any:
    """TVM without its compiler, which a session does not need: less to load, and nothing is compiled by accident."""
    if threads is not None:
        os.environ["TVM_NUM_THREADS"] = str(threads)  # read when its pool starts, at the first kernel
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    # Its threads follow the affinity of the process, which --cpus sets, instead of a choice of their own.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    import tvm

    if threads is not None:
        tvm.get_global_func("runtime.config_threadpool")(_BIG_CORES, threads)  # where the pool runs already
    return tvm


def find(place: Path) -> Path:
    """The library of a folder, or the file itself; raises :class:`CheckpointError` where there is not one."""
    if place.is_file():
        return place
    found = sorted(file for file in place.glob("*") if file.suffix in SUFFIXES) if place.is_dir() else []
    if len(found) != 1:
        many = f"holds {len(found)} libraries; name one of them" if found else "no library of TVM is there"
        raise CheckpointError(f"{place}: {many}")
    return found[0]


def open_library(path: Path, device: Any) -> Library:
    """Load and identify; raises :class:`CheckpointError` for what is not RWKV-4 with this ABI."""
    tvm = runtime()
    from tvm.runtime.vm import VirtualMachine

    try:
        vm = VirtualMachine(tvm.runtime.load_module(os.fspath(path.absolute())), device)
    except Exception as error:  # noqa: BLE001 - what TVM raises has no type of its own
        raise CheckpointError(f"{path}: TVM {tvm.__version__} cannot load it: {_line(error)}") from None
    missing = [name for name in ENTRIES if not _has(vm, name)]
    if missing:
        raise CheckpointError(f"{path}: has no {', '.join(missing)}; a library of MLC-LLM's form is expected")
    try:
        told = json.loads(str(vm["get_metadata"]()))
        if told.get("model_type") != ARCHITECTURE:
            raise CheckpointError(
                f"{path}: is of {told.get('model_type', 'an unnamed architecture')}, not {ARCHITECTURE}"
            )
        if told.get("abi") != ABI:
            raise CheckpointError(f"{path}: has ABI {told.get('abi')}; {ABI} is expected, compile it anew")
        config = Config(*(int(told[name]) for name in ("n_layer", "n_embd", "n_ffn", "n_vocab")))
        scheme, rescale = str(told["quantization"]), int(told["rescale_every"])
        return Library(path, vm, config, scheme, str(told["target"]), rescale, parameters(config, scheme))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: what it says of itself cannot be read ({_line(error)})") from None


def load_parameters(library: Library, folder: Path, device: Any) -> Any:
    """The arrays of a params folder on the device, as a library takes them."""
    tvm = runtime()
    tensors = []
    for array in params.read(folder, library.parameters):
        tensor = tvm.runtime.empty(array.shape, str(array.dtype), device)
        tensor.copyfrom(array)
        tensors.append(tensor)
    return tvm.runtime.convert(tensors)


def _has(vm: Any, name: str) -> bool:
    try:
        return vm[name] is not None
    except AttributeError:
        return False


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines else type(error).__name__
