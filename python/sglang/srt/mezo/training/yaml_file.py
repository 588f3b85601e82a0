"""YAML files of the user's."""

from pathlib import Path
from typing import Any

from sglang.srt.mezo.core.errors import UsageError

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: Path, name: str) -> Any:
    """What a file holds. Of two values of one key YAML's readers take the last; here they are an error.

    Args:
        name: what messages call the file.

    Raises:
        UsageError: the file cannot be read.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a key is no text", key.start_mark)
                if key.value in seen and key.tag != _MERGE:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{name} cannot be read: {' '.join(str(error).split())}") from error
