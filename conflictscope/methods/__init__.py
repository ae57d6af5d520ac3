"""Methods that move a model towards its memory or its context, a file each; see ``conflictscope.study.method``."""

from conflictscope.methods.cad import ContextAwareDecoding
from conflictscope.methods.gate import Gate
from conflictscope.methods.value_scaling import ValueScaling
from conflictscope.study.method import Method

ALL: tuple[type[Method], ...] = (ValueScaling, ContextAwareDecoding, Gate)
