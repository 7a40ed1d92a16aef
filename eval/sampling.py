"""The sampling engine: images for captions, drawn in groups by any number of processes, each group kept as soon as it is there.

A group is 64 images of one size. Which images form a group depends on the captions alone, and which of them pass through the
network together on their size (hdm/diffusion/batching.py), each pass in one thread (eval/threads.py). So the images do not depend
on the number of processes, on cores, on `sampling.batch_size`, or on where an earlier evaluation was killed. Processes share the
work through the file system: each takes groups that are neither there nor locked. The system drops the lock of a process that dies,
and its group is drawn by another.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.pictures import Pictures
from eval.samples import CaptionedImages, to_bytes, weights_digest
from eval.threads import in_parallel
from hdm.cli import progress
from hdm.config.axes import AUTOENCODER, TEXT_ENCODER
from hdm.config.schema import RunConfig
from hdm.diffusion.batching import images_per_pass, passes
from hdm.diffusion.generate import Camera, Generator, Network
from hdm.files import replacing
from hdm.model.backbone import Backbone
from hdm.train.loop import pick_device

_REMEMBERED = 2**28  # bytes of text states


@dataclass(kw_only=True, slots=True, frozen=True)
class Group:
    """Images that are drawn together: their captions, views, keys of their noise, and size (H, W)."""

    captions: list[str]
    views: Float[Tensor, "n 6"]
    keys: list[int]
    size: tuple[int, int]


def groups(real: CaptionedImages, samples: int) -> list[Group]:
    """One image for each caption and view of `real`, going round again with other noise until there are `samples`."""
    found: list[Group] = []
    left, turn = samples, 0
    while left > 0:
        start = 0
        for count, height, width in real.sizes:
            rows = slice(start, start + min(count, left))
            start, left = start + count, left - min(count, left)
            if rows.start < rows.stop:
                keys = [number + turn * len(real) for number in real.numbers[rows]]
                found.append(Group(captions=real.captions[rows], views=real.views[rows], keys=keys, size=(height, width)))
        turn += 1
    return found


class Remembered:
    """A text encoder that encodes the same captions once: for every arm, every camera, and the empty caption of every group."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self._known, self._bytes = encoder, {}, 0  # type: ignore[var-annotated]

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As the encoder's own."""
        key = tuple(captions)
        if key in self._known:
            states: tuple[Tensor, Tensor] = self._known[key]
            return states
        states = self.encoder.encode(captions)
        size = sum(tensor.numel() * tensor.element_size() for tensor in states)
        if self._bytes + size <= _REMEMBERED:
            self._known[key], self._bytes = states, self._bytes + size
        return states


class Engine:
    """Draws images with one network on one device."""

    def __init__(
        self,
        model: Backbone,
        run: RunConfig,
        *,
        device: torch.device,
        weak: Network | None = None,
        text_encoder: Any = None,
        autoencoder: Any = None,
    ) -> None:
        cache = Path(run.cache)
        self.text_encoder = text_encoder or Remembered(TEXT_ENCODER.build(run.text_encoder, cache=cache, device=device))
        self.autoencoder = autoencoder or AUTOENCODER.build(run.autoencoder, cache=cache, device=device)
        self.run, self.device = run, device
        encoders = {"text_encoder": self.text_encoder, "autoencoder": self.autoencoder}
        self.generator = Generator(model.to(device).eval(), run=run, device=device, weak=weak, **encoders)

    def draw(self, group: Group, advance: Any = None, *, camera: Camera | None = None) -> Tensor:
        """The images of a group, uint8 (n, 3, H, W). Raises TrainingError for images that are not finite."""
        each = 1 / self.generator.sampler.evaluations

        def images(rows: slice) -> Tensor:
            return self.generator.images(
                group.captions[rows],
                size=group.size,
                seed=self.run.eval.seed,
                indices=group.keys[rows],
                camera=camera or Camera(),
                views=group.views[rows],
                on_step=(lambda count: advance(count * each)) if advance else None,
            )

        everything = range(len(group.keys))
        per_pass = images_per_pass(self.generator.token_grid(group.size), self.device)
        parts = passes(everything, per_pass if self.device.type == "cpu" else len(everything))  # a GPU is given all at once
        return to_bytes(torch.cat(list(in_parallel(images, parts, device=self.device))))


def generated(
    model: Backbone,
    run: RunConfig,
    real: CaptionedImages,
    *,
    folder: Path,
    device: torch.device,
    weak: Network | None = None,
    samples: int | None = None,
) -> Pictures:
    """Images for the captions and views of `real`, kept in `folder` under the digest of the weights.

    What is there already is not drawn again. Returns when all of them are there, whichever process drew them. `weak` is the other
    network of guidance=autoguidance.
    """
    work = groups(real, samples or len(real))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"samples-{weights_digest(model)}-{number:05d}.safetensors" for number in range(len(work))]
    missing = [i for i, path in enumerate(paths) if not _complete(path, work[i])]
    if not missing:
        return Pictures(paths)
    engine = Engine(model, run, device=device, weak=weak)
    with progress("generated images", sum(len(work[i].keys) for i in missing), "images") as advance:
        for wait in (False, True):  # first what nobody works on; then wait for the others, and take over from the dead
            for i in missing:
                with _claimed(paths[i], wait=wait) as mine:
                    if mine and not _complete(paths[i], work[i]):
                        images = engine.draw(work[i], advance)
                        with replacing(paths[i]) as partial:
                            save_file({"images": images}, partial)
    for path in paths:
        path.with_suffix(".lock").unlink(missing_ok=True)
    return Pictures(paths)


def _complete(path: Path, group: Group) -> bool:
    """Whether `path` holds the images of a group; False where a crash cut it short."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.get_slice("images").get_shape()) == [len(group.keys), 3, *group.size]
    except (OSError, SafetensorError):
        return False


@contextmanager
def _claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a group; False when another process holds it and we do not `wait`."""
    with open(path.with_suffix(".lock"), "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def own_device(name: str) -> torch.device:
    """The device called `name`; of several processes on one host, "auto" gives each a GPU of its own."""
    device = pick_device(name)
    if name == "auto" and device.type == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return device


def rank() -> int:
    """This process's number among those that torchrun or srun started for one command; 0 is the one that measures."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
