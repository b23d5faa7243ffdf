import random
import string

import pytest

from aquatint.config.describe import OTHER_NAMES, all_keys, kind_of, optimizer_names, optimizers_with, suggest, table
from aquatint.config.schema import Config, json_schema


def misspell(text, edits, rng):
    """`text` with that many letters swapped, dropped, doubled up or replaced."""
    for _ in range(edits):
        i = rng.randrange(len(text))
        letter = rng.choice(string.ascii_lowercase + "_")
        text = rng.choice([text[:i] + text[i + 1 :], text[:i] + letter + text[i:], text[:i] + letter + text[i + 1 :],
                           text[:i] + text[i + 1 : i + 2] + text[i] + text[i + 2 :]]) or letter  # fmt: skip
    return text


@pytest.mark.parametrize(("edits", "least"), [(1, 0.99), (2, 0.95)])
def test_the_right_name_is_among_the_first_two_for_nearly_every_typo(edits, least):
    rng = random.Random(edits)
    hits = []
    for key in all_keys():
        section, dot, name = key.rpartition(".")
        for _ in range(2):
            typo = f"{section}{dot}{misspell(name, edits, rng)}"
            if typo not in all_keys():
                hits.append(key in suggest(typo, all_keys())[:2])
    assert sum(hits) / len(hits) >= least


@pytest.mark.parametrize("edits", [1, 2])
def test_typos_anywhere_in_the_whole_key_are_understood(edits):
    rng = random.Random(10 + edits)
    keys = [key for key in all_keys() if "." in key]
    typos = {misspell(key, edits, rng): key for key in keys}
    hits = [key in suggest(typo, all_keys())[:2] for typo, key in typos.items() if typo not in all_keys()]
    assert sum(hits) / len(hits) >= 0.95


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("training.learning_rate", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("run.batch-size", "training.batch_size"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("max_train_epochs", "training.length"),
        ("data.sources.3.repeat", "data.sources.*.repeats"),
        ("wandb.project", "tracking.wandb.project"),
        ("vae_trainig.lenght", "vae_training.length"),
    ],
)
def test_a_name_from_elsewhere_leads_to_the_setting(written, meant):
    assert meant in suggest(written, all_keys())[:2]


def test_nonsense_suggests_nothing():
    assert suggest("zzzzqqqq.xxxx", all_keys()) == []


def test_what_other_trainers_call_a_setting_is_a_setting_here():
    assert set(OTHER_NAMES.values()) <= set(all_keys())
    assert set(OTHER_NAMES) & {key.rpartition(".")[2] for key in all_keys()} == {"ema_decay", "lr", "steps"}, (
        "names that lead elsewhere at the top level"
    )


def test_every_setting_and_section_has_help_and_a_kind():
    for name in optimizer_names():
        settings, sections = table(name).settings, table(name).sections
        assert all(setting.doc.strip() and setting.kind for setting in settings.values())
        assert all(doc.strip() for doc in sections.values())


def test_the_table_holds_every_field_of_the_schema():
    assert set(table().sections) >= set(Config.model_fields)
    assert optimizers_with("optimizer.clip_threshold") == ("adafactor", "came", "torch_adafactor")
    assert optimizers_with("optimizer.weight_decay") == optimizer_names()


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1}, "a whole number, at least 1"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "a number from 0 to 1"),
        ({"type": "number", "exclusiveMinimum": 0}, "a number, more than 0"),
        ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, "a number, at least 0 and less than 1"),
        ({"type": "integer", "minimum": 32, "multipleOf": 32}, "a whole number, a multiple of 32, at least 32"),
        ({"enum": ["a", "b", "c"]}, '"a", "b" or "c"'),
        ({"anyOf": [{"type": "string", "format": "path"}, {"type": "null"}]}, "a path"),
        ({"anyOf": [{"const": "auto"}, {"type": "boolean"}]}, '"auto" or true or false'),
    ],
)
def test_kinds_are_said_in_words(schema, words):
    assert kind_of(schema) == words


def test_defaults_in_the_json_schema_are_written_as_in_a_config():
    definitions = json_schema()["$defs"]
    assert definitions["TrainingSection"]["properties"]["length"]["default"] == "1000 steps"
    assert definitions["ValidationSection"]["properties"]["every"]["default"] == "500 steps"
