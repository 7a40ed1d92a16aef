"""FLOPs of natten's kernels: torch's own for whole windows, the closed form, and what the meta device counts; and their schemas."""

import math
import subprocess
import sys

import pytest
import torch
from nano import SIZE
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from hdm.config.axes import ATTENTION, ENCODING
from hdm.model.attention import Layout
from hdm.model.encoding import NopeConfig
from hdm.model.local_attention import NeighborhoodConfig
from hdm.model.natten_flops import backward, forward, full

B, H, C = 3, SIZE.heads, SIZE.head_dim
STRIDE = ([1, 1], [1, 1], [False, False], 0.25)
GRIDS = pytest.mark.parametrize("grid", [(7, 7), (9, 13), (16, 16), (5, 24)], ids=str)


@GRIDS
def test_a_window_over_the_grid_is_what_torch_counts_for_attention(grid):
    n = math.prod(grid)
    tokens, heads, lse = (B, *grid, H, C), (B, H, n, C), (B, *grid, H)
    assert forward(tokens, tokens, tokens, grid, *STRIDE) == sdpa_flop_count(heads, heads, heads)
    grads = backward(tokens, tokens, tokens, tokens, tokens, lse, grid, *STRIDE)
    assert grads == sdpa_backward_flop_count(heads, heads, heads, heads)
    flat = (B, n, H, C)
    assert full(flat, flat, flat, products=(1, 1)) == sdpa_flop_count(heads, heads, heads)
    assert full(flat, flat, flat, products=(3, 2)) == grads


@GRIDS
@pytest.mark.parametrize("window", [3, 4, 7])
def test_is_what_the_meta_device_counts(window, grid):
    """4 B H N k k C, k cut at a shorter side; kernels that are told the grid count its tokens, not those of their padding."""
    module = ATTENTION.build(NeighborhoodConfig(window=window), SIZE, ENCODING.build(NopeConfig(), SIZE, (-0.5, 0.5)))
    n, sides = math.prod(grid), [min(window, side) for side in grid]
    q = torch.empty(B, H, n, C, device="meta")
    with FlopCounterMode(display=False) as counter:
        module.image(q, q, q, Layout(position=torch.empty(B, n, 2, device="meta"), grid=grid))
    tokens, padded = (B, *grid, H, C), (B, 4096, H, C)
    expected = 4 * B * H * n * math.prod(sides) * C
    assert counter.get_total_flops() == expected
    assert forward(tokens, tokens, tokens, sides, *STRIDE) == expected
    assert forward(padded, padded, padded, sides, *STRIDE, None, None, list(grid), grid_at=2) == expected


KERNELS = """
import sys, types
compiled = types.ModuleType("natten.libnatten")  # needs CUDA; what torch knows of its kernels is natten's Python
compiled.__getattr__ = lambda name: (lambda *args: None) if not name.startswith("__") else None
sys.modules["natten.libnatten"] = compiled
import natten
natten.libnatten = compiled
import torch
from torch.utils.flop_counter import FlopCounterMode
import hdm.model.local_attention
from hdm.model import natten_flops
natten_flops.register()

def counted(name, *args):
    with FlopCounterMode(display=False) as counter:
        getattr(torch.ops.natten, name)(*args)
    return counter.get_total_flops()

q, lse = torch.empty(3, 9, 13, 2, 16, device="meta"), torch.empty(3, 9, 13, 2, device="meta")
flat, sums = torch.empty(3, 128, 2, 16, device="meta"), torch.empty(3, 128, 2, device="meta")
common = [7, 7], [1, 1], [1, 1], [False, False], 0.25
tiles, grid = ([8, 8], [8, 8]), [9, 13]
back = (q, q, q, q, q, lse, *common)
flat_back = (flat, flat, flat, flat, flat, sums, *common)
shapes = ([16, 16], [16, 16], grid)
print(
    counted("na2d_forward", q, q, q, *common, *tiles),
    counted("reference_na2d_forward", flat, flat, flat, *common, grid, 0),
    counted("hopper_na2d_forward", flat, flat, flat, *common, *shapes, *tiles, 0),
    counted("blackwell_na2d_forward", flat, flat, flat, *common, *shapes, *tiles, False),
    counted("na2d_backward", *back, *tiles, None, False, False),
    counted("reference_na2d_backward", *flat_back, grid, 0),
    counted("hopper_na2d_backward", *flat_back, *shapes, *tiles),
    counted("blackwell_na2d_backward", *flat_back, *shapes, *tiles),
    counted("fmha_forward", flat, flat, flat, False, 0.25, 64, 64, None, None, 0, 0),
)
"""


def test_the_kernels_of_natten_are_counted():
    """Through natten's own declarations, their order of arguments included."""
    pytest.importorskip("natten", minversion="0.21")
    done = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    n = 4 * 3 * 2 * 9 * 13 * 49 * 16
    assert [int(word) for word in done.stdout.split()] == [n] * 4 + [n * 5 // 2] * 4 + [4 * 3 * 2 * 128 * 128 * 16]


@pytest.mark.gpu
def test_a_network_on_cuda_counts_what_it_counts_on_meta():
    pytest.importorskip("natten", minversion="0.21")
    module = ATTENTION.build(NeighborhoodConfig(), SIZE, ENCODING.build(NopeConfig(), SIZE, (-0.5, 0.5)))
    totals = []
    for device in ("meta", "cuda"):
        q = torch.zeros(B, H, 256, C, device=device, dtype=torch.float16)
        with FlopCounterMode(display=False) as counter:
            module.image(q, q, q, Layout(position=torch.empty(B, 256, 2, device=device), grid=(16, 16)))
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1]
