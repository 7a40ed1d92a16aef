"""Blocks of published systems against diffusers and torch.nn, in float64; what holds across backbones (spec 2, 6, 14)."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.embeddings import PixArtAlphaTextProjection
from nano import CONTEXT, architecture, inputs, network
from torch import nn
from torch_layers import layer_of_torch

from hdm.config.axes import OBJECTIVE
from hdm.config.schema import QKNorm
from hdm.diffusion.alignment import misalignment
from hdm.model import build
from hdm.model.adaln import Gate, Modulation
from hdm.model.attention import Layout
from hdm.model.backbone import Tap
from hdm.model.block import Block

D, HEADS, N, L = 32, 2, 6, 5
GELU = ("gelu", {"width": 128 / 48})
LAYER = {"norm": "layer", "mlp": GELU, "encoding": "nope", "routing": "none"}
BIASED = ("full", {"qkv_bias": True})
ZERO = ("per_layer", {"gate": Gate.zero})
DIT = LAYER | {"backbone": ("dit", {"blocks": 3}), "merge": "none", "attention": BIASED, "adaln": ZERO, "text_fusion": "cross_attn"}


def near(got, expected, bound=1e-10):
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=bound * expected.abs().max().item())


def draws(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def jitter(module):
    draw = torch.Generator().manual_seed(5)
    for p in module.double().parameters():
        p.data.copy_(0.2 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return module


def put(layer, *sources):
    """Stack the weights of `sources` into `layer`."""
    layer.weight.data.copy_(torch.cat([s.weight for s in sources]))
    if layer.bias is not None:
        layer.bias.data.copy_(torch.cat([s.bias for s in sources]))


def plain_norms(block):
    """The published blocks' norms have neither gain nor bias."""
    for name, norm in block.named_children():
        if name.endswith("_norm"):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)


def triple(shift, scale, gate):
    return Modulation(scale[:, None], shift[:, None], None if gate is None else gate[:, None])


def layout(text=None, text_mask=None, images=N, tokens=N):
    return Layout(position=torch.zeros(2, tokens, 2, dtype=torch.float64), images=images, text=text, text_mask=text_mask)


@pytest.mark.parametrize("qk_norm", [QKNorm.none, QKNorm.rms])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parity("block of `mmdit`", "diffusers JointTransformerBlock")
def test_mmdit_block_is_that_of_diffusers(last, qk_norm):
    """JointTransformerBlock, and its context_pre_only as the last block."""
    rms = qk_norm is QKNorm.rms
    theirs = jitter(JointTransformerBlock(D, HEADS, 16, context_pre_only=last, qk_norm="rms_norm" if rms else None))
    attention = ("full", {"qkv_bias": True, "qk_norm": qk_norm})
    axes = DIT | {"backbone": ("mmdit", {"blocks": 3}), "attention": attention, "text_fusion": "mmdit"}
    ours = network(**axes).double().stack[2 if last else 0]
    plain_norms(ours)
    a = theirs.attn
    put(ours.attn.qkv, a.to_q, a.to_k, a.to_v)
    put(ours.attn.out, a.to_out[0])
    put(ours.mlp.up, theirs.ff.net[0].proj)
    put(ours.mlp.down, theirs.ff.net[2])
    if last:
        put(ours.text_attn.kv, a.add_k_proj, a.add_v_proj)
    else:
        put(ours.text_attn.qkv, a.add_q_proj, a.add_k_proj, a.add_v_proj)
        put(ours.text_attn.out, a.to_add_out)
        put(ours.text_mlp.up, theirs.ff_context.net[0].proj)
        put(ours.text_mlp.down, theirs.ff_context.net[2])
    if rms:
        ours.attn.qk_norm.q.weight.data.copy_(a.norm_q.weight)
        ours.attn.qk_norm.k.weight.data.copy_(a.norm_k.weight)
        ours.text_attn.qk_norm.k.weight.data.copy_(a.norm_added_k.weight)
        if not last:
            ours.text_attn.qk_norm.q.weight.data.copy_(a.norm_added_q.weight)

    image, text, time = draws(2, N, D), draws(2, L, D), draws(2, D)
    m = theirs.norm1.linear(nn.functional.silu(time)).chunk(6, dim=1)
    c = theirs.norm1_context.linear(nn.functional.silu(time)).chunk(2 if last else 6, dim=1)
    by_name = {"attn": triple(*m[:3]), "mlp": triple(*m[3:])}
    by_name |= {"text_attn": triple(c[1], c[0], None)} if last else {"text_attn": triple(*c[:3]), "text_mlp": triple(*c[3:])}
    got = ours(torch.cat([image, text], dim=1), layout(tokens=N + L), by_name)
    expected_text, expected = theirs(image, text, time)
    bound = 1e-8 if rms else 1e-10  # diffusers takes the mean square in float32
    near(got[:, :N], expected, bound)
    assert (got.shape[1] == N) == last
    if not last:
        near(got[:, N:], expected_text, bound)


def copy_basic(ours, theirs, *, text):
    plain_norms(ours)
    put(ours.attn.qkv, theirs.attn1.to_q, theirs.attn1.to_k, theirs.attn1.to_v)
    put(ours.attn.out, theirs.attn1.to_out[0])
    put(ours.mlp.up, theirs.ff.net[0].proj)
    put(ours.mlp.down, theirs.ff.net[2])
    if text:
        put(ours.text.q, theirs.attn2.to_q)
        put(ours.text.kv, theirs.attn2.to_k, theirs.attn2.to_v)
        put(ours.text.out, theirs.attn2.to_out[0])


@pytest.mark.parity("block of PixArt", "diffusers BasicTransformerBlock, ada_norm_single")
def test_pixart_block_is_that_of_diffusers():
    """ada_norm_single, where padding is masked."""
    theirs = jitter(
        BasicTransformerBlock(
            D, HEADS, 16, cross_attention_dim=D, attention_bias=True, activation_fn="gelu-approximate", norm_eps=1e-6,
            norm_type="ada_norm_single", norm_elementwise_affine=False,
        )
    )  # fmt: skip
    ours = network(**(DIT | {"adaln": ("single", {"gate": Gate.zero})})).double().stack[0]
    copy_basic(ours, theirs, text=True)
    x, text, time = draws(2, N, D), draws(2, L, D), draws(2, 6 * D)
    mask = torch.ones(2, L, dtype=torch.bool)
    mask[1, 3:] = False
    m = (theirs.scale_shift_table[None] + time.view(2, 6, D)).unbind(1)
    got = ours(x, layout(text, mask), {"attn": triple(*m[:3]), "mlp": triple(*m[3:])})
    bias = (1 - mask[:, None].double()) * -1e9
    near(got, theirs(x, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=time))


@pytest.mark.parity("caption MLP of `cross_attn`", "diffusers PixArtAlphaTextProjection")
def test_caption_projection_is_that_of_diffusers():
    theirs = jitter(PixArtAlphaTextProjection(CONTEXT, D))
    fusion = network(**DIT).double().text
    put(fusion.up, theirs.linear_1)
    put(fusion.down, theirs.linear_2)
    text = draws(2, L, CONTEXT)
    near(fusion.states(text), theirs(text))


@pytest.mark.parity("block of `dit`", "diffusers BasicTransformerBlock, ada_norm_zero")
def test_dit_block_is_that_of_diffusers():
    """ada_norm_zero; text is read by an output layer of zeros, and adds nothing."""
    theirs = jitter(
        BasicTransformerBlock(
            D, HEADS, 16, attention_bias=True, activation_fn="gelu-approximate", norm_type="ada_norm_zero",
            num_embeds_ada_norm=10, norm_elementwise_affine=False,
        )
    )  # fmt: skip
    ours = network(**DIT).double().stack[0]
    copy_basic(ours, theirs, text=False)
    nn.init.zeros_(ours.text.out.weight)
    nn.init.zeros_(ours.text.out.bias)
    theirs.eval()  # drops no labels
    theirs.norm1.norm.eps = theirs.norm3.eps = 1e-6
    x, step, label = draws(2, N, D), torch.tensor([3, 700]), torch.tensor([1, 4])
    time = theirs.norm1.emb(step, label, hidden_dtype=torch.float64)
    m = theirs.norm1.linear(nn.functional.silu(time)).chunk(6, dim=1)
    got = ours(x, layout(draws(2, L, D)), {"attn": triple(*m[:3]), "mlp": triple(*m[3:])})
    near(got, theirs(x, timestep=step, class_labels=label))


def test_dit_block_starts_as_the_identity():
    model = network(perturbed=False, **DIT)
    x = torch.randn(2, N, D)
    block, modulation = model.stack[0], model.adaln(torch.randn(2, 1, D))
    assert torch.equal(block(x, layout(torch.randn(2, L, D)), block.own(modulation)), x)


def uvit(blocks=5):
    return LAYER | {"backbone": ("uvit", {"blocks": blocks}), "merge": "concat", "adaln": "none", "text_fusion": "concat"}


@pytest.mark.parity("network `uvit`, tokens and skips", "layers of torch.nn, float64")
def test_uvit_is_layers_of_torch_and_a_stack_of_states():
    """Time and text are tokens; each block of the second half takes Linear([x; state]) of its mirror."""
    model = network(**uvit()).double()
    given = inputs(model, padded=False, dtype=torch.float64)
    c = given.condition
    x = torch.cat([model.patch(given.x), model.text.proj(c.text), model.time(given.timestep) + model.aspect(c.aspect)], dim=1)
    states = []
    for block in model.in_blocks:
        x = layer_of_torch(block, dim=D, heads=HEADS)(x)
        states.append(x)
    x = layer_of_torch(model.mid, dim=D, heads=HEADS)(x)
    for block in model.out_blocks:
        skip = block.merge.proj
        x = layer_of_torch(block, dim=D, heads=HEADS)(torch.cat([x, states.pop()], dim=2) @ skip.weight.T + skip.bias)
    near(given.run(model), model.out(x[:, :16], (4, 4)))


def count(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(size, **axes):
    with torch.device("meta"):
        return build(architecture(size=size, **axes))


def test_counts_of_the_spec():
    """MMDiT block and cross-attentions at width 1024 (spec 6), the 14 skips of U-ViT-H/2 (spec 2)."""
    size = {"dim": 1024, "heads": 16, "head_dim": 64, "mlp_dim": 4096}
    wide = DIT | {"mlp": ("gelu", {"width": 1.0})}
    model = on_meta(size, **(wide | {"text_fusion": "mmdit"}))
    norms = sum(count(m) for n, m in model.stack[0].named_children() if n.endswith("_norm"))
    modulation = sum(count(layer) for name, layer in model.adaln.layer.items() if name.startswith("stack_0_"))
    assert count(model.stack[0]) - norms + modulation == 37_779_456
    assert count(on_meta(size, **wide).stack[0].text) == 4_198_400
    huge = {"dim": 1152, "heads": 16, "head_dim": 72, "mlp_dim": 4608}
    model = on_meta(huge, **(uvit(29) | {"mlp": ("gelu", {"width": 1.0})}))
    assert sum(count(block.merge) for block in model.out_blocks) == 14 * (2 * 1152 * 1152 + 1152)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_tap_is_what_a_hook_sees(depth, checkpointing):
    model = network(**(DIT | {"routing": "tread"}), size={"gradient_checkpointing": checkpointing})
    given, seen = inputs(model), []
    model.stack[depth - 1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    tap = Tap(depth=depth)
    model(given.x, given.timestep, given.condition, route=given.route, tap=tap)
    assert torch.equal(tap.tokens, seen[0])
    assert tap.tokens.shape[2] == model.tap_width(depth)
    routed = model.ends[0] < depth <= model.ends[1]
    assert (tap.kept is not None) == routed
    if routed:
        assert torch.equal(tap.kept, given.route.noise.argsort(dim=1)[:, :8].sort(dim=1).values)


@pytest.mark.parametrize("name", ["xut", "uvit", "hdit", "dit", "mmdit", "sana"])
def test_the_tap_of_every_backbone_takes_the_alignment_loss(name):
    """Behind every block: image tokens alone, of the block's width, as a hook sees them, and gradients to all blocks up to it."""
    model = network(backbone=name)
    given = inputs(model)
    blocks = sorted((m for m in model.modules() if isinstance(m, Block)), key=lambda block: block.index)
    for depth in range(1, len(blocks) + 1):
        seen, tap = [], Tap(depth=depth)
        hook = blocks[depth - 1].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        model(given.x, given.timestep, given.condition, route=given.route, tap=tap)
        hook.remove()
        images = tap.tokens.shape[1]
        assert torch.equal(tap.tokens, seen[0][:, :images])
        assert tap.tokens.shape[2] == model.tap_width(depth)
        grid = 4 if name == "hdit" and tap.tokens.shape[2] == D else 16
        assert images == (grid if tap.kept is None else tap.kept.shape[1])
        features = torch.randn(2, grid, tap.tokens.shape[2], generator=torch.Generator().manual_seed(depth))
        model.zero_grad()
        misalignment(tap.tokens, features, tap.kept).sum().backward()
        reached = [any(p.grad is not None and p.grad.any() for p in block.parameters()) for block in blocks]
        assert reached == [i < depth for i in range(len(blocks))]


@pytest.mark.parity("merge and split of `hdit`", "strided convolutions of torch, float64")
def test_hdit_is_strided_convolutions_around_its_blocks():
    """Merge and split of 2x2 tokens are convolutions of stride 2, positions are pooled, the skip is torch.lerp."""
    hourglass = ("hdit", {"levels": 2, "outer": 1, "inner": 2})
    model = network(backbone=hourglass, merge="lerp", adaln="scale_only", text_fusion="cross_attn", routing="none").double()
    given = inputs(model, dtype=torch.float64)
    got, c, (outer, inner) = given.run(model), given.condition, model.levels
    time, (text, mask) = model.time(given.timestep) + model.aspect(c.aspect), model.text(c)

    def go(level, block, x, position):
        side, rotation = round(x.shape[1] ** 0.5), level.encoding.rotation(position)
        places = Layout(position=position, rotation=rotation, images=x.shape[1], grid=(side, side), text=text, text_mask=mask)
        places.halves = level.encoding.halves
        return block(x, places, block.own(level.adaln(level.time(time))))

    state = go(outer, outer.down[0], model.patch(given.x), c.position)
    kernel = outer.merge.weight.view(32, 2, 2, 16).permute(0, 3, 1, 2)
    x = nn.functional.conv2d(state.transpose(1, 2).reshape(2, 16, 4, 4), kernel, stride=2).flatten(2).transpose(1, 2)
    pooled = nn.functional.avg_pool2d(c.position.transpose(1, 2).reshape(2, 2, 4, 4), 2).flatten(2).transpose(1, 2)
    for block in inner.down:
        x = go(inner, block, x, pooled)
    kernel = outer.split.weight.view(2, 2, 16, 32).permute(3, 2, 0, 1)
    x = nn.functional.conv_transpose2d(x.transpose(1, 2).reshape(2, 32, 2, 2), kernel, stride=2).flatten(2).transpose(1, 2)
    last = outer.up[0]
    x, last.merge = torch.lerp(state, x, last.merge.factor), None
    near(got, model.out(go(outer, last, x, c.position), (4, 4)))


@pytest.mark.parametrize("name", ["xut", "uvit", "hdit", "dit", "mmdit", "sana"])
def test_every_backbone_learns_a_batch_by_the_training_loss(name):
    """What training calls, with the route that training asks for: 40 steps of Adam on one batch halve the loss."""
    objective = OBJECTIVE.build(OBJECTIVE.get("velocity").config())
    model = network(backbone=name)
    given = inputs(model)
    noise = torch.randn(given.x.shape, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = objective.loss(
            model, given.x, noise=noise, timestep=given.timestep, condition=given.condition, route=given.route
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
