"""Machines and phones of the user's: ``rwkv-bench.toml``.

    [hosts.box]
    ssh = "me@box"                   # or a command: ["ssh", "-p", "2222", "me@box"]
    hardware = "a800"                # the profile its rows are filed under
    interpreter = "python3"          # default; any Python 3.9 or newer
    models = "/data/models"          # optional: where relative model paths are looked for there
    environments = "/data/envs"      # optional: where environments are built there

    [phones.mi10]
    adb = "8ac9f34e"                 # serial, as `adb devices` shows it
    hardware = "snapdragon865"
    kind = "faster-rwkv"             # or rwkv.cpp; any other name with `prints` and `arguments`
    binary = "android/chat"          # relative to this file
    tokenizer = "android/world_tokenizer"
    libraries = ["android/libc++_shared.so"]
    threads = 4

It is looked for where ``RWKV_BENCH_INVENTORY`` says, else in the current folder, else in the user's
configuration folder; the first one found is the only one read.

    InventoryError (InputError)    a file that cannot be read or holds what it must not; one line
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from harness.names import did_you_mean
from reference.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE_NAME = "rwkv-bench.toml"
VARIABLE = "RWKV_BENCH_INVENTORY"

#: Names that already mean something to ``--hardware``.
RESERVED = ("local", "cpu", "all")

#: Kind of a phone's program -> what it prints, and its arguments.
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "faster-rwkv": ("faster-rwkv", ("{tokenizer}", "{model}", "{scheme}")),
    "rwkv.cpp": ("", ()),
}

#: Formats of :data:`harness.printed.PARSERS` that a program on a phone can print.
PRINTS = ("faster-rwkv", "mlc-chat", "llama-bench")

#: What ``arguments`` and ``environment`` of a phone may hold in braces.
PLACEHOLDERS = ("model", "tokenizer", "scheme", "prompt", "decode_tokens", "threads")

PHONE_FOLDER = "/data/local/tmp/rwkv-bench"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLACEHOLDER = re.compile(r"\{(\w*)\}")

T = TypeVar("T")


class InventoryError(InputError):
    """An inventory that cannot be used, explained in one line."""


@dataclass(frozen=True)
class Host:
    """A machine that is reached over ssh. ``ssh``: the command, to which what runs there is appended."""

    name: str
    ssh: tuple[str, ...]
    hardware: str
    interpreter: str = "python3"
    models: str | None = None
    environments: str | None = None


@dataclass(frozen=True)
class Phone:
    """A phone that is reached over adb, and the program to push there. Paths are of this machine, ``folder`` is not.

    arguments    with :data:`PLACEHOLDERS` in braces; the prompt comes on standard input as well
    environment  of the program, placeholders too
    """

    name: str
    adb: str
    hardware: str
    binary: Path
    kind: str
    prints: str
    arguments: tuple[str, ...]
    tokenizer: Path | None = None
    libraries: tuple[Path, ...] = ()
    folder: str = PHONE_FOLDER
    threads: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


_HOST_KEYS = tuple(item.name for item in fields(Host) if item.name != "name")
_PHONE_KEYS = tuple(item.name for item in fields(Phone) if item.name != "name")


@dataclass(frozen=True)
class Inventory:
    """What one file holds; ``path`` is None where there is none."""

    path: Path | None
    hosts: Mapping[str, Host]
    phones: Mapping[str, Phone]

    def find(self, name: str) -> Host | Phone | None:
        """The host or phone of that name."""
        return self.hosts.get(name) or self.phones.get(name)

    def names(self) -> list[str]:
        """Every name, hosts first, in file order."""
        return [*self.hosts, *self.phones]


def find(name: str) -> Host | Phone | None:
    """The host or phone of that name in the user's inventory. Raises :class:`InventoryError`."""
    return load().find(name)


def names() -> list[str]:
    """Every name in the user's inventory. Raises :class:`InventoryError`."""
    return load().names()


def load(path: str | os.PathLike[str] | None = None) -> Inventory:
    """The inventory of ``path``, else the user's; empty if the user has none. Raises :class:`InventoryError`."""
    file = Path(path) if path is not None else _users_file()
    if file is None:
        return Inventory(None, {}, {})
    try:
        text = file.read_bytes().decode("utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise InventoryError(f"cannot read the inventory {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InventoryError(f"{file}: not UTF-8 at byte {error.start}; TOML is UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InventoryError(f"{file}: not TOML: {error}") from None
    return _inventory(file, content)


def _users_file() -> Path | None:
    named = os.environ.get(VARIABLE)
    if named:
        if not Path(named).is_file():
            raise InventoryError(f"{VARIABLE} names {named}: there is no such file; mend or unset the variable")
        return Path(named)
    config = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(config) if os.path.isabs(config) else Path.home() / ".config"
    places = (Path(FILE_NAME), folder / "rwkv-bench" / FILE_NAME)
    return next((place for place in places if place.is_file()), None)


def _inventory(file: Path, content: Mapping[str, Any]) -> Inventory:
    top = _Section(str(file), content, ("hosts", "phones"))
    hosts, phones = top.take("hosts", _table, {}), top.take("phones", _table, {})
    for name in (*hosts, *phones):
        if not _NAME.fullmatch(name):
            raise InventoryError(f"{file}: the name {name!r} needs letters, digits, '.', '_' and '-' only")
        if name in RESERVED:
            raise InventoryError(f"{file}: the name {name!r} is taken: --hardware {name} means this machine")
        if name in hosts and name in phones:
            raise InventoryError(f"{file}: {name!r} is both a host and a phone; rename one")
    return Inventory(
        file,
        {name: _host(name, _Section(f"{file}: [hosts.{name}]", value, _HOST_KEYS)) for name, value in hosts.items()},
        {
            name: _phone(name, _Section(f"{file}: [phones.{name}]", value, _PHONE_KEYS), file.parent)
            for name, value in phones.items()
        },
    )


def _host(name: str, section: _Section) -> Host:
    ssh = section.take("ssh", _command)
    if ssh[0].startswith("-"):
        raise InventoryError(f"{section.where} ssh is {ssh[0]!r}; user@host, or a whole command as a list, is needed")
    return Host(
        name,
        ssh if len(ssh) > 1 else ("ssh", *ssh),
        section.take("hardware", _profile),
        section.take("interpreter", _text, "python3"),
        section.take("models", _text, None),
        section.take("environments", _text, None),
    )


def _phone(name: str, section: _Section, base: Path) -> Phone:
    def local(text: str) -> Path:
        return base / Path(text).expanduser()

    serial, hardware = section.take("adb", _text), section.take("hardware", _profile)
    binary, kind = section.take("binary", _text), section.take("kind", _text)
    prints, arguments = KINDS.get(kind, ("", ()))
    tokenizer = section.take("tokenizer", _text, None)
    phone = Phone(
        name,
        serial,
        hardware,
        local(binary),
        kind,
        section.take("prints", _text, prints),
        section.take("arguments", _texts, arguments),
        None if tokenizer is None else local(tokenizer),
        tuple(local(text) for text in section.take("libraries", _texts, ())),
        section.take("folder", _phone_folder, PHONE_FOLDER),
        section.take("threads", _count, None),
        section.take("environment", _variables, {}),
    )
    _check_phone(phone, section.where)
    return phone


def _check_phone(phone: Phone, where: str) -> None:
    """What one key alone does not show to be wrong."""
    if phone.adb.startswith("-") or any(c.isspace() for c in phone.adb):
        raise InventoryError(f"{where} adb is {phone.adb!r}; a serial as `adb devices` shows it is needed")
    if phone.prints not in PRINTS:
        hint = did_you_mean(phone.prints, PRINTS) if phone.prints else "what the binary prints is not known; "
        raise InventoryError(f"{where} prints is {phone.prints!r}; {hint}one of {', '.join(PRINTS)} is needed")
    if not phone.arguments:
        words = ", ".join(f"{{{word}}}" for word in PLACEHOLDERS)
        raise InventoryError(f"{where} lacks arguments, a list of texts that may hold {words}")
    for text in (*phone.arguments, *phone.environment.values()):
        for word in _PLACEHOLDER.findall(text):
            if word not in PLACEHOLDERS:
                hint = did_you_mean(word, PLACEHOLDERS)
                raise InventoryError(f"{where} {text!r}: no {{{word}}}; {hint}there are {', '.join(PLACEHOLDERS)}")
        for key, value in (("tokenizer", phone.tokenizer), ("threads", phone.threads)):
            if f"{{{key}}}" in text and value is None:
                raise InventoryError(f"{where} lacks {key}, which {text!r} takes")


class _Section:
    """One table of the file, none of whose keys is unknown."""

    def __init__(self, where: str, value: object, keys: Sequence[str]) -> None:
        self.where = where
        if not isinstance(value, Mapping):
            raise InventoryError(f"{where} is {value!r}; a table is needed")
        self._values = value
        for key in value:
            if key not in keys:
                raise InventoryError(f"{where} has no key {key!r}; {did_you_mean(key, keys)}keys: {', '.join(keys)}")

    def take(self, key: str, kind: Callable[[object], T], *default: Any) -> Any:
        """The value of a key, checked by ``kind``; the default, if there is one, where the key is absent."""
        if key not in self._values:
            if default:
                return default[0]
            raise InventoryError(f"{self.where} lacks {key}")
        value = self._values[key]
        try:
            return kind(value)
        except ValueError as error:
            raise InventoryError(f"{self.where} {key} is {value!r}; {error}") from None


def _table(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("a table is needed")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError("a text that is not empty is needed")
    return value


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item.isprintable() for item in value):
        raise ValueError("a list of texts is needed")
    return tuple(value)


def _command(value: object) -> tuple[str, ...]:
    if isinstance(value, str) and value:
        return (_text(value),)
    if not isinstance(value, list) or len(value) < 2 or not all(value):
        raise ValueError("user@host, or a command as a list, is needed")
    return _texts(value)


def _profile(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value in ("local", "all"):
        raise ValueError("the short name of its hardware, such as a800, is needed")
    return value


def _phone_folder(value: object) -> str:
    text = _text(value).rstrip("/")
    if not text.startswith("/") or ".." in text.split("/") or text.count("/") < 2:
        raise ValueError("the absolute path of a folder of ours on the phone is needed")
    return text


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 4096:
        raise ValueError("a whole number from 1 to 4096 is needed")
    return value


def _variables(value: object) -> Mapping[str, str]:
    table = _table(value)
    for name, text in table.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or not isinstance(text, str) or not text.isprintable():
            raise ValueError("a table of variables, each a text, is needed")
    return dict(table)
