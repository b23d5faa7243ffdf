import json
import tomllib
from pathlib import Path

import pytest

from aquatint.config.importers.draft import report_text, to_toml
from aquatint.config.importers.sd_scripts import import_dataset
from aquatint.config.importers.sd_scripts_options import OPTIONS
from aquatint.config.load import read_draft
from aquatint.errors import AquatintError, UsageError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """sd-scripts was started here, and the config lies in a folder of its own."""
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(folder, count=2, caption=".txt"):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        (folder / f"{index}.png").touch()
        if caption:
            (folder / f"{index}{caption}").write_text("1girl, solo")
    return folder


def imported(here, text, name="dataset.toml"):
    (here / "configs" / name).write_text(text, encoding="utf-8")
    return import_dataset(here / "configs" / name)


def simple(here, options="", dataset="", general=""):
    pictures(here / "a")
    text = f"[general]\n{general}\n[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = 'a'\n{options}\n"
    return imported(here, text)


def line(result, option, where=None):
    """The only line about an option (at a place)."""
    found = [line for line in result.report if line.option == option and line.where == (where or line.where) != "not set"]
    assert len(found) == 1, found
    return found[0]


def problems(result, folder):
    """What is wrong with the draft as a config."""
    (folder / "run.toml").write_text(to_toml(result), encoding="utf-8")
    return [str(problem) for problem in read_draft(folder / "run.toml").problems]


EXAMPLE = r"""
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

# This is a DreamBooth-style dataset
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'Bilder\Bär'
  class_tokens = 'hoge girl'

  [[datasets.subsets]]
  image_dir = 'C:\fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'
  keep_tokens = 1

# This is a fine-tuning dataset
[[datasets]]
resolution = [768, 768]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'piyo'
  metadata_file = 'piyo/piyo_md.json'
"""


def test_the_example_of_their_documentation(here):
    pictures(here / "Bilder" / "Bär")
    pictures(here / "reg", caption="")
    pictures(here / "piyo")
    (here / "piyo" / "piyo_md.json").write_text("{}")
    result = imported(here, EXAMPLE)
    sources = result.config["data"]["sources"]
    assert [source["path"] for source in sources] == [
        str(here / "Bilder" / "Bär"),
        r"C:\fuga",
        str(here / "reg"),
        str(here / "piyo/piyo_md.json"),
    ]
    assert [source.get("role", "train") for source in sources] == ["train", "train", "regularization", "train"]
    assert sources[3]["kind"] == "table"
    assert sources[2]["trigger"] == "human"
    assert "trigger" not in sources[0]
    assert result.config["buckets"] == {"resolution": 768, "tiers": [512], "min_side": 384, "max_side": 1536}
    assert result.config["captions"] == {"style": "tags", "shuffle": True, "keep_first": 2}
    assert result.config["training"] == {"batch_size": 2}
    assert line(result, "image_dir", "line 18").verdict == "approximated"
    assert "path of Windows" in line(result, "image_dir", "line 18").text
    assert line(result, "keep_tokens", "line 11").verdict == "mapped"
    assert line(result, "keep_tokens", "line 20").verdict == "approximated"
    assert line(result, "keep_tokens", "line 5").verdict == "approximated"
    assert problems(result, here) == []


def test_every_option_of_a_file_has_a_line_and_the_lines_are_in_its_order(here):
    text = EXAMPLE + "\n".join(f"{name} = {json.dumps(VALUES[option.kind])}" for name, option in OPTIONS.items() if name not in NAMED)
    result = imported(here, text)
    written = [number for number, row in enumerate(text.splitlines(), 1) if "=" in row and not row.lstrip().startswith("#")]
    assert [line.where for line in result.report if line.where != "not set"] == [f"line {number}" for number in written]
    assert all(line.text for line in result.report)


VALUES = {"flag": True, "whole": 3, "number": 0.25, "text": "x", "size": 640, "two numbers": [1, 2], "table": []}
NAMED = ("image_dir", "metadata_file", "is_reg")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("num_repeats = 10", {"repeats": 10.0}),
        ("num_repeats = 1", {}),
        ("caption_extension = '.wd14.txt'", {"caption_extensions": [".wd14.txt"]}),
        ("alpha_mask = true", {"masks": "alpha"}),
        ("alpha_mask = false", {}),
        ("enable_wildcard = true", {"caption_lines": "alternatives"}),
        ("is_reg = false", {}),
        ('caption_prefix = "masterpiece, best quality, "', {"trigger": "masterpiece, best quality"}),
        ('caption_prefix = "1girl, miku |||"\nkeep_tokens_separator = "|||"\nshuffle_caption = true', {"trigger": "1girl, miku"}),
    ],
)
def test_options_of_a_source(here, written, expected):
    result = simple(here, written)
    source = dict(result.config["data"]["sources"][0])
    assert source.pop("path") == str(here / "a")
    if "caption_extension" not in written:
        assert source.pop("caption_extensions") == [".txt", ".caption"]
    assert source == expected
    assert problems(result, here) == []


@pytest.mark.parametrize(
    ("written", "section", "expected"),
    [
        ("shuffle_caption = true", "captions", {"style": "tags", "shuffle": True, "keep_first": 0}),
        ("shuffle_caption = true\nkeep_tokens = 3", "captions", {"style": "tags", "shuffle": True, "keep_first": 3}),
        ("shuffle_caption = false\nkeep_tokens = 3", "captions", None),
        ("caption_tag_dropout_rate = 0.1", "captions", {"style": "tags", "keep_first": 0, "tag_drop_prob": 0.1}),
        ("caption_tag_dropout_rate = 0.0", "captions", None),
        (
            "shuffle_caption = true\nkeep_tokens = 3\nkeep_tokens_separator = '|||'\ncaption_separator = ';'",
            "captions",
            {"style": "tags", "separator": ";", "shuffle": True, "keep_separator": "|||"},
        ),
        ("caption_dropout_rate = 0.05", "captions", {"dropout_prob": 0.05, "dropout_zeros_share": 0.0}),
        ("caption_dropout_rate = 0", "captions", {"dropout_prob": 0.0}),
        ("enable_wildcard = true", "captions", {"wildcards": True}),
        ("flip_aug = true", "crop", {"flip_prob": 0.5}),
        ("flip_aug = false", "crop", {"flip_prob": 0.0}),
        ("random_crop = true", "crop", {"mode": "random", "variants": 4}),
    ],
)
def test_options_of_the_whole_run(here, written, section, expected):
    for result in (simple(here, options=written), simple(here, dataset=written), simple(here, general=written)):
        assert result.config.get(section) == expected
        assert problems(result, here) == []


KOHYA = {"set": "kohya", "min_side": 256, "max_side": 1024, "step": 64}


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", None),
        ("resolution = 1024", {"resolution": 1024}),
        ("resolution = 512", {"resolution": 512, "min_side": 256, "max_side": 1024}),
        ("resolution = [1024, 1024]\nenable_bucket = true", {"resolution": 1024, **KOHYA}),
        ("resolution = [832, 1216]\nenable_bucket = true", {"resolution": 1006, **KOHYA}),
        (
            "enable_bucket = true\nmin_bucket_reso = 512\nmax_bucket_reso = 2048\nbucket_reso_steps = 32",
            {**KOHYA, "min_side": 512, "max_side": 2048, "step": 32},
        ),
        ("bucket_reso_steps = 40", KOHYA),
        ("enable_bucket = true\nbucket_reso_steps = 8", {**KOHYA, "step": 32}),
        ("enable_bucket = false", {"min_side": 1024, "max_side": 1024, "max_aspect": 1.0}),
        ("enable_bucket = false\nresolution = 1000", {"resolution": 1000, "min_side": 992, "max_side": 992, "max_aspect": 1.0}),
        ("enable_bucket = false\nresolution = 512", {"resolution": 512, "min_side": 512, "max_side": 512, "max_aspect": 1.0}),
    ],
)
def test_options_of_buckets(here, written, expected):
    result = simple(here, dataset=written)
    assert result.config.get("buckets") == expected
    assert problems(result, here) == []


def test_what_differs_from_sd_scripts_is_said(here):
    result = simple(here, dataset="resolution = [832, 1216]\nenable_bucket = true\nbucket_reso_steps = 8\nbucket_no_upscale = true")
    for option, word in (("resolution", "the square of that area"), ("bucket_reso_steps", "a multiple of 32")):
        assert (line(result, option).verdict, word in line(result, option).text) == ("approximated", True)
    assert line(result, "bucket_no_upscale").verdict == "not supported"
    assert "buckets.tiers" in line(result, "bucket_no_upscale").text


@pytest.mark.parametrize(
    ("written", "verdict"),
    [
        ("color_aug = true", "not supported"), ("color_aug = false", "mapped"), ("face_crop_aug_range = [1.0, 3.0]", "not supported"),
        ("caption_suffix = ', from side'", "not supported"), ("secondary_separator = ';;;'", "not supported"),
        ("caption_dropout_every_n_epochs = 3", "not supported"), ("caption_dropout_every_n_epochs = 0", "mapped"),
        ("token_warmup_step = 100", "not supported"), ("token_warmup_min = 1", "mapped"),
        ("conditioning_data_dir = 'masks'", "not supported"),
        ("custom_attributes = { artist = 'me' }", "not supported"), ("cache_info = true", "mapped"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_named_unless_it_is_off(here, written, verdict):
    result = simple(here, written)
    found = line(result, written.partition(" ")[0])
    assert found.verdict == verdict
    assert f"{found.option} = " in to_toml(result) or verdict == "mapped"


def test_defaults_that_differ_are_named(here):
    result = simple(here)
    unset = {line.option: line for line in result.report if line.where == "not set"}
    assert set(unset) == {"caption_extension", "resolution", "enable_bucket", "enable_wildcard", "caption_dropout_rate"}
    assert {line.verdict for line in unset.values()} == {"approximated"}
    assert "0.1" in unset["caption_dropout_rate"].text


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("num_repeat = 5", ["no such option, but `num_repeats`"]),
        ("train_batch_size = 5", ["no such option, but `batch_size`"]),
        ("Flip_Aug = true", ["no such option, but `flip_aug`"]),
        ("xyzzy = 1", ["there is no such option: sd-scripts refuses"]),
        ("num_repeats = '10'", ["it should be a whole number"]),
        ("num_repeats = true", ["it should be a whole number"]),
        ("num_repeats = 99999999999", ["it should be a whole number"]),
        ("caption_dropout_rate = nan", ["it should be a number"]),
        ("flip_aug = 1", ["it should be true or false"]),
        ("caption_dropout_rate = '5%'", ["it should be a number"]),
        ("face_crop_aug_range = [1, 2, 3]", ["it should be two numbers"]),
        ("batch_size = 4", ["it belongs in [general] or [[datasets]]"]),
        ("caption_extension = '/*'", ["no ending of a file"]),
        ("caption_dropout_rate = 1.5", ["captions.dropout_prob = 1.0: it can be from 0 to 1"]),
        ("caption_extension = 'txt'", ["with the point that was missing"]),
    ],
)
def test_mistakes_of_a_subset_are_named_and_have_no_effect(here, written, words):
    result = simple(here, written)
    found = line(result, written.partition(" ")[0])
    assert found.verdict != "mapped"
    assert found.where == "line 7"
    assert all(word in found.text for word in words)
    assert problems(result, here) == []


def test_options_in_the_wrong_place_are_named(here):
    pictures(here / "a")
    text = "shuffle_caption = true\nnotes = 'x'\n[general]\nimage_dir = 'a'\n[[datasets]]\nis_reg = true\n"
    result = imported(here, f"{text}[[datasets.subsets]]\nimage_dir = 'a'\n")
    assert "outside of [general]" in line(result, "shuffle_caption").text
    assert "outside of a file" in line(result, "notes").text
    assert "belongs in [[datasets.subsets]]" in line(result, "image_dir", "line 4").text
    assert "belongs in [[datasets.subsets]]" in line(result, "is_reg").text
    assert "should be a table" in line(imported(here, "general = 3\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'"), "general").text
    assert result.count("not supported") == 4
    assert "captions" not in result.config


def test_most_subsets_decide_and_regularization_has_no_say(here):
    for name in "abcde":
        pictures(here / name)
    subsets = [("a", True), ("b", True), ("c", False), ("d", False), ("e", False)]
    text = "[[datasets]]\n" + "".join(
        f"[[datasets.subsets]]\nimage_dir = '{name}'\nflip_aug = {json.dumps(flip)}\n{'is_reg = true' if name in 'de' else ''}\n"
        for name, flip in subsets
    )
    result = imported(here, text)
    assert result.config["crop"] == {"flip_prob": 0.5}
    lines = [line for line in result.report if line.option == "flip_aug"]
    assert [line.verdict for line in lines] == ["mapped", "mapped", "approximated", "approximated", "approximated"]


def test_what_is_overridden_everywhere_is_without_effect(here):
    result = simple(here, "num_repeats = 2", general="num_repeats = 9")
    assert line(result, "num_repeats", "line 2").text.startswith("without effect")
    assert result.config["data"]["sources"][0]["repeats"] == 2.0


@pytest.mark.parametrize(("captioned", "trigger", "verdict"), [(3, None, "mapped"), (1, None, "not supported"), (0, "sks girl", "mapped")])
def test_class_words_count_only_where_there_are_no_captions(here, captioned, trigger, verdict):
    pictures(here / "a", 3, caption="")
    for index in range(captioned):
        (here / "a" / f"{index}.txt").touch()
    result = simple_without_pictures(here, "class_tokens = 'sks girl'")
    assert result.config["data"]["sources"][0].get("trigger") == trigger
    assert result.config["data"].get("max_uncaptioned_share") == (1.0 if trigger else None)
    assert line(result, "class_tokens").verdict == verdict
    assert ("2 of 3 pictures" in line(result, "class_tokens").text) == (captioned == 1)


def simple_without_pictures(here, options):
    return imported(here, f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n{options}\n")


def test_regularization_gets_the_share_that_it_has_there(here):
    """Half of all samples, in parts as large as its folders."""
    for name, count in (("a", 10), ("b", 4), ("r", 4), ("s", 3)):
        pictures(here / name, count)
    subsets = [("a", "num_repeats = 3"), ("b", ""), ("r", "is_reg = true"), ("s", "is_reg = true\nnum_repeats = 2")]
    text = "[[datasets]]\n" + "".join(f"[[datasets.subsets]]\nimage_dir = '{name}'\n{more}\n" for name, more in subsets)
    result = imported(here, text.replace("[[datasets]]", "[[datasets]]\nprior_loss_weight = 0.5"))
    sources = result.config["data"]["sources"]
    assert [source.get("share") for source in sources] == [None, None, 0.2, 0.3]
    assert [source.get("loss_weight", 1) for source in sources] == [1, 1, 0.5, 0.5]
    assert line(result, "prior_loss_weight").verdict == "mapped"
    assert problems(result, here) == []


def test_shares_count_all_datasets(here):
    """Dataset 1: 6 samples and as many of regularization; dataset 2: 8 without. So 6 of 20."""
    for name, count in (("a", 6), ("r", 3), ("b", 8)):
        pictures(here / name, count)
    text = "[[datasets]]\n[[datasets.subsets]]\nimage_dir='a'\n[[datasets.subsets]]\nimage_dir='r'\nis_reg=true\nnum_repeats=2\n"
    result = imported(here, f"{text}[[datasets]]\n[[datasets.subsets]]\nimage_dir='b'\n")
    assert result.config["data"]["sources"][1]["share"] == 0.3
    assert "share = 0.3 instead" in line(result, "num_repeats").text
    assert problems(result, here) == []


def test_the_same_pictures_in_two_datasets_count_once(here):
    pictures(here / "a")
    text = "".join(f"[[datasets]]\nresolution = {size}\n[[datasets.subsets]]\nimage_dir = 'a'\n" for size in (512, 1024, 768))
    result = imported(here, text)
    assert len(result.config["data"]["sources"]) == 1
    assert [found.verdict for found in result.report if found.option == "image_dir"] == ["mapped", "approximated", "approximated"]
    assert problems(result, here) == []


def test_tiers_come_from_datasets_of_other_sizes(here):
    for name in "abc":
        pictures(here / name)
    text = "".join(
        f"[[datasets]]\nresolution = {size}\n[[datasets.subsets]]\nimage_dir = '{name}'\n"
        for name, size in zip("abc", (512, 1024, 768), strict=True)
    )
    result = imported(here, text)
    assert result.config["buckets"] == {"resolution": 1024, "tiers": [768, 512]}
    assert [found.verdict for found in result.report if found.option == "resolution"] == ["approximated"] * 3
    assert problems(result, here) == []


def test_subsets_without_repeats_or_pictures_are_left_out_and_named(here):
    pictures(here / "a")
    pictures(here / "none")
    (here / "empty").mkdir()
    pictures(here / "deep" / "inside")
    pictures(here / "a" / "more")
    subsets = ["image_dir = 'a'", "image_dir = ''", "image_dir = 'none'\nnum_repeats = 0", "image_dir = 'empty'", "image_dir = 'deep'"]
    result = imported(here, "[[datasets]]\n" + "".join(f"[[datasets.subsets]]\n{subset}\n" for subset in [*subsets, "image_dri = 'a'"]))
    assert [source["path"] for source in result.config["data"]["sources"]] == [str(here / "a")]
    texts = [found.text for found in result.report if found.option == "image_dir"]
    words = ["folders inside (more)", "it is empty", "less than one", "no pictures directly", "no pictures directly", "left out"]
    assert all(word in text for text, word in zip(texts, words, strict=True))
    assert "`image_dir`" in line(result, "image_dri").text


def test_a_metadata_file_away_from_its_pictures_is_named(here):
    pictures(here / "a")
    (here / "meta.json").write_text("{}")
    result = imported(
        here, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\nmetadata_file = 'meta.json'\ncaption_extension = '.txt'\n"
    )
    assert result.config["data"]["sources"] == [{"path": str(here / "meta.json"), "kind": "table"}]
    assert "move the metadata file there" in line(result, "image_dir").text
    assert line(result, "caption_extension").text.startswith("without effect")


@pytest.mark.parametrize("place", [".", "configs"])
def test_relative_paths_are_found_from_here_and_from_the_config(here, place):
    pictures(here / place / "sub" / "ü")
    result = imported(here, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'sub\\ü'\n")
    assert result.config["data"]["sources"][0]["path"] == str(here / place / "sub" / "ü")


def test_a_folder_that_is_not_here_is_kept_and_named(here):
    result = imported(here, "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'gone\\x'\nclass_tokens = 'sks'\n")
    assert result.config["data"]["sources"][0]["path"] == str(here / "configs" / "gone" / "x")
    assert "nothing at this path" in line(result, "image_dir").text
    assert line(result, "class_tokens").verdict == "approximated"


def test_json_is_read_the_same_way(here):
    pictures(here / "a")
    data = {
        "general": {"shuffle_caption": True},
        "datasets": [{"batch_size": 4, "subsets": [{"image_dir": "a", "num_repeats": 2, "typo": 1}]}],
    }
    result = imported(here, json.dumps(data, indent=1), "dataset.json")
    assert result.config["training"]["batch_size"] == 4
    assert line(result, "typo").where.startswith("line ")
    assert problems(result, here) == []


# folders


def test_a_folder_of_folders(here):
    pictures(here / "set" / "10_sks girl", 2, caption="")
    pictures(here / "set" / "3_Bär_und_Hund", 2, caption=".caption")
    pictures(here / "set" / "5_")
    pictures(here / "set" / "0_none")
    pictures(here / "set" / "no number")
    pictures(here / "set", 4)
    result = import_dataset(here / "set")
    sources = {Path(source["path"]).name: source for source in result.config["data"]["sources"]}
    assert {name: source["repeats"] for name, source in sources.items()} == {"10_sks girl": 10.0, "3_Bär_und_Hund": 3.0, "5_": 5.0}
    assert sources["10_sks girl"]["trigger"] == "sks girl"
    assert sources["3_Bär_und_Hund"]["caption_extensions"] == [".caption"]
    assert "trigger" not in sources["3_Bär_und_Hund"]
    assert [(found.where, found.verdict) for found in result.report if found.option == "(folder)"] == [
        ("0_none", "not supported"), ("no number", "not supported"), ("set", "not supported"),
    ]  # fmt: skip
    assert "4 pictures" in line(result, "(folder)", "set").text
    assert problems(result, here) == []


@pytest.mark.parametrize("is_given", [False, True])
def test_regularization_folders_are_given_or_lie_where_kohya_ss_puts_them(here, is_given):
    pictures(here / "set" / "img" / "10_sks girl")
    pictures(here / "set" / "reg" / "1_girl", 40)
    (here / "set" / "log").mkdir()
    result = import_dataset(here / "set" / "img", regularization=here / "set" / "reg") if is_given else import_dataset(here / "set")
    sources = result.config["data"]["sources"]
    assert [source.get("role") for source in sources] == [None, "regularization"]
    assert sources[1]["share"] == 0.5
    assert problems(result, here) == []


def test_a_folder_whose_name_is_no_text_is_named(here):
    pictures(here / "set" / "1_a")
    pictures(here / "set" / "2_\udcff")
    result = import_dataset(here / "set")
    assert len(result.config["data"]["sources"]) == 1
    assert "rename it" in line(result, "(folder)").text
    to_toml(result).encode()


# what cannot be read


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.yaml", "datasets: []", "is not a dataset config"),
        ("x.toml", "image_dir = \"C:\\hoge\"", "write paths with backslashes in single quotes"),
        ("x.toml", "datasets = 3", "is not a dataset config"),
        ("x.toml", "[[dataset]]\n", "is `dataset` meant to be [[datasets]]?"),
        ("x.toml", "[[datasets]]\n", "names no pictures"),
        ("x.toml", "[[datasets]]\n[datasets.subsets]\nimage_dir = 'a'", "write it with two brackets: [[datasets.subsets]]"),
        ("x.toml", "[[datasets]]\n[[datasets.subsets]]\nimage_dri = 'a'", "but `image_dir`"),
        ("x.toml", "train_data_dir = 'pics'\nnetwork_dim = 8", 'train_data_dir = "pics"'),
        ("x.toml", "[dataset_arguments]\ndataset_config = 'd.toml'\n[training]\nlr = 1", 'dataset_config = "d.toml"'),
        ("x.json", '{"a.png": {"caption": "x", "tags": "y"}}', "needs no import"),
        ("x.json", '{"datasets": [', "broken JSON"),
        ("x.json", "[]", "holds no settings"),
        ("x.json", '{"datasets": ' + "[" * 100_000, "nested too deeply"),
        ("x.toml", "\xff", "UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_dataset_config_is_refused_with_what_to_do(here, name, text, words):
    (here / name).write_text(text, encoding="latin-1")
    with pytest.raises(AquatintError) as caught:
        import_dataset(here / name)
    assert caught.value.exit_code == 2
    assert words in str(caught.value)


def test_folders_that_are_none_are_refused(here):
    with pytest.raises(UsageError, match="there is no file or folder"):
        import_dataset(here / "none")
    pictures(here / "plain")
    with pytest.raises(UsageError, match="aquatint init --pictures"):
        import_dataset(here / "plain")
    pictures(here / "set" / "1_a")
    with pytest.raises(UsageError, match="there is no folder"):
        import_dataset(here / "set", regularization=here / "none")
    (here / "d.toml").write_text("")
    with pytest.raises(UsageError, match="names its own"):
        import_dataset(here / "d.toml", regularization=here / "set")
    (here / "empty" / "1_a").mkdir(parents=True)
    with pytest.raises(UsageError, match="no pictures"):
        import_dataset(here / "empty")


# text


def test_the_toml_says_the_same_as_the_draft(here):
    pictures(here / "odd\nname\x7f'\"")
    data = {"datasets": [{"subsets": [{"image_dir": "odd\nname\x7f'\"", "caption_prefix": "a\\b\n#c", "x\ny": "z\nw"}]}]}
    result = imported(here, json.dumps(data), "dataset.json")
    text = to_toml(result)
    assert tomllib.loads(text) == result.config
    assert "# From dataset.json" in text
    assert "x\\ny" in text
    assert problems(result, here) == []


def test_the_report_has_one_block_per_verdict_and_no_row_too_long(here):
    result = simple(here, "num_repeats = 10\ncolor_aug = true\nrandom_crop = true\n" + f"caption_suffix = '{'x' * 200}'")
    rows = report_text(result).splitlines()
    assert [row for row in rows if row and not row.startswith(" ")] == ["Taken over:", "Taken over with a difference:", "Not taken over:"]
    assert max(map(len, rows)) <= 120
    assert any(row.split() == ["line", "7", "num_repeats", "=", "10", "repeats", "=", "10"] for row in rows)


def test_importing_changes_nothing(here):
    pictures(here / "set" / "1_a")
    before = sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*"))
    import_dataset(here / "set")
    assert sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*")) == before
