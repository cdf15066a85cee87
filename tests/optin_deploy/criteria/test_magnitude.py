import pytest
import tiny
import torch
from torch import nn

from optin_deploy.criteria.magnitude import magnitude_scores
from optin_deploy.structure.groups import CostModules, Group, LayerAxis, Structure

pytestmark = pytest.mark.slow


# Rows before and columns behind each of two units that have four features and one.
OWN_ROWS = (([0, 1, 2, 3, 8], [0, 1, 2, 3]), ([4, 5, 6, 7, 9], [4, 5, 6, 7]))


@pytest.mark.parametrize("name", ["vit", "vit_gated", "vit_qk_norm", "bert", "distilbert"])
def test_scores_are_the_squares_summed_one_weight_at_a_time(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    given = magnitude_scores(network.module, structure)
    assert list(given) == [g.name for g in structure.groups]
    for group in structure.groups:
        expected = torch.zeros(group.units, dtype=torch.float64)
        for side in group.sides:
            weight = network.module.get_parameter(f"{side.module}.weight").detach().double()
            rows = weight if side.axis == "out" else weight.T
            for part in range(len(rows) // (group.units * group.width)):
                for unit in range(group.units):
                    for feature in range(group.width):
                        expected[unit] += rows[(part * group.units + unit) * group.width + feature].square().sum()
        torch.testing.assert_close(given[group.name], expected)


def test_kernels_count_and_norms_do_not() -> None:
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3))
    sides = (LayerAxis("0", "out"), LayerAxis("1", "out"), LayerAxis("2", "in"))
    group = Group("0", "neuron", 5, 1, "2", sides, CostModules())
    given = magnitude_scores(module, Structure(("0",), (group,), 1))["0"]
    before, after = module[0].weight.detach().double(), module[2].weight.detach().double()
    expected = [float(before[u].square().sum() + after[:, u].square().sum()) for u in range(5)]
    assert given.tolist() == pytest.approx(expected)


def test_parts_may_have_units_of_different_widths() -> None:
    module = nn.Sequential(nn.Linear(3, 2 * (4 + 1)), nn.Linear(8, 4))
    sides = (LayerAxis("0", "out", (4, 1)), LayerAxis("1", "in"))
    group = Group("0", "head", 2, 4, "1", sides, CostModules())
    given = magnitude_scores(module, Structure(("0",), (group,), 1))["0"]
    rows, columns = module[0].weight.detach().double(), module[1].weight.detach().double().T
    expected = [rows[own].square().sum() + columns[of].square().sum() for own, of in OWN_ROWS]
    torch.testing.assert_close(given, torch.stack(expected))
