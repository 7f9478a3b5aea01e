"""The steps of ``gpu-check``, as data. A step is a list of commands; each command answers with rows.

Sizes of a rehearsal are small enough for Triton's interpreter; what is run is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reference.config import Config

#: Kinds of commands: what reads their answer.
ROWS, LOCALIZED, LINES = "rows", "localized", "lines"


@dataclass(frozen=True)
class Offer:
    """A backend that runs on the device, with its schemes, and what of them is worth timing at every size."""

    backend: str
    schemes: tuple[str, ...]
    timed: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """One process.

    kind    ROWS: a command of rwkv-bench that stores rows; LOCALIZED: ``localize``, whose finding becomes a row;
            LINES: a module that prints rows
    words   its arguments; a module's name comes first
    backend, scheme, model  what a row is about where the command itself leaves none
    expected  LOCALIZED: the trace point to be found; ``None``: nothing
    """

    kind: str
    words: tuple[str, ...]
    backend: str
    scheme: str
    model: str
    environment: Mapping[str, str] = field(default_factory=dict)
    expected: str | None = None


@dataclass(frozen=True)
class Step:
    """``seconds``: about what it takes on a large GPU, by which a budget is planned."""

    name: str
    what: str
    seconds: int
    commands: tuple[Command, ...]


@dataclass(frozen=True)
class Setting:
    """What the list is made for.

    device    ``cuda:0``, ``mps``; of a rehearsal ``cpu``
    models    sizes to time: names or files
    small     the model that is judged with every scheme
    overflow, point  the file of :mod:`harness.gpu_check.overflow`, and what overflows in it
    parameters  of each model
    """

    device: str
    offers: tuple[Offer, ...]
    models: tuple[str, ...]
    small: str
    overflow: str
    point: str
    rehearsal: bool = False
    parameters: Mapping[str, int] = field(default_factory=dict)

    @property
    def environment(self) -> Mapping[str, str]:
        """Of every command: a rehearsal runs Triton's kernels in its interpreter."""
        return {"TRITON_INTERPRET": "1"} if self.rehearsal else {}


#: Schemes to time where a backend has them, beside its own first: the classes of the bars.
TIMED = ("q0f16", "fp16", "bf16", "q4f16_1", "q4f16_0", "q8f16_1", "fp16i8", "4bit", "8bit")

#: What a rehearsal has of them: a float and a packed scheme go through every kernel, the last one overflows.
REHEARSED = ("fp16", "q4f16_1", "q0f16", "4bit")

#: The shape of a rehearsal: the interpreter is slow.
REHEARSED_SHAPE = Config(n_layer=1, n_embd=64, n_ffn=256, n_vocab=64)

#: Sizes that are timed on a GPU, with the World vocabulary for 7B, as the published figures have it.
SIZES = ("169m", "1b5", "3b", "7b-world")

#: Sizes at which the reference takes minutes for each scheme, and the schemes of the bars, which are timed there.
LARGE, LARGE_TIMED = ("3b", "3b-world", "7b", "7b-world", "14b", "14b-world"), ("fp16", "q0f16", "q4f16_1", "4bit")

#: (prompt, decode, repeats) of the timed runs, on a GPU and in a rehearsal.
_TIMED, _REHEARSED = ((512, 128, 7), (2048, 16, 7)), ((40, 2, 3),)

#: Lengths of the WKV kernels' comparison, and channels.
_WKV, _WKV_REHEARSED = ("512,4096", "4096"), ("7,33", "96")


def steps(setting: Setting) -> tuple[Step, ...]:
    """The whole list, in the order in which it is run: what decides most comes first."""
    return (
        Step("parity", "every backend and scheme against the reference", 90, _parity(setting)),
        Step("localize", "an overflow planted in fp16 is found where it is", 60, _localize(setting)),
        *(
            Step(
                f"throughput-{_short(model)}",
                f"prefill and decode, {_short(model)}",
                seconds_of(setting.parameters.get(model, 0)),
                _timed(setting, model),
            )
            for model in setting.models
        ),
        Step("wkv", "the WKV kernel against fla.ops.rwkv4", 30, _wkv(setting)),
        Step("ablation", "decode with one thing changed at a time", 120, _ablation(setting)),
    )


def seconds_of(parameters: int) -> int:
    """About what all backends take with a model of that size on a large GPU."""
    return round(40 + 60 * parameters / 1e9)


def _parity(setting: Setting) -> tuple[Command, ...]:
    return tuple(
        Command(
            ROWS,
            ("parity", "--model", setting.small, *_cell(offer.backend, ",".join(offer.schemes), setting)),
            offer.backend,
            ",".join(offer.schemes),
            setting.small,
            setting.environment,
        )
        for offer in setting.offers
    )


def _localize(setting: Setting) -> tuple[Command, ...]:
    """Half precision where the backend has it all through; what keeps its stream in fp32 has nothing to find."""
    found = []
    for offer in setting.offers:
        for scheme in ("fp16", "q0f16"):
            if scheme in offer.schemes:
                overflows = scheme == "q0f16" or offer.backend != "triton"
                words = ("localize", "--model", setting.overflow, *_cell(offer.backend, scheme, setting), "--no-fix")
                expected = setting.point if overflows else None
                model = "overflow"
                found.append(Command(LOCALIZED, words, offer.backend, scheme, model, setting.environment, expected))
    return tuple(found)


def _timed(setting: Setting, model: str) -> tuple[Command, ...]:
    """One process for each backend and prompt: its schemes share the model, and take their turns on the card."""
    found = []
    for offer in setting.offers:
        schemes = [s for s in offer.timed if model not in LARGE or s in LARGE_TIMED] or offer.timed[:1]
        quant = ",".join(schemes)
        for prompt, decode, repeats in _REHEARSED if setting.rehearsal else _TIMED:
            sizes = ("--prompt-tokens", str(prompt), "--decode-tokens", str(decode), "--repeats", str(repeats))
            words = ("run", "--model", model, *_cell(offer.backend, quant, setting), *sizes)
            found.append(Command(ROWS, words, offer.backend, quant, _short(model), setting.environment))
    return tuple(found)


def _wkv(setting: Setting) -> tuple[Command, ...]:
    tokens, width = _WKV_REHEARSED if setting.rehearsal else _WKV
    found = []
    words: tuple[str, ...]
    for kernel in ("triton", "fla") if any(offer.backend == "triton" for offer in setting.offers) else ():
        words = ("suites.throughput.compare_wkv", "--kernel", kernel, "--device", setting.device)
        words = (*words, "--tokens", tokens, "--width", width)
        found.append(Command(LINES, words, kernel, "fp16", f"wkv-{width}", setting.environment))
    return tuple(found)


def _ablation(setting: Setting) -> tuple[Command, ...]:
    found = []
    model = setting.models[0]
    for offer in setting.offers:
        for scheme, changed in VARIANTS.get(offer.backend, ()):
            if scheme in offer.schemes:
                words = ("--model", model, *_cell(offer.backend, scheme, setting), *changed)
                steps_of = ("--decode-tokens", "3" if setting.rehearsal else "64")
                words = ("harness.gpu_check.ablate", *words, *steps_of)
                found.append(Command(LINES, words, offer.backend, scheme, _short(model), setting.environment))
    return tuple(found)


_HOST_LOOP, _RESCALED = ("--driver", "loop"), ("--rescale-every", "6")

#: Backend -> (scheme, what is changed), of backends in which something can be. The first is what the others are held
#: against: the backend's own loop on the device, which is one CUDA graph a step in triton, whose fp16 keeps its stream
#: in fp32; then the host's loop over ``forward``; half precision throughout; the stream halved on its way.
VARIANTS: Mapping[str, Sequence[tuple[str, tuple[str, ...]]]] = {
    "torch": (("fp16", ()), ("fp16", _HOST_LOOP), ("fp16", _RESCALED)),
    "triton": (("fp16", ()), ("fp16", _HOST_LOOP), ("q0f16", ()), ("q0f16", _RESCALED)),
    "mlx": (("fp16", ()), ("fp16", _HOST_LOOP)),
}


def _cell(backend: str, scheme: str, setting: Setting) -> tuple[str, ...]:
    return ("--backend", backend, "--quant", scheme, "--device", setting.device)


def _short(model: str) -> str:
    """A preset's own name; of a file what it is called."""
    return model.rpartition("/")[2].removesuffix(".safetensors")
