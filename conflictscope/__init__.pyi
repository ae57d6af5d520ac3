from conflictscope.study.record import StudyRecord as StudyRecord
from interp.activations import record as record
from interp.attribution.attribution_patching import attribution_patching as attribution_patching
from interp.attribution.direct_logits import direct_logit_attribution as direct_logit_attribution
from interp.attribution.path_patching import path_patching as path_patching
from interp.attribution.scores import top_heads as top_heads
from interp.conflicts import ConflictExample as ConflictExample
from interp.conflicts import ConflictSet as ConflictSet
from interp.errors import Caution as Caution
from interp.errors import UserError as UserError
from interp.evaluation import measure_usage as measure_usage
from interp.facts import build_conflicts as build_conflicts
from interp.facts import known_facts as known_facts
from interp.formats import load_dataset as load_dataset
from interp.models import load_model as load_model
from interp.sae import load_saes as load_saes
from interventions.base import applied as applied
from interventions.config import InterventionFile as InterventionFile
from interventions.dial import TrustDial as TrustDial
from interventions.heads import HeadScaling as HeadScaling
from interventions.runtime import apply as apply
from interventions.runtime import remove as remove
from interventions.steering import Steering as Steering
from probes.detector import ConflictDetector as ConflictDetector
from probes.linear import ProbeSet as ProbeSet

__version__: str
__all__: list[str]
