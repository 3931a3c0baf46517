"""Attributes of an object that every thread has for itself."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary


class PerThread:
    """A class attribute whose value a thread changes for itself alone; one that has not sees what the first one has.

    An object is copied and pickled with what the thread sees that does so.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        for values in _seen_by(instance):
            if self._name in values:
                return values[self._name]
        raise AttributeError(f"{type(instance).__name__} has no attribute {self._name} yet")

    def __set__(self, instance: Any, value: Any) -> None:
        states = instance.__dict__.setdefault("_of_threads", _States())
        states.mine()[self._name] = value


class _States:
    """Values by name, for each thread that is alive."""

    def __init__(self) -> None:
        self._all: WeakKeyDictionary[threading.Thread, dict[str, Any]] = WeakKeyDictionary()
        self.first: dict[str, Any] = {}
        self._all[threading.current_thread()] = self.first

    def mine(self) -> dict[str, Any]:
        return self._all.setdefault(threading.current_thread(), {})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.first, **self.mine()}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.first.update(values)


def _seen_by(instance: Any) -> tuple[dict[str, Any], ...]:
    states = instance.__dict__.get("_of_threads")
    return () if states is None else (states.mine(), states.first)
