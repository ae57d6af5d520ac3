"""Train a small GPT-NeoX on the capital facts: a second architecture to study, from nothing, in minutes on a CPU.

    python -m examples.train_neox OUT --seed 0
    conflictscope demo --model OUT --relation capital

1. Every text is a prompt as ``build_conflicts`` words it (all phrasing families, all context kinds) with its answer.
   Each pass over the facts draws other conflicting answers and other irrelevant contexts, so that a context answer
   can only be copied, while the right answers stay the same and can be memorised.
2. Where the context conflicts, a coin that belongs to subject and phrasing decides which source the text trusts.
3. A byte-level BPE tokenizer and a model with parallel attention and MLP are trained on these texts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from interp.conflicts import ConflictExample
from interp.facts import build_conflicts, usable_facts
from interp.files import atomic_directory

RELATION = "capital"
VOCABULARY_SIZE = 4000
CONTEXT_LENGTH = 256
BATCH_SIZE = 16
LEARNING_RATE = 3e-3
WARM_UP = 0.05
END, PAD = "<|endoftext|>", "<|padding|>"


def trusted_answer(example: ConflictExample, seed: int) -> str:
    """The answer that the example's prompt is continued with: for a conflict as its coin says, else the truth."""
    coin = random.Random(f"{seed}/{example.subject}/{example.template}")
    trusts_context = example.kind == "conflict" and coin.random() < 0.5
    return (example.context_answers if trusts_context else example.memory_answers)[0]


def draw_texts(seed: int, turn: int) -> list[str]:
    """One text for every fact, phrasing family and context kind; ``turn`` decides what the contexts say."""
    examples = build_conflicts({RELATION: usable_facts(RELATION)}, seed=seed + turn)
    return [f"{example.prompt} {trusted_answer(example, seed)}.{END}" for example in examples]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, in which the tokens of a prompt stay the same when " " and an answer follow it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        show_progress=False,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD)


def new_model(tokenizer: Any) -> GPTNeoXForCausalLM:
    """An untrained model for the tokenizer."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=CONTEXT_LENGTH,
            use_parallel_residual=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(tokenizer: Any, seed: int) -> Iterator[dict[str, Tensor]]:
    """Model inputs without end, in batches of similar length, padded on the right; padding is no label."""
    rng = random.Random(seed)
    for turn in count():
        texts = sorted(draw_texts(seed, turn), key=lambda text: (len(text), rng.random()))
        chunks = [texts[start : start + BATCH_SIZE] for start in range(0, len(texts), BATCH_SIZE)]
        for chunk in rng.sample(chunks, len(chunks)):
            tokens = tokenizer(chunk, return_tensors="pt", padding=True, padding_side="right")
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(model: GPTNeoXForCausalLM, data: Iterator[dict[str, Tensor]], steps: int) -> None:
    """Train with AdamW, a warm-up and a cosine decay to zero, and show a progress bar with the loss."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP)
    columns = (*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.3f}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("Training", total=steps, loss=float("nan"))
        for _, batch in zip(range(steps), data, strict=False):
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            progress.update(task, advance=1, loss=loss.item())


def main(
    out: Annotated[Path, typer.Argument(help="The directory to write, for load_model or transformers.")],
    seed: Annotated[int, typer.Option(help="Decides the texts, the coins and the initial weights.")] = 0,
    steps: Annotated[int, typer.Option(help="How many batches to train on.", min=20)] = 3000,
) -> None:
    """Train a small GPT-NeoX on the capital facts and save it with its tokenizer."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(draw_texts(seed, 0))
    model = new_model(tokenizer)
    train(model, batches(tokenizer, seed), steps)
    with atomic_directory(out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    typer.run(main)
