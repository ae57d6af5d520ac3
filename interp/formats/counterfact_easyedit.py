"""Read CounterFact, in the form of EasyEdit."""

from __future__ import annotations

from interp.formats.items import Format, Item, told
from interp.formats.row import Row


def _read(row: Row) -> list[Item]:
    """The prompt with an answer, as a statement, before the prompt or its paraphrase."""
    prompt, subject = row.text("prompt"), row.text("subject")
    true, new, case = row.text("ground_truth"), row.text("target_new"), str(row.value("case_id"))
    stems = [(prompt, "prompt", case), *((stem, "paraphrase", f"{case}.1") for stem in row.aliases("rephrase_prompt"))]
    return [
        told(prompt, stem, true, new, subject)._replace(template=template, key=key) for stem, template, key in stems
    ]


FORMAT = Format(
    "counterfact-easyedit",
    "CounterFact, in the form of EasyEdit",
    ("case_id", "prompt", "subject", "ground_truth", "target_new"),
    "Wang et al. 2023, arXiv 2308.07269",
    _read,
)
