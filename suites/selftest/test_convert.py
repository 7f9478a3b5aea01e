"""``rwkv-bench convert``: every format to every other, what it says, and what a killed one leaves."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness import command_convert
from reference.checkpoint import FORMATS, load_checkpoint, save_checkpoint
from reference.config import Config, is_matrix
from reference.errors import CheckpointError, ConfigError, InputError
from reference.lora import merge_lora
from suites.selftest.checkpoint_files import random_values, refusal, same
from suites.selftest.test_lora import KEY, lora_file, pair

CONFIG = Config(n_layer=2, n_embd=32, n_ffn=64, n_vocab=40)


def convert(*words: str | Path) -> list[str]:
    """Run the command and return what it said."""
    said: list[str] = []
    assert command_convert.run(parsed(*words), said.append) == 0
    return said


def parsed(*words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command_convert.options(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(random_values(CONFIG, "f16"), tmp_path / "in.pth", "pth")
    return tmp_path / "in.pth"


# --- formats


@pytest.mark.parametrize("via", FORMATS)
def test_there_and_back_through_every_format(via: str, checkpoint: Path, tmp_path: Path) -> None:
    said = convert(checkpoint, tmp_path / "between", "--to", via)
    assert said[-1].startswith(f"{tmp_path / 'between'}: {via}, 0.")
    convert(tmp_path / "between", tmp_path / "back.safetensors", "--quant", "fp16")
    before, after = load_checkpoint(checkpoint), load_checkpoint(tmp_path / "back.safetensors")
    if via in ("pth", "safetensors", "hf"):
        assert said[:-1] == []
        assert same(before, after)
    else:
        assert said[0].startswith(f"{via} stores -exp(time_decay) in fp32: ")
        inner = [name for name in before if is_matrix(name) and (via == "ggml" or name != "emb.weight")]
        assert all(np.array_equal(before[name].read(), after[name].read()) for name in inner)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.pth", "pth"),
        ("a.PT", "pth"),
        ("a.safetensors", "safetensors"),
        ("a.bin", "ggml"),
        ("a.fr", "fr"),
        ("folder/", "hf"),
        ("there", "hf"),
    ],
)
def test_the_ending_says_the_format(name: str, format: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    said = convert(checkpoint, f"{tmp_path}/{name}")
    assert f": {format}, " in said[-1]
    assert len(load_checkpoint(tmp_path / name)) == len(random_values(CONFIG))


def test_an_ending_that_says_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.safetensor: its ending .*did you mean '?\.safetensors'?.*--to pth\|safe"):
        convert(checkpoint, tmp_path / "a.safetensor")
    with pytest.raises(InputError, match=r"out: its ending does not say the format; choose one by --to"):
        convert(checkpoint, tmp_path / "out")


def test_a_scheme_and_a_quantized_source(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "q.bin", "--quant", "Q5_1")
    said = convert(tmp_path / "q.bin", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "q.bin").read_bytes()
    assert not any("metadata" in line for line in said)
    convert(tmp_path / "q.bin", tmp_path / "q.pth", "--quant", "fp32")
    quantized = load_checkpoint(tmp_path / "q.bin")
    assert all(np.array_equal(quantized[n].array(), t.array()) for n, t in load_checkpoint(tmp_path / "q.pth").items())


@pytest.mark.parametrize(
    ("target", "scheme", "told"),
    [
        ("a.pth", "Q4_0", "no pth file holds Q4_0, which --to ggml writes; choose from fp32, fp16, bf16"),
        (
            "a.bin",
            "Q4_K",
            "no ggml file holds Q4_K, which belongs to another system's own file; choose from FP32",
        ),
        ("a.fr", "sym_int4", "no fr file holds sym_int4, which belongs to another system's own file"),
        ("a.bin", "fp16", "no checkpoint scheme 'fp16'; did you mean 'FP16'?"),
        ("a.safetensors", "fp61", "no checkpoint scheme 'fp61'; did you mean 'fp16'?"),
    ],
)
def test_a_scheme_that_the_format_does_not_hold(
    target: str, scheme: str, told: str, checkpoint: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    arguments = parsed(checkpoint, tmp_path / target, "--quant", scheme)
    with pytest.raises(ConfigError) as caught:
        command_convert.run(arguments, said.append)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (said, os.listdir(tmp_path)) == ([], ["in.pth"])


def test_model_names_are_taken(tmp_path: Path) -> None:
    convert("tiny", tmp_path / "tiny.bin")
    assert load_checkpoint(tmp_path / "tiny.bin").config.n_vocab == 256
    with pytest.raises(InputError, match="no model '169n'; did you mean '169m'"):
        convert("169n", tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "none.pth", tmp_path / "a.bin")


def test_the_mark_of_synthetic_weights_is_missed_aloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    marked = replace(random_values(CONFIG), synthetic=True)
    monkeypatch.setattr(command_convert, "synthetic", lambda name: marked)
    assert "ggml has no place for metadata, nor for the mark that the weights are synthetic" in convert(
        "169m", tmp_path / "a.bin"
    )
    convert("169m", tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth").synthetic


# --- LoRA


def test_lora_is_merged_first(checkpoint: Path, tmp_path: Path) -> None:
    lora = lora_file(tmp_path / "lora.pth", pair(KEY, 4, (32, 32)))
    said = convert(checkpoint, tmp_path / "out.bin", "--quant", "Q4_0", "--lora", lora, "--lora-alpha", "32")
    assert said[0] == f"{lora}: matrices merged: 1, tensors replaced: 0"
    save_checkpoint(merge_lora(load_checkpoint(checkpoint), lora, 32), tmp_path / "hand.bin", "ggml", "Q4_0")
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "hand.bin").read_bytes()
    for half in (["--lora", lora], ["--lora-alpha", "3"]):
        with pytest.raises(InputError, match="--lora and --lora-alpha go together"):
            convert(checkpoint, tmp_path / "a.bin", *half)


# --- what is written over, and what a killed conversion leaves


def test_a_folder_with_something_in_it_is_never_touched(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="full: exists already; choose another name or remove it first"):
        convert(checkpoint, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["notes.txt"]


def test_what_is_read_is_never_written_over(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "link.pth").symlink_to(checkpoint)
    os.link(checkpoint, tmp_path / "hard.pth")
    lora = lora_file(tmp_path / "lora.pth", pair(KEY, 4, (32, 32)))
    before = {name: (tmp_path / name).read_bytes() for name in sorted(os.listdir(tmp_path))}
    for name in before:
        for force in ((), ("--force",)):
            words = (checkpoint, tmp_path / name, "--quant", "bf16", "--lora", lora, "--lora-alpha", "32", *force)
            with pytest.raises(InputError, match=rf"{name}: is what would be read; choose another name for OUT"):
                convert(*words)
    assert {name: (tmp_path / name).read_bytes() for name in sorted(os.listdir(tmp_path))} == before


def test_nothing_is_written_into_the_folder_that_is_read(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "hf", "--to", "hf")
    before = sorted(os.listdir(tmp_path / "hf"))
    with pytest.raises(InputError, match=r"hf/: is what would be read"):
        convert(tmp_path / "hf", f"{tmp_path}/hf/")
    for name in ("out.pth", "model.safetensors", "further/"):
        with pytest.raises(InputError, match=rf"hf/{name}: lies in .*hf, which would be read; choose an OUT outside"):
            convert(tmp_path / "hf", f"{tmp_path}/hf/{name}", "--force")
    assert sorted(os.listdir(tmp_path / "hf")) == before
    convert(tmp_path / "hf", tmp_path / "hf.pth")


def test_a_file_is_replaced_only_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.pth").write_text("the old one")
    with pytest.raises(InputError, match=r"out\.pth: exists already; choose another name, or --force to replace it"):
        convert(checkpoint, tmp_path / "out.pth")
    assert (tmp_path / "out.pth").read_text() == "the old one"
    convert(checkpoint, tmp_path / "out.pth", "--quant", "bf16", "--force")
    assert load_checkpoint(tmp_path / "out.pth")["emb.weight"].stored == "bf16"
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "out.pth"]


def test_progress_is_told_while_it_lasts(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_convert, "_TELL_EVERY", 0.0)
    for format in FORMATS:
        told = [line for line in convert(checkpoint, tmp_path / f"p{format}", "--to", format) if " %, " in line]
        shares = [int(line.split(" %, ")[0]) for line in told]
        assert shares == sorted(shares)
        assert shares[0] == 0
        assert 60 < shares[-1] < 100
        assert any(line.endswith(" blocks.1.ffn.value.weight") for line in told)


_SLOW = """
import sys, time
from harness import command_convert
from reference import tensor_stream

def slowly(self, name, *rest):
    if name.endswith("head.weight"):
        print("almost done", flush=True)
        time.sleep(60)
    yield from blocks(self, name, *rest)

blocks = tensor_stream.Encoder.blocks
tensor_stream.Encoder.blocks = slowly
import argparse
parser = argparse.ArgumentParser()
command_convert.options(parser)
command_convert.run(parser.parse_args(sys.argv[1:]), lambda line: None)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("format", FORMATS)
def test_a_killed_conversion_leaves_nothing_usable(format: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "model"
    if format != "hf":
        target.write_text("the old one")
    child = subprocess.Popen(
        [sys.executable, "-c", _SLOW, str(checkpoint), str(target), "--to", format, "--force"],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"almost done\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert child.returncode == -signal.SIGKILL
    if format == "hf":
        assert not target.exists()
    else:
        assert target.read_text() == "the old one"
    (left,) = (path for path in folder.iterdir() if path != target)
    assert left.name.startswith(".model.")
    assert left.name.endswith(".part")
    refusal(left)

    said = convert(checkpoint, target, "--to", format, "--force")
    assert f"{left} was left by a conversion that was killed; remove it unless one is running" in said
    assert len(load_checkpoint(target)) == len(random_values(CONFIG))
