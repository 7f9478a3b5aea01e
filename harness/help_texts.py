"""What ``--help`` says: descriptions, examples, exit statuses."""

from __future__ import annotations

EXIT_CODES = """\
exit status:
  0    all that was asked for ran and passed
  1    a parity failure, a non-finite value or a regression
  2    bad usage or bad input
  3    something asked for by name is not available or not supported here
  4    a backend crashed or hung
  130  interrupted; what had been measured is printed and stored
  Of several, the first of 2, 4, 1, 3.
"""

TOP = """\
Is an RWKV-4 backend right, and how fast is it? Every speed stands beside the
parity verdict taken from the same loaded session.

examples:
  rwkv-bench                                   every usable backend, small model
  rwkv-bench --quick --backend torch           a first look at one backend
  rwkv-bench --model 169m --quant fp16,int4    a real shape, synthetic weights
  rwkv-bench --model RWKV-4-Pile-430M.pth      your checkpoint
  rwkv-bench --model 7b --dry-run              how long, how much memory
  rwkv-bench --hardware a800                   not here: what is published of it
  rwkv-bench parity --format json              verdicts only, for scripts
  rwkv-bench generate "The list" --tokens 100  text, with its speed
  rwkv-bench list                              what is usable here
"""

COMMANDS = {
    "run": "parity-gated prefill/decode table (the default command)",
    "parity": "verdicts only",
    "list": "what is usable here and how to get the rest",
    "generate": "text from a prompt with one backend, with its speed",
}

EXAMPLES = {
    "run": """\
examples:
  rwkv-bench run --backend numpy,torch --quant fp32,bf16
  rwkv-bench run --quant int4                    every scheme of that class
  rwkv-bench run --backend mine.py               a backend in a file of yours
  rwkv-bench run --isolate --timeout 60 --cpus 0-3
  rwkv-bench run --threads 1 --output table.md   format by the file's name
""",
    "parity": """\
examples:
  rwkv-bench parity --backend torch --quant fp16
  rwkv-bench parity --format json | jq '.rows[] | select(.verdict != "PASS")'
  rwkv-bench parity --backend faulty --device nan  what a failure looks like
""",
    "list": """\
examples:
  rwkv-bench list
  rwkv-bench list backends
  rwkv-bench list schemes --format json
""",
    "generate": """\
examples:
  rwkv-bench generate "The list" --tokens 200
  rwkv-bench generate "The list" --temperature 0 --backend torch
  echo "def main" | rwkv-bench generate - --seed 7
""",
}
