"""The command that scores the parts of a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from conflictscope.cli.cluster import Cluster
from conflictscope.cli.inputs import check_parquet
from conflictscope.cli.options import Asked, SplitOption, say
from conflictscope.cli.tables import print_frame
from interp.errors import UserError

# Ways that need the whole set of prompts, as it is.
_COMPARED = ("attention-drift", "representations")


@dataclass(frozen=True)
class Patching:
    """What is replaced, and what is measured, where heads are patched."""

    metric: Annotated[
        Literal["logit_diff", "memory_probability", "context_probability"],
        typer.Option(help="What path patching attributes."),
    ] = "logit_diff"
    baseline: Annotated[
        Literal["corrupted", "zero", "mean"],
        typer.Option(help="What is put in a head's place, by path patching and head-to-head."),
    ] = "corrupted"
    mlps: Annotated[Literal["recompute", "frozen"], typer.Option(help="Whether path patching recomputes the MLPs.")] = (
        "recompute"
    )
    receiver: Annotated[
        str | None, typer.Option(help="With head-to-head: the head that listens, for example 18.6.")
    ] = None
    tokens: Annotated[
        Literal["last", "all"],
        typer.Option(help="With head-to-head: where other heads are replaced; all needs --baseline zero."),
    ] = "last"

    def check(self, method: str) -> None:
        """See that the options belong to the method.

        Raises:
            UserError: If one does not.
        """
        if method not in ("path-patching", "head-to-head") and self.baseline != "corrupted":
            raise UserError(f"--baseline belongs to path-patching and head-to-head; leave it out with {method}.")
        if method != "path-patching" and (self.metric, self.mlps) != ("logit_diff", "recompute"):
            raise UserError(f"--metric and --mlps belong to path-patching; leave them out with {method}.")
        if method == "head-to-head" and self.receiver is None:
            raise UserError("head-to-head needs the head that listens; give --receiver, for example 18.6.")
        if method != "head-to-head" and (self.receiver is not None or self.tokens == "all"):
            raise UserError("--receiver and --tokens belong to head-to-head; add --method head-to-head.")
        if self.tokens == "all" and self.baseline != "zero":
            raise UserError("--tokens all replaces heads at every token, which only --baseline zero can do; give it.")
        if self.receiver is not None and self.listening[0] == 0:
            raise UserError(
                f"--receiver {self.receiver} is in layer 0, where no head listens to another; give a later one."
            )

    @property
    def listening(self) -> tuple[int, int]:
        """The receiver as ``(layer, head)``.

        Raises:
            UserError: If it is not written so.
        """
        try:
            layer, head = map(int, str(self.receiver).split("."))
        except ValueError:
            raise UserError(
                f"--receiver must be a head as layer.head, for example 18.6, not {self.receiver!r}."
            ) from None
        return layer, head


def attribute(
    *,
    method: Annotated[
        Literal[
            "path-patching",
            "head-to-head",
            "direct-logits",
            "attribution-patching",
            "edges",
            "retrieval",
            "attention-drift",
            "representations",
        ],
        typer.Option(help="How parts are scored; the last three do not tell towards which source."),
    ] = "path-patching",
    patching: Patching,
    split: SplitOption = "train",
    at_answer: Annotated[
        bool,
        typer.Option(
            "--at-answer/--at-end",
            help="Score where the two answers part in what the model says, or at the prompt's end.",
        ),
    ] = False,
    top: Annotated[int, typer.Option(min=1, help="How many parts to list for each direction.")] = 8,
    out: Annotated[
        Path, typer.Option(help="Parquet file for the scores; a JSON and an HTML file go next to it.")
    ] = Path("out/heads.parquet"),
    cluster: Cluster,
    source: Asked,
) -> None:
    """Score every head, or every layer: which push the answer to the context, which to memory.

    With edges, the strongest edges between all parts are listed and written too. With representations, layers are
    scored.
    """
    from figures.heads import head_map, layer_lines
    from figures.theme import save_figure
    from interp.attribution.scores import LayerScores

    patching.check(method)
    if at_answer and method in _COMPARED:
        raise UserError(f"{method} compares prompts that contradict with prompts that agree; leave out --at-answer.")
    check_parquet(out)
    cluster.check()
    asked = partial(_asked, source, split, at_answer)
    about = {"name": source.model, "progress": method.replace("-", " ").capitalize(), "seed": source.seed}
    if cluster.ray is not None:
        scores: Any = _on_cluster(method, patching, cluster, source, asked, out)
    elif method == "edges":
        scores = _edges(*asked(), out, top, about)
    else:
        scores = _scores(method, patching, *asked(), about)
    scores.save(out)
    is_layers = isinstance(scores, LayerScores)
    save_figure(layer_lines(scores) if is_layers else head_map(scores), out.with_suffix(".html"))
    _print_ranking(scores.growth() if is_layers else scores, top)
    say(f"Scores are in {out}, a picture in {out.with_suffix('.html')}")


def _asked(source: Asked, split: str, at_answer: bool) -> tuple[Any, Any]:
    """Load the model, and get the prompts that are scored."""
    model, conflicts = source.conflicts()
    part = conflicts.select(split=None if split == "all" else split)
    return model, _at_answers(model, part, source.longest_answer(model, part)) if at_answer else part


def _on_cluster(method: str, patching: Patching, cluster: Cluster, source: Asked, asked: Any, out: Path) -> Any:
    """The scores by path patching, block by block on a cluster; what was scored is kept in OUT-parts.

    Raises:
        UserError: If the method needs all prompts at once.
    """
    from conflictscope.study.setting import digest_of
    from conflictscope.study.sharded import ShardedAttribution, done_in_parts
    from interp.attribution.scores import HeadScores

    if method != "path-patching":
        raise UserError(f"--ray belongs to path-patching; leave it out with {method}.")
    out = out.resolve()
    options = {"name": source.model, "baseline": patching.baseline, "mlps": patching.mlps, "seed": source.seed}
    conflicts = partial(_conflict_prompts, asked)
    files = [Path(source.model), *filter(None, (source.data, source.blueprint))]
    parts = out.with_name(f"{out.stem}-parts") / digest_of([repr((source, asked.args, patching))], files)
    work = partial(ShardedAttribution, source.load, conflicts, parts, options, out, patching.metric)
    done_in_parts(work(), cluster.executor(work, parts))
    return HeadScores.load(out)


def _conflict_prompts(asked: Any) -> tuple[Any, Any]:
    model, part = asked()
    return model, part.select(kind="conflict")


def _at_answers(model: Any, part: Any, longest: int) -> Any:
    """Conflict prompts, up to where the two answers part in what the model says."""
    from interp.asking import at_answers

    moved = at_answers(model, part.select(kind="conflict"), max_new_tokens=longest, progress="Answering")
    if moved.left_out:
        say(f"{moved.left_out} prompts are left out, as their answers name neither source.")
    return moved.conflicts


def _scores(method: str, patching: Patching, model: Any, part: Any, about: dict[str, Any]) -> Any:
    """The scores by a method, of heads or of layers."""
    if method == "path-patching":
        from interp.attribution.path_patching import path_patching

        options: dict[str, Any] = {"baseline": patching.baseline, "mlps": patching.mlps, "metrics": (patching.metric,)}
        return path_patching(model, part.select(kind="conflict"), **options, **about)[patching.metric]
    if method == "head-to-head":
        from interp.attribution.head_to_head import head_to_head

        options = {"baseline": patching.baseline, "tokens": patching.tokens}
        heard = head_to_head(model, part.select(kind="conflict"), [patching.listening], **options, **about)
        return heard[patching.listening]
    if method == "representations":
        from interp.attribution.representations import representation_gap

        return representation_gap(model, part, **about)
    from interp.attribution.ways import scored

    return scored(method, model, part, **about)


def _edges(model: Any, part: Any, out: Path, top: int, about: dict[str, Any]) -> Any:
    """The scores of heads by edges, which are written beside them and listed."""
    from interp.attribution.edges import edge_attribution
    from interp.files import write_parquet

    found = edge_attribution(model, part.select(kind="conflict"), **about)
    beside = out.with_name(f"{out.stem}_edges.parquet")
    write_parquet(beside, found.to_frame())
    print_frame(found.to_frame().head(top))
    say(f"All edges are in {beside}")
    return found.heads


def _print_ranking(scores: Any, top: int) -> None:
    title = f"{scores.metric}, {scores.settings['unit']}, {len(scores.values)} prompts"
    table = Table("towards", scores.axes[-1], "score", "95 % interval", title=title)
    for towards in ("context", "memory") if scores.signed else ("context",):
        for *place, score, low, high in scores.ranked(towards)[:top]:
            name = ".".join(map(str, place))
            table.add_row(towards if scores.signed else "-", name, f"{score:+.3f}", f"{low:+.3f} to {high:+.3f}")
    Console().print(table)
