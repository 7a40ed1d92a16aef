"""What each departure of the author's code from the report does, alone, in the numbers that spec 1.3 a-g measured."""

import math

import pytest
import torch
from nano import CONTEXT, inputs

from hdm.config.compose import compose, flatten
from hdm.model import Architecture, build, full_view
from hdm.model.attention import rotate

LINES = {
    "a": ["merge.pairing=deepest"],
    "b": ["position=bbox"],
    "c": ["encoding.fraction=1"],
    "d": ["backbone.residual=normed"],
    "f": ["encoding.learned=true", "encoding.spacing=constant"],
    "g": ["position=bbox", "position.edges=resampled"],
    "o": ["text_fusion.mask=false"],
    "q": ["model.heads=16", "model.head_dim=64"],
}


def network(*lines):
    """The nano network of the report, but for these lines, at its initial values."""
    architecture = Architecture.of(compose(["preset=xut_report", "model=nano", *lines]))
    architecture.in_channels, architecture.context_dim = 4, CONTEXT
    return build(architecture)


def departed(letter):
    return network(*LINES[letter])


def base(*lines):
    """The number of parameters of the full-size network."""
    return sum(p.numel() for p in build(Architecture.of(compose(list(lines))), seed=None).parameters())


@pytest.mark.parametrize("letter", LINES)
def test_each_line_departs_from_the_report_in_nothing_else(letter):
    report, other = flatten(compose(["preset=xut_report"])), flatten(compose(["preset=xut_report", *LINES[letter]]))
    keys = {line.partition("=")[0] for line in LINES[letter]}
    differing = {key for key in report.keys() | other.keys() if report.get(key) != other.get(key)}
    fields = {"position.origin", "position.edges"} if "position" in keys else set()  # another variant has other fields
    assert differing == keys | fields


def test_all_lines_together_are_the_preset():
    lines = [line for letter in LINES for line in LINES[letter]]
    assert flatten(compose(["preset=xut_report", *lines])) == flatten(compose(["preset=xut_upstream"]))


@pytest.mark.parametrize(("lines", "expected"), [([], [3, 2, 1, 0]), (LINES["a"], [3, 3, 3, 3])], ids=["report", "a"])
def test_a_which_encoder_state_each_decoder_reads(lines, expected):
    model = network("model.depth=4", *lines)
    made, read = [], []
    for group in model.encoder:
        group[-1].register_forward_hook(lambda _, args, out: made.append(out))
    for group in model.decoder:
        group[0].merge.register_forward_hook(lambda _, args, out: read.append(args[1]))
    inputs(model).run(model)
    assert [next(i for i, state in enumerate(made) if state is taken) for taken in read] == expected


@pytest.mark.parametrize(("height", "width", "product"), [(128, 128, 4.0), (128, 256, 2.0), (256, 128, 2.0), (64, 256, 1.0)])
def test_b_the_area_of_the_position_box(height, width, product):
    """rH rW = 4 min(H, W) / max(H, W): 4.0 for a square, 2.0 at 1:2. The report's is 1 for all."""
    grid = (height // 16, width // 16)
    for model, expected in ((network(), 1.0), (departed("b"), product)):
        place = model.position_map(full_view(height, width).double(), grid)[0]
        step = [((place[-1, a] - place[0, a]) / (grid[a] - 1)).item() for a in (0, 1)]
        assert step[0] * grid[0] * step[1] * grid[1] == pytest.approx(expected, rel=1e-12)
        assert place.mean(dim=0).abs().max() < 1e-12  # token centres about the middle


def test_c_how_many_channels_of_a_head_turn():
    """32 of 32; the report says the first half."""
    x = torch.ones(1, 2, 1, 32)
    for model, channels in ((network(), 16), (departed("c"), 32)):
        turned = rotate(x, model.encoding.rotation(torch.tensor([[[0.123, 0.217]]])))
        assert (turned != x).sum(dim=-1).tolist() == [[[channels], [channels]]]
        assert torch.equal(turned[..., channels:], x[..., channels:])


def test_d_the_stream_behind_sublayers_that_add_nothing():
    """With f zeroed a block returns its input of RMS 7.0; upstream's returns the norm of it, RMS 1.0."""
    for model, expected in ((network(), 7.0), (departed("d"), 1.0)):
        block, seen = model.pre[0], []
        for end in (block.attn.out, block.mlp.w3):
            torch.nn.init.zeros_(end.weight), torch.nn.init.zeros_(end.bias)

        def loud(_, args):
            tokens = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1))
            return (7 * tokens / tokens.square().mean(dim=-1, keepdim=True).sqrt(), *args[1:])

        block.register_forward_pre_hook(loud)
        block.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        inputs(model).run(model)
        rms = seen[0].square().mean(dim=-1).sqrt()
        torch.testing.assert_close(rms, torch.full_like(rms, expected), rtol=1e-5, atol=0)


def test_e_three_mlps_or_one():
    """Only three, one per kind of sublayer, make the report's 343M; 12,288 of upstream's are learned frequencies."""
    frequencies = 24 * 512
    assert base("preset=xut_report") == 343_163_920
    assert base("preset=xut_upstream") == 343_176_208 == 343_163_920 + frequencies
    assert base("preset=xut_report", "adaln=shared_mlp1") == 309_603_344 - frequencies
    assert base("preset=xut_report", "adaln=shared_mlp1", "adaln.triples=kind") == 334_775_312 - frequencies


def test_f_every_frequency_starts_at_pi():
    """All of them, in every layer and head; what was meant is pi … 5 pi. Under the report's map pi of bbox is 2 pi."""
    for lines, pi in ((["position=bbox"], math.pi), ([], 2 * math.pi)):
        model = network(*LINES["f"], *lines)
        learned = [p for name, p in model.named_parameters() if name.endswith("rope.freqs")]
        assert len(learned) == len(model.pre) + 2 + 4 + len(model.post) + 2  # an attention each, and two merges
        for p in learned:
            torch.testing.assert_close(p.exp(), torch.full_like(p, pi), rtol=1e-6, atol=0)
        meant = network("encoding.learned=true", *lines).pre[0].attn.rope.freqs.exp()
        assert (meant.min().item(), meant.max().item()) == pytest.approx((pi, 5 * pi), rel=1e-6)
        assert meant.unique().numel() == meant.numel() / 2  # y and x alike, every head its own
    assert not [name for name, _ in network().named_parameters() if name.endswith("freqs")]


def test_g_the_outermost_tokens_of_an_explicit_map():
    """Off by 0.027 at an 8-token grid, towards the middle, and the interior exact."""
    exact, moved = (departed(letter).position_map(full_view(128, 128).double(), (8, 8))[0] for letter in "bg")
    difference = (moved - exact).view(8, 8, 2)
    for axis in (0, 1):
        along = difference.movedim(axis, 0)[..., axis]
        assert [round(v, 3) for v in along[:, 0].tolist()] == [0.027, 0, 0, 0, 0, 0, 0, -0.027]
        assert not along[1:-1].any()
