"""The inventory file: what it holds, where it is found, and one line for everything that is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.inventory import Host, InventoryError, Phone, find, load, names

GOOD = """\
[hosts.box]
ssh = "me@box"
hardware = "a800"

[hosts.far]
ssh = ["ssh", "-p", "2222", "me@far"]
hardware = "h200"
interpreter = "/opt/py/bin/python3.11"
models = "/data/models"
environments = "/data/envs"

[phones.mi10]
adb = "8ac9f34e"
hardware = "snapdragon865"
kind = "faster-rwkv"
binary = "android/chat"
tokenizer = "android/vocab"
libraries = ["android/libc++_shared.so"]
threads = 4

[phones.own]
adb = "192.168.1.7:5555"
hardware = "pixel7"
kind = "rwkv.cpp"
binary = "~/bench"
prints = "llama-bench"
arguments = ["-m", "{model}", "-n", "{decode_tokens}"]
environment = { OMP_NUM_THREADS = "2" }
folder = "/data/local/tmp/mine/"
"""


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No inventory but the test's own."""
    monkeypatch.delenv("RWKV_BENCH_INVENTORY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_hosts_and_phones(tmp_path: Path) -> None:
    file = tmp_path / "rwkv-bench.toml"
    file.write_text(GOOD)
    inventory = load(file)
    assert inventory.names() == ["box", "far", "mi10", "own"]
    assert inventory.find("box") == Host("box", ("ssh", "me@box"), "a800")
    assert inventory.find("far") == Host(
        "far", ("ssh", "-p", "2222", "me@far"), "h200", "/opt/py/bin/python3.11", "/data/models", "/data/envs"
    )
    assert inventory.find("mi10") == Phone(
        "mi10",
        "8ac9f34e",
        "snapdragon865",
        tmp_path / "android/chat",
        "faster-rwkv",
        "faster-rwkv",
        ("{tokenizer}", "{model}", "{scheme}"),
        tmp_path / "android/vocab",
        (tmp_path / "android/libc++_shared.so",),
        "/data/local/tmp/rwkv-bench",
        4,
    )
    own = inventory.find("own")
    assert isinstance(own, Phone)
    assert (own.binary, own.prints, own.folder) == (tmp_path / "home/bench", "llama-bench", "/data/local/tmp/mine")
    assert own.environment == {"OMP_NUM_THREADS": "2"}
    assert inventory.find("nobody") is None


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def host(name: str) -> str:
        return f'[hosts.{name}]\nssh = "me@box"\nhardware = "a800"\n'

    assert names() == []
    assert find("box") is None
    users = tmp_path / "config/rwkv-bench/rwkv-bench.toml"
    users.parent.mkdir(parents=True)
    users.write_text(host("users"))
    assert names() == ["users"]
    Path("rwkv-bench.toml").write_text(host("current"))
    assert names() == ["current"]
    named = tmp_path / "lab.toml"
    named.write_text(host("named"))
    monkeypatch.setenv("RWKV_BENCH_INVENTORY", str(named))
    assert names() == ["named"]
    monkeypatch.setenv("RWKV_BENCH_INVENTORY", str(tmp_path / "absent.toml"))
    with pytest.raises(InventoryError, match=r"RWKV_BENCH_INVENTORY names .*absent\.toml: there is no such file"):
        names()


HOST, PHONE = '[hosts.box]\nssh = "me@box"\nhardware = "a800"\n', GOOD[GOOD.index("[phones.mi10]") :]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[hosts.box\n", "not TOML: .*at line 1, column 11"),
        (HOST + HOST, "not TOML: .*at line 4"),
        ("[host.box]\n", "no key 'host'; did you mean 'hosts'?"),
        ("hosts = 3\n", "hosts is 3; a table is needed"),
        ("[hosts]\nbox = 'me@box'\n", r"\[hosts\.box\] is 'me@box'; a table is needed"),
        (HOST + 'interpeter = "python3"\n', r"\[hosts\.box\] has no key 'interpeter'; did you mean 'interpreter'\?"),
        ('[hosts.box]\nssh = "me@box"\n', r"\[hosts\.box\] lacks hardware"),
        (HOST.replace('"me@box"', "22"), r"\[hosts\.box\] ssh is 22; user@host, or a command as a list, is needed"),
        (HOST.replace('"me@box"', '"-oProxyCommand=x"'), "ssh is '-oProxyCommand=x'; user@host"),
        (HOST.replace('"me@box"', "[]"), r"ssh is \[\]; user@host, or a command"),
        (HOST.replace("a800", "two words"), "hardware is 'two words'; the short name"),
        (HOST.replace("a800", "local"), "hardware is 'local'; the short name"),
        (HOST.replace("box]", '"a b"]'), "the name 'a b' needs letters"),
        (HOST.replace("box]", "local]"), "the name 'local' is taken: --hardware local means this machine"),
        (HOST.replace("box]", "cpu]"), "the name 'cpu' is taken"),
        (PHONE.replace("mi10", "all"), "the name 'all' is taken"),
        (HOST + PHONE.replace("mi10", "box"), "'box' is both a host and a phone"),
        (PHONE.replace("threads = 4", "threads = true"), "threads is True; a whole number from 1"),
        (PHONE.replace("threads = 4", "thread = 4"), "no key 'thread'; did you mean 'threads'"),
        (PHONE.replace("8ac9f34e", "-a"), "adb is '-a'; a serial"),
        (PHONE.replace('"android/vocab"', '""'), "tokenizer is ''; a text that is not empty"),
        (PHONE.replace('tokenizer = "android/vocab"\n', ""), r"lacks tokenizer, which '\{tokenizer\}' takes"),
        (PHONE.replace("/data/local/tmp/mine/", "/data/../"), "folder is '/data/../'; the absolute path"),
        (PHONE.replace("/data/local/tmp/mine/", "/"), "folder is '/'; the absolute path"),
        (PHONE.replace('"llama-bench"', '"lama-bench"'), "prints is 'lama-bench'; did you mean 'llama-bench'"),
        (PHONE.replace('prints = "llama-bench"\n', ""), "prints is ''; what the binary prints is not known"),
        (PHONE.replace("{decode_tokens}", "{decode}"), r"no \{decode\}; did you mean 'decode_tokens'"),
        (PHONE.replace("{decode_tokens}", "{threads}"), r"lacks threads, which '\{threads\}' takes"),
        (PHONE.replace('arguments = ["-m", "{model}", "-n", "{decode_tokens}"]\n', ""), "lacks arguments"),
        (PHONE.replace('OMP_NUM_THREADS = "2"', "OMP_NUM_THREADS = 2"), "environment is .* each a text, is needed"),
        (PHONE.replace('["android/libc++_shared.so"]', '"lib.so"'), "libraries is 'lib.so'; a list of texts"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_the_file(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "rwkv-bench.toml"
    file.write_text(text)
    with pytest.raises(InventoryError, match=told) as error:
        load(file)
    assert str(error.value).startswith(str(file))
    assert "\n" not in str(error.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "rwkv-bench.toml"
    file.write_bytes(b"# caf\xe9\n")
    with pytest.raises(InventoryError, match="not UTF-8 at byte 5"):
        load(file)
    with pytest.raises(InventoryError, match=r"cannot read the inventory .*: Is a directory"):
        load(tmp_path)
