"""What the runs of this folder are."""

NANO = [
    "model=nano", "model.dim=16", "model.mlp_dim=32", "model.heads=2", "model.head_dim=8", "model.depth=1", "model.patch=4",
    "text_encoder=hash", "text_encoder.width=12", "autoencoder=pixel", "crop.size=16", "sampler.steps=3", "train.precision=fp32",
]  # fmt: skip
