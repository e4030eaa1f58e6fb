"""YAML files into validated settings: every problem at once, each with its line.

pydantic checks types and ranges; this file adds positions, choices by name, and suggestions for
misspelt names. What YAML itself gets wrong is caught in `yaml_text`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from hbxt_compress.errors import RecipeError
from hbxt_compress.yaml_text import PLAIN_FLOAT, Place, Reading, compose

__all__ = ["Settings", "did_you_mean", "load", "one_of"]

_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}
_MOST_SHOWN = 80  # characters of a wrong value
_Kind = TypeVar("_Kind", bound="Settings")


class Settings(BaseModel):
    """What a user may write: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON of these settings, defaults included; 64 hex digits."""
        document = self.model_dump(mode="json")
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


class _Choice:
    """Marks a type made by `one_of` with its table."""

    def __init__(self, table: Mapping[str, type[Any]]) -> None:
        self.table = table


def one_of(table: Mapping[str, type[Any]]) -> Any:
    """A type for a Settings field: `{use: name, ...}` builds table[name] from the other keys."""
    names = {kind: name for name, kind in table.items()}

    def build(value: object) -> Settings:
        if isinstance(value, tuple(names)):
            return value  # type: ignore[return-value]
        use = value.get("use") if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(use, str) or use not in table:
            known = ", ".join(sorted(table))
            text = (
                "must be a mapping that names one of them"
                if use is None
                else f"unknown name {use!r}"
            )
            text = f"{text}{did_you_mean(str(use), table)}; known: {known}"
            raise PydanticCustomError("use", "{text}", {"text": text})
        rest = {key: item for key, item in value.items() if key != "use"}
        return table[use].model_validate_json(json.dumps(rest))

    def dump(value: Settings) -> dict[str, object]:
        return {"use": names[type(value)], **value.model_dump(mode="json")}

    return Annotated[Settings, PlainValidator(build), PlainSerializer(dump), _Choice(table)]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean 'x'?)' for the closest known name, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def load(kind: type[_Kind], path: Path) -> _Kind:
    """The settings in a YAML file.

    Raises:
        RecipeError: the file cannot be read, or is not valid; the message lists every problem.
    """
    try:
        reading = Reading(compose(path))
        text = json.dumps(reading.document)
    except RecursionError as deep:  # aliases nest deeper than the text itself
        raise RecipeError(f"{path}: nested too deeply") from deep
    settings = None
    try:
        settings = kind.model_validate_json(text)
    except ValidationError as invalid:
        errors = sorted(invalid.errors(include_url=False), key=lambda e: e["type"] in _WANTED)
        if errors[0]["type"] == "json_invalid":
            raise RecipeError(f"{path}: nested too deeply ({errors[0]['msg']})") from invalid
        places = [_found_at(kind, reading.document, error["loc"]) for error in errors]
        for error, (place, fields) in zip(errors, places, strict=True):
            if error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
                continue  # its items are invalid, and reported as such
            if len(place) < len(error["loc"]) and any(place == p[:-1] for p, _ in places):
                continue  # not of that type, but of one whose items are invalid
            place = (*place, "use") if error["type"] == "use" else place
            reading.reject(place, _explain(error, fields))
    if reading.problems or settings is None:
        lines = [f"{path}:{line}: {text}" for line, text in sorted(set(reading.problems))]
        raise RecipeError("\n".join(lines))
    return settings


def _found_at(kind: type[Settings], document: Any, loc: Place) -> tuple[Place, list[str]]:
    """An error's place in the document, and the keys that the mapping around it may have.

    pydantic's own has `[key]`, and the names of types where one of several may stand.
    """
    annotation: Any = kind
    place: list[int | str] = []
    fields: list[str] = []
    for segment in loc:
        annotation, is_list = _settings(annotation, document), isinstance(document, list)
        if get_origin(annotation) in (Union, UnionType):
            meant = [a for a in get_args(annotation) if (get_origin(_settings(a, None)) is tuple)]
            annotation = meant[0] if is_list and meant else None
            continue
        if segment == "[key]" or not isinstance(document, list | dict):
            continue
        if is_list and not (isinstance(segment, int) and segment < len(document)):
            continue  # one that is missing at the end
        fields, inside = [], get_args(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            fields = list(annotation.model_fields)
            field = annotation.model_fields.get(str(segment))
            annotation = None if field is None else field.rebuild_annotation()
        else:
            annotation = inside[get_origin(annotation) is dict] if inside else None
        place.append(segment)
        there = is_list or segment in document
        document = document[segment] if there else None  # type: ignore[index]
    return tuple(place), fields


def _settings(annotation: Any, value: Any) -> Any:
    """The annotation without `| None` and metadata; a choice becomes the class that was chosen."""
    if get_origin(annotation) is Annotated:
        for mark in annotation.__metadata__:
            if isinstance(mark, _Choice):
                return mark.table.get(str(value.get("use"))) if isinstance(value, dict) else None
        return _settings(get_args(annotation)[0], value)
    if type(None) in get_args(annotation):
        return _settings(next(a for a in get_args(annotation) if a is not type(None)), value)
    return annotation


def _explain(error: ErrorDetails, fields: list[str]) -> str:
    """A pydantic error in the words of someone who writes YAML."""
    kind, value, name = error["type"], error["input"], str((error["loc"] or ("",))[-1])
    if kind == "missing" and isinstance(error["loc"][-1], int):
        return "needs one more"
    if kind == "missing":
        return "missing; this key is required"
    if kind == "extra_forbidden":
        return f"unknown key{did_you_mean(name, fields) or '; known: ' + ', '.join(sorted(fields))}"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        wanted, meant = error["ctx"]["expected"], did_you_mean(str(value), known)
        return f"must be {wanted}, not {_short(value)}{meant}"
    if kind in _WANTED:
        if isinstance(value, str) and "number" in _WANTED[kind] and PLAIN_FLOAT.fullmatch(value):
            return f"{value!r} is text to YAML; write {_as_yaml_number(value)}"
        got = "empty" if value is None else _short(value)
        return f"must be {_WANTED[kind]}, not {got}"
    if kind == "too_short":
        return f"needs at least {error['ctx']['min_length']} of them"
    if kind == "string_pattern_mismatch":
        return f"{_short(value)} does not match {error['ctx']['pattern']}"
    if kind in ("use", "value_error"):
        return error["msg"].removeprefix("Value error, ")
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, not {_short(value)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _as_yaml_number(text: str) -> str:
    """1e-3 as 1.0e-3 and 1e3 as 1.0e+3, which YAML 1.1 takes for numbers."""
    mantissa, _, exponent = text.lower().partition("e")
    if not exponent:
        return text
    sign = "" if exponent[0] in "+-" else "+"
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}{exponent}"
