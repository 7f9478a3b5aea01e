"""How far clean backends and planted faults stand from the error that arithmetic must make.

    python scripts/calibrate_bound.py              fit on one set of seeds, confirm on another
    python scripts/calibrate_bound.py --chains     what a plain loop with one accumulator adds

Prints, for each set, the distribution of error / e over the gate's checks: the worst check of each
clean run, and of each run with a planted fault. The factor K of ``harness/tolerance.py`` has to lie
between the two; docs/tolerance.md keeps the output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from backends.api import Unavailable
from backends.index import backend_names, load_backend
from harness.checks import worst
from harness.compare import logits_error, state_error
from harness.parity import gate
from harness.session import open_session
from harness.tolerance import K, derive
from reference.config import Config
from reference.forward import forward
from reference.numerics import CHAIN, Arithmetic
from reference.synthetic import synthetic
from reference.weights import Tensor, Weights

FIT_SEEDS, CONFIRM_SEEDS = range(1000), range(1000, 2000)
POSITIONS = 48


def _scaled(part: str, factor: float) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, array: array * np.float32(factor) if part in name else array


def _swapped(a: str, b: str) -> Callable[[Weights], Weights]:
    def plant(weights: Weights) -> Weights:
        tensors = dict(weights.tensors)
        for name in weights:
            if a in name:
                other = name.replace(a, b)
                tensors[name], tensors[other] = weights[other], weights[name]
        return Weights(weights.config, tensors)

    return plant


def _changed(change: Callable[[str, np.ndarray], np.ndarray]) -> Callable[[Weights], Weights]:
    return lambda weights: weights.map(lambda name, tensor: Tensor.of(change(name, tensor.array(np.float32))))


def _rolled(name: str, array: np.ndarray) -> np.ndarray:
    return np.roll(array, 1, axis=0) if name == "emb.weight" else array


def _last_row_lost(name: str, array: np.ndarray) -> np.ndarray:
    if not name.endswith("0.att.output.weight"):
        return array
    array = array.copy()
    array[-1] = 0
    return array


def _rounded(name: str, array: np.ndarray) -> np.ndarray:
    """One vector of the whole model kept in too few bits: the smallest of these faults."""
    return array.astype(np.float16).astype(np.float32) if name.endswith("1.att.time_decay") else array


#: Faults that a weight file can carry as well as code can: the backend is given other weights than truth.
FAULTS: dict[str, Callable[[Weights], Weights]] = {
    "time_first dropped": _changed(_scaled("time_first", 0.0)),
    "decay 1 % too slow": _changed(_scaled("time_decay", 1.01)),
    "time_mix_k and time_mix_r swapped": _swapped("att.time_mix_k", "att.time_mix_r"),
    "embedding off by one row": _changed(_rolled),
    "last row of one matrix lost": _changed(_last_row_lost),
    "LayerNorm bias of one layer dropped": _changed(_scaled("blocks.0.ln2.bias", 0.0)),
    "one time_decay vector in fp16": _changed(_rounded),
}


def draw(seed: int) -> tuple[Weights, np.ndarray]:
    """A random small model and prompt. Vectors are not fp16-representable, so that rounding them is a fault."""
    rng = np.random.default_rng(seed)
    width = int(rng.choice([64, 128, 256]))
    config = Config(int(rng.integers(2, 7)), width, 4 * width, int(rng.integers(64, 600)))
    scale = float(rng.choice([0.5, 1.0, 1.5]))
    weights = synthetic(config, seed, scale)
    noise = np.random.default_rng(seed)

    def unround(name: str, tensor: Tensor) -> Tensor:
        array = tensor.array(np.float32)
        if array.ndim > 1:
            return Tensor.of(array)
        return Tensor.of((array * (1 + 1e-3 * noise.standard_normal(array.shape))).astype(np.float32))

    return weights.map(unround), rng.integers(0, config.n_vocab, POSITIONS)


def cells() -> Iterator[tuple[str, str]]:
    """Every usable backend with its float schemes; quantized ones share the kernels."""
    for backend in backend_names():
        module = load_backend(backend)
        try:
            getattr(module, "check", lambda: None)()
        except Unavailable:
            continue
        for scheme in module.INFO.schemes:
            if scheme in ("fp32", "fp16", "bf16") and not (backend == "numpy" and scheme != "fp32"):
                yield backend, scheme


def ratio(backend: str, scheme: str, weights: Weights, given: Weights, tokens: np.ndarray) -> float:
    """Worst error / e over all checks of a session that was given ``given`` and is judged by ``weights``."""
    arithmetic = load_backend(backend).INFO.arithmetic(scheme, "cpu")
    truth = derive(weights, scheme, arithmetic, tokens)
    with open_session(backend, given, scheme, "cpu", 1) as opened:
        found = gate(opened.session, truth)
    return K * worst((*found.logits, *found.state)).ratio


def line(name: str, ratios: list[float]) -> str:
    """Median, 99th percentile and extremes of one distribution."""
    values = np.sort(ratios)
    low, mid, high = (float(np.quantile(values, q)) for q in (0.01, 0.5, 0.99))
    return f"{name:<52} {len(values):5d} {values[0]:10.3g} {low:10.3g} {mid:10.3g} {high:10.3g} {values[-1]:10.3g}"


def chains() -> None:
    """Error of one unbroken chain per output, over that of the emulated chain; float32, 40 positions."""
    for width, layers in ((768, 4), (2048, 2), (4096, 1)):
        config = Config(layers, width, 4 * width, 300)
        weights = synthetic(config, 0).in_memory()
        tokens = np.random.default_rng(0).integers(0, config.n_vocab, 40)
        truth, state = forward(weights, tokens, all_logits=True, dtype=np.float64)
        found = []
        for links in (CHAIN, config.n_ffn):
            got, got_state = forward(weights, tokens, all_logits=True, arithmetic=Arithmetic(chain=links))
            error, off = logits_error(got, truth), state_error(got_state, state)
            found.append(np.array([error.rms, error.worst, error.peak, off.rms, off.worst]))
        ratios = ", ".join(f"{r:.2f}" for r in found[1] / found[0])
        print(f"width {width}: one accumulator / chain of {CHAIN}: {ratios} (rms, worst, peak, state rms, worst)")


def main() -> None:
    """Print both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60, help="clean runs per cell and set (default 60)")
    parser.add_argument("--faulty-runs", type=int, default=8, help="runs per cell, fault and set (default 8)")
    parser.add_argument("--chains", action="store_true", help="compare lengths of chains instead")
    options = parser.parse_args()
    if options.chains:
        chains()
        return
    for title, seeds in (("fit", FIT_SEEDS), ("confirm", CONFIRM_SEEDS)):
        print(f"{title}: error / e, worst check of a run; K = {K:g}")
        print(f"{'':<52} {'runs':>5} {'least':>10} {'1 %':>10} {'median':>10} {'99 %':>10} {'largest':>10}")
        for backend, scheme in cells():
            clean = [ratio(backend, scheme, w, w, t) for w, t in map(draw, seeds[: options.runs])]
            print(line(f"{backend} {scheme}, clean", clean), flush=True)
            for fault, plant in FAULTS.items():
                ratios = [ratio(backend, scheme, w, plant(w), t) for w, t in map(draw, seeds[: options.faulty_runs])]
                print(line(f"{backend} {scheme}, {fault}", ratios), flush=True)


if __name__ == "__main__":
    main()
