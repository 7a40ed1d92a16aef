"""Layers of torch.nn that carry the weights of ours: references that somebody else wrote."""

from torch import nn


def layer_of_torch(block, *, dim: int, heads: int, mlp: int = 128) -> nn.TransformerEncoderLayer:
    """The pre-norm layer of torch.nn with the weights of `block`, float64."""
    gelu = nn.GELU(approximate="tanh")
    theirs = nn.TransformerEncoderLayer(dim, heads, mlp, 0.0, gelu, layer_norm_eps=1e-6, batch_first=True, norm_first=True).double()
    theirs.self_attn.in_proj_weight.data.copy_(block.attn.qkv.weight)
    nn.init.zeros_(theirs.self_attn.in_proj_bias)
    pairs = [(theirs.norm1, block.attn_norm), (theirs.norm2, block.mlp_norm), (theirs.self_attn.out_proj, block.attn.out)]
    for to, source in [*pairs, (theirs.linear1, block.mlp.up), (theirs.linear2, block.mlp.down)]:
        to.load_state_dict(source.state_dict())
    return theirs
