import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optin_deploy.criteria import packed_symmetric

pytestmark = pytest.mark.slow


sizes = st.integers(1, 5) | st.integers(120, 400)


@given(size=sizes, rows=st.integers(1, 9))
def test_grams_add_up_in_strips(size: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(size)
    strips = packed_symmetric.zeros(size, torch.device("cpu"))
    expected = torch.zeros(size, size, dtype=torch.float64)
    for _ in range(2):
        x = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        weights = torch.rand(rows, generator=generator, dtype=torch.float64)
        packed_symmetric.add_gram(strips, x, weights)
        expected += x.T @ weights.diag() @ x
    torch.testing.assert_close(packed_symmetric.unpack(strips, size), expected)


def test_little_more_than_half_is_kept() -> None:
    assert len(packed_symmetric.zeros(1537, torch.device("cpu"))) < 0.55 * 1537**2
