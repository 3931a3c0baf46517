"""Attributes of an object that every thread has for itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class PerThread:
    """A class attribute whose value a thread changes for itself alone; one that has not sees the first thread's.

    An object is copied and pickled with what the thread sees that does so.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        states = instance.__dict__.get("_of_threads")
        for values in () if states is None else (states.mine, states.first):
            if self._name in values:
                return values[self._name]
        raise AttributeError(f"{type(instance).__name__} has no attribute {self._name} yet")

    def __set__(self, instance: Any, value: Any) -> None:
        states = instance.__dict__.get("_of_threads")
        if states is None:
            states = instance.__dict__["_of_threads"] = _begun({})
        states.mine[self._name] = value


class _States(threading.local):
    """Values by name: this thread's, and those of the first one."""

    def __init__(self, first: dict[str, Any]) -> None:  # in each thread, when it first looks
        self.first, self.mine = first, dict[str, Any]()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _begun, ({**self.first, **self.mine},)


def _begun(values: dict[str, Any]) -> _States:
    states = _States(values)
    states.mine = values
    return states
