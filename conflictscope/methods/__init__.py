"""Methods that move a model towards its memory or its context, a file each; see ``conflictscope.study.method``."""

from conflictscope.methods.actadd import ActAdd
from conflictscope.methods.caa import CAA
from conflictscope.methods.probe_direction import ProbeDirection
from conflictscope.methods.spare import Spare
from conflictscope.methods.spare_ablations import SpareAddOnly, SpareConstant, SpareRemoveOnly
from conflictscope.methods.task_vector import TaskVector
from conflictscope.methods.value_scaling import ValueScaling
from conflictscope.study.method import Method

ALL: tuple[type[Method], ...] = (
    ValueScaling,
    ActAdd,
    CAA,
    ProbeDirection,
    TaskVector,
    Spare,
    SpareRemoveOnly,
    SpareAddOnly,
    SpareConstant,
)
