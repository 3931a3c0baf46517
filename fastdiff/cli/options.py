"""The options that commands share: one name, one meaning."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer

from fastdiff.errors import InputError, check

DATA_HELP = (
    "digits, swiss-roll, moons-circles, parabola, mnist, fashion-mnist, emnist, cifar10, folder:PATH or tar:PATH"
)

DataName = Annotated[str, typer.Option("--data", help=DATA_HELP)]
ImageSize = Annotated[int | None, typer.Option(help="resize images to this; default: as they are")]
OutDir = Annotated[Path | None, typer.Option("--out", help="directory for everything that is written")]
CheckpointPath = Annotated[Path, typer.Option("--checkpoint", help="a run directory, or a checkpoint in one")]
DeviceName = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...; auto: cuda where there is one")]
BackendName = Annotated[str, typer.Option("--backend", help="of the ops: auto, reference, native or triton")]


def choose_device(name: str) -> torch.device:
    """The device by name.

    Raises:
        InputError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    check(device.type != "meta", "--device meta holds no values: choose cpu or cuda")
    return device


def with_fields(*config_types: type, but: Collection[str] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make each field of dataclasses an option of a command, which gets those that were given as ``given``.

    Args:
        config_types: of a name that several have, the first one's field is the option. A field that is None by default
            says in its meaning what that stands for.
        but: fields that are left out.
    """
    chosen: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    for kind in reversed(config_types):
        chosen |= {field.name: field for field in fields(kind) if field.name not in but}
        hints |= get_type_hints(kind)

    def parameter(field: Any) -> inspect.Parameter:
        default = "" if field.default is None else f" [default: {field.default if field.default != '' else 'none'}]"
        option = typer.Option(help=f"{field.metadata['help']}{default}", show_default=False)
        annotation = Annotated[hints[field.name] | None, option]  # type: ignore[valid-type]
        return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def wrap(command: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "given"]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        parameters += [parameter(field) for field in chosen.values()]

        @functools.wraps(command)
        def run(**values: Any) -> Any:
            options = {name: values.pop(name) for name in chosen}
            return command(given={name: value for name, value in options.items() if value is not None}, **values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return wrap
