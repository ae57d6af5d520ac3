"""Serve a model with interventions over HTTP, in the shape of OpenAI's API: each request chooses its own.

1. The model is loaded once, with transformers; every intervention file is checked against it at the start.
2. Requests wait in a bounded queue. One thread lets them into a batch, whose rows have each the edits of its request
   (``batch``); rows join between two steps and leave when they end, so that every answer is what the model gives alone.
   What cannot share a pass is answered by itself, a token between two steps (``alone``).
3. Text is sent as it is generated, or as a whole. Who hangs up is not generated for. A stop answers what was accepted,
   for a minute.

transformers has a server of its own, but it serves whatever model a client names, loads and unloads at a client's wish,
and its parts are private, and batching engines know of no edits; so this is FastAPI around the model's forward pass.
"""
