"""TOML files and `section.key=value` overrides to one validated RunConfig."""

import difflib
import os
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs import run_dir
from configs.errors import ConfigError
from configs.files import read_json, write_json
from configs.schema import RunConfig, Section

__all__ = ["freeze", "load_config", "settings"]


def settings() -> Iterator[tuple[str, str, Any, str, bool]]:
    """Every key as (section, key, default, help text, free)."""
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        for key, value in model.model_fields.items():
            extra = value.json_schema_extra
            free = isinstance(extra, dict) and bool(extra.get("free"))
            yield section, key, value.get_default(call_default_factory=True), value.description or "", free


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as f:
            return tomllib.load(f)
    except FileNotFoundError:
        known = sorted(p.name for p in Path(__file__).parent.glob("*.toml"))
        raise ConfigError(
            f"there is no configuration file {path}", f"configs/ holds {', '.join(known)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read the configuration file {path}: {error}", "a configuration is TOML in UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{path} is not valid TOML: {error}", "see https://toml.io for the grammar"
        ) from None


def _read_object(path: Path, hint: str) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}", hint) from None
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise ConfigError(f"{path} does not hold one object for each section", hint)
    return value


def _parse_override(text: str) -> tuple[list[str], Any]:
    name, equals, value = text.partition("=")
    path = name.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        near = _nearest(path[0]) if equals and len(path) == 1 else None
        example = f"{near}={value}" if near and "." in near else "train.learning_rate=1e-5"
        raise ConfigError(f"{text!r} is not an override", f"write section.key=value, for example {example}")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string, but for `null` where nothing is the default
    return path, parsed


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _nearest(name: str) -> str | None:
    section, _, key = name.partition(".")
    if not key:
        # a key without its section
        if found := [f"{s}.{k}" for s, k, *_ in settings() if k == section]:
            return " or ".join(found)
        return next(iter(difflib.get_close_matches(section, RunConfig.model_fields, n=1, cutoff=0.4)), None)
    keys = [k for s, k, *_ in settings() if s == section]
    found = difflib.get_close_matches(key, keys, n=1, cutoff=0.3)
    return f"{section}.{found[0]}" if found else None


# pydantic's words for what it expected, by its name of the fault
EXPECTED = {
    "tuple_type": "expected a list",
    "dict_type": "expected a table",
    "too_short": "expected at least one entry",
    "model_type": "expected a table of settings",
    "string_type": "expected text",
    "path_type": "expected a path",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
}


def _explain(error: ValidationError, sources: dict[str, str]) -> ConfigError:
    """Turn pydantic's report into one line for each key."""
    lines, hint = {}, None
    for fault in error.errors():
        # a key that takes several types fails once for each
        name = ".".join(str(part) for part in fault["loc"][:2])
        section = name.partition(".")[0]
        source = sources.get(name) or sources.get(section) or ", ".join(dict.fromkeys(sources.values()))
        said = f" in {source}" if source else ""
        if fault["type"] == "extra_forbidden":
            lines[name] = f"unknown key {name}{said}"
            near = _nearest(name)
            hint = hint or (f"did you mean {near}?" if near else None)
            continue
        text = fault["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        text = EXPECTED.get(fault["type"], text)
        if not name:
            lines[text] = text + (f" ({source})" if source else "")
        elif name in lines:
            lines[name] = lines[name].replace(", got ", f" or {text.removeprefix('expected ')}, got ", 1)
        else:
            lines[name] = f"{name}{said}: {text}, got {fault['input']!r}"
    return ConfigError(
        "; ".join(lines.values()), hint or "layer61 VERB --help lists every key with its default"
    )


def load_config(files: Sequence[Path | str], overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the files from left to right, then the overrides.

    Args:
        files: TOML files, or a JSON file that a run directory keeps.
        overrides: `section.key=value`, the value in TOML grammar, a bare word taken as a string.

    Raises:
        ConfigError: missing file, bad grammar, unknown key (with the nearest known one), value out of range.
    """
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(new: dict[str, Any], source: str) -> None:
        _merge(merged, new)
        for section, table in new.items():
            sources[section] = source
            sources.update({f"{section}.{key}": source for key in table} if isinstance(table, dict) else {})

    for file in map(Path, files):
        if file.suffix == ".json" and file.is_file():
            take(_read_object(file, "name a TOML file, or the JSON file of a run"), str(file))
        else:
            take(_read_toml(file), str(file))
    for text in overrides:
        path, value = _parse_override(text)
        nested: dict[str, Any] = {path[-1]: value}
        for part in reversed(path[:-1]):
            nested = {part: nested}
        take(nested, "the command line")
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, sources) from None


# keys that name a place; where it is counts, not how it is written
PLACES = frozenset(
    {
        ("target", "path"),
        ("tiny", "conversations"),
        ("prompts", "path"),
        ("dump", "store"),
        ("train", "store"),
    }
    | {("export", "dir")}
)


def _absolute(value: Any) -> Any:
    """A place, or several, as they are from any other directory."""
    if isinstance(value, list):
        return [_absolute(v) for v in value]
    return os.path.abspath(value) if isinstance(value, str) and "://" not in value else value


def _resolved(value: Any) -> Any:
    if isinstance(value, list):
        return [_resolved(v) for v in value]
    return os.path.realpath(value) if isinstance(value, str) and "://" not in value else value


def freeze(config: RunConfig, verb: str, sections: Sequence[str], *, write: bool = True) -> Path:
    """Write the settings a verb depends on to `RUN/config.<verb>.json`, or compare with those already there.

    Args:
        config: the settings.
        verb: whose.
        sections: sections that the verb depends on.
        write: False compares only.

    Raises:
        ConfigError: an earlier start in this run directory had other values; every differing key is listed.
            Keys that only say how the work is done (`free` in the schema) and `run.dir` may differ.
    """
    path = run_dir.settings(config.run.dir, verb)
    free = {(section, key) for section, key, _, _, is_free in settings() if is_free} | {("run", "dir")}
    values = config.model_dump(mode="json", include=set(sections) | {"run"})
    for section, table in values.items():
        table.update({key: _absolute(v) for key, v in table.items() if (section, key) in PLACES})
    # a key that the earlier start did not know had no other value than its default
    defaults = RunConfig().model_dump(mode="json")
    if path.exists():
        earlier = _read_object(path, "remove it to take the settings of this start")
        differing = [
            f"{section}.{key} was {was!r}, now {value!r}"
            for section, table in values.items()
            for key, value in table.items()
            if (section, key) not in free
            and (was := earlier.get(section, {}).get(key, defaults[section][key])) != value
            and not ((section, key) in PLACES and _resolved(was) == _resolved(value))
        ]
        if differing:
            raise ConfigError(
                f"{config.run.dir.absolute()} was started with other settings: {'; '.join(differing)}",
                "choose another run directory (RUN=... or run.dir=...), or restore these settings",
            )
    if write:
        write_json(path, values)
    return path
