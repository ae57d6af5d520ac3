"""Replace methods of one model object for as long as something is attached to it."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import nn


class Replaced:
    """Methods of one model that are replaced until the last who asked for it is gone.

    A deep copy of such a model is one as well, for good: what asked for it was copied too.

    Args:
        network: The transformers model.
        methods: By name, what takes a method's place; it is called with the model, the method, and its arguments.
    """

    # How many ask, by model and method.
    _asked: ClassVar[weakref.WeakKeyDictionary[nn.Module, Counter[str]]] = weakref.WeakKeyDictionary()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, network: nn.Module, methods: Mapping[str, Callable[..., Any]]) -> None:
        # Weakly, so that whoever keeps this does not keep the model.
        self._network = weakref.ref(network)
        with self._lock:
            asked = self._asked.setdefault(network, Counter())
            self._names = [name for name in methods if not self._copied(network, name, methods[name])]
            for name in self._names:
                if not asked[name]:
                    # Of bound methods, so that a deep copy of the model gets its own.
                    setattr(network, name, partial(methods[name], network, getattr(network, name)))
                asked[name] += 1

    def remove(self) -> None:
        """Ask no more."""
        network = self._network()
        if network is None:
            return
        with self._lock:
            asked = self._asked[network]
            for name in self._names:
                asked[name] -= 1
                if not asked[name]:
                    _, original = vars(network)[name].args
                    delattr(network, name)
                    if getattr(network, name) != original:
                        # Put into the object by others, where its class has another.
                        setattr(network, name, original)

    @classmethod
    def by_copying(cls, network: nn.Module, methods: Mapping[str, Callable[..., Any]]) -> bool:
        """Whether the methods are replaced though nobody asked, as in a copy of a model in which they were."""
        return any(cls._copied(network, name, method) for name, method in methods.items())

    @classmethod
    def _copied(cls, network: nn.Module, name: str, method: Callable[..., Any]) -> bool:
        found = vars(network).get(name)
        asked = cls._asked.get(network, Counter())
        return not asked[name] and isinstance(found, partial) and found.func is method
