"""Direct logit attribution: what each component writes straight into the answer's logits.

score(l, h) = (z_lh W_O^lh) . (u_context - u_memory), with the final norm's scale of that example applied (Yu,
Merullo & Pavlick 2023, arXiv 2310.15910). Heads, MLPs, embedding and biases together give the whole logit
difference. Where logits are soft-capped (Gemma 2) it is the difference before the cap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from interp.anatomy import Anatomy
from interp.attribution.examples import check_attributed, scorable
from interp.attribution.path_patching import check_clean_stream
from interp.attribution.scores import HeadScores
from interp.attribution.states import LastTokenStates, last_token_states
from interp.conflicts import ConflictSet

_EXAMPLES_AT_ONCE = 64


@dataclass(frozen=True)
class DirectLogits:
    """The logit difference, context minus memory, taken apart. Tensors are float32 on the CPU.

    Attributes:
        heads: The heads' parts.
        mlps: The MLPs' parts, ``(n, n_layers)``.
        embedding: The embedding's part, ``(n,)``.
        biases: The part of output projection, final norm and unembedding biases, ``(n,)``.
    """

    heads: HeadScores
    mlps: Tensor
    embedding: Tensor
    biases: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of all parts, ``(n,)``: the logit difference."""
        return self.heads.values.sum((1, 2)) + self.mlps.sum(1) + self.embedding + self.biases


def direct_logit_attribution(
    model: nn.Module, conflicts: ConflictSet, *, name: str, progress: str | None = None
) -> DirectLogits:
    """Take the logit difference of every example apart.

    Args:
        model: The model, or a bridge around it.
        conflicts: Conflict prompts. Those whose two answers start with the same token are left out.
        name: Name of the model, for the record.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        UserError: If no example can be scored.
    """
    examples, token_ids = scorable(model, conflicts)
    states = last_token_states(model, [example.prompt for example in examples], progress=progress)
    anatomy = Anatomy(model)
    check_attributed(anatomy, states.final, token_ids)
    rows = [slice(start, start + _EXAMPLES_AT_ONCE) for start in range(0, len(examples), _EXAMPLES_AT_ONCE)]
    parts = [_parts(anatomy, states[chunk], token_ids[chunk]) for chunk in rows]
    heads, mlps, embedding, biases = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    scores = HeadScores.of(
        heads,
        examples,
        conflicts,
        method="direct_logit_attribution",
        metric="logit_diff",
        model=name,
        settings={"unit": "part of (logit context - logit memory)"},
    )
    return DirectLogits(scores, mlps, embedding, biases)


@torch.inference_mode()
def _parts(anatomy: Anatomy, states: LastTokenStates, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    direction = anatomy.logit_difference_direction(states.final, token_ids).float()

    def along_answer(write: Tensor) -> Tensor:
        return torch.einsum("n...d,nd->n...", write.to(direction.device).float(), direction)

    residual = states.embedding
    heads, mlps, biases = [], [], anatomy.logit_difference_offset(token_ids).float()
    for layer in range(anatomy.n_layers):
        head_writes, bias_write = anatomy.head_writes(layer, states.z[:, layer])
        attention_write = head_writes.sum(1) + bias_write
        residual = residual.to(attention_write.device)
        mlp_write = anatomy.mlp_write(layer, residual if anatomy.parallel else residual + attention_write)
        heads.append(along_answer(head_writes))
        mlps.append(along_answer(mlp_write))
        biases = biases + along_answer(bias_write)
        residual = residual + attention_write + mlp_write
    check_clean_stream(anatomy, residual.to(states.final.device), states.final)
    return torch.stack(heads, 1), torch.stack(mlps, 1), along_answer(states.embedding), biases
