"""Write the tables of the page about planning: what commands take on the shapes of two well-known large models.

Run ``python -m docs.plan``. Nothing is downloaded: the shapes are those that the models' public configurations have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from transformers import LlamaConfig

from conflictscope.cli.plan import number
from conflictscope.plan import Setting, device_bytes, devices_needed, largest_batch, needs
from interp.files import write_text
from interp.plan import Shapes

PAGE = Path(__file__).with_suffix(".md")
_SHARED: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072}
CONFIGS = {
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, **_SHARED
    ),
    "Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, **_SHARED
    ),
}
TOKENS, DEVICES = (128, 4096, 32_768), (1, 8)
MEMORY, TFLOPS, ITEMSIZE, PROMPTS = 80 * 2**30, 400, 2, 256


def rows(shapes: Shapes) -> Iterator[list[str]]:
    """The cells of a model's table: one row a length of prompts and a command."""
    for tokens in TOKENS:
        for need in needs(shapes, Setting(tokens, ITEMSIZE, prompts=PROMPTS)):
            count = devices_needed(shapes, need, ITEMSIZE, MEMORY)
            times = 1 if need.command.endswith("step") else PROMPTS
            batches = [str(largest_batch(shapes, need, ITEMSIZE, MEMORY, devices)) for devices in DEVICES]
            yield [
                f"{tokens:,}",
                need.command,
                number(need.flops / 1e12),
                number(times * need.flops / (TFLOPS * 1e12)),
                str(need.batch),
                number(device_bytes(shapes, need, ITEMSIZE) / 2**30),
                "none" if count is None else str(count),
                *batches,
            ]


def filled(page: str, name: str, table: Sequence[Sequence[str]]) -> str:
    """The text of a page with a model's table between its marks."""
    head = ["tokens", "command", "TFLOP", f"seconds of {PROMPTS}", "batch", "GiB", "GPUs for the batch"]
    head += [f"at once on {devices}" for devices in DEVICES]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *table))
    begin, end = f"<!-- plan of {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{lines}\n\n{end}{rest.partition(end)[2]}"


def main() -> None:
    """Write both tables into the page."""
    page = PAGE.read_text(encoding="utf-8")
    for name, config in CONFIGS.items():
        page = filled(page, name, list(rows(Shapes.of(config))))
    write_text(PAGE, page)


if __name__ == "__main__":
    typer.run(main)
