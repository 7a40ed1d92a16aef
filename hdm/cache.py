"""Keep what the frozen encoders give for a training set on the disk, so that training reads it instead of computing it.

usage: python -m hdm.cache [experiment=NAME] [KEY=VALUE ...] [--verify]

  python -m hdm.cache autoencoder.cache=bf16 crop.places=4 …   posteriors of every crop that training can be given
  python -m hdm.cache text_encoder.cache=bf16 …                states of every caption, where captions are not drawn anew
  python -m hdm.run   autoencoder.cache=bf16 crop.places=4 …   training with the same words reads them

  --verify    read every part and compare its SHA-256

Caches go below `cache=FOLDER`, into latents/ and text/, one folder for each data set, crop, encoder, arithmetic and precision. A
fill that is interrupted goes on where it was; several processes with the same words share the work. How large they get:
python -m hdm.run … --dry-run. What they are good for: docs/caches.md.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdm import cli
from hdm.config.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np

    from hdm.conditioning.store import Part, Place
    from hdm.config.schema import RunConfig
    from hdm.data.shards import Shards

RECORDS = 4096  # per part
_CAPTIONS = 64  # per pass


def command(arguments: list[str]) -> None:
    """Fill what the configuration asks for."""
    verify = cli.take_flag(arguments, "--verify")
    cli.reject_unknown([a for a in arguments if a.startswith("-")], "the flags are --verify and --help")

    from hdm.config.compose import compose, stage_run

    run = compose(arguments)
    runs = [stage_run(run, stage) for stage in run.stages] or [run]
    if not any(map(wanted_fillers, runs)):
        raise ConfigError("nothing to keep: autoencoder.cache and text_encoder.cache are none; set one to bf16, fp16 or fp32")

    from hdm.config.axes import DATA

    for own in runs:
        shards = DATA.build(own.data).open(Path(own.datasets), "train")
        for filler in wanted_fillers(own):
            place, index = filler(own, shards)
            _describe(place, index)
            if verify:
                from hdm.conditioning.store import Store

                Store(place).verify()
                print("verified")


def wanted_fillers(run: "RunConfig") -> list[Callable[..., "tuple[Place, dict[str, Any]]"]]:
    """The functions that fill what `run` asks for."""
    from hdm.conditioning.cache import wanted

    pairs = ((run.autoencoder, fill_latents), (run.text_encoder, fill_states))
    return [fill for config, fill in pairs if wanted(config)]


def fill_latents(run: "RunConfig", shards: "Shards", *, records: int = RECORDS) -> "tuple[Place, dict[str, Any]]":
    """Posteriors of all crops of `shards`. Raises DataError when a shard is lost or the disk is full."""
    import numpy as np
    import torch

    from hdm.conditioning.cache import STORED, crop_key, latent_place
    from hdm.conditioning.store import Part, Sums
    from hdm.config.axes import AUTOENCODER
    from hdm.train.loop import pick_device

    device = pick_device(run.device)
    autoencoder = AUTOENCODER.build(run.autoencoder, cache=Path(run.cache), device=device)
    place = latent_place(run, autoencoder, data=shards.digest)
    dtype, chunk = STORED[run.autoencoder.cache], run.autoencoder.chunk

    def make(numbers: range) -> Part:
        keys: list[bytes] = []
        tensors: dict[str, list[torch.Tensor]] = {"mean": [], "std": []}
        sums = Sums()
        for crops in _groups(_crops(run, shards, numbers), 8 * chunk):
            pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
            whole = -(-len(crops) // chunk) * chunk  # full chunks, as in training: another shape may round otherwise
            padded = torch.cat([pixels, pixels[-1:].expand(whole - len(crops), -1, -1, -1)])
            posterior = autoencoder.posterior(padded.to(device))
            keys += map(crop_key, crops)
            mean, std = posterior.mean[: len(crops)], None if posterior.std is None else posterior.std[: len(crops)]
            for name, tensor in (("mean", mean), ("std", std)):
                if tensor is not None:
                    tensors[name].append(_stored(tensor, dtype, "autoencoder"))
            variance = None if std is None else std.movedim(1, -1).flatten(0, -2).double().square()
            sums += Sums.of(mean.movedim(1, -1).flatten(0, -2), variance=variance)
        return Part(keys=keys, tensors={name: torch.cat(kept) for name, kept in tensors.items() if kept}, sums=sums)

    return place, _fill(place, shards, make, records)


def fill_states(run: "RunConfig", shards: "Shards", *, records: int = RECORDS) -> "tuple[Place, dict[str, Any]]":
    """States of all captions of `shards` and of the empty one. Raises DataError where captions are drawn anew."""
    import torch

    from hdm.conditioning.cache import STORED, caption_key, text_place
    from hdm.conditioning.store import Part, Sums
    from hdm.config.axes import TEXT_ENCODER
    from hdm.train.loop import pick_device

    encoder = TEXT_ENCODER.build(run.text_encoder, cache=Path(run.cache), device=pick_device(run.device))
    place = text_place(run, encoder, data=shards.digest)
    dtype = STORED[run.text_encoder.cache]

    def make(numbers: range) -> Part:
        captions = list(dict.fromkeys([*([""] if numbers.start == 0 else []), *_captions(run, shards, numbers)]))
        kept: list[torch.Tensor] = []
        sums = Sums()
        for group in _groups(iter(captions), _CAPTIONS):
            states, mask = encoder.encode(group)
            sums += Sums.of(states[mask].reshape(-1, 1))
            kept += [_stored(row[real], dtype, "text_encoder") for row, real in zip(states, mask)]
        ends = torch.tensor([0, *map(len, kept)]).cumsum(0)[1:].tolist()
        flat = torch.cat(kept) if kept else torch.zeros(0, run.text_encoder.width, dtype=dtype)
        return Part(keys=[caption_key(caption) for caption in captions], tensors={"states": flat}, ends=ends, sums=sums)

    return place, _fill(place, shards, make, records)


def _fill(place: "Place", shards: "Shards", make: Callable[[range], "Part"], records: int) -> dict[str, Any]:
    from hdm.conditioning.store import fill

    parts = [range(first, min(first + records, len(shards))) for first in range(0, len(shards), records)]
    with cli.progress(f"Filling {place.folder}", len(shards), "images") as advance:
        return fill(place, len(parts), lambda number: make(parts[number]), done=lambda number: advance(len(parts[number])))


def _crops(run: "RunConfig", shards: "Shards", numbers: range) -> "Iterator[np.ndarray[Any, Any]]":
    """The distinct crops of some records. One that cannot be used is left out: training replaces it by another."""
    from hdm.config.axes import CROP
    from hdm.data.images import decode

    crop, seen = CROP.build(run.crop), set()
    for record in _records(shards, numbers):
        try:
            source = decode(record.image, crop.covered(None))
        except DataError:
            continue
        for square in crop.squares(source):
            if (content := square.pixels.tobytes()) not in seen:
                seen.add(content)
                yield square.pixels
        seen.clear()  # of one image; the same image twice is kept twice


def _captions(run: "RunConfig", shards: "Shards", numbers: range) -> Iterator[str]:
    from hdm.data.captions import only_caption

    for record in _records(shards, numbers):
        try:
            caption = only_caption(record.caption, run.captions)
        except DataError:
            continue
        if caption is None:
            raise DataError(
                f"text_encoder.cache={run.text_encoder.cache.value}: record {record.key} has tags, whose captions are drawn anew"
                " each time; set captions.shuffle=false captions.tag_dropout=0 captions.group_dropout=0 or text_encoder.cache=none"
            )
        yield caption


def _records(shards: "Shards", numbers: range) -> Iterator[Any]:
    from hdm.data.shards import SampleError

    for number in numbers:
        try:
            yield shards.read(number)
        except SampleError:
            continue


def _groups(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _stored(tensor: Any, dtype: Any, axis: str) -> Any:
    kept = tensor.to(dtype).cpu()
    if not kept.isfinite().all():
        raise DataError(f"{axis}.cache: numbers beyond the range of {str(dtype).removeprefix('torch.')}; use bf16 or fp32")
    return kept


def _describe(place: "Place", index: dict[str, Any]) -> None:
    statistics = index["statistics"]
    size = sum(part["bytes"] for part in index["parts"])
    print(f"{place.folder}: {index['entries']:,} entries in {len(index['parts'])} parts, {size / 1e9:,.3f} GB")
    for name in ("mean", "std"):
        print(f"{name}: {', '.join(f'{value:.5g}' for value in statistics[name])}  (of {statistics['count']:,} values a channel)")


if __name__ == "__main__":
    cli.main(command, __doc__)
