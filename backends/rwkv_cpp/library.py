"""``librwkv`` by ctypes: where it is, which API it has, and its calls with errors that say why.

Header: rwkv.h of https://github.com/RWKV/rwkv.cpp, and that of the package ``rwkv-cpp-python`` 0.0.1.
The two APIs that are driven, told apart by exported symbols:

* April 2023, which alone has ``ggml_quantize_q4_1_o``: ``rwkv_quantize_model_file`` takes a number.
* Since 24 May 2023, when ``rwkv_get_last_error`` came: it takes a name. ``rwkv_init_from_file`` takes a
  third argument, layers to offload, since ``rwkv_gpu_offload_layers`` went in July 2024.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from backends.api import Unavailable, Unsupported

PACKAGE = "rwkv-cpp-python 0.0.1"
VARIABLE = "RWKV_CPP_LIBRARY"
_GET_IT = f"rwkv-bench setup rwkv.cpp, or set {VARIABLE} to the absolute path of a librwkv"


@dataclass(frozen=True)
class LibraryPath:
    """Where the library is; ``packaged``: that of ``rwkv-cpp-python``."""

    path: Path
    packaged: bool

    def digest(self) -> str:
        """First 12 digits of the SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]


def library_path() -> LibraryPath:
    """The user's library where the variable is set, else the installed package's. Raises Unavailable."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        path = Path(chosen)
        if not (path.is_absolute() and path.is_file()):
            what = "is no such file" if path.is_absolute() else "is not an absolute path"
            raise Unavailable(f"{VARIABLE}={chosen} {what}", "give the absolute path of a librwkv, or unset it")
        return LibraryPath(path, packaged=False)
    spec = find_spec("rwkv_cpp")
    for folder in (spec and spec.submodule_search_locations) or ():
        for name in ("librwkv.so", "rwkv.dll"):
            if (Path(folder) / name).is_file():
                return LibraryPath(Path(folder) / name, packaged=True)
    raise Unavailable("librwkv is not installed", _GET_IT)


@dataclass(frozen=True)
class Api:
    """What differs between libraries. ``formats``: scheme -> what ``rwkv_quantize_model_file`` calls it."""

    formats: dict[str, Any]
    chunks: bool
    offload_argument: bool
    block: dict[str, int]

    @property
    def schemes(self) -> tuple[str, ...]:
        return ("FP32", "FP16", *self.formats)


_APRIL_FORMATS: dict[str, Any] = {"Q4_0_v100": 2, "Q4_1_v100": 3, "Q4_1_O": 4}
_NAMED: dict[str, Any] = {name: name.encode() for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K")}
APRIL = Api(_APRIL_FORMATS, chunks=False, offload_argument=False, block=dict.fromkeys(_APRIL_FORMATS, 32))


def open_library() -> Library:
    """Load and bind the library. Raises Unavailable."""
    found = library_path()
    try:
        handle = ctypes.CDLL(str(found.path))
    except OSError as error:
        raise Unavailable(f"{found.path} cannot be loaded ({error})", _GET_IT) from None
    return Library(handle, found, _api(handle, found.path))


def _api(handle: ctypes.CDLL, path: Path) -> Api:
    if not hasattr(handle, "rwkv_init_from_file"):
        raise Unavailable(f"{path} is not rwkv.cpp: it lacks rwkv_init_from_file", _GET_IT)
    if hasattr(handle, "ggml_quantize_q4_1_o"):
        return APRIL
    if not hasattr(handle, "rwkv_get_last_error"):
        raise Unavailable(
            f"{path} is an rwkv.cpp of before 24 May 2023, whose API is not driven here", "build a newer one"
        )
    # The K formats came with the rewrite on ggml's backends, when the offload argument did.
    newest = hasattr(handle, "rwkv_get_n_embed") and not hasattr(handle, "rwkv_gpu_offload_layers")
    formats = {name: value for name, value in _NAMED.items() if newest or not name.endswith("_K")}
    return Api(
        formats,
        chunks=hasattr(handle, "rwkv_eval_sequence_in_chunks"),
        offload_argument=newest,
        block={name: 256 if name.endswith("_K") else 32 for name in formats},
    )


class Library:
    """A bound library. ``api`` says what it has."""

    def __init__(self, handle: ctypes.CDLL, found: LibraryPath, api: Api) -> None:
        self._handle = handle
        self.found = found
        self.api = api
        pointer, text, count = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32
        floats, ids = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_uint32)
        kind = count if api is APRIL else text
        _bind(handle.rwkv_quantize_model_file, ctypes.c_bool, text, text, kind)
        _bind(handle.rwkv_init_from_file, pointer, text, count, *([count] if api.offload_argument else []))
        _bind(handle.rwkv_eval, ctypes.c_bool, pointer, count, floats, floats, floats)
        _bind(handle.rwkv_free, None, pointer)
        _bind(handle.rwkv_get_state_buffer_element_count, count, pointer)
        _bind(handle.rwkv_get_logits_buffer_element_count, count, pointer)
        if api.chunks:
            sizes = [ctypes.c_size_t] * 2
            _bind(handle.rwkv_eval_sequence_in_chunks, ctypes.c_bool, pointer, ids, *sizes, floats, floats, floats)

    @property
    def schemes(self) -> tuple[str, ...]:
        return self.api.schemes

    def quantize(self, source: Path, target: Path, scheme: str) -> None:
        """Write ``target`` from an FP32 or FP16 file. Raises Unsupported with the library's reason."""
        arguments = (os.fsencode(source), os.fsencode(target), self.api.formats[scheme])
        if not self._quietly(lambda: self._handle.rwkv_quantize_model_file(*arguments)):
            reason = self._reason(lambda: self._handle.rwkv_quantize_model_file(*arguments))
            raise Unsupported(f"rwkv.cpp does not quantize {source} to {scheme}: {reason}")

    def open(self, path: Path, threads: int) -> int:
        """The address of a context. Raises Unsupported with the library's reason."""
        arguments = (os.fsencode(path), threads, *([0] if self.api.offload_argument else []))
        context = self._quietly(lambda: self._handle.rwkv_init_from_file(*arguments))
        if not context:
            reason = self._reason(lambda: self._handle.rwkv_init_from_file(*arguments))
            raise Unsupported(f"rwkv.cpp does not load {path}: {reason}")
        return int(context)

    def sizes(self, context: int) -> tuple[int, int]:
        """Numbers of float32 in a state and in the logits."""
        state = self._handle.rwkv_get_state_buffer_element_count(context)
        return int(state), int(self._handle.rwkv_get_logits_buffer_element_count(context))

    def step(self, context: int, token: int, past: np.ndarray, new: np.ndarray, logits: np.ndarray) -> None:
        """One token; ``past`` and ``new`` may be one array."""
        if not self._handle.rwkv_eval(context, token, _at(past), _at(new), _at(logits)):
            raise RuntimeError("rwkv_eval failed; its reason is on stderr")

    def chunks(
        self, context: int, ids: np.ndarray, chunk: int, past: np.ndarray, new: np.ndarray, logits: np.ndarray
    ) -> None:
        """Tokens ``ids``, uint32, in sequences of ``chunk``."""
        first = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
        arrays = (_at(past), _at(new), _at(logits))
        if not self._handle.rwkv_eval_sequence_in_chunks(context, first, len(ids), chunk, *arrays):
            raise RuntimeError("rwkv_eval_sequence_in_chunks failed; its reason is on stderr")

    def free(self, context: int) -> None:
        self._handle.rwkv_free(context)

    def _quietly(self, call: Callable[[], Any]) -> Any:
        """What ``call`` returns, its chatter per tensor (stdout in 2023, now stderr) thrown away."""
        if self.api is not APRIL:
            return self._printing(False, call)
        with open(os.devnull, "wb") as nowhere, _redirected(nowhere.fileno(), 1):
            return call()

    def _reason(self, call: Callable[[], Any]) -> str:
        """Why ``call`` failed: it is called once more, for the line it writes to stderr."""
        with tempfile.TemporaryFile() as said:
            with _redirected(said.fileno(), 1, 2):
                self._printing(True, call)
            said.seek(0)
            text = said.read().decode("utf-8", "replace")
        # A failed check writes its message, then "file:line: condition"; the first to fail is the innermost.
        message = re.search(r"^(.*\S.*)\n\s*\S*\.(?:inc|cpp):\d+: ", text, re.MULTILINE)
        return message.group(1).strip() if message else "no reason given"

    def _printing(self, on: bool, call: Callable[[], Any]) -> Any:
        if self.api is APRIL:
            return call()
        self._handle.rwkv_set_print_errors(None, ctypes.c_bool(on))
        try:
            return call()
        finally:
            self._handle.rwkv_set_print_errors(None, ctypes.c_bool(True))


def _bind(function: Any, result: Any, *arguments: Any) -> None:
    function.restype, function.argtypes = result, list(arguments)


#: The first float of an array, which ctypes passes by its address. ``array.ctypes.data`` takes three times as long,
#: and a step that has streamed all weights through the caches finds Python's own code cold.
_at: Callable[[Any], Any] = ctypes.c_float.from_buffer


@contextlib.contextmanager
def _redirected(to: int, *descriptors: int) -> Iterator[None]:
    """What C code writes to these descriptors goes to ``to`` instead."""
    _flush()
    kept = [os.dup(descriptor) for descriptor in descriptors]
    try:
        for descriptor in descriptors:
            os.dup2(to, descriptor)
        yield
    finally:
        _flush()
        for descriptor, copy in zip(descriptors, kept):
            os.dup2(copy, descriptor)
            os.close(copy)


def _flush() -> None:
    """Empty the buffers of Python and of the C library."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        ctypes.CDLL(None).fflush(None)
