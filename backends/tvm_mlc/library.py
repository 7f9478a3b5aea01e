"""A compiled library and its params folder, opened with TVM's runtime alone.

FOLDER/*.so               the library; FOLDER may also be the library's own path
FOLDER/params/            what :mod:`backends.tvm_mlc.params` reads

A library is ours, and says so in its metadata, or one that MLC-LLM's RWKV-4 gives: :mod:`backends.tvm_mlc.mlc_library`.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from backends.tvm_mlc import arena, native, params
from backends.tvm_mlc.storage import Parameter, parameters
from reference.config import Config
from reference.errors import CheckpointError, ConfigError

#: What ``get_metadata`` of a library of ours says it is; one that says otherwise is not loaded.
ARCHITECTURE, ABI = "rwkv4", 2

#: Entry points that every library has; MLC-LLM's first ones, of June 2023, had no ``prefill``.
ENTRIES = ("decode", "create_kv_cache", "get_metadata")

#: How MLC-LLM named its RWKV-4 models: rwkv-raven-1b5, RWKV-4-World-3B, rwkv_world.
NAMES = ("rwkv-", "rwkv_")

#: Of TVM's affinity modes the one that takes all cores of the fastest kind.
_BIG_CORES = 1

#: What TVM says where a library holds kernels for a device that it was built without.
_FOREIGN = re.compile(r"load_from_bytes\.(\w+)")

SUFFIXES = (".so", ".dylib", ".dll")


class Opened(NamedTuple):
    """A library that has been loaded and says that it is RWKV-4.

    module  TVM's module; more than one virtual machine can be made over it
    told    its metadata
    """

    path: Path
    module: Any
    vm: Any
    told: dict[str, Any]

    @property
    def ours(self) -> bool:
        """Whether ``rwkv-bench compile`` made it."""
        return "abi" in self.told


class Library(NamedTuple):
    """A library that is known to fit its params folder.

    vm          TVM's virtual machine over it
    parameters  what its entry points take; empty names (``tensor``) where only their order in the folder is known
    ours        whether it has the entry points that MLC-LLM's have not
    """

    path: Path
    module: Any
    vm: Any
    config: Config
    scheme: str
    rescale_every: int
    parameters: list[Parameter]
    ours: bool


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


def open_library(path: Path, device: Any) -> Opened:
    """Load and identify; raises :class:`CheckpointError` for what is not RWKV-4 with this ABI."""
    native.check(path)
    tvm = runtime()
    try:
        module = tvm.runtime.load_module(os.fspath(path.absolute()))
        vm = machine(module, device)
    except Exception as error:  # noqa: BLE001 - what TVM raises has no type of its own
        other = _FOREIGN.search(str(error))
        why = f"its kernels are for {other[1]}, which it does not run here" if other else line_of(error)
        raise CheckpointError(f"{path}: TVM {tvm.__version__} cannot load it: {why}") from None
    told = _metadata(path, vm)
    name = str(told.get("model_type", told.get("model_name", "an unnamed architecture")))
    if name != ARCHITECTURE and not name.lower().startswith(NAMES):
        raise CheckpointError(f"{path}: is of {name}, not of RWKV-4")
    missing = [name for name in ENTRIES if not has(vm, name)]
    if missing:
        raise CheckpointError(f"{path}: has no {', '.join(missing)}; a library of MLC-LLM's RWKV-4 is expected")
    return Opened(path, module, vm, told)


def machine(module: Any, device: Any) -> Any:
    """A virtual machine over a loaded library."""
    from tvm.runtime.vm import VirtualMachine

    return VirtualMachine(module, device)


def _metadata(path: Path, vm: Any) -> dict[str, Any]:
    # MLC-LLM's libraries since 2024 have another entry; they are told by it, and have no RWKV-4.
    entry = next((name for name in ("get_metadata", "_metadata") if has(vm, name)), None)
    if entry is None:
        raise CheckpointError(f"{path}: has no get_metadata; a library of MLC-LLM's RWKV-4 is expected")
    try:
        told = json.loads(str(vm[entry]()))
        if not isinstance(told, dict):
            raise ValueError(f"{type(told).__name__}, not an object")
        return told
    except ValueError as error:
        raise CheckpointError(f"{path}: what it says of itself cannot be read ({line_of(error)})") from None


def identify(opened: Opened) -> Library:
    """A library of ours, by its metadata. Raises :class:`CheckpointError`."""
    path, told = opened.path, opened.told
    if told["abi"] != ABI:
        raise CheckpointError(f"{path}: has ABI {told['abi']}; {ABI} is expected, compile it anew")
    if told.get("target") != "llvm":
        raise CheckpointError(f"{path}: is compiled for {told.get('target')}; the CPU's is llvm")
    try:
        config = Config(*(int(told[name]) for name in ("n_layer", "n_embd", "n_ffn", "n_vocab")))
        scheme = str(told["quantization"])
        taken = parameters(config, scheme)
        return Library(path, opened.module, opened.vm, config, scheme, int(told["rescale_every"]), taken, True)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: what it says of itself cannot be read ({line_of(error)})") from None


def load_parameters(library: Library, folder: Path) -> Any:
    """The arrays of a params folder in the CPU's memory, as a library takes them."""
    tvm = runtime()
    told = params.scheme(folder)
    if told != library.scheme:
        raise CheckpointError(f"{folder}: is of {told}, but {library.path.name} is compiled for {library.scheme}")
    arrays = arena.together(params.read(folder, library.parameters))
    return tvm.runtime.convert([tvm.runtime.from_dlpack(array) for array in arrays])


def has(vm: Any, name: str) -> bool:
    """Whether a virtual machine has an entry point."""
    try:
        return vm[name] is not None
    except AttributeError:
        return False


def line_of(error: Exception) -> str:
    """The last line of what TVM says, which is the one that tells."""
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines else type(error).__name__
