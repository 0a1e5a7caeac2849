"""Which earlier positions a query attends to: full causal attention and the patterns that leave most of it out.

Masks are one way to sparsify a GPT, attention is the other. MST's hybrid sparse attention trains with `LocalOrStrided` in the
sparse phases and with `Full` in the last (arXiv:2408.11746); the patterns are those of the Sparse Transformer
(arXiv:1904.10509, with one summary column a block); GPT-3 alternates full and local layers (arXiv:2005.14165, section 2.1).

Positions count from the start of the row, so packed documents and right padding are treated as full attention treats them.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from raysparse.config import Config

if TYPE_CHECKING:
    from torch import Tensor

_NEVER = 2**31 - 1
"""A distance that no two positions have; it fits an int32."""

Span = Annotated[int, Field(ge=1, lt=_NEVER)]


class Rule(NamedTuple):
    """Four numbers that say every pattern. Query q attends to key k <= q where any of these holds::

        near      q - k < width
        strided   (q - k) mod stride = 0
        block     floor(q / block) = floor(k / block)
        column    k mod column = column - 1

    The defaults allow q = k alone. The numbers are ints, or integer tensors that broadcast with q and k: one formula serves a
    mask of one pattern, a mask with a pattern for each head, and the kernels on a GPU that evaluate it in their inner loop.
    """

    width: "int | Tensor" = 1
    stride: "int | Tensor" = _NEVER
    block: "int | Tensor" = 1
    column: "int | Tensor" = _NEVER

    def allows(self, q: Any, k: Any) -> Any:
        """Bool, as q and k broadcast. q, k: positions from 0 on, ints or integer tensors."""
        near, strided = q - k < self.width, (q - k) % self.stride == 0
        block, column = q // self.block == k // self.block, k % self.column == self.column - 1
        return (q >= k) & (near | strided | block | column)


class Pattern(Config, ABC):
    """The same in every layer and head."""

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """The pattern in numbers."""

    @abstractmethod
    def num_pairs(self, length: int) -> int:
        """Allowed pairs (q, k) among the first `length` positions."""

    def allows(self, q: Any, k: Any) -> Any:
        """Whether q attends to k; see `Rule.allows`."""
        return self.rule.allows(q, k)

    def density(self, length: int) -> float:
        """Allowed pairs as a share of those of full causal attention, ``length (length + 1) / 2``."""
        return self.num_pairs(length) / Full().num_pairs(length)

    def of(self, layer: int, head: int) -> "Pattern":
        return self

    def mean_density(self, length: int, layers: int, heads: int) -> float:
        """`density` over all layers and heads."""
        return self.density(length)


class Full(Pattern):
    """Every earlier key and its own: causal attention."""

    type: Literal["full"] = "full"

    @property
    def rule(self) -> Rule:
        return Rule(width=_NEVER)

    def num_pairs(self, length: int) -> int:
        return length * (length + 1) // 2


class Local(Pattern):
    """The nearest keys: ``q - k < width``."""

    type: Literal["local"] = "local"
    width: Span = 128
    """Keys that a query attends to, its own included."""

    @property
    def rule(self) -> Rule:
        return Rule(width=self.width)

    def num_pairs(self, length: int) -> int:
        near = min(self.width, length)
        return near * (near + 1) // 2 + (length - near) * near


class Strided(Pattern):
    """Every stride-th key back from its own: ``(q - k) mod stride = 0``."""

    type: Literal["strided"] = "strided"
    stride: Span = 128
    """Positions from one key to the next."""

    @property
    def rule(self) -> Rule:
        return Rule(stride=self.stride)

    def num_pairs(self, length: int) -> int:
        return length + _sum_of_quotients(length, self.stride)


class LocalOrStrided(Pattern):
    """`Local` or `Strided`: the Sparse Transformer's strided pattern in one head, MST's pattern of the sparse phases."""

    type: Literal["local_or_strided"] = "local_or_strided"
    width: Span = 128
    """Nearest keys that a query attends to, its own included."""
    stride: Span = 128
    """Positions from one of the farther keys to the next."""

    @property
    def rule(self) -> Rule:
        return Rule(width=self.width, stride=self.stride)

    def num_pairs(self, length: int) -> int:
        near = min(self.width, length)  # beyond them, query q sees the multiples of stride in [near, q]
        farther = _sum_of_quotients(length, self.stride) - _sum_of_quotients(near, self.stride)
        return Local(width=self.width).num_pairs(length) + farther - (length - near) * ((near - 1) // self.stride)


class Fixed(Pattern):
    """The query's own block of `width` positions so far, and the last position of each earlier block."""

    type: Literal["fixed"] = "fixed"
    width: Span = 128
    """Positions in a block."""

    @property
    def rule(self) -> Rule:
        return Rule(block=self.width, column=self.width)

    def num_pairs(self, length: int) -> int:
        whole, rest = divmod(length, self.width)
        own = whole * Full().num_pairs(self.width) + Full().num_pairs(rest)
        return own + _sum_of_quotients(length, self.width)


AnyPattern = Annotated[Full | Local | Strided | LocalOrStrided | Fixed, Field(discriminator="type")]


class ByHead(Config):
    """Another pattern in each head of a layer."""

    type: Literal["by_head"] = "by_head"
    heads: tuple[AnyPattern, ...] = Field(min_length=1)
    """Repeated over the heads: with two patterns, heads 0, 2, 4 ... have the first."""

    def of(self, layer: int, head: int) -> Pattern:
        """The pattern of one head."""
        return self.heads[head % len(self.heads)]

    def mean_density(self, length: int, layers: int, heads: int) -> float:
        """`Pattern.density` over all heads."""
        return sum(self.of(0, head).density(length) for head in range(heads)) / heads


class ByLayer(Config):
    """Another pattern in each layer."""

    type: Literal["by_layer"] = "by_layer"
    layers: tuple[Annotated[AnyPattern | ByHead, Field(discriminator="type")], ...] = Field(min_length=1)
    """Repeated over the layers: GPT-3 has [{type: full}, {type: local}]."""

    def of(self, layer: int, head: int) -> Pattern:
        """The pattern of one head of one layer."""
        return self.layers[layer % len(self.layers)].of(layer, head)

    def mean_density(self, length: int, layers: int, heads: int) -> float:
        """`Pattern.density` over all layers and heads."""
        each = [layer.mean_density(length, layers, heads) for layer in self.layers]
        return sum(each[layer % len(each)] for layer in range(layers)) / layers


AnyAttention = Annotated[AnyPattern | ByHead | ByLayer, Field(discriminator="type")]


def _sum_of_quotients(length: int, stride: int) -> int:
    """Sum of ``floor(q / stride)`` over q < length."""
    whole, rest = divmod(length, stride)
    return stride * whole * (whole - 1) // 2 + rest * whole
