"""MLC-LLM's ``mlc_chat_cli``, where a user has it: text for text, and the speeds that ``/stats`` prints.

The program (C++, 2023-05 to 2024-02) samples by itself and shows no logits, so there is nothing to judge: no session,
no parity, no row that it has measured, no arithmetic that it is known to compute in. :func:`converse` has one
conversation with it; what it printed is recorded, as it is for a phone or by ``rwkv-bench import --from mlc-chat``.

FOLDER is that of a compiled library, ``dist/MODEL-SCHEME`` of MLC-LLM's, or what ``rwkv-bench compile`` writes:
the library, and ``params/`` with ``mlc-chat-config.json``. Until c32dbdaa (2023-08-24) the program looked for it by
``--local-id`` under ``--artifact-path``; after it ``--model`` names ``params`` and ``--model-lib-path`` the library.

Source: ``cpp/cli_main.cc`` of https://github.com/mlc-ai/mlc-llm from 0fb027f7 to e5b224ca, which removed it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from backends.api import BackendInfo, Unavailable, Unsupported
from reference.errors import CheckpointError, InputError
from reference.numerics import Arithmetic
from reference.weights import Weights

#: Names the program, where it is not on the path.
VARIABLE = "RWKV_BENCH_MLC_CHAT"

PROGRAM = "mlc_chat_cli"

#: The types that the schemes' names give to weights and activations. Nothing is ever judged by them.
_HALF = Arithmetic(activations="fp16", accumulation="fp16", residual="fp16")

INFO = BackendInfo(
    name="mlc-chat",
    description="MLC-LLM's mlc_chat_cli: text and printed speeds; no logits, no verdict, no arithmetic is claimed",
    origin="https://github.com/mlc-ai/mlc-llm, 2023-05 to 2024-02",
    devices=("cuda", "metal", "vulkan", "opencl", "rocm"),
    schemes={
        **dict.fromkeys(("q0f32", "q4f32_0", "q4f32_1"), Arithmetic()),
        **{
            f"q{name}": _HALF for name in ("0f16", "3f16_0", "3f16_1", "4f16_0", "4f16_1", "4f16_2", "8f16_0", "8f16_1")
        },
    },
    thread_control=False,
    arithmetic_documented=False,
)

_GET = "put mlc_chat_cli on the path, or name it in " + VARIABLE
_USE = "talk to it with `rwkv-bench generate --backend mlc-chat --model FOLDER`, or `import --from mlc-chat`"

#: It prints its options at once.
HELP_SECONDS = 60.0

#: Its own last words before the first question, and what separates a role from what it says.
_READY, _SAYS = "System prompts finished\n", ": "


def program() -> str:
    """Path of the program; raises Unavailable."""
    named = os.environ.get(VARIABLE, "")
    found = shutil.which(named or PROGRAM)
    if found is None:
        raise Unavailable(f"{VARIABLE} names {named}, which is no program" if named else f"no {PROGRAM} is here", _GET)
    return found


def check() -> NoReturn:
    """Raises Unavailable: without the program, and with it, since it shows no logits."""
    program()
    raise Unavailable(f"{PROGRAM} prints text and speeds but no logits to judge", _USE)


def load(checkpoint: Weights, scheme: str, device: str, threads: int | None) -> NoReturn:
    """Raises Unavailable; see :func:`check`."""
    check()


def converse(folder: str, prompt: str, device: str, seconds: float) -> tuple[str, str]:
    """Ask once: the answer, and what ``/stats`` printed after it.

    ``prompt`` is one line; its length in tokens, and that of the answer, are the program's to choose.
    Raises Unavailable, Unsupported for a device, CheckpointError for a folder that is not of that form, InputError
    for a prompt that it would take for a command, and RuntimeError where it fails or takes longer than ``seconds``.
    """
    if not prompt.strip() or "\n" in prompt or prompt.startswith("/"):
        raise InputError(f"{PROGRAM} reads one line that is no command of its own; {prompt[:20]!r} is not that")
    if device not in INFO.devices:
        raise Unsupported(f"{PROGRAM} runs on {', '.join(INFO.devices)}, not on {device}")
    found = program()
    command = [found, *_arguments(_help(found, seconds), Path(folder), device)]
    code, printed, complaint = _run(command, f"{prompt}\n/stats\n/exit\n", seconds)
    if code:
        last = (complaint or printed).strip().splitlines()[-1:]
        raise RuntimeError(f"{PROGRAM} ended with {code}: {''.join(last)[:200]}")
    return _parts(printed)


def _help(found: str, seconds: float) -> str:
    _, printed, complaint = _run([found, "--help"], "", min(seconds, HELP_SECONDS))
    return printed + complaint


def _run(command: Sequence[str], said: str, seconds: float) -> tuple[int, str, str]:
    """Exit status, stdout and stderr; raises RuntimeError where it takes longer, and leaves nothing of it running."""
    try:
        # A session of its own: what it has started is in its group, and ends with it.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be started: {error.strerror}") from None
    with process:
        try:
            found = process.communicate(said.encode(), timeout=seconds)
        except BaseException as error:
            _kill(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise RuntimeError(f"{PROGRAM} was not done after {seconds:g} s") from None
            raise
    printed, complaint = (text.decode(errors="replace").replace("\r\n", "\n") for text in found)
    return process.returncode, printed, complaint


def _kill(process: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        process.kill()
    else:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _arguments(options: str, folder: Path, device: str) -> list[str]:
    """Options of the program's age, by its own help."""
    path = folder / "params" / "mlc-chat-config.json"
    try:
        local_id = json.loads(path.read_text(encoding="utf-8"))["local_id"]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; the folder of a compiled library is needed") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: is not the configuration of a chat") from None
    whole = folder.absolute()
    if "--model-lib-path" in options:
        libraries = sorted(file for file in whole.iterdir() if file.suffix in (".so", ".dylib", ".dll"))
        if len(libraries) != 1:
            raise CheckpointError(f"{folder}: holds {len(libraries)} libraries; one is needed")
        return ["--model", str(whole / "params"), "--model-lib-path", str(libraries[0]), "--device", device]
    if whole.name != local_id:
        raise CheckpointError(f"{folder}: this {PROGRAM} finds it by its name, which must be {local_id}")
    return ["--local-id", local_id, "--artifact-path", str(whole.parent), "--device-name", device]


def _parts(printed: str) -> tuple[str, str]:
    """Answer and statistics, of ``USER: BOT: answer``, ``USER: statistics``, ``USER:``; none of them is echoed."""
    said = printed.rpartition(_READY)[2] if _READY in printed else ""
    said, _, user = said.rpartition("\n")
    answer, mark, statistics = said.rpartition(f"\n{user}")
    bot = answer[len(user) :].partition(_SAYS)
    if not user.endswith(_SAYS) or not mark or not answer.startswith(user) or not bot[1]:
        last = printed.strip().splitlines()[-1:]
        raise RuntimeError(f"{PROGRAM} printed no conversation as it is known; last: {''.join(last)[:200]}")
    return bot[2], statistics.strip()
