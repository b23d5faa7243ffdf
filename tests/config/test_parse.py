import contextlib

import pytest

from aquatint.config.parse import MAX_BYTES, read_source
from aquatint.errors import ConfigError, StorageError


@pytest.fixture
def read(tmp_path):
    def read(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_source(path)

    return read


def problem_of(read, name, text):
    with pytest.raises(ConfigError) as caught:
        read(name, text)
    (problem,) = caught.value.problems
    assert problem.hint
    return problem


SAME = {
    "run.toml": """
        run.name = "no"
        run.seed = 7
        optimizer.learning_rate = 1e-4
        samples.prompts = ["12:30", "b"]
        ema.warmup = true
    """,
    "run.json": """
        {"run": {"name": "no", "seed": 7}, "optimizer": {"learning_rate": 1e-4},
        "samples": {"prompts": ["12:30", "b"]}, "ema": {"warmup": true}}
    """,
    "run.yaml": "run:\n  name: no\n  seed: 7\noptimizer:\n  learning_rate: 1e-4\nsamples:\n  prompts: [12:30, b]\nema:\n  warmup: true\n",
}


def test_toml_json_and_yaml_give_the_same_values(read):
    toml, json, yaml = (read(name, text).data for name, text in SAME.items())
    assert toml == json == yaml
    assert type(yaml["run"]["seed"]) is int
    assert type(yaml["optimizer"]["learning_rate"]) is float


def test_yaml_keys_have_their_lines(read):
    source = read("a.yaml", "# top\nrun:\n  name: a\ndata:\n  sources:\n  - folder: x\n  - folder: y\n    repeats: 2\n")
    assert source.place(("run", "name")).endswith(", line 3")
    assert source.place(("data", "sources", 1, "repeats")).endswith(", line 8")
    assert source.place(("data", "sources", 1, "unknown")).endswith(", line 7")
    assert source.place(("ema", "decay")) == source.file


def test_an_empty_file_is_an_empty_config(read):
    assert read("a.yaml", "").data == read("a.toml", "").data == read("a.json", "{}").data == {}


def test_a_byte_order_mark_is_no_text(read):
    assert read("a.toml", "\ufeff[run]\nseed = 1\n".encode()).data == {"run": {"seed": 1}}


def test_a_run_folder_stands_for_its_config(read, tmp_path):
    read("config.json", '{"run": {"seed": 3}}')
    assert read_source(tmp_path).data == {"run": {"seed": 3}}


@pytest.mark.parametrize(
    ("name", "text", "line", "words"),
    [
        ("a.toml", "[run]\nname = portrait\n", 2, '"portrait"'),
        ("a.toml", "[training]\n\nlength = 500 steps\n", 3, '"500 steps"'),
        ("a.toml", '[model]\nbase = "C:\\Users\\me"\n', 2, "single quotes"),
        ("a.toml", "[ema]\nenabled = True\n", 2, "small letters"),
        ("a.toml", "[run]\nseed = 1\nseed = 2\n", 3, "only once"),
        ("a.toml", "[run]\nname = \n", 2, "aquatint init"),
        ("a.json", '{"run": {"seed": 1,\n"seed": 2}}', 2, "one of the two"),
        ("a.json", '{"run": {\n"seed": 1,}}', 2, "comma"),
        ("a.yaml", "run:\n  seed: 1\n  seed: 2\n", 3, "only once"),
        ("a.yaml", "run:\n\tseed: 1\n", 2, "tabs"),
        ("a.toml", b"[run]\n# gr\xfc\xdfe\n", 2, "UTF-8"),
    ],
)
def test_broken_text_is_refused_with_its_line_and_what_to_do(read, name, text, line, words):
    problem = problem_of(read, name, text)
    assert problem.where.endswith(f", line {line}")
    assert words in problem.hint


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "x"),
        ("a.json", "[1]"),
        ("a.yaml", "- 1"),
        ("a.json", '{"a": NaN}'),
        ("a.json", '{"a": "\\ud800"}'),
        ("a.json", "[" * 100_000),
        ("a.json", '{"a": ' + "[" * 500 + "]" * 500 + "}"),
        ("a.toml", "a = " + "[" * 5_000),
        ("a.toml", "a = " + "[" * 60 + "]" * 60),
        ("a.yaml", "a: " + "[" * 3_000),
        ("a.yaml", "a: " + "[" * 60 + "]" * 60),
        ("a.toml", "a = " + "9" * 5_000),
        ("a.json", '{"a": ' + "9" * 5_000 + "}"),
        ("a.yaml", "a: " + "9" * 5_000),
        ("a.yaml", b"a: \x00"),
        ("a.toml", "#" * (MAX_BYTES + 1)),
        ("a.yaml", "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
                   "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e]\n"),
    ],
)  # fmt: skip
def test_what_no_config_looks_like_is_refused_in_one_sentence(read, name, text):
    assert "\n" not in problem_of(read, name, text).message


def test_yaml_tags_run_no_code(read, tmp_path):
    canary = tmp_path / "canary"
    with contextlib.suppress(ConfigError):
        read("a.yaml", f"a: !!python/object/apply:os.system ['touch {canary}']\n")
    assert not canary.exists()


def test_a_missing_file_is_a_problem_that_names_init(tmp_path):
    with pytest.raises(ConfigError, match="aquatint init"):
        read_source(tmp_path / "run.toml")


def test_a_file_that_cannot_be_read_is_a_storage_error(tmp_path, monkeypatch):
    path = tmp_path / "run.toml"
    path.write_text("")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        read_source(path)
