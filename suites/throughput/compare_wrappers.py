"""Decode speed of an adapter's session beside its runtime driven by hand with its own wrapper, in one process.

    python -m suites.throughput.compare_wrappers rwkv transformers [--model 169m] [--scheme fp32] [--threads 2]

Both load the same file, one after the other, and every round times both, each starting every other
round. The session is timed by :mod:`harness.measure`, what is done by hand in the same way: single steps
from the state after the prompt, the arg-max between them untimed. Speeds are of the median of all steps of
all rounds, with quartiles. Exit status 1 where the medians differ by more than the bar.

Runs in a backend's own environment: of ``harness`` it needs measure and samples only. To add a backend,
add its function to BY_HAND.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import reference
from backends.api import Session, Unavailable, Unsupported
from backends.index import load_backend
from harness.measure import measure_decode
from harness.samples import LOOP, Sampling
from reference.checkpoint import load_checkpoint
from reference.config import preset
from reference.errors import InputError
from reference.schemes import apply
from reference.synthetic import synthetic
from reference.weights import Weights

#: Medians of session and wrapper may differ by this much.
BAR = 0.03

PROMPT = [int(i) for i in np.random.default_rng(0).integers(0, 200, 16)]

#: Ids and the state before them (None: start) -> logits of the last one, on the host, and the new state.
Step = Callable[[Sequence[int], Any], tuple[Any, Any]]


def rwkv(weights: Weights, scheme: str, threads: int) -> Step:
    """``RWKV.forward`` in a loop, as ChatRWKV's examples do."""
    os.environ.update(RWKV_JIT_ON="1", RWKV_CUDA_ON="0")
    import torch
    from rwkv.model import RWKV

    from backends.rwkv_pip import model_file

    torch.set_num_threads(threads)
    model = RWKV(model=str(model_file(weights, scheme).with_suffix("")), strategy=f"cpu {scheme}", verbose=False)

    def step(tokens: Sequence[int], state: Any) -> tuple[Any, Any]:
        logits, state = model.forward(tokens, state)
        return logits, state

    return step


def transformers(weights: Weights, scheme: str, threads: int) -> Step:
    """``model(ids, state=..., use_cache=True)`` in a loop, as the model's documentation does."""
    import torch
    from transformers import RwkvForCausalLM

    from backends.shared.hf_session import hf_folder
    from backends.shared.torch_runtime import DTYPES

    torch.set_num_threads(threads)
    model = RwkvForCausalLM.from_pretrained(str(hf_folder(weights, scheme))).to(getattr(torch, DTYPES[scheme])).eval()

    def step(tokens: Sequence[int], state: Any) -> tuple[Any, Any]:
        with torch.no_grad():
            out = model(torch.tensor([tokens]), state=state, use_cache=True)
        return out.logits[0, -1].float(), out.state

    return step


def ncnn(weights: Weights, scheme: str, threads: int) -> Step:
    """An extractor per token over the exported graph, blobs by name, as ncnn's own examples do."""
    import ncnn

    from backends.ncnn_rwkv.export import BIN, PARAM, exported
    from backends.ncnn_rwkv.names import input_names, state_outputs
    from reference.forward import initial_state

    folder = exported(weights, scheme)
    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = scheme == "fp16"
    net.opt.use_bf16_packed = net.opt.use_bf16_storage = scheme == "bf16"
    net.load_param(str(folder / PARAM))
    net.load_model(str(folder / BIN))
    embedding = apply(weights, scheme)["emb.weight"].array()
    start = [ncnn.Mat(row).clone() for row in initial_state(weights.config).reshape(-1, weights.config.n_embd)]
    inputs, outputs = input_names(weights.config), state_outputs(weights.config)

    def step(tokens: Sequence[int], state: Any) -> tuple[Any, Any]:
        logits = None
        for token in tokens:
            extractor = net.create_extractor()
            for name, mat in zip(inputs, [ncnn.Mat(embedding[token]).clone(), *(state or start)], strict=True):
                extractor.input(name, mat)
            _, logits = extractor.extract("logits")
            state = [extractor.extract(name)[1] for name in outputs]
        return np.array(logits), state

    return step


def bigdl_llm(weights: Weights, scheme: str, threads: int) -> Step:
    """``load_low_bit`` and ``model(ids, state=..., use_cache=True)`` in a loop, as BigDL's examples do."""
    from backends.bigdl_llm import PACKAGE

    return _low_bit(PACKAGE, weights, scheme, threads)


def ipex_llm(weights: Weights, scheme: str, threads: int) -> Step:
    """The same with ipex-llm."""
    from backends.ipex_llm_rwkv import PACKAGE

    return _low_bit(PACKAGE, weights, scheme, threads)


def _low_bit(package: Any, weights: Weights, scheme: str, threads: int) -> Step:
    import torch

    from backends.shared.bigdl_session import model_folder

    torch.set_num_threads(threads)
    auto_model = importlib.import_module(package.module).AutoModelForCausalLM
    model = auto_model.load_low_bit(str(model_folder(package, weights, scheme)), optimize_model=False)

    def step(tokens: Sequence[int], state: Any) -> tuple[Any, Any]:
        with torch.inference_mode():
            out = model(torch.tensor([tokens]), state=state, use_cache=True)
        return out.logits[0, -1], out.state

    return step


#: Backend -> what loads its runtime without the adapter: weights, scheme, threads -> step.
BY_HAND: dict[str, Callable[[Weights, str, int], Step]] = {
    "bigdl-llm": bigdl_llm,
    "ipex-llm": ipex_llm,
    "ncnn": ncnn,
    "rwkv": rwkv,
    "transformers": transformers,
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        weights = open_weights(arguments.model)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{arguments.model}, {arguments.threads} threads, {arguments.rounds} rounds, decode tok/s: median (quartiles)"
    )
    worst = 0
    for name in arguments.backends:
        try:
            backend = load_backend(name)
            scheme = arguments.scheme or next(iter(backend.INFO.schemes))
            session = backend.load(weights, scheme, "cpu", arguments.threads)
        except (Unavailable, Unsupported) as error:
            print(f"{name}: {error}", file=sys.stderr)
            worst = 3
            continue
        step = BY_HAND[name](weights, scheme, arguments.threads)
        ours, theirs = compare(session, step, arguments.tokens, arguments.rounds)
        del session, step
        gc.collect()
        print(line(f"{name} {scheme}", ours, theirs), flush=True)
        worst = worst or int(not within(ours, theirs))
    return worst


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="compare_wrappers", description="Adapters beside their runtimes by hand.")
    parser.add_argument("backends", nargs="+", choices=BY_HAND, metavar="BACKEND", help=", ".join(BY_HAND))
    parser.add_argument("--model", default="169m", help="preset, 'tiny', or a checkpoint's path (default 169m)")
    parser.add_argument("--scheme", help="one scheme for all (default: each backend's first)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="times each is timed (default 9, at least 5)")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a round (default 32)")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 5 or arguments.threads < 1 or arguments.tokens < 1:
        parser.error("a median needs --rounds of at least 5; --threads and --tokens are at least 1")
    return arguments


def open_weights(name: str) -> Weights:
    """What :func:`harness.models.open_model` opens, without what that needs installed."""
    embedded = Path(reference.__file__).parent / "embedded" / "tiny.safetensors"
    if name == "tiny" or os.path.exists(name):
        return load_checkpoint(embedded if name == "tiny" else name, scan=False)
    key = hashlib.sha256(f"synthetic 1 {preset(name)} 0".encode()).hexdigest()  # the harness's, to share its cache
    return replace(synthetic(name, 0), key=key)


def compare(session: Session, step: Step, tokens: int, rounds: int) -> tuple[list[int], list[int]]:
    """Nanoseconds of every step, of the session and of the wrapper; one more round warms up and is left out."""
    once = Sampling(repeats=1, warmup=0)
    ours: list[int] = []
    theirs: list[int] = []

    def by_session() -> None:
        ours.extend(measure_decode(session, PROMPT, tokens, once, driver=LOOP).steps[0])

    def by_hand() -> None:
        theirs.extend(steps_by_hand(step, tokens))

    for number in range(-1, rounds):
        for take in (by_session, by_hand) if number % 2 else (by_hand, by_session):
            take()
    return ours[tokens:], theirs[tokens:]


def steps_by_hand(step: Step, tokens: int) -> list[int]:
    """Nanoseconds of each of ``tokens`` steps after the prompt."""
    logits, state = step(PROMPT, None)
    times = []
    for _ in range(tokens):
        token = int(np.argmax(np.asarray(logits)))
        gc.disable()
        start = time.perf_counter_ns()
        logits, state = step([token], state)
        times.append(time.perf_counter_ns() - start)
        gc.enable()
    return times


def within(ours: Sequence[int], theirs: Sequence[int]) -> bool:
    """Whether the medians are as close as the bar asks."""
    return abs(statistics.median(theirs) / statistics.median(ours) - 1) <= BAR


def line(label: str, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Speed of both and the ratio of session to wrapper."""

    def speeds(steps: Sequence[int]) -> str:
        fast, median, slow = (1e9 / ns for ns in statistics.quantiles(steps, n=4))
        return f"{median:.1f} ({slow:.1f}-{fast:.1f})"

    ratio = statistics.median(theirs) / statistics.median(ours)
    verdict = "within" if within(ours, theirs) else "NOT within"
    return f"{label}: session {speeds(ours)}, by hand {speeds(theirs)}, ratio {ratio:.3f}, {verdict} {BAR:.0%}"


if __name__ == "__main__":
    sys.exit(main())
