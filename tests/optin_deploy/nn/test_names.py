from torch import nn

from optin_deploy.nn.names import child, contains, is_inside, join


def test_join_leaves_out_empty_parts() -> None:
    assert join("", "blocks", "0") == "blocks.0"
    assert join("blocks", "") == "blocks"


def test_child_follows_dots_and_returns_none_for_what_is_no_module() -> None:
    module = nn.Sequential(nn.Sequential(nn.Linear(1, 1)))
    assert child(module, "0.0") is module[0][0]
    assert child(module, "0.1") is child(module, "0.0.weight") is None


def test_names_that_begin_alike_are_not_inside_each_other() -> None:
    assert contains("blocks.1", "blocks.1.attn")
    assert not contains("blocks.1", "blocks.1")
    assert is_inside("blocks.1", "blocks.1")
    assert not is_inside("blocks.10", "blocks.1")
