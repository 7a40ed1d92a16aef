"""Whole networks against those of diffusers, and where no package has one against the published equations in float64.

The time embedding is the laboratory's own for every backbone (docs/backbones.md), so theirs is given ours.
"""

import math

import pytest
import torch
from nano import CONTEXT, inputs, network
from torch import nn
from torch.nn import functional as F
from torch_layers import layer_of_torch

from hdm import torchvision_cpu
from hdm.config.schema import QKNorm

torchvision_cpu.declare()
from diffusers.models import DiTTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel  # noqa: E402

D, HEADS, C, GRID = 32, 2, 16, (4, 4)
GELU = ("gelu", {"width": 128 / 48})
BASE = {"encoding": ("sincos_abs", {"base": 4}), "routing": "none"}


def near(got, expected, bound):
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=bound * expected.abs().max().item(), check_dtype=False)


class Given(nn.Module):
    """In place of their embedding of timesteps, ours of the test's."""

    def __init__(self, time):
        super().__init__()
        self.time = time

    def forward(self, *_, **__):
        return self.time


def ours(name, **axes):
    """A network in float64 whose every weight is random, and its inputs; what reads text by an output of zeros reads none."""
    model = network(**axes | {"backbone": name}).double()
    given = inputs(model, grid=GRID, text=5, padded=False, dtype=torch.float64)
    time = (model.time(given.timestep) + model.aspect(given.condition.aspect))[:, 0]
    return model, given, time


def state(**modules):
    """The state dict of `modules`, by the prefix that each shall have, `__` being a dot."""
    return {f"{prefix.replace('__', '.')}.{leaf}": v for prefix, m in modules.items() for leaf, v in m.state_dict().items()}


def split(prefix, layer, names):
    """A fused projection as layers of their own."""
    parts = {leaf: value.chunk(len(names)) for leaf, value in layer.state_dict().items()}
    return {f"{prefix}.{name}.{leaf}": values[i] for leaf, values in parts.items() for i, name in enumerate(names)}


def dealt(layer, order):
    """The rows of a modulation, ours (scale, shift, gate), in their order."""
    return {leaf: torch.cat([v.chunk(len(order))[i] for i in order]) for leaf, v in layer.state_dict().items()}


def modulation(prefix, *layers):
    rows = [dealt(layer, (1, 0, 2)) for layer in layers]
    return {f"{prefix}.{leaf}": torch.cat([row[leaf] for row in rows]) for leaf in rows[0]}


def ends(model, out):
    return state(**{"pos_embed.proj": model.patch.proj, out: model.out.proj})


def load(theirs, weights, *given):
    """Every parameter of theirs but those of the embedding, which is given, and what else begins so."""
    result = theirs.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    missing = [key for key in result.missing_keys if ".emb." not in key and not key.startswith((*given, "pos_embed.pos_embed"))]
    assert not missing
    return theirs.double().eval()


QKV = ("to_q", "to_k", "to_v")


@pytest.mark.parity("network `dit`", "diffusers DiTTransformer2DModel, its table of positions in float32")
def test_dit_is_that_of_diffusers():
    model, given, time = ours("dit", mlp=GELU, **BASE)
    theirs = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=C, num_layers=len(model.stack), sample_size=8, norm_eps=1e-6
    )  # fmt: skip
    weights = ends(model, "proj_out_2")
    weights |= {f"proj_out_1.{leaf}": v for leaf, v in dealt(model.out.final.layer, (1, 0)).items()}
    for i, block in enumerate(model.stack):
        nn.init.zeros_(block.text.out.weight), nn.init.zeros_(block.text.out.bias)  # DiT reads no text
        at, adaln = f"transformer_blocks.{i}", model.adaln.layer
        weights |= split(f"{at}.attn1", block.attn.qkv, QKV) | state(**{f"{at}.attn1.to_out.0": block.attn.out})
        weights |= state(**{f"{at}.ff.net.0.proj": block.mlp.up, f"{at}.ff.net.2": block.mlp.down})
        weights |= modulation(f"{at}.norm1.linear", adaln[f"stack_{i}_attn"], adaln[f"stack_{i}_mlp"])
    load(theirs, weights)
    for block in theirs.transformer_blocks:
        block.norm1.emb, block.norm1.norm.eps = Given(time), 1e-6
    step = torch.zeros(2, dtype=torch.long)
    near(given.run(model), theirs(given.x, step, step).sample, 1e-6)


@pytest.mark.parity("network `mmdit`", "diffusers SD3Transformer2DModel, positions and QK-norm in float32")
def test_mmdit_is_that_of_diffusers():
    """SD3's, without pooled text."""
    model, given, time = ours("mmdit", mlp=GELU, **BASE)
    theirs = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=len(model.stack), attention_head_dim=C, num_attention_heads=HEADS,
        joint_attention_dim=CONTEXT, caption_projection_dim=D, pooled_projection_dim=8, pos_embed_max_size=4, qk_norm="rms_norm",
    )  # fmt: skip
    weights = ends(model, "proj_out") | state(context_embedder=model.text.proj, norm_out__linear=model.out.final.layer)
    for i, block in enumerate(model.stack):
        at, adaln, last = f"transformer_blocks.{i}", model.adaln.layer, i == len(model.stack) - 1
        weights |= split(f"{at}.attn", block.attn.qkv, QKV) | state(**{f"{at}.attn.to_out.0": block.attn.out})
        weights |= state(**{f"{at}.ff.net.0.proj": block.mlp.up, f"{at}.ff.net.2": block.mlp.down})
        weights |= modulation(f"{at}.norm1.linear", adaln[f"stack_{i}_attn"], adaln[f"stack_{i}_mlp"])
        norms = {"norm_q": block.attn.qk_norm.q, "norm_k": block.attn.qk_norm.k, "norm_added_k": block.text_attn.qk_norm.k}
        if last:
            weights |= split(f"{at}.attn", block.text_attn.kv, ("add_k_proj", "add_v_proj"))
            scale_shift = dealt(model.adaln.layer[f"stack_{i}_text_attn"], (0, 1, 2))
            weights |= {f"{at}.norm1_context.linear.{leaf}": v[: 2 * D] for leaf, v in scale_shift.items()}
        else:
            weights |= split(f"{at}.attn", block.text_attn.qkv, ("add_q_proj", "add_k_proj", "add_v_proj"))
            weights |= state(**{f"{at}.attn.to_add_out": block.text_attn.out})
            weights |= state(**{f"{at}.ff_context.net.0.proj": block.text_mlp.up, f"{at}.ff_context.net.2": block.text_mlp.down})
            weights |= modulation(f"{at}.norm1_context.linear", adaln[f"stack_{i}_text_attn"], adaln[f"stack_{i}_text_mlp"])
            norms["norm_added_q"] = block.text_attn.qk_norm.q
        weights |= state(**{f"{at}.attn.{name}": norm for name, norm in norms.items()})
    idle = [f"{at}.attn.add_q_proj", f"{at}.attn.norm_added_q"]  # what the last text tokens read is thrown away
    load(theirs, weights, "time_text_embed", *idle)
    theirs.time_text_embed = Given(time)
    got = theirs(given.x, given.condition.text, torch.zeros(2, 8), torch.zeros(2)).sample
    near(given.run(model), got, 1e-6)


@pytest.mark.parity("network `sana`", "diffusers SanaTransformer2DModel, its attention in float32")
def test_sana_is_that_of_diffusers():
    model, given, time = ours("sana", attention=("linear", {"head_dim": C}), mlp=("mix_ffn", {"ratio": 2.5}), routing="none")
    theirs = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=C, num_layers=len(model.stack),
        num_cross_attention_heads=HEADS, cross_attention_head_dim=C, cross_attention_dim=D, caption_channels=CONTEXT, sample_size=8,
        patch_size=2,
    )  # fmt: skip
    scale, shift = model.out.final.table.chunk(2)
    text = {"caption_projection.linear_1": model.text.up, "caption_projection.linear_2": model.text.down}
    weights = state(patch_embed__proj=model.patch.proj, proj_out=model.out.proj, caption_norm=model.text.norm, **text)
    weights |= modulation("time_embed.linear", model.adaln.proj["attn"], model.adaln.proj["mlp"])
    weights["scale_shift_table"] = torch.stack([shift, scale])
    for i, block in enumerate(model.stack):
        at = f"transformer_blocks.{i}"
        offsets = [model.adaln.offset[f"stack_{i}_{kind}"].view(3, D)[[1, 0, 2]] for kind in ("attn", "mlp")]
        weights[f"{at}.scale_shift_table"] = torch.cat(offsets)
        weights |= split(f"{at}.attn1", block.attn.qkv, QKV) | split(f"{at}.attn2", block.text.kv, QKV[1:])
        weights |= state(**{f"{at}.attn1.to_out.0": block.attn.out, f"{at}.attn2.to_q": block.text.q})
        weights |= state(**{f"{at}.attn2.to_out.0": block.text.out, f"{at}.ff.conv_depth": block.mlp.conv})
        weights[f"{at}.ff.conv_inverted.weight"] = block.mlp.w12.weight[..., None, None]
        weights[f"{at}.ff.conv_inverted.bias"] = block.mlp.w12.bias
        weights[f"{at}.ff.conv_point.weight"] = block.mlp.w3.weight[..., None, None]
    load(theirs, weights)
    theirs.time_embed.emb, theirs.caption_norm.eps = Given(time), 1e-6
    got = theirs(given.x, given.condition.text, torch.zeros(2)).sample
    near(given.run(model), got, 1e-5)


@pytest.mark.parity("network `uvit`", "layers of torch.nn, float64")
def test_uvit_is_layers_of_torch_on_tokens_with_learned_positions():
    """[time, text, image] in the published order under one learned table (1 + L + N, D), that of time being a bias of its token."""
    learned = ("learned_abs", {"base": 4, "extent": 1.0, "text": 5})
    model, given, time = ours("uvit", encoding=learned, mlp=GELU, routing="none")
    table = model.encoding.table.flatten(1).T
    bias = model.aspect.out.bias
    positions = torch.cat([bias[None], model.encoding.text, table])
    patches = F.unfold(given.x, 2, stride=2).transpose(1, 2) @ model.patch.proj.weight.flatten(1).T + model.patch.proj.bias
    text = given.condition.text @ model.text.proj.weight.T + model.text.proj.bias
    x = torch.cat([(time - bias)[:, None], text, patches], dim=1) + positions
    states = []
    for block in model.in_blocks:
        x = layer_of_torch(block, dim=D, heads=HEADS)(x)
        states.append(x)
    x = layer_of_torch(model.mid, dim=D, heads=HEADS)(x)
    for block in model.out_blocks:
        joined = torch.cat([x, states.pop()], dim=2)
        x = layer_of_torch(block, dim=D, heads=HEADS)(joined @ block.merge.proj.weight.T + block.merge.proj.bias)
    norm, out = model.out.norm, model.out.proj
    x = F.layer_norm(x[:, 6:], (D,), norm.weight, norm.bias, 1e-6) @ out.weight.T + out.bias
    expected = F.fold(x.view(2, 16, 2, 2, 4).permute(0, 4, 2, 3, 1).reshape(2, 16, 16), (8, 8), 2, stride=2)
    near(given.run(model), expected, 1e-10)


class HourglassReference:
    """HDiT (Crowson et al., 2024) for one image, in float64, token by token where a window is cut."""

    def __init__(self, model, window):
        self.w, self.window = {name: p.detach() for name, p in model.named_parameters()}, window

    def block(self, name, x, grid, place, time, *, heads, window):
        """x + A((1 + W time) x / rms(x)), then the same with the MLP."""
        number = name.split(".")[1]

        def normed(x, kind):
            scale = time @ self.w[f"levels.{number}.adaln.layer.{name.replace('.', '_')}_{kind}.weight"].T
            return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * (1 + scale)

        q, k, v = (normed(x, "attn") @ self.w[f"{name}.attn.qkv.weight"].T).chunk(3, dim=-1)
        mixed = torch.cat([self.head(name, h, heads, q, k, v, grid, place, window) for h in range(heads)], dim=1)
        x = x + mixed @ self.w[f"{name}.attn.out.weight"].T + self.w[f"{name}.attn.out.bias"]
        a, b = (normed(x, "mlp") @ self.w[f"{name}.mlp.w12.weight"].T).chunk(2, dim=-1)
        return x + (a * (b * (1 + torch.erf(b / math.sqrt(2))) / 2)) @ self.w[f"{name}.mlp.w3.weight"].T

    def head(self, name, h, heads, q, k, v, grid, place, window):
        part = slice(h * C, (h + 1) * C)
        q, k, v = q[:, part], k[:, part], v[:, part]
        q, k = (x / (x.square().sum(dim=-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        # n_heads * 8 / 4 frequencies from pi towards 10 pi, dealt round-robin; y, then x; pairs (i, i + 4) of the first half.
        ramp = torch.exp(torch.linspace(math.log(math.pi), math.log(10 * math.pi), heads * 2 + 1, dtype=torch.float64)[:-1])
        angle = torch.cat([place[:, :1] * ramp[h::heads], place[:, 1:] * ramp[h::heads]], dim=1)
        q, k = (turned(x, angle) for x in (q, k))
        rows = []
        for i in range(len(q)):
            start = [min(max(c - window // 2, 0), max(side - window, 0)) for c, side in zip(divmod(i, grid[1]), grid)]
            ys, xs = (range(s, min(s + window, side)) for s, side in zip(start, grid))
            near_by = torch.tensor([y * grid[1] + x for y in ys for x in xs])
            logits = self.w[f"{name}.attn.qk_norm.logit_scale"][h] * (k[near_by] @ q[i])
            rows.append(torch.softmax(logits, dim=0) @ v[near_by])
        return torch.stack(rows)

    def velocity(self, image, time, place, grid):
        """(4, H, W) -> (4, H, W); `place` are the (y, x) of the tokens in [-1, 1] over the longer side."""
        outer_time = time @ self.w["levels.0.time.weight"].T
        x = F.unfold(image[None], 2, stride=2)[0].T @ self.w["patch.proj.weight"].flatten(1).T + self.w["patch.proj.bias"]
        for i in range(2):
            x = self.block(f"levels.0.down.{i}", x, grid, place, outer_time, heads=1, window=self.window)
        state, inner = x, (grid[0] // 2, grid[1] // 2)
        corner = torch.tensor([(2 * r) * grid[1] + 2 * c for r in range(inner[0]) for c in range(inner[1])])
        cells = torch.stack([corner, corner + 1, corner + grid[1], corner + grid[1] + 1], dim=1)
        x = x[cells].flatten(1) @ self.w["levels.0.merge.weight"].T
        places = place[cells].mean(dim=1)
        for i in range(self.count("levels.1.down")):
            x = self.block(f"levels.1.down.{i}", x, inner, places, time, heads=2, window=max(inner))
        up = torch.empty_like(state)
        up[cells.flatten()] = (x @ self.w["levels.0.split.weight"].T).view(-1, 16)
        f = self.w["levels.0.up.0.merge.factor"]
        x = state + f * (up - state)
        for i in range(2):
            x = self.block(f"levels.0.up.{i}", x, grid, place, outer_time, heads=1, window=self.window)
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        x = (x @ self.w["out.proj.weight"].T + self.w["out.proj.bias"]).view(*grid, 2, 2, 4)
        return x.permute(4, 0, 2, 1, 3).reshape(4, 2 * grid[0], 2 * grid[1])

    def count(self, prefix):
        return len({name.split(".")[3] for name in self.w if name.startswith(prefix)})


def turned(x, angle):
    """exp(i angle) times the channels (j, j + P), as complex numbers; the second half of the head passes."""
    p = angle.shape[1]
    z = torch.complex(x[:, :p], x[:, p : 2 * p]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag, x[:, 2 * p :]], dim=1)


@pytest.mark.parametrize("grid", [(4, 4), (6, 10)], ids=str)
@pytest.mark.parity("network `hdit`, window 3", "its equations token by token, float64")
def test_hdit_is_its_equations(grid):
    """AdaRMSNorm, cosines in windows, GEGLU, axial rotations, merges, splits and the lerp; HDiT has no text."""
    window = 3
    model = network(
        backbone="hdit", position="bbox", attention=("neighborhood", {"window": window, "qk_norm": QKNorm.cosine})
    ).double()
    for block in (block for level in model.levels for block in (*level.down, *level.up)):
        nn.init.zeros_(block.text.out.weight), nn.init.zeros_(block.text.out.bias)
    given = inputs(model, grid=grid, dtype=torch.float64)
    got, reference = given.run(model), HourglassReference(model, window)
    time = (model.time(given.timestep) + model.aspect(given.condition.aspect))[:, 0]
    longer = max(grid)
    place = torch.tensor(
        [[(2 * c + 1 - side) / longer for c, side in zip((y, x), grid)] for y in range(grid[0]) for x in range(grid[1])],
        dtype=torch.float64,
    )
    expected = torch.stack([reference.velocity(given.x[i], time[i], place, grid) for i in range(2)])
    near(got, expected, 1e-10)
