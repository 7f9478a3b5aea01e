"""``rwkv-bench gpu-check``: everything that needs a GPU, in one go. Light to import, as every module of options is."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from harness.outcome import Outcome

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

    from harness.gpu_check.steps import Offer, Setting, Step
    from harness.hardware import Hardware
    from harness.rows import Row

HELP = "everything that needs a GPU, in one go, as recorded rows"

EXAMPLES = """\
examples:
  rwkv-bench gpu-check --output gpu   the whole list, into a folder
  rwkv-bench gpu-check --only parity --budget 600
  rwkv-bench gpu-check --only throughput-7b-world,wkv
  rwkv-bench gpu-check --list         the steps, and about how long they take
  rwkv-bench gpu-check --rehearse     the same on this CPU, tiny: all but speed

A step that fails is a row, and the rest goes on. Rows are appended as they are
measured, so several calls with --only fill one file.
"""

#: Where rows go without ``--output``.
FOLDER = "gpu-check"


def options(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--only", type=_words, metavar="STEPS", help="a comma list of steps (default: all)")
    parser.add_argument("--backend", type=_words, metavar="NAMES", help="(default: every one that runs on the device)")
    parser.add_argument("--model", type=_words, metavar="NAMES", help="sizes to time (default 169m,1b5,3b,7b-world)")
    parser.add_argument("--device", metavar="NAME", help="cuda:1, mps (default: the first GPU)")
    parser.add_argument("--budget", type=float, metavar="S", help="begin nothing after so many seconds, and end then")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, Triton interpreted, tiny shapes")
    parser.add_argument("--list", dest="listed", action="store_true", help="show the steps and run nothing")
    parser.add_argument("--output", dest="folder", metavar="FOLDER", default=FOLDER, help=f"(default {FOLDER}/)")
    parser.add_argument("--format", choices=("table", "json"), default="table", metavar="F", help="table or json")
    parser.set_defaults(output=None)


def run(arguments: argparse.Namespace, tell: Callable[[str], None], kind: str) -> Outcome:
    """Run the list. Raises Unavailable without a GPU, InputError for a wrong name."""
    from pathlib import Path

    from harness.gpu_check import record
    from harness.gpu_check.work import Job
    from harness.gpu_check.work import run as work
    from harness.run import new_run_id
    from harness.status import PASSED

    _check(arguments)
    hardware = _place(arguments)
    folder = Path(arguments.folder)
    setting = _setting(arguments, hardware, folder)
    chosen = _chosen(setting, arguments.only)
    if arguments.listed:
        return Outcome(_listing(chosen, kind), PASSED)
    _made(folder)
    _files(setting, folder)
    name = f"rehearsal-{hardware.name}" if arguments.rehearse else hardware.name
    file = folder / f"{name}.jsonl"
    record.save_profile(folder / f"{name}-profile.json", record.profile(hardware, arguments.rehearse))
    rows: list[Row] = []

    def emit(row: Row) -> None:
        record.append(file, row)
        rows.append(row)

    notes = {"rehearsal": arguments.rehearse, "versions": record.versions()}
    work(chosen, Job(new_run_id(), hardware, arguments.budget, notes), emit, tell)
    return _outcome(arguments, rows, file, kind)


def _check(arguments: argparse.Namespace) -> None:
    """Raises InputError for options that contradict each other, or mean nothing."""
    from reference.errors import InputError

    if arguments.budget is not None and not arguments.budget > 0:
        raise InputError(f"--budget is {arguments.budget:g}; seconds above 0 are needed")
    if arguments.rehearse and (arguments.device not in (None, "cpu") or arguments.model):
        option = "--model" if arguments.model else "--device"
        raise InputError(f"--rehearse is on the CPU, with a tiny model of its own; leave out {option}")


def _outcome(arguments: argparse.Namespace, rows: Sequence[Row], file: Path, kind: str) -> Outcome:
    from harness.gpu_check.ratios import ratios
    from harness.rows import document
    from harness.status import NOT_AVAILABLE, exit_code, row_code

    text = json.dumps(document(rows), indent=1) + "\n" if kind == "json" else _table(rows)
    said = [f"{len(rows)} rows added to {file}", *map(str, ratios(rows, arguments.rehearse))]
    if arguments.rehearse:
        said.append("a rehearsal: its figures are the interpreter's and say nothing of a GPU")
    elif rows:
        said.append("to keep them, commit the two files under reports/recorded")
    absent = _absent(arguments.backend, rows)
    codes = [row_code(row, False) for row in rows] + [NOT_AVAILABLE for _ in absent]
    return Outcome(text, exit_code(codes), (*said, *absent))


def _absent(names: Sequence[str] | None, rows: Sequence[Row]) -> list[str]:
    """Why this was no check, one line each: nothing ran, or nothing of a backend that was asked for."""
    from harness.status import ran

    here = {cell.backend for cell in ran(rows)}
    if not here:
        return ["nothing ran, so nothing was checked"]
    return [f"--backend {name}: nothing of it ran" for name in names or () if name not in here]


def _place(arguments: argparse.Namespace) -> Hardware:
    """The device; of a rehearsal the CPU; of a list any that could be. Raises Unavailable where there is no GPU."""
    from backends.api import Unavailable
    from harness.hardware import Hardware, local_hardware

    here = local_hardware()
    if arguments.rehearse:
        return here[0]
    gpus = [item for item in here if item.device != "cpu"]
    asked = arguments.device or (gpus[0].device if gpus else "cuda:0")
    kind = asked.split(":")[0]
    if arguments.listed and kind in ("cuda", "mps"):
        return Hardware(kind, asked, asked)
    if arguments.device is not None:
        gpus = [item for item in gpus if arguments.device in (item.device, item.device.split(":")[0])]
        if not gpus:
            has = ", ".join(item.device for item in here)
            raise Unavailable(f"there is no {arguments.device} here; this machine has {has}", "see --rehearse")
    if not gpus:
        raise Unavailable(
            "there is no GPU here: no NVIDIA driver answers and this is no Apple silicon",
            "--rehearse runs the same list on the CPU, with tiny shapes",
        )
    return gpus[0]


def _setting(arguments: argparse.Namespace, hardware: Hardware, folder: Path) -> Setting:
    from harness.gpu_check.overflow import point_of
    from harness.gpu_check.steps import REHEARSED_SHAPE, SIZES, Setting
    from harness.models import model_config
    from reference.config import count_parameters

    sizes = () if arguments.rehearse else tuple(arguments.model or SIZES)
    tiny = str(folder / "rehearsal-tiny.safetensors")
    return Setting(
        device=hardware.device,
        offers=_offers(arguments.backend, hardware.device, arguments.rehearse),
        models=sizes or (tiny,),
        small=tiny if arguments.rehearse else "tiny",
        overflow=str(folder / f"{'rehearsal-' if arguments.rehearse else ''}overflow.safetensors"),
        point=point_of(REHEARSED_SHAPE if arguments.rehearse else model_config("tiny")),
        rehearsal=arguments.rehearse,
        parameters={name: count_parameters(model_config(name)) for name in sizes},
    )


def _offers(names: Sequence[str] | None, device: str, rehearsal: bool) -> tuple[Offer, ...]:
    """Backends that have the device: of a rehearsal those that have some GPU, on the CPU. Raises InputError.

    What drives a library or program of the user's is among them where it can be judged here, or by name.
    """
    from backends.index import LIBRARIES, backend_names, load_backend
    from harness.gpu_check.steps import REHEARSED, TIMED, Offer
    from reference.errors import InputError

    found = []
    for name in names or backend_names():
        try:
            module = load_backend(name)
        except InputError:
            if names:
                raise
            continue
        info = module.INFO
        kinds = {"cuda", "mps"} if rehearsal else {device.split(":")[0]}
        if kinds.isdisjoint(info.devices) or (rehearsal and "cpu" not in info.devices):
            if names:
                raise InputError(f"{name} does not run on {' or '.join(sorted(kinds))}; it runs on {info.devices}")
            continue
        if not names and name in LIBRARIES and not _usable(name, module):
            continue
        usual = info.usual or tuple(info.schemes)
        timed = tuple(scheme for scheme in TIMED if scheme in usual) or usual[:1]
        if rehearsal:
            usual = tuple(scheme for scheme in REHEARSED if scheme in usual) or usual[:1]
            timed = usual[:1]
        found.append(Offer(name, usual, timed))
    return tuple(found)


def _usable(name: str, module: ModuleType) -> bool:
    from backends.api import Unavailable
    from harness.session import check_usable

    try:
        check_usable(name, module)
    except Unavailable:
        return False
    return True


def _chosen(setting: Setting, only: Sequence[str] | None) -> tuple[Step, ...]:
    from harness.gpu_check.steps import steps
    from harness.gpu_check.work import named
    from harness.names import did_you_mean
    from reference.errors import InputError

    every = steps(setting)
    for name in only or ():
        if not named(every, [name]):
            known = [step.name for step in every]
            raise InputError(f"no step {name!r}; {did_you_mean(name, known)}steps: {', '.join(known)}")
    return named(every, only) if only else every


def _made(folder: Path) -> None:
    from reference.errors import InputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: {error.strerror}; a folder is needed") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"--output {folder}: not writable")


def _files(setting: Setting, folder: Path) -> None:
    """The models that the steps name as files."""
    from pathlib import Path

    from harness.gpu_check.overflow import write_overflowing
    from harness.gpu_check.steps import REHEARSED_SHAPE
    from reference.checkpoint import save_checkpoint
    from reference.synthetic import synthetic

    if setting.rehearsal:
        save_checkpoint(synthetic(REHEARSED_SHAPE, seed=1), setting.small, "safetensors", "fp32")
    write_overflowing(setting.small, Path(setting.overflow))


def _listing(steps: Sequence[Step], kind: str) -> str:
    if kind == "json":
        told = [{"step": s.name, "what": s.what, "seconds": s.seconds, "commands": len(s.commands)} for s in steps]
        return json.dumps({"schema": 1, "steps": told}, indent=1) + "\n"
    wide = max((len(step.name) for step in steps), default=0)
    return "".join(
        f"{step.name:{wide}}  about {step.seconds} s, {len(step.commands)} commands: {step.what}\n" for step in steps
    )


def _table(rows: Sequence[Row]) -> str:
    """One line a row: step, cell, figure, verdict; the reason where it is no PASS."""
    lines = []
    wide = max((len(row.extra["gpu_check"]["step"]) for row in rows), default=0)
    for row in rows:
        figure = "" if row.value is None else f"{row.value:.4g} {row.unit}"
        share = "" if row.roofline_fraction is None else f" ({100 * row.roofline_fraction:.0f} %)"
        step = row.extra["gpu_check"]["step"]
        changed = " ".join(f"{key} {value}" for key, value in row.extra.get("ablation", {}).items())
        cell = f"{row.backend} {row.scheme} {_short(row.model)} {row.metric} {changed}".rstrip()
        why = "" if row.verdict == "PASS" else f"  {row.reason}"
        lines.append(f"{step:{wide}} {row.verdict or '':11} {figure + share:18} {cell}{why}\n")
    return "".join(lines)


def _short(model: str) -> str:
    return os.path.basename(model)


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if not words:
        raise argparse.ArgumentTypeError("no name is given")
    return words
