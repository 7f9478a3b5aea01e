"""``--hardware PHONE``: the programs of the inventory's phones, run with the models and schemes asked for."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from backends.api import Unsupported
from harness import inventory
from harness.inventory import Phone
from harness.models import looks_like_path, open_model
from harness.phone import run_on_phone
from harness.recorded_names import known_schemes
from harness.rows import Row
from reference.converted import converted
from reference.errors import InputError
from reference.schemes import SCHEMES

#: One line, as faster-rwkv's chat reads it; its length in tokens is the program's to tell.
PROMPT = "The recurrence of this network costs the same for every token, however long the text before it has been."

#: Kind of program -> format of the checkpoint it loads.
_FORMATS = {"rwkv.cpp": "ggml"}


def phones_of(names: Sequence[str]) -> list[Phone]:
    """The phones among ``--hardware``; raises InputError where other hardware is named beside them."""
    found = [inventory.find(name) for name in names]
    phones = [item for item in found if isinstance(item, Phone)]
    if phones and len(phones) < len(names):
        raise InputError(f"phone {phones[0].name} runs its own program; name phones alone after --hardware")
    return phones


def run_phones(phones: Sequence[Phone], arguments: Namespace, tell: Callable[[str], None]) -> Iterator[Row]:
    """Recorded rows, phone by phone, model by model, scheme by scheme."""
    for scheme in arguments.quant:
        if scheme == "all" or scheme not in known_schemes():
            raise InputError(f"a phone needs --quant, by the scheme's own name, not {scheme!r}")
    for phone in phones:
        for model in arguments.model:
            for scheme in arguments.quant:
                file = _model_file(phone, model, scheme, arguments.seed)
                decode = arguments.decode_tokens or 64
                yield from run_on_phone(phone, file, scheme, PROMPT, decode, arguments.timeout, tell, model=model)


def _model_file(phone: Phone, model: str, scheme: str, seed: int) -> Path:
    """The user's own file for that program as it is; anything else is converted where we write the format."""
    path = Path(model)
    if looks_like_path(model) and (path.suffix in (".fr", ".param", ".bin") or path.with_suffix(".param").exists()):
        return path
    if phone.kind not in _FORMATS or scheme not in SCHEMES:
        raise Unsupported(f"phone {phone.name}: give --model the file that its {phone.kind} loads; {model} is not one")
    return converted(open_model(model, seed).weights, _FORMATS[phone.kind], scheme)
