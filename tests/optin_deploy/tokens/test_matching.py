"""Merging against slow, obvious references: one token after the other, and means over groups."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optin_deploy.tokens.matching import (
    biases_between,
    match_tokens,
    matching_flops,
    merge_original_positions,
    merge_tokens,
    merging_flops,
    most_mergeable,
    unmerge_tokens,
)

COUNTS = st.tuples(st.integers(6, 24), st.integers(0, 3)).flatmap(
    lambda size: st.tuples(st.just(size[0]), st.just(size[1]), st.integers(1, most_mergeable(*size)))
)


def drawn(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, what they are compared by, and sizes, of three samples."""
    made = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (3, tokens, 1), generator=made).float()
    return torch.randn(3, tokens, 6, generator=made), torch.randn(3, tokens, 4, generator=made), sizes


def slowly(metric: Tensor, prefix: int, count: int) -> list[list[int]]:
    """The sets of tokens of one sample that become one, by the words of the paper."""
    patches = range(prefix, len(metric))
    b, a = list(patches)[0::2], list(patches)[1::2]
    similar = {i: max(b, key=lambda j: (float(F.cosine_similarity(metric[i], metric[j], dim=0)), -j)) for i in a}
    by = sorted(a, key=lambda i: -float(F.cosine_similarity(metric[i], metric[similar[i]], dim=0)))
    leaving = set(by[:count])
    joined = [[j, *(i for i in a if i in leaving and similar[i] == j)] for j in b]
    return [[i] for i in range(prefix)] + [[i] for i in a if i not in leaving] + joined


@given(sizes=COUNTS)
def test_the_most_similar_tokens_become_their_weighted_mean(sizes: tuple[int, int, int]) -> None:
    tokens, prefix, count = sizes
    x, metric, weights = drawn(tokens)
    match = match_tokens(metric, prefix, count)
    found, left = merge_tokens(x, weights, match)
    assert found.shape == (3, tokens - count, 6)
    for sample in range(3):
        for row, members in enumerate(slowly(metric[sample], prefix, count)):
            share = weights[sample, members] / weights[sample, members].sum()
            torch.testing.assert_close(found[sample, row], (x[sample, members] * share).sum(0), atol=1e-5, rtol=1e-5)
            assert float(left[sample, row, 0]) == float(weights[sample, members].sum())
            assert all(int(match.moved[sample, i]) == row for i in members)


@given(sizes=COUNTS)
def test_every_token_gets_back_what_it_was_merged_into(sizes: tuple[int, int, int]) -> None:
    tokens, prefix, count = sizes
    x, metric, _ = drawn(tokens)
    match = match_tokens(metric, prefix, count)
    found, left = merge_tokens(x, torch.ones(3, tokens, 1), match)
    back = unmerge_tokens(found, match.moved)
    assert back.shape == x.shape
    # Of sizes 1, the mean over all tokens stays what it was.
    torch.testing.assert_close(back.mean(1), x.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((found * left).sum(1), x.sum(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back[:, :prefix], x[:, :prefix])


def test_of_equals_the_earlier_one_leaves_and_takes() -> None:
    match = match_tokens(torch.ones(1, 9, 2), 1, 2)
    assert match.staying.tolist() == [[0, 6, 8]]
    assert match.leaving.tolist() == [[2, 4]]
    assert match.joining[0].nonzero().tolist() == [[0, 0], [0, 1]]
    assert match.moved.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]


def test_flops_are_those_of_the_products() -> None:
    # 4 tokens a side; similarities of 2 features; 3 added to 4, of 6 features and a size.
    assert matching_flops(9, 1, 2) == 2 * 4 * 4 * 2
    assert merging_flops(9, 1, 3, 6) == 2 * 4 * 3 * 7
    assert merging_flops(9, 1, 0, 6) == 0


@pytest.mark.parametrize(("tokens", "prefix", "most"), [(197, 1, 98), (198, 2, 98), (16, 0, 8), (2, 1, 0)])
def test_no_more_merge_than_have_a_partner(tokens: int, prefix: int, most: int) -> None:
    assert most_mergeable(tokens, prefix) == most


def test_biases_follow_the_tokens_that_are_left() -> None:
    """Between two tokens stands the bias between those places where the tokens of B, or those that stay, began."""
    biases = torch.randn(1, 3, 13, 13, generator=torch.Generator().manual_seed(0))
    at = torch.arange(13).expand(3, -1)
    x, metric, sizes = drawn(13)
    places = [[i] * 3 for i in range(13)]
    for count in (3, 2):
        match = match_tokens(metric, 1, count)
        # The first of a set is what the others merge into.
        groups = [slowly(metric[sample], 1, count) for sample in range(3)]
        places = [[places[group[0]][sample] for sample, group in enumerate(row)] for row in zip(*groups, strict=True)]
        at, (x, sizes) = merge_original_positions(at, match), merge_tokens(x, sizes, match)
        metric = x
    assert at.T.tolist() == places
    found = biases_between(biases, at)
    assert found.shape == (3, 3, 8, 8)
    for sample, head, i, j in product(range(3), range(3), range(8), range(8)):
        assert found[sample, head, i, j] == biases[0, head, places[i][sample], places[j][sample]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_same_tokens_match(dtype: torch.dtype) -> None:
    """Those that float32 would match of the same numbers, though most similarities round to the same."""
    _, metric, _ = drawn(64)
    low = (1 + 0.03 * metric).to(dtype)
    found, expected = match_tokens(low, 1, 12), match_tokens(low.float(), 1, 12)
    assert torch.equal(found.moved, expected.moved) and found.joining.dtype == dtype
    directions = F.normalize(low, dim=-1)
    assert (directions @ directions.transpose(1, 2)).unique().numel() < 30
