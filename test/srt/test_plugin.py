"""What the plugin changes in a process of SGLang, and that it stops the process where it cannot."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, OPTConfig

import oracle
from foreign_adapters import edit, saved
from sglang.srt.mezo.plugin import (
    adapter_loading,
    alora_serving,
    cpu_backends,
    entry,
    hooks,
    online,
    overlay,
    platform,
    server_defaults,
)
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

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
"""


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        # Engines that other tests started here leave their ranks' core shares behind.
        env={name: value for name, value in os.environ.items() if name != platform.THREADS_BIND_ENV} | environment,
    )


def test_wrong_version_is_refused_in_one_line():
    done = run_python(WRONG_VERSION + SERVER)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("sglang-mezo refuses to start")]
    assert lines == [
        "sglang-mezo refuses to start: it needs sglang==0.5.23 and found 0.5.24 (pip install sglang==0.5.23)"
    ]
    assert "Traceback" not in done.stderr


@pytest.fixture
def empty_hook_registry(monkeypatch):
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(sys, "meta_path", [overlay._FINDER, *sys.meta_path])


def test_hook_without_target_is_refused(empty_hook_registry):
    hook = hooks.Hook("sglang.srt.plugins.hook_registry", "_gone", "before", print, "a test")
    with pytest.raises(SystemExit, match=r"the hook on sglang.*hook_registry._gone did not take hold \(a test\)"):
        hooks.install(hook)
        importlib.import_module(hook.module)


def test_hook_that_another_plugin_took_is_refused(empty_hook_registry):
    HookRegistry._patched.add("sglang.srt.plugins.hook_registry.plugin_hook")
    hook = hooks.Hook("sglang.srt.plugins.hook_registry", "plugin_hook", "before", print, "a test")
    with pytest.raises(SystemExit, match="plugin_hook is hooked by another plugin already"):
        hooks.install(hook)


def test_hook_waits_for_its_module(empty_hook_registry, tmp_path, monkeypatch):
    (tmp_path / "hooked_later.py").write_text("def add(a, b):\n    return a + b\n")
    monkeypatch.syspath_prepend(tmp_path)
    hooks.install(hooks.Hook("hooked_later", "add", "around", lambda original, a, b: 10 * original(a, b), "a test"))
    assert "hooked_later" not in sys.modules
    assert importlib.import_module("hooked_later").add(1, 2) == 30


def test_missing_model_file_is_refused(monkeypatch):
    monkeypatch.setattr(overlay, "OUR_MODULES", {"sglang.srt.models.opt": Path("nowhere/opt.py")})
    monkeypatch.setattr(hooks, "registered", False)
    with pytest.raises(SystemExit, match="refuses to start: FileNotFoundError: model file nowhere/opt.py is missing"):
        entry.register()


def test_model_file_that_does_not_import_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import not_there\n")
    monkeypatch.setattr(overlay, "OUR_MODULES", {"sglang.srt.models.broken": tmp_path / "broken.py"})
    monkeypatch.setattr(sys, "meta_path", [overlay._FINDER, *sys.meta_path])
    with pytest.raises(ImportError, match="not_there"):
        overlay.register_models(SimpleNamespace())


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
    assert "name `mezo` and `mezo_cpu` in SGLANG_PLUGINS" in done.stderr


def test_everything_holds_in_one_process(tmp_path):
    """Our OPT is registered, the hooks are in place, OPT's modules are accepted, and fields left open are filled."""
    for name, dtype in (("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")):
        config = OPTConfig(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, dtype=dtype)
        config.architectures = ["OPTForCausalLM"]
        config.save_pretrained(tmp_path / name)
    code = """
import importlib, pkgutil, sys, types
from sglang.srt.mezo.plugin import adapter_loading, alora_serving, overlay
from sglang.srt.mezo.plugin import cpu_backends
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.lora import lora_manager, utils
from sglang.srt.lora.backend.lora_registry import get_backend_from_name
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.utils.common import SUPPORTED_LORA_TARGET_MODULES
opt = ModelRegistry.models["OPTForCausalLM"]
module = importlib.import_module(opt.__module__)
assert overlay.is_ours(module, overlay.OUR_MODULES["sglang.srt.models.opt"]), module.__file__
for name in ("RobertaForMaskedLM", "XLMRobertaForMaskedLM", "BertForMaskedLM"):
    masked = importlib.import_module(ModelRegistry.models[name].__module__)
    assert overlay.is_ours(masked, overlay.OUR_MODULES["sglang.srt.models.roberta_mlm"]), masked.__file__
for hook in (*adapter_loading.HOOKS, *alora_serving.HOOKS, *cpu_backends.HOOKS):
    importlib.import_module(hook.module)
    assert hook.target in HookRegistry._patched, hook.target
modules = [module for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)]
held = {id(value) for module in modules for value in list(vars(module).values())}
for hook in (*adapter_loading.HOOKS, *alora_serving.HOOKS, *cpu_backends.HOOKS):
    kept = id(pkgutil.resolve_name(hook.target).__wrapped__) in held
    assert not kept, f"{hook.target}: a module has kept the function that was there before"
assert {"out_proj", "fc1", "fc2"} <= set(SUPPORTED_LORA_TARGET_MODULES)
assert "fc2" in utils.ROW_PARALLELISM_LINEAR_LORA_NAMES
assert get_backend_from_name("torch_native").__name__ == "CpuLoRABackend"
assert ATTENTION_BACKENDS["torch_native"].__module__ == "sglang.srt.mezo.plugin.cpu_backends"

import argparse, os, sys
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.mezo.plugin import platform
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
arguments = parser.parse_args(["--model-path", "x", "--lora-target-modules", "fc1", "fc2", "out_proj"])
assert arguments.lora_target_modules == ["fc1", "fc2", "out_proj"]

def resolved(name, **fields):
    args = ServerArgs(model_path=os.path.join(sys.argv[1], name), skip_tokenizer_init=True, **fields)
    args.resolve_once()
    return resolving_view(args)

args = resolved("fp16")
assert (args.device, args.dtype) == ("cpu", "float32")
assert (args.attention_backend, args.sampling_backend, args.lora_backend) == ("torch_native", "pytorch", "torch_native")
assert args.mem_fraction_static == platform.MEM_FRACTION_STATIC
assert args.max_running_requests == platform.MAX_RUNNING_REQUESTS
assert 2048 <= args.max_total_tokens <= platform.KV_TOKENS_LIMIT
assert args.sleep_on_idle and args.disable_custom_all_reduce
assert args.cuda_graph_config.decode.backend == args.cuda_graph_config.prefill.backend == "disabled"
assert platform.THREADS_BIND_ENV not in os.environ
assert [resolved(name).dtype for name in ("fp32", "bf16")] == ["float32", "bfloat16"]
asked = dict(dtype="bfloat16", mem_fraction_static=0.3, max_total_tokens=500, max_running_requests=3, tp_size=2)
args = resolved("fp32", **asked)
assert (args.dtype, args.mem_fraction_static) == ("bfloat16", 0.3)
assert (args.max_total_tokens, args.max_running_requests) == (500, 3)
assert os.environ[platform.THREADS_BIND_ENV].count("|") == 1
print("all there")
"""
    # The usual order, plugin first, is that of every engine; here SGLang's modules come first.
    first = "import sglang.srt.models.registry, sglang.srt.lora.lora_manager\n"
    done = run_python(first + LOAD + code, str(tmp_path))
    assert "all there" in done.stdout, done.stderr[-3000:]


def test_flags_may_stand_in_sglangs_config_file(tmp_path, monkeypatch):
    """And what stands there has been given, though it is SGLang's default."""
    file = tmp_path / "server.yaml"
    file.write_text("enable-mezo: true\nmezo-share: 0.3\nmax-loras-per-batch: 8\nlora_backend: csgmv\n")
    parser = argparse.ArgumentParser()
    online._add_flags(parser)
    parser.add_argument("--config")
    parser.add_argument("--max-loras-per-batch", type=int)
    parser.add_argument("--lora-backend", "--lora_backend")
    typed = ["--config", str(file), "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["sglang", *typed])
    for variable in ("SGLANG_ENABLE_MEZO", "SGLANG_MEZO_SHARE"):
        monkeypatch.setenv(variable, "")
    parser.parse_known_args(ConfigArgumentMerger(parser).merge_config_with_args(typed))
    assert (os.environ["SGLANG_ENABLE_MEZO"], os.environ["SGLANG_MEZO_SHARE"]) == ("1", "0.3")
    assert server_defaults._typed() == {"enable_mezo", "mezo_share", "max_loras_per_batch", "lora_backend", "dtype"}
    monkeypatch.setattr(sys, "argv", ["other", "--config", "mine.json", "--dtype", "float32"])
    assert server_defaults._typed() == {"config", "dtype"}, "another program's"


def test_with_training_off_the_server_has_upstreams_routes_and_scheduler():
    code = (
        LOAD
        + """
import importlib, json, pkgutil, sys, types
from sglang.srt.entrypoints.http_server import app
from sglang.srt.mezo.plugin import online
from sglang.srt.plugins.hook_registry import HookRegistry
for hook in online.SCHEDULER_HOOKS:
    importlib.import_module(hook.module)
routes = sorted((path, method) for path, methods in app.openapi()["paths"].items() for method in methods)
hooked = [hook.target for hook in online.SCHEDULER_HOOKS if hook.target in HookRegistry._patched]
modules = [module for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)]
held = {id(value) for module in modules for value in list(vars(module).values())}
stale = [target for target in hooked if id(pkgutil.resolve_name(target).__wrapped__) in held]
print(json.dumps([routes, hooked, app.router.lifespan_context.__module__, stale]))
"""
    )

    def server(**environment: str) -> tuple[list, list, str, list]:
        done = run_python(code, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    upstream, off, on = server(SGLANG_PLUGINS="none"), server(), server(SGLANG_ENABLE_MEZO="1")
    assert off == upstream
    assert all(route in on[0] for route in upstream[0]) and ["/v1/fine_tuning/jobs", "post"] in on[0]
    assert ["/v1/fine_tuning/jobs", "post"] not in off[0] and not any(path.startswith("/mezo") for path, _ in off[0])
    assert len(off[0]) > 50 and off[1] == [] and len(on[1]) == len(online.SCHEDULER_HOOKS)
    assert on[2] != off[2] and on[3] == []


def test_platform_stays_away_from_accelerators(monkeypatch):
    monkeypatch.setattr(platform.torch.accelerator, "is_available", lambda: True)
    assert platform.activate() is None


def test_platform_leaves_upstreams_cpu_engine_alone(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform.activate() is None


def test_cpu_backends_are_registered_on_our_platform_only(monkeypatch):
    installed = []
    monkeypatch.setattr(platform, "is_active", lambda: False)
    monkeypatch.setattr(entry, "install", installed.append)
    monkeypatch.setattr(overlay, "on_import", lambda *args: installed.append(args))
    entry._register_cpu_backends()
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


@pytest.mark.parametrize("form", ["{name}={path}", "{path}", {"lora_name": "{name}", "lora_path": "{path}"}])
def test_a_start_with_an_adapter_that_cannot_be_applied_is_refused_before_a_model_is_loaded(tmp_path, form):
    base = AutoModelForCausalLM.from_config(oracle.CONFIGS["llama"])
    base.save_pretrained(tmp_path / "model")
    good, bad = saved(base, tmp_path / "good"), edit(saved(base, tmp_path / "bad"), use_dora=True)

    def arguments(path, targets=None):
        given = (
            form.format(name="mine", path=path)
            if isinstance(form, str)
            else {key: value.format(name="mine", path=path) for key, value in form.items()}
        )
        model = {
            "model_path": str(tmp_path / "model"),
            "trust_remote_code": False,
            "revision": None,
            "json_model_override_args": "{}",
            "context_length": None,
        }
        return SimpleNamespace(**model, lora_paths=[given], max_lora_rank=None, lora_target_modules=targets)

    adapter_loading.require_adapters(arguments(good))
    with pytest.raises(hooks.StartRefused, match="--lora-paths .*use_dora=True is not allowed"):
        adapter_loading.require_adapters(arguments(bad))
    with pytest.raises(hooks.StartRefused, match="--lora-paths .*lora_path='/nowhere' is not allowed"):
        adapter_loading.require_adapters(arguments("/nowhere"))
    activated = edit(saved(base, tmp_path / "activated"), alora_invocation_tokens=[1, 2])
    adapter_loading.require_adapters(arguments(activated, ["q_proj", "v_proj"]))
    adapter_loading.require_adapters(arguments(good, ["all"]))
    with pytest.raises(hooks.StartRefused, match="activated LoRA not together with --lora-target-modules all"):
        adapter_loading.require_adapters(arguments(activated, ["all"]))


def test_every_hook_says_why():
    for hook in (*adapter_loading.HOOKS, *alora_serving.HOOKS, *cpu_backends.HOOKS):
        assert hook.why and hook.kind in ("before", "after", "around")
    targets = [hook.target for hook in (*adapter_loading.HOOKS, *alora_serving.HOOKS, *cpu_backends.HOOKS)]
    assert len(set(targets)) == len(targets)


def test_refusal_passes_what_swallows_exceptions():
    with pytest.raises(SystemExit, match="refuses to start: because"):
        try:
            raise hooks.StartRefused("because")
        except Exception:
            pytest.fail("swallowed")
