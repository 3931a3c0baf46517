"""Settings of networks, ours and other people's: what each has to be, and all that is wrong with them in one error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff.errors import check


@dataclass(frozen=True)
class Setting:
    """What a setting is when it is not given, and what it has to be."""

    default: Any
    fits: Callable[[Any], bool]
    need: str


#: settings that have to be right by themselves, what is wrong with them together
Check = tuple[tuple[str, ...], Callable[[dict[str, Any]], list[str]]]


def exactly(*values: Any) -> Setting:
    """One of ``values``; the first is the default."""
    return Setting(values[0], lambda value: value in values, " or ".join(map(repr, values)))


def whole(default: int | None = None, *, least: int = 1, or_value: tuple[int | None, ...] = ()) -> Setting:
    """A whole number of at least ``least``, or one of ``or_value``."""
    need = " or ".join([f"a whole number of at least {least}", *map(repr, or_value)])
    return Setting(default, lambda value: value in or_value or is_whole(value, least), need)


def number(default: float | None = None, *, below: float = math.inf) -> Setting:
    """A finite number of at least 0."""
    need = "a number of at least 0" + ("" if below == math.inf else f" and below {below}")
    return Setting(default, lambda value: is_number(value) and 0 <= value < below, need)


def several(default: Iterable[Any] | None, fits: Callable[[Any], bool], need: str) -> Setting:
    """A list whose members fit."""
    return Setting(default, lambda value: isinstance(value, list | tuple) and all(map(fits, value)), f"a list: {need}")


def anything(default: Any = None) -> Setting:
    """A setting that changes nothing in the network."""
    return Setting(default, lambda value: True, "")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def settled(
    what: str, given: Mapping[str, Any], table: dict[str, Setting], checks: Iterable[Check] = ()
) -> dict[str, Any]:
    """All settings of ``table``, as given or by default. Keys that begin with ``_`` are left aside.

    Raises:
        InputError: ``what``, then everything that does not fit, alone or together, and every key that is not in the
            table.
    """
    values = {key: given.get(key, setting.default) for key, setting in table.items()}
    bad = [key for key, setting in table.items() if not setting.fits(values[key])]
    problems = [f"{key}={values[key]!r} must be {table[key].need}" for key in bad]
    for keys, problems_of in checks:
        problems += [] if set(keys) & set(bad) else problems_of(values)
    problems += [f"{key} is not known" for key in given if key not in table and not str(key).startswith("_")]
    refuse(what, problems)
    return values


def refuse(what: str, problems: list[str]) -> None:
    """Raise one error that lists all problems, if there are any."""
    check(not problems, f"{what}: {'; '.join(problems)}")
