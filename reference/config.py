"""The shape of an RWKV-4 model: configuration, presets, and the tensors it must have."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from reference.errors import CheckpointError, ConfigError

VOCAB_PILE = 50277
VOCAB_WORLD = 65536

#: BlinkDL's released sizes: layers, width. The channel mix is four times as wide.
SIZES: dict[str, tuple[int, int]] = {
    "169m": (12, 768),
    "430m": (24, 1024),
    "1b5": (24, 2048),
    "3b": (32, 2560),
    "7b": (32, 4096),
    "14b": (40, 5120),
}


@dataclass(frozen=True)
class Config:
    """Sizes of an RWKV-4 model.

    ``rescale_every`` is what a Hugging Face ``config.json`` asks of fp16 inference (halve the
    residual stream after every n-th layer); the function computed is the same without it.
    """

    n_layer: int
    n_embd: int
    n_ffn: int
    n_vocab: int
    rescale_every: int = 0

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_embd", "n_ffn", "n_vocab"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; an RWKV-4 model needs at least 1")


def preset_names() -> list[str]:
    """Every name that :func:`preset` takes, aliases left out."""
    return [*SIZES, *(f"{size}-world" for size in SIZES)]


def preset(name: str) -> Config:
    """Configuration of a released size: ``169m``, ``1b5-pile``, ``7b-world``, ``raven-3b``.

    The vocabulary is the Pile's (50,277) unless ``-world`` (65,536) is asked for. Raven models
    are fine-tuned Pile models and have their shapes.
    """
    match = re.fullmatch(r"(?:raven-)?([0-9]+[mb][0-9]*)(?:-(pile|world))?", name.lower())
    size = SIZES.get(match.group(1)) if match else None
    if match is None or size is None:
        near = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no preset {name!r}; {hint}presets: {', '.join(preset_names())}")
    n_layer, n_embd = size
    n_vocab = VOCAB_WORLD if match.group(2) == "world" else VOCAB_PILE
    return Config(n_layer=n_layer, n_embd=n_embd, n_ffn=4 * n_embd, n_vocab=n_vocab)


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor, in checkpoint order.

    Names are BlinkDL's; matrices are ``(out, in)``; vectors, which some files store as
    ``(1, 1, n_embd)``, are ``(n_embd,)`` here.
    """
    c, f = config.n_embd, config.n_ffn
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (config.n_vocab, c)}
    for i in range(config.n_layer):
        for ln in ("ln1", "ln2", "ln0") if i == 0 else ("ln1", "ln2"):
            shapes[f"blocks.{i}.{ln}.weight"] = (c,)
            shapes[f"blocks.{i}.{ln}.bias"] = (c,)
        att, ffn = f"blocks.{i}.att.", f"blocks.{i}.ffn."
        for name in ("time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r"):
            shapes[att + name] = (c,)
        for name in ("key", "value", "receptance", "output"):
            shapes[f"{att}{name}.weight"] = (c, c)
        shapes[ffn + "time_mix_k"] = (c,)
        shapes[ffn + "time_mix_r"] = (c,)
        shapes[ffn + "key.weight"] = (f, c)
        shapes[ffn + "receptance.weight"] = (c, c)
        shapes[ffn + "value.weight"] = (c, f)
    shapes["ln_out.weight"] = (c,)
    shapes["ln_out.bias"] = (c,)
    shapes["head.weight"] = (config.n_vocab, c)
    return shapes


def is_matrix(name: str) -> bool:
    """Whether a canonical name is one of the matrices (what quantization schemes store packed)."""
    return name.endswith(
        ("emb.weight", "head.weight", "key.weight", "value.weight", "receptance.weight", "output.weight")
    )


def count_parameters(config: Config) -> int:
    """Number of weights of the whole model."""
    total = 0
    for shape in tensor_shapes(config).values():
        size = 1
        for n in shape:
            size *= n
        total += size
    return total


#: Tensors that only later architectures have, and the architecture each gives away.
_LATER = (
    (re.compile(r"\.att\.(x_[rwkvag]|w0|w1|a0|k_k|r_k)$"), "RWKV-7"),
    (re.compile(r"\.att\.time_(maa_|decay_w1|faaaa$)"), "RWKV-6"),
    (re.compile(r"\.att\.(ln_x\.|gate\.)"), "RWKV-5"),
    (re.compile(r"\.att\.(qq|kk|vv|oo)\."), "RWKV-4a/4b (extra attention)"),
)


def infer_config(shapes: Mapping[str, tuple[int, ...]], source: str, rescale_every: int = 0) -> Config:
    """Configuration of a checkpoint from its canonical tensor shapes, every one of them checked.

    Raises :class:`CheckpointError` naming the first later architecture, missing, extra or
    mis-shaped tensor.
    """
    # RWKV-6 checkpoints also hold RWKV-5's names and so on, so the newest is looked for first.
    for pattern, architecture in _LATER:
        found = next((name for name in shapes if pattern.search(name)), None)
        if found:
            raise CheckpointError(f"{source}: this is an {architecture} checkpoint ({found}); only RWKV-4 is supported")
    layers = {int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", name) for name in shapes) if m}
    for name in ("emb.weight", "blocks.0.ffn.key.weight"):
        if name not in shapes:
            raise CheckpointError(f"{source}: tensor {name} is missing; is this an RWKV-4 checkpoint?")
        if len(shapes[name]) != 2:
            raise CheckpointError(f"{source}: tensor {name} has shape {shapes[name]}; a matrix is expected")
    n_vocab, n_embd = shapes["emb.weight"]
    try:
        config = Config(max(layers) + 1, n_embd, shapes["blocks.0.ffn.key.weight"][0], n_vocab, rescale_every)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    wanted = tensor_shapes(config)
    for name, shape in wanted.items():
        if name not in shapes:
            raise CheckpointError(f"{source}: tensor {name} is missing; the file is incomplete or not RWKV-4")
        if tuple(shapes[name]) != shape:
            raise CheckpointError(f"{source}: tensor {name} has shape {tuple(shapes[name])}; RWKV-4 needs {shape} here")
    extra = sorted(set(shapes) - set(wanted))
    if extra:
        raise CheckpointError(f"{source}: {len(extra)} tensor(s) RWKV-4 does not have, first {extra[0]}")
    return config


def with_layers(config: Config, n_layer: int) -> Config:
    """The same model cut to its first ``n_layer`` layers."""
    return replace(config, n_layer=n_layer)
