"""The command line, `sagellm COMMAND`. A sub-command's module is imported when the sub-command is used."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import NamedTuple

import click

from sagellm import __version__
from sagellm.errors import UserError, unknown

COMMANDS = {
    "run": ("sagellm.cli.run:run", "Continue prompts with a model."),
    "serve": ("sagellm.cli.serve:serve", "Serve a model over HTTP, as OpenAI's API."),
    "engine": ("sagellm.cli.engine:engine", "Start, list, stop and verify engines of a control plane."),
    "gateway": ("sagellm.cli.control_plane:gateway", "The same as control-plane serve."),
    "control-plane": ("sagellm.cli.control_plane:control_plane", "One address in front of many engines."),
    "infer": ("sagellm.cli.infer:infer", "Ask one question through a control plane."),
    "compile": ("sagellm.cli.compile:compile_", "Show what a model compiles to: graphs, weights, code."),
    "explain": ("sagellm.cli.explain:explain", "Tell what each prompt finds in the KV cache, and why."),
    "passes": ("sagellm.cli.passes:passes", "List the passes, when they decline, and their options."),
    "new-pass": ("sagellm.cli.new_pass:new_pass", "Write a package with a pass to begin from."),
    "devices": ("sagellm.cli.devices:devices", "Show the backends and what they can do on this machine."),
    "verify-backend": (
        "sagellm.cli.verify_backend:verify_backend",
        "Check a vendor's backend without its chip.",
    ),
    "opt": ("sagellm.cli.opt:opt", "Read a graph as text, run passes over it, print it."),
    "bench": ("sagellm.cli.bench:bench", "Measure latency, throughput, and serving under load."),
    "replay": ("sagellm.cli.replay:replay", "Run a recorded step again."),
}
"""Name: where it is, and its line in `sagellm --help`, which imports none of them."""

INTERRUPTED = 130


class _OneLine(click.ClickException):
    """An error that is the user's: one line on stderr, exit status 2."""

    exit_code = 2

    def __init__(self, command: str, message: str):
        super().__init__(message)
        self.command = command

    def show(self, file=None) -> None:
        click.echo(f"{self.command}: error: {self.message}", file=file, err=file is None)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            raise unknown("command", name, COMMANDS)
        module, _, attribute = COMMANDS[name][0].partition(":")
        return getattr(import_module(module), attribute)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args or ["--help"])
        except click.UsageError as error:
            raise _OneLine("sagellm", error.format_message()) from error

    def invoke(self, ctx: click.Context):
        try:
            super().invoke(ctx)
            sys.stdout.flush()
        except UserError as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            raise _OneLine(f"sagellm {ctx.invoked_subcommand or ''}".rstrip(), str(error)) from error
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "sagellm"
            raise _OneLine(command, error.format_message()) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at exit
            ctx.exit(INTERRUPTED)


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="sagellm")
@click.option("--debug", is_flag=True, envvar="SAGELLM_DEBUG", help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """An LLM inference engine one can read: every batch is a graph, every optimisation a pass."""


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


def capture(args: Sequence[str], stdin: str = "", *, merge: bool = False) -> Outcome:
    """Run a command line in this process. `merge` writes stderr into stdout, in order, as `2>&1` does.

    An exception that is no `UserError` is a bug and comes through.
    """
    out = StringIO()
    err = out if merge else StringIO()
    before, sys.stdin = sys.stdin, StringIO(stdin)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main(list(args), prog_name="sagellm")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdin = before
    return Outcome(code, out.getvalue(), "" if merge else err.getvalue())
