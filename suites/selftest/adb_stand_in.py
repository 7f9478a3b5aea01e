"""A stand-in for ``adb``: this machine is the phone, its folder is one of the test's.

It is an executable Python script, first on the PATH. ``shell`` runs in a real shell, so that processes, their
signals and their files are real; like adb before shell protocol 2 it merges stderr into stdout and ends with 0.
``ADB_MODE`` says what is wrong with the phone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

SERIAL = "8ac9f34e"

_SCRIPT = """\
#!{python}
import os, select, shutil, subprocess, sys, time

mode, log, words = os.environ.get("ADB_MODE", ""), {log!r}, sys.argv[1:]
with open(log, "a") as file:
    file.write(" ".join(words)[:2000] + "\\n")

def fail(text):
    sys.stderr.write(text + "\\n")
    sys.exit(1)

if words == ["start-server"]:
    sys.exit(0)
if words[:1] != ["-s"]:
    fail("adb: more than one device/emulator")
serial, command, rest = words[1], words[2], words[3:]
if serial != {serial!r}:
    fail(f"error: device '{{serial}}' not found")
if mode == "offline":
    fail("error: device offline")
if mode == "unauthorized":
    fail("error: device unauthorized.\\nThis adb server's $ADB_VENDOR_KEYS is not set")
if command == "get-state":
    print("recovery" if mode == "recovery" else "device")
elif command == "push":
    if mode == "full":
        fail(f"adb: error: failed to copy '{{rest[0]}}' to '{{rest[1]}}': remote write failed: No space left on device")
    shutil.copyfile(rest[0], rest[1])
    print(f"{{rest[0]}}: 1 file pushed.")
elif command == "shell":
    line = 'getprop() {{ echo "a $1"; }}; ' + " ".join(rest)
    child = subprocess.Popen(["sh", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    gone = mode == "vanish" and "exec env" in line
    if os.path.exists(log + ".gone"):
        child.kill()
        fail(f"error: device '{{serial}}' not found")
    until = time.monotonic() + 1 if gone else None
    while select.select([child.stdout], [], [], until and max(0, until - time.monotonic()))[0]:
        data = os.read(child.stdout.fileno(), 65536)
        if not data:
            sys.exit(0)
        os.write(1, data)
    open(log + ".gone", "w").close()
    fail("error: closed")
else:
    fail("adb: unknown command " + command)
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "") -> Path:
    """Put the stand-in first on the PATH; returns the file it logs its commands in."""
    place = folder / "platform-tools"
    place.mkdir()
    log = folder / "adb.log"
    log.touch()
    program = place / "adb"
    program.write_text(_SCRIPT.format(python=sys.executable, log=str(log), serial=SERIAL), encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("ADB_MODE", mode)
    return log
