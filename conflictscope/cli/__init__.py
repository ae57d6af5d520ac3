"""The command line. Every command is a few lines over the library; results go to files, talk to standard error."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from conflictscope import __version__
from conflictscope.cli import (
    ask,
    attribute,
    compare,
    consistent,
    control,
    data,
    demo,
    dial,
    doctor,
    explore,
    foreign,
    gate,
    leaderboard,
    locate,
    look,
    persuade,
    plan,
    probe,
    report,
    sae,
    serving,
    ship,
    tune,
    verify,
)
from conflictscope.cli.options import console, with_groups
from interp.errors import Caution, UserError

app = typer.Typer(
    name="conflictscope",
    help="Measure, locate, change and verify how a language model chooses between its memory and its context.",
    epilog="Start with `conflictscope demo`, `conflictscope ask` or `conflictscope explore`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"conflictscope {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    pass


_START, _LOOK, _STUDY, _SHIP, _DATA = "Start here", "Look", "Study", "Ship", "Data and models"
for _panel, _commands in {
    _START: (demo.demo, ask.ask, explore.explore, tune.tune),
    _LOOK: (look.evaluate, persuade.persuasion, consistent.consistency, attribute.attribute, look.record),
    _STUDY: (compare.compare, locate.locate, report.report, leaderboard.leaderboard),
    _SHIP: (ship.inspect, ship.generate, ship.export, foreign.import_, verify.verify, serving.serve),
    _DATA: (look.models, plan.plan, doctor.doctor),
}.items():
    for _command in _commands:
        # A command may be called what no function can be.
        app.command(_command.__name__.rstrip("_"), rich_help_panel=_panel)(with_groups(_command))
for _panel, _name, _help, _members in (
    (
        _LOOK,
        "probe",
        "Fit, score and use probes on recorded activations.",
        {"fit": probe.probe_fit, "score": probe.probe_score, "detect": probe.probe_detect},
    ),
    (
        _LOOK,
        "sae",
        "Train, measure and look into sparse autoencoders.",
        {
            "train": sae.sae_train,
            "evaluate": sae.sae_evaluate,
            "features": sae.sae_features,
            "diff": sae.sae_diff,
        },
    ),
    (
        _STUDY,
        "dial",
        "Learn a dial between memory and context, and set it.",
        {"fit": dial.dial_fit, "apply": dial.dial_apply},
    ),
    (
        _STUDY,
        "gate",
        "Put an intervention behind a conflict detector, and compare detectors.",
        {"fit": gate.gate_fit, "dial": gate.gate_dial, "detectors": gate.gate_detectors},
    ),
    (
        _STUDY,
        "spare",
        "Control the source of answers by features of sparse autoencoders.",
        {"fit": control.spare_fit, "apply": control.apply_edit},
    ),
    (
        _STUDY,
        "steer",
        "Control the source of answers by directions.",
        {"fit": control.steer_fit, "apply": control.apply_edit},
    ),
    (
        _DATA,
        "data",
        "Build, inspect and convert conflict data.",
        {
            "build": data.data_build,
            "inspect": data.data_inspect,
            "convert": data.data_convert,
            "tasks": data.data_tasks,
        },
    ),
):
    _group = typer.Typer(help=_help, no_args_is_help=True)
    for _verb, _command in _members.items():
        _group.command(_verb)(with_groups(_command))
    app.add_typer(_group, name=_name, rich_help_panel=_panel)


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
