"""On a machine with the package index: packs what an air-gapped GPU machine lacks into numbered parts.

    python benchmarks/gpu/pack.py .gpu                                  # everything for the Triton attention
    python benchmarks/gpu/pack.py .gpu --model SmolLM2-135M-Instruct.Q4_1.gguf --data data --with-fa3

Every part is a folder of at most ``--mib``, with the sums of what it holds; ``unpack.py`` puts them together. Keep the
folder out of version control. The machine has Python 3.12, PyTorch 2.11 for CUDA 13, Triton, Transformers, PEFT and
nvcc; 420 MiB of wheels are downloaded once.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from machine_code import keep_only

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
HOPPER = 90
GLIBC = ("2_39", "2_36", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17", "2_12", "2_5")
PLATFORMS = [f"manylinux_{one}_x86_64" for one in GLIBC] + [f"manylinux{one}_x86_64" for one in ("2014", "2010", "1")]
UNUSED = (  # no process of ours imports them
    *("sgl_kernel/flash_ops.abi3.so", "sgl_kernel/flashmla_ops.abi3.so", "sgl_kernel/sm100"),
    *("sglang/multimodal_gen", "sglang/test"),
)
STAND_IN = {  # of IPython SGLang imports two names, for notebooks
    "IPython/__init__.py": "def get_ipython():\n    return None\n",
    "IPython/display.py": "def display(*args, **kwargs):\n    pass\n\n\nclass HTML(str):\n    pass\n",
}
FA3 = "sgl_kernel/flash_ops.abi3.so"
TASKS = ("sst2", "trec")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--with-fa3", action="store_true", help="FlashAttention 3, in parts of its own")
    parser.add_argument("--model", type=Path, help="GGUF file of SmolLM2-135M, in parts of its own")
    parser.add_argument("--data", type=Path, help="folder with a folder of files for each task, beside the model")
    parser.add_argument("--mib", type=int, default=50, help="most of a part; the working tree travels beside it")
    parser.add_argument("--level", type=int, default=6, choices=range(10), help="of xz")
    arguments = parser.parse_args()
    work = arguments.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    for part in arguments.folder.glob("part*"):
        shutil.rmtree(part)
    site = work / "site"
    unpack_wheels(arguments.folder / "wheels", site)
    if arguments.with_fa3:
        (work / "fa3" / "site" / FA3).parent.mkdir(parents=True)
        shutil.move(site / FA3, work / "fa3" / "site" / FA3)
        keep_only(work / "fa3" / "site" / FA3, HOPPER)
    cut(site)
    shutil.copytree(ROOT / "python/sglang/srt/mezo", work / "libraries", ignore=_all_but_libraries)
    archives = {"site": (work, ["site", "libraries"])}
    if arguments.model:
        put_model(arguments.model, arguments.data, work / "real")
        archives["model"] = (work / "real", ["model", "data"])
    if arguments.with_fa3:
        archives["fa3"] = (work / "fa3", ["site"])
    number = 1
    for name, (folder, members) in archives.items():
        archive = packed(work / f"{name}.tar.xz", folder, members, arguments.level)
        number = put_parts(arguments.folder, number, archive, arguments.mib << 20)
    for part in sorted(arguments.folder.glob("part*")):
        print(f"{part}: {sum(file.stat().st_size for file in part.iterdir()) >> 20} MiB")


def unpack_wheels(cache: Path, site: Path) -> None:
    """Those of ``wheels.txt``, downloaded where they are not there yet."""
    wanted = [line for line in (HERE / "wheels.txt").read_text().split("\n") if line and not line.startswith("#")]
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        "--abi",
        "cp312",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, "--find-links", str(cache), "--dest", str(cache), *wanted], check=True)
    for wheel in wanted:
        name, _, version = wheel.partition("==")
        [file] = cache.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        zipfile.ZipFile(file).extractall(site)


def cut(site: Path) -> None:
    """What is not imported, and device code for other cards."""
    for name in UNUSED:
        path = site / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    unused = [*site.glob("sgl_kernel/infllm_ops*")]
    rust = site / "sglang" / "srt" / "rust_extensions"
    unused += [one for kind in ("bench", "grpc", "multimodal", "server") for one in rust.glob(f"_{kind}.*.so")]
    for path in unused:
        path.unlink()
    keep_only(site / "sgl_kernel" / f"sm{HOPPER}" / "common_ops.abi3.so", HOPPER)
    for name, text in STAND_IN.items():
        (site / name).parent.mkdir(exist_ok=True)
        (site / name).write_text(text)


def put_model(gguf: Path, data: Path | None, folder: Path) -> None:
    """The file as it is; of the rows those of the tasks that it is trained on."""
    (folder / "model").mkdir(parents=True)
    (folder / "data").mkdir()
    shutil.copy(gguf, folder / "model")
    for task in TASKS if data else ():
        shutil.copytree(data / task, folder / "data" / task)


def packed(archive: Path, folder: Path, members: list[str], level: int) -> Path:
    with tarfile.open(archive, "w:xz", preset=level) as tar:
        for member in members:
            tar.add(folder / member, member, filter=lambda one: None if "__pycache__" in one.name else one)
    return archive


def put_parts(folder: Path, number: int, archive: Path, most: int) -> int:
    """From part ``number`` on; returns the number of the next."""
    pieces = -(-archive.stat().st_size // most)
    sums = {"archive": archive.name, "pieces": pieces, "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    with open(archive, "rb") as file:
        for piece in range(pieces):
            part = folder / f"part{number + piece}"
            part.mkdir()
            content = file.read(most)
            (part / f"{archive.name}.{piece:02}").write_bytes(content)
            own = {**sums, "piece": piece, "piece_sha256": hashlib.sha256(content).hexdigest()}
            (part / "part.json").write_text(json.dumps(own))
    return number + pieces


def _all_but_libraries(folder: str, names: list[str]) -> list[str]:
    """Folders stay, and what a C compiler has made."""
    return [name for name in names if not name.endswith(".so") and not (Path(folder) / name).is_dir()]


if __name__ == "__main__":
    main()
