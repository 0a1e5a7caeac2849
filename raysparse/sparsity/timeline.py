"""The phases of a run in order: how long, how sparse, by which rule, with which attention."""

from pydantic import Field

from raysparse.config import Config
from raysparse.length import Length
from raysparse.sparsity.attention import AnyAttention, Full
from raysparse.sparsity.curve import AnyCurve, Constant
from raysparse.sparsity.evolution import AnyEvolution


class Phase(Config):
    """A named span of steps; MST's are warm_up, ultra_sparsification and restoration (arXiv:2408.11746)."""

    name: str = Field("training", pattern=r"^[a-z][a-z0-9_]*$")
    """In logs and plots."""
    length: Length = "100 %"
    """Of the phase: '60_000 steps', '30B tokens' or '10 %' of the run; all phases add up to the run."""
    sparsity: AnyCurve = Constant()
    """Share of sparsity.target over the phase: {type: constant}, polynomial, cosine or table."""
    evolution: AnyEvolution | None = None
    """The rule of this phase; null: sparsity.evolution."""
    attention: AnyAttention = Full()
    """Which keys a query sees: {type: full}, local, strided, local_or_strided, fixed, by_head or by_layer."""
