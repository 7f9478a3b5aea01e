"""Compile the Relax module for a target; runs where TVM's compiler is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from backends.api import Unsupported
from backends.tvm_mlc import artefacts, targets
from reference.config import Config

#: Entry points of every library.
ENTRIES = [
    "prefill",
    "decode",
    "score",
    "trace_decode",
    "trace_prefill",
    "create_kv_cache",
    "reset_kv_cache",
    "softmax_with_temperature",
    "get_metadata",
]


def main(asked: dict[str, Any]) -> None:
    """Compile what is asked (sizes, scheme, target, folder, rescale_every) and print what came of it as JSON."""
    try:
        told = build(
            Config(*asked["sizes"]), asked["scheme"], asked["target"], Path(asked["folder"]), asked["rescale_every"]
        )
    except Unsupported as error:
        told = {"unsupported": str(error)}
    sys.stdout.write("\n" + json.dumps(told) + "\n")


def build(config: Config, scheme: str, target: str, folder: Path, rescale_every: int = 0) -> dict[str, Any]:
    """Write the library of a model's shape into ``folder``; what :func:`backends.tvm_mlc.artefacts.write` tells of it.

    Raises :class:`Unsupported` for a target that the installed TVM generates no code for.
    """
    import tvm

    from backends.tvm_mlc import kernels_cpu, kernels_gpu
    from backends.tvm_mlc.graph import module

    wanted = targets.get(target)
    if not tvm.get_global_func(f"target.build.{wanted.codegen}", allow_missing=True):
        raise Unsupported(f"{target}: TVM {tvm.__version__} as installed generates no code for {wanted.codegen}")
    if wanted.codegen == "cuda" and shutil.which("nvcc") is None:
        raise Unsupported(f"{target}: TVM compiles its CUDA source by nvcc, which is not on the path")
    cpu = tvm.target.codegen.llvm_get_system_cpu()
    made = module(config, scheme, kernels_gpu if wanted.gpu else kernels_cpu, target, rescale_every)
    kernels = [name.name_hint for name, function in made.functions.items() if isinstance(function, tvm.tirx.PrimFunc)]
    whole = tvm.target.Target(targets.description(wanted, cpu))
    executable = tvm.relax.build(made, whole, relax_pipeline=lowered(wanted.gpu))
    told = artefacts.write(executable, kernels, ENTRIES, wanted, folder)
    return {**told, "host": wanted.host or cpu}


def lowered(gpu: bool) -> Any:
    """Relax's default pipeline, less the passes that read kernels as blocks: ours are scheduled as written."""
    import tvm
    from tvm.relax import transform
    from tvm.s_tir import dlight

    passes = [
        transform.LegalizeOps(),
        *([dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())] if gpu else []),  # what makes a fresh state
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]
    return tvm.transform.Sequential(passes)
