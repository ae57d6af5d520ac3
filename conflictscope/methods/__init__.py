"""Methods that move a model towards its memory or its context, a file each; see ``conflictscope.study.method``."""

from conflictscope.methods.actadd import ActAdd
from conflictscope.methods.adacad import AdaptiveContextAwareDecoding
from conflictscope.methods.caa import CAA
from conflictscope.methods.cad import ContextAwareDecoding
from conflictscope.methods.ck_plug import KnowledgePlug
from conflictscope.methods.coiecd import EntropyConstraintDecoding
from conflictscope.methods.context_focus import ContextFocus
from conflictscope.methods.decore import RetrievalHeadContrast
from conflictscope.methods.demonstrations import Demonstrations
from conflictscope.methods.dola import LayerContrast
from conflictscope.methods.feature_differences import ContextFeatures
from conflictscope.methods.feed_forward_suppression import FeedForwardSuppression
from conflictscope.methods.gate import Gate
from conflictscope.methods.gated_scales import GatedScales
from conflictscope.methods.greedy_pruning import GreedyPruning
from conflictscope.methods.hard_concrete import HardConcrete
from conflictscope.methods.instruction import Instruction
from conflictscope.methods.juice import JudgeHeads
from conflictscope.methods.learned_scales import LearnedScales
from conflictscope.methods.mean_ablation import MeanAblation
from conflictscope.methods.opinion import Opinion
from conflictscope.methods.other_answers import OtherAnswers
from conflictscope.methods.probe_direction import ProbeDirection
from conflictscope.methods.pruning import Pruning
from conflictscope.methods.spare import Spare
from conflictscope.methods.spare_ablations import SpareAddOnly, SpareConstant, SpareRemoveOnly
from conflictscope.methods.task_vector import TaskVector
from conflictscope.methods.value_scaling import ValueScaling
from conflictscope.study.method import Method

ALL: tuple[type[Method], ...] = (
    ValueScaling,
    MeanAblation,
    Pruning,
    GreedyPruning,
    LearnedScales,
    GatedScales,
    HardConcrete,
    OtherAnswers,
    FeedForwardSuppression,
    ActAdd,
    CAA,
    ContextFocus,
    ProbeDirection,
    TaskVector,
    Spare,
    SpareRemoveOnly,
    SpareAddOnly,
    SpareConstant,
    ContextFeatures,
    ContextAwareDecoding,
    AdaptiveContextAwareDecoding,
    EntropyConstraintDecoding,
    KnowledgePlug,
    RetrievalHeadContrast,
    JudgeHeads,
    LayerContrast,
    Instruction,
    Opinion,
    Demonstrations,
    Gate,
)
