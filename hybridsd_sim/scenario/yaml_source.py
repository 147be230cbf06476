"""What people write, and how it is read: strict YAML, strict models, and every problem with its file and line.

Scalars are those of YAML 1.2's core schema: `1e-3` is a number, `010` is 10, `no` and `on` are text. Duplicate keys,
tags, NaN and infinity are refused; aliases and merge keys (`<<`) are read. `Written` is the base of every model of
written input; a `Reading` knows the line of every dotted path, so that a model's complaints name the place where the
value stands, as `file:line: dotted.path: value; rule. remedy`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite
from os import PathLike, fspath
from typing import Annotated, Any, Self, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WrapSerializer, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from hybridsd_sim.errors import InputError, Problem, dotted, shown, unknown_name, validation_problem

V = TypeVar("V")

M = TypeVar("M", bound="Written")

Broken = tuple[str, Any, str, str]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]

Text = Annotated[str, Field(min_length=1, max_length=1000)]

Positive = Annotated[float, Field(gt=0, le=1e12)]

NonNegative = Annotated[float, Field(ge=0, le=1e12)]

MAX_VALUES = 100_000
"""Values of one file, aliases unfolded: a file with more is a mistake or an attack."""

_INT = re.compile(r"[-+]?[0-9]{1,300}|0o[0-7]{1,300}|0x[0-9a-fA-F]{1,300}")

_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")

_INFINITY = re.compile(r"([-+]?)\.(?:inf|Inf|INF)")

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}

_BREAKS = "\x85\u2028\u2029"

_UNION_TAGS = ("bool", "int", "float", "str")


class ReadOnly(Mapping[str, V]):
    """A mapping that cannot change; it keeps its order, compares with any mapping, and can be hashed and pickled."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, V]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> V:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


Entries = Annotated[
    Mapping[Name, V], AfterValidator(ReadOnly), WrapSerializer(lambda entries, dump: dump(dict(entries)))
]
"""A read-only mapping from names to values."""


class Written(BaseModel):
    """Base of everything people write: frozen, strict, without unknown keys, infinity or NaN, its own rules checked.

    Strict validation is for JSON text (`model_validate_json`), which has lists for tuples and text for literals.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    def broken_rules(self) -> Iterator[Broken]:
        """The rules between fields that do not hold, as (key, value, rule, remedy)."""
        yield from ()

    @classmethod
    def known_keys(cls) -> list[str]:
        """The keys that a person may write, for the remedy of one that is none of them."""
        return list(cls.model_fields)

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        if broken := list(self.broken_rules()):
            summary = "; ".join(f"{key} is {shown(value)}, {rule}" for key, value, rule, _ in broken)
            raise PydanticCustomError("rules", "{summary}", {"summary": summary, "broken": broken})
        return self

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy. Refuses `update`, which pydantic does not validate."""
        if update:
            raise TypeError("model_copy(update=...) skips validation; use with_overrides")
        return super().model_copy(deep=deep)


def plain(value: Any) -> Any:
    """What JSON does not know, as what it knows: for `json.dumps(default=...)`."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, PathLike):
        return fspath(value)
    if hasattr(value, "item"):  # a number of numpy
        return value.item()
    raise TypeError(f"{value!r} is not plain data")


def read_scalar(text: str) -> bool | float | str | None:
    """An unquoted scalar by the core schema of YAML 1.2; what is no null, truth value or number is text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        return float(text)
    if sign := _INFINITY.fullmatch(text):
        return float(f"{sign[1]}inf")
    return text


class _Loader(yaml.SafeLoader):
    """Resolves nothing: unquoted scalars are left to `read_scalar`, and an explicit tag shows."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        return "plain" if kind is yaml.ScalarNode and implicit[0] else "untagged"


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.2 would read as something else, on top of what YAML 1.1 would."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]  # untyped in its stubs
        return "reserved" if tag == "tag:yaml.org,2002:str" and implicit[0] and value != read_scalar(value) else tag

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Line breaks that only Unicode knows are escaped, or reading would fold them.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if set(data) & set(_BREAKS) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def load_yaml(text: str, place: str) -> Any:
    """Plain data from YAML text; `place` names its origin in messages. Raises `InputError` with every problem."""
    reading = Reading(place)
    return reading.finish(reading.read(text))


def read_value(value: Any, place: str) -> Any:
    """A value of a command line: text as YAML, but never with comments, so that a path may hold a hash."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    return load_yaml(text, place) if text[:1] in ("[", "{", '"', "'") else read_scalar(text)


def dump_yaml(data: Any) -> str:
    """YAML text of plain data, tuples and mappings; `load_yaml` reads it back. Raises ValueError for NaN, infinity."""
    content = json.loads(json.dumps(data, default=plain, allow_nan=False))
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


@dataclass(slots=True)
class Reading:
    """Input being read: the line of every dotted path, and the problems met so far.

    Line 0 stands for a value that came with the call; messages then name `call` in place of file and line.
    """

    file: str
    call: str = "overrides"
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[float, Problem]] = field(default_factory=list)

    def line_of(self, path: str) -> int:
        """Line of the value at a dotted path, or of the nearest thing above it."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines.get(path, 1)

    def flag(self, path: str, value: str, rule: str, remedy: str = "", line: int | None = None) -> None:
        """Note a problem; several at one place are noted only if they differ."""
        line = self.line_of(path) if line is None else line
        source = f"{self.file}:{line}" if line else self.call
        problem = Problem(f"{source}: {path}" if path else source, value, rule, remedy)
        if (line or inf, problem) not in self.problems:
            self.problems.append((line or inf, problem))

    def finish(self, result: V | None) -> V:
        """The result, or an `InputError` with every problem in the order of the file."""
        if self.problems:
            raise InputError(problem for _, problem in sorted(self.problems, key=lambda noted: noted[0]))
        return result  # type: ignore[return-value]  # None only with problems, or when the file says null

    def read(self, text: str) -> Any:
        """Plain data of YAML text, with the line of every value noted. A syntax error ends the reading at once."""
        try:
            node = _Loader(text).get_single_node()
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            said = getattr(error, "problem", None) or str(error).splitlines()[0]
            self.flag("", said, "is not YAML", "Look for a bad indent, quote or bracket.", mark.line + 1 if mark else 1)
            return self.finish(None)
        except RecursionError:
            self.flag("", "too deep", "is nested too deeply to read", "", 1)
            return self.finish(None)
        return None if node is None else self._value(node, "", ())

    def _value(self, node: yaml.Node, path: str, above: tuple[yaml.Node, ...]) -> Any:
        line = self.lines.setdefault(path, node.start_mark.line + 1)
        if node in above or len(self.lines) > MAX_VALUES:
            self.flag(path, "alias", f"may not contain itself or unfold to more than {MAX_VALUES} values", "", line)
            return self.finish(None)
        if node.tag not in ("plain", "untagged"):
            self.flag(path, node.tag.replace("tag:yaml.org,2002:", "!!"), "tags are not read", "Remove it.", line)
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, f"{path}[{index}]", (*above, node)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            return self._mapping(node, path, (*above, node))
        value = read_scalar(node.value) if node.tag == "plain" else node.value
        if isinstance(value, float) and not isfinite(value):
            self.flag(path, node.value, "must be a finite number", "Write null where there is no limit.")
            return None
        return value

    def _mapping(self, node: yaml.Node, path: str, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in sorted(node.value, key=lambda pair: pair[0].value != "<<"):
            key, line, plain_key = key_node.value, key_node.start_mark.line + 1, key_node.tag == "plain"
            inner = f"{path}.{key}" if path else str(key)
            is_scalar = isinstance(key_node, yaml.ScalarNode)
            if key == "<<" and plain_key:
                self._merge(merged, value_node, path, above)
            elif not is_scalar or not isinstance(read_scalar(key) if plain_key else key, str):
                self.flag(path, shown(str(key)), "keys must be text", "Put the key in quotes.", line)
            elif key in own:
                first = f"First on line {self.lines[inner]}."
                self.flag(inner, "written twice", "a key may stand once only", first, line)
            else:
                self.lines[inner] = line
                own[key] = self._value(value_node, inner, above)
        return {**merged, **own}

    def _merge(self, merged: dict[str, Any], node: yaml.Node, path: str, above: tuple[yaml.Node, ...]) -> None:
        """A merge key: the entries of the mapping, or mappings, that it names, beneath the mapping's own."""
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(source, yaml.MappingNode):
                merged.update(
                    {key: value for key, value in self._value(source, path, above).items() if key not in merged}
                )
            else:
                self.flag(path, "<<", "needs the alias of a mapping", "", source.start_mark.line + 1)

    def check(self, model: type[M], data: Any, *, rules: bool = True) -> M | None:
        """The data as a model, or None with every complaint noted at the place where the value stands.

        Without `rules`, what the model says about several fields together is not noted.
        """
        try:
            return model.model_validate_json(json.dumps(data, default=plain))
        except ValidationError as error:
            items = error.errors(include_url=False)
        for item in items:
            loc = tuple(part for part in item["loc"] if part != "[key]")
            # A union complains once for each of its types, which then end the location.
            union = loc and loc[-1] in _UNION_TAGS and item["type"] != "missing"
            path = dotted(loc[:-1] if union else loc)
            if item["type"] == "rules":
                for key, value, rule, remedy in item["ctx"]["broken"] if rules else ():
                    self.flag(f"{path}.{key}" if path else key, shown(value), rule, remedy)
            elif not any(problem.place.endswith(f": {path}") for _, problem in self.problems):
                found = validation_problem(item)
                rule = "must be true, false, a number or text" if union else found.rule
                self.flag(path, found.value, rule, _remedy(model, loc, item))
        return None


def _remedy(model: type[Written], loc: Sequence[str | int], item: ErrorDetails) -> str:
    for part in loc[:-1]:  # down to the model that has the key
        known = model.model_fields.get(str(part))
        model = (_model_in(known.annotation) if known else None) or model
    fields = model.model_fields
    key = str(next((part for part in reversed(loc) if isinstance(part, str)), ""))
    if item["type"] == "extra_forbidden":
        return unknown_name("", key, model.known_keys()).remedy
    if item["type"] == "bool_type" and loc[-1] not in _UNION_TAGS:
        return "Write true or false; yes, no, on and off are text."
    if item["type"] == "string_type" and item["input"] is not None:
        return "Put it in quotes."
    if item["type"] == "string_pattern_mismatch":
        return "Names consist of letters, digits, hyphens and underscores."
    meaning = (fields[key].description or "") if key in fields else ""
    return f"{key}: {meaning}" if meaning else ""


def _model_in(annotation: Any) -> type[Written] | None:
    if isinstance(annotation, type) and issubclass(annotation, Written):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
