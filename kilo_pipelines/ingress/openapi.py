"""The control API in OpenAPI's words (3.1: its schemas are JSON Schema as pydantic writes it)."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from kilo_pipelines import __version__
from kilo_pipelines.ingress import security, security_work
from kilo_pipelines.ingress.control import Operation

REFS = "#/components/schemas/{model}"
OPERATIONS: dict[str, Operation] = security.OPERATIONS | security_work.OPERATIONS


def description(routes: Iterable[Route]) -> dict[str, Any]:
    """Paths, methods, who asks; of the routes in `OPERATIONS` also parameters, bodies and answers."""
    schemas = _schemas()
    paths: dict[str, Any] = {}
    for route in routes:
        for method in sorted((route.methods or set()) - {"HEAD"}):
            known = OPERATIONS.get(route.name)
            named = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in route.param_convertors
            ]
            operation: dict[str, Any] = {
                "operationId": route.name,
                "parameters": named,
                "responses": {"default": {"description": "JSON with an outcome"}},
            }
            if known is not None:
                operation |= _described(known, named)
            paths.setdefault(route.path, {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "kilo-pipelines control API", "version": __version__},
        "security": [{"apiKey": []}],
        "components": {"securitySchemes": {"apiKey": {"type": "http", "scheme": "bearer"}}, "schemas": schemas},
        "paths": paths,
    }


def _described(known: Operation, named: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": known.summary,
        "parameters": [*named, *_parameters(known.query)],
        "responses": {str(status): _answer(status, model, known.documents) for status, model in known.answers.items()},
    }
    if known.body is not None:
        content = {"application/json": {"schema": _ref(known.body)}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _answer(status: int, model: type[BaseModel], documents: tuple[str, ...]) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ref(model)}}
    if status == HTTPStatus.OK:
        content |= {kind: {} for kind in documents}
    return {"description": HTTPStatus(status).phrase, "content": content}


def _parameters(query: type[BaseModel] | None) -> list[dict[str, Any]]:
    """A query's fields as parameters; an optional one is left out instead of being null."""
    if query is None:
        return []
    schema = query.model_json_schema()
    found = []
    for name, field in schema["properties"].items():
        told = {key: value for key, value in field.items() if key not in ("title", "default", "anyOf", "description")}
        told |= next((one for one in field.get("anyOf", []) if one.get("type") != "null"), {})
        if field.get("default") is not None:
            told["default"] = field["default"]
        parameter = {"name": name, "in": "query", "required": name in schema.get("required", []), "schema": told}
        found.append(parameter | ({"description": field["description"]} if "description" in field else {}))
    return found


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFS.format(model=model.__name__)}


def _schemas() -> dict[str, Any]:
    answers = {model for one in OPERATIONS.values() for model in one.answers.values()}
    bodies = {one.body for one in OPERATIONS.values() if one.body is not None}
    named = sorted(answers | bodies, key=lambda one: one.__name__)
    _, made = models_json_schema(
        [(model, "validation" if model in bodies else "serialization") for model in named], ref_template=REFS
    )
    schemas: dict[str, Any] = made["$defs"]
    return schemas
