"""Installation in fresh virtual environments: it works, leaves upstream's files alone, and goes away without a trace.

An environment gets its own copy of the sglang package (as hard links where the file system allows it, otherwise as a
copy) and borrows everything else from the environment that runs the tests, so nothing is downloaded.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path

import pytest

import docs_blocks

REPOSITORY = Path(__file__).resolve().parents[2]
OURS = "sglang_mezo"
SUFFIXES = {".py", ".html", ".css", ".js", ".toml", ".json", ".yaml"}
KERNELS = list((REPOSITORY / "python/sglang/srt/mezo").glob("*/*.so"))  # none where there is no compiler

CHECK = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.mezo, sglang.srt.mezo.cpu.lora, sglang.srt.mezo.data.tasks
from sglang.srt.platforms import current_platform
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.lora.backend.lora_registry import get_backend_from_name
opt = ModelRegistry.models["OPTForCausalLM"]
print("platform", type(current_platform).__name__)
print("lora", get_backend_from_name("torch_native").__name__)
print("opt", sys.modules[opt.__module__].__file__)
print("sglang", sys.modules["sglang"].__file__)
"""

# The same questions in a process that multiprocessing spawns, as SGLang does for its scheduler.
CHECK_SPAWNED = f"""
import multiprocessing
def child():
    exec({CHECK!r})
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
"""


class Environment:
    """A virtual environment with a copy of sglang in its own site-packages, or in a source tree that it is installed
    from, as in SGLang's images."""

    def __init__(self, folder: Path, from_source_tree: bool = False):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        installed = distribution("sglang")
        source = Path(installed.locate_file("sglang"))
        ignored = shutil.ignore_patterns("__pycache__", "mezo")
        self.sglang = (folder / "tree" if from_source_tree else self.site) / "sglang"
        shutil.copytree(source, self.sglang, copy_function=_link, ignore=ignored)
        if from_source_tree:
            (self.site / "__editable__.sglang.pth").write_text(f"{self.sglang.parent}\n")
        metadata = installed._path
        shutil.copytree(metadata, self.site / metadata.name)
        # Dependencies come after our own site-packages, and the editable install of the tests not at all.
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for entry in source.parent.iterdir():
            if not entry.name.startswith(("sglang", OURS, "__editable__")):
                (borrowed / entry.name).symlink_to(entry)
        (self.site / "borrowed.pth").write_text(f"{borrowed}\n")

    def run(self, *arguments: str, cwd: Path | None = None) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [str(self.python), "-W", "ignore", *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.site.parent,
            env=environment,
            timeout=500,
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def install(self, *arguments: str) -> None:
        self.run("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", *arguments)

    def answers(self, tmp_path: Path, code: str) -> dict[str, str]:
        script = tmp_path / "check.py"
        script.write_text(code)
        return dict(line.split(" ", 1) for line in self.run(str(script)).splitlines() if " " in line)

    def upstream_files(self) -> dict[str, str]:
        """Digest of every file of the copied package, and whatever else lies in the folder."""
        root = self.sglang
        files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(root)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture
def source_tree(tmp_path) -> Path:
    """A copy of what the build reads, so that it leaves nothing in the repository."""
    tree = tmp_path / "source"
    tree.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (REPOSITORY / name).exists():
            shutil.copy2(REPOSITORY / name, tree)
    shutil.copytree(
        REPOSITORY / "python", tree / "python", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    )
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["wheel", "editable", "both editable"])
def test_install_use_uninstall(mode, tmp_path, source_tree):
    environment = Environment(tmp_path / "venv", from_source_tree=mode == "both editable")
    before = environment.upstream_files()
    if mode == "wheel":
        environment.install(str(source_tree))
        opt = environment.site / "sglang/srt/mezo/_models/opt.py"
    else:
        environment.install("-e", str(source_tree))
        opt = source_tree / "python/sglang/srt/models/opt.py"

    for code in (CHECK, CHECK_SPAWNED):
        answers = environment.answers(tmp_path, code)
        assert Path(answers["opt"]) == opt
        assert Path(answers["sglang"]) == environment.sglang / "__init__.py"
        assert answers["platform"] == "MezoCpuPlatform"
        assert answers["lora"] == "CpuLoRABackend"

    if mode == "wheel":  # outside of the repository
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        hub = docs_blocks.local_hub(tmp_path / "hub", facebook__opt_125m=REPOSITORY / "examples/assets/opt-reviews")
        docs_blocks.run(docs_blocks.of_group("quickstart"), elsewhere, environment.python, OMP_NUM_THREADS="1", **hub)

    after = environment.upstream_files()
    assert {name: after.get(name) for name in before} == before
    added = {name for name in after if name not in before}
    assert all(name.startswith("srt/mezo/") for name in added)
    assert bool(added) == (mode == "wheel")

    environment.run("-m", "pip", "uninstall", "-y", "sglang-mezo")
    assert environment.upstream_files() == before
    assert not [path for path in environment.site.iterdir() if "mezo" in path.name]
    left = environment.run("-c", "import importlib.util as u; print(u.find_spec('sglang.srt.mezo'))")
    assert left.strip() in ("None", "")


def test_wheel_holds_what_the_source_tree_holds(tmp_path, source_tree):
    import zipfile

    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", str(source_tree)],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("sglang_mezo-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if Path(name).suffix in SUFFIXES}
    package, models = source_tree / "python/sglang/srt/mezo", source_tree / "python/sglang/srt/models"
    expected = {
        f"sglang/srt/mezo/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.suffix in SUFFIXES
    }
    expected |= {f"sglang/srt/mezo/_models/{path.relative_to(models).as_posix()}" for path in models.rglob("*.py")}
    assert packed == expected
    assert {name for name in names if name.endswith(".so")} == {
        str(path.relative_to(REPOSITORY / "python")) for path in KERNELS
    }
