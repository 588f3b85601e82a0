"""Server arguments on GPUs that are pretended to be there: what a default server gets accepts its own default job's
adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faked_gpu import CAPABILITY

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"model_path": str(ROOT / "examples/assets/opt-reviews")}
ASKED = {
    "nothing": {},
    "float32": {"dtype": "float32"},
    "a backend": {"dtype": "float32", "attention_backend": "flashinfer"},
    "a backend of decode": {"dtype": "float32", "decode_attention_backend": "flashinfer"},
    "a graph": {"cuda_graph_backend_prefill": "breakable"},
    "no direction": {"max_loras_per_batch": 1},
}


@pytest.fixture(
    scope="module", params=[pytest.param(gpu, marks=[pytest.mark.slow] * (gpu != "h100")) for gpu in CAPABILITY]
)
def resolved(request, tmp_path_factory):
    """Name of the GPU, and what each of ASKED becomes in a server that trains."""
    return request.param, records_on(request.param, ASKED, tmp_path_factory.mktemp("mezo"))


def records_on(gpu: str, asked: dict[str, dict], folder: Path, *flags: str, **environment: str) -> dict[str, dict]:
    environment = {**os.environ, "SGLANG_ENABLE_MEZO": "1", "SGLANG_MEZO_DIR": str(folder), **environment}
    arguments = json.dumps([MODEL | fields for fields in asked.values()])
    command = [sys.executable, str(Path(__file__).parent / "faked_gpu.py"), gpu, arguments, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip([*asked, "served", "served in float32"], json.loads(done.stdout.splitlines()[-1]), strict=True))


def test_a_build_without_flash_attention_3_and_a_flag_that_says_the_default(tmp_path):
    records = records_on(
        "h100", {"nothing": {}}, tmp_path, "--lora-backend=csgmv", FAKED_WITHOUT="sgl_kernel.flash_attn"
    )
    assert records["nothing"]["attention_backend"] == "triton"
    assert records["nothing"]["lora_backend"] == "csgmv", "what the user gives is never changed"
    assert "'csgmv' cannot route single tokens" in records["nothing"]["no_alora"]


def test_a_default_server_can_serve_what_its_default_job_makes(resolved):
    gpu, records = resolved
    for name in ("nothing", "float32"):
        assert records[name]["no_alora"] is None
        assert "not together with LoRA on the head" in records[name]["no_alora_beside_a_head"]
        assert (records[name]["lora_backend"], records[name]["page_size"], records[name]["prefill_graph"]) == (
            "triton",
            1,
            "disabled",
        )


def test_attention_takes_the_type_and_the_page_size(resolved):
    gpu, records = resolved
    assert records["nothing"]["attention_backend"] == {"h100": "fa3", "a100": "flashinfer", "b200": "triton"}[gpu]
    assert records["float32"]["attention_backend"] == "triton"


def test_what_the_user_chose_stays_and_is_answered_with_the_reason(resolved):
    _, records = resolved
    assert records["a backend"]["attention_backend"] == "flashinfer"
    assert records["a backend of decode"]["decode_attention_backend"] == "flashinfer"
    assert records["a graph"]["prefill_graph"] == "breakable"
    assert "--cuda-graph-backend-prefill disabled" in records["a graph"]["no_alora"]
    assert "max_loras_per_batch=1" in records["no direction"]["no_alora"]


def test_the_flags_that_a_run_names_serve_its_adapter(resolved):
    _, records = resolved
    for name in ("served", "served in float32"):
        assert records[name]["no_alora"] is None and records[name]["lora_backend"] == "triton"
    assert records["served in float32"]["attention_backend"] == "triton"


def test_a_lora_backend_without_token_segments_is_known_by_what_it_defines():
    from types import SimpleNamespace

    from sglang.srt.lora.backend.base_backend import BaseLoRABackend
    from sglang.srt.mezo.engine.accelerator import why_no_alora

    class Plain(BaseLoRABackend):
        name = "csgmv"

    backend = object.__new__(Plain)
    assert "'csgmv' cannot route single tokens, start with --lora-backend triton" in why_no_alora(
        SimpleNamespace(lora_backend=backend)
    )
