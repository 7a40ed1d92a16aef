"""The alignment loss, its projector, and the tap in the backbone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.diffusion.alignment import misalignment, projector
from hdm.model import Architecture, Condition, Route, build, full_view
from hdm.model.backbone import Tap
from hdm.model.block import Block

NANO = ["model=nano", "text_encoder=hash", "autoencoder=pixel", "crop.size=16", "model.patch=4", "teacher=efficientnet"]


@pytest.mark.parametrize(("width", "count"), [(1152, 8_131_328), (1024, 7_869_184)])
def test_the_projector_has_the_published_size(width, count):
    with torch.device("meta"):
        layers = projector(width, 2048, 768)
    assert sum(p.numel() for p in layers.parameters()) == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_that_of_torch(dtype):
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(3, 10, 24, generator=draw, dtype=torch.float64).to(dtype)
    b = torch.randn(3, 10, 24, generator=draw, dtype=torch.float64).to(torch.float32 if dtype is torch.bfloat16 else dtype)
    torch_loss = torch.nn.CosineEmbeddingLoss()  # mean of 1 - cos
    want = torch_loss(a.double().flatten(0, 1), b.double().flatten(0, 1), torch.ones(30)) - 1
    tolerance = 1e-12 if dtype is torch.float64 else 1e-6
    assert abs(misalignment(a, b).double().mean() - want) < tolerance


def test_lengths_that_half_precision_cannot_hold():
    a = torch.full((1, 2, 8), 3e4, dtype=torch.float16)  # its square is beyond 65504
    assert misalignment(a, a.float()).item() == pytest.approx(-1, abs=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fine = torch.tensor([[[1.0, 1e-3]]])
        assert misalignment(fine, torch.tensor([[[0.0, 1.0]]])).item() == pytest.approx(-1e-3, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 99))
def test_the_routed_loss_is_the_unrouted_one_over_the_kept_tokens(keep, seed):
    draw = torch.Generator().manual_seed(seed)
    h, z = (torch.randn(2, 8, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    kept = torch.rand(2, 8, generator=draw).argsort(1)[:, :keep].sort(1).values
    per_token = -torch.nn.functional.cosine_similarity(h, z, dim=-1)
    want = np.array([per_token[i, kept[i]].mean() for i in range(2)])
    got = misalignment(h.take_along_dim(kept[..., None], dim=1), z, kept)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-14)


def tapped(*, depth, rate, checkpointing=False):
    """The network, its tap at `depth`, and what a hook at every block saw, in the order of the pass."""
    lines = [*NANO, f"routing.rate={rate}", "model.pre_depth=1", f"model.gradient_checkpointing={str(checkpointing).lower()}"]
    model = build(Architecture.of(compose(lines)), seed=3)
    seen = []
    for block in (m for m in model.modules() if isinstance(m, Block)):
        block.register_forward_hook(lambda _m, _i, output: seen.append(output.detach()))
    draw = torch.Generator().manual_seed(1)
    condition = Condition(
        text=torch.randn(2, 3, model.architecture.context_dim, generator=draw),
        position=model.position_map(full_view(16, 16, 2), (4, 4)),
        aspect=torch.zeros(2),
    )
    x, route, tap = torch.randn(2, 3, 16, 16, generator=draw), Route(noise=torch.rand(2, 16, generator=draw)), Tap(depth=depth)
    out = model(x, torch.tensor([0.3, 0.6]), condition, route=route, tap=tap)
    return model, tap, seen, out, lambda: model(x, torch.tensor([0.3, 0.6]), condition, route=route)


@pytest.mark.parametrize("depth", range(1, 9))  # nano: 1 before, 2 + 4 inside, 1 behind the route
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_tap_holds_the_image_tokens_behind_the_block(depth, rate):
    model, tap, seen, out, again = tapped(depth=depth, rate=rate)
    assert len(seen) == 8
    routed = rate > 0 and 2 <= depth <= 7
    assert tap.tokens.shape == (2, 8 if routed else 16, model.tap_width(depth))
    assert torch.equal(tap.tokens, seen[depth - 1][:, : tap.tokens.shape[1]])
    assert (tap.kept is not None) == routed
    assert torch.equal(out, again())


def test_the_tap_names_the_kept_tokens():
    """Without blocks in between, the tokens inside the route are those before it, at `kept`."""
    model, inside, *_ = tapped(depth=2, rate=0.5)
    block = model.encoder[0][0]
    taken = []
    block.register_forward_pre_hook(lambda _m, inputs: taken.append(inputs[0]))
    draw = torch.Generator().manual_seed(1)
    text = torch.randn(2, 3, model.architecture.context_dim, generator=draw)
    condition = Condition(text=text, position=model.position_map(full_view(16, 16, 2), (4, 4)), aspect=torch.zeros(2))
    x, route = torch.randn(2, 3, 16, 16, generator=draw), Route(noise=torch.rand(2, 16, generator=draw))
    before = Tap(depth=1)
    model(x, torch.tensor([0.3, 0.6]), condition, route=route, tap=before)
    assert torch.equal(taken[0][:, :8], before.tokens.take_along_dim(inside.kept[..., None], dim=1))


def test_gradients_reach_the_network_through_the_tap_under_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        model, tap, *_ = tapped(depth=3, rate=0.5, checkpointing=checkpointing)
        tap.tokens.square().sum().backward()
        gradients.append([p.grad for p in model.pre.parameters()])
    assert all(a is not None and a.abs().sum() > 0 for a in gradients[0][:1])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_default_depths():
    assert compose(["alignment=repa"]).alignment.block(compose(["alignment=repa"])) == 3  # 1 before, 2 of 4 encoder blocks
    run = compose([*NANO, "alignment=repa"])
    assert run.alignment.blocks(run) == 8
    assert run.alignment.block(run) == 2


@pytest.mark.parametrize("blocks", [24, 28])
def test_a_plain_stack_is_tapped_where_repa_does(blocks):
    run = compose(["backbone=dit", f"backbone.blocks={blocks}", "alignment=repa"])
    assert (run.alignment.blocks(run), run.alignment.block(run)) == (blocks, 8)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("alignment.depth=9", r"alignment\.depth=9: the backbone has 8 blocks; choose 1 to 8"),
        ("alignment.depth=0", r"alignment\.depth=0: the backbone has 8 blocks"),
        ("alignment.weight=0", r"alignment\.weight=0.*alignment=none"),
        ("alignment.hidden=0", r"alignment\.hidden=0: must be above 0"),
        ("teacher.size=100", r"teacher\.size=100: must be a multiple of 32"),
    ],
)
def test_refused(line, says):
    with pytest.raises(ConfigError, match=says) as error:
        compose([*NANO, "alignment=repa", line])
    assert "\n" not in str(error.value)
