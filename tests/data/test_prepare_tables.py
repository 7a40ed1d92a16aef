"""Metadata in the manner of Danbooru2023, and Parquet: captions, tags of quality and time, filters, splits."""

import json
from pathlib import Path

import broken
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import percentileofscore

from hdm.config.axes import DATA
from hdm.config.compose import compose
from hdm.config.errors import ConfigError, DataError
from hdm.data.captions import parse_caption
from hdm.data.sources.danbooru import DanbooruConfig, caption_of, quality_tag, score_limits, time_tag
from hdm.data.sources.parquet import ParquetConfig

PERCENTILES, YEARS = [10.0, 25.0, 85.0, 95.0], [2011, 2015, 2018, 2021]
POST = {
    "id": 1234567,
    "tag_string_general": "1girl solo long_hair ^_^ looking_at_viewer",
    "tag_string_artist": "some_artist",
    "tag_string_character": "hatsune_miku",
    "tag_string_copyright": "vocaloid",
    "tag_string_meta": "highres",
    "rating": "g",
    "score": 40,
    "created_at": "2022-03-04T05:06:07.000-05:00",
    "file_ext": "jpg",
    "parent_id": None,
}


@given(st.lists(st.integers(-20, 300), min_size=1, max_size=200))
@settings(max_examples=60, deadline=None)
def test_quality_is_the_mid_rank_of_the_score(scores):
    limits = score_limits(np.array(scores, float), PERCENTILES)
    for score in set(scores):
        rank = percentileofscore(scores, score, kind="mean")  # SciPy's mid-rank
        expected = "worst quality" if rank <= 10 else "low quality" if rank <= 25 else ""
        expected = "masterpiece" if rank > 95 else "best quality" if rank > 85 else expected
        if not any(abs(rank - p) < 1e-9 for p in PERCENTILES):
            assert quality_tag(score, limits) == expected


def test_shares_of_the_quality_tags():
    limits = score_limits(np.arange(1000.0), PERCENTILES)
    tags = [quality_tag(score, limits) for score in range(1000)]
    assert {tag: tags.count(tag) for tag in set(tags)} == {
        "worst quality": 100,
        "low quality": 150,
        "": 600,
        "best quality": 100,
        "masterpiece": 50,
    }
    assert quality_tag(None, limits) == quality_tag(float("nan"), limits) == ""


@pytest.mark.parametrize(
    ("date", "tag"),
    [
        ("2005-05-24", "old"), ("2010-12-31T23:59:59Z", "old"), ("2011-01-01", "early"), ("2014", "early"), ("2015-06-01", "mid"),
        ("2017-12-31", "mid"), ("2018-01-01", "recent"), ("2020-02-29", "recent"), ("2021-01-01 00:00", "newest"),
        (None, ""), ("", ""), ("yesterday", ""),
    ],
)  # fmt: skip
def test_years(date, tag):
    assert time_tag(date, YEARS) == tag


def test_the_caption():
    made = caption_of(POST, sentence="A girl smiles.", quality="masterpiece", time="newest", template=DanbooruConfig().template)
    caption = parse_caption(made)
    assert caption.keep == ("masterpiece", "newest", "1girl", "hatsune miku", "vocaloid", "some artist")
    assert caption.groups == (
        ("solo", "long hair", "^_^", "looking at viewer"),
        ("A girl smiles.",),
        ("highres", "general"),
    )


def test_marks_in_tags_and_sentences_do_not_break_the_caption():
    post = {**POST, "tag_string_general": "||| a%%b $$", "tag_string_artist": None, "tag_string_meta": ["absurdres", "a||||b"]}
    made = caption_of(post, sentence="It costs $$5 ||| or 10 %% more.", quality="", time="", template=DanbooruConfig().template)
    caption = parse_caption(made)
    assert caption.keep == ("hatsune miku", "vocaloid")
    assert caption.groups == (("|", "a%b", "$"), ("It costs $5 | or 10 % more.",), ("absurdres", "a|b", "general"))


@pytest.fixture
def danbooru(tmp_path):
    """Forty posts: scores 0 … 39, two a year from 2004 on, in families of four; images by bucket."""
    posts, sentences = [], []
    image = broken.photographs()[0]
    for i in range(40):
        post = {
            **POST, "id": 1000 * i + i, "score": i, "created_at": f"{2004 + i // 2}-01-01", "tag_string_general": f"tag_{i} 2girls",
            "parent_id": None if i % 4 == 0 else 1001 * (i - i % 4),
        }  # fmt: skip
        posts.append(post)
        sentences.append({"id": str(post["id"]), "caption": f"Sentence {i}."})
        path = tmp_path / "images" / f"{i:04d}" / f"{post['id']}.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(broken.saved(image.crop((i, i, i + 100, i + 80)), "JPEG"))
    return tmp_path, posts, sentences


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def built(folder, **fields):
    source = DATA.build(DanbooruConfig(**{"path": str(folder / "images"), "val_share": 0.25, "shard": 16, **fields}))
    source.workers = 1
    return source


def records(source, datasets):
    return {
        (r := s.read(i)).key: r.caption for split in ("train", "val") for s in [source.open(datasets, split)] for i in range(len(s))
    }


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_both_forms_make_the_same(danbooru, form):
    folder, posts, sentences = danbooru
    write = write_parquet if form == "parquet" else write_lines
    metadata, second = write(folder / f"posts.{form}", posts), write(folder / f"sentences.{form}", sentences)
    made = records(built(folder, metadata=metadata, sentences=second), folder / "d")
    assert len(made) == 40
    for i, post in enumerate(posts):
        rank = 100 * (i + 0.5) / 40
        quality = "worst quality $$ " if rank <= 10 else "low quality $$ " if rank <= 25 else ""
        quality = "masterpiece $$ " if rank > 95 else "best quality $$ " if rank > 85 else quality
        year = 2004 + i // 2
        time = ["old", "early", "mid", "recent", "newest"][sum(year >= y for y in YEARS)]
        keep, rest = made[str(post["id"])].split(" ||| ")
        assert keep.removeprefix("$$ ") == f"{quality}{time} $$ 2girls $$ hatsune miku $$ vocaloid $$ some artist"
        assert rest == f"tag {i} %% Sentence {i}. %% highres $$ general"


def test_a_sentence_column_in_the_metadata_itself(danbooru):
    folder, posts, sentences = danbooru
    rows = [{**post, "words": second["caption"]} for post, second in zip(posts, sentences)]
    made = records(built(folder, metadata=write_lines(folder / "m.jsonl", rows), sentence="words"), folder / "d")
    assert all(f"%% Sentence {i}. %%" in made[str(post["id"])] for i, post in enumerate(posts))


def test_the_curated_set(danbooru, capsys):
    """Quality and time: scores 0-9 and 34-39 have a quality tag; old is to 2010, recent and newest from 2018 on."""
    folder, posts, _ = danbooru
    metadata = write_parquet(folder / "posts.parquet", posts)
    made = records(built(folder, metadata=metadata, curated=True, min_side=64), folder / "d")
    expected = {i for i in range(40) if (i < 10 or i >= 34) and not 2011 <= 2004 + i // 2 < 2018}
    assert set(made) == {str(1001 * i) for i in expected}
    assert f"{40 - len(expected)} posts without the tags of the curated set" in capsys.readouterr().out


def test_what_is_left_out_and_what_is_quarantined(danbooru, capsys):
    folder, posts, _ = danbooru
    posts[3]["is_deleted"] = True
    posts[4]["file_ext"] = "mp4"
    (folder / "images" / "0005" / "5005.jpg").unlink()
    source = built(folder, metadata=write_lines(folder / "m.jsonl", posts))
    made = source.prepare(folder / "d")
    (entry,) = map(json.loads, (made / "quarantine.jsonl").read_text().splitlines())
    assert (entry["key"], entry["reason"], entry["detail"]) == ("5005", "cannot be read", "No such file or directory")
    assert len(records(source, folder / "d")) == 37
    out = capsys.readouterr().out
    assert "1 deleted or banned posts" in out and "1 posts that are no picture" in out


def test_families_stay_together(danbooru):
    folder, posts, _ = danbooru
    source = built(folder, metadata=write_lines(folder / "m.jsonl", posts), families=True, val_share=0.4)
    families = []
    for split in ("train", "val"):
        shards = source.open(folder / "d", split)
        families.append({int(shards.read(i).key) // 1001 // 4 for i in range(len(shards))})
    assert not families[0] & families[1]
    assert families[0] | families[1] == set(range(10))


def test_errors_are_one_line(danbooru):
    folder, posts, _ = danbooru
    metadata = write_lines(folder / "m.jsonl", posts)
    for fields, words in (
        ({"metadata": str(folder / "gone.parquet")}, r"data\.metadata=.*gone\.parquet: no such file"),
        ({"metadata": metadata, "path": str(folder / "gone")}, r"data\.path=.*gone: is no folder"),
        ({"metadata": metadata, "file": "{md5}.jpg"}, r"data\.file=\{md5\}\.jpg: post 0 gives it no 'md5'"),
        (
            {"metadata": metadata, "sentences": metadata},
            r"data\.sentences=.*: needs the columns id and caption; it has id, tag_string",
        ),
    ):
        with pytest.raises(DataError, match=words) as error:
            built(folder, **fields).prepare(folder / "d")
        assert "\n" not in str(error.value)
    (folder / "m.jsonl").write_text('{"id": 1}\nnot json\n')
    with pytest.raises(DataError, match=r"m\.jsonl: line 2 is no JSON"):
        built(folder, metadata=metadata).prepare(folder / "d")
    (folder / "m.parquet").write_bytes(b"PAR1 but not quite")
    with pytest.raises(DataError, match=r"m\.parquet: not a readable Parquet file"):
        built(folder, metadata=str(folder / "m.parquet")).prepare(folder / "d")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["data.template='{tags}'"], r"data\.template: has no \{tags\}; it takes quality, time"),
        (["data.template='a ||| b ||| c'"], r"has several \|\|\|"),
        (["data.percentiles=[1,2,3]"], "must be four numbers"),
        (["data.years=[2021,2018,2015,2011]"], "must be four years in ascending order"),
        (["data.file='{id.real}.jpg'"], r"data\.file: has no \{id\.real\}"),
    ],
)
def test_bad_settings_are_one_line(lines, words):
    with pytest.raises(ConfigError, match=words):
        compose(["data=danbooru", *lines])


# Parquet


def table(folder, form, count=30):
    """Pictures as bytes, as the struct of the datasets library, or as names of files."""
    image = broken.photographs()[1]
    rows = []
    for i in range(count):
        data = broken.saved(image.crop((i, 0, i + 90, 80)), "JPEG")
        if form == "file":
            (folder / "files").mkdir(exist_ok=True)
            (folder / "files" / f"{i}.jpg").write_bytes(data)
        value = {"bytes": data, "struct": {"bytes": data, "path": f"{i}.jpg"}, "file": f"{i}.jpg"}[form]
        rows.append({"image": value, "caption": f"picture {i}", "name": f"n{i}", "film": f"f{i // 3}"})
    return rows


def packed(path, **fields):
    source = DATA.build(ParquetConfig(path=str(path), **{"val_share": 0.3, "shard": 8, **fields}))
    source.workers = 2
    return source


@pytest.mark.parametrize("form", ["bytes", "struct", "file"])
def test_parquet(tmp_path, form):
    rows = table(tmp_path, form)
    write_parquet(tmp_path / "a.parquet", rows, row_group_size=7)
    source = packed(tmp_path, key="name", group="film", files=str(tmp_path / "files") if form == "file" else None)
    films = []
    for split in ("train", "val"):
        shards = source.open(tmp_path / "d", split)
        films.append(set())
        for i in range(len(shards)):
            record = shards.read(i)
            row = rows[int(record.key[1:])]
            value = row["image"] if form == "bytes" else row["image"]["bytes"] if form == "struct" else None
            assert record.image == (value or (tmp_path / "files" / row["image"]).read_bytes())
            assert record.caption == row["caption"]
            films[-1].add(row["film"])
    assert not films[0] & films[1] and len(films[0] | films[1]) == 10


def test_broken_rows_of_parquet(tmp_path):
    rows = table(tmp_path, "bytes", 60)
    rows[3]["image"], rows[4]["image"], rows[5]["caption"] = None, b"\xff\xd8 not much", None
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string()), ("name", pa.string())])
    good = pa.Table.from_pylist(rows, schema=schema)
    spoilt = good["caption"].to_pylist()
    raw = pa.array([t.encode() if t else None for t in spoilt[:6]] + [b"caf\xe9"] + [t.encode() for t in spoilt[7:]], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())  # a file written by a careless tool
    pq.write_table(good.set_column(1, "caption", strings), tmp_path / "a.parquet")
    made = packed(tmp_path / "a.parquet", key="name").prepare(tmp_path / "d")
    found = {e["key"]: e["reason"] for e in map(json.loads, (made / "quarantine.jsonl").read_text().splitlines())}
    assert found == {"n3": "no picture", "n4": "not a picture", "n5": "no caption", "n6": "caption is not UTF-8"}


def test_parquet_errors(tmp_path):
    rows = table(tmp_path, "file")
    rows[0]["image"] = "../../secret.jpg"
    write_parquet(tmp_path / "a.parquet", rows)
    made = packed(tmp_path / "a.parquet", files=str(tmp_path / "files")).prepare(tmp_path / "d")
    (entry,) = map(json.loads, (made / "quarantine.jsonl").read_text().splitlines())
    assert entry["reason"] == "a name that leads out of data.files"
    assert entry["key"] == "a-00000000"
    for fields, words in (
        ({"image": "imag"}, r"data\.image=imag: .* has no such column; did you mean 'image'"),
        ({"group": "actor"}, r"data\.group=actor: .* has no such column"),
    ):
        with pytest.raises(DataError, match=words):
            packed(tmp_path / "a.parquet", **fields).prepare(tmp_path / "e")
    with pytest.raises(DataError, match="no Parquet file there"):
        packed(tmp_path / "files").prepare(tmp_path / "e")
    assert Path(tmp_path / "a.parquet").exists()
