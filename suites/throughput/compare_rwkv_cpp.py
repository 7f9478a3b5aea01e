"""Decode speed of the rwkv.cpp backend's session beside librwkv driven by hand, in one process.

    python -m suites.throughput.compare_rwkv_cpp [--model 169m] [--schemes FP32,FP16] [--threads 2]

By hand: the packaged library of April 2023 through its own class ``RWKVSharedLibrary``, with the state
updated in place as the package's examples do; a newer one (RWKV_CPP_LIBRARY) through bare ctypes. Rounds are
interleaved as in :mod:`.compare_wrappers`. Exit status 1 where the medians differ by more than its bar.

Both drive the context that the session has loaded: two contexts of one file were seen to differ by some 5 %, by
where in memory their weights came to lie.

Runs in the backend's own environment: of ``harness`` it needs measure and samples only.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from backends import rwkv_cpp as backend
from backends.api import Unavailable, Unsupported
from backends.rwkv_cpp.library import library_path, open_library
from backends.rwkv_cpp.session import RwkvCppSession
from reference.config import Config
from reference.errors import InputError
from suites.throughput.compare_wrappers import Step, compare, line, open_weights, within

#: Token, address of the state before it (None: start), of the state after it, of the logits.
Eval = Callable[[int, "int | None", int, int], None]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        weights, library = open_weights(arguments.model), open_library()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 3
    print(f"{backend.version()}, {arguments.model}, {arguments.threads} threads, {arguments.rounds} rounds")
    print("decode tok/s: median (min-max)")
    worst = 0
    for scheme in arguments.schemes or library.schemes:
        try:
            session: Any = backend.load(weights, scheme, "cpu", arguments.threads)
        except Unsupported as error:
            print(error, file=sys.stderr)
            worst = 3
            continue
        passed = compare_one(session, weights.config, scheme, arguments)
        session.close()
        worst = worst or int(not passed)
    return worst


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_rwkv_cpp", description="The adapter beside librwkv by hand.")
    parser.add_argument("--model", default="169m", help="preset, 'tiny', or a checkpoint's path (default 169m)")
    parser.add_argument("--schemes", help="comma list (default: all the library has)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="times each is timed (default 9, at least 5)")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a round (default 32)")
    arguments = parser.parse_args(argv)
    arguments.schemes = arguments.schemes and arguments.schemes.split(",")
    if arguments.rounds < 5 or arguments.threads < 1 or arguments.tokens < 1:
        parser.error("a median needs --rounds of at least 5; --threads and --tokens are at least 1")
    return arguments


def compare_one(session: RwkvCppSession, config: Config, scheme: str, arguments: argparse.Namespace) -> bool:
    """Print the line of one scheme; whether both are as fast."""
    evaluate = _by_package(session.context) if library_path().packaged else _by_ctypes(session.context)
    ours, theirs = compare(session, in_place(evaluate, config), arguments.tokens, arguments.rounds)
    print(line(scheme, ours, theirs), flush=True)
    return within(ours, theirs)


def in_place(evaluate: Eval, config: Config) -> Step:
    """Steps that keep one state and one array of logits."""
    state = np.zeros(config.n_layer * 5 * config.n_embd, dtype=np.float32)
    logits = np.zeros(config.n_vocab, dtype=np.float32)
    at, out = state.ctypes.data, logits.ctypes.data

    def step(tokens: Sequence[int], past: Any) -> tuple[Any, Any]:
        for token in tokens:
            evaluate(token, None if past is None else at, at, out)
            past = state
        return logits, past

    return step


def _by_package(address: int) -> Eval:
    """The package's wrapper. Its ``__init__`` imports torch and a module that is not there, so the file is loaded."""
    folder = library_path().path.parent
    spec = importlib.util.spec_from_file_location("rwkv_cpp_shared_library", folder / "rwkv_cpp_shared_library.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wrapper, context = module.RWKVSharedLibrary(str(library_path().path)), module.RWKVContext(address)

    def evaluate(token: int, past: int | None, new: int, logits: int) -> None:
        wrapper.rwkv_eval(context, token, past, new, logits)

    return evaluate


def _by_ctypes(context: int) -> Eval:
    """The C function, with nothing around it."""
    rwkv_eval = ctypes.CDLL(str(library_path().path)).rwkv_eval
    pointer = ctypes.c_void_p
    rwkv_eval.argtypes, rwkv_eval.restype = [pointer, ctypes.c_uint32, pointer, pointer, pointer], ctypes.c_bool

    def evaluate(token: int, past: int | None, new: int, logits: int) -> None:
        rwkv_eval(context, token, past, new, logits)

    return evaluate


if __name__ == "__main__":
    sys.exit(main())
