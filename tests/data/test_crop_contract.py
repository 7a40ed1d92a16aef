"""What every registered crop promises, plugins' too: `python -m pytest tests/data -k NAME -p my_lab.crops`."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import encoded, picture, samples

from hdm.config.axes import CROP, POSITION, discover
from hdm.config.compose import compose
from hdm.config.errors import DataError
from hdm.config.schema import RunConfig
from hdm.data.crop import ArbConfig, BucketLaw, CenterConfig, PatchDiffusionConfig, ShiftedSquareConfig
from hdm.data.images import Decoded, decode
from hdm.data.loader import training_batches, validation_batches
from hdm.model.position import BboxConfig, Origin, Rect1Config

SIZE, CELL, BATCH, EPOCH = 32, 8, 4, 34
discover()
CROPS = [
    *(pytest.param(CROP.get(name).config(size=SIZE), id=name) for name in CROP.names()),
    pytest.param(CenterConfig(size=SIZE, hflip=0.5), id="center-hflip"),
    *(pytest.param(ArbConfig(size=SIZE, step=CELL, law=law, cutoff=3.5), id=f"arb-{law.value}") for law in BucketLaw),
    pytest.param(ArbConfig(size=SIZE, step=CELL, law=BucketLaw.pixart, balanced=4), id="arb-balanced"),
]
ONCE_AN_EPOCH = [crop for crop in CROPS if getattr(crop.values[0], "balanced", None) is None]
MAPS = [Rect1Config(), Rect1Config(origin=Origin.corner), BboxConfig()]


def shapes(count):
    """Samples of varied sizes, in and out of NAI's cutoff."""
    content = samples(count)
    sizes = [(64, 64), (80, 60), (60, 80), (100, 50), (50, 100), (96, 90), (120, 30), (40, 140)]
    for i, sample in enumerate(content):
        width, height = sizes[i % len(sizes)]
        sample["png"] = encoded(picture(width + i % 3, height, seed=i))
    return content


@pytest.fixture
def shards(open_shards):
    return open_shards(shapes(EPOCH))


def batches(config, shards, *, start=0, workers=0, count=9, seed=3):
    run = RunConfig(seed=seed, crop=config)
    run.train.workers = workers
    found = training_batches(run, shards, start=start, batch_size=BATCH)
    taken = list(itertools.islice(found, count))
    found.close()
    return taken


def content(taken):
    return [(b.index, b.keys, b.captions, b.view.tolist(), b.aspect.tolist(), b.pixels.numpy().tobytes()) for b in taken]


@pytest.mark.parametrize("config", CROPS)
def test_micro_batches_are_of_one_size_in_whole_cells(config, shards):
    for batch in batches(config, shards, count=18):
        height, width = batch.pixels.shape[2:]
        assert height % CELL == width % CELL == 0
        assert (batch.view[:, 4] == height).all()
        assert (batch.view[:, 5] == width).all()
        assert len(batch) == BATCH
        full, corner = batch.view[:, :2], batch.view[:, 2:4]
        assert (corner >= 0).all()
        assert (corner + batch.view[:, 4:] <= full).all()


@pytest.mark.parametrize("config", CROPS)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_stream_is_a_pure_function(config, shards):
    """Whatever the workers, and from whichever step it starts."""
    whole = content(batches(config, shards, count=12))
    assert content(batches(config, shards, count=12, workers=2)) == whole
    assert content(batches(config, shards, start=5 * BATCH, count=4)) == whole[5:9]
    odd = content(batches(config, shards, start=7, count=12))  # a run whose stages are no multiples of its micro-batch
    assert content(batches(config, shards, start=7 + 9 * BATCH, count=3)) == odd[9:12]
    assert content(batches(config, shards, count=12, seed=4)) != whole


@pytest.mark.parametrize("config", ONCE_AN_EPOCH)
def test_every_record_once_an_epoch(config, shards):
    keys = [key for batch in batches(config, shards, count=3 * EPOCH // BATCH + 1) for key in batch.keys]
    for epoch in range(3):
        assert sorted(keys[epoch * EPOCH : (epoch + 1) * EPOCH]) == [f"{i:04d}" for i in range(EPOCH)]


@pytest.mark.parametrize("config", CROPS)
def test_held_out_images_are_the_same_squares(config, shards):
    """So that the validation loss of two crops answers one question; the centre's square is its own."""
    own = list(validation_batches(RunConfig(seed=5, crop=config), shards, samples=11, batch_size=4))
    assert all(batch.pixels.shape[2:] == (SIZE, SIZE) for batch in own)
    assert content(own) == content(validation_batches(RunConfig(seed=6, crop=config), shards, samples=11, batch_size=4))
    reference = CenterConfig if isinstance(config, CenterConfig) else ShiftedSquareConfig
    square = RunConfig(crop=reference(size=SIZE))
    if type(config) in {ShiftedSquareConfig, CenterConfig, PatchDiffusionConfig, ArbConfig}:
        assert content(own) == content(validation_batches(square, shards, samples=11, batch_size=4))


def boxes_of(config, shards):
    order = CROP.build(config).order(0, shards, start=0, batch_size=BATCH)
    return sorted({order.box(first) or (SIZE, SIZE) for first in range(0, 40 * BATCH, BATCH)})


@pytest.mark.parametrize("config", CROPS)
def test_a_crop_is_a_slice_of_the_resized_whole(config, shards):
    """No edge of its own: every pixel is that of the whole image resized. In floats, since bytes are rounded between two passes."""
    crop = CROP.build(config)
    for seed, box in enumerate(boxes_of(config, shards)):
        for shape in [(97, 40), (40, 97), (64, 64), (150, 133), (20, 31)]:
            image = picture(*shape, seed).convert("L").convert("F")
            cut = crop(Decoded(image=image, width=shape[0], height=shape[1]), np.random.default_rng(seed), box)
            height, width, top, left, h, w = cut.view
            covered = crop.covered(box)
            assert (h, w) == box == cut.pixels.shape
            assert (height - covered[0]) * (width - covered[1]) == 0  # no larger than it must be
            whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
            np.testing.assert_allclose(cut.pixels, whole[top : top + h, left : left + w], rtol=0, atol=255 * 1e-5)
            assert cut.aspect == pytest.approx(math.log(shape[0] / shape[1]))


@pytest.mark.parametrize("position", MAPS)
@pytest.mark.parametrize("config", CROPS)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_the_map_of_the_crop_is_the_crop_of_the_map(config, position, width, height, seed):
    """crop(P)[i] == P[crop] (spec 9), in float64: the whole image's map at every pixel, cut, and averaged over each token's pixels.

    A map is linear, so the mean over a token's pixels is its centre's value, at the edges too (spec 1.3 g is off by 0.027 there).
    """
    crop, maps = CROP.build(config), POSITION.build(position)
    rng = np.random.default_rng(seed)
    boxes = [None]
    if isinstance(config, PatchDiffusionConfig):
        boxes += [(SIZE // 2, SIZE // 2), (SIZE // 4, SIZE // 4)]
    if isinstance(config, ArbConfig):
        buckets, known = crop.assigned(np.array([[width, height]]))
        boxes += [known[b] for b in buckets if b >= 0]
    for box in boxes:
        if max(width, height) > 6 * min(width, height):
            continue  # a map at every pixel of a long image is large
        view = crop(decode(encoded(Image.new("L", (width, height))), crop.covered(box)), rng, box).view
        full_height, full_width, top, left, h, w = view
        whole = maps(torch.tensor([[full_height, full_width, 0, 0, full_height, full_width]], dtype=torch.float64), view[:2])
        part = whole.unflatten(1, view[:2])[0, top : top + h, left : left + w]
        expected = part.unflatten(0, (h // CELL, CELL)).unflatten(2, (w // CELL, CELL)).mean(dim=(1, 3)).flatten(0, 1)
        own = maps(torch.tensor([view], dtype=torch.float64), (h // CELL, w // CELL))[0]
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)


def test_patch_diffusion_draws_every_window_at_every_place(shards):
    """Inclusive offsets on both axes, from an image that is resized as for the square."""
    config = PatchDiffusionConfig(size=SIZE)
    assert boxes_of(config, shards) == [(8, 8), (16, 16), (32, 32)]
    crop = CROP.build(config)
    source = decode(encoded(picture(40, 32)), SIZE)
    views = np.array([crop(source, np.random.default_rng(i), (16, 16)).view for i in range(6000)])
    assert (views[:, :2] == (32, 40)).all()
    for column, room in ((2, 16), (3, 24)):
        counts = np.bincount(views[:, column])
        assert len(counts) == room + 1
        assert np.abs(counts - 6000 / (room + 1)).max() < 6 * math.sqrt(6000 / (room + 1))
    assert abs(np.corrcoef(views[:, 2], views[:, 3])[0, 1]) < 6 / math.sqrt(6000)


def test_whole_windows_of_patch_diffusion_are_shifted_squares(shards):
    whole = PatchDiffusionConfig(size=SIZE, full=1.0, half=0.0, quarter=0.0)
    assert content(batches(whole, shards)) == content(batches(ShiftedSquareConfig(size=SIZE), shards))


def test_leftovers_of_arb_are_shifted_squares(open_shards):
    """Three images of each of two shapes make no whole micro-batch of four: all are squares."""
    content_ = [{**sample, "png": encoded(picture(*((80, 40), (40, 80))[i % 2], i))} for i, sample in enumerate(samples(6))]
    for batch in batches(ArbConfig(size=SIZE), open_shards(content_), count=3):
        assert batch.pixels.shape[2:] == (SIZE, SIZE)
        assert (batch.view[:, :2].amin(dim=1) == SIZE).all()


def test_balanced_ratios_come_equally_often_and_small_ones_never(open_shards):
    """Of 24, 9, 5 and 3 images of a ratio: the first three come once in every three micro-batches, each image once a round."""
    counts = {(64, 64): 24, (90, 60): 9, (60, 90): 5, (40, 120): 3}
    sizes = [size for size, number in counts.items() for _ in range(number)]
    content_ = [{**sample, "png": encoded(picture(*size, i))} for i, (sample, size) in enumerate(zip(samples(41), sizes))]
    shards = open_shards(content_)
    config = ArbConfig(size=SIZE, step=4, law=BucketLaw.pixart, balanced=5)
    taken = batches(config, shards, count=60)
    numbers = [[int(key) for key in batch.keys] for batch in taken]
    shapes_ = [{sizes[n] for n in batch} for batch in numbers]
    assert all(len(shape) == 1 for shape in shapes_)
    for cycle in range(20):
        assert set.union(*shapes_[3 * cycle : 3 * cycle + 3]) == {(64, 64), (90, 60), (60, 90)}
    assert len({tuple(map(frozenset, shapes_[3 * cycle : 3 * cycle + 3])) for cycle in range(20)}) > 3  # not one order for all
    for size in list(counts)[:3]:
        own, first = [n for batch in numbers for n in batch if sizes[n] == size], sizes.index(size)
        assert len(own) == 80
        for round_ in range(80 // counts[size]):
            dealt = own[round_ * counts[size] : (round_ + 1) * counts[size]]
            assert sorted(dealt) == list(range(first, first + counts[size]))
    found = [(batch.pixels.shape[2:], set(batch.view[:, 4:].flatten().tolist())) for batch in taken]
    assert all(set(shape) == sides for shape, sides in found)
    assert len({tuple(shape) for shape, _ in found}) == 3


def test_processes_share_out_balanced_micro_batches(shards):
    config = ArbConfig(size=SIZE, step=CELL, law=BucketLaw.pixart, balanced=4)
    whole, run = batches(config, shards, start=6, count=7), RunConfig(seed=3, crop=config)
    parts = [training_batches(run, shards, start=6, batch_size=BATCH, part=(process, 2)) for process in range(2)]
    for batch in whole:
        halves = [next(part) for part in parts]
        assert [key for half in halves for key in half.keys] == batch.keys
        assert torch.equal(torch.cat([half.pixels for half in halves]), batch.pixels)


def test_no_ratio_with_enough_images_is_one_line(shards):
    with pytest.raises(
        DataError, match=r"crop.balanced=3000: no bucket has so many images, the fullest has \d+; set crop.bal"
    ) as e:
        batches(ArbConfig(size=SIZE, step=CELL, balanced=3000), shards)
    assert "\n" not in str(e.value)


def test_arb_shows_nearly_the_whole_image(shards):
    """What a bucket cuts off is less than one step of a side (HDM's law)."""
    seen = 0
    for batch in batches(ArbConfig(size=SIZE, step=CELL), shards, count=16):
        if batch.pixels.shape[2] != batch.pixels.shape[3]:
            assert (batch.view[:, :2] - batch.view[:, 4:]).max() < 3 * CELL
            assert (batch.view[:, :2] - batch.view[:, 4:]).amin(dim=1).eq(0).all()
            seen += 1
    assert seen > 3


def test_a_bad_sample_in_a_bucket_is_replaced_by_a_good_one_of_its_size(open_shards):
    content_ = [{**sample, "png": encoded(picture(80, 40, i))} for i, sample in enumerate(samples(8))]
    content_[3]["png"] = content_[3]["png"][:90]  # its header is sound
    taken = batches(ArbConfig(size=SIZE), open_shards(content_), count=4)
    assert {tuple(batch.pixels.shape[2:]) for batch in taken} == {(16, 40)}
    assert {skipped.key for batch in taken for skipped in batch.skipped} == {"0003"}


def test_mirrored_centres(shards):
    """Half of the images are mirrored, drawn with the sample; the view stays; held-out images are never mirrored."""
    plain, drawn = batches(CenterConfig(size=SIZE), shards), batches(CenterConfig(size=SIZE, hflip=0.5), shards)
    always = batches(CenterConfig(size=SIZE, hflip=1.0), shards)
    flips = []
    for a, b, c in zip(plain, drawn, always):
        assert torch.equal(a.view, b.view)
        for i in range(BATCH):
            room = a.view[i, 1] - SIZE
            if room % 2 == 0:  # the middle is exact
                assert (a.pixels[i].flip(-1) - c.pixels[i]).abs().max() < 2.1 / 255  # one grey level
            flips.append(torch.equal(b.pixels[i], c.pixels[i]))
            assert flips[-1] or torch.equal(b.pixels[i], a.pixels[i])
    assert 6 < sum(flips) < 30


@pytest.mark.parametrize(("shape", "decibels"), [((61, 47), 55), ((47, 61), 55), ((200, 150), 38), ((128, 300), 38)])
def test_the_centre_is_that_of_adm(shape, decibels):
    """ADM halves by boxes while the short side is at least twice the crop, resizes whole by bicubic, cuts the middle (spec 9).

    Pillow's bicubic reduction is antialiased, so halving first is not needed: what differs is the kernel, and the place by a pixel
    where halving floors odd sides (not in these shapes).
    """
    image = picture(*shape, 4)
    halved = image
    while min(halved.size) >= 2 * SIZE:
        halved = halved.resize((halved.width // 2, halved.height // 2), Image.Resampling.BOX)
    scale = SIZE / min(halved.size)
    whole = np.asarray(halved.resize((round(halved.width * scale), round(halved.height * scale)), Image.Resampling.BICUBIC))
    top, left = (whole.shape[0] - SIZE) // 2, (whole.shape[1] - SIZE) // 2
    crop = CROP.build(CenterConfig(size=SIZE))(decode(encoded(image), SIZE), np.random.default_rng(0))
    assert crop.view[2:4] == (top, left)
    error = np.mean((whole[top : top + SIZE, left : left + SIZE].astype(float) - crop.pixels) ** 2)
    assert 10 * math.log10(255**2 / max(error, 1e-9)) > decibels


def test_default_configs_of_every_crop_compose():
    for name in CROP.names():
        assert compose([f"crop={name}", "autoencoder.factor=8", "model.patch=2"]).crop.size == 256


def test_one_word_changes_the_crop_of_an_experiment_and_not_its_size():
    """Or else the arms of `crop=shifted_square,arb` would differ in the size of their images."""
    for name in CROP.names():
        assert compose(["experiment=openmoji_nano", f"crop={name}"]).crop.size == 32
        assert compose(["experiment=openmoji_nano", f"crop={name}", "crop.size=64"]).crop.size == 64
