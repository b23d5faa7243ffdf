import csv
import json
import os
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aquatint.data.places import Identity, Opener, Place
from aquatint.data.sources import tables, text_rows
from aquatint.data.sources.listing import Remarks, Source
from aquatint.data.sources.parquet_rows import read_parquet
from aquatint.data.sources.tables import containers, list_table
from aquatint.data.sources.text_rows import MAX_ROW_BYTES
from aquatint.errors import DataError, StorageError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.png", "sub/c.jpg", "Bär ü.jpg", "a-mask.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(name.encode())
    return tmp_path / "set"


def listed(path, **settings):
    """Entries and problems."""
    remarks = Remarks()
    return list(list_table(Source(str(path), kind="table", **settings), Opener(), remarks)), remarks.problems


def captions(path, **settings):
    entries, problems = listed(path, **settings)
    assert problems == []
    return [entry.captions for entry in entries]


def refusal(path, **settings):
    with pytest.raises(DataError) as caught:
        listed(path, **settings)
    return str(caught.value)


def json_lines(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return path


def parquet(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return path


# what is in a table


def test_rows_of_json_lines_are_listed_in_their_order(folder):
    rows = {"image": "sub/c.jpg", "caption": "ein Bär"}, {"image": "a.jpg", "caption": "second", "score": None}
    entries, problems = listed(json_lines(folder / "t.jsonl", *rows))
    assert problems == []
    assert [(entry.name, entry.captions) for entry in entries] == [("set/sub/c.jpg", ("ein Bär",)), ("set/a.jpg", ("second",))]
    assert entries[0].picture == Place(str(folder / "sub" / "c.jpg"))
    assert entries[0].identity == Opener().identity(str(folder / "sub" / "c.jpg"))
    assert entries[0].caption is None
    assert entries[0].mask is None


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("csv", "\t")])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_csv_with_quotes_marks_and_any_line_ends(folder, ending, delimiter, start, line_end):
    rows = [["file_name", "text"], ["Bär ü.jpg", 'a "big" cat; red, blue\tfur\nsecond line'], ["a.jpg", ""]]
    path = folder / f"t.{ending}"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter, lineterminator=line_end).writerows(rows)
    path.write_bytes(start + path.read_bytes())
    entries, problems = listed(path)
    assert problems == []
    assert [entry.name for entry in entries] == ["set/Bär ü.jpg", "set/a.jpg"]
    assert [entry.captions for entry in entries] == [('a "big" cat; red, blue\tfur\nsecond line',), ()]


def test_a_byte_order_mark_is_no_part_of_the_first_row(folder):
    path = folder / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"image": "a.jpg", "text": "x"}).encode())
    assert captions(path) == [("x",)]
    (folder / "t.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"a.jpg": {"caption": "x"}}).encode())
    assert captions(folder / "t.json") == [("x",)]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.json"])
def test_utf16_is_refused_with_the_reason(folder, name):
    (folder / name).write_text('{"image": "a.jpg", "text": "x"}', encoding="utf-16")
    assert "is in UTF-16; save it as UTF-8" in refusal(folder / name)


def test_several_columns_and_lists_are_alternatives(folder):
    rows = {"image": "a.jpg", "caption": ["one", "two", "one"], "text": "three", "prompt": None}
    assert captions(json_lines(folder / "t.jsonl", rows)) == [("one", "two", "three")]
    assert captions(folder / "t.jsonl", caption_columns=("text",)) == [("three",)]


def test_a_list_of_tags_is_one_caption(folder):
    path = json_lines(folder / "t.jsonl", {"image": "a.jpg", "tags": ["1girl", " solo ", ""], "caption": "a girl"})
    assert captions(path) == [("1girl, solo", "a girl")]


def test_lines_are_alternatives_where_the_source_says_so(folder):
    path = json_lines(folder / "t.jsonl", {"image": "a.jpg", "text": "one\r\n\r\ntwo\n"})
    assert captions(path) == [("one\n\ntwo",)]
    assert captions(path, caption_lines="alternatives") == [("one", "two")]


def test_the_json_of_sd_scripts_joins_caption_and_tags(folder):
    pictures = {
        "a.jpg": {"caption": "a cat", "tags": "sofa, indoor", "train_resolution": [1024, 768]},
        "b": {"tags": "only, tags"},  # older tools leave the ending out
        r"sub\c.jpg": {"caption": "from Windows"},
        str(folder / "Bär ü.jpg"): {},
    }
    (folder / "meta_lat.json").write_text(json.dumps(pictures, indent=2))
    entries, problems = listed(folder / "meta_lat.json")
    assert problems == []
    assert [entry.captions for entry in entries] == [("a cat, sofa, indoor",), ("only, tags",), ("from Windows",), ()]
    assert [entry.picture.path for entry in entries[1:]] == [str(folder / name) for name in ("b.png", "sub/c.jpg", "Bär ü.jpg")]


def test_its_lines_all_get_the_tags(folder):
    (folder / "meta.json").write_text(json.dumps({"a.jpg": {"caption": "one\ntwo", "tags": "x, y"}}))
    assert captions(folder / "meta.json", caption_lines="alternatives") == [("one, x, y", "two, x, y")]
    assert captions(folder / "meta.json", caption_columns=("caption",)) == [("one\ntwo",)]


def test_json_may_map_pictures_to_captions_or_be_a_list_of_rows(folder):
    (folder / "captions.json").write_text('{"a.jpg": ["one", "two"], "b.png": "three"}')
    assert captions(folder / "captions.json") == [("one", "two"), ("three",)]
    (folder / "rows.json").write_text('[{"file_name": "a.jpg", "text": "x"}, {"file_name": "b.png", "text": "y"}]')
    assert captions(folder / "rows.json") == [("x",), ("y",)]


@pytest.mark.parametrize("name", tables.METADATA)
def test_a_folder_with_metadata_is_a_table(folder, name):
    rows = [{"file_name": "sub/c.jpg", "text": "x"}]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    elif name.endswith("csv"):
        (folder / name).write_text("file_name,text\nsub/c.jpg,x\n")
    else:
        json_lines(folder / name, *rows)
    assert [entry.name for entry in listed(folder)[0]] == ["set/sub/c.jpg"]
    assert containers(Source(str(folder), kind="table"), Opener()) == (str(folder / name),)


def test_a_folder_without_metadata_or_with_two_is_refused(folder):
    assert "has no table: none of metadata.jsonl" in refusal(folder)
    (folder / "metadata.csv").write_text("file_name,text\n")
    (folder / "metadata.jsonl").write_text("")
    assert "metadata.jsonl and metadata.csv" in refusal(folder)


def test_several_tables_come_in_the_order_of_their_names(folder):
    for name, picture in (("part-2.csv", "b.png"), ("part-1.csv", "a.jpg"), ("sub/part-3.csv", "c.jpg")):
        (folder / name).write_text(f"image,caption\n{picture},x\n")
    assert [entry.name for entry in listed(folder / "part-*.csv")[0]] == ["set/a.jpg", "set/b.png"]
    source = Source(str(folder / "**" / "part-*.csv"), kind="table")
    assert containers(source, Opener()) == tuple(str(folder / name) for name in ("part-1.csv", "part-2.csv", "sub/part-3.csv"))
    (folder / "odd[1].csv").write_text("image,caption\na.jpg,x\n")
    assert captions(folder / "odd[1].csv") == [("x",)]


def test_a_table_that_is_not_there_or_none_is_refused(folder):
    assert "there is no table" in refusal(folder / "none-*.csv")
    (folder / "t.xlsx").write_text("")
    assert "is not a table that can be read" in refusal(folder / "t.xlsx")
    (folder / "d.csv").mkdir()
    assert "the folder" in refusal(folder / "d.csv")
    assert "has no rows" in refusal(json_lines(folder / "empty.jsonl"))
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    assert "is not Parquet" in refusal(folder / "broken.parquet")


# columns


@pytest.mark.parametrize(
    ("names", "picture"),
    [
        (("file_name", "image", "url"), "file_name"),
        (("image_file_name", "mask_file_name"), "image_file_name"),
        (("URL", "image_path"), "image_path"),
        (("width", " Image "), " Image "),
        (("url", "id"), "url"),
    ],
)
def test_the_picture_is_found_by_usual_names(folder, names, picture):
    (folder / "t.csv").write_text("")
    row = {**dict.fromkeys(names, "b.png"), picture: "a.jpg", "TEXT": "x"}
    assert [entry.name for entry in listed(json_lines(folder / "t.jsonl", row))[0]] == ["set/a.jpg"]


def test_what_could_be_several_columns_or_is_none_is_refused_with_what_there_is(folder):
    path = json_lines(folder / "t.jsonl", {"image": "a.jpg", "path": "b.png", "text": "x"})
    assert "several columns that could be the picture: `image`, `path`" in refusal(path)
    assert "`image`" in refusal(path)
    assert [entry.name for entry in listed(path, picture_column="path")[0]] == ["set/b.png"]
    assert "no column with a usual name for pictures; it has `img_id`, `text`" in refusal(
        json_lines(folder / "u.jsonl", {"img_id": 1, "text": "x"})
    )
    assert "no column with a usual name for captions; it has `image`, `words`" in refusal(
        json_lines(folder / "v.jsonl", {"image": "a.jpg", "words": "x"})
    )
    assert captions(folder / "v.jsonl", caption_columns=("words",)) == [("x",)]


@pytest.mark.parametrize("settings", [{"picture_column": "imagee"}, {"caption_columns": ("text", "imagee")}, {"mask_column": "imagee"}])
def test_a_column_that_is_not_there_is_refused_with_the_nearest(folder, settings):
    shown = refusal(json_lines(folder / "t.jsonl", {"image": "a.jpg", "text": "x"}), **settings)
    assert f"{folder / 't.jsonl'} has no column `imagee`" in shown
    assert "did you mean `image`?" in shown


def test_masks_are_used_when_they_are_asked_for(folder):
    rows = {"image": "a.jpg", "text": "x", "mask": "a-mask.png"}, {"image": "b.png", "text": "y", "mask": ""}
    path = json_lines(folder / "t.jsonl", *rows, {"image": "sub/c.jpg", "text": "z", "mask": "gone.png"})
    for settings in ({"masks": "files"}, {"mask_column": "mask"}):
        entries, problems = listed(path, **settings)
        assert [entry.mask for entry in entries] == [Place(str(folder / "a-mask.png")), None]
        assert entries[0].mask_identity == Opener().identity(str(folder / "a-mask.png"))
        assert entries[1].mask_identity is None
        assert [name for name, _ in problems] == ["t.jsonl, line 3"]
    remarks = Remarks()
    entries = list(list_table(Source(str(path), kind="table"), Opener(), remarks))
    assert [entry.mask for entry in entries] == [None, None, None]
    assert "`mask`, which is not used" in remarks.warnings[0]
    assert "no column for masks" in refusal(json_lines(folder / "u.jsonl", {"image": "a.jpg", "text": "x"}), masks="files")


# rows that cannot be used


def problems_of(path, *words):
    """The labels of all problems, each with the words that its reason must have; good rows must come through."""
    entries, problems = listed(path)
    assert len(entries) >= 1
    assert len(problems) == len(words), problems
    for (_, reason), word in zip(problems, words, strict=True):
        assert word in reason
    return [name for name, _ in problems]


def test_each_bad_line_is_named_and_none_ends_the_listing(folder):
    path = json_lines(
        folder / "t.jsonl",
        {"image": "a.jpg", "text": "good"},
        {"image": "gone.jpg", "text": "x"},
        {"image": None, "text": "x"},
        {"text": "x"},
        {"image": " ", "text": "x"},
        '{"image": "a.jpg", "text": "x"',
        '["a.jpg"]',
        "",
        '{"image": "a.jpg", "text": "x", "text": "y"}',
        {"image": 3, "text": "x"},
        {"image": "a.jpg", "text": 3},
        {"image": "a.jpg", "text": ["x", None]},
        '{"image": "a.jpg", "text": "x"} {}',
        '{"image": "a.jpg\\u0000", "text": "x"}',
        '{"image": "a.jpg", "text": "\\ud800"}',
        {"image": "a.jpg", "text": "x" * 70_000},
        {"image": "a.jpg", "text": "good"},
    )
    labels = problems_of(
        path, "gone.jpg, which cannot be opened: No such file", "has nothing as `image`", "has nothing as `image`",
        "has nothing as `image`", "is not JSON", "is a list", "has 'text' twice", "has a number as `image`", "has a number as `text`",
        "has nothing in the list of `text`", "goes on after its end", "null byte", "half a character", "longer than",
    )  # fmt: skip
    assert labels == [f"t.jsonl, line {number}" for number in (2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16)]


def test_nesting_bombs_giants_and_odd_numbers_are_bounded(folder):
    path = folder / "t.jsonl"
    good = '{"image": "a.jpg", "text": "x", "score": NaN}'
    giant = f'{{"image": "a.jpg", "text": "{"x" * (3 * MAX_ROW_BYTES)}"}}'
    bombs = ["[" * 1_000_000, '{"a":' * 150_000, giant, f'{{"n": {"9" * 6000}}}', '{"image": "a.jpg", "text": NaN}', "\x00", good]
    path.write_text("\n".join([good, *bombs]))
    labels = problems_of(
        path, "nested too deeply", "nested too deeply", "is longer than", "cannot be read", "has a number as", "is not JSON"
    )
    assert labels == [f"t.jsonl, line {number}" for number in range(2, 8)]


def test_bytes_that_are_not_utf8_matter_only_where_they_are_used(folder):
    path = folder / "t.jsonl"
    path.write_bytes(b'{"image": "a.jpg", "text": "x", "other": "\xff"}\n{"image": "b.png", "text": "\xff"}\n')
    problems_of(path, "half a character")
    path = folder / "t.csv"
    path.write_bytes(b"image,text,other\na.jpg,x,\xff\nb.png,\xff,y\n")
    problems_of(path, "half a character")


def test_bad_rows_of_csv_are_named_by_their_first_line(folder):
    path = folder / "t.csv"
    lines = [
        "image,text",
        "a.jpg,good",
        'a.jpg,"two',
        'lines"',
        "a.jpg,x,more",
        "a.jpg",
        "",
        'a.jpg,"x"y',
        "gone.jpg,x",
        'b.png,"never closed',
    ]
    path.write_text("\n".join([*lines, "c.jpg,x"]))
    labels = problems_of(
        path, "has 3 cells, and the first line 2", "has 1 cell, and", "is not CSV", "gone.jpg", "is not CSV, up to line 11"
    )
    assert labels == [f"t.csv, line {number}" for number in (5, 6, 8, 9, 10)]


def test_giant_cells_and_lines_of_csv_are_bounded(folder):
    path = folder / "t.csv"
    path.write_text(f"image,text\na.jpg,good\na.jpg,{'x' * 200_000}\na.jpg,{'x' * (2 * MAX_ROW_BYTES)}\nb.png,good\n")
    assert problems_of(path, "field larger than", "is longer than") == ["t.csv, line 3", "t.csv, line 4"]


@pytest.mark.parametrize(
    ("header", "word"),
    [("image,image,text", "two columns of the name 'image'"), (",,", "no names of columns"), ("a\rb", "first line that is not CSV")],
)
def test_a_csv_without_a_proper_first_line_is_refused(folder, header, word):
    (folder / "t.csv").write_text(f"{header}\na.jpg,b,c\n")
    assert word in refusal(folder / "t.csv")


def test_bad_entries_of_json_are_named(folder):
    text = '{"a.jpg": {"caption": "x"}, "a.jpg": {}, "b.png": {"caption": "x", "caption": "y"}, "gone": {}, "": {}, "b.png": {"tags": 3}}'
    (folder / "t.json").write_text(text.replace('"b.png": {"tags"', '"./b.png": {"tags"'))
    labels = problems_of(folder / "t.json", "the same name as an earlier one", "has 'caption' twice", "gone", "as its name", "as `tags`")
    assert labels == [f"t.json, entry {number}" for number in range(2, 7)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"a.jpg": {"caption": "x"}, "b.png": {"capt', "not JSON: unterminated string"),
        ('{"a.jpg": {"caption": "x"},', "breaks off before its end"),
        ('{"a.jpg": {"caption": "x"}', "breaks off before its end"),
        ('{"a.jpg": {"caption": "x"} "b.png": {}}', "a comma or `}` belongs"),
        ('{"a.jpg" {"caption": "x"}}', "a colon belongs"),
        ("{3: {}}", "a name in quotes belongs"),
        ('{"image": "a.jpg"}\n{"image": "b.png"}', "name it .jsonl"),
        ("image,text", "begins with 'i'"),
        ("", "begins with ''"),
        ("{}", "has no rows"),
        ("[3]", "is a number, where an object belongs"),
        ('{"a.jpg": ' + "[" * 1_000_000, "nested too deeply"),
        ('{"a.jpg": {"caption": "' + "x" * (5 * MAX_ROW_BYTES), "broken, or longer than"),
    ],
)
def test_broken_json_is_refused_because_nothing_can_be_found_behind_it(folder, text, word):
    (folder / "t.json").write_text(text)
    assert word in refusal(folder / "t.json")


def test_long_json_is_read_across_its_parts(folder, monkeypatch):
    pictures = {f"{'./' * index}a.jpg": {"caption": f"{index} ü" * (index % 7), "n": 12345} for index in range(60)}
    (folder / "t.json").write_text(json.dumps(pictures, ensure_ascii=False, indent=1))
    expected = captions(folder / "t.json")
    assert len(expected) == 60
    for size in (1, 2, 7, 64):
        read = text_rows._Window._fill
        monkeypatch.setattr(text_rows._Window, "_fill", lambda self, _, size=size, read=read: read(self, size))
        assert captions(folder / "t.json") == expected
        monkeypatch.undo()


def test_names_are_printable_and_hide_secrets(folder, monkeypatch):
    odd = "new\nline\x1b[31m.jpg"
    (folder / odd).write_bytes(b"")
    entries, _ = listed(json_lines(folder / "t.jsonl", {"image": odd, "text": "x"}, {"image": f"{odd}2", "text": "x"}))
    assert entries[0].name == "set/new\\nline\\x1b[31m.jpg"
    assert entries[0].picture.path == str(folder / odd)
    assert listed(folder / "t.jsonl")[1][0][1].isprintable()
    monkeypatch.setattr(Opener, "identity", lambda self, path: Identity(1, 2, 3, 4))
    entries, _ = listed(json_lines(folder / "u.jsonl", {"url": "https://me:word@host/a.jpg?token=1", "text": "x"}))
    assert entries[0].name == "https://host/a.jpg"
    assert entries[0].picture.path == "https://me:word@host/a.jpg?token=1"


def test_servers_are_asked_about_several_urls_at_once(folder, monkeypatch):
    local = Opener.identity

    def identity(self, path):
        if not path.startswith("https:"):
            return local(self, path)
        time.sleep(0.005)
        if path.endswith("7.jpg"):
            raise StorageError("could not read it: 503", hint="wait")
        return Identity(len(path), 0, 0, 1)

    monkeypatch.setattr(Opener, "identity", identity)
    path = json_lines(folder / "t.jsonl", *({"url": f"https://host/{index}.jpg", "text": str(index)} for index in range(600)))
    before = time.monotonic()
    entries, problems = listed(path)
    assert time.monotonic() - before < 1.5
    assert [entry.captions[0] for entry in entries] == [str(index) for index in range(600) if index % 10 != 7]
    assert problems[0] == ("t.jsonl, line 8", "names https://host/7.jpg, which cannot be opened: could not read it: 503")


def test_tables_in_an_object_store(tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    for index, name in enumerate(("one.csv", "two.csv")):
        store.pipe(f"/tables/{name}", f"image,text\nsub/{index}.jpg,x\n/etc/hosts,y\n".encode())
        store.pipe(f"/tables/sub/{index}.jpg", b"picture")
    opener, remarks = Opener(tmp_path), Remarks()
    source = Source("memory://tables/*.csv", kind="table")
    assert containers(source, opener) == ("memory:///tables/one.csv", "memory:///tables/two.csv")
    entries = list(list_table(source, opener, remarks))
    assert [entry.picture.path for entry in entries] == [f"memory:///tables/sub/{index}.jpg" for index in range(2)]
    assert [entry.identity for entry in entries] == [opener.identity(entry.picture.path) for entry in entries]
    assert [entry.name for entry in entries] == ["tables/sub/0.jpg", "tables/sub/1.jpg"]
    assert [name for name, _ in remarks.problems] == ["one.csv, line 3", "two.csv, line 3"]  # not a path of this computer
    store.rm("/tables", recursive=True)


# Parquet


def test_parquet_with_paths_and_lists(folder):
    columns = {"image": ["a.jpg", None, "gone.jpg", "b.png"], "caption": [["one", "two"], ["x"], ["y"], None]}
    entries, problems = listed(parquet(folder / "t.parquet", columns, row_group_size=2))
    assert [(entry.name, entry.captions) for entry in entries] == [("set/a.jpg", ("one", "two")), ("set/b.png", ())]
    assert [name for name, _ in problems] == ["t.parquet, row 1", "t.parquet, row 2"]


def test_parquet_with_words_in_a_dictionary_and_large_texts(folder):
    columns = {"image": pa.array(["a.jpg", "a.jpg"]).dictionary_encode(), "text": pa.array(["x", "y"], pa.large_string())}
    assert captions(parquet(folder / "t.parquet", columns)) == [("x",), ("y",)]


def test_pictures_in_cells_have_their_row_and_the_identity_of_the_table(folder):
    columns = {"jpg": [b"zero", b"one", b"two"], "txt": ["a", "b", "c"], "url": ["u", "v", "w"]}
    path = parquet(folder / "t.parquet", columns, row_group_size=2)
    entries, problems = listed(path)
    assert problems == []
    assert [entry.picture for entry in entries] == [Place(str(path), row, column="jpg") for row in range(3)]
    assert {entry.identity for entry in entries} == {Opener().identity(str(path))}
    assert [entry.name for entry in entries] == [f"t.parquet, row {row}" for row in range(3)]
    with Opener().open(entries[2].picture) as file:
        assert file.read() == b"two"


@pytest.mark.parametrize("row_group_size", [1, 2, 4])
def test_cells_of_hugging_face_may_have_bytes_or_a_path(folder, row_group_size):
    images = [{"bytes": b"inside", "path": "dog.png"}, {"bytes": None, "path": "a.jpg"}, None, {"bytes": b"more", "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = parquet(folder / "t.parquet", {"image": pa.array(images, kind), "text": list("abcd")}, row_group_size=row_group_size)
    entries, problems = listed(path)
    assert [(entry.picture.column, entry.picture.start) for entry in entries] == [("image", 0), ("", 0), ("image", 3)]
    assert [entry.name for entry in entries] == ["t.parquet, row 0 (dog.png)", "set/a.jpg", "t.parquet, row 3"]
    assert problems == [("t.parquet, row 2", "has nothing as `image`, where the path or URL of a picture belongs")]
    with Opener().open(entries[2].picture) as file:
        assert file.read() == b"more"


def test_a_mask_may_be_a_cell_too(folder):
    path = parquet(folder / "t.parquet", {"image": [b"i", b"j"], "text": ["a", "b"], "mask": [b"m", None]})
    entries, _ = listed(path, masks="files")
    assert [entry.mask for entry in entries] == [Place(str(path), 0, column="mask"), None]


@pytest.mark.parametrize("has_nulls", [False, True])
def test_the_bytes_of_pictures_are_not_read(folder, has_nulls):
    pictures = [os.urandom(1 << 20) for _ in range(16)]
    groups = [pictures[:8], [None] * 8] if has_nulls else [pictures[:8], pictures[8:]]
    with pq.ParquetWriter(folder / "t.parquet", pa.schema([("image", pa.binary()), ("text", pa.string())])) as writer:
        for group in groups:
            writer.write_table(pa.table({"image": pa.array(group, pa.binary()), "text": ["x"] * 8}))

    class Counted:
        def __init__(self, file):
            self.file, self.closed, self.count = file, False, 0

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, num_bytes=-1):
            data = self.file.read(num_bytes)
            self.count += len(data)
            return data

    with (folder / "t.parquet").open("rb") as file:
        counted = Counted(file)
        rows = list(read_parquet(pq.ParquetFile(counted, pre_buffer=False), "t.parquet", ("image", "text")))
    assert counted.count < 1 << 20  # of 16 MiB
    assert len(rows) == 16
    assert sum("image" in cells for _, cells in rows) == (8 if has_nulls else 16)


def test_columns_of_parquet_must_hold_what_they_are_for(folder):
    path = parquet(folder / "t.parquet", {"image": [1, 2], "pic": ["a.jpg", "b.png"], "text": ["a", "b"]})
    assert "no column with a usual name for pictures" in refusal(path)
    assert "`image` of the table" in refusal(path, picture_column="image")
    assert captions(path, picture_column="pic") == [("a",), ("b",)]
    assert "does not hold texts" in refusal(path, picture_column="pic", caption_columns=("image",))


def test_damage_inside_of_parquet_is_refused_with_its_place(folder):
    path = parquet(
        folder / "t.parquet", {"image": ["a.jpg"] * 1000, "text": [f"caption {index}" for index in range(1000)]}, row_group_size=500
    )
    data = bytearray(path.read_bytes())
    place = pq.ParquetFile(path).metadata.row_group(1).column(1).data_page_offset
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    assert "is broken in its row group 1 (from row 500 on)" in refusal(path)


# size


def test_a_long_table_is_read_as_it_is_used(folder):
    """Rows come before the table has been read to its end, and nothing of them stays."""
    json_lines(folder / "t.jsonl", *({"image": "a.jpg", "text": f"caption {index}"} for index in range(20_000)))

    class Watched(Opener):
        def open(self, place):
            self.file = super().open(place)
            return self.file

    opener = Watched()
    found = list_table(Source(str(folder / "t.jsonl"), kind="table"), opener, Remarks())
    next(found)
    assert opener.file.tell() < 100_000
    assert sum(1 for _ in found) == 19_999
    assert opener.file.closed


def test_listing_twice_gives_the_same(folder):
    path = json_lines(folder / "t.jsonl", {"image": "b.png", "text": "x"}, {"image": "a.jpg", "text": "y"}, {"image": "no", "text": "z"})
    assert listed(path) == listed(path)
