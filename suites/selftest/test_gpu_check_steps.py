"""gpu-check: its list of steps, and the checkpoint that overflows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from harness.gpu_check.overflow import point_of, write_overflowing
from harness.gpu_check.steps import Setting, steps
from reference.checkpoint import load_checkpoint
from reference.forward import forward
from suites.selftest.gpu_setting import OFFERS, SETTING


def test_the_list_has_all_that_needs_a_gpu() -> None:
    found = {step.name: step for step in steps(SETTING)}
    assert list(found) == ["parity", "localize", "throughput-169m", "throughput-7b-world", "wkv", "ablation"]
    assert [(c.backend, c.scheme) for c in found["parity"].commands] == [
        ("torch", "fp32,fp16,bf16"),
        ("triton", "fp16,q4f16_1,q0f16"),
        ("rwkv", "fp32,fp16,fp16i8"),
    ]
    planted = {(c.backend, c.scheme): c.expected for c in found["localize"].commands}
    point = "blocks.4.ffn.k2"
    assert planted == {
        ("torch", "fp16"): point,
        ("triton", "fp16"): None,  # its stream and its squares are float32
        ("triton", "q0f16"): point,
        ("rwkv", "fp16"): point,  # rescales its stream, and squares in fp16 first
    }
    timed = {(c.backend, c.scheme) for c in found["throughput-7b-world"].commands}
    assert timed == {("triton", "q0f16,fp16,q4f16_1"), ("torch", "fp16"), ("rwkv", "fp16")}
    assert ("torch", "fp16,bf16") in {(c.backend, c.scheme) for c in found["throughput-169m"].commands}
    assert {c.words[c.words.index("--prompt-tokens") + 1] for c in found["throughput-169m"].commands} == {"512", "2048"}
    assert [c.backend for c in found["wkv"].commands] == ["triton", "fla"]
    ablated = [" ".join(c.words) for c in found["ablation"].commands if c.backend == "triton"]
    for scheme, changed in (("fp16", ""), ("fp16", "--driver loop "), ("q0f16", ""), ("q0f16", "--rescale-every 6 ")):
        what = f"--backend triton --quant {scheme} --device cuda:0 {changed}--decode-tokens"
        assert sum(what in words for words in ablated) == 1, what


def test_no_command_comes_twice() -> None:
    for setting in (SETTING, replace(SETTING, device="cpu", rehearsal=True)):
        every = [command.words for step in steps(setting) for command in step.commands]
        assert len(set(every)) == len(every)


def test_any_number_of_models_is_timed_and_larger_ones_are_said_to_take_longer() -> None:
    sizes = {"169m": 169_000_000, "1b5": 1_500_000_000, "3b": 3_000_000_000, "7b": 7_400_000_000, "14b": 14_000_000_000}
    found = [s for s in steps(replace(SETTING, models=tuple(sizes), parameters=sizes)) if s.name.startswith("through")]
    assert [s.name for s in found] == [f"throughput-{name}" for name in sizes]
    assert [s.seconds for s in found] == sorted({s.seconds for s in found})


def test_wkv_is_a_step_of_the_backend_whose_kernel_it_is() -> None:
    found = {step.name: step for step in steps(replace(SETTING, offers=OFFERS[:1]))}
    assert found["wkv"].commands == ()


def test_every_command_names_the_device_and_a_rehearsal_interprets() -> None:
    for rehearsal, device in ((False, "cuda:0"), (True, "cpu")):
        setting = Setting(device, OFFERS, ("tiny",), "tiny", "o.safetensors", "p", rehearsal)
        for command in (command for step in steps(setting) for command in step.commands):
            assert command.words[command.words.index("--device") + 1] == device
            assert command.environment == ({"TRITON_INTERPRET": "1"} if rehearsal else {})


def test_a_rehearsal_has_the_same_steps() -> None:
    setting = Setting("cpu", OFFERS, ("tiny",), "tiny", "o.safetensors", "p", True)
    assert [s.name.partition("-")[0] for s in steps(setting)] == [
        s.name.partition("-")[0] for s in steps(SETTING) if s.name != "throughput-7b-world"
    ]


def test_the_planted_overflow_is_beyond_fp16_and_nothing_else_is(tmp_path: Path) -> None:
    from harness.models import gate_tokens, open_model

    file = tmp_path / "overflow.safetensors"
    write_overflowing("tiny", file)
    weights, model = load_checkpoint(file), open_model("tiny")
    tokens, seen = gate_tokens(model, 48), dict[str, float]()
    logits, _ = forward(weights, tokens, tap=lambda name, x: seen.__setitem__(name, float(abs(x).max())))
    over = [name for name, largest in seen.items() if largest > 65504]
    assert over == [point_of(model.config)] == ["blocks.4.ffn.k2"]
    expected, _ = forward(model.weights, tokens)
    assert abs(logits - expected).max() < 1e-3 * expected.std()
