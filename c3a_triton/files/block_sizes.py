"""Which block sizes a layer can take, and which one suits it."""

import math
from fractions import Fraction

from c3a_triton._public import public
from c3a_triton.errors import ConfigError, ShapeError

from .values import described, is_positive_int, plain

__all__ = ["DEFAULT_RANK", "check_block_size", "suggest_block_size", "valid_block_sizes"]

# What `suggest_block_size` assumes when it is given neither a rank nor a number of parameters: at 4096 × 4096 features
# it leads to the default block size of 256.
DEFAULT_RANK = 16


@public
def valid_block_sizes(in_features: int, out_features: int) -> list[int]:
    """The block sizes that a layer of these widths can take: the common divisors, ascending.

    Raises:
        ShapeError: a width that is not a positive integer.
    """
    in_features, out_features = plain(in_features), plain(out_features)
    if not (is_positive_int(in_features) and is_positive_int(out_features)):
        raise ShapeError(
            f"widths must be positive integers, got in_features={in_features!r}, out_features={out_features!r}"
        )
    common = math.gcd(in_features, out_features)
    small = [divisor for divisor in range(1, math.isqrt(common) + 1) if common % divisor == 0]
    return small + [common // divisor for divisor in reversed(small) if divisor * divisor != common]


@public
def suggest_block_size(
    in_features: int, out_features: int, *, rank: int | None = None, max_params: int | None = None
) -> int:
    """The block size for a layer by the rule of C3A's authors, for a given LoRA rank, a parameter budget, or both.

    With `rank`, the common divisor b of both widths that is nearest to √(in·out)/rank, that is with the smallest
    |log(b·rank/√(in·out))|; of two equally near ones the larger (fewer parameters). The layer then has about
    rank·√(in·out) parameters (in·out/b exactly), half of what LoRA of this rank has on a square layer.
    With `max_params`, only block sizes with in·out/b ≤ max_params count. Alone it gives the smallest of them, the most
    parameters that the budget allows. With neither, `rank` is `DEFAULT_RANK`.

    Raises:
        ConfigError: a rank or budget that is not a positive integer, or a budget that no block size meets.
        ShapeError: a width that is not a positive integer.
    """
    sizes = valid_block_sizes(in_features, out_features)
    in_features, out_features, rank, max_params = map(plain, (in_features, out_features, rank, max_params))
    for name, value in (("rank", rank), ("max_params", max_params)):
        if value is not None and not is_positive_int(value):
            raise ConfigError(f"{name} must be a positive integer or None, got {described(value)}")
    area = in_features * out_features
    if max_params is not None:
        if area // sizes[-1] > max_params:
            raise ConfigError(
                f"a layer with in_features={in_features} and out_features={out_features} needs at least "
                f"{area // sizes[-1]} parameters (block size {sizes[-1]}), more than max_params={max_params}"
            )
        sizes = [size for size in sizes if area // size <= max_params]
        if rank is None:
            return sizes[0]
    rank = DEFAULT_RANK if rank is None else rank

    def distance(size: int) -> Fraction:
        # The squared ratio to √(in·out)/rank, or its inverse, whichever is above one: exact, so that ties are ties.
        squared = Fraction((size * rank) ** 2, area)
        return max(squared, 1 / squared)

    return min(reversed(sizes), key=distance)


def check_block_size(block_size: int, in_features: int, out_features: int, layer: str) -> None:
    """Refuses a block size that a layer cannot take.

    Raises:
        ConfigError: it is not a positive integer.
        ShapeError: it does not divide both widths; the message names the layer and the nearest sizes that do.
    """
    block_size = plain(block_size)
    if not is_positive_int(block_size):
        raise ConfigError(f"{layer}: block_size must be a positive integer, got {described(block_size)}")
    wrong = [
        f"{name}={width}"
        for name, width in (("in_features", in_features), ("out_features", out_features))
        if width % block_size
    ]
    if not wrong:
        return
    sizes = valid_block_sizes(in_features, out_features)
    nearby = [size for size in sizes if size < block_size][-2:] + [size for size in sizes if size > block_size][:2]
    raise ShapeError(
        f"{layer}: block_size={block_size} does not divide {' or '.join(wrong)} "
        f"(in_features={in_features}, out_features={out_features}); valid sizes nearby: {', '.join(map(str, nearby))}; "
        f"the largest is {sizes[-1]}"
    )
