import re

import pytest
import tiny
import transformers
from torch import nn

from optin_deploy.structure.adapters.transformers_attention import attention
from optin_deploy.structure.groups import Group, LeftDense

pytestmark = pytest.mark.slow


def bert_layer() -> nn.Module:
    return tiny.network("bert").module.encoder.layer[0]


def adapted_attention(module: nn.Module, parent: nn.Module) -> Group | LeftDense | None:
    return attention("block.self", module, "block", parent)


def with_attribute(name: str, value: object) -> nn.Module:
    module = transformers.models.bert.modeling_bert.BertSelfAttention(tiny.network("bert").module.config)
    if value is None:
        delattr(module, name)
    else:
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("num_attention_heads", 3, "for 3 heads of 4"),
        ("attention_head_size", 3, "for 4 heads of 3"),
        ("key", nn.Linear(16, 8), "for 4 heads of 4"),
    ],
)
def test_attentions_that_cannot_be_followed_are_left_dense(name: str, value: object, reason: str) -> None:
    given = adapted_attention(with_attribute(name, value), bert_layer().attention)
    assert isinstance(given, LeftDense)
    assert given.module == "block.self"
    assert re.search(reason, given.reason)


@pytest.mark.parametrize("name", ["num_attention_heads", "attention_head_size"])
def test_one_of_number_and_width_of_heads_tells_the_other(name: str) -> None:
    given = adapted_attention(with_attribute(name, None), bert_layer().attention)
    assert isinstance(given, Group)
    assert (given.units, given.width) == (4, 4)


def test_without_number_and_width_of_heads_an_attention_is_left_dense() -> None:
    module = with_attribute("num_attention_heads", None)
    del module.attention_head_size
    given = adapted_attention(module, bert_layer().attention)
    assert isinstance(given, LeftDense)
    assert re.search(r"number of its heads", given.reason)


def test_query_heads_that_share_a_key_leave_together() -> None:
    config = transformers.LlamaConfig(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4)
    given = attention("a", transformers.models.llama.modeling_llama.LlamaAttention(config, 0), "", nn.Module())
    assert isinstance(given, Group)
    assert (given.units, given.width) == (2, 8)
    assert [side.widths for side in given.sides] == [(8,), (4,), (4,), ()]
    assert given.qkv is None


def test_an_attention_without_an_output_projection_is_left_dense() -> None:
    given = adapted_attention(bert_layer().attention.self, nn.Module())
    assert isinstance(given, LeftDense)
    assert "output projection" in given.reason


def test_modules_of_other_libraries_are_not_touched() -> None:
    class Lookalike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out_proj = (nn.Linear(4, 4) for _ in range(4))

    assert attention("intermediate", Lookalike(), "", nn.Module()) is None
