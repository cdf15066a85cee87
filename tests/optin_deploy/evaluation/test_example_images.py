"""Pictures of dense predictions, and how alike maps are."""

import base64
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from optin_deploy.data.preprocessing import ImagePreprocessing
from optin_deploy.evaluation.agreement import agreement, correlation
from optin_deploy.evaluation.example_images import MOST, is_map, pictures
from optin_deploy.models.custom import custom_network
from optin_deploy.network import Network


class Maps(nn.Module):
    """Gives for each image what ``make`` makes of its first channel."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, image: Tensor) -> Tensor:
        return self.make(image[:, :1])


def images(count: int = 6, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def network(make: Callable[[Tensor], Tensor], logits: str | None = None, size: int = 16) -> Network:
    # Without normalisation the picture is what went in.
    preprocessing = ImagePreprocessing("image", (size, size), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return custom_network(Maps(make), {"image": images(2, size)}, logits=logits, preprocessing=preprocessing)


def pixels(png: str | None) -> np.ndarray:
    assert png is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def classes(x: Tensor) -> Tensor:
    return torch.cat([x, 1 - x, 0.6 + 0 * x], dim=1)


def test_the_same_network_gives_the_same_pictures_and_another_does_not() -> None:
    dense = network(lambda x: x)
    found = pictures(dense, dense.module, [{"image": images()}])
    assert len(found) == MOST
    assert all(p.dense == p.pruned for p in found)
    assert len({p.dense for p in found}) == MOST
    image = images()[0].permute(1, 2, 0).numpy()
    assert np.abs(pixels(found[0].image) / 255 - image).max() <= 0.5 / 255 + 1e-6
    other = pictures(dense, Maps(lambda x: x.flip(-1)), [{"image": images()}])
    assert all(p.dense != p.pruned for p in other)
    # One scale of colours for both: a shifted map has other ones.
    shifted = pictures(dense, Maps(lambda x: x + 0.3), [{"image": images()}])
    assert all(p.dense != p.pruned for p in shifted)


def test_samples_are_taken_over_batches() -> None:
    dense = network(lambda x: x)
    apart = pictures(dense, dense.module, [{"image": part} for part in images().split(1)])
    assert apart == pictures(dense, dense.module, [{"image": images()}])


def test_classes_are_drawn_by_the_most_likely_one() -> None:
    dense = network(classes, logits="output")
    (first, *_) = pictures(dense, dense.module, [{"image": images()}])
    drawn, most_likely = pixels(first.dense), classes(images()[:1, :1]).argmax(1)[0].numpy()
    for number in range(3):
        assert len(np.unique(drawn[most_likely == number], axis=0)) == 1
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 3


def test_large_maps_are_made_smaller() -> None:
    dense = network(lambda x: x, size=400)
    (first, *_) = pictures(dense, dense.module, [{"image": images(1, 400)}])
    assert pixels(first.dense).shape == pixels(first.image).shape == (192, 192, 3)


@pytest.mark.parametrize(
    "make",
    [lambda x: x.flatten(1), lambda x: x.flatten(2).transpose(1, 2), classes, lambda x: x[..., :4, :4]],
)
def test_other_outputs_are_not_drawn(make: Callable[[Tensor], Tensor]) -> None:
    dense = network(make)
    assert not is_map(dense, "output", dense.forward({"image": images()})["output"])
    assert pictures(dense, dense.module, [{"image": images()}]) == []
    (found,) = agreement(dense, dense.module, [{"image": images()}])
    assert found.correlation is None


def test_without_preprocessing_there_is_no_input_to_show() -> None:
    dense = custom_network(Maps(lambda x: x), {"image": images()})
    assert all(p.image is None for p in pictures(dense, dense.module, [{"image": images()}]))


def test_correlation_against_numpy() -> None:
    a, b = images()[:, :1], images().flip(0)[:, 1:2] + 0.5 * images()[:, :1]
    expected = [np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert correlation(a, b).numpy() == pytest.approx(np.array(expected), abs=1e-6)
    assert correlation(a, torch.ones_like(a)).abs().max() < 1e-6
    dense = network(lambda x: x)
    (found,) = agreement(dense, Maps(lambda x: x * 2 - 1), [{"image": part} for part in images().split(4)])
    assert found.correlation == pytest.approx(1.0, abs=1e-6)


def test_equal_classes_are_counted_pixel_by_pixel() -> None:
    dense = network(classes, logits="output")
    other = Maps(lambda x: classes(x).flip(1))
    (found,) = agreement(dense, other, [{"image": images()}])
    first, second = (m(images()).argmax(1) for m in (dense.module, other))
    assert found.top1_agreement == pytest.approx(float((first == second).double().mean()))
    assert found.correlation is None
