"""What the detector costs next to decoding.

Run ``python -m benchmarks.detector --json``. The sides take turns on the same conflict prompts, one prompt at a time:

    alone           one forward pass that ends at the probe's layer
    first token     ``generate`` with one new token: the whole prompt through all layers, and the unembedding
    decoding step   one more token with a cache
    listening       what ``generate`` takes longer while the detector listens to it, over eight tokens

The probes have random weights; the cost does not depend on them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Annotated, Any

import torch
import typer

from benchmarks.path_patching import capital_prompts
from interp.activations import sites_of
from interp.anatomy import Anatomy
from interp.inputs import encode
from interp.models import DEFAULT_MODEL, load_model
from probes.detector import CONFLICT_CLASSES, SOURCE_CLASSES, ConflictDetector
from probes.linear import LinearProbe

ANSWER_TOKENS = 8


def random_detector(bridge: Any, layer: int) -> ConflictDetector:
    """A detector that reads attention and residual stream of ``layer``."""
    attention, residual = sites_of(bridge, ["attention", "residual"], [layer])
    width = Anatomy(bridge).d_model
    conflict, source = (
        LinearProbe(site, classes, torch.randn(1, width), torch.zeros(1), 1.0, 0.5)
        for site, classes in ((attention, CONFLICT_CLASSES), (residual, SOURCE_CLASSES))
    )
    return ConflictDetector(conflict, 0.5, source)


def milliseconds(side: Callable[[], object], device: torch.device) -> float:
    """Time of one call."""
    begin = time.perf_counter()
    side()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) * 1000


@torch.inference_mode()
def main(
    model: Annotated[str, typer.Option(help="Model to measure on.")] = DEFAULT_MODEL,
    layer: Annotated[int, typer.Option(help="Layer of the probes.")] = 17,
    prompts: Annotated[int, typer.Option(help="Number of prompts.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line last.")] = False,
) -> None:
    """Time detection and decoding in turn."""
    bridge = load_model(model, device=device)
    anatomy = Anatomy(bridge)
    network: Any = anatomy.model
    detector = random_detector(bridge, layer)
    times: dict[str, list[float]] = {
        name: [] for name in ("alone", "first_token", "decoding_step", "answer", "answer_listening")
    }
    texts = [example.prompt for example in capital_prompts(prompts)]
    for number, text in enumerate([texts[0], *texts]):
        inputs = encode(bridge, [text])
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        read = network(**inputs, use_cache=True)
        chosen = read.logits[:, -1:].argmax(-1)

        def answer(tokens: int, given: dict[str, torch.Tensor] = given) -> Any:
            return network.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

        def answer_heard(answer: Callable[[int], Any] = answer) -> Any:
            with detector.listening(bridge):
                return answer(ANSWER_TOKENS)

        sides: dict[str, Callable[[], object]] = {
            "alone": lambda text=text: detector.detect(bridge, [text]),
            "first_token": lambda answer=answer: answer(1),
            "decoding_step": lambda read=read, chosen=chosen: network(
                input_ids=chosen, past_key_values=read.past_key_values, use_cache=True
            ),
            "answer": lambda answer=answer: answer(ANSWER_TOKENS),
            "answer_listening": answer_heard,
        }
        for name, side in sides.items():
            taken = milliseconds(side, anatomy.device)
            # The first prompt only warms up.
            if number:
                times[name].append(taken)
    listening = median(b - a for a, b in zip(times["answer"], times["answer_listening"], strict=True))
    typical = {name: median(values) for name, values in times.items()}
    result = {
        "ratio_alone_to_first_token": round(typical["alone"] / typical["first_token"], 3),
        "ratio_alone_to_decoding_step": round(typical["alone"] / typical["decoding_step"], 3),
        "ratio_listening_to_decoding_step": round(listening / typical["decoding_step"], 3),
        "listening_milliseconds": round(listening, 2),
        **{f"{name}_milliseconds": round(value, 1) for name, value in typical.items()},
        "layer": layer,
        "prompts": len(texts),
        "model": model,
        "device": str(anatomy.device),
        "threads": torch.get_num_threads(),
    }
    if not as_json:
        print(f"Alone:         {typical['alone']:7.1f} ms, up to layer {layer} of {anatomy.n_layers}")
        print(f"First token:   {typical['first_token']:7.1f} ms")
        print(f"Decoding step: {typical['decoding_step']:7.1f} ms")
        print(f"Listening:     {listening:7.1f} ms for a whole answer")
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    typer.run(main)
