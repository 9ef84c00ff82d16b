"""`--config recipe.toml`: options of a command from a file; the command line wins."""

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any

from cyclopts import App
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict

from topmass.errors import ConfigError

__all__ = ["apply_recipe"]

COMMANDS = ("audit", "eval", "distill", "bench", "frontier", "demo", "report", "doctor")
# what a recipe cannot set: itself, and how results are printed
_PRIVATE = ("config", "json")


def apply_recipe(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Fill the options of a command from the table of its name in the file that `--config` names.

    Raises:
        ConfigError: The file cannot be read, or has a table or key that no command knows.
    """
    given = [a for a in arguments if "--config" in a.names]
    if not commands or not given or not given[0].tokens:
        return
    path = Path(given[0].tokens[0].value)
    text, recipe = _read(path)
    for table, value in recipe.items():
        if table not in COMMANDS or not isinstance(value, dict):
            raise ConfigError(_unknown(path, text, None, table, [f"[{name}]" for name in COMMANDS]))
    names = [name.removeprefix("--") for a in arguments for name in a.names if name.startswith("--")]
    known = sorted({name.replace("-", "_") for name in names} - set(_PRIVATE))
    table, where = recipe.get(commands[0], {}), ".".join(commands)
    for i, command in enumerate(commands[1:], 1):
        for key, value in table.items():
            if not isinstance(value, dict):
                raise ConfigError(_unknown(path, text, ".".join(commands[:i]), key, [f"[{where}]"]))
        table = table.get(command, {})
    for key in table:
        if key.replace("-", "_") not in known:
            raise ConfigError(_unknown(path, text, where, key, known))
    for command in reversed(commands):
        table = {command: table}
    Dict(table, source=str(path))(app, commands, arguments)


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        return text, tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"Cannot read the recipe {path}: {error.strerror}; check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error


def _unknown(path: Path, text: str, table: str | None, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, [name.strip("[]") for name in known], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}."
    what = f"unknown key {key!r} in [{table}]" if table else f"{key!r} is not the table of a command"
    return f"{path}, line {_line(text, table, key)}: {what}; {hint}"


def _line(text: str, table: str | None, key: str) -> int:
    """Line of a key in its table, or of a table's heading."""
    inside = table is None
    for i, line in enumerate(text.splitlines(), 1):
        heading = re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line)
        if heading:
            if table is None and heading[1].partition(".")[0].strip("\"' ") == key:
                return i
            inside = heading[1] == table
        if inside and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
            return i
    return 1
