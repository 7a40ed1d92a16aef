"""The whole configuration of a run as plain dataclasses. Everything inside the laboratory takes these and nothing else.

Axis fields (`merge`, `routing`, …) hold the config of the chosen variant, whose type lives next to its class in the axis's file.
Durations on the training clock are counted in samples seen, the one clock that means the same for every batch size.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

from hdm.config.errors import ConfigError
from hdm.config.registry import option


class Precision(Enum):
    """Arithmetic of the forward and backward pass; master weights are fp32 always."""

    bf16 = "bf16"
    fp32 = "fp32"


class Dtype(Enum):
    """Arithmetic of a frozen network; auto is bf16 on an accelerator and fp32 on the CPU."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Storage(Enum):
    """Whether, and in which numbers, what a frozen network gives is kept on the disk (see `hdm.cache`)."""

    none = "none"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class QKNorm(Enum):
    """What the queries and keys of each head go through before they are rotated (spec 7)."""

    none = "none"
    rms = "rms"
    layer = "layer"
    cosine = "cosine"


class Final(Enum):
    """What scales and shifts the tokens between the last norm and the output layer, as the time embedding says (spec 3)."""

    none = "none"
    adaln = "adaln"
    table = "table"


class Match(Enum):
    """What a network is brought to have as much of as XUT of the report at the same sizes: see `hdm.model.match`."""

    none = "none"
    params = "params"
    flops = "flops"


class Resolution(Enum):
    """How a time shift a follows the number n of image tokens: not at all, sqrt(n / base) (SD3), or e^mu (Flux; spec 11)."""

    fixed = "fixed"
    sqrt = "sqrt"
    flux = "flux"


class Moments(Enum):
    """What becomes of the optimizer's state at the beginning of a stage; weights and averages carry over always."""

    reset = "reset"
    keep = "keep"


class Strategy(Enum):
    """How several processes share the work: whole copies of the network (DDP), or shards of it (FSDP2)."""

    ddp = "ddp"
    fsdp = "fsdp"


class Compression(Enum):
    """Arithmetic in which DDP exchanges gradients; the report's author had fp16 (spec 1.4)."""

    none = "none"
    fp16 = "fp16"
    bf16 = "bf16"


class Weights(Enum):
    """Which weights of a checkpoint: the power-function average (or the best there is), the raw ones, or the plain average."""

    ema = "ema"
    raw = "raw"
    ema_decay = "ema_decay"


class Resume(Enum):
    """What to do with a run folder that is there already."""

    auto = "auto"
    never = "never"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Sizes of the network, whatever the backbone (report, "Model Scale")."""

    size: str = option("base", "name of the preset that these numbers started from")
    width: int | None = option(
        None, "another width: model.dim becomes this, heads (of one size) and mlp_dim follow; stored as what they come to"
    )
    dim: int = option(1024, "width d of the residual stream")
    mlp_dim: int = option(3072, "hidden width m of the SwiGLU")
    heads: int = option(8, "attention heads")
    head_dim: int = option(128, "channels per head; heads x head_dim = dim")
    depth: int = option(4, "encoder groups, and as many decoder groups")
    enc_blocks: int = option(1, "blocks per encoder group")
    dec_blocks: int = option(3, "blocks per decoder group; the first one carries the merge")
    pre_depth: int = option(1, "plain blocks before the routed part (N of the report)")
    post_depth: int = option(3, "plain blocks after the routed part (M of the report)")
    patch: int = option(2, "side of a patch, in latent pixels")
    gradient_checkpointing: bool = option(
        False, "recompute each block in the backward pass: less memory, about a third more compute"
    )

    @property
    def blocks(self) -> int:
        """Blocks of XUT at these sizes: (enc_b + dec_b) depth + N + M (spec 1.1)."""
        return (self.enc_blocks + self.dec_blocks) * self.depth + self.pre_depth + self.post_depth

    def at_width(self, dim: int) -> "ModelConfig":
        """These sizes at width `dim`: heads of the same size, an MLP of the same ratio. Raises ConfigError when there are none."""
        mlp_dim, rest = divmod(self.mlp_dim * dim, self.dim)
        if dim < 1 or dim % self.head_dim or rest:
            raise ConfigError(
                f"width {dim}: needs whole heads of model.head_dim={self.head_dim} and a whole MLP of"
                f" model.mlp_dim / model.dim = {self.mlp_dim} / {self.dim} times the width; choose a multiple of {self.head_dim}"
            )
        return dataclasses.replace(self, width=None, dim=dim, heads=dim // self.head_dim, mlp_dim=mlp_dim)


@dataclass(kw_only=True, slots=True)
class BackboneConfig:
    """What stands between the last block of any backbone and the velocity (spec 1.2 and 3)."""

    final_norm: bool = option(False, "a norm, of the norm axis, before the output layer; none in XUT")
    final: Final = option(Final.none, "modulation behind that norm: none (XUT), adaln (DiT) or table (PixArt)")
    zero_output: bool = option(False, "the output layer starts at zero (DiT); false: at std 1/dim^2 (XUT)")


@dataclass(kw_only=True, slots=True)
class CaptionConfig:
    """How a caption is drawn from its record each time it is seen (spec 1.3 m and 1.4)."""

    shuffle: bool = option(True, "shuffle groups, and tags inside their group")
    shuffle_groups: bool = option(True, "false: groups stay in their order, only their tags are shuffled")
    separator: str = option("$$", "what separates tags; ',' for the comma-separated captions of fine-tuning sets")
    tag_dropout: float = option(0.25, "probability that a tag is left out")
    group_dropout: float = option(0.3, "probability that a whole group is left out")
    text_dropout: float = option(0.1, "probability of the empty caption, for classifier-free guidance; the report's preset has 0")


@dataclass(kw_only=True, slots=True)
class CollectedConfig:
    """What every data set has that is made of somebody's files: which are held out, and which are refused."""

    val_share: float = option(0.01, "share that is held out, by a hash of each key: adding files moves none between the splits")
    min_side: int = option(64, "shortest side in pixels of a picture that is used")
    max_megapixels: float = option(100.0, "largest picture that is decoded; a larger one is taken for damage or an attack")
    max_quarantined: float = option(0.1, "share of files that may be unusable; more is refused")
    shard: int = option(1024, "pictures in a shard")
    images: int | None = option(None, "training images, for the plan of a run whose data are elsewhere")

    def check(self, run: Any) -> None:
        """Ranges."""
        for key, value, low, high in (
            ("val_share", self.val_share, 0, 0.5), ("max_quarantined", self.max_quarantined, 0, 1),
            ("min_side", self.min_side, 1, 4096), ("max_megapixels", self.max_megapixels, 0.01, 178), ("shard", self.shard, 1, 1 <<
            20), ):  # fmt: skip
            if not low <= value <= high:
                raise ConfigError(f"data.{key}={value}: must be between {low} and {high}")
        if self.images is not None and self.images < 1:
            raise ConfigError(f"data.images={self.images}: must be above 0, or null")


@dataclass(kw_only=True, slots=True)
class BudgetConfig:
    """When a run ends: at the first limit that it reaches. Leave the others null."""

    steps: int | None = option(None, "optimizer steps")
    samples: int | None = option(None, "images seen")
    flops: float | None = option(None, "counted training FLOPs of the backbone")
    seconds: float | None = option(None, "seconds spent in training steps; such a run is not reproducible to the bit")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    batch_size: int = option(64, "global batch: images per optimizer step, over all processes and accumulation")
    accumulation: int = option(1, "micro-batches per step; must divide batch_size")
    clip: float = option(1.0, "largest global gradient norm; 0 switches clipping off")
    precision: Precision = option(Precision.bf16, "bf16 autocast over fp32 master weights, or fp32")
    workers: int = option(1, "data loading processes; the sample stream is the same for any number")
    log_every: int = option(1024, "samples between two log records")
    validate_every: int = option(16384, "samples between two validations")
    sample_every: int = option(16384, "samples between two sample grids")
    checkpoint_every: int = option(16384, "samples between two checkpoints")
    keep_checkpoints: int = option(2, "checkpoints to keep besides the first and the milestones")
    milestone_every: int | None = option(
        None, "samples between two milestones, checkpoints that are kept for good; so is each stage's last"
    )


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the network is spread over processes and compiled: from outside of it, and without changing what is computed."""

    strategy: Strategy = option(Strategy.ddp, "with several processes: ddp, or fsdp, which shards weights, averages and moments")
    compress: Compression = option(Compression.none, "arithmetic in which ddp exchanges gradients")
    compile: bool = option(False, "torch.compile, block by block; worth its minutes in long runs on an accelerator")
    timeout: float = option(30.0, "minutes after which a process that does not answer is given up")


WIDEST = 0.28  # relative width of a power-function average: its exponent is above 0 below 12^-1/2


@dataclass(kw_only=True, slots=True)
class EmaConfig:
    """Moving averages of the weights."""

    power: float = option(
        0.1, "relative width sigma_rel of the power-function average (EDM2); used for sampling; 0 switches it off"
    )
    decay: float = option(0.9999, "decay of the plain exponential average kept beside it; 0 switches it off")
    snapshot_every: int = option(0, "samples between two snapshots, of which python -m hdm.ema makes any other width; 0 for none")
    snapshot_powers: list[float] = option([0.05, 0.1], "relative widths of the averages that a snapshot holds")

    def powers(self) -> dict[str, float]:
        """The relative width of every power-function average that is kept, by name."""
        named = {"power": self.power} if self.power > 0 else {}
        others = [width for width in self.snapshot_powers if width != self.power] if self.snapshot_every else []
        return named | {f"power-{width:g}": width for width in others}


@dataclass(kw_only=True, slots=True)
class ValidationConfig:
    """Validation loss: unrouted, fixed images, fixed noise, fixed timesteps."""

    samples: int = option(256, "held-out images")
    timesteps: int = option(8, "timesteps per image, at the quantiles of logit-normal(0, 1) whatever the run trains on")
    batch_size: int = option(64, "images held at once; the network sees passes of a fixed size, so no number depends on it")
    whole: bool = option(False, "also val/loss_whole: the same images in their own aspect ratios, whatever crop the run trains on")


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """Pictures: the grid in training, `hdm.sample`, and what the metrics look at."""

    grid: int = option(16, "held-out prompts in the sample grid; 0 switches it off")
    seed: int = option(0, "noise seed of the grid")
    batch_size: int = option(64, "images held at once; the network sees passes of a fixed size, so none depends on it")


class Metric(StrEnum):
    """Commands of eval/ that measure a checkpoint."""

    fid = "fid"
    kid = "kid"
    prdc = "prdc"
    fd = "fd"
    fd_dinov2 = "fd_dinov2"
    cmmd = "cmmd"
    clip = "clip"
    valloss = "valloss"
    memorisation = "memorisation"
    preference = "preference"


class Alignment(StrEnum):
    """Text-image models; auto is clip where its weights are, else ridge_minilm."""

    auto = "auto"
    clip = "clip"
    ridge_minilm = "ridge_minilm"


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Metrics, by `python -m eval.*`, in training, or at the end of a run."""

    metrics: list[Metric] = option([Metric.fid, Metric.clip], "commands of eval/ that run after training; [] for none")
    initial: bool = option(False, "also evaluate the initial weights, to show what training changed")
    every: int = option(0, "samples seen between two evaluations in training; 0 for none")
    samples: int = option(512, "generated images")
    repeat: bool = option(False, "go round the held-out captions again where there are fewer than eval.samples")
    whole: bool = option(False, "whole images in their own aspect ratios instead of the square crops of validation")
    reference: str = option("val", "the real images of a distance: val, train, or FILE.safetensors of python -m eval.reference")
    features: str = option("auto", "feature extractor: auto, inception, efficientnet, dinov2, clip; plug-ins may register more")
    inception: str | None = option(None, "file with the Inception weights; null is where torch-fidelity keeps them")
    dinov2: str = option("facebook/dinov2-large", "DINOv2: a folder, or a hub name that the local cache holds")
    alignment: Alignment = option(Alignment.auto, "text-image model: auto, clip or ridge_minilm")
    clip: str = option("openai/clip-vit-large-patch14", "CLIP: a folder, or a hub name that the local cache holds")
    recall: list[int] = option([5], "K of alignment's R@K, image to text and text to image: one's own among the K nearest")
    preference: str = option("pickscore", "judge of eval.preference; plug-ins may register more")
    judge: str = option("yuvalkirstain/PickScore_v1", "the judge's weights: a folder, or a hub name that the local cache holds")
    bootstrap: int = option(50, "bootstrap samples behind each sampling error; 0 for none")
    seed: int = option(0, "noise seed")


@dataclass(kw_only=True, slots=True)
class TrackConfig:
    """Where runs are recorded besides their own folder."""

    uri: str | None = option(
        None, "MLflow tracking URI; null: $MLFLOW_TRACKING_URI, else SQLite in the current folder; 'off': only the run folder"
    )
    experiment: str = option("hdm-lab", "MLflow experiment")
    name: str = option("", "run name in MLflow; by default the name of the run folder")
    parent: str | None = option(None, "parent run, set by hdm.sweep: its folder, relative to `out`, or an MLflow run id")


class Adapter(Enum):
    """The form of a low-rank update."""

    lora = "lora"
    lokr = "lokr"


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Fine-tuning by low-rank adapters beside frozen weights, through peft (LoRA: Hu et al., 2021); rank 0 trains all weights.

    Adapters imply routing.rate=0, which a line of one's own overrules: few steps are not to be spent on part of the tokens.
    """

    rank: int = option(0, "rank r of the update of each layer; 0 for no adapters")
    alpha: float | None = option(None, "the update is multiplied by alpha / rank; null: 1")
    kind: Adapter = option(Adapter.lora, "lora: B A; lokr: a Kronecker product (LyCORIS), whose left factor has `factor` rows")
    factor: int = option(4, "of kind=lokr; 4 in the report author's fine-tuning configuration")
    targets: list[str] = option([], "linear layers by the end of their names, such as [attn.qkv,mlp.w12]; [] is all of the blocks")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """What the plan and the progress line assume of the machine."""

    name: str = option("this machine", "name in reports")
    devices: int = option(1, "number of accelerators")
    peak_tflops: float | None = option(None, "dense bf16 peak per device; null measures a matrix product at the start")
    memory_gb: float | None = option(None, "memory per device")
    dollars_per_hour: float | None = option(None, "price of one device for one hour")
    utilisation: float = option(0.4, "fraction of the peak that the plan assumes; recomputed blocks count as work")


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """One stage of a progressive run (report, "Recipe"); written as `stages.NAME.FIELD` and `stages.NAME.KEY-OF-THE-RUN`."""

    name: str = option("", "label")
    images: int | None = option(None, "images that make an epoch; null: those of the stage's data set")
    epochs: float | None = option(None, "passes over them, in whole batches")
    steps: int | None = option(None, "optimizer steps, instead of epochs")
    moments: Moments = option(Moments.reset, "reset: the optimizer starts afresh, as in a run of its own; keep: it carries over")
    set: list[str] = option([], "what differs from the run: lines as on the command line")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A run, complete. `python -m hdm.variants` lists what each axis offers."""

    experiment: str = option("none", "the experiments/*.yaml that this run started from")
    name: str = option("", "label of the run; by default what distinguishes it")
    seed: int = option(0, "seed of every random draw")
    plugins: list[str] = option([], "modules to import first; they may register variants")
    out: str = option("runs", "folder that receives run folders")
    datasets: str = option("datasets", "folder that receives prepared data sets")
    cache: str = option("cache", "folder that receives converted weights and reference statistics")
    device: str = option("auto", "auto, cpu, cuda, cuda:1 …")
    resume: Resume = option(Resume.auto, "auto continues the run's own folder; never starts a new one beside it")

    match: Match = option(
        Match.none,
        "params or flops: change backbone.blocks, where that is null, and model.mlp_dim until parameters, or FLOPs of an unrouted"
        " forward pass, are within 1 % of those of the report's XUT at the same sizes; the run stores the sizes and match=none",
    )
    matched: str = option("", "what match= came to; written by the laboratory")
    init_from: str | None = option(
        None, "start from these weights: a run folder, a checkpoint, an exported .safetensors, or a file of the published layout"
    )
    init_weights: Weights = option(Weights.ema, "which weights of it: ema, raw or ema_decay")
    init_strict: bool = option(True, "false loads what fits and lists what does not")
    init_digest: str = option("", "digest of the weights that init_from names; written by the laboratory")
    lora: LoraConfig = option(LoraConfig(), "adapters")
    model: ModelConfig = option(ModelConfig(), "sizes")
    backbone: Any = None
    merge: Any = None
    adaln: Any = None
    norm: Any = None
    attention: Any = None
    mlp: Any = None
    position: Any = None
    encoding: Any = None
    routing: Any = None
    text_fusion: Any = None
    text_encoder: Any = None
    autoencoder: Any = None
    data: Any = None
    crop: Any = None
    objective: Any = None
    alignment: Any = None
    teacher: Any = None
    timestep: Any = None
    sampler: Any = None
    guidance: Any = None
    optimizer: Any = None
    schedule: Any = None

    captions: CaptionConfig = option(CaptionConfig(), "caption draws")
    train: TrainConfig = option(TrainConfig(), "training loop")
    parallel: ParallelConfig = option(ParallelConfig(), "processes")
    budget: BudgetConfig = option(BudgetConfig(), "when to stop")
    ema: EmaConfig = option(EmaConfig(), "averaged weights")
    validation: ValidationConfig = option(ValidationConfig(), "validation loss")
    sampling: SamplingConfig = option(SamplingConfig(), "pictures")
    eval: EvalConfig = option(EvalConfig(), "metrics")
    track: TrackConfig = option(TrackConfig(), "experiment tracking")
    hardware: HardwareConfig = option(HardwareConfig(), "machine")
    stages: list[StageConfig] = option([], "progressive stages; empty for a single-stage run")


MODELS: dict[str, ModelConfig] = {
    "nano": ModelConfig(size="nano", dim=64, mlp_dim=192, heads=2, head_dim=32, depth=2, dec_blocks=2, post_depth=1),
    "tiny": ModelConfig(size="tiny", dim=256, mlp_dim=768, heads=4, head_dim=64, depth=2, dec_blocks=2, post_depth=1),
    "small": ModelConfig(size="small", dim=896, mlp_dim=3072, heads=14, head_dim=64, dec_blocks=2),
    "base": ModelConfig(),
    "large": ModelConfig(size="large", dim=1280, mlp_dim=4096, heads=10),
}

HARDWARE: dict[str, HardwareConfig] = {
    "auto": HardwareConfig(),
    # dense bf16 peaks from the vendor's data sheets; rental prices as the report quotes them ($535-620 for 4 cards x 385 h)
    "rtx5090x4": HardwareConfig(name="4 x RTX 5090", devices=4, peak_tflops=209.5, memory_gb=32, dollars_per_hour=0.375),
    "rtx4090": HardwareConfig(name="RTX 4090", peak_tflops=165.2, memory_gb=24),
    "h100": HardwareConfig(name="H100 SXM", peak_tflops=989.0, memory_gb=80),
}

PRESET_GROUPS: dict[str, tuple[dict[str, Any], str]] = {"model": (MODELS, "base"), "hardware": (HARDWARE, "auto")}
