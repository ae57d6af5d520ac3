"""Read CounterFact."""

from __future__ import annotations

from interp.formats.items import INSIDE_A_WORD, Context, Format, Item, given_away, inside_a_word
from interp.formats.row import Row, distinct


def _read(row: Row) -> list[Item]:
    """The prompt with an answer, as a statement, before the prompt or a paraphrase of it.

    Neighbourhood prompts are left out: they have other subjects, which the data does not name.
    """
    true, new = (distinct(row.text(f"requested_rewrite.target_{which}.str")) for which in ("true", "new"))
    subject, relation = row.text("requested_rewrite.subject"), row.text("requested_rewrite.relation_id")
    if "{}" not in (wording := row.text("requested_rewrite.prompt")):
        raise row.unexpected("requested_rewrite.prompt", "a text with {} in the place of the subject")
    prompt = wording.replace("{}", subject)
    inside = INSIDE_A_WORD if inside_a_word("{}", wording) else ""
    case = str(row.value("case_id"))
    stems = [(prompt, "prompt", case)]
    stems += [(text, "paraphrase", f"{case}.{i}") for i, text in enumerate(row.aliases("paraphrase_prompts"), 1)]

    def contexts(stem: str) -> tuple[Context, Context]:
        return (
            Context("conflict", f"{prompt} {new[0]}. {stem}", new),
            Context("aligned", f"{prompt} {true[0]}. {stem}", true),
        )

    return [
        Item(
            stem,
            true,
            contexts(stem),
            subject,
            relation,
            template,
            key,
            completion=True,
            unusable=inside or given_away(subject, stem, true, new),
        )
        for stem, template, key in stems
    ]


FORMAT = Format(
    "counterfact",
    "CounterFact",
    ("case_id", "requested_rewrite"),
    "Meng et al. 2022, arXiv 2202.05262",
    _read,
)
