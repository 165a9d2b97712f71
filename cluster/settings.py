"""From a config struct to flags, variables and file keys, and back to the struct.

A setting has one name. `sim_itl_ms` is `--sim-itl-ms` on the command line, `HOCKET_SIM_ITL_MS` in the environment and
`sim_itl_ms` in the file; the first of these that gives a value wins, the struct's default comes last. Type, bounds and
choices are the struct's own, so a wrong value is refused here with the same words wherever it came from.
"""

from __future__ import annotations

import argparse
import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import inspect

ENV_PREFIX = "HOCKET_"
_METAVARS = {"s": "SECONDS", "ms": "MS", "bytes": "BYTES", "gib": "GIB", "tokens": "TOKENS", "port": "PORT"}


class SettingsError(ValueError):
    """A setting that is unknown or cannot be read; the text names it, says where it stands and what would be right."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a config struct as a user meets it."""

    name: str
    type: object  # what msgspec converts a value to, bounds included
    shape: inspect.Type
    default: object
    is_required: bool
    description: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def metavar(self) -> str:
        """The word for its value in the help text: a unit where the name ends in one."""
        shape = self.shape
        if isinstance(shape, inspect.LiteralType):
            return "{" + ",".join(str(value) for value in shape.values) + "}"
        by_unit = _METAVARS.get(self.name.rpartition("_")[2])
        if by_unit is not None and not isinstance(shape, inspect.StrType):
            return by_unit
        if isinstance(shape, inspect.DictType):
            return "JSON"
        return "TEXT" if isinstance(shape, inspect.StrType) else "N"

    @property
    def expected(self) -> str:
        """What a right value is, in words."""
        shape = self.shape
        match shape:
            case inspect.LiteralType():
                return "one of " + ", ".join(str(value) for value in shape.values)
            case inspect.BoolType():
                return "true or false"
            case inspect.IntType() | inspect.FloatType():
                return ("a whole number" if isinstance(shape, inspect.IntType) else "a number") + _bounds(shape)
            case inspect.StrType():
                return "text" if shape.max_length is None else f"text of at most {shape.max_length} characters"
            case inspect.DictType():
                return "an object (JSON)"
        return "a list of tables"

    def read(self, value: object, where: str, *, is_text: bool = False) -> object:
        """The typed value; with `is_text` (a flag, a variable) it is read as what the field is. Raises SettingsError."""
        try:
            raw = value
            if is_text and isinstance(value, str) and isinstance(self.shape, inspect.DictType):
                raw = msgspec.json.decode(value)
            read = msgspec.convert(raw, self.type, strict=not is_text)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise SettingsError(f"{where}: {value!r} is not {self.expected}") from error
        if isinstance(read, float) and not math.isfinite(read):
            raise SettingsError(f"{where}: {value!r} is not {self.expected}")
        return read


def _bounds(shape: inspect.IntType | inspect.FloatType) -> str:
    low = f" >= {shape.ge:g}" if shape.ge is not None else f" > {shape.gt:g}" if shape.gt is not None else ""
    high = f" <= {shape.le:g}" if shape.le is not None else f" < {shape.lt:g}" if shape.lt is not None else ""
    return low + (" and" if low and high else "") + high


def settings_of(struct: type[msgspec.Struct], *, leave_out: Iterable[str] = ()) -> list[Setting]:
    """The settings of a config struct, in its order."""
    left_out = set(leave_out)
    return [_setting(field) for field in msgspec.structs.fields(struct) if field.name not in left_out]


def _setting(field: msgspec.structs.FieldInfo) -> Setting:
    shape = inspect.type_info(field.type)
    description = ""
    while isinstance(shape, inspect.Metadata):
        description = description or str((shape.extra_json_schema or {}).get("description", ""))
        shape = shape.type
    default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return Setting(field.name, field.type, shape, default, field.required, description)


def add_flags(parser: argparse.ArgumentParser, title: str, settings: Sequence[Setting]) -> None:
    """One flag for each setting. Values stay text until `resolve`, so that every source is read the same way."""
    group = parser.add_argument_group(title)
    for setting in settings:
        if isinstance(setting.shape, inspect.BoolType):
            action: type[argparse.Action] | str = argparse.BooleanOptionalAction
            group.add_argument(setting.flag, action=action, default=argparse.SUPPRESS, help=_help(setting))
        else:
            group.add_argument(
                setting.flag, metavar=setting.metavar, default=argparse.SUPPRESS, help=_help(setting), dest=setting.name
            )


def _help(setting: Setting) -> str:
    shape = setting.shape
    bounds = _bounds(shape).strip() if isinstance(shape, inspect.IntType | inspect.FloatType) else ""
    if setting.is_required:
        default = "required"
    elif "default" in setting.description:
        default = ""  # The sentence says it.
    elif setting.default in ("", {}, ()):
        default = "default: none"
    else:
        default = f"default: {str(setting.default).lower() if isinstance(setting.default, bool) else setting.default}"
    facts = "; ".join(part for part in (bounds, default) if part)
    return (f"{setting.description} ({facts})" if facts else setting.description).replace("%", "%%")


def read_file(path: Path) -> dict[str, object]:
    """The tables of a config file: TOML, or JSON when its name ends in .json. Raises SettingsError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"--config {path}: cannot be read: {reason}") from error
    try:
        if path.suffix == ".json":
            return msgspec.json.decode(text, type=dict[str, object])
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, msgspec.DecodeError) as error:
        raise SettingsError(f"--config {path}: {error}") from error


def resolve(
    settings: Sequence[Setting],
    *,
    flags: Mapping[str, object],
    environ: Mapping[str, str],
    file: Mapping[str, object],
    where: str,
) -> dict[str, object]:
    """The values that were given, typed: flag before variable before file. Names in `file` must be known to the caller.

    `where` is the file's name (and table), for the error text. Raises SettingsError.
    """
    values: dict[str, object] = {}
    for setting in settings:
        if setting.name in flags:
            values[setting.name] = setting.read(flags[setting.name], setting.flag, is_text=True)
        elif setting.variable in environ:
            values[setting.name] = setting.read(environ[setting.variable], setting.variable, is_text=True)
        elif setting.name in file:
            values[setting.name] = setting.read(file[setting.name], f"{where}: {setting.name}")
    return values


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raises SettingsError for the first name that is not known, with the nearest one that is."""
    known = list(known)
    for name in names:
        if name not in known:
            raise SettingsError(f"{where}: unknown setting {name!r}{did_you_mean(name, known)}")


def refuse_unknown_variables(environ: Mapping[str, str], settings: Iterable[Setting]) -> None:
    """Raises SettingsError for a HOCKET_* variable that no command knows: a misspelt setting would do nothing."""
    known = [setting.variable for setting in settings]
    refuse_unknown((name for name in environ if name.startswith(ENV_PREFIX)), known, "environment")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """`; did you mean X?`, or the known names when none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"
