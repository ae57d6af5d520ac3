"""Serve a model with interventions over HTTP, in the shape of OpenAI's API: each request chooses its own.

1. The model is loaded once, with transformers; every intervention file is checked against it at the start.
2. Requests wait in a bounded queue. One thread takes them in turn, attaches what the request chose, generates, and
   takes it off: every answer is what the model gives alone. (For throughput fold a setting into the weights and serve
   the checkpoint with a batching engine.)
3. Text is sent as it is generated, or as a whole. Who hangs up is not generated for. A stop answers what was accepted,
   for a minute.

transformers has a server of its own, but it serves whatever model a client names, loads and unloads at a client's wish,
and its parts are private; so this is FastAPI around transformers' ``generate``.
"""
