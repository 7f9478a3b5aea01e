"""A params folder in MLC-LLM's layout: ``ndarray-cache.json``, shards of raw bytes, ``mlc-chat-config.json``.

Records are called ``param_0``, ``param_1``, ... in the order in which a library takes them, as MLC-LLM wrote them
while it had RWKV-4 (``mlc_llm/utils.py``, save_params); ``names`` in the index, ours, says which is which.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from backends.tvm_mlc.storage import Parameter
from reference.errors import CheckpointError
from reference.weights import Weights

INDEX, CHAT = "ndarray-cache.json", "mlc-chat-config.json"

#: A shard is closed when it is full; a larger array has one to itself.
SHARD_BYTES = 32 << 20

#: Files of a tokenizer that are copied where they lie beside the checkpoint.
TOKENIZERS = ("tokenizer_model", "20B_tokenizer.json", "tokenizer.json")


def write(folder: Path, items: Iterable[tuple[Parameter, np.ndarray]], chat: dict[str, Any], source: str) -> None:
    """Write a folder that exists and is empty; ``source`` is the checkpoint, whose tokenizer is copied."""
    shards: list[dict[str, Any]] = []
    names: list[str] = []
    pending: list[tuple[str, np.ndarray]] = []
    for item, array in items:
        name = f"param_{len(names)}"
        names.append(item.name)
        if pending and sum(a.nbytes for _, a in pending) + array.nbytes > SHARD_BYTES:
            shards.append(_shard(folder, len(shards), pending))
            pending = []
        pending.append((name, array))
    shards.append(_shard(folder, len(shards), pending))
    size = sum(shard["nbytes"] for shard in shards)
    told = {"ParamSize": len(names), "ParamBytes": size, "names": names}
    (folder / INDEX).write_text(json.dumps({"metadata": told, "records": shards}, indent=1))
    found = _copy_tokenizer(folder, Path(source))
    (folder / CHAT).write_text(json.dumps({**chat, "tokenizer_files": found}, indent=1))


def chat_config(weights: Weights, scheme: str) -> dict[str, Any]:
    """What ``mlc-chat-config.json`` says of an RWKV-4 model, by the keys of MLC-LLM (``mlc_llm/core.py``)."""
    world = weights.config.n_vocab == 65536
    model = f"rwkv-{Path(weights.source).stem or 'unnamed'}"
    name = f"{model}-{scheme}"
    return {
        "model_lib": name,
        "local_id": name,
        "conv_template": "rwkv_world" if world else "rwkv",
        "temperature": 1.2,
        "repetition_penalty": 0.996,
        "top_p": 0.5,
        "mean_gen_len": 128,
        "max_gen_len": 512,
        "shift_fill_factor": 0.3,
        "model_category": "rwkv_world" if world else "rwkv",
        "model_name": model,
        "vocab_size": weights.config.n_vocab,
    }


def read(folder: Path, wanted: list[Parameter]) -> list[np.ndarray]:
    """The arrays a library takes, memory-mapped. Raises :class:`CheckpointError` for a folder of another form."""
    check(folder, wanted)
    return [_mapped(record) for record in numbered(folder)]


def check(folder: Path, wanted: list[Parameter]) -> None:
    """Raises :class:`CheckpointError` for the first array that is not the one a library takes."""
    records = numbered(folder)
    if len(records) != len(wanted):
        raise CheckpointError(f"{folder}: holds {len(records)} arrays, but the library takes {len(wanted)}")
    for i, (record, item) in enumerate(zip(records, wanted)):
        if record["shape"] != item.shape or record["dtype"] != item.dtype:
            was, takes = f"{record['dtype']} {record['shape']}", f"{item.dtype} {item.shape}"
            of = f" for {item.name}" if item.tensor else ""
            raise CheckpointError(f"{folder}: param_{i} is {was}, but the library takes {takes}{of}")


def scheme(folder: Path) -> str:
    """The scheme that the chat configuration names, by which MLC-LLM found the library.

    Raises :class:`CheckpointError` where there is no such file, or it is not one.
    """
    path = folder / CHAT
    told = _json(path)
    name = told.get("local_id") or told.get("model_lib") if isinstance(told, dict) else None
    if not isinstance(name, str) or "-" not in name:
        raise CheckpointError(f"{path}: has no local_id of the form MODEL-SCHEME")
    category = told.get("model_category", "rwkv")
    if not str(category).startswith("rwkv"):
        raise CheckpointError(f"{path}: is of a model of category {category}, not rwkv")
    return name.rsplit("-", 1)[1]


def numbered(folder: Path) -> list[dict[str, Any]]:
    """The index's records ``param_0``, ``param_1``, ...: shape, dtype, path and offset of each."""
    records = _records(folder)
    absent = [i for i in range(len(records)) if f"param_{i}" not in records]
    if absent or not records:
        others = f"; it has {next(iter(records))}" if records else ""
        raise CheckpointError(f"{folder / INDEX}: no record param_{absent[0] if absent else 0}{others}")
    return [records[f"param_{i}"] for i in range(len(records))]


def _shard(folder: Path, number: int, items: list[tuple[str, np.ndarray]]) -> dict[str, Any]:
    path, offset, records = f"params_shard_{number}.bin", 0, []
    with (folder / path).open("wb") as file:
        for name, array in items:
            # As TVM writes and reads them: "raw" is the array's own bytes, in C order.
            record = {"name": name, "shape": list(array.shape), "dtype": str(array.dtype), "format": "raw"}
            records.append({**record, "nbytes": array.nbytes, "byteOffset": offset})
            file.write(array.data)
            offset += array.nbytes
    return {"dataPath": path, "format": "raw-shard", "nbytes": offset, "records": records}


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / INDEX
    index = _json(path)
    try:
        found: dict[str, dict[str, Any]] = {}
        for shard in index["records"]:
            for record in shard["records"]:
                if shard["format"] != "raw-shard" or record["format"] != "raw":
                    raise CheckpointError(f"{path}: {record['name']} is stored as {record['format']}; raw is expected")
                shape = tuple(int(size) for size in record["shape"])
                np.dtype(record["dtype"])  # a TypeError for what is no type of numpy's
                place = {"path": folder / str(shard["dataPath"]), "offset": int(record["byteOffset"])}
                found[str(record["name"])] = {"shape": shape, "dtype": str(record["dtype"]), **place}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not an index of arrays ({type(error).__name__}: {error})") from None
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"a params folder holds {INDEX}, its shards and {CHAT}"
        raise CheckpointError(f"{path}: {error.strerror}; {what}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from None


def _mapped(record: dict[str, Any]) -> np.ndarray:
    path, size = record["path"], math.prod(record["shape"]) * np.dtype(record["dtype"]).itemsize
    try:
        if path.stat().st_size < record["offset"] + size:
            raise CheckpointError(f"{path}: is truncated; {record['offset'] + size} bytes are expected at least")
        return np.memmap(path, record["dtype"], "r", record["offset"], record["shape"])
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; the folder lacks a shard") from None


def _copy_tokenizer(folder: Path, source: Path) -> list[str]:
    near = source if source.is_dir() else source.parent
    found = [name for name in TOKENIZERS if str(source) != "memory" and (near / name).is_file()]
    for name in found:
        shutil.copyfile(near / name, folder / name)
    return found
