"""What is run on a GPU: in its order, within its time, and on from where the last call ended; packed and unpacked
for a machine without a network. On small models all of it runs here."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import OPTConfig, OPTForCausalLM

from sglang.srt.layers.quantization.awq import AWQConfig
from test_opt_model import SMALL, opt, pipeline_rank

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))
import awq
import lines as gpu_lines
import pack
import run as gpu_run
from lines import Line
from machine_code import keep_only

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "gpu"
WRITES = "import json, sys; json.dump({'ms': 7}, open(sys.argv[1], 'w')); print('7 ms')"


def line(name: str, code: str, minutes: float = 1) -> Line:
    command = ("{python}", "-c", code, "{json}")
    return Line(name, minutes, (command,), (command,))


def records(out: Path) -> list[tuple[str, str]]:
    return [(record["line"], record["status"]) for record in gpu_run.read(out / "lines.jsonl")]


# --- in its order, within its time ------------------------------------------------------------------------------------


def test_every_line_is_on_record_before_the_next_begins(tmp_path, capfd):
    seen = f"import sys; sys.exit('7 ms' not in open({str(tmp_path / 'lines.jsonl')!r}).read())"
    assert gpu_run.run([line("writes", WRITES), line("sees it", seen)], tmp_path, 60)
    assert records(tmp_path) == [("writes", "passed"), ("sees it", "passed")]
    [first, _] = gpu_run.read(tmp_path / "lines.jsonl")
    assert first["result"] == {"ms": 7} and first["end"] == "7 ms"
    assert first["versions"]["torch"] and first["date"].endswith("Z") and first["card"] and not first["tiny"]
    assert "writes" in capfd.readouterr().out and "7 ms" in (tmp_path / "log.txt").read_text()


def test_a_line_that_fails_is_told_and_the_next_is_run(tmp_path):
    fails = line("fails", "print('first'); raise ValueError('no kernel')")
    assert not gpu_run.run([fails, line("writes", WRITES)], tmp_path, 60)
    assert records(tmp_path) == [("fails", "failed"), ("writes", "passed")]
    assert gpu_run.read(tmp_path / "lines.jsonl")[0]["end"].endswith("ValueError: no kernel")


@pytest.mark.parametrize("own_session", [False, True])
def test_a_line_has_a_limit_of_its_own_and_leaves_no_process(tmp_path, own_session):
    """Not even one like a server, in a session of its own."""
    pid = str(tmp_path / "pid")
    starts = f"open({pid!r}, 'w').write(str(subprocess.Popen(['sleep', '600'], start_new_session={own_session}).pid))"
    child = f"import subprocess, time; {starts}; time.sleep(600)"
    assert not gpu_run.run([line("hangs", child, minutes=2 / 60)], tmp_path, 600)
    assert records(tmp_path) == [("hangs", "failed")]
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(") ")[2].startswith("Z")


def test_what_the_time_has_cut_is_run_again_and_what_is_done_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "LEAST_SECONDS", 1)
    all_lines = [line("writes", WRITES), line("long", "import time; time.sleep(600)"), line("last", WRITES)]
    monkeypatch.setattr(gpu_run, "lines", lambda model, data: all_lines)
    monkeypatch.setattr(sys, "argv", ["run.py", "--minutes", str(4 / 60), "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_run.main()
    assert records(tmp_path) == [("writes", "passed"), ("long", "cut")]
    all_lines[1] = line("long", WRITES)
    sys.argv[2] = "1"
    with pytest.raises(SystemExit) as ended:
        gpu_run.main()
    assert records(tmp_path)[2:] == [("long", "passed"), ("last", "passed")] and not ended.value.code


def test_half_a_record_of_a_machine_that_went_away_is_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "lines", lambda model, data: [line("writes", WRITES), line("last", WRITES)])
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path)])
    record = json.dumps({"line": "writes", "status": "passed", "tiny": False})
    (tmp_path / "lines.jsonl").write_text(record + "\n" + record[:9])
    with pytest.raises(SystemExit) as ended:
        gpu_run.main()
    assert records(tmp_path) == [("writes", "passed"), ("last", "passed")] and not ended.value.code


def test_what_the_repository_has_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "RESULTS", tmp_path / "known")
    (tmp_path / "known").mkdir()
    record = {"line": "writes", "status": "passed", "tiny": False}
    (tmp_path / "known" / "lines.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setattr(gpu_run, "lines", lambda model, data: [line("writes", WRITES), line("last", WRITES)])
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        gpu_run.main()
    assert records(tmp_path / "out") == [("writes", "passed"), ("last", "passed")]


def test_a_line_that_is_none_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "serverr", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_run.main()
    assert "--only: serverr: none of packages, engine-bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_line_that_is_named_is_run_though_another_is_as_small(tmp_path, monkeypatch, name):
    monkeypatch.setattr(gpu_run, "lines", lambda model, data: [line("first", WRITES), line("second", WRITES)])
    monkeypatch.setattr(sys, "argv", ["run.py", "--tiny", "--only", name, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_run.main()
    assert records(tmp_path) == [(name, "passed")]


def test_programs_of_all_lines_are_there():
    every = gpu_lines.lines(None, None)
    assert len({one.name for one in every}) == len(every)
    for one in every:
        for command in (*one.commands, *one.tiny):
            named = [part for part in command if part.endswith(".py")]
            assert named and all((ROOT / part).is_file() for part in named)


def test_four_bits_are_read_by_sglangs_kernel_as_they_were_meant(tmp_path):
    """Its Triton kernel, by Triton's interpreter."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.03
    q, zeros, scales = awq.quantized(weight)
    meant = awq.dequantized(q, zeros, scales)
    steps = scales.float().repeat_interleave(awq.GROUP, 0).t()
    assert ((meant - weight).abs() <= 0.6 * steps).all() and q.unique().tolist() == list(range(16))
    torch.save((awq.pack(q), scales.float(), awq.pack(zeros)), tmp_path / "packed")
    kernel = Path(importlib.util.find_spec("sglang").submodule_search_locations[0], "kernels/ops/quantization")
    code = (
        "import sys, torch; from awq_triton import awq_dequantize_triton as read;"
        "torch.save(read(*torch.load(sys.argv[1])), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "packed"), str(tmp_path / "read")]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=kernel, check=True)
    assert torch.equal(torch.load(tmp_path / "read").t(), meant)


def test_opt_is_loaded_in_four_bits(tmp_path):
    config = OPTConfig(**{**SMALL, "hidden_size": awq.GROUP, "word_embed_proj_dim": awq.GROUP})
    OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    folder = awq.save(tmp_path / "model", tmp_path / "awq")
    weights = load_file(f"{folder}/model.safetensors")
    made = OPTConfig.from_pretrained(folder)
    with pipeline_rank(0):
        model = opt.OPTForCausalLM(made, AWQConfig.from_config(made.quantization_config))
    assert model.load_weights(weights.items()) == weights.keys()
    parts = [weights[f"model.decoder.layers.1.self_attn.{name}_proj.qweight"] for name in "qkv"]
    assert torch.equal(model.model.decoder.layers[1].self_attn.qkv_proj.qweight, torch.cat(parts, 1))
    again = OPTForCausalLM.from_pretrained(tmp_path / "model").state_dict()["model.decoder.layers.1.fc1.weight"]
    assert all(len(group.unique()) <= 16 for group in again.reshape(-1, awq.GROUP))


@pytest.mark.slow
def test_every_line_passes_on_small_models(tmp_path):
    """Each half in a call of its own, as there are two cores."""
    names = [one.name for one in gpu_run.distinct(gpu_lines.lines(None, None))]
    command = [sys.executable, "benchmarks/gpu/run.py", "--tiny", "--minutes", "30"]
    middle = (len(names) + 1) // 2
    halves = {tmp_path / "first": names[:middle], tmp_path / "second": names[middle:]}
    calls = [
        subprocess.Popen(
            [*command, "--out", str(out), "--only", *half], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for out, half in halves.items()
    ]
    codes = [call.wait() for call in calls]
    assert codes == [0, 0], [(out / "log.txt").read_text()[-3000:] for out in halves]
    assert [record for out in halves for record in records(out)] == [(name, "passed") for name in names]


# --- packed -----------------------------------------------------------------------------------------------------------


def unpack(parts: Path, kit: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FOLDER / "unpack.py"), str(parts)]
    return subprocess.run(command, env={**os.environ, "KIT_ROOT": str(kit)}, capture_output=True, text=True)


@pytest.fixture
def parts(tmp_path) -> Path:
    """Three parts of an archive with an SGLang that is one file."""
    work, folder = tmp_path / "work", tmp_path / "parts"
    (work / "site" / "sglang" / "srt").mkdir(parents=True)
    (work / "site" / "sglang" / "big").write_bytes(os.urandom(2500))
    (work / "libraries" / "core").mkdir(parents=True)
    (work / "libraries" / "core" / "_noise.cpython-311-x86_64-linux-gnu.so").write_bytes(b"C")
    folder.mkdir()
    archive = pack.packed(work / "site.tar.xz", work, ["site", "libraries"], level=0)
    assert pack.put_parts(folder, 1, archive, most=1200) == 4
    return folder


def test_parts_come_one_by_one_and_are_put_together(tmp_path, parts):
    kit, later = tmp_path / "kit", tmp_path / "later"
    later.mkdir()
    (parts / "part3").rename(later / "part3")
    first = unpack(parts, kit)
    assert (first.returncode, first.stdout) == (1, "false\n") and "2 of 3 pieces" in first.stderr
    done = unpack(later, kit)
    assert done.returncode == 0, done.stderr
    assert f"export PYTHONPATH={kit}/site" in done.stdout and "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND" in done.stdout
    own = kit / "site" / "sglang" / "srt" / "mezo"
    assert (own / "core" / "noise.py").is_file() and (own / "_models" / "opt.py").is_file()
    assert [one.read_bytes() for one in own.glob("core/_noise*.so")][-1:] == [b"C"]
    entries = (kit / "site" / "sglang_mezo-0.dist-info" / "entry_points.txt").read_text()
    assert "[sglang.srt.platforms]\nmezo_cpu = sglang.srt.mezo.plugin.platform:activate" in entries
    assert unpack(tmp_path / "nothing", kit).returncode == 0, "later calls need not carry the parts again"


def test_what_one_machine_has_compiled_is_there_on_the_next(tmp_path, parts):
    made = tmp_path / "first" / "triton"
    made.mkdir(parents=True)
    (made / "kernel").write_text("compiled")
    subprocess.run(["tar", "-cJf", parts / "caches.tar.xz", "-C", made.parent, "."], check=True)
    done = unpack(parts, tmp_path / "kit")
    [kernel] = (tmp_path / "kit").rglob("kernel")
    assert f"export TRITON_CACHE_DIR={kernel.parent}\n" in done.stdout and kernel.read_text() == "compiled"
    kernel.write_text("compiled again")
    assert unpack(parts, tmp_path / "kit").returncode == 0, done.stderr
    assert kernel.read_text() == "compiled again"


def test_a_part_that_has_changed_is_refused(tmp_path, parts):
    piece = next((parts / "part2").glob("site*"))
    piece.write_bytes(b"x" + piece.read_bytes()[1:])
    done = unpack(parts, tmp_path / "kit")
    assert (done.returncode, done.stdout) == (1, "false\n") and "is not as it was packed" in done.stderr


def test_archives_hold_no_bytecode(tmp_path):
    (tmp_path / "site" / "__pycache__").mkdir(parents=True)
    (tmp_path / "site" / "__pycache__" / "a.pyc").write_bytes(b"x")
    (tmp_path / "site" / "a.py").write_text("")
    with tarfile.open(pack.packed(tmp_path / "a.tar.xz", tmp_path, ["site"], level=0)) as tar:
        assert tar.getnames() == ["site", "site/a.py"]


def test_machine_code_of_other_cards_is_zeroed(tmp_path):
    """A library with one section of device code: for 90, for 100, and as text of the compiler's."""
    codes = {(2, 90): b"A" * 40, (2, 100): b"B" * 24, (1, 90): b"C" * 16}
    entries = b"".join(
        struct.pack("<HHIQ", kind, 0, 32, len(code)) + bytes(12) + struct.pack("<I", arch) + code
        for (kind, arch), code in codes.items()
    )
    fat = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries
    names = b"\0.nv_fatbin\0.shstrtab\0"
    start, texts = 64, 64 + len(fat)
    table = texts + len(names)
    sections = [(0, 0, 0), (1, start, len(fat)), (12, texts, len(names))]
    headers = b"".join(struct.pack("<IIQQQQ", name, 1, 0, 0, at, size).ljust(64, b"\0") for name, at, size in sections)
    elf = b"\x7fELF".ljust(40, b"\0") + struct.pack("<Q", table) + bytes(10) + struct.pack("<HHH", 64, 3, 2)
    library = tmp_path / "library.so"
    library.write_bytes(elf + fat + names + headers)
    assert keep_only(library, 90) == (40, 40)
    left = library.read_bytes()
    assert len(left) == len(elf + fat + names + headers)
    assert (left.count(b"A"), left.count(b"B"), left.count(b"C")) == (40, 0, 0) and names in left
