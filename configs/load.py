"""TOML files and `section.key=value` overrides to one validated RunConfig."""

import difflib
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
        raise ConfigError(
            f"{text!r} is not an override", "write section.key=value, for example train.learning_rate=1e-5"
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value  # a bare word is a string
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
        return next(iter(difflib.get_close_matches(section, RunConfig.model_fields, n=1, cutoff=0.4)), None)
    keys = [k for s, k, *_ in settings() if s == section]
    found = difflib.get_close_matches(key, keys, n=1, cutoff=0.3)
    return f"{section}.{found[0]}" if found else None


def _explain(error: ValidationError, source: str) -> ConfigError:
    """Turn pydantic's report into one line for each fault."""
    lines, hint = [], None
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown key {name} in {source}")
            near = _nearest(name)
            hint = hint or (f"did you mean {near}?" if near else None)
        else:
            text = fault["msg"].removeprefix("Value error, ")
            lines.append(
                f"{name} in {source}: {text}, got {fault['input']!r}" if name else f"{text} ({source})"
            )
    return ConfigError("; ".join(lines), hint or "layer61 VERB --help lists every key with its default")


def load_config(files: Sequence[Path | str], overrides: Sequence[str] = ()) -> RunConfig:
    """Defaults, then the files from left to right, then the overrides.

    Args:
        files: TOML files, or a JSON file that a run directory keeps.
        overrides: `section.key=value`, the value in TOML grammar, a bare word taken as a string.

    Raises:
        ConfigError: missing file, bad grammar, unknown key (with the nearest known one), value out of range.
    """
    merged: dict[str, Any] = {}
    for file in map(Path, files):
        if file.suffix == ".json" and file.is_file():
            _merge(merged, _read_object(file, "name a TOML file, or the JSON file of a run"))
        else:
            _merge(merged, _read_toml(file))
    for text in overrides:
        path, value = _parse_override(text)
        nested: dict[str, Any] = {path[-1]: value}
        for part in reversed(path[:-1]):
            nested = {part: nested}
        _merge(merged, nested)
    source = ", ".join([*map(str, files), *(["the command line"] if overrides else [])]) or "the defaults"
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise _explain(error, source) from None


def freeze(config: RunConfig, verb: str, sections: Sequence[str]) -> Path:
    """Write the settings a verb depends on to `RUN/config.<verb>.json`, or compare with those already there.

    Raises:
        ConfigError: an earlier start in this run directory had other values; every differing key is listed.
            Keys that only say how the work is done (`free` in the schema) and `run.dir` may differ.
    """
    path = run_dir.settings(config.run.dir, verb)
    free = {(section, key) for section, key, _, _, is_free in settings() if is_free} | {("run", "dir")}
    values = config.model_dump(mode="json", include=set(sections) | {"run"})
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
        ]
        if differing:
            raise ConfigError(
                f"{config.run.dir} was started with other settings: {'; '.join(differing)}",
                "choose another run directory (RUN=... or run.dir=...), or restore these settings",
            )
    write_json(path, values)
    return path
