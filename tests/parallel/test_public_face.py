"""The public names of `ringattn.parallel`: frozen, documented, listed in the manual, and loaded on demand only."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from ringattn import parallel

MANUAL = Path(str(files("ringattn"))).parent / "docs" / "api.md"

MESH = {"axis_mesh", "axis_size", "build_mesh", "context_mesh", "data_parallel_rank", "describe_mesh"}
MESH |= {"expert_fsdp_mesh", "expert_mesh", "fsdp_mesh", "loss_mesh"}
APPLY = {"apply_ep", "apply_fsdp", "apply_fsdp_to_layers", "apply_tp", "parallelize", "parallelize_hf"}
TRAINING = {"all_reduce_loss", "clip_gradients", "count_valid", "cross_entropy", "gradient_norm", "local_batch"}
TRAINING |= {"make_cp_attention", "no_sync"}
MODEL = {"Decoder", "DecoderConfig", "MixtureOfExperts", "MoESpec", "make_moe"}
PIPELINE = {"MicroBatch", "Pipeline", "PipelineOp", "PipelineSchedule", "TimedOp", "bubble_formula", "bubble_fraction"}
PIPELINE |= {"cut_stages", "plan_pipeline", "simulate_timeline", "simulated_bubble"}
CHECKPOINT = {"TrainingProgress", "latest_checkpoint", "load_checkpoint", "save_checkpoint"}

FUNCTIONS = sorted(name for name in parallel.__all__ if inspect.isfunction(getattr(parallel, name)))


def test_all_is_frozen() -> None:
    assert set(parallel.__all__) == MESH | APPLY | TRAINING | MODEL | PIPELINE | CHECKPOINT
    assert list(parallel.__all__) == sorted(parallel.__all__)


def test_the_manual_lists_every_name_and_no_other() -> None:
    """Names listed under `currentmodule:: ringattn.parallel`, in any section."""
    listed, current = [], ""
    for directive, argument in re.findall(r"^\.\. (\w+):: (\S+)", MANUAL.read_text(encoding="utf-8"), re.MULTILINE):
        if directive in ("automodule", "currentmodule"):
            current = argument
        elif current == "ringattn.parallel":
            listed.append(argument)
    assert sorted(listed) == sorted(parallel.__all__)


@pytest.mark.parametrize("name", parallel.__all__)
def test_names_are_documented(name: str) -> None:
    assert (inspect.getdoc(getattr(parallel, name)) or "").strip()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_typed_and_describe_their_parameters(name: str) -> None:
    function = getattr(parallel, name)
    signature, doc = inspect.signature(function), inspect.getdoc(function) or ""
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())
    described = re.findall(r"^ {4}(\w+): ", doc, re.MULTILINE)
    assert [parameter for parameter in signature.parameters if parameter not in (*described, "self")] == []


def loaded_modules(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_ringattn_does_not_import_it() -> None:
    assert not {name for name in loaded_modules("import ringattn") if name.startswith("ringattn.parallel")}


def test_it_does_not_import_transformers() -> None:
    assert "transformers" not in loaded_modules("import ringattn.parallel")
