import pytest

from aquatint.cli.main import run
from aquatint.training import caching


@pytest.fixture
def good(tmp_path, tiny_base):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").touch()
    (pictures / "a.txt").touch()
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\nbase = "{tiny_base}"\n[[data.sources]]\npath = "pictures"\n')
    return path


@pytest.fixture
def calls(monkeypatch):
    """Each verb's work, replaced by a note of what it was given."""
    made = []

    def stand_in(name):
        def work(config, **options):
            made.append((name, config, options))
            return f"what {name} says"

        monkeypatch.setattr(caching, name, work)

    for name in ("build_run", "verify_run", "stat_run", "gc_run"):
        stand_in(name)
    return made


@pytest.mark.parametrize("verb", ["build", "verify", "stat"])
def test_a_verb_gets_the_config_and_prints_what_is_said(good, calls, capsys, verb):
    assert run(["cache", verb, str(good), "cache.batch_size=3"]) == 0
    ((name, config, _),) = calls
    assert (name, config.cache.batch_size) == (f"{verb}_run", 3)
    assert capsys.readouterr().out == f"what {verb}_run says\n"


def test_who_encodes_may_be_chosen_for_this_time(good, calls):
    assert run(["cache", "build", str(good), "--engine", "processes", "--workers", "3"]) == 0
    assert (calls[0][1].cache.engine, calls[0][1].cache.workers) == ("processes", 3)
    assert run(["cache", "build", str(good)]) == 0
    assert (calls[1][1].cache.engine, calls[1][1].cache.workers) == ("local", 1)


@pytest.mark.parametrize("arguments", [["--workers", "3"], ["--engine", "slurm"], ["--workers", "0"]])
def test_workers_that_do_nothing_and_engines_that_are_none_are_refused(good, calls, arguments):
    assert run(["cache", "build", str(good), *arguments]) == 2
    assert calls == []


def test_nothing_is_built_with_a_wrong_config(good, calls, capsys):
    assert run(["cache", "build", str(good), "training.batchsize=2", "model.base=none.safetensors"]) == 2
    assert calls == []
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.parametrize("verb", ["verify", "stat", "gc"])
def test_a_full_disk_keeps_nobody_from_looking_and_clearing(good, calls, monkeypatch, verb):
    from aquatint.training import preflight

    monkeypatch.setattr(preflight, "free_bytes", lambda folder: 0)
    assert run(["cache", "build", str(good)]) == 2
    assert run(["cache", verb, str(good)]) == 0
    assert calls[0][0] == f"{verb}_run"


def test_what_all_configs_use_is_kept_and_nothing_is_removed_unasked(good, calls):
    other = good.with_name("other.toml")
    other.write_text(good.read_text())
    assert run(["cache", "gc", str(good), str(other)]) == 0
    assert run(["cache", "gc", str(good), "--remove"]) == 0
    (_, both, first), (_, one, second) = calls
    assert (len(both), first) == (2, {"remove": False})
    assert (len(one), second) == (1, {"remove": True})
