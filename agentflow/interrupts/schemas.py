"""JSON Schema: made from Python types, and checked against answers.

Problems are told as `path: what is wrong`, with what the schema asks for and never with the value
that was given: an answer may hold what must not reach a log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError  # type: ignore[import-untyped] # no types

_MOST_PROBLEMS = 20
_MESSAGES = {
    "const": "must be {}",
    "enum": "must be one of {}",
    "exclusiveMaximum": "must be less than {}",
    "exclusiveMinimum": "must be greater than {}",
    "format": "must have the format {}",
    "maxItems": "must have at most {} items",
    "maxLength": "must have at most {} characters",
    "maximum": "must be at most {}",
    "minItems": "must have at least {} items",
    "minLength": "must have at least {} characters",
    "minimum": "must be at least {}",
    "multipleOf": "must be a multiple of {}",
    "pattern": "must match the pattern {}",
    "type": "must be of type {}",
    "uniqueItems": "must not have the same item twice",
}


def to_schema(form: Any, *, by_alias: bool = True) -> dict[str, Any] | None:
    """Return the JSON Schema of a pydantic model, TypedDict, dataclass or any type; dicts as is.

    Raises:
        pydantic.errors.PydanticUserError: The type has no JSON Schema.
    """
    if form is None:
        return None
    if isinstance(form, Mapping):
        return dict(form)
    return TypeAdapter(form).json_schema(by_alias=by_alias)


def schema_error(schema: Mapping[str, Any]) -> str | None:
    """Return why a dict is not a JSON Schema, or `None` if it is one."""
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped] # ships no types
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for  # type: ignore[import-untyped] # no types

    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return f"is not a JSON Schema at {_path('', error.absolute_path) or 'the top'}"
    return None


def problems(schema: Mapping[str, Any], value: Any, path: str) -> list[str]:
    """Return everything about `value` that does not fit the schema, as `path: what is wrong`.

    A schema that cannot be applied is a problem too: what cannot be checked does not pass.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    if reason := schema_error(schema):
        return [f"{path}: cannot be checked, its schema {reason}"]
    cls = validator_for(schema, default=Draft202012Validator)
    # An empty registry: by default a `$ref` to a URL would be fetched, from inside our network.
    registry: Registry[Any] = Registry()
    validator = cls(schema, registry=registry, format_checker=cls.FORMAT_CHECKER)
    try:
        found = [
            f"{_path(path, error.absolute_path)}: {_message(error)}"
            for error in validator.iter_errors(value)
        ]
    except Unresolvable:
        return [f"{path}: cannot be checked, its schema refers to a part that is not in it"]
    except (RecursionError, re.error):
        return [f"{path}: cannot be checked, its schema cannot be applied"]
    return list(dict.fromkeys(found))[:_MOST_PROBLEMS]


def _message(error: ValidationError) -> str:
    keyword, wanted = error.validator, error.validator_value
    if keyword == "required":
        missing = [name for name in wanted if name not in error.instance]
        return f"lacks {', '.join(missing)}"
    if keyword in {"additionalProperties", "unevaluatedProperties"}:
        known = error.schema.get("properties", {})
        extra = [str(name)[:40] for name in error.instance if name not in known]
        return f"has properties that are not known here: {', '.join(extra[:5])}"
    if keyword in {"anyOf", "oneOf"}:
        causes = list(error.context or ())
        types = {_types(c) for c in causes if c.validator == "type" and not c.relative_path}
        if causes and all(c.validator == "type" and not c.relative_path for c in causes):
            return f"must be of type {' or '.join(sorted(types))}"
        return "fits none of the forms that are allowed here"
    if keyword == "type":
        return _MESSAGES["type"].format(_types(error))
    return _MESSAGES.get(keyword, f"does not meet {keyword!r}").format(wanted)


def _types(error: ValidationError) -> str:
    wanted = error.validator_value
    return wanted if isinstance(wanted, str) else " or ".join(wanted)


def _path(start: str, steps: Iterable[str | int]) -> str:
    for step in steps:
        if isinstance(step, int):
            start += f"[{step}]"
        else:
            start += f".{step}" if start else step
    return start
