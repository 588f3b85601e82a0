"""What a run had come to at any step, from its seed log: what the log starts from and the records lead to it, without
an engine."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sglang.srt.mezo.adapters.adapter import CONFIG, INITIAL, WEIGHTS, Adapter, AdapterSpec, Site
from sglang.srt.mezo.adapters.families import FAMILIES
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter
from sglang.srt.mezo.adapters.weights import WeightsSpec, checkpoint_weights
from sglang.srt.mezo.core.errors import ConfigError, DamagedError, LogError
from sglang.srt.mezo.core.integrity import require_sums
from sglang.srt.mezo.core.seed_log import SeedLog
from sglang.srt.mezo.core.settings import require_settings, setting
from sglang.srt.mezo.core.trainable import Trainable

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class ReplayArguments:
    """Of which run, and which step; ConfigError names the field at fault."""

    run: str = setting(help="Run directory: what --output_dir named, or a job's in a server's folder.")
    step: int = setting(help="Steps of the run that are repeated; 0 for what it started from.", at_least=0)
    output: str = setting(help="Folder to write, as PEFT or Transformers has it; it must not be there.")

    def __post_init__(self):
        require_settings(self)


def replay(arguments: ReplayArguments) -> Path:
    """Write the adapter, or the model, after so many steps; bit for bit what a checkpoint of that step holds.

    Raises:
        ConfigError: the folder holds no run, the output is there, the run has fewer steps, or its base model is not to
            be had.
        LogError, DamagedError: a record that is needed, or what the log starts from, is damaged.
    """
    run, output = Path(arguments.run), Path(arguments.output)
    if not (run / "seed_log").is_file() or not (run / "config.json").is_file():
        raise ConfigError("run", arguments.run, "a folder that a run made (seed_log and config.json)")
    if output.exists():
        raise ConfigError("output", arguments.output, "a folder that is not there yet")
    log = SeedLog.open(run / "seed_log")
    if arguments.step > len(log) and log.damage is not None:
        raise LogError(f"{log.path} is damaged: {log.damage}")
    if arguments.step > len(log):
        raise ConfigError("step", arguments.step, f"at most {len(log)}, the steps in {log.path}")
    trainable = _initial(run, log)
    log.replay(trainable.theta, arguments.step)
    trainable.save_pretrained(output)
    return output


def _initial(run: Path, log: SeedLog) -> Trainable:
    """What the first record of a run's log moves."""
    settings = _settings(run / "config.json")
    if settings.get("tuning") not in ("full", "prefix"):
        return initial_adapter(run, log)
    if settings["tuning"] == "prefix":
        begun, source = PrefixAdapter.from_pretrained(run / INITIAL), f"its {INITIAL}"
    else:
        base = settings["base_model"]
        begun = checkpoint_weights(WeightsSpec(base["name"], settings["parameters"]), base["precision"])
        source = f"{base['name']}, which has changed"
    if begun.shapes != log.header.shapes or not log.starts_from(begun.theta):
        raise ConfigError("run", str(run), f"a run whose log starts from {source}")
    return begun


def _settings(path: Path) -> dict[str, Any]:
    """Of a run; DamagedError where they cannot be read."""
    try:
        settings = json.loads(path.read_text())
        if settings.get("tuning") == "full":
            _ = settings["base_model"]["name"], settings["base_model"]["precision"], settings["parameters"]
        return settings
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(path, str(error) or type(error).__name__) from error


def initial_adapter(run: Path, log: SeedLog) -> Adapter:
    """That of a run that trains one.

    The files of an adapter do not say in which order its matrices lie in theta. That is the model's order of layers,
    and within one the same in all; the log's header has the digest of theta, which tells which it is.
    """
    folder = run / INITIAL
    if not folder.is_dir():
        raise ConfigError("run", str(run), f"a folder that a run made, with its {INITIAL}")
    require_sums(folder, (CONFIG, WEIGHTS))
    spec, weights = _read(folder)
    sites = [
        Site(path, weights[f"{_PREFIX}{path}{_A}"].shape[1], weights[f"{_PREFIX}{path}{_B}"].shape[0])
        for path in (name.removeprefix(_PREFIX).removesuffix(_A) for name in weights if name.endswith(_A))
    ]
    known = log.header.initial_adapter is not None
    for order in _orders(sites) if known else _orders_of_families(sites):
        adapter = Adapter(spec, order)
        if adapter.shapes != log.header.shapes:
            continue
        adapter.load_weights(folder)
        if log.starts_from(adapter.theta):
            return adapter
    raise ConfigError("run", str(run), "a run whose log starts from its initial_adapter")


def _read(folder: Path) -> tuple[AdapterSpec, dict[str, torch.Tensor]]:
    """An adapter that a run has written, as its files have it; DamagedError where they are not as they were."""
    try:
        fields = json.loads((folder / CONFIG).read_text())
        spec = AdapterSpec(
            fields["base_model_name_or_path"],
            fields["r"],
            fields["lora_alpha"],
            tuple(fields["target_modules"]),
            tuple(fields.get("alora_invocation_tokens") or ()),
            fields["task_type"],
        )
        return spec, load_file(folder / WEIGHTS)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise DamagedError(folder, str(error) or type(error).__name__) from error


def _orders(sites: list[Site]) -> Iterator[list[Site]]:
    """The orders in which a model may have the layers: known ones first."""
    yield from _orders_of_families(sites)
    for order in itertools.permutations(sorted({site.name for site in sites})):
        yield _sorted(sites, order)


def _orders_of_families(sites: list[Site]) -> Iterator[list[Site]]:
    """Those of models that we know: all that counts for a log of an earlier version, which cannot tell which is its
    own."""
    names = {site.name for site in sites}
    for family in FAMILIES.values():
        if names <= set(family.modules):
            yield _sorted(sites, [name for name in family.modules if name in names])


def _sorted(sites: list[Site], names: Sequence[str]) -> list[Site]:
    return sorted(sites, key=lambda site: (_layer(site), names.index(site.name)))


def _layer(site: Site) -> int:
    return next(int(part) for part in site.path.split(".") if part.isdigit())
