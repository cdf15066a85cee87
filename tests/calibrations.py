"""What tests of calibration data compare."""

from pathlib import Path

import pytest
import torch

from optin_deploy.data.calibration import Calibration, load_calibration
from optin_deploy.errors import UserError
from optin_deploy.network import Network


def rows(batches: tuple[dict[str, torch.Tensor], ...], name: str) -> list[tuple[float, ...]]:
    """Samples of one input, padding (zeros at the end) left out."""
    found = []
    for batch in batches:
        for row in batch[name]:
            values = row.flatten().tolist()
            while values and values[-1] == 0:
                values.pop()
            found.append(tuple(values))
    return found


def check_split(calibration: Calibration, name: str, used: int, held: int) -> None:
    first, second = rows(calibration.batches, name), rows(calibration.held_out, name)
    assert (len(first), len(second)) == (used, held)
    assert calibration.samples == used
    assert len({*first, *second}) == used + held


def refusal(network: Network, path: Path | None, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_calibration(network, path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert path is None or str(path) in message
    return message
