"""The generated page and tables: complete, current, and with numbers that hold by hand."""

import re
from itertools import combinations

import pytest

from hdm import catalogue
from hdm.config import compat
from hdm.config.axes import AXES, discover
from hdm.config.errors import ConfigError
from hdm.variants import command

discover()
OURS = [v for axis in AXES.values() for v in axis.variants.values() if v.module.startswith("hdm.")]


@pytest.fixture(scope="module")
def page():
    return catalogue.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("variant", OURS, ids=compat.key)
def test_the_page_holds_what_the_registry_says_of_every_variant(page, variant):
    """Without the counts, which `python -m hdm.variants --check` compares too."""
    assert catalogue.entry(variant) in page, "stale: python -m hdm.variants --write"


def test_the_page_holds_the_tables_and_no_other_variant(page):
    assert catalogue.overview() in page
    assert catalogue.refused_table() in page
    assert sorted(re.findall(r"^### `(\w+=\w+)`", page, re.MULTILINE)) == sorted(compat.key(v) for v in OURS)


def cells(page, axis, name):
    table = page.partition(f"\n## {axis}\n")[2].partition("\n### ")[0]
    row = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_numbers_of_the_page_by_hand(page):
    """XUT of the report has 343,163,920 parameters (spec 0); a forward pass at 256 px has 256 image and 256 text tokens."""
    d, m, t, image = 1024, 3072, 512, 256
    modulation = 2 * d + (4 * d * d + 4 * d) + (12 * d * d + 3 * d)
    cross, concat = 4 * d * d + d + d, 2 * d * d + d
    assert cells(page, "merge", "cross")[1] == "343,163,920"
    assert cells(page, "merge", "none")[1] == f"{343_163_920 - 4 * cross - modulation:,}"
    assert cells(page, "merge", "concat")[1] == f"{343_163_920 - 4 * (cross - concat) - modulation:,}"

    def block(queries):
        return 3 * d * d * t + 2 * t * queries * d + d * d * queries + 3 * d * m * queries

    merges = 4 * (4 * d * d * t + 2 * t * t * d)
    ends = image * 16 * d * 2 + t // 2 * d * d  # patches in and out, text
    conditioning = d * d + d + d * d + 3 * (4 * d * d + 12 * d * d)
    flops = 2 * (19 * block(t) + block(image) + merges + ends + conditioning)
    assert cells(page, "backbone", "xut")[3] == f"{flops / 1e9:,.1f}"
    without = flops - 2 * (merges + 16 * d * d)
    assert cells(page, "merge", "none")[3:5] == [f"{without / 1e9:,.1f}", f"{without / flops - 1:+.2%}"]


def test_a_variant_stands_with_what_it_goes_with(page):
    for axis in catalogue._model_axes():
        for variant in AXES[axis].variants.values():
            network, changed = catalogue.base_network(variant)
            assert not list(compat.refusals(compat.chosen(network).values())), variant
            assert cells(page, axis, variant.name)[5] == ", ".join(f"`{key}`" for key in changed)


def test_refused_pairs_are_listed_each_once(capsys):
    command(["--refused"])
    printed = capsys.readouterr().out
    apart = [
        {compat.key(a), compat.key(b)}
        for first, second in combinations(AXES.values(), 2)
        for a in first.variants.values()
        for b in second.variants.values()
        if not compat.allowed(a, b)
    ]
    listed = [set(pair) for pair in re.findall(r"^\| `(\S+)` \| `(\S+)` \|", printed, re.MULTILINE)]
    assert sorted(map(sorted, listed)) == sorted(map(sorted, apart))
    assert f"{len(apart)} pairs of variants are refused" in printed
    assert printed.count("; use ") == len(apart)


def test_pairs_are_counted_once_and_those_of_the_network_are_what_the_contract_trains(capsys):
    command(["--counts"])
    rows = {
        cells[0]: cells[1:]
        for cells in re.findall(r"^\| (.+?) \| (\d*) ?\| (\d+) \| (\d+) \|", capsys.readouterr().out, re.MULTILINE)
    }
    alone = [list(map(int, rows[f"`{name}`"])) for name in AXES]
    everything = list(map(int, rows["all, each pair once"]))
    assert [alone_[0] for alone_ in alone] == [len(axis.variants) for axis in AXES.values()]
    assert everything[0] == sum(variants for variants, _, _ in alone)
    assert [2 * n for n in everything[1:]] == [sum(column) for column in list(zip(*alone))[1:]]
    network = [AXES[name] for name in catalogue._model_axes()]
    pairs = sum(len(a.variants) * len(b.variants) for a, b in combinations(network, 2))
    assert sum(map(int, rows["those of the network"][1:])) == pairs


def test_an_axis_says_what_it_goes_with(capsys):
    command(["attention"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "Refused with routing=tread" in printed


def test_the_readme_s_table_stands_between_its_markers():
    begin, end = catalogue._MARKERS
    text = f"before\n{begin}old\n{end}\nafter\n"
    assert catalogue.marked(text) == f"before\n{begin}{catalogue.overview()}{end}\nafter\n"
    assert catalogue.marked(catalogue.marked(text)) == catalogue.marked(text)
    with pytest.raises(ConfigError, match="without '<!-- /axes -->' behind it"):
        catalogue.marked(f"{begin}old\n")


def test_stale_files_are_found(tmp_path):
    for name, text in (("same", "a\n"), ("other", "b\n")):
        (tmp_path / name).write_text(text)
    texts = {tmp_path / name: "a\n" for name in ("same", "other", "missing")}
    assert [path.name for path in catalogue.stale(texts)] == ["other", "missing"]
