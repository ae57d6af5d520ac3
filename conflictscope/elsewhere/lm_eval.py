"""A model of lm-evaluation-harness whose forward passes are edited.

    python -m conflictscope.elsewhere.lm_eval --model conflictscope --tasks hellaswag
        --model_args pretrained=smollm2-135m,config=edit.json

The harness finds models by a registry that a module adds to when it is imported, and has no entry points for them: so
this one is started in place of ``lm_eval``, whose own command line it then is. From Python, importing it is enough for
``lm_eval.simple_evaluate(model="conflictscope", ...)``.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser
from typing import Any

import torch
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

from conflictscope.elsewhere.edits import answer_logits, check_texts, chosen_edit, follows_prompts
from interp.errors import UserError
from interp.models import load_model
from interp.teacher_forcing import Continued, token_batches
from interventions.runtime import apply


@register_model("conflictscope")
class EditedLM(HFLM):
    """Answers the harness with a transformers model that an intervention is applied to for as long as it lives.

    Args:
        pretrained: A registered name, a local directory or a hub id.
        config: The path of an intervention file; ``None`` is the unedited model, loaded alike.
        trust: Where the file's dial is to stand, from -1 (memory) to 1 (context).
        strength: How far the edit goes; not for a dial.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        device: ``auto``, ``cpu``, ``cuda``, ...
        batch_size: Rows of a pass, or ``auto``; answers that are read token by token have batches of similar length.
        max_batch_size: The most that ``auto`` tries.
        max_length: The most tokens of a prompt and its answer; ``None`` is as many as the model has positions.
        enable_thinking: What chat templates are told of thinking; ``None`` tells them nothing.

    Raises:
        UserError: If the model or the file cannot be loaded, or do not fit each other or a harness.
    """

    def __init__(
        self,
        pretrained: str,
        config: str | None = None,
        trust: float | None = None,
        strength: float = 1.0,
        dtype: str = "float32",
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        enable_thinking: bool | None = None,
    ) -> None:
        self._edit = chosen_edit(config, trust=trust, strength=strength)
        # What its command line says where the user says nothing.
        is_default = device == "cuda:0" and not torch.cuda.is_available()
        model = load_model(pretrained, device="auto" if is_default else device, dtype=dtype)
        super().__init__(
            pretrained=model,
            tokenizer=model.tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            enable_thinking=enable_thinking,
        )
        if self._edit is not None:
            self._applied = apply(model, self._edit, tokenizer=model.tokenizer)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes about the model into its results, and the digest of its edit."""
        return {**super().get_model_info(), "intervention": None if self._edit is None else self._edit.digest}

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability, in nats, of each whole text.

        Raises:
            UserError: If the edit has to know where a prompt ends.
        """
        if self._edit is not None:
            check_texts(self._edit)
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        if self._edit is None or not follows_prompts(self._edit):
            found = super()._loglikelihood_tokens(requests, *args, **options)
        else:
            found = self._told_apart(requests)
        if any(value == -math.inf for value, _ in found):
            raise UserError(
                f"{'The model' if self._edit is None else self._edit.name} gives answers no probability at all, so "
                "that they cannot be compared; take tasks of output_type generate_until."
            )
        return found

    def _told_apart(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log probabilities of answers that are read as while generating, and whether each is the greedy one."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        items = [Continued((*prompt, *answer), len(answer)) for _, prompt, answer in requests]
        for batch in token_batches(self.model, items):
            answers = [requests[number][2] for number in batch]
            logits = answer_logits(self.model, [requests[number][1] for number in batch], answers)
            for number, answer, row in zip(batch, answers, logits, strict=True):
                tokens = torch.tensor(answer, device=row.device)
                row = row[: len(answer)].float().log_softmax(-1)
                value = row.gather(-1, tokens[:, None]).sum().item()
                found[number] = (value, bool((row.argmax(-1) == tokens).all()))
                self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return found


def main() -> None:
    """Run the harness's command line; a user's mistake is one sentence and exit code 2."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except UserError as error:
        ArgumentParser().exit(2, f"Error: {error}\n")


if __name__ == "__main__":
    main()
