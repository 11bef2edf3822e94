import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from c3a_triton.errors import ConfigError, ShapeError
from c3a_triton.files.block_sizes import DEFAULT_RANK, check_block_size, suggest_block_size, valid_block_sizes


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_valid_block_sizes_are_the_common_divisors(in_features, out_features):
    expected = [b for b in range(1, min(in_features, out_features) + 1) if in_features % b == out_features % b == 0]
    assert valid_block_sizes(in_features, out_features) == expected


@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 300), st.one_of(st.none(), st.integers(1, 10**6)))
def test_suggested_size_is_the_nearest_allowed_one(in_features, out_features, rank, max_params):
    area = in_features * out_features
    allowed = [b for b in valid_block_sizes(in_features, out_features) if max_params is None or area // b <= max_params]
    if not allowed:
        least = area // math.gcd(in_features, out_features)
        with pytest.raises(ConfigError, match=f"at least {least} parameters"):
            suggest_block_size(in_features, out_features, rank=rank, max_params=max_params)
        return
    chosen = suggest_block_size(in_features, out_features, rank=rank, max_params=max_params)
    distances = {b: abs(math.log(b * rank / math.sqrt(area))) for b in allowed}
    assert chosen in allowed
    assert distances[chosen] <= min(distances.values()) + 1e-9


def test_suggested_sizes():
    assert suggest_block_size(4096, 4096, rank=32) == 128
    assert suggest_block_size(768, 3072, rank=6) == 256
    assert suggest_block_size(768, 768, rank=1) == 768
    # √(16·8)/4 = √8 lies midway between 2 and 4 on a logarithmic scale: the larger one, with fewer parameters.
    assert suggest_block_size(16, 8, rank=4) == 4
    assert suggest_block_size(4096, 4096, rank=100_000) == 1
    assert suggest_block_size(4096, 4096) == suggest_block_size(4096, 4096, rank=DEFAULT_RANK) == 256
    assert suggest_block_size(4096, 4096, max_params=8192) == 2048
    assert suggest_block_size(4096, 4096, max_params=8191) == 4096
    assert suggest_block_size(4096, 4096, rank=1, max_params=8192) == 4096
    assert suggest_block_size(4096, 4096, rank=64, max_params=8192) == 2048


@pytest.mark.parametrize(
    "arguments", [{"rank": 0}, {"rank": True}, {"rank": 2.0}, {"max_params": 0}, {"max_params": -1}]
)
def test_suggestion_refuses_what_is_no_number_of_something(arguments):
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        suggest_block_size(64, 64, **arguments)
    with pytest.raises(ShapeError, match="in_features=0"):
        suggest_block_size(0, 64)


def test_check_block_size_names_layer_widths_and_sizes_nearby():
    check_block_size(64, 768, 3072, "model.fc")
    with pytest.raises(
        ShapeError, match=r"model\.fc: .*100 .*in_features=768.*out_features=3072.*64, 96, 128, 192.*768"
    ):
        check_block_size(100, 768, 3072, "model.fc")
    with pytest.raises(ShapeError, match=r"does not divide out_features=96 \("):
        check_block_size(64, 128, 96, "fc")
    with pytest.raises(ConfigError, match="fc: block_size must be a positive"):
        check_block_size(0, 128, 96, "fc")
