"""A trained network as a pipeline of the diffusers library.

    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    image = pipe("red apple", seed=0).images[0]

The network is built by the laboratory's registry, so any backbone and variant is one, and this package must be installed where a
folder is loaded: the folder's own pipeline.py does nothing but import it. Steps are Euler's, by diffusers' scheduler on our grid;
the grid's shift is applied once, by us, since the scheduler would apply a static shift twice (spec 11).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hdm import rng, torchvision_cpu

torchvision_cpu.declare()

import diffusers  # noqa: E402
from diffusers.configuration_utils import ConfigMixin as _ConfigMixin  # noqa: E402
from diffusers.configuration_utils import register_to_config as _register  # noqa: E402
from torch import Tensor  # noqa: E402

from hdm.conditioning.weights import torch_dtype  # noqa: E402
from hdm.config.axes import AUTOENCODER, GUIDANCE, OBJECTIVE, TEXT_ENCODER  # noqa: E402
from hdm.config.compose import from_flat  # noqa: E402
from hdm.config.schema import RunConfig  # noqa: E402
from hdm.diffusion.generate import Camera, Generator  # noqa: E402
from hdm.diffusion.guidance import Guidance  # noqa: E402
from hdm.diffusion.sampler import Euler, EulerConfig, StepsConfig  # noqa: E402
from hdm.model import build  # noqa: E402
from hdm.model.backbone import Architecture, Backbone, Condition, Route, Tap, full_view  # noqa: E402

# diffusers is not typed. It looks for the names of its base classes in the module of a class that it loads.
ConfigMixin: Any = _ConfigMixin
DiffusionPipeline: Any = diffusers.DiffusionPipeline
FlowMatchEulerDiscreteScheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler
ModelMixin: Any = diffusers.ModelMixin
_output: Any = diffusers.ImagePipelineOutput
register_to_config: Any = _register


class HDMTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Any backbone of the laboratory; `run` is the flat configuration that config.json of its run holds."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, run: dict[str, Any]) -> None:
        super().__init__()
        self.network = build(Architecture.of(from_flat(run)), seed=None).to_empty(device="cpu")

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        *,
        position: Tensor,
        aspect: Tensor,
        route_noise: Tensor | None = None,
        route_rate: float | None = None,
    ) -> Tensor:
        """What the network predicts, in the dtype of `hidden_states` (B, C, h, w).

        `timestep` (B,) is in [0, 1], 1 being noise; text states are (B, L, D), their mask True where a token is real; `position`
        (B, N, 2) is a position map and `aspect` (B,) log(width / height).
        """
        condition = Condition(
            text=encoder_hidden_states.to(self.dtype), text_mask=encoder_attention_mask, position=position, aspect=aspect
        )
        route = None if route_noise is None else Route(noise=route_noise, rate=route_rate)
        predicted: Tensor = self.network(hidden_states, timestep, condition, route=route)
        return predicted


class _Through(Backbone):
    """The transformer as guidance and objectives call a network, by its own forward, where libraries hang their hooks."""

    def __init__(self, transformer: HDMTransformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.architecture = transformer.network.architecture

    def forward(
        self, x: Tensor, timestep: Tensor, condition: Condition, *, route: Route | None = None, tap: Tap | None = None
    ) -> Tensor:
        routed = {} if route is None else {"route_noise": route.noise, "route_rate": route.rate}
        velocity: Tensor = self.transformer(
            x, timestep, condition.text, condition.text_mask, position=condition.position, aspect=condition.aspect, **routed
        )
        return velocity


class HDMPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Text to image with a network of HDM-Lab. Text encoder, tokenizer and vae are None where the run had no such network."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["text_encoder", "tokenizer", "vae"]  # noqa: RUF012 (diffusers' own name)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: HDMTransformer,
        scheduler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        vae: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae)
        self.run: RunConfig = from_flat(dict(transformer.config.run))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        seed: int | None = None,
        camera_x: float = 0.0,
        camera_y: float = 0.0,
        camera_zoom: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Images for each prompt. What is left out is as the run has it: size, steps, guidance.

        `latents` is the noise to begin with; else it comes from `seed`, which draws what `python -m hdm.sample seed=…` draws, else
        from `generator`. camera_x > 0 looks to the right, camera_y > 0 down, camera_zoom > 1 goes closer. `output_type`: pil; np
        (B, H, W, 3) or pt (B, 3, H, W) in [0, 1]; latent. The callback is called as diffusers' pipelines call theirs.
        """
        run, device = self.run, self._execution_device
        prompts = [text for text in _texts(prompt) for _ in range(num_images_per_prompt)]
        negative = _texts("" if negative_prompt is None else negative_prompt)
        if len(negative) not in (1, len(prompts) // num_images_per_prompt):
            raise ValueError(
                f"negative_prompt: {len(negative)} texts for {len(prompts) // num_images_per_prompt} prompts; give one, or as many"
            )
        empty = [text for text in negative for _ in range(len(prompts) // len(negative))]
        size = (height or run.crop.size, width or run.crop.size)
        network = _Through(self.transformer)
        grid = Generator(network, run=run, text_encoder=None, autoencoder=None, device=device).token_grid(size)
        condition, null = self._conditions(
            prompts, empty, size=size, grid=grid, camera=Camera(x=camera_x, y=camera_y, zoom=camera_zoom)
        )
        shape = (run.autoencoder.channels, grid[0] * run.model.patch, grid[1] * run.model.patch)
        x, route_noise = self._noise(len(prompts), shape, grid[0] * grid[1], latents=latents, seed=seed, generator=generator)
        times = self._times(num_inference_steps, grid[0] * grid[1])
        guidance = self._guidance(guidance_scale).along(times)
        predictor = OBJECTIVE.build(run.objective).as_velocity(network)

        self.scheduler.set_timesteps(sigmas=times[:-1].tolist(), device=device)
        self.scheduler.set_begin_index(0)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            t = self.scheduler.sigmas[step].to(x).expand(len(x))
            velocity = guidance.velocity(predictor, x, t, condition, null, route_noise=route_noise)
            x = self.scheduler.step(velocity.to(x.dtype), timestep, x, return_dict=False)[0]
            if callback_on_step_end is not None:
                given = {"latents": x} if "latents" in callback_on_step_end_tensor_inputs else {}
                x = callback_on_step_end(self, step, timestep, given).pop("latents", x)
        images = x if output_type == "latent" else self._pictures(x, output_type)
        self.maybe_free_model_hooks()
        return _output(images=images) if return_dict else (images,)

    def _conditions(
        self, prompts: list[str], negative: list[str], *, size: tuple[int, int], grid: tuple[int, int], camera: Camera
    ) -> tuple[Condition, Condition]:
        """The condition of the prompts and that of the negative ones."""
        device, batch = self._execution_device, len(prompts)
        encoder = self._encoder()
        view = full_view(*size, batch=batch).to(device)
        position = camera.move(self.transformer.network.position_map(view, grid))
        aspect = torch.full((batch,), math.log(size[1] / size[0]), device=device)
        both = []
        for captions in (prompts, negative):
            text, mask = encoder.encode(captions)
            both.append(Condition(text=text, text_mask=mask, position=position, aspect=aspect))
        return both[0], both[1]

    def _noise(
        self,
        count: int,
        shape: tuple[int, int, int],
        tokens: int,
        *,
        latents: Tensor | None,
        seed: int | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """What the path begins at, float32, and the draws that order the tokens of passes that are routed."""
        device, keys = self._execution_device, range(count)
        if latents is not None and latents.shape != (count, *shape):
            raise ValueError(f"latents of shape {tuple(latents.shape)}: must have {(count, *shape)}")
        if seed is not None:
            route = torch.from_numpy(rng.uniform(seed, "sample/route", keys, (tokens,)))
            noise = torch.from_numpy(rng.normal(seed, "sample/noise", keys, shape))
        else:
            where = generator.device if generator is not None else torch.device("cpu")
            noise = torch.empty(0) if latents is not None else torch.randn((count, *shape), generator=generator, device=where)
            route = torch.rand((count, tokens), generator=generator, device=where)
        return (noise if latents is None else latents).to(device, torch.float32), route.to(device)

    def _times(self, steps: int | None, tokens: int) -> Tensor:
        """The run's time grid, from 1 down to 0, whatever sampler it was for."""
        fields = {f.name: getattr(self.run.sampler, f.name) for f in dataclasses.fields(StepsConfig)}
        config = EulerConfig(**fields | ({} if steps is None else {"steps": steps}))
        return Euler(config).at(tokens).times

    def _guidance(self, scale: float | None) -> Guidance:
        config = self.run.guidance
        if scale == 1.0 and not hasattr(config, "scale"):
            scale = None
        if scale is not None and not hasattr(config, "scale"):
            raise ValueError(f"guidance_scale={scale}: the run was exported with guidance=none; export it with guidance=cfg")
        built: Guidance = GUIDANCE.build(config if scale is None else dataclasses.replace(config, scale=scale))
        return built

    def _pictures(self, latents: Tensor, output_type: str) -> Any:
        pixels = self._decoder().decode(latents).float().clamp(-1.0, 1.0).cpu()
        if output_type == "pt":
            return (pixels + 1) / 2
        if output_type == "np":
            return ((pixels + 1) / 2).permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            from hdm.pictures import to_image

            return [to_image(image) for image in ((pixels + 1) * 127.5).round().to(torch.uint8)]
        raise ValueError(f"output_type={output_type}: must be pil, np, pt or latent")

    def _encoder(self) -> Any:
        """The run's text encoder around the pipeline's networks; it computes in the dtype that the run had."""
        config, device = self.run.text_encoder, self._execution_device
        return _around(TEXT_ENCODER, config, device, None if self.text_encoder is None else (self.text_encoder, self.tokenizer))

    def _decoder(self) -> Any:
        return _around(AUTOENCODER, self.run.autoencoder, self._execution_device, self.vae)


def _around(axis: Any, config: Any, device: torch.device, given: Any) -> Any:
    """The variant of `config` with networks that are loaded already; without `given`, one that needs none."""
    cls = axis.of(config).load()
    if given is None:
        return cls(config, cache=Path(), device=device)

    def read(*_: Any, **__: Any) -> Any:
        network = given[0] if isinstance(given, tuple) else given
        network.to(torch_dtype(config.dtype, device)).eval()
        return given

    held = type(cls.__name__, (cls,), {"_read": read})
    return held(dataclasses.replace(config, path="."), cache=Path(), device=device)


def _texts(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)
