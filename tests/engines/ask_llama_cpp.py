"""Ask llama.cpp, in an environment that has llama_cpp and numpy and nothing of ours.

    python ask_llama_cpp.py JOB OUT

JOB is JSON: {"model", "prompts": [token ids], "tokens", "runs": [{"lora", "scale", "vector", "layers"}]}; a vector is a
file of numpy with what llama.cpp's own loader makes of a control vector: all directions, that of layer 1 first. OUT
gets the next logits of every run and prompt and the greedy tokens, as numpy arrays.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp as api  # pyright: ignore[reportMissingImports]
import numpy as np


def context_of(model, longest):
    parameters = api.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = longest
    parameters.n_threads = parameters.n_threads_batch = 1
    # Half-precision keys and values would be what differs most.
    parameters.type_k = parameters.type_v = api.GGML_TYPE_F32
    parameters.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return api.llama_init_from_model(model, parameters)


def next_logits(context, model, tokens):
    ids = (api.llama_token * len(tokens))(*tokens)
    assert api.llama_decode(context, api.llama_batch_get_one(ids, len(tokens))) == 0
    width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), (width,)).copy()


def asked(context, model, prompt, count):
    api.llama_memory_clear(api.llama_get_memory(context), True)
    logits = first = next_logits(context, model, prompt)
    tokens = [int(first.argmax())]
    while len(tokens) < count:
        logits = next_logits(context, model, tokens[-1:])
        tokens.append(int(logits.argmax()))
    return first, tokens


def apply(context, model, run):
    if run.get("lora"):
        adapter = api.llama_adapter_lora_init(model, run["lora"].encode())
        assert adapter, f"llama.cpp does not load {run['lora']}"
        adapters = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
        assert api.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(run["scale"])) == 0
    if run.get("vector"):
        values = np.load(run["vector"])
        pointer = values.ravel().ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        first, last = run["layers"]
        assert api.llama_set_adapter_cvec(context, pointer, values.size, values.shape[1], first, last) == 0


def main(job_path, out):
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(job["model"].encode(), api.llama_model_default_params())
    assert model, f"llama.cpp does not load {job['model']}"
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
