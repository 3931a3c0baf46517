"""The exception for input that cannot be used."""


class InputError(ValueError):
    """Bad input: the message names what is wrong and what would be right.

    The command line turns it into one line on standard error and exit status 2.
    """


class Refused(InputError):
    """What a backend says of arguments that are right but not for it; ``auto`` then asks the next one."""


def check(condition: object, message: str) -> None:
    """Raise :class:`InputError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def choose(kind: str, name: object, known: object) -> None:
    """Raise :class:`InputError` unless ``name`` is one of ``known``; the message lists them."""
    names = list(known)  # type: ignore[call-overload]
    if name not in names:
        raise InputError(f"unknown {kind} {name!r}: choose from {', '.join(map(str, names))}")
