import pytest
import tiny

from optin_deploy.config.recipe import Recipe
from optin_deploy.latency import target as targets
from optin_deploy.latency.block_stacks import block_types
from optin_deploy.latency.tables import even_sizes, spread_sizes, table_key, table_points
from optin_deploy.latency.target import LatencySettings, Target, target_of

COARSE = LatencySettings(depth=2, sizes=2, sizes_within_step=(), head_counts=1, head_widths=2)


@pytest.mark.parametrize(
    ("units", "settings", "expected"),
    [
        (24, COARSE, [0, 12, 24]),
        (24, LatencySettings(sizes_within_step=()), list(range(0, 25, 2))),
        # From 64 units on, steps are multiples of 16.
        (256, COARSE, [0, 128, 256]),
        (64, LatencySettings(), [0, 16, 32, 48, 64]),
        # Within a step of 128, from its beginning at the middle of the range.
        (
            1536,
            LatencySettings(sizes_within_step=(16, 96, 128)),
            [*range(0, 769, 128), 784, 864, *range(896, 1537, 128)],
        ),
    ],
)
def test_even_sizes(units: int, settings: LatencySettings, expected: list[int]) -> None:
    assert even_sizes(units, settings) == expected


def test_spread_sizes() -> None:
    assert spread_sizes(12, 3) == [0, 4, 8, 12]
    assert spread_sizes(2, 3) == [0, 1, 2]


def test_every_group_is_measured_below_its_own_size() -> None:
    structure = tiny.structure("vit")
    for group in structure.groups:
        if group.parent is None:
            width = structure.child(group.name)
            points = table_points(structure, group, COARSE)
            assert points[0].units == 0 and points[0].sizes == {group.name: 0}
            assert (group.units, width.units if width else None) not in [(p.units, p.width) for p in points]


def test_settings_are_those_of_the_target_and_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "DEFAULT_SETTINGS", COARSE)
    assert target_of(Recipe(model="mine", runtimes=("ort-cpu",), threads=1)).settings == COARSE
    network = tiny.network("vit")
    kind = block_types(network.module, tiny.structure("vit"), network.inputs)[0]
    keys = [table_key(kind, Target("ort-cpu", 1, 1, settings=settings)) for settings in (COARSE, LatencySettings())]
    assert [key["depth"] for key in keys] == [2, 3]
    assert keys[0] == {**keys[1], "depth": 2}
