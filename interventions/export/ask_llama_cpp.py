"""Ask llama.cpp itself, in an environment that has llama_cpp and numpy and nothing of ours.

    python -I ask_llama_cpp.py JOB OUT

JOB is JSON: {"model", "prompts": [token ids], "tokens", "runs": [{"lora", "scale", "vector", "layers"}]}; a vector is a
file of numpy with what llama.cpp's own loader makes of a control vector: all directions, that of layer 1 first. OUT
gets the next logits of every run and prompt and the greedy tokens, as numpy arrays.
"""

import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

try:
    api: Any = importlib.import_module("llama_cpp")
except ImportError:
    api = None


def check(done: Any, otherwise: str) -> None:
    """End with a sentence unless something was done."""
    if not done:
        sys.exit(otherwise)


def context_of(model: Any, longest: int) -> Any:
    """Make room for prompts and answers of so many tokens, in float32."""
    parameters = api.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = longest
    parameters.n_threads = parameters.n_threads_batch = 1
    # Half-precision keys and values would be what differs most.
    parameters.type_k = parameters.type_v = api.GGML_TYPE_F32
    parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return api.llama_init_from_model(model, parameters)


def next_logits(context: Any, model: Any, tokens: list[int]) -> Any:
    """Read tokens after those that were read, and give the logits of the next one."""
    ids = (api.llama_token * len(tokens))(*tokens)
    check(api.llama_decode(context, api.llama_batch_get_one(ids, len(tokens))) == 0, "it could not read a prompt.")
    width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (width,)).copy()


def asked(context: Any, model: Any, prompt: list[int], count: int) -> tuple[Any, list[int]]:
    """Answer a prompt: the logits of its first token, and so many tokens."""
    api.llama_memory_clear(api.llama_get_memory(context), True)
    logits = first = next_logits(context, model, prompt)
    tokens = [int(first.argmax())]
    while len(tokens) < count:
        logits = next_logits(context, model, tokens[-1:])
        tokens.append(int(logits.argmax()))
    return first, tokens


def apply(context: Any, model: Any, run: dict[str, Any]) -> None:
    """Give llama.cpp an edit."""
    if run.get("lora"):
        adapter = api.llama_adapter_lora_init(model, run["lora"].encode())
        check(adapter, f"it does not load {run['lora']}; export it again, for this base.")
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
        done = api.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(run["scale"]))
        check(done == 0, f"it does not apply {run['lora']}; export it again, for this base.")
    if run.get("vector"):
        values = np.load(run["vector"])
        pointer = values.ravel().ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        first, last = run["layers"]
        done = api.llama_set_adapter_cvec(context, pointer, values.size, values.shape[1], first, last)
        check(done == 0, "it does not take the control vector; export it again, for this base.")


def main(job_path: str, out: str) -> None:
    """Answer all prompts of a job in each of its runs."""
    check(api, "it has no llama_cpp; pip install llama-cpp-python, or give --llama-python.")
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(job["model"].encode(), api.llama_model_default_params())
    check(model, f"it does not load {job['model']}; give a base in GGUF.")
    longest = max(map(len, job["prompts"])) + job["tokens"]
    logits, tokens = [], []
    for run in job["runs"]:
        context = context_of(model, longest)
        apply(context, model, run)
        found = [asked(context, model, prompt, job["tokens"]) for prompt in job["prompts"]]
        logits.append([first for first, _ in found])
        tokens.append([greedy for _, greedy in found])
        api.llama_free(context)
    np.savez(out, logits=np.array(logits, np.float32), tokens=np.array(tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
