"""The kinds of edits that a file can hold, by themselves or behind a gate: a new kind is added here.

Each kind's entry is in the module of the kind.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from interventions.decoding import AdaCADEntry, CADEntry, CKPlugEntry, COIECDEntry
from interventions.decore import DeCoReEntry
from interventions.dial import TrustDialEntry
from interventions.dola import DoLaEntry
from interventions.features import FeatureEditEntry
from interventions.feedforward import FeedForwardScalingEntry
from interventions.heads import HeadScalingEntry
from interventions.juice import JuICEEntry
from interventions.steering import SteeringEntry

EditEntry = Annotated[
    HeadScalingEntry
    | FeedForwardScalingEntry
    | TrustDialEntry
    | SteeringEntry
    | FeatureEditEntry
    | CADEntry
    | AdaCADEntry
    | COIECDEntry
    | CKPlugEntry
    | JuICEEntry
    | DeCoReEntry
    | DoLaEntry,
    Field(discriminator="kind"),
]
