"""Pictures in folders: which are found, how they are read, and which are refused by name."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps, features
from tiny_models import classifier, save_images

from optin_deploy.data.calibration import load_calibration
from optin_deploy.data.image_files import image_files, read_images
from optin_deploy.data.preprocessing import ImagePreprocessing
from optin_deploy.errors import UserError
from optin_deploy.evaluation.load import load_dataset

PREPARING = ImagePreprocessing("x", (32, 32))


def noise(mode: str = "RGB", width: int = 48, height: int = 40) -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((width, height)).convert(mode)


def prepared(file: Path) -> torch.Tensor:
    return PREPARING(read_images([file]))["x"][0]


def as_timm_does(file: Path) -> torch.Tensor:
    transform = timm.data.create_transform((3, 32, 32), interpolation="bicubic", crop_pct=0.875)
    return transform(Image.open(file).convert("RGB"))


def with_alpha(path: Path) -> None:
    image = noise()
    image.putalpha(noise("L"))
    image.save(path)


def palette(path: Path) -> None:
    noise("P").save(path, transparency=3)


def animated(path: Path) -> None:
    frames = [noise(), Image.new("RGB", (48, 40), "red")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def lying(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise().save(path, exif=exif)


READ: dict[str, Callable[[Path], None]] = {
    "rgb.png": lambda path: noise().save(path),
    "grey.png": lambda path: noise("L").save(path),
    "one_bit.png": lambda path: noise("1").save(path),
    "grey_alpha.png": lambda path: noise("LA").save(path),
    "alpha.png": with_alpha,
    "alpha.webp": with_alpha,
    "palette.png": palette,
    "cmyk.jpg": lambda path: noise("CMYK").save(path),
    "cmyk.tif": lambda path: noise("CMYK").save(path),
    "capital.JPG": lambda path: noise().save(path, format="jpeg"),
    "other.jfif": lambda path: noise().save(path, format="jpeg"),
    "named_as.png": lambda path: noise().save(path, format="jpeg"),
    "animated.gif": animated,
    "animated.webp": animated,
    "pages.tif": animated,
    "portable.ppm": lambda path: noise().save(path),
    "lying.jpg": lying,
    "lying.png": lying,
    "deep_colours.png": lambda path: save_deep_colours(path),
}


def save_deep_colours(path: Path) -> None:
    """A PNG of 16 bits a colour, which Pillow reads by its upper 8; Pillow writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = (np.asarray(noise()).astype(np.uint16) * 256 + 17).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 40, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("name", READ)
def test_pictures_are_read_as_timm_reads_them(tmp_path: Path, name: str) -> None:
    READ[name](tmp_path / name)
    assert image_files(tmp_path) == [tmp_path / name]
    assert torch.equal(prepared(tmp_path / name), as_timm_does(tmp_path / name))


def test_deep_colours_keep_their_upper_bits(tmp_path: Path) -> None:
    save_deep_colours(tmp_path / "deep.png")
    noise().save(tmp_path / "flat.png")
    assert torch.equal(prepared(tmp_path / "deep.png"), prepared(tmp_path / "flat.png"))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.avif")
    assert torch.equal(prepared(tmp_path / "a.avif"), as_timm_does(tmp_path / "a.avif"))


DEEP: dict[str, Callable[[Path], None]] = {
    "grey16.png": lambda path: Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(path),
    "grey16.tif": lambda path: Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(path),
    "grey16.pgm": lambda path: path.write_bytes(b"P5 4 2 65535\n" + bytes(16)),
    "int32.tif": lambda path: Image.fromarray(np.arange(1200, dtype=np.int32).reshape(30, 40)).save(path),
    "float.tif": lambda path: Image.fromarray(np.random.rand(30, 40).astype(np.float32)).save(path),
    "lab.tif": lambda path: Image.new("LAB", (30, 40)).save(path),
}
HELD = {"grey16": "integers of", "int32": "integers of 32 bits", "float": "floating-point numbers", "lab": "mode LAB"}


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("how", ["evaluate", "calibrate"])
def test_what_is_no_picture_of_8_bits_is_refused_by_name(tmp_path: Path, name: str, how: str) -> None:
    save_images(tmp_path / "a", 3)
    save_images(tmp_path / "b", 3)
    DEEP[name](tmp_path / "b" / name)
    network = classifier(2)
    with pytest.raises(UserError, match=rf"{name} holds {HELD[name.split('.')[0]]}.*.*convert it") as caught:
        load_dataset(network, tmp_path) if how == "evaluate" else load_calibration(network, tmp_path)
    assert "\n" not in str(caught.value)


def test_links_are_followed(tmp_path: Path) -> None:
    save_images(tmp_path / "elsewhere" / "bee", 3)
    files = save_images(tmp_path / "set" / "ant", 2)
    (tmp_path / "set" / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    (tmp_path / "set" / "ant" / "link.png").symlink_to(files[0])
    assert [file.parent.name for file in image_files(tmp_path / "set")] == ["ant"] * 3 + ["bee"] * 3
    assert load_dataset(classifier(2), tmp_path / "set").samples == 6


def test_links_in_circles_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path / "a", 2)
    save_images(tmp_path / "b", 2)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    assert {file.name for file in image_files(tmp_path / "a")} == {"000.png", "001.png"}
    assert "is not followed" in caplog.text
    assert len(image_files(tmp_path)) == 4


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path / "a", 2)
    for name in ("1.heic", "2.HEIC", "notes.txt", "README", ".hidden.heic"):
        (tmp_path / "a" / name).write_bytes(b"")
    assert len(image_files(tmp_path)) == 2
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "4 files are skipped, which are not images: 2 .heic, 1 .txt, 1 without suffix" in record.message.replace(
        "1 without suffix, 1 .txt", "1 .txt, 1 without suffix"
    )
    caplog.clear()
    image_files(save_images(tmp_path / "b", 1)[0].parent)
    assert not caplog.records


def test_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.heic").touch()
    with pytest.raises(UserError, match=r"no images .*1 \.heic"):
        image_files(tmp_path)


def test_pictures_that_lie_or_move_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("lying.jpg", "animated.gif", "rgb.png"):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir(exist_ok=True)
            READ[name](tmp_path / folder / name)
    load_dataset(classifier(2), tmp_path)
    assert "2 images have an EXIF orientation" in caplog.text
    assert "2 files hold several images" in caplog.text


def test_pictures_beside_class_folders_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_images(tmp_path, 3)
    save_images(tmp_path / "a", 1)
    save_images(tmp_path / "b", 1)
    assert load_dataset(classifier(2), tmp_path).samples == 2
    assert "3 images are in no class folder" in caplog.text


# Channels


def test_grey_networks_of_timm_get_grey_pictures(tmp_path: Path) -> None:
    network = classifier(2, in_chans=1)
    (file,) = save_images(tmp_path / "a", 1)
    save_images(tmp_path / "b", 1)
    mean, std = (sum(values) / 3 for values in (timm.data.IMAGENET_INCEPTION_MEAN, timm.data.IMAGENET_INCEPTION_STD))
    known = timm.get_pretrained_cfg("test_vit").to_dict()
    transform = timm.data.create_transform(
        (1, 32, 32), mean=(mean,), std=(std,), crop_pct=known["crop_pct"], interpolation=known["interpolation"]
    )
    given = network.preprocessing(read_images([file]))["x"]
    assert given.shape == (1, 1, 32, 32)
    assert torch.allclose(given[0], transform(Image.open(file).convert("L")))
    shown = network.preprocessing.to_colors(given[0])
    assert shown.shape == (32, 32, 3)
    assert torch.equal(shown[..., 0], shown[..., 2])
    assert load_dataset(network, tmp_path).samples == 2


@pytest.mark.parametrize("channels", [4, 6])
def test_networks_of_other_channels_take_tensors(
    tmp_path: Path, channels: int, caplog: pytest.LogCaptureFixture
) -> None:
    network = classifier(2, in_chans=channels)
    assert f"takes {channels} channels" in caplog.text
    assert network.inputs["x"].shape[1] == channels
    save_images(tmp_path / "a", 2)
    for path in (None, tmp_path):
        with pytest.raises(UserError, match=f"{channels} channels.*tensor 'x'"):
            load_calibration(network, path)
    with pytest.raises(UserError, match=f"{channels} channels.*evaluate the pruned network in Python"):
        load_dataset(network, tmp_path)


def test_a_preprocessing_that_does_not_fit(tmp_path: Path) -> None:
    save_images(tmp_path / "a", 2)
    save_images(tmp_path / "b", 2)
    wrong = replace(classifier(2, in_chans=1), preprocessing=PREPARING)
    named = replace(classifier(2), preprocessing=ImagePreprocessing("image", (32, 32)))
    for network, expected in (
        (wrong, r"takes x of shape \(1, 32, 32\), its preprocessing makes .* 3 channels"),
        (named, "makes input 'image', the network takes x"),
    ):
        for read in (load_calibration, load_dataset):
            with pytest.raises(UserError, match=expected):
                read(network, tmp_path)
    other = replace(classifier(2, dynamic_img_size=False), preprocessing=ImagePreprocessing("x", (64, 64)))
    with pytest.raises(UserError, match=r"64 x 64 \(height x width\)"):
        load_calibration(other, tmp_path)
    with pytest.raises(UserError, match=r"4 values in mean.* 3 in std"):
        ImagePreprocessing("x", (32, 32), mean=(0.5,) * 4)


def test_upright_pictures_are_unlike_lying_ones(tmp_path: Path) -> None:
    """What the tests above tell apart."""
    lying(tmp_path / "a.jpg")
    image = Image.open(tmp_path / "a.jpg")
    assert ImageOps.exif_transpose(image).size == (40, 48)
