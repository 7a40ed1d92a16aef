"""Checkpoints or arms side by side: rows are prompts, columns networks, the noise of a row is the same, as PNG and HTML.

usage: python -m eval.gallery ckpt=A,B,... [prompt="a red car"] [prompts=FILE] [n=8] [out=FOLDER] [KEY=VALUE ...]

  python -m eval.gallery ckpt=runs/CROSS,runs/CONCAT
  python -m eval.gallery ckpt=runs/NAME/checkpoints/samples-000000000,runs/NAME/checkpoints/samples-000016384,runs/NAME
  python -m eval.gallery ckpt=runs/A,runs/B prompt="red apple, fruit" prompt="blue car" eval.seed=1

Without prompts, rows are the first held-out captions, with their real images in the first column. gallery.html is one file that
holds its images.

n=8               held-out captions, where no prompts are given
out=FOLDER        gallery.png and gallery.html; by default eval/gallery in the first run folder
eval.seed=0       noise seed
Also: sampler.*, guidance.*, weights, sampling.batch_size, device, datasets, cache (docs/evaluation.md).
"""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdm import cli
from hdm.config.errors import HdmError

_ENLARGED = 128  # pixels of a picture on the page, at least


@dataclass(kw_only=True, slots=True)
class Column:
    """A heading, a line below it, and one image (3, H, W) for each prompt."""

    title: str
    note: str
    images: list[Any]


def command(arguments: list[str]) -> None:
    """`python -m eval.gallery`."""
    prompts = [a.removeprefix("prompt=") for a in arguments if a.startswith("prompt=")]
    rest = [a for a in arguments if not a.startswith("prompt=")]
    ckpts = [text for text in (cli.take_option(rest, "ckpt") or "").strip("[]").split(",") if text]
    listed, count, out = (cli.take_option(rest, key) for key in ("prompts", "n", "out"))
    if not ckpts:
        raise HdmError("ckpt= is missing; name run folders or checkpoints: python -m eval.gallery ckpt=runs/A,runs/B")
    if not (count or "8").isdecimal() or int(count or "8") < 1:
        raise HdmError(f"n={count}: must be a whole number, 1 or more")
    if listed is not None:
        from hdm.sample import prompt_lines

        prompts += prompt_lines(Path(listed))
    from eval.command import subject

    subjects = [subject("gallery", list(rest), ckpt=ckpt) for ckpt in ckpts]
    from eval.sampling import rank  # imports torch, which a wrong word should not wait for

    if rank() > 0:
        return
    columns: list[Column] = []
    if not prompts:
        prompts, real = _held_out(subjects[0], int(count or "8"))
        columns.append(real)
    with cli.progress("gallery", len(prompts) * len(subjects), "images") as advance:
        columns += [_column(found, prompts, advance) for found in subjects]
    folder = Path(out) if out else subjects[0].loaded.folder / "eval" / "gallery"
    for path in save(prompts, columns, folder):
        print(path)


def save(prompts: list[str], columns: list[Column], folder: Path) -> list[Path]:
    """Write gallery.png and gallery.html into `folder`."""
    from hdm.files import replacing
    from hdm.pictures import sheet

    folder.mkdir(parents=True, exist_ok=True)
    images = [column.images[i] for i in range(len(prompts)) for column in columns]
    labels = [f"{column.title}{': ' + prompt if k == 0 else ''}" for prompt in prompts for k, column in enumerate(columns)]
    picture, page = folder / "gallery.png", folder / "gallery.html"
    sheet(images, labels, columns=len(columns)).save(picture)
    with replacing(page) as partial:
        partial.write_text(to_html(prompts, columns), encoding="utf-8")
    return [picture, page]


def to_html(prompts: list[str], columns: list[Column]) -> str:
    """The page: a table whose head stays in sight, every image in it."""
    heads = "".join(f"<th>{html.escape(c.title)}<br><small>{html.escape(c.note)}</small></th>" for c in columns)
    rows = "".join(
        f"<tr><th>{html.escape(prompt)}</th>" + "".join(f"<td>{_picture(c.images[i], prompt)}</td>" for c in columns) + "</tr>\n"
        for i, prompt in enumerate(prompts)
    )
    style = (
        "body{font:14px sans-serif;margin:1em} table{border-collapse:collapse}"
        " th,td{padding:4px;vertical-align:top;text-align:left} thead th{position:sticky;top:0;background:#fff}"
        " tbody th{max-width:16em;font-weight:normal} img{image-rendering:pixelated}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Gallery</title><style>{style}</style>\n'
        f"<table><thead><tr><th>prompt</th>{heads}</tr></thead><tbody>\n{rows}</tbody></table></html>\n"
    )


def _picture(image: Any, alt: str) -> str:
    import base64
    import io

    from hdm.pictures import to_image

    data = io.BytesIO()
    to_image(image).save(data, "PNG")
    scale = max(1, -(-_ENLARGED // min(image.shape[1:])))
    size = f'width="{image.shape[2] * scale}" height="{image.shape[1] * scale}"'
    return f'<img {size} alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _held_out(found: Any, count: int) -> tuple[list[str], Column]:
    from eval.samples import open_split, read_images

    real = read_images(found.run, open_split(found.run, "val"), count)
    return real.captions, Column(title="real", note="held out", images=real.pictures.first(count))


def _column(found: Any, prompts: list[str], advance: Any) -> Column:
    from eval.samples import GROUP
    from eval.sampling import Engine, Group
    from hdm.model.backbone import full_view
    from hdm.train.loop import pick_device
    from hdm.train.weak import load_weak

    loaded, run, size = found.loaded, found.run, (found.run.crop.size, found.run.crop.size)
    device = pick_device(run.device)
    engine = Engine(loaded.model, run, device=device, weak=load_weak(run, device=device))
    images: list[Any] = []
    for start in range(0, len(prompts), GROUP):
        part = prompts[start : start + GROUP]
        keys = list(range(start, start + len(part)))
        group = Group(captions=part, views=full_view(*size, batch=len(part)), keys=keys, size=size)
        images += list(engine.draw(group, advance))
    return Column(title=loaded.folder.name, note=f"{loaded.samples:,} samples, {loaded.weights}", images=images)


if __name__ == "__main__":
    cli.main(command, __doc__)
