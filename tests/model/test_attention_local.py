"""Neighborhood and window attention against dense masks in float64, transformers' Swin and, where it is installed, natten."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nano import SIZE, inputs, network

from hdm import torchvision_cpu
from hdm.config.axes import ATTENTION, ENCODING
from hdm.config.compose import compose
from hdm.config.errors import ConfigError
from hdm.config.schema import QKNorm
from hdm.model import local_attention
from hdm.model.attention import FullConfig, Layout, attend, merge_heads
from hdm.model.encoding import AxialRopeConfig, NopeConfig
from hdm.model.init import initialize
from hdm.model.local_attention import Neighborhood, NeighborhoodConfig, Window, WindowConfig, by_natten, tile_sides

D, HEADS, C = SIZE.dim, SIZE.heads, SIZE.head_dim
GRIDS = [(7, 7), (8, 8), (9, 13), (12, 20), (5, 16), (1, 9), (3, 2)]
CONFIGS = [
    NeighborhoodConfig(),
    NeighborhoodConfig(window=4),
    NeighborhoodConfig(window=3, qk_norm=QKNorm.cosine, qkv_bias=True),
    WindowConfig(),
    WindowConfig(window=4, qk_norm=QKNorm.rms),
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{type(c).__name__}-{c.window}")


def built(config, *, index=0, encoding=None):
    encoding = ENCODING.build(encoding or NopeConfig(), SIZE, (-0.5, 0.5))
    module = ATTENTION.build(config, SIZE, encoding, index=index)
    initialize(module, 0)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.2 * torch.randn(p.shape, generator=draw)
    return module.double(), encoding


def sees(config, index, length):
    """The (length, length) matrix of which token of a side sees which, straight from the definitions (spec 7)."""
    i = np.arange(length)
    w = min(config.window, length)
    if isinstance(config, NeighborhoodConfig):
        start = np.clip(i - w // 2, 0, length - w)[:, None]
        return (i >= start) & (i < start + w)
    shift = w // 2 if index % 2 and length > config.window else 0
    window = (i - shift) // w  # -1 is what lies before the first shifted border: a window too
    return window[:, None] == window


def layout_of(grid, others, *, padded, encoding=None):
    """Of two images, the second with padding behind its first token that is no image token."""
    n = grid[0] * grid[1]
    position = torch.rand(2, n + others, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64) - 0.5
    mask = torch.ones(2, n + others, dtype=torch.bool) if padded else None
    if padded:
        mask[-1, n + 1 :] = False
    rotation = None if encoding is None else encoding.rotation(position)
    return Layout(position=position, rotation=rotation, mask=mask, grid=grid)


def tokens(layout):
    count = layout.position.shape[1]
    return torch.randn(2, count, D, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def by_dense_mask(module, config, index, x, layout):
    """The same layer with one mask for the whole sequence."""
    n = layout.grid[0] * layout.grid[1]
    seen = np.ones((x.shape[1], x.shape[1]), dtype=bool)
    seen[:n, :n] = np.kron(sees(config, index, layout.grid[0]), sees(config, index, layout.grid[1]))
    seen = torch.from_numpy(seen).expand(len(x), -1, -1)
    if layout.mask is not None:
        seen = seen & layout.mask[:, None]
    q, k, v = module.sides(*module.qkv(x).chunk(3, dim=-1), layout)
    return module.out(merge_heads(attend(q, k, v, seen, scale=module.scale)))


@every_config
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("others", "padded", "index"), [(0, False, 0), (3, False, 1), (3, True, 1)])
@pytest.mark.parity("`attention=neighborhood`, `window`, with gradients", "SDPA with one dense mask, float64")
def test_equals_one_dense_mask_and_so_do_gradients(config, grid, others, padded, index):
    module, encoding = built(config, index=index, encoding=AxialRopeConfig())
    layout = layout_of(grid, others, padded=padded, encoding=encoding)
    results = []
    for run in (module, lambda x, layout: by_dense_mask(module, config, index, x, layout)):
        x = tokens(layout).requires_grad_()
        out = run(x, layout)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        results.append((out, *torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10 * max(1, expected.abs().max().item()))


def test_every_token_sees_its_window_exactly():
    """Where values are unit vectors, what a query reads are its weights: k x k of them, and the borders shift inwards."""
    grid, k = (9, 11), 7
    module = Neighborhood(NeighborhoodConfig(window=k), SIZE, ENCODING.build(NopeConfig(), SIZE, (-0.5, 0.5)))
    n = grid[0] * grid[1]
    q, v = torch.zeros(1, 1, n, n), torch.eye(n)[None, None]
    weights = module.image(q, q, v, Layout(position=torch.zeros(1, n, 2), grid=grid))[0].view(*grid, *grid)
    assert ((weights > 0).flatten(2).sum(dim=2) == k * k).all()
    corner, middle, edge = weights[0, 0] > 0, weights[4, 5] > 0, weights[8, 5] > 0
    assert corner[:7, :7].all() and middle[1:8, 2:9].all() and edge[2:, 2:9].all()


@settings(max_examples=25)
@given(rows=st.integers(1, 14), columns=st.integers(1, 14), window=st.integers(1, 9), others=st.integers(0, 3))
def test_the_tile_does_not_matter(rows, columns, window, others):
    """Every tile whose sides divide the grid gives what one dense tile gives, and the chosen one is among them."""
    grid, n = (rows, columns), rows * columns
    draw = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, 1, n + others, 4, generator=draw, dtype=torch.float64) for _ in range(3))

    def read(tile):
        sides = (Neighborhood._side(length, min(window, length), t, q.device) for length, t in zip(grid, tile))
        return local_attention.read_tiles(local_attention.Tiles(grid, *sides), q[:, :, :n], k, v, None)

    expected, chosen = read(grid), tile_sides(grid, window)
    assert rows % chosen[0] == 0 and columns % chosen[1] == 0
    for tile in {chosen, (1, 1), (1, columns), (rows, 1)}:
        torch.testing.assert_close(read(tile), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [NeighborhoodConfig(window=12), WindowConfig(window=12)], ids=lambda c: type(c).__name__)
def test_a_window_over_the_whole_grid_is_full_attention(config):
    local, _ = built(config, index=1)
    full, _ = built(FullConfig())
    full.load_state_dict(local.state_dict())
    layout = layout_of((5, 12), 3, padded=True)
    x = tokens(layout)
    torch.testing.assert_close(local(x, layout), full(x, layout), rtol=0, atol=1e-12)


@every_config
def test_text_attends_to_everything_and_the_first_tokens_alone_are_the_first_of_all(config):
    local, _ = built(config)
    full, _ = built(FullConfig(qk_norm=config.qk_norm, qkv_bias=config.qkv_bias))
    full.load_state_dict(local.state_dict())
    layout = layout_of((9, 13), 3, padded=True)
    x, n = tokens(layout), 9 * 13
    out = local(x, layout)
    torch.testing.assert_close(out[:, n:], full(x, layout)[:, n:], rtol=0, atol=1e-12)
    assert not torch.allclose(out[:, :n], full(x, layout)[:, :n], rtol=0.1)
    for only in (n, n + 2, 5):
        torch.testing.assert_close(local(x, layout, only=only), out[:, :only], rtol=0, atol=1e-12)


# --- other people's ---------------------------------------------------------------------------------------------------


def swin(module, *, shift, grid, window):
    """A layer of transformers' Swin with our weights, without what surrounds its attention."""
    torchvision_cpu.declare()
    from transformers import SwinConfig
    from transformers.models.swin.modeling_swin import SwinLayer

    config = SwinConfig(window_size=window, qkv_bias=False, attn_implementation="sdpa")
    layer = SwinLayer(config, D, grid, HEADS, shift_size=shift).double().eval()
    for name, weight in zip("qkv", module.qkv.weight.chunk(3)):
        getattr(layer.attention, f"{name}_proj").weight.data = weight.detach()
    layer.attention.o_proj.load_state_dict(module.out.state_dict())
    for name in ("layernorm_before", "layernorm_after", "mlp"):
        setattr(layer, name, torch.nn.Identity())
    return layer


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize(("grid", "window"), [((16, 16), 8), ((12, 20), 4), ((8, 8), 2), ((8, 8), 8)], ids=str)
@pytest.mark.parity("`attention=window`", "transformers SwinLayer, float64")
def test_window_attention_is_that_of_swin(grid, window, index):
    """Blocks of odd number are shifted. Swin's table of relative positions starts at zero, its mask is -100.

    Its layer adds its input to the attention, and the identity that stands for its MLP doubles the sum.
    """
    module, _ = built(WindowConfig(window=window), index=index)
    layout = layout_of(grid, 0, padded=False)
    x = tokens(layout)
    with torch.no_grad():
        theirs = swin(module, shift=index % 2 * window // 2, grid=grid, window=window)(x, grid)[0] / 2 - x
        torch.testing.assert_close(module(x, layout), theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window", [3, 4, 7])
@pytest.mark.parametrize("grid", [(7, 7), (9, 13), (16, 16), (5, 16)], ids=str)
@pytest.mark.parity("`attention=neighborhood`", "natten na2d on a CPU, float32")
def test_neighborhood_attention_is_that_of_natten(grid, window):
    pytest.importorskip("natten", minversion="0.21")
    module = Neighborhood(NeighborhoodConfig(window=window), SIZE, ENCODING.build(NopeConfig(), SIZE, (-0.5, 0.5)))
    layout, draw = layout_of(grid, 0, padded=False), torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, HEADS, grid[0] * grid[1], C, generator=draw) for _ in range(3))
    expected = by_natten(q, k, v, grid, window=window, scale=None)
    torch.testing.assert_close(module.image(q, k, v, layout), expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parity("`attention=neighborhood`, with gradients", "natten na2d on CUDA, float32")
def test_natten_does_it_on_cuda_with_the_same_gradients(monkeypatch):
    natten = pytest.importorskip("natten", minversion="0.21")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    module = built(NeighborhoodConfig())[0].float().cuda()
    layout = Layout(position=torch.zeros(2, 256, 2, device="cuda"), grid=(16, 16))
    x = torch.randn(2, 256, D, device="cuda")
    results = []
    for library in (natten, None):
        monkeypatch.setattr(local_attention, "natten", library)
        leaf = x.clone().requires_grad_()
        out = module(leaf, layout)
        results.append((out, *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


# --- in a network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["neighborhood", "window"])
def test_a_subset_of_the_tokens_is_refused(attention):
    config = {"neighborhood": NeighborhoodConfig, "window": WindowConfig}[attention](window=2)
    module, _ = built(config)
    layout = layout_of((4, 4), 0, padded=False)
    x, index = tokens(layout), torch.arange(8).expand(2, -1)
    assert module(x, layout).isfinite().all()
    with pytest.raises(ValueError, match=f"attention={attention}: its windows need the complete grid .*; use routing=none"):
        module(x[:, :8], layout.take(index))


@pytest.mark.parametrize(("config", "reach"), [(NeighborhoodConfig(window=5), 3), (WindowConfig(window=4), 4)], ids=str)
def test_a_change_reaches_the_windows_that_hold_it(config, reach):
    """The neighborhoods of 5 of the first 3 tokens of a side start at its border, and the first window of 4 has 4."""
    module, _ = built(config)
    layout = layout_of((8, 8), 0, padded=False)
    x = tokens(layout)
    moved = x.clone()
    moved[:, 0] += 1
    changed = (module(moved, layout) - module(x, layout)).abs().amax(dim=(0, 2)).view(8, 8) > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:reach, :reach] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("attention", ["neighborhood", "window"])
def test_bf16_on_grids_of_many_tiles_that_take_turns(attention):
    model = network(attention=(attention, {"window": 4}))
    for grid in ((12, 8), (6, 10), (12, 8)):
        given = inputs(model, grid=grid)
        with torch.no_grad():
            exact = given.run(model)
            with torch.autocast("cpu", torch.bfloat16):
                low = given.run(model)
        assert (low - exact).norm() < 0.05 * exact.norm()
    first = next(m for m in model.modules() if isinstance(m, Neighborhood | Window))
    assert {grid for grid, _ in first._tiles} == {(12, 8), (6, 10)}


@pytest.mark.parametrize("attention", ["neighborhood", "window"])
def test_checkpointing_changes_no_gradient_on_many_tiles(attention):
    grads = []
    for on in (False, True):
        model = network(attention=(attention, {"window": 4}), size={"gradient_checkpointing": on})
        inputs(model, grid=(12, 8)).run(model).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_windows_are_shifted_in_every_other_block_of_a_network():
    model = network(attention="window")
    assert [m.index for m in model.modules() if isinstance(m, Window)] == list(range(8))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["attention=window", "attention.window=7"], r"attention\.window=7: must be even and above 0"),
        (["attention=neighborhood", "attention.window=0"], r"attention\.window=0: must be above 0"),
    ],
)
def test_windows_of_no_use_are_refused(line, message):
    with pytest.raises(ConfigError, match=message):
        compose([*line, "routing=none"])
