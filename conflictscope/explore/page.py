"""The page of ``conflictscope explore``: layout, callbacks and the server; ``conflictscope.explore.looks`` computes.

dash's own server is not used: it can be turned into one with a debugger by an environment variable. Everything that the
page loads comes from here, and its content security policy lets the browser load nothing else.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import plotly.graph_objects as go
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, callback_context, dcc, html, no_update
from flask import Response, abort, request
from werkzeug.serving import make_server

from conflictscope.addresses import is_local
from conflictscope.explore.looks import LONGEST, SCALES, STRENGTHS, UNEDITED, Asked, Edit, Explorer, Look, examples
from figures.heads import head_map, top_heads_bars
from figures.prompts import answer_race, answer_view, attention_view
from figures.theme import DARK_THEME, LIGHT_THEME, percent
from interp.answers import Usage
from interp.attention import PromptAttention
from interp.errors import UserError
from interp.files import assets_directory

_LARGEST_BODY = 2**18
_STRONGEST = 6
_ATTENTION_SHOWN = 2
_FIELDS = {
    "question": "Question",
    "context": "Context",
    "context_answer": "Context answer",
    "memory_answer": "Memory answer",
}
_FIGURES = {
    "race": "How probable each layer makes the two answers, and their logit difference, unedited and edited",
    "steps": "The answer with the context, token by token, unedited and edited",
    "head-map": "What each head writes into the logit difference of the two answers",
    "top-heads": "The heads that push hardest towards the context answer and towards the memory answer",
    "attention": "Attention weights from the prompt's last token to all of its tokens",
}
_GRAPH: Any = {"displayModeBar": False}
_FAILED = "That could not be computed; the terminal says why."
_log = logging.getLogger(__name__)


class Listening(NamedTuple):
    """A server that runs.

    Attributes:
        address: Its URL.
        thread: What it runs in.
    """

    address: str
    thread: threading.Thread

    def wait(self) -> None:
        """Wait until it ends, or for an interrupt."""
        # Waiting without end is not interrupted where another thread happens to get the signal.
        while self.thread.is_alive():
            self.thread.join(0.5)


@contextmanager
def listening(app: Dash, host: str, port: int) -> Iterator[Listening]:
    """Serve the page until the block ends.

    Args:
        app: The page.
        host: Address to listen at.
        port: Port to listen at; 0 takes a free one.

    Raises:
        UserError: If the address cannot be listened at.
    """
    try:
        server = make_server(host, port, app.server, threaded=True)
    except (OSError, SystemExit) as error:
        raise UserError(f"Cannot listen at {host}, port {port}; give another --port, or 0 for a free one.") from error
    thread = threading.Thread(target=server.serve_forever, name="conflictscope-explore", daemon=True)
    thread.start()
    shown = f"[{host}]" if ":" in host else host
    try:
        yield Listening(f"http://{shown}:{server.server_port}", thread)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def build_app(explorer: Explorer, *, no_detector: str = "", local_only: bool = True) -> Dash:
    """The page for a model.

    Args:
        explorer: What computes.
        no_detector: Why there is no detector, if there is none.
        local_only: Whether requests that name another host than this machine are refused, as other pages of a browser
            could send them.
    """
    app = Dash(
        __name__,
        title=f"{explorer.name} - ConflictScope",
        update_title=f"Looking ... {explorer.name}",
        assets_folder=str(assets_directory() / "explore"),
        serve_locally=True,
        enable_mcp=False,
        on_error=_failed,
    )
    app.layout = _layout(explorer)
    app.clientside_callback(ClientsideFunction("explore", "scheme"), Output("scheme", "data"), Input("scheme", "id"))
    _add_questions(app)
    _add_choices(app, explorer)
    _add_results(app, explorer, no_detector)
    _guard(app, local_only)
    return app


def _guard(app: Dash, local_only: bool) -> None:
    server: Any = app.server
    server.config["MAX_CONTENT_LENGTH"] = _LARGEST_BODY
    scripts = " ".join(["'self'", *app.csp_hashes()])
    policy = (
        f"default-src 'self'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )

    @server.before_request
    def check_host() -> None:
        if local_only and not is_local(urlsplit(f"//{request.host}").hostname or ""):
            abort(403)

    @server.after_request
    def protect(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response


def _failed(error: Exception) -> None:
    _log.error("the page asked for what could not be computed", exc_info=error)
    callback_context.set_props("message", {"children": _FAILED})


def _add_questions(app: Dash) -> None:
    """What is asked: one of the examples, or what is in the fields when they are sent."""
    built_in = list(examples().values())

    @app.callback(
        output={"asked": Output("asked", "data"), "fields": [Output(name, "value") for name in _FIELDS]},
        inputs={
            "asks": [Input("look", "n_clicks"), *(Input(name, "n_submit") for name in _FIELDS if name != "context")],
            "fills": Input({"example": ALL}, "n_clicks"),
        },
        state={"typed": [State(name, "value") for name in _FIELDS]},
        prevent_initial_call=True,
    )
    def ask(asks: Any, fills: Any, typed: Sequence[str | None]) -> dict[str, Any]:  # noqa: ARG001 (what is triggered)
        chosen = callback_context.triggered_id
        if isinstance(chosen, Mapping):
            asked = vars(built_in[chosen["example"]])
            return {"asked": asked, "fields": [asked[name] for name in _FIELDS]}
        return {"asked": dict(zip(_FIELDS, typed, strict=True)), "fields": [no_update] * len(_FIELDS)}


def _add_choices(app: Dash, explorer: Explorer) -> None:
    """What is edited: the slider is that of the chosen file, and a click on a figure chooses a head."""

    @app.callback(
        Output("dose", "min"),
        Output("dose", "max"),
        Output("dose", "value"),
        Output("dose", "marks"),
        Output("dose", "disabled"),
        Output("dose-label", "children"),
        Input("intervention", "value"),
    )
    def choose(file: str) -> Any:
        if file == UNEDITED:
            return *STRENGTHS, 1.0, _marks(*STRENGTHS), True, "Strength"
        dose = explorer.dose(file)
        return dose.low, dose.high, dose.value, _marks(dose.low, dose.high), False, dose.name.capitalize()

    @app.callback(
        Output("head", "value"),
        Input("head-map", "clickData"),
        Input("top-heads", "clickData"),
        prevent_initial_call=True,
    )
    def click(on_map: Any, on_bars: Any) -> Any:
        if callback_context.triggered_id == "top-heads":
            return on_bars["points"][0]["y"]
        return f"{on_map['points'][0]['y']}.{on_map['points'][0]['x']}"


def _add_results(app: Dash, explorer: Explorer, no_detector: str) -> None:
    """What is shown, anew whenever the question, the edit or the colours change."""

    @app.callback(
        output={
            "message": Output("message", "children"),
            "hidden": Output("results", "hidden"),
            "kind": Output("results", "className"),
            "answers": Output("answers", "children"),
            "detection": Output("detection", "children"),
            "prompt": Output("prompt", "children"),
            "no_race": Output("no-race", "children"),
            "attention_of": Output("attention-of", "children"),
            "figures": {name: Output(name, "figure") for name in _FIGURES},
            "styles": {name: Output(name, "style") for name in _FIGURES},
        },
        inputs={
            "asked": Input("asked", "data"),
            "file": Input("intervention", "value"),
            "dose": Input("dose", "value"),
            "head": Input("head", "value"),
            "scale": Input("scale", "value"),
            "scheme": Input("scheme", "data"),
        },
    )
    def show(
        asked: Mapping[str, str], file: str, dose: float | None, head: str | None, scale: float | None, scheme: str
    ) -> dict[str, Any]:
        chosen = _head(head)
        try:
            # A number that is being typed is empty for a moment.
            edit = Edit(file, None if file == UNEDITED else dose, chosen, 1.0 if scale is None else scale)
            look = explorer.look(Asked(**asked), edit)
            heads = [chosen] if chosen else _strongest(look)
            attention = explorer.attention(Asked(**asked), heads) if heads else None
        except UserError as error:
            return _refused(str(error))
        figures = _figures(look, attention, chosen, DARK_THEME if scheme == "dark" else LIGHT_THEME)
        return {
            "message": "",
            "hidden": False,
            "kind": "without-race" if look.no_race else "",
            "answers": _answers(look),
            "detection": _detection(look, no_detector),
            "prompt": look.example.prompt,
            "no_race": look.no_race,
            "attention_of": _attention_of(heads, chosen),
            "figures": {name: figures.get(name, go.Figure()) for name in _FIGURES},
            "styles": {
                name: {"height": f"{figures[name].layout['height']}px"} if name in figures else {"display": "none"}
                for name in _FIGURES
            },
        }


def _refused(message: str) -> dict[str, Any]:
    """The message alone; what was shown is hidden, and stays as it was."""
    kept = dict.fromkeys(("kind", "answers", "detection", "prompt", "no_race", "attention_of"), no_update)
    figures = dict.fromkeys(_FIGURES, no_update)
    return {**kept, "figures": figures, "styles": figures, "message": message, "hidden": True}


def _figures(
    look: Look, attention: PromptAttention | None, chosen: tuple[int, int] | None, theme: go.layout.Template
) -> dict[str, go.Figure]:
    """The figures that there are of a prompt, by name."""
    figures = {"steps": answer_view({label: reading.steps for label, reading in look.readings.items()})}
    if attention is not None:
        figures["attention"] = attention_view(attention)
    if look.heads is not None:
        figures["race"] = answer_race({label: r.lens for label, r in look.readings.items() if r.lens})
        figures["head-map"] = head_map(look.heads, highlighted=look.edited_heads, chosen=chosen)
        figures["top-heads"] = top_heads_bars(look.heads, k=_STRONGEST)
    for figure in figures.values():
        figure.update_layout(template=theme, dragmode=False)
    return figures


def _layout(explorer: Explorer) -> html.Main:
    built_in = examples()
    first = next(iter(built_in.values()))
    return html.Main(
        [
            dcc.Store("asked", data=vars(first)),
            dcc.Store("scheme", data="light"),
            html.Header(
                [
                    html.H1("Memory or context?"),
                    html.P(
                        f"Ask {explorer.name} a question whose context contradicts what it knows, and see which source "
                        "wins, in which layer, through which heads, and what an edit changes."
                    ),
                ]
            ),
            html.Div([_form(built_in, first), _edits(explorer)], id="controls"),
            html.Div([html.P(id="message", role="alert"), _results()], id="shown"),
        ]
    )


def _form(built_in: Mapping[str, Asked], first: Asked) -> html.Section:
    about = {
        "question": "Or a sentence to continue: then the answer is the next word.",
        "context": "",
        "context_answer": "If empty: what the model answers with the context, if the context says so.",
        "memory_answer": "If empty: what the model answers without the context.",
    }
    fields = []
    for name, label in _FIELDS.items():
        shared: dict[str, Any] = {"id": name, "value": getattr(first, name), "maxLength": LONGEST[name.split("_")[-1]]}
        field = dcc.Textarea(rows=3, **shared) if name == "context" else dcc.Input(type="text", **shared)
        fields.append(html.Div([html.Label(label, htmlFor=name), field, html.Small(about[name])], className="field"))
    chips = [
        html.Button(label, id={"example": number}, type="button", className="example")
        for number, label in enumerate(built_in)
    ]
    return html.Section(
        [
            html.H2("Ask"),
            html.Div(chips, role="group", className="examples", **_aria("label", "Examples")),
            *fields,
            html.Button("Look", id="look", type="button", className="primary"),
        ]
    )


def _edits(explorer: Explorer) -> html.Section:
    heads = [f"{layer}.{head}" for layer, head in explorer.heads]
    no_files = "" if explorer.files else "No file is loaded; start with --config FILE to choose one here."
    return html.Section(
        [
            html.H2("Edit"),
            _control(
                "intervention",
                "Intervention",
                dcc.Dropdown(
                    [UNEDITED, *explorer.files], UNEDITED, id="intervention", clearable=False, searchable=False
                ),
                no_files,
            ),
            _control("dose", "Strength", dcc.Slider(id="dose", value=1.0, step=0.05, disabled=True)),
            _control(
                "head",
                "Head (layer.head)",
                dcc.Dropdown(heads, id="head", placeholder="choose, or click on the map"),
            ),
            _control(
                "scale",
                "Scale of that head",
                dcc.Slider(*SCALES, id="scale", value=1.0, step=0.1, marks=_marks(*SCALES)),
                "0 prunes it, 1 leaves it as it is.",
            ),
        ]
    )


def _control(name: str, label: str, control: Any, about: str = "") -> html.Div:
    return html.Div(
        [html.Label(label, id=f"{name}-label", htmlFor=name), control, html.Small(about)],
        className="field",
        role="group",
        **_aria("labelledby", f"{name}-label"),
    )


def _results() -> html.Div:
    return html.Div(
        [
            html.Section([html.H2("Answers"), html.Div(id="answers")]),
            html.Section(
                [
                    html.H2("Before the answer"),
                    html.Div(id="detection"),
                    html.H2("The prompt"),
                    html.Pre(id="prompt", tabIndex=0),
                    html.P(id="no-race", className="note"),
                ]
            ),
            html.Section([html.H2("The race, layer by layer"), _graph("race")], className="race"),
            html.Section([html.H2("The answer, token by token"), _graph("steps")]),
            html.Section(
                [
                    html.H2("What each head writes"),
                    html.P(
                        "Direct parts of this prompt's logit difference, unedited. Click on a head to choose it; "
                        "edited heads are framed."
                    ),
                    _graph("head-map"),
                ],
                className="race",
            ),
            html.Section(
                [
                    html.Div([html.H2("The strongest heads"), _graph("top-heads")], className="race"),
                    html.H2("What heads look at"),
                    html.P(id="attention-of"),
                    html.Div(_graph("attention"), className="tall", tabIndex=0),
                ]
            ),
        ],
        id="results",
        hidden=True,
    )


def _graph(name: str) -> html.Div:
    graph = dcc.Graph(id=name, responsive=True, config=_GRAPH, style={"display": "none"})
    return html.Div(graph, role="img", **_aria("label", _FIGURES[name]))


def _aria(attribute: str, value: str) -> dict[str, Any]:
    return {f"aria-{attribute}": value}


def _answers(look: Look) -> list[Any]:
    readings = look.readings

    def cell(text: str, usage: Usage) -> html.Td:
        return html.Td([html.Span(text or "(nothing)", className="answer"), html.Span(usage, className=f"tag {usage}")])

    rows = [
        html.Tr(
            [html.Th("without the context"), *(cell(r.closed_book, r.closed_book_usage) for r in readings.values())]
        ),
        html.Tr(
            [html.Th("with the context"), *(cell(r.with_context, r.with_context_usage) for r in readings.values())]
        ),
    ]
    if look.unedited.lens is not None:
        answers = {"context": look.example.context_answers[0], "memory": look.example.memory_answers[0]}
        for number, (source, answer) in enumerate(answers.items()):
            shares = [r.lens.log_probabilities[0, -1, number].exp().item() for r in readings.values() if r.lens]
            title = [f"first token of {answer} ", html.Span(source, className=f"tag {source}")]
            rows.append(html.Tr([html.Th(title), *(html.Td(percent(share), className="share") for share in shares)]))
    head = html.Thead(html.Tr([html.Td(), *(html.Th(label) for label in readings)]))
    return [html.Table([head, html.Tbody(rows)])]


def _detection(look: Look, no_detector: str) -> list[Any]:
    found = look.detection
    if found is None:
        return [html.P(no_detector, className="note")]
    verdict = "a conflict" if found.conflict else "no conflict"
    parts = [
        html.Strong(percent(found.conflict_probability), id="conflict-probability"),
        f" conflict probability, unedited: the detector calls it {verdict}.",
    ]
    if found.context_probability is not None:
        parts.append(f" If it is one, context wins with probability {percent(found.context_probability)}.")
    return [html.P(parts)]


def _attention_of(heads: Sequence[tuple[int, int]], chosen: tuple[int, int] | None) -> str:
    if not heads:
        return "Choose a head to see what it looks at."
    which = f"Head {chosen[0]}.{chosen[1]}" if chosen else "The strongest heads of this prompt"
    return f"{which}, unedited, from the prompt's last token. Colours leave the first token out."


def _strongest(look: Look) -> list[tuple[int, int]]:
    """The heads that are shown while none is chosen."""
    if look.heads is None:
        return []
    ranked = [look.heads.ranked(source)[:_ATTENTION_SHOWN] for source in ("context", "memory")]
    return list(dict.fromkeys((head.layer, head.head) for side in ranked for head in side))


def _head(name: str | None) -> tuple[int, int] | None:
    if name is None:
        return None
    layer, _, head = name.partition(".")
    return int(layer), int(head)


def _marks(low: float, high: float) -> dict[int, str]:
    return {number: str(number) for number in range(int(low), int(high) + 1)}
