"""The command ``fastdiff``: one file per command, one vocabulary of options."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import typer

from fastdiff.cli import convert, demo, doctor, info, reproduce, sample, train, verify
from fastdiff.cli import eval as evaluation
from fastdiff.errors import InputError
from fastdiff.training.distributed import ElsewhereError

app = typer.Typer(
    name="fastdiff",
    help="Train diffusion models, sample from them and judge the samples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    *(demo.demo, train.train, sample.sample, evaluation.eval_),
    *(reproduce.reproduce, verify.verify_, doctor.doctor, convert.convert, info.info),
)
for command in COMMANDS:
    app.command(command.__name__.rstrip("_"))(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 bad input (one line on standard error), 130 interrupted."""
    warnings.showwarning = lambda message, *_: print(f"fastdiff: warning: {message}", file=sys.stderr)
    try:
        status = app(args=_spelled_out(sys.argv[1:] if arguments is None else arguments), standalone_mode=False)
    except ElsewhereError:
        return 2
    except (InputError, OSError) as error:
        return _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except Exception as error:
        message = getattr(error, "format_message", None)  # what the option parser raises
        if message is None:
            raise
        return _fail(message() or "no command given: see fastdiff --help", 2)
    return status if isinstance(status, int) else 0


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """``--resume`` alone is ``--resume yes``: typer has no options whose value may be left out."""
    following = [*arguments[1:], ""]
    pairs = zip(arguments, following, strict=True)
    return [word for name, value in pairs for word in _with_value(name, value)]


def _with_value(name: str, value: str) -> list[str]:
    return [name, "yes"] if name == "--resume" and value not in train.RESUMES else [name]


def _fail(message: str, status: int) -> int:
    print(f"fastdiff: {' '.join(message.split())}", file=sys.stderr)
    return status
