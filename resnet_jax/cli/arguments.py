"""What every command shares: a Config from file and overrides, and errors as one line with exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import importlib.util
import io
import itertools
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import tyro

from resnet_jax.config import Config, check_config, field_names, option
from resnet_jax.errors import CommandError, StorageError, UserError, did_you_mean, printable

_STORAGE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def run_command(command: Callable[[Sequence[str]], int]) -> None:
    """Call command(arguments) and exit with its code; a CommandError is printed as one line."""
    try:
        _run(command)
    except Exception:  # a bug
        jax = sys.modules.get("jax")
        if jax is None or not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        os._exit(1)  # JAX would wait for the other processes, and they for this one in a step


def _run(command: Callable[[Sequence[str]], int]) -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what orbax logs as an error it also raises
    try:
        code = command(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except CommandError as error:
        message = printable(str(error))  # which may name files of others
        print(f"error: {message}" if error.exit_code <= 2 else message, file=sys.stderr, flush=True)
        if error.at_once:
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        _give_up_output()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _STORAGE_FAULTS:
            raise
        _give_up_output()
        of = f" of {error.filename}" if error.filename else ""
        print(f"error: the disk{of} does not take what is written: {error.strerror}", file=sys.stderr)
        sys.exit(StorageError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports SIGINT


def _give_up_output() -> None:
    """Keep Python from flushing the standard output once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class ArgumentParser(argparse.ArgumentParser):
    """Reports a mistake as a UserError instead of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse_config(args: Sequence[str], prog: str = "train.py") -> Config:
    """Turn command-line arguments `CONFIG [--overrides]` into a checked Config; --help prints and exits.

    Raises:
      UserError: no such file, not a config file, an unknown or ill-typed override, a value out of range.
    """
    path = args[0] if args and not args[0].startswith("-") else None
    if path is None and not {"-h", "--help"} & set(args):
        raise UserError(f"which configuration? Its file comes first: python {prog} configs/digits_resnet20.py")
    base = _run_config_file(Path(path)) if path else Config()
    if base.run.workdir is None and path:
        base = dataclasses.replace(base, run=dataclasses.replace(base.run, workdir=f"runs/{Path(path).stem}"))
    config = _parse_overrides(base, args[1:] if path else args, f"{prog} {path or 'CONFIG'}")
    check_config(config)
    return config


def _run_config_file(path: Path) -> Config:
    if not path.is_file():
        names = [str(p) for p in path.parent.glob("*.py")]
        raise UserError(f"no config file {path}{did_you_mean(str(path), names)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; config files define get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever a user's file raises is that file's mistake
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() must return a Config, not {type(config).__name__}")
    return config


def _parse_overrides(base: Config, args: Sequence[str], prog: str) -> Config:
    """Apply --group.field VALUE to `base`; tyro's framed error messages become one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            config, unknown = tyro.cli(
                Config,
                default=base,
                args=list(args),
                prog=prog,
                description="Train a network.",
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        # The frame's first part says what is wrong; the parts behind it repeat the help text.
        lines = [re.sub(r"^[│|]\s*|\s*[│|]$", "", line) for line in stderr.getvalue().splitlines()[1:-1]]
        first = " ".join(itertools.takewhile(lambda line: not line.startswith(("──", "--")), lines))
        raise UserError(f"{first.rstrip('.')}; see {prog} --help") from None
    if unknown:
        flags = [option(name) for name in field_names()]
        raise UserError(f"unknown option {unknown[0]}{did_you_mean(unknown[0], flags)}; see {prog} --help")
    return config
