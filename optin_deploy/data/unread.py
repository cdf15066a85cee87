"""What is said of networks whose samples are not read from files of pictures or texts."""

from optin_deploy.data.preprocessing import PICTURE_CHANNELS
from optin_deploy.network import Network

# Samples, channels, height and width.
_OF_PICTURES = 4


def unread(network: Network) -> str | None:
    """Why pictures for a network are not read from files, as the beginning of one line; None for other networks."""
    for name, sample in network.inputs.items():
        if network.source.library != "custom" and sample.dim() == _OF_PICTURES and sample.shape[1] != PICTURE_CHANNELS:
            shape = ", ".join(map(str, sample.shape[1:]))
            return (
                f"{network.source.name} takes {sample.shape[1]}-channel pictures, and files of pictures are "
                f"read with {PICTURE_CHANNELS} channels: prepare them as a tensor {name!r} of shape (samples, {shape})"
            )
    return None
