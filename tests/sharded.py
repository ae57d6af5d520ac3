"""Take a model apart whose layers lie on two devices, in a process of its own: it makes up a kind of device.

Tensors hold no numbers here; PyTorch checks that those that meet are on one device: ``python -m tests.sharded``.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.big_modeling import attach_align_device_hook_on_blocks
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from interp import linear_maps
from interp.anatomy import Anatomy
from interp.attribution import direct_logits, path_patching
from interp.attribution.states import last_token_states

_SIZE: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


class _Tokenizer:
    """Gives every text seven tokens."""

    pad_token_id = eos_token_id = 0

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        ids = [1, 2, 3, 4, 5, 6, 7]
        return {"input_ids": ids if isinstance(texts, str) else [ids for _ in texts]}


def sharded(architecture: str) -> Any:
    """A model whose second block and final norm lie on the first device, and all else on the second."""
    network: Any = (
        LlamaForCausalLM(LlamaConfig(**_LLAMA, **_SIZE))
        if architecture == "llama"
        else GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **_SIZE))
    )
    network.eval().tokenizer = _Tokenizer()
    anatomy = Anatomy(network)
    first = (anatomy.path("block", 1), anatomy.model_path("final_norm"))
    modules = [anatomy.model_path("embedding"), anatomy.path("block", 0), *first, anatomy.model_path("unembedding")]
    modules.append("model.rotary_emb" if architecture == "llama" else "transformer.wpe")
    places = {name: torch.device("npy", int(name not in first)) for name in modules}
    for name, device in places.items():
        for module in network.get_submodule(name).modules():
            for own in (module._parameters, module._buffers):
                own.update({key: value.detach().to(device) for key, value in own.items() if value is not None})
    # As a device_map of transformers does it.
    attach_align_device_hook_on_blocks(network, execution_device=places, offload=dict.fromkeys(places, False))
    return network


def take_apart(model: Any) -> None:
    """Record, patch paths and add up logits."""
    anatomy = Anatomy(model)
    states = last_token_states(model, ["a", "b"])
    answers = torch.zeros(2, 2, dtype=torch.long, device=anatomy.device)
    zeros = torch.zeros_like(states.z)
    both: tuple[path_patching.Metric, ...] = ("logit_diff", "context_probability")
    path_patching.patching_scores(anatomy, states, zeros, answers, metrics=both)
    path_patching.patching_scores(anatomy, states, zeros, answers, mlps="frozen")
    path_patching.head_effects(anatomy, states, (0, 1), states.z[:, 0, 1:2], answers)
    direct_logits._parts(anatomy, states, answers)
    anatomy.direction_logits(states.final)


def main() -> None:
    """Do so with two architectures; one has biases everywhere."""
    _setup_privateuseone_for_python_backend("npy")
    # Such a device makes no tensor of numbers by itself.
    own: Any = torch.tensor
    torch.tensor = lambda data, device=None, **how: own(data, **how).to(device or "cpu")
    linear_maps.PLAIN = (*linear_maps.PLAIN, FakeTensor)
    # It looks at numbers, of which there are none.
    path_patching.check_clean_stream = direct_logits.check_clean_stream = lambda *_: None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for architecture in ("llama", "gpt2"):
            take_apart(sharded(architecture))


if __name__ == "__main__":
    main()
