"""On the air-gapped machine, from the root of the working tree, in every call:

    eval "$(python3 benchmarks/gpu/unpack.py .gpu)" && python3 benchmarks/gpu/run.py --minutes 7 --out results $KIT_REAL

Takes in the parts that came with the call, unpacks an archive once its pieces are all there, lays the plugin of this
tree over SGLang, and prints the environment. Whatever is wrong ends it, and prints ``false``. ``caches.tar.xz`` among
the parts is what Triton and nvcc have made on an earlier machine: ``tar -cJf caches.tar.xz -C "$KIT_CACHES" .`` there.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from pathlib import Path

KIT = Path(os.environ.get("KIT_ROOT") or Path(tempfile.gettempdir()) / "gpu-kit")
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1",
    # The radix tree in Rust is linked against PyTorch 2.14 and panics under 2.11; the one in Python is the same tree.
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "TRITON_CACHE_DIR": str(KIT / "caches" / "triton"),
    "SGLANG_CACHE_DIR": str(KIT / "caches" / "sglang"),
    "SGLANG_JIT_CACHE_DIR": str(KIT / "caches" / "jit"),
    "KIT_CACHES": str(KIT / "caches"),
}


def main() -> None:
    incoming = KIT / "in"
    incoming.mkdir(parents=True, exist_ok=True)
    for part in sorted(Path(sys.argv[1]).glob("part*")):
        take(part, incoming)
    take_caches(Path(sys.argv[1]) / "caches.tar.xz")
    for name in {file.name.rpartition(".")[0] for file in incoming.glob("*.tar.xz.*")}:
        put_together(name, incoming)
    lay_plugin(KIT / "site")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(KIT / "site"), os.environ.get("PYTHONPATH", "")])}
    environment["PYTHONPATH"] = environment["PYTHONPATH"].rstrip(os.pathsep)
    if (home := cuda_home()) is not None:
        environment["CUDA_HOME"] = str(home)
    for gguf in (KIT / "model").glob("*.gguf") if (KIT / "data" / "sst2").is_dir() else ():
        environment["KIT_REAL"] = f"--model {gguf} --data {KIT / 'data'}"
    for name, value in environment.items():
        print(f"export {name}={shlex.quote(value)}")


def take(part: Path, incoming: Path) -> None:
    """Its piece, if it is as it was packed."""
    sums = json.loads((part / "part.json").read_text())
    piece = part / f"{sums['archive']}.{sums['piece']:02}"
    require(hashlib.sha256(piece.read_bytes()).hexdigest() == sums["piece_sha256"], f"{piece} is not as it was packed")
    shutil.copy(piece, incoming)
    (incoming / f"{sums['archive']}.json").write_text(json.dumps(sums))


def take_caches(archive: Path) -> None:
    """What an earlier machine has compiled, where this one has compiled nothing."""
    caches = KIT / "caches"
    if archive.is_file() and not caches.exists():
        caches.mkdir()
        with tarfile.open(archive, "r:xz") as tar:
            tar.extractall(caches, filter="data")


def put_together(name: str, incoming: Path) -> None:
    """Unpack an archive, where all its pieces are there."""
    sums = json.loads((incoming / f"{name}.json").read_text())
    pieces = sorted(incoming.glob(f"{name}.[0-9]*"))
    if len(pieces) < sums["pieces"]:
        print(f"{name}: {len(pieces)} of {sums['pieces']} pieces", file=sys.stderr)
        return
    whole = incoming / name
    with open(whole, "wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    require(hashlib.sha256(whole.read_bytes()).hexdigest() == sums["sha256"], f"{name} is not as it was packed")
    with tarfile.open(whole, "r:xz") as tar:
        tar.extractall(KIT, filter="fully_trusted")
    for path in [whole, *pieces]:
        path.unlink()


def lay_plugin(site: Path) -> None:
    """As a wheel would: our package, the models in it, the libraries in C, and what ``pyproject.toml`` says to call."""
    require((site / "sglang").is_dir(), f"{site} has no SGLang: part1 has not come")
    own = site / "sglang" / "srt" / "mezo"
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(ROOT / "python/sglang/srt/mezo", own)
    (own / "_models").mkdir()
    for file in (ROOT / "python/sglang/srt/models").glob("*.py"):
        shutil.copy(file, own / "_models")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")  # they are plain C: only the name is another Python's
    for library in (KIT / "libraries").rglob("*.so"):
        place = own / library.relative_to(KIT / "libraries")
        shutil.copy(library, place.with_name(library.name.partition(".")[0] + suffix))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = site / "sglang_mezo-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang-mezo\nVersion: 0\n")
    groups = project["entry-points"] | {"console_scripts": project["scripts"]}
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {to}\n" for name, to in made.items()) for group, made in groups.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


def cuda_home() -> Path | None:
    """With what SGLang compiles and links small kernels: ``bin/nvcc``, ``include``, ``lib64/libcudart.so``."""
    nvcc = shutil.which("nvcc")
    found = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    homes = [Path(one) for one in found if one and (Path(one) / "bin" / "nvcc").is_file()]
    if not homes:
        print("no nvcc: SGLang falls back on PyTorch where it would compile a kernel", file=sys.stderr)
        return None
    if (homes[0] / "lib64" / "libcudart.so").exists():
        return homes[0]
    home = KIT / "cuda"  # a toolkit out of Python packages
    shutil.rmtree(home, ignore_errors=True)
    (home / "lib64").mkdir(parents=True)
    for path in homes[0].iterdir():
        if path.name != "lib64":
            (home / path.name).symlink_to(path)
    runtime = next((one for place in ("lib", "targets") for one in (homes[0] / place).rglob("libcudart.so.*")), None)
    if runtime is not None:
        (home / "lib64" / "libcudart.so").symlink_to(runtime)
    return home


def require(condition: bool, message: str) -> None:
    if not condition:
        sys.exit(message)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        print("false")  # for the shell, beside the reason
        raise
