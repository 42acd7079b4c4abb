"""The reward of a pool's candidates: the model is asked about all rivals at one noise level, then about the hardest."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mitune.information.reward import FURTHER, LOOK, hardest, reward
from mitune.prompts.rivals import NEGATIVES, WIDER

if TYPE_CHECKING:
    from mitune.pool.scores import Candidates

RIVALS = (NEGATIVES, WIDER)
ONLINE = "self-confidence-late"  # the part of the reward that comes free


def reward_of(candidates: Candidates) -> Tensor:
    """`reward` of each candidate, (M,), float64; NaN where one came out as NaN or was dropped."""
    confidence = candidates.online[ONLINE].double()
    places = confidence.isfinite().nonzero()[:, 0]
    look = candidates.evidence(RIVALS, LOOK, places)
    prompts = hardest(look)
    further = candidates.evidence(RIVALS, FURTHER, places, prompts)
    values = torch.full_like(confidence, math.nan)
    margins = look.at(prompts).margins + further.margins
    values[places] = reward(margins, len(look.kinds) - 1, confidence[places])
    return values
