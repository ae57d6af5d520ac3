"""The command line. Every command is a few lines over the library; results go to files, talk to standard error."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from conflictscope.cli import ask, control, data, demo, dial, explore, gate, look, probe, report, sae, ship
from conflictscope.cli.options import console
from interp.errors import Caution, UserError

app = typer.Typer(
    name="conflictscope",
    help="Measure, locate, change and verify how a language model chooses between its memory and its context.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command in (
    demo.demo,
    look.evaluate,
    look.attribute,
    look.record,
    look.models,
    ship.inspect,
    ship.generate,
    ship.export,
    ship.serve,
    ask.ask,
    explore.explore,
    report.report,
):
    app.command()(_command)
for _name, _group in {
    "data": data.app,
    "probe": probe.app,
    "sae": sae.app,
    "spare": control.spare_app,
    "steer": control.steer_app,
    "dial": dial.app,
    "gate": gate.app,
}.items():
    app.add_typer(_group, name=_name)


def main() -> None:
    """Run the command line: a user's mistake is one sentence and exit code 2, never a traceback."""
    plain = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *where: Any) -> None:
        if issubclass(category, Caution):
            console.print(f"Note: {message}", markup=False, style="yellow", soft_wrap=True, highlight=False)
        else:
            plain(message, category, *where)

    warnings.showwarning = shown
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or 'the file system refused'}; mend that and run again.", 2)
    except ModuleNotFoundError as error:
        extras = {
            "explore": ("dash", "flask", "werkzeug"),
            "sae": ("sae_lens", "sklearn"),
            "serve": ("fastapi", "starlette", "uvicorn", "prometheus_client"),
        }
        extra = next((name for name, packages in extras.items() if error.name in packages), "study")
        _fail(f"{error.name} is not installed; install what this needs with: pip install 'conflictscope[{extra}]'", 2)
    except SystemExit as end:
        # What typer makes of an interrupt.
        if end.code != 130:
            raise
        _fail("Interrupted; run the same command again to go on where it stopped.", 130)


def _fail(message: str, code: int) -> None:
    console.print(f"Error: {message}", markup=False, style="red", soft_wrap=True, highlight=False)
    sys.exit(code)
