"""The published layout: every name of it, both ways, and what its tensors compute by the spec's equations (spec 1.2, 1.3)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nano import CONTEXT, perturb

from hdm.config.compose import compose
from hdm.config.errors import CheckpointError, ConfigError
from hdm.model import Architecture, Condition, build, full_view, published

D, M, HEADS, HEAD_DIM = 24, 40, 3, 8
DEPTH, ENC, DEC, PRE, POST = 3, 2, 2, 1, 2
SMALL = [
    "preset=xut_upstream", "position.edges=exact", f"model.dim={D}", f"model.mlp_dim={M}", f"model.heads={HEADS}",
    f"model.head_dim={HEAD_DIM}", f"model.depth={DEPTH}", f"model.enc_blocks={ENC}", f"model.dec_blocks={DEC}",
    f"model.pre_depth={PRE}", f"model.post_depth={POST}",
]  # fmt: skip


def network(*lines, seed=0):
    architecture = Architecture.of(compose([*SMALL, *lines]))
    architecture.context_dim = CONTEXT
    return build(architecture, seed=seed)


@pytest.fixture(scope="module")
def model():
    return perturb(network()).double()


def published_keys():
    """The interface as it is: name and shape of all 255 tensors of XUT-base."""
    lines = (Path(__file__).parent / "published_keys.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#"))
    return {name: tuple(map(int, shape.split("x"))) for name, shape in pairs}


def test_the_base_network_has_exactly_the_published_names_and_shapes():
    base = build(Architecture.of(compose(["preset=xut_upstream"])), seed=None).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in published.to_published(base).items()}
    assert len(shapes) == 255
    assert shapes == published_keys()


def test_every_published_name_has_one_of_ours_and_goes_back():
    names = set(published_keys()) - {published.TIME_FREQUENCIES}
    own = {name: published.own_name(name) for name in names}
    assert None not in own.values()
    assert len(set(own.values())) == len(names)
    assert all(published.published_name(mine) == name for name, mine in own.items())


@pytest.mark.parametrize("prefix", published.PREFIXES)
def test_there_and_back_is_exact(model, prefix):
    state = model.state_dict()
    file = published.to_published(state, prefix=prefix) | {"te.text_models.0.x": torch.zeros(1), "vae.x": torch.zeros(1)}
    back = published.from_published(file, network(seed=None), source="f")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@given(st.text(alphabet="abdefgnoprstx_.#0123456789", max_size=40))
def test_a_name_is_of_the_layout_only_if_it_goes_back(name):
    own = published.own_name(name)
    assert own is None or published.published_name(own) == name


# --- what the tensors compute, from their published names ---------------------------------------------------------------------


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


class Published:
    """The author's network in float64 numpy, one image and one head at a time; sine and cosine turn the channel pairs."""

    def __init__(self, tensors):
        self.w = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def rms(self, name, x):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * self.w[f"{name}.norm.weight"]

    def turn(self, x, position, log_frequency):
        """Pair (2i, 2i+1) of a head turns by exp(log-frequency i of the flattened (hd/4, 2) table) times y, x, y, x …"""
        frequency = np.exp(log_frequency).reshape(-1)
        out = np.empty_like(x)
        for i, f in enumerate(frequency):
            angle = f * position[:, i % 2]
            a, b = x[:, 2 * i], x[:, 2 * i + 1]
            out[:, 2 * i], out[:, 2 * i + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return out

    def attend(self, name, q, k, v, position):
        out = []
        for h in range(HEADS):
            part = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
            turned = [self.turn(side[:, part], position, self.w[f"{name}.rope.freqs"][h]) for side in (q, k)]
            logits = turned[0] @ turned[1].T / np.sqrt(HEAD_DIM)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
        return self.linear(f"{name}.out", np.concatenate(out, axis=1))

    def sublayer(self, x, norm, shared, f):
        """Departure d: what is added to is the modulated norm."""
        scale, shift, gate = self.modulation[shared]
        h = self.rms(norm, x) * (1 + scale) + shift
        return h + f(h) * (1 + gate)

    def block(self, name, x, position, state=None):
        def attn(h):
            return self.attend(f"{name}.attn", *np.split(h @ self.w[f"{name}.attn.qkv.weight"].T, 3, axis=1), position)

        def xattn(h):
            k, v = np.split(state @ self.w[f"{name}.xattn.kv.weight"].T, 2, axis=1)
            return self.attend(f"{name}.xattn", h @ self.w[f"{name}.xattn.q.weight"].T, k, v, position)

        def swiglu(h):
            gate, value = np.split(self.linear(f"{name}.mlp.w12", h), 2, axis=1)
            return self.linear(f"{name}.mlp.w3", gate / (1 + np.exp(-gate)) * value)

        x = self.sublayer(x, f"{name}.attn_pre_norm", "attn", attn)
        if state is not None:
            x = self.sublayer(x, f"{name}.xattn_pre_norm", "xattn", xattn)
        return self.sublayer(x, f"{name}.mlp_pre_norm", "ffw", swiglu)

    def shared(self, name, t):
        h = (t - t.mean()) / np.sqrt(t.var() + 1e-5) * self.w[f"{name}.0.weight"] + self.w[f"{name}.0.bias"]
        return np.split(self.linear(f"{name}.3", mish(self.linear(f"{name}.1", h))), 3)

    def velocity(self, x, timestep, text, size):
        """x (4, h, w) and text (L, C) of an image of `size` (H, W) pixels."""
        channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        image = np.empty((rows * columns, D))
        for i in range(rows):
            for j in range(columns):
                patch = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                image[i * columns + j] = np.einsum("ocpq,cpq->o", self.w["in_patch.proj.weight"], patch)
        image += self.w["in_patch.proj.bias"]

        # departure b: the longer side is [-1, 1], the shorter its share; token centres
        along = [(2 * (np.arange(n) + 0.5) / n - 1) * side / max(size) for n, side in zip((rows, columns), size)]
        position = np.array([(y, x) for y in along[0] for x in along[1]] + [(0.0, 0.0)] * len(text))

        angle = 1000 * timestep * np.exp(-np.log(1e4) * np.arange(D // 2) / (D // 2))
        t = mish(self.linear("time_emb.proj.0", np.concatenate([np.cos(angle), np.sin(angle)])))
        aspect = np.array([np.log(size[1] / size[0])])  # departure j: log(W/H)
        t = t + self.linear("addon_info_embs_proj.2", mish(self.linear("addon_info_embs_proj.0", aspect)))
        self.modulation = {kind: self.shared(f"shared_adaln_{kind}", t) for kind in ("attn", "xattn", "ffw")}

        h = np.concatenate([image, self.linear("ctx_proj", text)])
        for i in range(PRE):
            h = self.block(f"prev_tread_trns.blocks.{i}", h, position)
        for i in range(DEPTH):
            for j in range(ENC):
                h = self.block(f"backbone.enc_blocks.{i}.{j}", h, position)
        deepest = h  # departure a: every decoder reads the last state
        for i in range(DEPTH):
            for j in range(DEC):
                h = self.block(f"backbone.dec_blocks.{i}.{j}", h, position, state=deepest if j == 0 else None)
        for i in range(POST):
            h = self.block(f"post_tread_trns.blocks.{i}", h, position)
        out = self.linear("out_patch.proj", h[: rows * columns]).reshape(rows, columns, 2, 2, channels)
        return out.transpose(4, 0, 2, 1, 3).reshape(channels, height, width)


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 64)], ids=str)
@pytest.mark.parity("network `xut` from published names", "equations over those names, float64")
def test_imported_weights_compute_the_published_equations(size):
    """Random tensors under the published names, with no detour over a network of ours."""
    shapes = {published.published_name(name): t.shape for name, t in network(seed=None).state_dict().items()}
    draw = torch.Generator().manual_seed(3)
    file = {name: 0.4 * torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    for name, tensor in file.items():
        tensor += 1.0 if name.endswith(("norm.weight", "freqs")) else 0.0
    model = network().double()
    model.load_state_dict(published.from_published(file, model, source="f"))

    grid = (size[0] // 16, size[1] // 16)
    x = torch.randn(1, 4, 2 * grid[0], 2 * grid[1], generator=draw, dtype=torch.float64)
    text = torch.randn(1, 5, CONTEXT, generator=draw, dtype=torch.float64)
    position = model.position_map(full_view(*size).double(), grid)
    condition = Condition(text=text, position=position, aspect=torch.log(torch.tensor([size[1] / size[0]], dtype=torch.float64)))
    with torch.no_grad():
        got = model(x, torch.tensor([0.37], dtype=torch.float64), condition)[0].numpy()
    expected = Published(file).velocity(x[0].numpy(), 0.37, text[0].numpy(), size)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


def test_the_time_frequencies_are_those_of_the_embedding():
    """In float64 by hand; published files hold them rounded."""
    expected = [10000.0 ** (-k / 12) for k in range(12)]
    np.testing.assert_allclose(published.time_frequencies(24)[0], expected, rtol=1e-6)


# --- what does not fit --------------------------------------------------------------------------------------------------------


def damaged(model, change):
    file = published.to_published(model.state_dict())
    change(file)
    return file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.pop("ctx_proj.bias"), "f: 'ctx_proj.bias' is missing"),
        (lambda f: f.update({"ctx_proj.biass": torch.zeros(D)}), "not of this network; did you mean 'ctx_proj.bias'"),
        (lambda f: f.update({"ctx_proj.weight": torch.zeros(D + 1, CONTEXT)}), "'ctx_proj.weight' has shape (25, 24) there"),
        (
            lambda f: f.update({"backbone.enc_blocks.0.0.mlp.w3.weight": torch.zeros(M, D)}),
            "'backbone.enc_blocks.0.0.mlp.w3.weight' is transposed",
        ),
        (lambda f: f.update({"time_emb.freqs": torch.ones(1, D // 2)}), "of another time embedding"),
        (lambda f: f.pop("in_patch.proj.weight"), "no checkpoint of the published layout"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(model, change, words):
    with pytest.raises(CheckpointError) as caught:
        published.from_published(damaged(model, change), model, source="f")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_precision_frequencies_pass(model):
    file = {name: tensor.half() for name, tensor in published.to_published(model.state_dict()).items()}
    assert len(published.from_published(file, model, source="f")) == len(file) - 1


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("backbone.residual=raw", "backbone.residual=normed"),
        ("merge.pairing=mirror", "merge.pairing=deepest"),
        ("merge=add", "merge=cross"),
        ("position=rect1", "position=bbox"),
        ("encoding.fraction=0.5", "encoding.fraction=1.0"),
        ("attention.qk_norm=rms", "attention.qk_norm=none"),
        ("adaln.gate=zero", "adaln.gate=one_plus"),
        ("routing=sprint", "routing=tread"),
    ],
)  # fmt: skip
def test_other_networks_are_refused_with_the_line_that_would_be_right(line, wanted):
    with pytest.raises(ConfigError) as caught:
        published.require_upstream(network(line, seed=None).architecture, subject="format=comfyui")
    assert line in str(caught.value)
    assert wanted in str(caught.value)


@pytest.mark.parametrize("line", ["position.edges=resampled", "text_fusion.mask=true", "routing=none", "encoding.spacing=log"])
def test_what_the_tensors_do_not_say_is_free(line):
    published.require_upstream(network(line, seed=None).architecture, subject="format=comfyui")
