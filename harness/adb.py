"""``adb``: one phone's shell and files, its errors told in one line with what to do.

Nothing here relies on adb's own exit codes for what ran on the phone: before shell protocol 2 (adb 1.0.36,
Android 7) ``adb shell`` always ended with 0, and it merges stderr into stdout to this day unless both ends
are newer. Whoever needs a status has the phone print it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from backends.api import Unavailable
from harness.models import content_hash

#: Seconds for a question that the phone answers at once; for one that reads a model; for pushing one.
QUICK, READING, PUSHING = 20.0, 600.0, 3600.0

#: What adb says of a phone that it cannot reach -> what that means, and what to do.
_TROUBLE = (
    (
        r"device '?.*'? ?not found|no devices",
        "is not there",
        "plug it in with USB debugging on; `adb devices` lists serials",
    ),
    (r"device offline", "is offline", "plug it in again or run `adb reconnect`"),
    (r"unauthorized", "does not trust this computer", "accept the question on its screen"),
    (r"still (connecting|authorizing)", "is still connecting", "try again in a moment"),
    (r"more than one", "is one of several with this serial", "unplug the others"),
    (r"cannot connect to daemon|failed to start daemon", "cannot be asked", "run `adb kill-server` and try again"),
    (r"error: closed|protocol fault|connection reset|EOF", "has gone away", "plug it in again"),
    (r"No space left", "is full", "make room on it or name another folder in the inventory"),
    (r"Permission denied|Read-only file system", "refuses the folder", "name another folder in the inventory"),
)


@dataclass(frozen=True)
class Adb:
    """One phone. Methods raise :class:`Unavailable` when it cannot be reached."""

    program: str
    serial: str

    @staticmethod
    def connect(serial: str) -> Adb:
        """The phone of a serial, once it answers."""
        program = shutil.which("adb")
        if program is None:
            raise Unavailable("adb is not on the PATH", "install Android's platform-tools")
        # The server that this may start would inherit a pipe, and hold it open for ever.
        nowhere = subprocess.DEVNULL
        subprocess.run([program, "start-server"], stdin=nowhere, stdout=nowhere, stderr=nowhere, check=False)
        phone = Adb(program, serial)
        state = phone._run(["get-state"], QUICK).strip()
        if state != "device":
            raise Unavailable(f"phone {serial} is in state {state!r}", "start Android on it and unlock it")
        return phone

    def shell(self, command: str, seconds: float = QUICK) -> str:
        """What a command of the phone's shell prints, without line ends at the end."""
        return self._run(["shell", command], seconds).replace("\r\n", "\n").rstrip("\n")

    def push(self, local: Path, folder: str) -> bool:
        """Have a file in a folder of the phone; False if the same one was there already."""
        remote = str(PurePosixPath(folder) / local.name)
        quoted = shlex.quote(remote)
        size = self.shell(f"[ -f {quoted} ] && stat -c %s {quoted}")
        if size == str(local.stat().st_size):
            digest = self.shell(f"sha256sum {quoted}", READING).split(" ")[0]
            if digest == content_hash(local):
                return False
        self._run(["push", str(local), remote], PUSHING)
        return True

    def shell_command(self, command: str) -> list[str]:
        """The arguments of a process that runs a command of the phone's shell."""
        return [self.program, "-s", self.serial, "shell", command]

    def _run(self, arguments: list[str], seconds: float) -> str:
        try:
            done = subprocess.run(
                [self.program, "-s", self.serial, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            why = f"phone {self.serial} did not answer `adb {arguments[0]}` in {seconds:.0f} s"
            raise Unavailable(why, "plug it in again or run `adb kill-server`") from None
        except OSError as error:
            raise Unavailable(
                f"{self.program} cannot be run: {error.strerror}", "install Android's platform-tools"
            ) from None
        spoken = re.search(r"^(error|adb): .*", done.stderr, re.MULTILINE)
        if spoken or (done.returncode and arguments[0] != "shell"):
            raise explain(self.serial, spoken[0] if spoken else f"adb {arguments[0]} ended with {done.returncode}")
        return done.stdout


def explain(serial: str, message: str) -> Unavailable:
    """What adb said of a phone, and what to do."""
    for pattern, meaning, remedy in _TROUBLE:
        if re.search(pattern, message, re.IGNORECASE):
            return Unavailable(f"phone {serial} {meaning} ({message.strip()})", remedy)
    return Unavailable(f"phone {serial}: {message.strip()}", "`adb devices` tells how it is")
