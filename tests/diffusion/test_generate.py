"""The generator: with a network whose images are known in closed form, and with a small real one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hdm import rng
from hdm.config.axes import AUTOENCODER, GUIDANCE, SAMPLER, TEXT_ENCODER
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.diffusion import batching
from hdm.diffusion.generate import Camera, Generator, Network, Noise, field
from hdm.diffusion.timestep import shift
from hdm.model import Architecture, Backbone, build
from hdm.model.backbone import full_view

RUN = [
    "model=nano", "model.dim=16", "model.mlp_dim=32", "model.heads=2", "model.head_dim=8", "model.depth=1", "model.patch=4",
    "text_encoder=hash", "text_encoder.width=12", "autoencoder=pixel", "crop.size=16", "train.precision=fp32", "sampler.steps=3",
]  # fmt: skip


class Painter(Backbone):
    """Flows straight to an image that shows what the network was told: red = x and green = y of each token, blue = the aspect."""

    def __init__(self, patch: int) -> None:
        nn.Module.__init__(self)
        self.patch, self.modes, self.times = patch, [], []

    def position_map(self, view, grid):
        _, _, top, left, height, width = view.T
        y = top[:, None] + (torch.arange(grid[0]) + 0.5) / grid[0] * height[:, None]
        x = left[:, None] + (torch.arange(grid[1]) + 0.5) / grid[1] * width[:, None]
        y, x = y / view[:, :1] - 0.5, x / view[:, 1:2] - 0.5
        return torch.stack([y[:, :, None].expand(-1, *grid), x[:, None, :].expand(-1, *grid)], dim=-1).flatten(1, 2)

    def forward(self, x, timestep, condition, *, route=None):
        self.modes.append(self.training)
        self.times.append(timestep[0].item())
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        position = condition.position.unflatten(1, (rows, columns))
        aspect = condition.aspect[:, None, None].expand(-1, rows, columns)
        picture = torch.stack([position[..., 1], position[..., 0], aspect], dim=1)
        picture = picture.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        return (x - picture) / timestep.view(-1, 1, 1, 1)


def words(guidance):
    """A guidance with its defaults; autoguidance has another network, which `make` provides."""
    return [f"guidance={guidance}", *(["guidance.ckpt=elsewhere"] if guidance == "autoguidance" else [])]


def narrower():
    """Another network, of half the width and on patches of its own."""
    chosen = ["model.dim=8", "model.heads=1", "model.patch=2", "position=bbox"]
    return Network(model=trained(*chosen), run=compose([*RUN, *chosen]))


def make(*overrides, model=None, weak=None):
    run = compose([*RUN, *overrides])
    weak = narrower() if weak is None and hasattr(run.guidance, "ckpt") else weak
    encoders = {
        "text_encoder": TEXT_ENCODER.build(run.text_encoder, cache=Path("cache"), device="cpu"),
        "autoencoder": AUTOENCODER.build(run.autoencoder, cache=Path("cache"), device="cpu"),
    }
    model = model or Painter(run.model.patch)
    return Generator(model, run=run, device="cpu", weak=weak, **encoders)


def trained(*overrides):
    """A real network, moved away from its initial values, which predict nearly nothing."""
    model = build(Architecture.of(compose([*RUN, *overrides])), seed=0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def test_an_image_of_any_aspect_ratio_is_drawn_on_the_map_of_the_whole():
    image = make().images(["a"], size=(8, 16), seed=0)[0]
    assert image.shape == (3, 8, 16)
    torch.testing.assert_close(image[0, 0, ::4], torch.tensor([-0.375, -0.125, 0.125, 0.375]))  # x, centres of 4 columns
    torch.testing.assert_close(image[1, ::4, 0], torch.tensor([-0.25, 0.25]))  # y, centres of 2 rows
    torch.testing.assert_close(image[2], torch.full((8, 16), math.log(2)), rtol=0, atol=1e-5)  # log(width / height)


@pytest.mark.parametrize(
    ("camera", "x", "y"),
    [
        (Camera(x=0.25), [-0.125, 0.125, 0.375, 0.625], [-0.25, 0.25]),  # to the right: what is drawn lies further right
        (Camera(y=0.25), [-0.375, -0.125, 0.125, 0.375], [0.0, 0.5]),  # down
        (Camera(zoom=2.0), [-0.1875, -0.0625, 0.0625, 0.1875], [-0.125, 0.125]),  # in: a smaller part of the map
        (Camera(x=0.25, zoom=2.0), [-0.0625, 0.0625, 0.1875, 0.3125], [-0.125, 0.125]),  # shift first, then zoom
    ],
)
def test_camera(camera, x, y):
    image = make().images(["a"], size=(8, 16), seed=0, camera=camera)[0]
    torch.testing.assert_close(image[0, 0, ::4], torch.tensor(x))
    torch.testing.assert_close(image[1, ::4, 0], torch.tensor(y))


def test_a_view_draws_that_crop_with_the_aspect_of_the_whole():
    view = torch.tensor([[16.0, 32.0, 0.0, 16.0, 16.0, 16.0]])  # the right half of a 16 x 32 image
    image = make().images(["a"], size=(16, 16), seed=0, views=view)[0]
    torch.testing.assert_close(image[0, 0, ::4], torch.tensor([0.0625, 0.1875, 0.3125, 0.4375]))
    torch.testing.assert_close(image[2], torch.full((16, 16), math.log(2)), rtol=0, atol=1e-5)


def test_pixels_stay_in_range():
    image = make().images(["a"], size=(8, 16), seed=0, camera=Camera(x=40.0))
    assert image[0, 0].max() == 1.0


GUIDANCES = [words(name) for name in GUIDANCE.names()]
SAMPLERS = [f"sampler={name}" for name in SAMPLER.names()]


@pytest.mark.parametrize("chosen", [*GUIDANCES, *(["guidance=cfg", s] for s in SAMPLERS)], ids=lambda chosen: "-".join(chosen))
def test_an_image_does_not_depend_on_its_batch(chosen):
    guidance = [*chosen, "sampler.steps=3"]
    model = trained(*guidance)
    captions = ["red square", "a much longer caption of six words", "blue", "green circle, small"]
    together = make(*guidance, model=model).images(captions, size=(16, 24), seed=3)
    alone = torch.cat(
        [make(*guidance, model=model).images([c], size=(16, 24), seed=3, indices=[i]) for i, c in enumerate(captions)]
    )
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-5)
    assert (together[0] - together[2]).abs().max() > 0.1  # and it does depend on caption and index


@pytest.mark.parametrize("chosen", [["guidance=cfg"], words("autoguidance"), ["sampler=euler_maruyama"]], ids="-".join)
def test_batch_size_changes_no_bit(chosen, monkeypatch):
    """The network is given 5 images of 24 tokens at a time (ten with guidance), and what is left over, however many are held."""
    monkeypatch.setattr(batching, "CPU_TOKENS", 5 * 24 + 23)
    model, seen = trained(*chosen), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    captions = [f"{'long ' * (i % 4)}{i}" for i in range(17)]

    def draw(size):
        seen.clear()
        images = make(*chosen, f"sampling.batch_size={size}", model=model).images(captions, size=(16, 24), seed=3)
        return images, list(seen)

    whole, looked = draw(64)
    assert (set(looked) <= {5, 10, 2, 4} and {5, 2} & set(looked)) or {10, 4} <= set(looked)
    for size in (1, 7, 1000):
        images, again = draw(size)
        assert torch.equal(images, whole), size
        assert again == looked, size


@given(count=st.integers(0, 300), held=st.integers(1, 400), rows=st.integers(1, 200), columns=st.integers(1, 200))
def test_passes_are_the_same_for_any_number_of_images_held(count, held, rows, columns):
    per_pass = batching.images_per_pass((rows, columns), torch.device("cpu"))
    assert per_pass == 1 or per_pass * rows * columns <= batching.CPU_TOKENS < (per_pass + 1) * rows * columns
    together = batching.whole_passes(held, per_pass)
    assert held <= together < held + per_pass
    found = [
        rows
        for start in range(0, count, together)
        for rows in batching.passes(range(start, min(start + together, count)), per_pass)
    ]
    assert found == [slice(start, min(start + per_pass, count)) for start in range(0, count, per_pass)]


def test_noise_follows_seed_and_index():
    generator = make("guidance=none", model=trained())
    draw = lambda seed, index: generator.images(["red"], size=(16, 16), seed=seed, indices=[index])  # noqa: E731
    assert torch.equal(draw(0, 5), draw(0, 5))
    assert not torch.equal(draw(0, 5), draw(0, 6))
    assert not torch.equal(draw(0, 5), draw(1, 5))


def test_guidance_scale_one_equals_no_guidance():
    model = trained()
    plain = make("guidance=none", model=model).images(["red", "blue"], size=(16, 16), seed=0)
    guided = make("guidance.scale=1", model=model).images(["red", "blue"], size=(16, 16), seed=0)
    assert torch.equal(plain, guided)
    assert not torch.equal(plain, make("guidance.scale=3", model=model).images(["red", "blue"], size=(16, 16), seed=0))


def test_the_model_samples_in_eval_mode_and_is_left_as_it_was():
    model = Painter(4).train()
    make("guidance=none", model=model).images(["a"], size=(16, 16), seed=0)
    assert model.modes == [False] * 3
    assert model.training


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 3), ("heun", 5), ("dpmpp_2m", 3), ("euler_maruyama", 3)])
def test_steps_are_reported(sampler, evaluations, monkeypatch):
    monkeypatch.setattr(batching, "CPU_TOKENS", 2 * 16)
    told = []
    generator = make(f"sampler={sampler}", "sampler.steps=3")
    generator.images(["a", "b", "c"], size=(16, 16), seed=0, on_step=told.append)
    assert generator.sampler.evaluations == evaluations
    assert told == [2] * evaluations + [1] * evaluations


def test_a_stochastic_sampler_draws_its_noise_by_seed_and_index():
    generator = make("guidance=none", "sampler=euler_maruyama", "sampler.steps=4", model=trained())
    draw = lambda seed, index: generator.images(["red"], size=(16, 16), seed=seed, indices=[index])  # noqa: E731
    assert torch.equal(draw(0, 5), draw(0, 5))
    assert not torch.equal(draw(0, 5), draw(0, 6))
    assert not torch.equal(draw(0, 5), draw(1, 5))


class Canvas(Painter):
    """The painter as a network that predicts its picture, not the velocity towards it."""

    def forward(self, x, timestep, condition, *, route=None):
        return x - timestep.view(-1, 1, 1, 1) * super().forward(x, timestep, condition, route=route)


@pytest.mark.parametrize("guidance", [*GUIDANCES, ["guidance.scale=1"]], ids=" ".join)
def test_a_network_that_predicts_images_draws_them(guidance):
    """All steps begin above t_min, so both networks say the same and every guidance sees velocities."""
    expected = make(*guidance, model=Painter(4)).images(["a", "b"], size=(8, 16), seed=0)
    drawn = make(*guidance, "objective=x_prediction", model=Canvas(4)).images(["a", "b"], size=(8, 16), seed=0)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2e-6)
    misread = make(*guidance, model=Canvas(4)).images(["a", "b"], size=(8, 16), seed=0)
    assert (misread - expected).abs().max() > 0.1


def test_bf16_changes_the_arithmetic_but_not_the_picture():
    model = trained()
    exact = make(model=model).images(["red"], size=(16, 16), seed=0)
    low = make("train.precision=bf16", model=model).images(["red"], size=(16, 16), seed=0)
    assert low.dtype == torch.float32
    assert not torch.equal(exact, low)
    torch.testing.assert_close(low, exact, rtol=0, atol=0.1)


def test_a_size_that_patches_do_not_tile_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"size=18x31: .* multiples of 4 .*; nearest: 16x32"):
        make().images(["a"], size=(18, 31), seed=0)


@pytest.mark.parametrize("bad", [{"zoom": 0.0}, {"zoom": -1.0}, {"x": float("nan")}, {"zoom": float("inf")}])
def test_impossible_cameras_are_refused(bad):
    with pytest.raises(ConfigError, match="camera"):
        Camera(**bad)


@pytest.mark.parametrize("objective", ["velocity", "x_prediction"])
def test_autoguidance_reads_the_other_network_on_its_own_patches_and_objective(objective):
    """Both flow straight to a picture, and so does weak + w (strong - weak): to that mixture of the two."""
    run = compose([*RUN, "model.patch=8", f"objective={objective}"])
    weak = Network(model={"velocity": Painter, "x_prediction": Canvas}[objective](8), run=run)
    chosen = [*words("autoguidance"), "guidance.scale=1.5"]
    image = make(*chosen, weak=weak).images(["a"], size=(16, 32), seed=0, camera=Camera(x=0.1))[0]
    strong = make("guidance=none").images(["a"], size=(16, 32), seed=0, camera=Camera(x=0.1))[0]
    coarse = make("guidance=none", "model.patch=8", model=Painter(8)).images(["a"], size=(16, 32), seed=0, camera=Camera(x=0.1))[0]
    assert (strong - coarse).abs().max() > 0.03
    torch.testing.assert_close(image, coarse + 1.5 * (strong - coarse), rtol=0, atol=2e-6)


def test_a_size_must_suit_the_patches_of_both_networks():
    weak = Network(model=Painter(8), run=compose([*RUN, "model.patch=8"]))
    with pytest.raises(
        ConfigError, match=r"size=16x20: .* multiples of 8 .*model.patch, 4 and guidance.ckpt's 8\); nearest: 16x16"
    ):
        make(*words("autoguidance"), weak=weak).images(["a"], size=(16, 20), seed=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            "text_encoder.width=8",
            "its text_encoder.width is 8, this run's 12; .* same text states, name a run with text_encoder.width=12",
        ),
        ("text_encoder=minilm", "its text_encoder is minilm, this run's hash"),
        ("autoencoder=kl", "its autoencoder is kl, this run's pixel; both networks must see the same latents"),
    ],
)
def test_a_network_that_sees_other_inputs_is_refused(other, message):
    base = [word for word in RUN if not word.startswith("text_encoder.width" if other == "text_encoder=minilm" else "none")]
    weak = Network(model=Painter(4), run=compose([*base, other, "crop.size=32"]))
    with pytest.raises(ConfigError, match=f"guidance.ckpt=elsewhere: {message}"):
        make(*words("autoguidance"), weak=weak)


@pytest.mark.parametrize(("resolution", "a"), [("fixed", 2.0), ("sqrt", 2.0 * math.sqrt(8 / 2)), ("flux", 2.0 * 1.58095)])
def test_the_sampler_steps_on_the_grid_for_the_image_at_hand(resolution, a):
    """8 tokens; base_tokens=2. Flux at 8 tokens: e^(0.5 - 0.65 * 248 / 3840) = 1.58095."""
    painter = Painter(4)
    grid = [f"sampler.resolution={resolution}", "sampler.time_shift=2", "sampler.base_tokens=2", "sampler.steps=4", "guidance=none"]
    make(*grid, model=painter).images(["a"], size=(8, 16), seed=0)
    expected = shift(torch.tensor([1.0, 0.75, 0.5, 0.25]), a)
    torch.testing.assert_close(torch.tensor(painter.times), expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 23), ("heun", 2 * 23 - 1 + 1), ("dpmpp_2m", 23)])
@pytest.mark.parametrize("time_shift", [0.3, 1.0, 3.0])
def test_cfg_zero_star_counts_steps_on_every_grid(sampler, evaluations, time_shift):
    """8 % of 25 steps are 2; the second of Heun's two evaluations of step 2 is at the time of step 3, which counts."""
    painter = Painter(4)
    chosen = ["guidance=cfg_zero_star", "guidance.zero=0.08", f"sampler={sampler}", "sampler.steps=25"]
    make(*chosen, f"sampler.time_shift={time_shift}", model=painter).images(["a"], size=(8, 16), seed=0)
    assert len(painter.times) == evaluations


POSITIONS = {name: build(Architecture.of(compose([*RUN, f"position={name}"])), seed=None) for name in ("rect1", "bbox")}
small = st.integers(min_value=-20, max_value=20)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(POSITIONS)), right=small, down=small, zoom=st.sampled_from([1.0, 2.0, 3.0, 4.0]))
def test_a_camera_sees_what_the_crop_there_saw_in_training(name, right, down, zoom):
    """Moved by whole pixels and closer by a whole factor, the map is that of the box which lies there in a 32 x 32 image.

    The box has its middle at 16 + right (columns, to the right) and 16 + down (rows, downwards), and a side of 32 / zoom.
    """
    network, grid = POSITIONS[name], (4, 4)
    whole = network.position_map(full_view(32, 32), grid)
    unit = (whole[0, 1, 1] - whole[0, 0, 1]).item() / 8  # of the map, for one pixel; patches are 8 pixels here
    assert unit > 0
    camera = Camera(x=right * unit * zoom, y=down * unit * zoom, zoom=zoom)
    side = 32 / zoom
    box = torch.tensor([[32.0, 32.0, 16 + down - side / 2, 16 + right - side / 2, side, side]])
    torch.testing.assert_close(camera.move(whole), network.position_map(box, grid), rtol=0, atol=1e-5)


# --- noise that goes with the camera ----------------------------------------------------------------------------------


class Idle(Painter):
    """Leaves the noise as it is, so that images show it."""

    def forward(self, x, timestep, condition, *, route=None):
        return torch.zeros_like(x)


@pytest.mark.parametrize("place", [(0, 3), (2, -5), (-16, 16), (-1, 40)])
def test_windows_into_the_field_of_noise_agree_where_they_overlap(place):
    down, right = place
    shape, first = (2, 16, 16), field(5, "noise", [(3, 0, 0)], (2, 16, 16))[0]
    assert np.array_equal(first, rng.normal(5, "noise", [3], shape)[0])
    large = field(5, "noise", [(3, down - 16, right - 16)], shape)[0], field(5, "noise", [(3, down, right)], shape)[0]
    halfway = field(5, "noise", [(3, down - 8, right - 8)], shape)[0]
    assert np.array_equal(halfway[:, :8, :8], large[0][:, 8:, 8:])
    assert np.array_equal(halfway[:, 8:, 8:], large[1][:, :8, :8])
    assert abs(np.corrcoef(first.ravel(), large[1].ravel())[0, 1]) < 0.2  # moved, or new


def test_the_noise_goes_with_the_camera_or_stays():
    generator = make(model=Idle(4))

    def image(**camera):
        return generator.images(["a"], size=(16, 16), seed=0, indices=[7], camera=Camera(**camera))[0]

    still = image()
    assert torch.equal(image(x=0.25, y=-0.5), still)
    moved = image(x=0.25, noise=Noise.moved)  # a quarter of the 16 pixels that this square's map is 1 long over
    assert torch.equal(moved[:, :, :-4], still[:, :, 4:])
    assert not torch.equal(moved[:, :, -4:], still[:, :, :4])  # new noise, not the old one round the corner
    assert torch.equal(image(y=-0.5, noise=Noise.moved)[:, 8:], still[:, :-8])
    assert torch.equal(image(zoom=2.0, noise=Noise.moved), still)
    wide = torch.tensor([[16.0, 32.0, 0.0, 0.0, 16.0, 16.0]])  # the left half of an image whose map is 1 long over 32 pixels
    right = generator.images(["a"], size=(16, 16), seed=0, indices=[7], views=wide, camera=Camera(x=0.25, noise=Noise.moved))[0]
    assert torch.equal(right[:, :, :-8], still[:, :, 8:])
