"""XUT against the spec's equations, written out once more in float64 numpy with plain matrix products (spec 1.1, 1.2, 1.3)."""

import numpy as np
import pytest
import torch
from nano import inputs, network

from hdm.model.encoding import Spacing
from hdm.model.merge import Pairing
from hdm.model.xut import Residual

D, HEADS, HEAD_DIM = 32, 2, 16


def mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


class Reference:
    """One image at a time, one head at a time; complex numbers turn the channel pairs."""

    def __init__(self, model, *, frequencies, normed=False, deepest=False):
        self.w = {name: p.detach().numpy() for name, p in model.named_parameters()}
        self.frequencies, self.normed, self.deepest = frequencies, normed, deepest

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def attention(self, name, q, k, v, position, real):
        frequencies = np.exp(self.w[f"{name}.rope.freqs"]) if f"{name}.rope.freqs" in self.w else self.frequencies
        out = []
        for h in range(HEADS):
            part = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
            angles = np.stack([f[axis] * position[:, axis] for f in frequencies[h] for axis in (0, 1)], axis=1)
            logits = turn(q[:, part], angles) @ turn(k[:, part], angles).T / np.sqrt(HEAD_DIM)
            weights = np.exp(logits - logits.max(axis=1, keepdims=True)) * real
            out.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
        return self.linear(f"{name}.out", np.concatenate(out, axis=1))

    def sublayer(self, x, norm, kind, f):
        h = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * self.w[f"{norm}.weight"]
        scale, shift, gate = self.modulation[kind]
        h = h * (1 + scale) + shift
        return (h if self.normed else x) + (1 + gate) * f(h)

    def block(self, name, x, position, real, state=None):
        def self_attention(h):
            return self.attention(f"{name}.attn", *np.split(self.linear(f"{name}.attn.qkv", h), 3, axis=1), position, real)

        def cross_attention(h):
            k, v = np.split(self.linear(f"{name}.merge.attn.kv", state), 2, axis=1)
            return self.attention(f"{name}.merge.attn", self.linear(f"{name}.merge.attn.q", h), k, v, position, real)

        def mlp(h):
            a, b = np.split(self.linear(f"{name}.mlp.w12", h), 2, axis=1)
            return self.linear(f"{name}.mlp.w3", a / (1 + np.exp(-a)) * b)

        x = self.sublayer(x, f"{name}.attn_norm", "attn", self_attention)
        if state is not None:
            x = self.sublayer(x, f"{name}.merge_norm", "merge", cross_attention)
        return self.sublayer(x, f"{name}.mlp_norm", "mlp", mlp)

    def embedding(self, timestep, aspect):
        angle = 1000 * timestep * np.exp(-np.log(1e4) * np.arange(D // 2) / (D // 2))
        time = mish(self.linear("time.proj", np.concatenate([np.cos(angle), np.sin(angle)])))
        return time + self.linear("aspect.out", mish(self.linear("aspect.up", np.array([aspect]))))

    def head(self, kind, time):
        name = f"adaln.heads.{kind}"
        h = (time - time.mean()) / np.sqrt(time.var() + 1e-5) * self.w[f"{name}.0.weight"] + self.w[f"{name}.0.bias"]
        return np.split(self.linear(f"{name}.3", mish(self.linear(f"{name}.1", h))), 3)

    def velocity(self, x, timestep, text, real_text, position, aspect, kept=None):
        """x (C, H, W) -> (C, H, W); `kept` are the image tokens that take the middle."""
        c, height, width = x.shape
        rows, columns = height // 2, width // 2
        n = rows * columns
        patches = x.reshape(c, rows, 2, columns, 2).transpose(1, 3, 0, 2, 4).reshape(n, -1)
        image = patches @ self.w["patch.proj.weight"].reshape(D, -1).T + self.w["patch.proj.bias"]
        tokens = np.concatenate([image, self.linear("text.proj", text)])
        position = np.concatenate([position, np.zeros((len(text), 2))])
        real = np.concatenate([np.ones(n), real_text])
        self.modulation = {kind: self.head(kind, self.embedding(timestep, aspect)) for kind in ("attn", "merge", "mlp")}

        tokens = self.block("pre.0", tokens, position, real)
        inside = np.arange(len(tokens)) if kept is None else np.concatenate([kept, np.arange(n, len(tokens))])
        y, where, who = tokens[inside], position[inside], real[inside]
        a = self.block("encoder.0.0", y, where, who)
        b = self.block("encoder.1.0", a, where, who)
        y = self.block("decoder.0.0", b, where, who, state=b)
        y = self.block("decoder.0.1", y, where, who)
        y = self.block("decoder.1.0", y, where, who, state=b if self.deepest else a)
        tokens[inside] = self.block("decoder.1.1", y, where, who)
        out = self.linear("out.proj", self.block("post.0", tokens, position, real)[:n])
        return out.reshape(rows, columns, 2, 2, c).transpose(4, 0, 2, 1, 3).reshape(c, height, width)


def turn(x, angles):
    """Multiply the channel pairs of x, as complex numbers, by exp(i angle)."""
    turned = 2 * angles.shape[1]
    z = (x[:, 0:turned:2] + 1j * x[:, 1:turned:2]) * np.exp(1j * angles)
    return np.concatenate([np.stack([z.real, z.imag], axis=2).reshape(len(x), -1), x[:, turned:]], axis=1)


LOG_SPACED = np.geomspace(2 * np.pi, 10 * np.pi, 4).reshape(2, 2).T[..., None].repeat(2, 2)  # (heads, 2, axes), dealt round-robin
REPORT: dict = {}
UPSTREAM = {
    "backbone": ("xut", {"residual": Residual.normed}),
    "merge": ("cross", {"pairing": Pairing.deepest}),
    "position": "bbox",
    "encoding": ("axial_rope", {"fraction": 1.0, "learned": True, "spacing": Spacing.constant}),
}


@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("case", [REPORT, UPSTREAM], ids=["report", "upstream"])
@pytest.mark.parity("network `xut`, the report's and upstream's", "its equations, float64")
def test_forward_equals_the_equations(case, routed, grid):
    model = network(**case).double()
    given = inputs(model, grid=grid, dtype=torch.float64)
    reference = Reference(model, frequencies=LOG_SPACED, normed=bool(case), deepest=bool(case))
    got = given.run(model, routed=routed).detach().numpy()
    n = grid[0] * grid[1]
    c = given.condition
    for i in range(len(got)):
        kept = np.sort(np.argsort(given.route.noise[i].numpy())[: n - n // 2]) if routed else None
        expected = reference.velocity(
            given.x[i].numpy(), given.timestep[i].numpy(), c.text[i].numpy(), c.text_mask[i].numpy(), c.position[i].numpy(),
            c.aspect[i].numpy(), kept,
        )  # fmt: skip
        assert np.abs(expected).max() > 0.01
        np.testing.assert_allclose(got[i], expected, rtol=0, atol=1e-10)
