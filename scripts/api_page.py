"""Writes docs/api.md from the routes themselves: ``python scripts/api_page.py``."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI

from sglang.srt.mezo.service.http import native, routes
from sglang.srt.mezo.service.http.endpoint import add_routes

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
PARTS = {
    "Files": lambda: routes._Files(None).endpoints(),
    "Jobs": lambda: routes._Jobs(None).endpoints(),
    "Models": lambda: routes._Models(None, None, None).endpoints(),
    "Beyond OpenAI's": lambda: native._Native(None).endpoints(),
}
INTRODUCTION = """# HTTP API

Made by `python scripts/api_page.py` from the routes themselves; a server tells the same under `/openapi.json`. All
but the last part is OpenAI's, and its clients work against it as they are. Requests that change something need the
admin key where `--admin-api-key` is set, the others the `--api-key`. Bodies are JSON, but for uploads; a field that
is not named here is refused.

An error is `{"error": {"message", "type", "param", "code"}}`: `param` names the field at fault, `message` its value
and what is allowed. Status 503 with `Retry-After` means that the same request can be sent again.
[Settings](settings.md) has the names, types and bounds of `hyperparameters`; [in a running server](server.md) says
what becomes of a job.
"""


def page() -> str:
    text = INTRODUCTION
    for title, endpoints in PARTS.items():
        app = FastAPI()
        add_routes(app, endpoints())
        text += f"\n## {title}\n"
        for path, methods in app.openapi()["paths"].items():
            for method, told in methods.items():
                text += f"\n### `{method.upper()} {path}`\n\n{_told(told)}"
    return text


def _told(operation: dict[str, Any]) -> str:
    said = " ".join(operation["description"].replace("``", "`").split()) + "\n"
    rows = [
        (name, schema, name in body.get("required", ()))
        for body in [_body(operation)]
        for name, schema in body.get("properties", {}).items()
    ]
    rows += [
        (f"?{one['name']}", one["schema"], one["required"])
        for one in operation.get("parameters", ())
        if one["in"] == "query"
    ]
    if not rows:
        return said
    head = "\n| field | type | default | allowed |\n|---|---|---|---|\n"
    return (
        said + head + "".join(f"| `{name}` | {' | '.join(_cells(schema, needed))} |\n" for name, schema, needed in rows)
    )


def _body(operation: dict[str, Any]) -> dict[str, Any]:
    content = operation.get("requestBody", {}).get("content", {})
    return content.get("application/json", {}).get("schema", {})


def _cells(schema: dict[str, Any], needed: bool) -> tuple[str, str, str]:
    default = "" if needed else str(schema.get("default", None)).replace("None", "null").lower()
    return _type(schema), default, _allowed(schema)


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return ", ".join(map(_type, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("properties"):
        return "{" + ", ".join(f"`{name}`: {_type(part)}" for name, part in schema["properties"].items()) + "}"
    return schema.get("type", "any")


_BOUNDS = {
    "": ("minimum", "maximum"),
    " characters": ("minLength", "maxLength"),
    " items": ("minItems", "maxItems"),
    " pairs": ("minProperties", "maxProperties"),
}
_OPEN = {"exclusiveMinimum": "above", "exclusiveMaximum": "below"}


def _allowed(schema: dict[str, Any]) -> str:
    bounds = {name: value for part in [schema, *schema.get("anyOf", ())] for name, value in part.items()}
    said = []
    for unit, (lowest, highest) in _BOUNDS.items():
        low, high = bounds.get(lowest), bounds.get(highest)
        if low is not None and high is not None:
            said.append(f"from {low} to {high}{unit}")
        elif low is not None or high is not None:
            said.append(f"at least {low}{unit}" if high is None else f"at most {high}{unit}")
    return ", ".join(said + [f"{words} {bounds[name]}" for name, words in _OPEN.items() if name in bounds])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
