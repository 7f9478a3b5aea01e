"""Speed of a program on a phone: push it and its model over adb, run it, read what it prints.

The rows are *recorded*: what runs there is the user's own binary, whose logits nobody has seen. What it prints
is read by the parsers of ``rwkv-bench import``. A program that prints nothing for a while is TIMEOUT
("generation stuck"), one that ends badly, or with the phone, is CRASHED with its last words. Whatever happens,
the process on the phone is ended by its id and the prompt is removed; the program and the model stay there.

    Unavailable    no adb, no such phone, no room on it
    InputError     a file of the inventory that is not there, a prompt that the program cannot take
"""

from __future__ import annotations

import os
import re
import secrets
import selectors
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from backends.api import Unavailable
from harness.adb import Adb
from harness.inventory import Phone
from harness.printed import PARSERS, Figure, lines_of
from harness.recorded import known_workload
from harness.recorded_names import scheme_class
from harness.rows import Row
from reference.errors import InputError

Tell = Callable[[str], None]

#: Seconds without output after which a program is stuck, loading its model included.
STUCK_SECONDS = 120.0

#: More output than any speed report is a flood.
MOST_BYTES = 16 << 20

#: Lines and characters of a program's last words in a reason.
LAST_LINES, LAST_CHARACTERS = 3, 300

#: Files that together are one ncnn model, named by what they share.
NCNN_FILES = (".param", ".bin", ".config")


#: The last line of what faster-rwkv's chat prints after an answer, shorter than 100 bytes.
_SPEED = re.compile(rb"-- tokens per second:[^\n]*\n")


@dataclass(frozen=True)
class Ended:
    """How a program on the phone ended: ``verdict`` is None where it did as it should."""

    output: bytes
    verdict: str | None
    reason: str


def run_on_phone(
    phone: Phone,
    model_file: str | os.PathLike[str],
    scheme: str,
    prompt: str,
    decode_tokens: int,
    timeout: float | None,
    tell: Tell,
    model: str | None = None,
) -> list[Row]:
    """One run of the phone's program: a recorded row per printed figure, else one row that says what went wrong.

    model_file   a file, or what the files of an ncnn model share (``dir/rwkv-4`` for ``dir/rwkv-4.param``, ...)
    timeout      seconds without output; None: :data:`STUCK_SECONDS`
    model        the name in the rows; that of the file if left out
    """
    _check_prompt(phone, prompt)
    files, base = _model_files(Path(model_file))
    for file in (phone.binary, phone.tokenizer, *phone.libraries):
        if file is not None and not file.is_file():
            raise InputError(f"phone {phone.name}: {file}: no such file; the inventory names it")
    tell(f"looking for phone {phone.name}")
    adb = Adb.connect(phone.adb)
    known = _known(adb, phone, model or Path(model_file).name, scheme)
    adb.shell(f"mkdir -p {shlex.quote(phone.folder)}")
    for file in (phone.binary, *((phone.tokenizer,) if phone.tokenizer else ()), *phone.libraries, *files):
        tell(f"pushing {file.name} ({file.stat().st_size / 2**20:.1f} MiB)")
        adb.push(file, phone.folder)
    adb.shell(f"chmod 755 {shlex.quote(f'{phone.folder}/{phone.binary.name}')}")
    values = {
        "model": base,
        "tokenizer": phone.tokenizer.name if phone.tokenizer else "",
        "scheme": scheme,
        "prompt": prompt,
        "decode_tokens": str(decode_tokens),
        "threads": str(phone.threads or ""),
    }
    tell(f"running {phone.binary.name}")
    ended = _run(adb, phone, values, STUCK_SECONDS if timeout is None else timeout, tell)
    return _rows(phone, ended, known)


def _check_prompt(phone: Phone, prompt: str) -> None:
    if not prompt.strip() or "\0" in prompt:
        raise InputError(f"phone {phone.name}: the prompt is empty or holds a NUL; some text is needed")
    if phone.kind == "faster-rwkv" and "\n" in prompt.strip("\n"):
        raise InputError(f"phone {phone.name}: faster-rwkv's chat reads one line; give a prompt without line breaks")


def _model_files(path: Path) -> tuple[list[Path], str]:
    """The files of a model, and its name on the phone."""
    base = path.with_suffix("") if path.suffix in NCNN_FILES and path.with_suffix(".param").is_file() else path
    parts = [file for ending in NCNN_FILES if (file := base.with_name(base.name + ending)).is_file()]
    if base.with_name(base.name + ".param") in parts:
        return parts, base.name
    if not path.is_file():
        raise InputError(f"{path}: no such model file, and no {path.name}.param of an ncnn model")
    return [path], path.name


def _known(adb: Adb, phone: Phone, model: str, scheme: str) -> dict[str, Any]:
    """Fields that all rows of a run share."""
    asked = {"name": "ro.product.model", "soc": "ro.board.platform", "android": "ro.build.version.release"}
    detail = {key: adb.shell(f"getprop {name}").strip() for key, name in asked.items()}
    return {
        "kind": "recorded",
        "run": f"phone-{secrets.token_hex(6)}",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": phone.hardware,
        "hardware_detail": {key: value for key, value in detail.items() if value},
        "backend": phone.kind,
        "model": model,
        "scheme": scheme,
        "scheme_class": scheme_class(scheme),
    }


def _run(adb: Adb, phone: Phone, values: Mapping[str, str], seconds: float, tell: Tell) -> Ended:
    """Run the program, and leave neither a process nor a prompt behind."""
    mark = f"rwkv-bench-{secrets.token_hex(6)}"
    with tempfile.TemporaryDirectory(prefix="rwkv-bench-") as folder:
        prompt = Path(folder, f"prompt-{mark}")
        prompt.write_text(values["prompt"].rstrip("\n") + "\n", encoding="utf-8")
        reader = _Reader(mark, phone.prints == "faster-rwkv")
        try:
            adb.push(prompt, phone.folder)
            command = _command(phone, values, prompt.name, mark)
            process = subprocess.Popen(
                adb.shell_command(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            with process:
                try:
                    return reader.read(process, seconds)
                finally:
                    process.kill()
        finally:
            _clean(adb, phone, mark, tell)


def _command(phone: Phone, values: Mapping[str, str], prompt: str, mark: str) -> str:
    """One line for the phone's shell: keeps the process id in a file while it runs, prints its status at the end."""
    environment = {"LD_LIBRARY_PATH": "."}
    if phone.kind == "faster-rwkv":
        environment.update(FR_SHOW_SPEED="1", FR_MAX_OUTPUT_LEN=values["decode_tokens"])
        environment.update({"FR_THREADS": values["threads"]} if phone.threads else {})
    environment.update({name: _filled(text, values) for name, text in phone.environment.items()})
    words = [f"{name}={text}" for name, text in environment.items()]
    words += [f"./{phone.binary.name}", *(_filled(text, values) for text in phone.arguments)]
    program = " ".join(shlex.quote(word) for word in words)
    # A process in the background has no standard input unless it is given one by name.
    return (
        f"cd {shlex.quote(phone.folder)} && {{ (exec env {program}) < {prompt} 2>&1 & p=$!; echo $p > pid-{mark}; "
        f"wait $p; s=$?; rm -f pid-{mark}; echo; echo {mark} exit $s; }}"
    )


def _filled(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: values[found[1]], text)


class _Reader:
    """Reads a program's output until it ends, has told its speed, is stuck or floods."""

    def __init__(self, mark: str, until_speed: bool) -> None:
        self._mark = mark.encode()
        self._until_speed = until_speed
        self._output = bytearray()

    def read(self, process: subprocess.Popen[bytes], seconds: float) -> Ended:
        """``seconds``: the longest silence."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(seconds):
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    return self._closed(process)
                start = max(0, len(self._output) - 100)
                self._output += data
                # chat goes on with an empty question when its input ends: it is over once it has told its speed.
                told = _SPEED.search(self._output, start) if self._until_speed else None
                if told:
                    del self._output[told.end() :]
                    return Ended(self._printed(), None, "")
                if len(self._output) > MOST_BYTES:
                    return self._failed(
                        "CRASHED", f"printed more than {MOST_BYTES >> 20} MiB without telling its speed"
                    )
        return self._failed("TIMEOUT", f"printed nothing for {seconds:g} s")

    def _closed(self, process: subprocess.Popen[bytes]) -> Ended:
        """The connection has ended: by itself, or with the phone."""
        found = re.search(rb"%s exit (\d+)\r?\n" % self._mark, self._output)
        if not found:
            return self._failed("CRASHED", f"the phone went away while it ran (adb ended with {process.wait()})")
        status = int(found[1])
        return Ended(self._printed(), None, "") if status == 0 else self._failed("CRASHED", _told(status))

    def _failed(self, verdict: str, reason: str) -> Ended:
        return Ended(self._printed(), verdict, reason)

    def _printed(self) -> bytes:
        """What the program itself printed."""
        return re.sub(rb"\n?%s exit \d+\r?\n" % self._mark, b"\n", bytes(self._output))


def _told(status: int) -> str:
    """An exit status as a shell tells it: above 128 a signal."""
    with suppress(ValueError):
        if status > 128:
            return f"ended by {signal.Signals(status - 128).name}"
    return f"ended with status {status}"


def _clean(adb: Adb, phone: Phone, mark: str, tell: Tell) -> None:
    """End the process, if it still runs, and remove the prompt. A phone that is gone can only be told of."""
    pid, prompt = (shlex.quote(f"{phone.folder}/{what}-{mark}") for what in ("pid", "prompt"))
    try:
        adb.shell(f"[ -f {pid} ] && kill -9 $(cat {pid}); rm -f {pid} {prompt}")
    except Unavailable as error:
        tell(f"{phone.binary.name} and prompt-{mark} may be left on phone {phone.name}: {error}")


def _rows(phone: Phone, ended: Ended, known: Mapping[str, Any]) -> list[Row]:
    lines = lines_of(ended.output)
    if ended.verdict is not None:
        return [_failure(ended.verdict, ended.reason, lines, known)]
    reading = PARSERS[phone.prints](lines)
    if not reading.figures:
        why = f"; {reading.rejected[0]}" if reading.rejected else ""
        return [_failure("CRASHED", f"ended without a speed as {phone.prints} prints it{why}", lines, known)]
    return [_row(figure, phone, known) for figure in reading.figures]


def _row(figure: Figure, phone: Phone, known: Mapping[str, Any]) -> Row:
    remark = f"; {figure.remark}" if figure.remark else ""
    return Row(
        **known,
        backend_version=figure.says.get("backend_version"),
        threads=figure.says.get("threads", phone.threads),
        workload=known_workload(figure.metric, figure.says.get("prompt_tokens"), figure.says.get("decode_tokens")),
        metric=figure.metric,
        value=figure.value,
        reason=f"printed by {phone.kind}; parity unknown{remark}",
        extra={
            "source": f"{phone.kind} on phone {phone.name}",
            "printed": {"line": figure.line, "text": figure.text, **figure.facts},
        },
    )


def _failure(verdict: str, reason: str, lines: Sequence[str], known: Mapping[str, Any]) -> Row:
    said = " / ".join(line.strip() for line in [line for line in lines if line.strip()][-LAST_LINES:])
    last = f"; its last words: {said[-LAST_CHARACTERS:]}" if said else "; it printed nothing"
    return Row(**known, metric="decode", verdict=verdict, reason=reason + last)
