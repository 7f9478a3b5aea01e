"""A library that MLC-LLM's RWKV-4 gives, known by its ABI: it tells its model's name and no sizes.

    get_metadata()       {"model_name": "rwkv-...", "max_window_size": -1, "stop_tokens": [0], ...}
    create_kv_cache()    5 L objects of TVM's attention cache: att_x, a, b, p (-1e30), ffn_x of each layer
    prefill, decode      (input_ids, placeholder, state, params), the state updated in place
    params/              records ``param_i``, and ``mlc-chat-config.json`` with the scheme in ``local_id``

Source: ``mlc_llm/relax_model/rwkv.py``, ``mlc_llm/core.py`` and ``mlc_llm/utils.py`` of
https://github.com/mlc-ai/mlc-llm from 0fb027f7 (2023-08-10) to 448c5c40 (2024-03). What it says there:

* Parameters come in the order of its modules, a quantized one as codes and scales. Before ParamManager (2023-07)
  another order was possible; such a folder is taken where its arrays are the same, and has no trace then.
* ``q3f16_0/1`` put five codes into a uint16; values are those of today's. ``q4f32_0/1`` were asymmetric: another
  scheme of the same name, which no codec here knows, and which is refused.
* The epsilon of its LayerNorm stays 1e-5 where ``rescale_every`` halves the stream.
* Most were compiled for a TVM of 2023, which today's runtime does not load; see :mod:`backends.tvm_mlc.native`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from backends.api import Unsupported
from backends.tvm_mlc import params
from backends.tvm_mlc.library import Library, Opened, line_of, runtime
from backends.tvm_mlc.states import Caches
from backends.tvm_mlc.storage import Parameter, kept, model_dtype, parameters
from reference.config import Config
from reference.errors import CheckpointError
from reference.forward import PP_START
from reference.numerics import Arithmetic

#: Rows of a layer: att_x, a, b, p, ffn_x.
_ROWS = 5


def identify(opened: Opened, folder: Path, config: Config, scheme: str) -> Library:
    """The library, if it and its params folder are of this model's shape and scheme.

    Raises :class:`CheckpointError`, and Unsupported for a scheme of 2023 that shares a name with another.
    """
    _check_state(opened, config)
    taken = taken_from(folder, config, scheme)
    return Library(opened.path, opened.module, opened.vm, config, scheme, 0, taken, False)


def try_step(library: Library, parameters: Any, folder: Path, device: Any) -> None:
    """Run one token: whether the library takes these parameters is known by TVM's own check of its arguments."""
    vm, tvm = library.vm, runtime()
    states = Caches(vm, library.config.n_embd)
    try:
        ids = tvm.runtime.tensor(np.zeros((1, 1), np.int32), device)
        logits, after = vm["decode"](ids, None, states.enter(states.initial), parameters)
    except Exception as error:  # noqa: BLE001 - what TVM raises has no type of its own
        raise CheckpointError(f"{library.path}: does not take {folder}: {line_of(error)}") from None
    shape, count = tuple(logits.shape), library.config.n_vocab
    if shape != (1, 1, count) or len(after) != _ROWS * library.config.n_layer:
        raise CheckpointError(
            f"{library.path}: gives logits {shape} and {len(after)} rows of state, not (1, 1, {count})"
        )


def stored_2023(taken: list[Parameter], scheme: str) -> list[Parameter]:
    """The same parameters as MLC-LLM stored them until 2024: codes of 3 bits lie five to a uint16."""
    if not scheme.startswith("q3"):
        return taken
    found = []
    for item in taken:
        if item.part == "q_weight":
            words = 1 if kept(item.tensor, scheme).layout == "NK" else 0
            shape = tuple(2 * size if axis == words else size for axis, size in enumerate(item.shape))
            item = replace(item, shape=shape, dtype="uint16")
        found.append(item)
    return found


def arithmetic(config: Config, scheme: str) -> Arithmetic:
    """What its kernels declare: products are ``op.matmul`` of the model's type, which TVM adds up in that type.

    A schedule may split a sum, and shorten its chain; without one it is a loop with one accumulator. WKV and its
    state are float32 in ``create_wkv_func``. Nothing in the library tells, so it is not verified.
    """
    chain = max(config.n_embd, config.n_ffn)
    if model_dtype(scheme) == "float32":
        return Arithmetic(chain=chain)
    return Arithmetic(activations="fp16", accumulation="fp16", residual="fp16", chain=chain)


def _check_state(opened: Opened, config: Config) -> None:
    try:
        rows = list(opened.vm["create_kv_cache"]())
        if len(rows) != _ROWS * config.n_layer:
            what = f"{len(rows)} rows of state; a model of {config.n_layer} layers has {_ROWS * config.n_layer}"
            raise CheckpointError(f"{opened.path}: gives {what}")
        first = Caches(opened.vm, config.n_embd).initial
        starts = [float(row.numpy()[0, 0]) for row in first[:_ROWS]]
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - what TVM raises has no type of its own
        raise CheckpointError(
            f"{opened.path}: its state is not that of RWKV-4 with {config.n_embd} channels: {line_of(error)}"
        ) from None
    if starts != [0.0, 0.0, 0.0, float(np.float32(PP_START)), 0.0]:
        raise CheckpointError(
            f"{opened.path}: a state that starts at {starts}; att_x, a, b, p -1e30, ffn_x is expected"
        )


def taken_from(folder: Path, config: Config, scheme: str) -> list[Parameter]:
    """What the folder holds, by name where its order is MLC-LLM's, else without names."""
    told = params.scheme(folder)
    if told != scheme:
        raise Unsupported(f"{folder} is of {told}, not of {scheme}")
    there = [(record["dtype"], record["shape"]) for record in params.numbered(folder)]
    wanted = parameters(config, scheme)
    for form in (wanted, stored_2023(wanted, scheme)):
        kinds = _kinds(form)
        if there == kinds:
            return form
        if Counter(there) == Counter(kinds):
            return [Parameter("", "", shape, dtype) for dtype, shape in there]
    if there == _kinds([replace(item, dtype="uint32") if item.part == "q_scale" else item for item in wanted]):
        theirs = "MLC-LLM's of 2023, a bfloat16 scale and minimum per group"
        raise Unsupported(f"{folder}: its {scheme} is {theirs}; {scheme} here has a float32 scale")
    params.check(folder, wanted)
    raise CheckpointError(f"{folder}: its arrays are not those of this model in {scheme}")


def _kinds(form: list[Parameter]) -> list[tuple[str, tuple[int, ...]]]:
    return [(item.dtype, item.shape) for item in form]
