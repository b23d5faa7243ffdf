import json
import os
import random
from pathlib import Path

import pytest

from aquatint.config.describe import all_keys
from aquatint.config.explain import defaults_json
from aquatint.config.load import collect_problems, load_config, read_draft
from aquatint.config.schema import Config, dump
from aquatint.errors import ConfigError

MINIMAL = '[model]\nbase = "base.safetensors"\n[[data.sources]]\npath = "pictures"\n'


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="run.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def only(config_file, text, *overrides):
    """The one problem of a config: message, hint, line (0 if none)."""
    config, problems = collect_problems(config_file(text), overrides)
    assert config is None
    assert len(problems) == 1, "\n".join(map(str, problems))
    line = problems[0].where.rpartition(", line ")[2]
    return problems[0].message, problems[0].hint, int(line) if line.isdecimal() else 0


def test_a_minimal_config_loads_with_defaults(config_file):
    config = load_config(config_file(MINIMAL))
    assert config.optimizer.name == "adamw"
    assert config.training.batch_size == 1


def test_paths_in_the_file_start_at_the_file(config_file, tmp_path, monkeypatch):
    path = config_file(MINIMAL + '[cache]\nfolder = "../shared/cache"\n')
    monkeypatch.chdir(tmp_path.parent)
    config = load_config(Path(tmp_path.name) / path.name)
    assert config.model.base == tmp_path / "base.safetensors"
    assert config.data.sources[0].path == str(tmp_path / "pictures")
    assert config.run.folder == tmp_path / "runs"
    assert config.cache.folder == tmp_path.parent / "shared" / "cache"


def test_a_tilde_is_the_home_folder(config_file, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert load_config(config_file(MINIMAL), ["model.vae=~/vae"]).model.vae == tmp_path / "me" / "vae"
    assert load_config(config_file(MINIMAL + '[run]\nfolder = "~/runs"')).run.folder == tmp_path / "me" / "runs"


def test_a_dumped_config_loads_as_the_same(config_file):
    config = load_config(config_file(MINIMAL), ['optimizer={name="adafactor"}', "validation.every=never", "training.precision=bf16_pure"])
    assert load_config(config_file(json.dumps(dump(config)), "config.json")) == config


def test_toml_json_and_yaml_give_the_same_config(config_file):
    values = {
        "model": {"base": "b"},
        "data": {"sources": [{"path": "p", "repeats": 2}]},
        "samples": {"prompts": ["a: b", "no"], "every": "never"},
    }
    toml = 'model.base = "b"\n[[data.sources]]\npath = "p"\nrepeats = 2\n[samples]\nprompts = ["a: b", "no"]\nevery = "never"\n'
    yaml = 'model: {base: b}\ndata:\n  sources:\n    - path: p\n      repeats: 2\nsamples:\n  prompts: ["a: b", no]\n  every: never\n'
    configs = [load_config(config_file(text, name)) for text, name in ((toml, "a.toml"), (json.dumps(values), "a.json"), (yaml, "a.yaml"))]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].samples.every is None


def test_an_optimizer_without_a_name_is_adamw(config_file):
    config = load_config(config_file(MINIMAL + "[optimizer]\nlearning_rate = 2e-6\n"))
    assert (config.optimizer.name, config.optimizer.learning_rate) == ("adamw", 2e-6)


# one mistake each


@pytest.mark.parametrize(
    ("text", "message", "hint", "line"),
    [
        ("[optimizer]\nweigth_decay = 0.1\n", "unknown setting `optimizer.weigth_decay`", "`optimizer.weight_decay`? (default 0.01)", 6),
        ("[trainig]\nbatch_size = 2\n", "unknown section `trainig`", "`training`", 5),
        ("[training]\nlearning_rate = 1e-5\n", "unknown setting", "It stands under `[optimizer]`", 6),
        ("[data.extra]\nx = 1\n", "unknown section `data.extra`", "config explain data", 5),
        ('"run.name" = "x"\n', "", "", 0),
        ("[training]\nbatch_size = 0\n", "wrong value 0 for `training.batch_size`", "a whole number, at least 1 (default 1)", 6),
        ('[training]\nbatch_size = "4"\n', 'wrong value "4"', "without quotes: 4", 6),
        ("[training]\nbatch_size = true\n", "wrong value true", "a whole number", 6),
        ("[training]\nbatch_size = 2.0\n", "wrong value 2.0", "a whole number", 6),
        ("[ema]\nenabled = 1\n", "wrong value 1", "true or false", 6),
        ('[ema]\nenabled = "yes"\n', 'wrong value "yes"', "true or false", 6),
        ("[ema]\ndecay = nan\n", "wrong value NaN", "at least 0 and less than 1", 6),
        ("[training]\nlength = 1000\n", "wrong value 1000", 'write "1000 steps" or "1000 epochs"', 6),
        ('[training]\nlength = "1000"\n', 'wrong value "1000"', '"1000 steps"', 6),
        ('[captions]\nstyle = "tag"\n', 'wrong value "tag"', 'did you mean "tags"?', 6),
        ('[optimizer]\nname = "adafactor"\nkernel = "compiled"\n', 'wrong value "compiled"', 'write "auto" or "none" (default "auto")', 7),
        ('[training]\ndevice = "gpu"\n', 'wrong value "gpu"', 'did you mean "cuda"?', 6),
        ("[samples]\nheight = 1000\n", "wrong value 1000", "such as 992 or 1024", 6),
        ('[samples]\nprompts = "a cat"\n', 'wrong value "a cat"', '["…", "…"]', 6),
        ('[samples]\nprompts = ["a cat", 5]\n', "wrong value 5 for `samples.prompts.1`", "texts", 6),
        ("[optimizer]\nbetas = [0.9]\n", "wrong value [0.9]", "a list of 2 values", 6),
        ("[optimizer]\nbetas = [0.9, 1.0]\n", "wrong value 1.0 for `optimizer.betas.1`", "less than 1", 6),
        ('[optimizer]\nname = "adam"\n', 'wrong value "adam"', 'did you mean "adamw"?', 6),
        ('[optimizer]\nname = "adafactor"\neps = 1e-8\n', "`optimizer.eps` is no setting", '"adamw" and "adamw_bf16"', 7),
        ('[run]\nname = "my run"\n', 'wrong value "my run"', "letters, digits", 6),
        ('[data]\nalpha_color = "white"\n', 'wrong value "white"', '"#ffffff"', 6),
        ("ema = 5\n", "", "", 0),
    ],
)
def test_each_mistake_is_one_plain_message_with_its_line_and_what_to_write(config_file, text, message, hint, line):
    top_level = not text.startswith("[")
    found = only(config_file, text + MINIMAL if top_level else MINIMAL + text)
    assert message in found[0]
    assert hint in found[1]
    assert found[2] == (1 if top_level else line)


def test_required_settings_that_are_missing_are_named_with_an_example(config_file):
    _, problems = collect_problems(config_file("[run]\nseed = 1\n"))
    assert [problem.message for problem in problems] == ["missing setting `data.sources`", "missing setting `model.base`"]
    assert "`[[data.sources]]`" in problems[0].hint
    assert "under `[model]`" in problems[1].hint
    assert only(config_file, MINIMAL + "[[data.sources]]\nrepeats = 2\n")[0] == "missing setting `data.sources.1.path`"


@pytest.mark.parametrize("text", ['[data.sources]\nfolder = "x"\n', '[data]\nsources = ["x"]\n', "[data]\nsources = []\n"])
def test_sources_in_another_form_are_told_how_to_be_written(config_file, text):
    message, hint, _ = only(config_file, '[model]\nbase = "b"\n' + text)
    assert "`data.sources" in message
    assert "`[[data.sources]]`" in hint


def test_groups_are_told_how_to_be_written(config_file):
    groups = "[[training.groups]]\nlearning_rate_factor = 0.5\n"
    message, hint, _ = only(config_file, MINIMAL + groups)
    assert message == "missing setting `training.groups.0.match`"
    assert 'add `match = ["down_blocks.0"]` under `[[training.groups]]`' in hint
    assert "`[[training.groups]]` line (two brackets)" in only(config_file, MINIMAL + '[training]\ngroups = ["mid_block"]\n')[1]
    message, hint, line = only(config_file, MINIMAL + '[[training.groups]]\nmatch = ["mid_block"]\nlearning_rate = 0.1\n')
    assert message == "unknown setting `training.groups.0.learning_rate`"
    assert line == 7
    (group,) = load_config(config_file(MINIMAL + groups + 'match = ["mid_block"]\n')).training.groups
    assert (group.match, group.learning_rate_factor, group.weight_decay) == (("mid_block",), 0.5, None)


def test_a_misspelt_required_key_is_not_missing_too(config_file):
    message, hint, line = only(config_file, '[model]\nbsae = "b"\n[[data.sources]]\npath = "p"\n')
    assert (message, line) == ("unknown setting `model.bsae`", 2)
    assert "`model.base`" in hint


def test_inside_a_misspelt_section_the_rest_is_still_checked(config_file):
    _, problems = collect_problems(config_file(MINIMAL + "[trainig]\nbatch_size = 0\naccumulation_stps = 2\n"))
    assert [problem.message for problem in problems] == [
        "unknown section `trainig`", "wrong value 0 for `training.batch_size`", "unknown setting `training.accumulation_stps`"
    ]  # fmt: skip
    assert [problem.where[-7:] for problem in problems] == [", line 5"[-7:], ", line 6"[-7:], ", line 7"[-7:]]


def test_a_wrong_optimizer_name_does_not_hide_wrong_settings(config_file):
    _, problems = collect_problems(config_file(MINIMAL + '[optimizer]\nname = "adafacto"\nclip_threshold = -1\n'))
    assert len(problems) == 2


def test_rules_across_settings_are_checked_although_other_settings_are_wrong(config_file):
    _, problems = collect_problems(config_file(MINIMAL + "[captions]\nshuffle = true\n[training]\nbatch_size = -1\n"))
    assert len(problems) == 2
    assert "`captions.shuffle` does nothing" in problems[0].message


def test_rules_keep_quiet_about_settings_that_are_wrong_themselves(config_file):
    assert "captions.style" in only(config_file, MINIMAL + '[captions]\nshuffle = true\nstyle = "tagz"\n')[0]


def test_problems_are_reported_from_top_to_bottom_and_all_together(config_file):
    text = '[lr]\nwarmup = "1 h"\n[run]\nseed = -1\n' + MINIMAL + '[training]\nlength = "2 h"\nx_y_z = 1\n'
    with pytest.raises(ConfigError) as caught:
        load_config(config_file(text), ["ema.decay=5"])
    places = [problem.where.rpartition(", ")[2] for problem in caught.value.problems]
    assert places == ["line 2", "line 4", "line 10", "line 11", "the command line"]
    assert str(caught.value).count("error: ") == str(caught.value).count("hint: ") == 5


# overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.batch_size=4", 4),
        ("optimizer.learning_rate=1e-6", 1e-6),
        ("ema.enabled=false", False),
        ("training.length=2 epochs", "2 epochs"),
        ('training.length="2 epochs"', "2 epochs"),
        ("run.name=5", "5"),
        ("run.name=2024-01-01", "2024-01-01"),
        ("samples.negative_prompt=", ""),
        ("samples.negative_prompt=null", None),
        ("samples.negative_prompt=[a, b", "[a, b"),
        ("model.zero_terminal_snr=auto", "auto"),
        ("model.zero_terminal_snr=true", True),
        ('samples.prompts=["a", "b"]', ["a", "b"]),
        ("optimizer.betas=[0.9, 0.99]", [0.9, 0.99]),
        ("data.sources.0.repeats=3", 3),
        (" training.batch_size =4", 4),
    ],
)
def test_overrides_are_toml_where_they_are_toml_and_plain_text_else(config_file, override, value):
    config = dump(load_config(config_file(MINIMAL), [override, "model.prediction=v_prediction"]))
    for part in override.partition("=")[0].strip().split("."):
        config = config[int(part) if part.isdecimal() else part]
    assert config == value


def test_paths_on_the_command_line_start_where_the_user_is(config_file, tmp_path, monkeypatch):
    here = tmp_path / "elsewhere"
    here.mkdir()
    path = config_file(MINIMAL)
    monkeypatch.chdir(here)
    config = load_config(path, ["data.sources.0.path=../pics", "data.sources.1.path=more"])
    assert [source.path for source in config.data.sources] == [str(tmp_path / "pics"), str(here / "more")]


def test_entries_of_lists_can_be_set_and_added(config_file):
    config = load_config(config_file(MINIMAL + '[samples]\nprompts = ["a"]\n'), ["samples.prompts.0=b", "samples.prompts.1=c, d"])
    assert config.samples.prompts == ("b", "c, d")


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("training.batchsize=2", "unknown setting `training.batchsize`", "`training.batch_size`"),
        ("batch_size=2", "unknown setting `batch_size`", "`training.batch_size`"),
        ("training.batch_size", "is not a setting", "section.setting=value"),
        ("=3", "is not a setting", "section.setting=value"),
        ("training.batch_size=many", 'wrong value "many"', "a whole number"),
        ("samples.prompts=[a", "cannot read the value", "single quotes"),
        ("data.sources.4.repeats=2", "has 1 entries", "index"),
        ("run.name=" + os.fsdecode(b"\xff"), "not UTF-8", "plain letters"),
        ("run.name.x=2", "unknown setting `run.name.x`", "`run.name`"),
    ],
)
def test_mistakes_in_overrides_are_explained_like_those_in_files(config_file, override, message, hint):
    config, problems = collect_problems(config_file(MINIMAL), [override])
    assert config is None
    (problem,) = problems
    assert message in problem.message
    assert hint in problem.hint
    assert problem.where == "the command line"


def test_an_override_replaces_a_wrong_value_of_the_file(config_file):
    assert load_config(config_file(MINIMAL + "[training]\nbatch_size = -3\n"), ["training.batch_size=2"]).training.batch_size == 2


def test_places_tell_file_and_command_line_apart(config_file):
    draft = read_draft(config_file(MINIMAL + "[ema]\ndecay = 0.5\n"), ["ema={decay=0.7}", "run.seed=1"])
    assert draft.place("ema.decay") == draft.place("run.seed") == "the command line"
    assert draft.place("model.base").endswith("run.toml, line 2")
    assert draft.config.ema.decay == 0.7


JUNK = (None, True, 0, -1, 3.5, "", "x", "500 steps", [], ["a"], {}, {"a": 1}, [{}], [[]], 10**30, [{"path": 5}], {"name": []})


def spoil(values, rng):
    """Changes, removes or renames something anywhere in nested tables and lists."""
    parents = [values]
    for parent in parents:
        parents.extend(
            child for child in (parent.values() if isinstance(parent, dict) else parent) if isinstance(child, dict | list) and child
        )
    parent = rng.choice(parents)
    key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    if isinstance(parent, dict) and rng.random() < 0.5:
        value = parent.pop(key)
        if rng.random() < 0.7:
            parent[key + rng.choice(["x", "_s", ".y"])] = value
    else:
        parent[key] = json.loads(json.dumps(rng.choice(JUNK)))


def test_no_config_however_wrong_ends_in_a_traceback(config_file):
    rng = random.Random(0)
    for _ in range(150):
        values = json.loads(defaults_json())
        values["model"]["base"], values["data"]["sources"] = "b", [{"path": "p"}]
        for _ in range(rng.randrange(1, 6)):
            spoil(values, rng)
        override = rng.choice(all_keys()).replace("*", str(rng.randrange(3))) + rng.choice(
            ["=1", "=x", "=[1", "=null", '=["a"]', "={a=1}", "=true"]
        )
        config, problems = collect_problems(config_file(json.dumps(values), "a.json"), [override])
        assert (config is None) == bool(problems)
        assert all(problem.message and problem.hint and "\n" not in problem.message for problem in problems)
        assert config is None or Config.model_validate(dump(config)) == config
