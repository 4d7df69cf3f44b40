"""Ways to heal a compressed model without labels: ONE file each.

refit solves the factors again in closed form, blocks trains each block to give what the dense block gives, distill
trains the whole model to give the dense model's answers. panther.heal says which run, and for how long.
"""

from panther.healers.blocks import heal_blocks
from panther.healers.distill import distill
from panther.healers.refit import refit
from panther.healers.training import Limits

__all__ = ["Limits", "distill", "heal_blocks", "refit"]
