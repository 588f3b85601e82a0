"""What the plugin changes in a process of SGLang, and that it stops the process where it cannot."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang.srt.mezo import alora_serving, hooks, overlay, platform, plugin

REPOSITORY = Path(__file__).resolve().parents[2]

WRONG_VERSION = """
import importlib.metadata as metadata
installed = metadata.version
metadata.version = lambda name: "0.5.24" if name == "sglang" else installed(name)
"""

SERVER = """
import runpy, sys
sys.argv = ["sglang.launch_server", "--model-path", "none"]
runpy.run_module("sglang.launch_server", run_name="__main__")
"""

LOAD = """
from sglang.srt.plugins import load_plugins
load_plugins()
print("plugins loaded")
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("start", [LOAD, SERVER], ids=["load_plugins", "server"])
def test_wrong_version_is_refused_in_one_line(start):
    done = run_python(WRONG_VERSION + start)
    assert done.returncode == 1
    assert "plugins loaded" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("sglang-mezo refuses to start")]
    assert lines == [
        "sglang-mezo refuses to start: it needs sglang==0.5.23 and found 0.5.24 (pip install sglang==0.5.23)"
    ]
    assert "Traceback" not in done.stderr


def test_hook_without_target_is_refused():
    code = """
from sglang.srt.mezo import alora_serving, hooks
hook = hooks.Hook("sglang.srt.mem_cache.common", "_gone", "before", print, "a test")
alora_serving.HOOKS = (*alora_serving.HOOKS, hook)
"""
    done = run_python(code + LOAD + "import sglang.srt.mem_cache.common")
    assert done.returncode == 1
    assert "refuses to start: the hook on sglang.srt.mem_cache.common._gone did not take hold (a test)" in done.stderr


def test_hook_that_another_plugin_took_is_refused():
    code = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
HookRegistry.register("sglang.srt.mem_cache.common._req_radix_key", lambda result, *a, **k: None, HookType.AFTER)
HookRegistry.apply_hooks()
"""
    done = run_python(code + LOAD)
    assert done.returncode == 1
    assert "_req_radix_key is hooked by another plugin already" in done.stderr


def test_missing_model_file_is_refused():
    code = """
from pathlib import Path
from sglang.srt.mezo import overlay
overlay.REPLACED_MODULES["sglang.srt.models.opt"] = Path("nowhere/opt.py")
"""
    done = run_python(code + LOAD)
    assert done.returncode == 1
    assert "refuses to start: FileNotFoundError: model file nowhere/opt.py is missing" in done.stderr


def test_model_file_that_does_not_import_is_refused(tmp_path):
    broken = tmp_path / "opt.py"
    broken.write_text("import not_there\n")
    code = f"""
from pathlib import Path
from sglang.srt.mezo import overlay
overlay.REPLACED_MODULES["sglang.srt.models.opt"] = Path({str(broken)!r})
"""
    done = run_python(code + LOAD + "import sglang.srt.models.registry\nprint('registry imported')")
    assert done.returncode == 1
    assert "registry imported" not in done.stdout
    assert "not_there" in done.stderr


def test_platform_without_plugin_is_an_error():
    code = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
ServerArgs(model_path="none").resolve_once()
from types import SimpleNamespace
from sglang.srt.platforms import current_platform
current_platform.apply_server_args_defaults(SimpleNamespace())
"""
    done = run_python(code, SGLANG_PLUGINS="mezo_cpu")
    assert done.returncode == 1
    assert "name `mezo` in SGLANG_PLUGINS" in done.stderr


def test_everything_holds_in_one_process():
    """Our OPT is the registered one, the hooks are in place, and the names of its modules are accepted."""
    code = """
import importlib
from sglang.srt.mezo import alora_serving, cpu, overlay
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.lora import lora_manager, utils
from sglang.srt.lora.backend.lora_registry import get_backend_from_name
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.utils.common import SUPPORTED_LORA_TARGET_MODULES
opt = ModelRegistry.models["OPTForCausalLM"]
module = importlib.import_module(opt.__module__)
assert overlay.is_ours(module, overlay.REPLACED_MODULES["sglang.srt.models.opt"]), module.__file__
for hook in (*alora_serving.HOOKS, cpu.UNPINNED_LORA_MANAGER):
    importlib.import_module(hook.module)
    assert hook.target in HookRegistry._patched, hook.target
assert {"out_proj", "fc1", "fc2"} <= set(SUPPORTED_LORA_TARGET_MODULES)
assert "fc2" in utils.ROW_PARALLELISM_LINEAR_LORA_NAMES
assert get_backend_from_name("torch_native").__name__ == "CpuLoRABackend"
assert ATTENTION_BACKENDS["torch_native"].__module__ == "sglang.srt.mezo.cpu"
print("all there")
"""
    for before in ("", "import sglang.srt.models.registry, sglang.srt.lora.lora_manager\n"):
        done = run_python(before + LOAD + code)
        assert "all there" in done.stdout, done.stderr[-3000:]


def test_platform_stays_away_from_accelerators(monkeypatch):
    monkeypatch.setattr(platform.torch.accelerator, "is_available", lambda: True)
    assert platform.activate() is None


def test_platform_leaves_upstreams_cpu_engine_alone(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


def test_cpu_backends_are_registered_on_our_platform_only(monkeypatch):
    installed = []
    monkeypatch.setattr(platform, "is_active", lambda: False)
    monkeypatch.setattr(plugin, "install", installed.append)
    monkeypatch.setattr(overlay, "on_import", lambda *args: installed.append(args))
    plugin._register_cpu_backends()
    assert installed == []


@pytest.mark.parametrize(
    "ranks, cores, expected",
    [
        (2, [0, 1], "0|1"),
        (2, [0, 1, 2, 3], "0,1|2,3"),
        (3, [4, 5], "4|5|4"),
        (2, [7], "7|7"),
        (3, list(range(8)), "0,1|2,3|4,5"),
    ],
)
def test_cores_are_shared_out(ranks, cores, expected):
    assert platform.threads_bind(ranks, cores) == expected


def test_environment_of_the_user_is_kept(monkeypatch):
    monkeypatch.setattr(platform, "_DEFAULTS_SET", {})
    monkeypatch.setenv(platform.THREADS_BIND_ENV, "5|6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    platform._share_cores(2)
    assert os.environ[platform.THREADS_BIND_ENV] == "5|6"
    threads = os.environ["OMP_NUM_THREADS"]
    platform._share_cores(64)  # a later engine in this process gets its own share
    assert os.environ["OMP_NUM_THREADS"] == "1" and int(threads) >= 1


def test_every_hook_says_why():
    for hook in alora_serving.HOOKS:
        assert hook.why and hook.kind in ("before", "after", "around")
    targets = [hook.target for hook in alora_serving.HOOKS]
    assert len(set(targets)) == len(targets)


def test_refusal_passes_what_swallows_exceptions():
    with pytest.raises(SystemExit, match="refuses to start: because"):
        try:
            raise hooks.StartRefused("because")
        except Exception:
            pytest.fail("swallowed")
