"""``rwkv-bench convert``: a checkpoint as another format or scheme, optionally with a LoRA merged in."""

from __future__ import annotations

import argparse
import glob
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.models import TINY, is_generated, model_config, open_model
from harness.names import did_you_mean
from reference import fr_file, ggml_file
from reference.checkpoint import FORMATS, load_checkpoint, save_checkpoint
from reference.errors import ConfigError, InputError
from reference.hf_folder import blinkdl_name
from reference.lora import merge_counts, merge_lora
from reference.lost import lost
from reference.schemes import SCHEMES
from reference.synthetic import synthetic
from reference.tensor_stream import SCHEMES as FLOATS
from reference.tensor_stream import check_scheme
from reference.weights import Weights

HELP = "checkpoint -> another format or scheme, streamed and atomic"

EXAMPLES = """\
examples:
  rwkv-bench convert in.pth out.bin               for rwkv.cpp, as stored
  rwkv-bench convert in.pth out.bin --quant Q5_1  quantized as rwkv.cpp does
  rwkv-bench convert in.bin out.safetensors       a ggml file read as a model
  rwkv-bench convert RWKV-4-7B.pth folder --to hf               for transformers
  rwkv-bench convert RWKV-4-1B5.pth model.fr --quant fp16       for faster-rwkv
  rwkv-bench convert base.pth merged.pth --lora my.pth --lora-alpha 32
"""

#: Ending of OUT -> format.
_ENDINGS = {".pth": "pth", ".pt": "pth", ".safetensors": "safetensors", ".bin": "ggml", ".fr": "fr"}

#: Format -> what ``--quant`` can ask of it.
_OFFERED = {**dict.fromkeys(FORMATS, tuple(FLOATS)), "ggml": ggml_file.SCHEMES, "fr": fr_file.SCHEMES}

#: Seconds between two lines of progress.
_TELL_EVERY = 3.0

Say = Callable[[str], None]


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``convert``."""
    parser.add_argument("source", metavar="IN", help="a checkpoint (file or Hugging Face folder), tiny, or a preset")
    parser.add_argument("target", metavar="OUT", help="the file or, for hf, the folder to write")
    parser.add_argument("--to", choices=FORMATS, help="format (default: by OUT's ending; a folder is hf)")
    parser.add_argument(
        "--quant", metavar="SCHEME", help="fp32, fp16, bf16; ggml: FP32, FP16, Q4_0, ...; default: as is"
    )
    parser.add_argument("--lora", metavar="FILE", help="a LoRA file of RWKV-LM-LoRA to merge in first")
    parser.add_argument("--lora-alpha", type=float, metavar="N", help="the lora_alpha it was trained with")
    parser.add_argument("--force", action="store_true", help="replace the file OUT, once the new one is complete")


def run(arguments: argparse.Namespace, say: Say) -> int:
    """Convert; ``say`` prints one line of progress. Returns 0.

    Raises :class:`reference.errors.InputError` for what cannot be read, merged or written.
    """
    format = arguments.to or _format_of(arguments.target)
    if (arguments.lora is None) != (arguments.lora_alpha is None):
        raise InputError("--lora and --lora-alpha go together; a LoRA file does not say its alpha")
    _check_scheme(arguments.quant, format)
    _check_target(arguments)
    weights = _open(arguments.source)
    if arguments.lora is not None:
        weights = merge_lora(weights, arguments.lora, arguments.lora_alpha)
        merged, replaced = merge_counts(weights)
        say(f"{arguments.lora}: matrices merged: {merged}, tensors replaced: {replaced}")
    for line in lost(weights, format, arguments.quant):
        say(line)
    for left in _left_behind(Path(arguments.target)):
        say(f"{left} was left by a conversion that was killed; remove it unless one is running")
    started = time.perf_counter()
    save_checkpoint(weights, arguments.target, format, arguments.quant, _Progress(weights, say))
    size, seconds = _bytes(Path(arguments.target)), time.perf_counter() - started
    say(f"{arguments.target}: {format}{_as(arguments.quant)}, {size / 1e6:,.1f} MB in {seconds:.1f} s")
    return 0


def _format_of(target: str) -> str:
    if target.endswith(("/", os.sep)) or os.path.isdir(target):
        return "hf"
    ending = Path(target).suffix.lower()
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    hint = did_you_mean(ending, list(_ENDINGS)) if ending else ""
    raise InputError(f"{target}: its ending does not say the format; {hint}choose one by --to {'|'.join(FORMATS)}")


def _check_scheme(scheme: str | None, format: str) -> None:
    """Raises :class:`ConfigError` for a scheme that the format does not hold, before anything is read."""
    offered = _OFFERED[format]
    if scheme in SCHEMES and scheme not in offered and scheme.lower() not in map(str.lower, offered):
        where = "--to ggml writes" if scheme in ggml_file.SCHEMES else "belongs to another system's own file"
        raise ConfigError(f"no {format} file holds {scheme}, which {where}; choose from {', '.join(offered)}")
    check_scheme(scheme, offered)


def _check_target(arguments: argparse.Namespace) -> None:
    """Raises :class:`InputError` where OUT would overwrite what is read, or without ``--force`` any file."""
    target = arguments.target
    for source in filter(None, (arguments.source, arguments.lora)):
        if source == TINY or not os.path.exists(source):
            continue
        if os.path.exists(target) and os.path.samefile(source, target):
            raise InputError(f"{target}: is what would be read; choose another name for OUT")
        if os.path.isdir(source) and Path(source).resolve() in Path(target).resolve().parents:
            raise InputError(f"{target}: lies in {source}, which would be read; choose an OUT outside of it")
    if os.path.isfile(target) and not arguments.force:
        raise InputError(f"{target}: exists already; choose another name, or --force to replace it")


def _open(name: str) -> Weights:
    """The weights of a model name, made or mapped as they are read, not hashed and not kept in memory."""
    if name == TINY:
        return open_model(name).weights
    if is_generated(name):
        model_config(name)  # an unknown name is answered with the list
        return synthetic(name)
    return load_checkpoint(name)


class _Progress:
    """Says how far it is, every few seconds."""

    def __init__(self, weights: Weights, say: Say) -> None:
        self._bytes = {name: tensor.nbytes for name, tensor in weights.items()}
        self._say = say
        self._done = 0
        self._told = time.perf_counter()

    def __call__(self, name: str) -> None:
        """The turn of the tensor ``name`` has come."""
        if time.perf_counter() - self._told >= _TELL_EVERY:
            self._say(f"{100 * self._done // sum(self._bytes.values())} %, {blinkdl_name(name)}")
            self._told = time.perf_counter()
        self._done += self._bytes[blinkdl_name(name)]


def _left_behind(target: Path) -> Iterator[Path]:
    """What killed conversions to the same target left; :mod:`reference.atomic_write` names them so."""
    resolved = target.resolve()
    return resolved.parent.glob(f".{glob.escape(resolved.name[:100])}.*.part")


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def _as(scheme: str | None) -> str:
    return f" {scheme}" if scheme else ""
