"""A Hugging Face folder of ``RwkvForCausalLM``: ``config.json`` and one or more weight files.

Official code: transformers, src/transformers/models/rwkv. What lies on disk is unrescaled:
transformers divides by ``rescale_every`` after loading.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from reference import safetensors_file
from reference.atomic_write import atomic_file, atomic_folder
from reference.config import Config
from reference.errors import CheckpointError
from reference.forward import LN_EPS
from reference.tensor_file import MappedFile, TensorFile, parse_object, quoted
from reference.tensor_stream import Encoder
from reference.weights import Tensor

CONFIG = "config.json"
#: Weight files in the order in which transformers looks for them; an index names the shards.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_MAX_JSON = 64 << 20

_TO_BLINKDL = (
    (re.compile(r"^rwkv\."), ""),
    (re.compile(r"^embeddings\."), "emb."),
    (re.compile(r"^(blocks\.0)\.pre_ln\."), r"\1.ln0."),
    (re.compile(r"^(blocks\.\d+)\.attention\."), r"\1.att."),
    (re.compile(r"^(blocks\.\d+)\.feed_forward\."), r"\1.ffn."),
    (re.compile(r"\.time_mix_key$"), ".time_mix_k"),
    (re.compile(r"\.time_mix_value$"), ".time_mix_v"),
    (re.compile(r"\.time_mix_receptance$"), ".time_mix_r"),
)
_TO_HF = (
    (re.compile(r"^emb\."), "embeddings."),
    (re.compile(r"\.ln0\."), ".pre_ln."),
    (re.compile(r"\.att\."), ".attention."),
    (re.compile(r"\.ffn\."), ".feed_forward."),
    (re.compile(r"\.time_mix_k$"), ".time_mix_key"),
    (re.compile(r"\.time_mix_v$"), ".time_mix_value"),
    (re.compile(r"\.time_mix_r$"), ".time_mix_receptance"),
    (re.compile(r"^(?!head\.)"), "rwkv."),
)

#: ``config.json`` key -> field of :class:`Config` that the tensors decide.
_SIZES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "vocab_size": "n_vocab",
    "intermediate_size": "n_ffn",
}
_TORCH_DTYPE = {"f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def blinkdl_name(name: str) -> str:
    """BlinkDL's name of a tensor from Hugging Face's; a name that is BlinkDL's already stays."""
    for pattern, text in _TO_BLINKDL:
        name = pattern.sub(text, name)
    return name


def hf_name(name: str) -> str:
    """Hugging Face's name of a canonical tensor."""
    for pattern, text in _TO_HF:
        name = pattern.sub(text, name)
    return name


def read(path: str, read_file: Callable[[str], TensorFile]) -> tuple[TensorFile, dict[str, Any]]:
    """Tensors of a folder under the names its files give them, and its ``config.json``, checked.

    Raises :class:`CheckpointError` for a folder that is not one of RWKV-4, and for a missing,
    misnamed or damaged shard.
    """
    settings = _settings(path)
    name = next((name for name in _WEIGHT_FILES if os.path.exists(os.path.join(path, name))), None)
    if name is None:
        raise CheckpointError(f"{path}: has {CONFIG} but no weights; one of {', '.join(_WEIGHT_FILES)} is expected")
    if name.endswith(".json"):
        return _read_shards(path, name, read_file), settings
    return read_file(os.path.join(path, name)), settings


def _settings(path: str) -> dict[str, Any]:
    try:
        listing = os.listdir(path)
    except OSError as error:
        raise CheckpointError(f"{path}: the folder cannot be read ({error.strerror})") from None
    if CONFIG not in listing:
        instead = _instead(path, listing)
        raise CheckpointError(f"{path}: a folder without {CONFIG}, so not a Hugging Face model{instead}")
    settings = _read_json(os.path.join(path, CONFIG))
    check_settings(settings, os.path.join(path, CONFIG))
    return settings


def _instead(path: str, listing: Iterable[str]) -> str:
    if "ndarray-cache.json" in listing or "tensor-cache.json" in listing:
        return "; it looks like an MLC params folder, which is not read yet"
    files = sorted(name for name in listing if name.endswith((".pth", ".safetensors")))
    return f"; did you mean {os.path.join(path, files[0])}?" if files else ""


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raises :class:`CheckpointError` for a ``config.json`` that asks for something else than RWKV-4."""
    kind = settings.get("model_type")
    if kind != "rwkv":
        later = re.fullmatch(r"rwkv[-_]?v?([5-9]).*", str(kind))
        known = f"this is an RWKV-{later.group(1)} model" if later else f"model_type is {quoted(kind)}"
        raise CheckpointError(f"{where}: {known}; only RWKV-4 (model_type 'rwkv') is supported")
    width, attention = settings.get("hidden_size"), settings.get("attention_hidden_size")
    if attention is not None and attention != width:
        raise CheckpointError(
            f"{where}: attention_hidden_size {quoted(attention)} is not hidden_size {quoted(width)};"
            " such a model is not BlinkDL's RWKV-4"
        )
    epsilon = settings.get("layer_norm_epsilon", LN_EPS)
    if epsilon != LN_EPS:
        raise CheckpointError(f"{where}: layer_norm_epsilon is {quoted(epsilon)}; RWKV-4 has {LN_EPS}")
    rescale = settings.get("rescale_every", 0)
    if type(rescale) is not int:
        raise CheckpointError(f"{where}: rescale_every is {quoted(rescale)}; a number of layers is expected")


def rescale_every(settings: Mapping[str, Any]) -> int:
    """Layers after which fp16 inference halves the residual stream; 0 never. Left out, transformers takes 6."""
    return max(0, int(settings.get("rescale_every", 6)))


def check_sizes(settings: Mapping[str, Any], config: Config, where: str) -> None:
    """Raises :class:`CheckpointError` where ``config.json`` and the tensors disagree."""
    for key, name in _SIZES.items():
        told, found = settings.get(key), getattr(config, name)
        if told is not None and told != found:
            raise CheckpointError(f"{where}: {key} is {quoted(told)}, but the tensors have {found}")


def _read_shards(path: str, index: str, read_file: Callable[[str], TensorFile]) -> TensorFile:
    where = os.path.join(path, index)
    weight_map = _read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: has no weight_map")
    shards = list(dict.fromkeys(_shard_name(shard, where) for shard in weight_map.values()))
    missing = [shard for shard in shards if not os.path.exists(os.path.join(path, shard))]
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} of {len(shards)} shards are missing, first {missing[0]}")
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        found = read_file(os.path.join(path, shard))
        twice = next((name for name in found.tensors if name in tensors), None)
        if twice is not None:
            raise CheckpointError(f"{os.path.join(path, shard)}: tensor {quoted(twice)} is in an earlier shard as well")
        tensors.update(found.tensors)
        metadata.update(found.metadata)
    absent = next((name for name in weight_map if name not in tensors), None)
    if absent is not None:
        raise CheckpointError(f"{where}: tensor {quoted(absent)} is missing from {weight_map[absent]}")
    return TensorFile(tensors, metadata)


def _shard_name(shard: object, where: str) -> str:
    # An index must not be able to point outside of its folder.
    if not isinstance(shard, str) or not shard.isprintable() or not shard or re.search(r"[/\\:]", shard):
        raise CheckpointError(f"{where}: {quoted(shard)} is not the name of a file in this folder")
    return shard


def _read_json(path: str) -> dict[str, Any]:
    file = MappedFile(path)
    if file.size > _MAX_JSON:
        raise CheckpointError(f"{path}: has {file.size} bytes, too many for a description of a model")
    return parse_object(file.part(0, file.size), f"{path}: the file")


def write(
    path: str, tensors: Mapping[str, Tensor], config: Config, metadata: Mapping[str, str], encoder: Encoder
) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads; tensors as BlinkDL lays them out."""
    with atomic_folder(path) as folder:
        with atomic_file(os.path.join(folder, "model.safetensors")) as file:
            renamed = {hf_name(name): tensor for name, tensor in tensors.items()}
            safetensors_file.write(file, renamed, {**metadata, "format": "pt"}, encoder)
        with atomic_file(os.path.join(folder, CONFIG)) as file:
            types = {encoder.stored(tensor) for tensor in tensors.values()}
            file.write((json.dumps(_make_settings(config, types), indent=2) + "\n").encode())


def _make_settings(config: Config, types: set[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        "vocab_size": config.n_vocab,
        "context_length": 1024,  # of transformers' CUDA kernel only; the model has none
        "hidden_size": config.n_embd,
        "attention_hidden_size": config.n_embd,
        "intermediate_size": config.n_ffn,
        "num_hidden_layers": config.n_layer,
        "layer_norm_epsilon": LN_EPS,
        "rescale_every": config.rescale_every,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": True,
    }
    if len(types) == 1:
        settings["torch_dtype"] = _TORCH_DTYPE[types.pop()]
    return settings
