"""Poolers are dropped where no forward pass needs them, and nowhere else."""

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from tiny_models import bert_config
from torch import nn

from optin_deploy.models import checkpoint
from optin_deploy.models.transformers_models import NoPooler, ready, without_pooler
from optin_deploy.models.transformers_models import network_of as network_around
from optin_deploy.network import Source
from optin_deploy.structure.plan import Plan

TEXT = {
    "vocab_size": 44,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
}
PICTURES = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
EFFICIENT = {
    "image_size": 32,
    "width_coefficient": 0.25,
    "depth_coefficient": 0.1,
    "hidden_dim": 320,
}
MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bert": (lambda: hf.BertModel(bert_config()), "dropped"),
    "roberta": (lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT | {"pad_token_id": 1})), "dropped"),
    "albert": (lambda: hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)), "dropped"),
    "vit": (lambda: hf.ViTModel(hf.ViTConfig(**PICTURES)), "dropped"),
    "swin": (
        lambda: hf.SwinModel(
            hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
        ),
        "dropped",
    ),
    "squeezebert": (lambda: hf.SqueezeBertModel(hf.SqueezeBertConfig(**TEXT, embedding_size=32)), "called"),
    "layoutlm": (lambda: hf.LayoutLMModel(hf.LayoutLMConfig(**TEXT, max_2d_position_embeddings=64)), "called"),
    "efficientnet": (lambda: hf.EfficientNetModel(hf.EfficientNetConfig(**EFFICIENT)), "needed"),
}


@pytest.mark.parametrize("name", MODELS)
def test_poolers(name: str) -> None:
    torch.manual_seed(0)
    make, kind = MODELS[name]
    module = make().float().eval()
    pooler = module.pooler
    source = Source("transformers", type(module).__name__, module.config.to_dict())
    generator = torch.random.get_rng_state()
    state = {n: t.clone() for n, t in module.state_dict().items()}
    inputs: dict[str, torch.Tensor]
    network = network_around(ready(module), source, "random", None, 8)
    inputs = dict(network.inputs)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert {"dropped": module.pooler is None, "called": isinstance(module.pooler, NoPooler)}.get(
        kind, module.pooler is pooler
    )
    needed = kind == "needed"
    assert list(network.outputs) == ["last_hidden_state", *["pooler_output"] * needed]
    assert needed or not [n for n in network.module.state_dict() if "pooler" in n]
    assert all(torch.equal(t, state[n]) for n, t in network.module.state_dict().items())
    whole = make().float().eval()
    whole.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(network.forward(inputs)["last_hidden_state"], whole(**inputs).last_hidden_state)


@pytest.mark.parametrize("name", ["squeezebert", "efficientnet"])
def test_a_checkpoint_has_the_pooler_that_was_there(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("own") / "own"
    module = MODELS[name][0]().float().eval()
    source = Source("transformers", type(module).__name__, module.config.to_dict())
    network = network_around(ready(module), source, "random", None, 8)
    checkpoint.save(network, Plan({}), path)
    again = checkpoint.load_network(path)
    assert type(again.module.pooler) is type(network.module.pooler)
    for key, output in network.forward(network.inputs).items():
        assert torch.equal(again.forward(network.inputs)[key], output)


def test_a_network_that_cannot_be_tried_loses_its_pooler() -> None:
    module = hf.BrosModel(hf.BrosConfig(**TEXT))
    assert without_pooler(module).pooler is None
