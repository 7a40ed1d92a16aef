"""The sizes of images, read from their headers once and kept beside the index of their shard."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from tiny import encoded, picture, samples, write

from hdm.config.errors import DataError
from hdm.data import shards as module
from hdm.data.images import covering, decode, measured
from hdm.data.shards import Shard, Shards


def photograph(width, height, orientation, kind="JPEG", filler=0):
    """An image with EXIF data, and behind them `filler` segments of 60,000 bytes before the picture's size is named."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    image = picture(width, height)
    image.save(data, kind, exif=exif, quality=95)
    jpeg = data.getvalue()
    comment = b"\xff\xfe" + (60_000).to_bytes(2, "big") + b"." * 59_998
    return jpeg[:2] + filler * comment + jpeg[2:] if filler else jpeg


IMAGES = {
    "png": (encoded(picture(40, 24)), (40, 24)),
    "jpg": (photograph(50, 20, 1), (50, 20)),
    "jpeg": (photograph(50, 20, 6), (20, 50)),
    "webp": (photograph(30, 40, 1, "WEBP"), (30, 40)),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_header_tells_what_decoding_finds(kind, orientation):
    data = photograph(50, 30, orientation, kind)
    decoded = decode(data, 8)
    assert measured(data) == (decoded.width, decoded.height) == ((30, 50) if orientation >= 5 else (50, 30))


@pytest.mark.parametrize("data", [b"", b"no image", encoded(picture(20, 20))[:20]])
def test_what_has_no_header_has_no_size(data):
    assert measured(data) is None


def test_sizes_of_every_format(tmp_path):
    content = [{"__key__": str(i), extension: data, "txt": "x"} for i, (extension, (data, _)) in enumerate(IMAGES.items())]
    content.append({"__key__": "long", "jpg": photograph(33, 44, 8, filler=3), "txt": "x"})
    content += [{"__key__": "broken", "png": b"broken", "txt": "x"}, {"__key__": "words", "txt": "x"}]
    path = write(tmp_path / "s.tar", content)
    shards = Shards([Shard(path)], name="t", index_folder=tmp_path / "index", remedy="")
    expected = [*(size for _, size in IMAGES.values()), (44, 33), (0, 0), (0, 0)]
    assert [tuple(size) for size in shards.sizes().tolist()] == expected


def test_sizes_are_read_once_and_follow_the_file(tmp_path, monkeypatch, capsys):
    paths = [write(tmp_path / f"{i}.tar", samples(3 + i, first=10 * i)) for i in range(2)]

    def opened():
        return Shards([Shard(path) for path in paths], name="t", index_folder=tmp_path / "index", remedy="copy it again")

    digest, first = opened().digest, opened().sizes()
    assert first.tolist() == [[40, 24], [24, 40], [32, 32], [32, 32], [60, 20], [40, 24], [24, 40]]
    assert "Measuring t" in capsys.readouterr().err
    caches = sorted((tmp_path / "index").glob("*.sizes.npy"))
    assert len(caches) == 2
    with monkeypatch.context() as patch:
        patch.setattr(module, "measured", None)  # reading again would fail
        assert (opened().sizes() == first).all()
    assert not capsys.readouterr().err
    caches[0].write_bytes(b"torn")
    assert (opened().sizes() == first).all()
    assert opened().digest == digest
    os.utime(paths[0], ns=(1, 1))
    write(paths[0], samples(2, first=3))
    assert opened().sizes().tolist()[:2] == [[60, 20], [40, 24]]


def test_sizes_without_a_place_to_keep_them(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    path = write(tmp_path / "s.tar", samples(2))
    shards = Shards([Shard(path)], name="t", index_folder=tmp_path / "file" / "index", remedy="")
    assert shards.sizes().tolist() == [[40, 24], [24, 40]]


def test_a_lost_shard_is_one_clear_error(open_shards):
    shards = open_shards(samples(8))
    shards.paths[1].unlink()
    with pytest.raises(DataError, match=r"train-001\.tar: shard cannot be read: No such file.*copy it again"):
        shards.sizes()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_turned_photograph_is_decoded_as_large_as_its_box_needs(orientation):
    """At reduced scale, but never below the box, which is laid over the picture as it is seen."""
    data = photograph(800, 400, orientation)
    for box in ((50, 100), (100, 50), (64, 64), (30, 200)):
        decoded = decode(data, box)
        width, height = covering(decoded.width, decoded.height, box)
        assert decoded.image.width >= width
        assert decoded.image.height >= height
        assert max(decoded.image.width / width, decoded.image.height / height) < 2.01
        ratio = decoded.image.width / decoded.image.height
        assert np.isclose(ratio, decoded.width / decoded.height)
