"""Look inside a language model: load it, prompt it, attribute its answers, score them.

Import what you need from the submodules (``from interp.models import load_model``); this package
imports nothing by itself, so that the serving side can use ``interp.anatomy`` without what measuring needs.
"""
