"""Merging words against a slow, obvious reference: one word after the other."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optin_deploy.tokens.matching import unmerge_tokens
from optin_deploy.tokens.text_matching import (
    match_text_tokens,
    merge_text_tokens,
    text_matching_flops,
    text_merging_flops,
)

# Tokens, of which words, prefix, and how many leave.
CASES = st.tuples(st.integers(6, 20), st.integers(0, 2)).flatmap(
    lambda size: st.tuples(
        st.just(size[0]),
        st.integers(size[1] + 1, size[0]),
        st.just(size[1]),
        st.integers(0, (size[0] - size[1]) // 2),
    )
)


def drawn(tokens: int, words: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what they are compared by, and sizes, of three texts of so many words."""
    made = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 5, (3, tokens, 1), generator=made).float()
    sizes[:, words:] = 0
    return torch.randn(3, tokens, 6, generator=made), torch.randn(3, tokens, 4, generator=made), sizes


def slowly(metric: Tensor, words: int, prefix: int, count: int) -> list[list[int]]:
    """The sets of words of one text that become one, then the padding that is left."""
    padding = list(range(words, len(metric)))
    # Of padding the first leaves first.
    padding, count = padding[count:], max(0, count - len(padding))
    b, a = list(range(prefix, words))[0::2], list(range(prefix, words))[1::2]
    alike = {(i, j): float(F.cosine_similarity(metric[i], metric[j], dim=0)) for i in a for j in b}
    similar = {i: max(b, key=lambda j: (alike[i, j], -j)) for i in a}
    leaving = set(sorted(a, key=lambda i: -alike[i, similar[i]])[:count])
    sets = [[j, *(i for i in leaving if similar[i] == j)] for j in range(words) if j not in leaving]
    return [*sets, *([j] for j in padding)]


@given(case=CASES)
def test_padding_leaves_first_and_then_the_most_similar_words(case: tuple[int, int, int, int]) -> None:
    tokens, words, prefix, count = case
    x, metric, sizes = drawn(tokens, words)
    moved = match_text_tokens(metric, sizes, prefix, count)
    found, left = merge_text_tokens(x, sizes, moved, tokens - count)
    assert found.shape == (3, tokens - count, 6) and found.isfinite().all()
    for sample in range(3):
        expected = slowly(metric[sample], words, prefix, count)
        assert len(expected) == tokens - count
        for row, members in enumerate(expected):
            together = float(sizes[sample, members].sum())
            assert float(left[sample, row, 0]) == together
            if together:
                share = sizes[sample, members] / together
                torch.testing.assert_close(
                    found[sample, row], (x[sample, members] * share).sum(0), atol=1e-5, rtol=1e-5
                )
                assert all(int(moved[sample, i]) == row for i in members)
    # What padding holds is nowhere to be seen.
    others = torch.where(sizes > 0, x, torch.full_like(x, 7.0))
    again, _ = merge_text_tokens(others, sizes, moved, tokens - count)
    assert torch.equal(unmerge_tokens(again, moved)[:, :words], unmerge_tokens(found, moved)[:, :words])


def test_flops_are_those_of_the_products() -> None:
    assert text_matching_flops(9, 1, 2) == 2 * 8 * 8 * 2
    # 6 of 9 tokens are left, each a sum over all, of 5 features and a size.
    assert text_merging_flops(9, 3, 5) == 2 * 6 * 9 * 6
    assert text_merging_flops(9, 0, 5) == 0


def test_in_half_precision_the_same_words_match() -> None:
    _, metric, sizes = drawn(40, 36)
    low = (1 + 0.03 * metric).half()
    assert torch.equal(match_text_tokens(low, sizes.half(), 1, 12), match_text_tokens(low.float(), sizes, 1, 12))
