"""Replace methods of one model object for as long as something is attached to it."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import nn

_Method = Callable[..., Any]


class Replaced:
    """Methods of one model that are replaced until the last who asked for it is gone.

    Several replacements of one method are called one inside the other, the latest first. A deep copy of such a model is
    one as well, for good: what asked for it was copied too.

    Args:
        network: The transformers model.
        methods: By name, what takes a method's place; it is called with the model, the method, and its arguments.
    """

    # How many ask for each replacement, by model and name.
    _asked: ClassVar[weakref.WeakKeyDictionary[nn.Module, dict[str, Counter[_Method]]]] = weakref.WeakKeyDictionary()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, network: nn.Module, methods: Mapping[str, _Method]) -> None:
        # Weakly, so that whoever keeps this does not keep the model.
        self._network = weakref.ref(network)
        with self._lock:
            asked = self._asked.setdefault(network, {})
            self._methods = {n: method for n, method in methods.items() if not self._copied(network, n, method)}
            for name, method in self._methods.items():
                before = Counter(asked.setdefault(name, Counter()))
                asked[name][method] += 1
                self._put(network, name, before, asked[name])

    def remove(self) -> None:
        """Ask no more."""
        network = self._network()
        if network is None:
            return
        with self._lock:
            for name, method in self._methods.items():
                asked = self._asked[network][name]
                before = Counter(asked)
                asked[method] -= 1
                self._put(network, name, before, +asked)
                if not asked[method]:
                    del asked[method]
            self._methods = {}

    @classmethod
    def by_copying(cls, network: nn.Module, methods: Mapping[str, _Method]) -> bool:
        """Whether the methods are replaced though nobody asked, as in a copy of a model in which they were."""
        return any(cls._copied(network, name, method) for name, method in methods.items())

    @classmethod
    def _copied(cls, network: nn.Module, name: str, method: _Method) -> bool:
        asked = cls._asked.get(network, {}).get(name, Counter())
        return not asked[method] and any(put.func is method for put in _chain(vars(network).get(name)))

    @staticmethod
    def _put(network: nn.Module, name: str, before: Counter[_Method], after: Counter[_Method]) -> None:
        """Take the replacements of before off, and put those of after on, in the order in which they were asked for."""
        if before.keys() == after.keys():
            return
        original = getattr(network, name)
        if before:
            for put in _chain(vars(network)[name]):
                if put.func not in before:
                    break
                original = put.args[1]
            delattr(network, name)
        if after:
            method = original
            for replacement in after:
                # Of bound methods, so that a deep copy of the model gets its own.
                method = partial(replacement, network, method)
            setattr(network, name, method)
        elif getattr(network, name) != original:
            # Put into the object by others, where its class has another.
            setattr(network, name, original)


def _chain(found: Any) -> Iterator[partial[Any]]:
    """A replaced method, what it replaces, and so on."""
    while isinstance(found, partial) and len(found.args) == 2 and isinstance(found.args[0], nn.Module):
        yield found
        found = found.args[1]
