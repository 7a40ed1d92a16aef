"""Evaluation against independent implementations on the same images: equal numbers, and how long each takes.

usage: python benchmarks/evaluation.py [samples=256] [rounds=3] [size=32] [only=trace] [KEY=VALUE ...]

Two folders of real images are written as PNG and measured by torch-fidelity's own command line (`fidelity --fid --kid --prc`,
its process and all) and by ours, in turn (A B A B …), with the carried EfficientNet-Lite0 and no cached features. The first
table compares every number with an independent implementation; the second has the median times and their ratio; the third the
Fréchet distance of covariances alone at 768, 1280 and 2048 dimensions, against scipy's sqrtm and torch-fidelity in turn,
in CPU seconds: with OMP_NUM_THREADS=1 they do not depend on what else the machine does.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from eval.distribution import measure
from eval.extractor import named
from eval.features import features
from eval.frechet import Gaussian, Moments, frechet
from eval.kernel import gaussian, mmd, polynomial
from eval.measure import Drawn
from eval.samples import CaptionedImages, open_split, read_images
from hdm import cli, torchvision_cpu
from hdm.config.compose import compose
from hdm.config.schema import RunConfig
from hdm.pictures import to_image

CPU = torch.device("cpu")
# The command line knows the extractors that are registered when it starts; this registers ours first.
FIDELITY = """
import sys, json
from hdm import torchvision_cpu; torchvision_cpu.declare()
import eval.efficientnet
from torch_fidelity.fidelity import main
main()
"""


def ours(run: RunConfig, first: Tensor, second: Tensor, cache: Path) -> dict[str, float]:
    run.cache = str(cache)
    real = CaptionedImages(pixels=second, views=torch.zeros(len(second), 6), captions=["x"] * len(second))
    drawn = Drawn(run=run, real=real, images=first, device=CPU, console=Console(quiet=True))
    return measure(drawn, features="efficientnet", kinds=("fid", "kid", "prdc")).values


def theirs(folders: list[Path], count: int, weights: Path) -> dict[str, float]:
    """torch-fidelity's command line in a process of its own."""
    arguments = [
        "--gpu", "", "--input1", folders[0], "--input2", folders[1], "--fid", "--kid", "--prc", "--feature-extractor",
        "efficientnet-lite0", "--feature-extractor-weights-path", weights, "--kid-subsets", 1, "--kid-subset-size", count,
        "--prc-neighborhood", 5, "--no-cache", "--json", "--silent", "--save-cpu-ram",
    ]  # fmt: skip
    command = [sys.executable, "-c", FIDELITY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout[done.stdout.index("{") :])


def fresh(first: Tensor, second: Tensor) -> None:
    """Ours in a process of its own too, so that both pay for their imports."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save([first, second], Path(folder) / "images.pt")
        code = (
            "import sys, torch; from pathlib import Path; from benchmarks.evaluation import ours, options\n"
            f"f = Path({folder!r}); a, b = torch.load(f / 'images.pt'); ours(options(), a, b, f)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
        )
        if done.returncode:
            raise SystemExit(done.stderr)


def options() -> RunConfig:
    run = RunConfig()
    run.eval.bootstrap = 0
    return run


def equality(
    first: Tensor, second: Tensor, own: dict[str, float], cli_values: dict[str, float], cache: Path
) -> list[tuple[Any, ...]]:
    """(number, ours, independent implementation, theirs)."""
    import scipy.linalg
    from cleanfid.fid import frechet_distance
    from prdc import compute_prdc
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    extractor = named("efficientnet", RunConfig().eval)
    x, y = (features(p, extractor, cache=cache, device=CPU, title="") for p in (first, second))
    with contextlib.redirect_stdout(None):
        authors = compute_prdc(y, x, nearest_k=5)
    rows = [
        ("FID", own["fid/efficientnet"], "torch-fidelity's command line", cli_values["frechet_inception_distance"]),
        ("KID", own["kid/efficientnet"], "torch-fidelity's command line", cli_values["kernel_inception_distance_mean"]),
        ("precision", own["precision/efficientnet"], "torch-fidelity's command line", cli_values["precision"]),
        ("recall", own["recall/efficientnet"], "torch-fidelity's command line", cli_values["recall"]),
        *((name, own[f"{name}/efficientnet"], "its authors' prdc", float(value)) for name, value in authors.items()),
        ("KID", own["kid/efficientnet"], "torchmetrics", float(poly_mmd(*map(torch.from_numpy, (x, y))))),
        ("KID", own["kid/efficientnet"], "ours, summed in blocks", mmd(x, y, polynomial)),
    ]
    draw = np.random.default_rng(0)
    mix = draw.standard_normal((256, 256)) * np.logspace(0, -2, 256)
    a, b = draw.standard_normal((2000, 256)) @ mix, draw.standard_normal((1500, 256)) @ mix + 0.1
    own_fd = frechet(Gaussian.of_features(a), Gaussian.of_features(b))
    s, t, gap = np.cov(a, rowvar=False), np.cov(b, rowvar=False), ((a.mean(0) - b.mean(0)) ** 2).sum()
    tensors = [torch.from_numpy(v) for v in (a.mean(0), s, b.mean(0), t)]
    rows += [
        ("FD, 256-d", own_fd, "scipy's sqrtm", gap + np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real)),
        ("FD, 256-d", own_fd, "clean-fid", float(frechet_distance(a.mean(0), s, b.mean(0), t))),
        ("FD, 256-d", own_fd, "torchmetrics", float(_compute_fid(*tensors))),
    ]
    p, q = np.linspace(0.1, 4, 256), np.linspace(2, 0.5, 256)
    axes = (Gaussian(np.zeros(256), np.diag(np.sqrt(p)), square=True), Gaussian(np.ones(256), np.diag(np.sqrt(q)), square=True))
    rows.append(("FD of Gaussians", frechet(*axes), "closed form", 256 + ((np.sqrt(p) - np.sqrt(q)) ** 2).sum()))
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a[:100, :16], b[:80, :16])]
    blocks = [np.exp(-((m[:, None] - n[None]) ** 2).sum(-1) / 200).mean() for m, n in ((unit[0],) * 2, (unit[1],) * 2, unit)]
    brute = 1000 * (blocks[0] + blocks[1] - 2 * blocks[2])
    rows.append(("CMMD's formula", 1000 * mmd(*unit, gaussian(10.0), biased=True), "pair by pair", brute))
    return rows


def trace_times(d: int, rounds: int) -> dict[str, tuple[float, float]]:
    """By implementation, ours first: CPU seconds of the distance from means and covariances, and the relative difference."""
    import scipy.linalg

    torchvision_cpu.declare()
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    draw = np.random.default_rng(0)
    mix = np.logspace(0, -2, d)
    a, b = (Moments.of([draw.standard_normal((d + 200, d)) * mix + shift]) for shift in (0.0, 0.05))
    pair, sides = (a.covariance, b.covariance), [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]

    def by_sqrtm() -> float:
        return float(((a.mean - b.mean) ** 2).sum() + np.trace(sum(pair) - 2 * scipy.linalg.sqrtm(pair[0] @ pair[1]).real))

    ways = {
        "ours": lambda: frechet(Gaussian.of_moments(a), Gaussian.of_moments(b)),
        "scipy's sqrtm": by_sqrtm,
        "torch-fidelity": lambda: fid_statistics_to_metric(*sides, False)["frechet_inception_distance"],
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    values = {}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.process_time()  # what else runs on the machine does not count
            values[name] = way()
            times[name].append(time.process_time() - began)
    return {name: (statistics.median(times[name]), abs(values["ours"] / values[name] - 1)) for name in ways}


def resizing(pixels: Tensor) -> list[tuple[Any, ...]]:
    """The largest value and that of clean-fid's resizer where the two differ most, of images at EfficientNet's size."""
    from cleanfid.resize import make_resizer

    from eval.efficientnet import SIZE, resized

    theirs = make_resizer("PIL", False, "bicubic", (SIZE, SIZE))
    found = resized(pixels).permute(0, 2, 3, 1).numpy().ravel()
    wanted = np.stack([theirs(image.permute(1, 2, 0).numpy()) for image in pixels]).ravel()
    worst = int(np.abs(found - wanted).argmax())
    return [(f"resized to {SIZE} px, worst byte", float(found[worst]), "clean-fid", float(wanted[worst]))]


def traces(rounds: int) -> None:
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, numpy {np.__version__}; CPU seconds, median of {rounds} rounds\n"
    )
    print("| Fréchet distance | ours (s) | against | theirs (s) | times as fast | relative difference |\n|---|---|---|---|---|---|")
    for d in (768, 1280, 2048):
        found = trace_times(d, rounds)
        mine = found.pop("ours")[0]
        for name, (seconds, gap) in found.items():
            print(f"| {d}-d | {mine:.2f} | {name} | {seconds:.2f} | {seconds / mine:.1f} | {gap:.1e} |")


def command(arguments: list[str]) -> None:
    samples, rounds, size = (
        int(cli.take_option(arguments, key) or value) for key, value in (("samples", 256), ("rounds", 3), ("size", 32))
    )
    if cli.take_option(arguments, "only") == "trace":
        traces(rounds)
        return
    run = compose(["experiment=openmoji_nano", f"crop.size={size}", *arguments])
    images = read_images(run, open_split(run, "train"), 2 * samples)
    pixels = torch.cat(list(images.pictures.parts()))
    first, second = pixels[::2].contiguous(), pixels[1::2].contiguous()
    weights = named("efficientnet", run.eval).weights
    times: dict[str, list[float]] = {"torch-fidelity": [], "ours": []}
    with tempfile.TemporaryDirectory() as home:
        folders = [Path(home) / name for name in ("a", "b")]
        for folder, part in zip(folders, (first, second)):
            folder.mkdir()
            for i, image in enumerate(part):
                to_image(image).save(folder / f"{i:05d}.png")
        found = theirs(folders, samples, weights)  # also warms the file cache
        for _ in range(rounds):
            began = time.perf_counter()
            theirs(folders, samples, weights)
            between = time.perf_counter()
            fresh(first, second)
            times["torch-fidelity"].append(between - began)
            times["ours"].append(time.perf_counter() - between)
        cache = Path(home) / "cache"
        own = ours(options(), first, second, cache)
        rows = [*equality(first, second, own, found, cache), *resizing(first)]
    print(f"{2 * samples} images of {size} px, {platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print("| number | ours | independent implementation | theirs | relative difference |\n|---|---|---|---|---|")
    for name, mine, other, value in rows:
        print(f"| {name} | {mine:.10g} | {other} | {value:.10g} | {abs(mine - value) / max(abs(value), 1e-12):.1e} |")
    print("\n| FID, KID, precision, recall | median seconds | images/s |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.1f} | {2 * samples / statistics.median(seconds):.1f} |")
    ratio = statistics.median(a / b for a, b in zip(times["torch-fidelity"], times["ours"]))
    print(f"\nours is {ratio:.2f} times as fast (median over {rounds} interleaved rounds)\n")
    traces(rounds)


if __name__ == "__main__":
    cli.main(command, __doc__ or "")
