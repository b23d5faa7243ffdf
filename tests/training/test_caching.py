import os
import shutil

import pytest

from aquatint.data.places import Identity
from aquatint.data.sources import folder as folder_source
from aquatint.errors import LockedError, UsageError
from aquatint.storage import shared_lock
from aquatint.training.caching import build_run, cache_run, gc_run, size_text, stat_run, verify_run
from aquatint.training.prepare import Stores
from tests import zoo
from tests.runs import small_config

COUNT = 6


@pytest.fixture(scope="module")
def original(tmp_path_factory, tiny_base):
    """A folder with pictures, of which two have masks, and their cache."""
    place = tmp_path_factory.mktemp("caching")
    (place / "pictures").mkdir()
    for index in range(COUNT):
        path = place / "pictures" / f"{index}.png"
        path.write_bytes(zoo.encoded(zoo.textured((96, 96), seed=index), "PNG"))
        path.with_suffix(".txt").write_text(f"number {index}")
        if index < 2:
            path.with_name(f"{index}-masklabel.png").write_bytes(zoo.encoded(zoo.textured((96, 96), seed=50 + index), "PNG"))
    cache_run(config_in(place, tiny_base))
    return place


def config_in(place, base, **sections):
    sections = {"validation": {"every": None}, "cache": {"folder": str(place / "cache"), "shard_entries": 2}, **sections}
    sections["data"] = {"sources": [{"path": str(place / "pictures"), "masks": "files"}], **sections.get("data", {})}
    return small_config(place, base, **sections)


@pytest.fixture
def place(original, tmp_path):
    shutil.copytree(original, tmp_path / "set", copy_function=shutil.copy2)
    return tmp_path / "set"


@pytest.fixture
def config(place, tiny_base):
    return lambda **sections: config_in(place, tiny_base, **sections)


def shards(place, store):
    return sorted((place / "cache" / store).glob("????????????????????????????????.safetensors"))


def remove(place, index):
    for path in (place / "pictures").glob(f"{index}*"):
        path.unlink()


def sizes(config):
    return {name: len(store) for name, store in Stores.of(config.cache.folder).all().items()}


def test_a_build_tells_what_is_there(config):
    lines = build_run(config()).splitlines()
    assert lines[0] == "6 pictures are ready"
    assert lines[1].startswith("latents     6 entries in 3 files, ")
    assert lines[2].startswith("            6 of ")
    assert any(line.startswith("texts       7 entries in 4 files") for line in lines)
    assert any(line.startswith("masks       2 entries in 1 file, ") for line in lines)


def test_a_count_tells_how_much_of_it_the_config_uses(config, place):
    assert stat_run(config()).count("uses 6, and 6 of these are there") == 1
    (place / "pictures" / "new.png").write_bytes(zoo.encoded(zoo.textured((96, 96), seed=99), "PNG"))
    (place / "pictures" / "new.txt").write_text("new")
    remove(place, 5)
    text = stat_run(config(captions={"dropout_prob": 0.3}))
    assert "latents     6 entries in 3 files" in text
    assert "this config uses 6, and 5 of these are there" in text
    assert "this config uses 7, and 6 of these are there" in text, "texts, with the empty one"
    assert "this config uses 2, and 2 of these are there" in text
    assert sizes(config()) == {"latents": 6, "texts": 7, "masks": 2}, "nothing is encoded"


def test_copies_of_a_picture_are_one_entry(config, place):
    for ending in (".png", ".txt"):
        shutil.copy(place / "pictures" / f"4{ending}", place / "pictures" / f"copy{ending}")
    assert "this config uses 6, and 6 of these are there" in stat_run(config())


def test_a_store_that_nobody_uses_is_not_counted(config, place):
    shutil.rmtree(place / "cache" / "masks")
    assert "masks" not in stat_run(config(data={"sources": [{"path": str(place / "pictures")}]}))


def test_a_cache_that_is_not_there_yet_is_empty(config, place):
    nowhere = config(cache={"folder": str(place / "cache2")})
    lines = stat_run(nowhere).splitlines()
    assert lines[:2] == ["latents     0 entries in 0 files, 0.0 KiB", "            this config uses 6, and 0 of these are there"]
    assert verify_run(nowhere).splitlines() == ["pictures    6 read again, 0 changed without a trace in their file's size and dates"]


def test_what_is_sound_is_left_alone(config):
    lines = verify_run(config()).splitlines()
    assert lines == [
        "latents     6 entries in 3 files, 0 damaged",
        "texts       7 entries in 4 files, 0 damaged",
        "masks       2 entries in 1 file, 0 damaged",
        "pictures    6 read again, 0 changed without a trace in their file's size and dates",
    ]
    assert sizes(config()) == {"latents": 6, "texts": 7, "masks": 2}


def test_what_is_damaged_is_removed_and_made_again_by_the_next_build(config, place, capsys):
    shard = shards(place, "latents")[1]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    lines = verify_run(config()).splitlines()
    assert lines[0] == "latents     6 entries in 3 files, 2 damaged"
    assert lines[1].startswith(f"            removed {shard.name}: ")
    assert sizes(config())["latents"] == 4
    capsys.readouterr()
    build_run(config())
    assert "pictures    2 to encode: 2 no longer in the cache" in capsys.readouterr().err
    assert verify_run(config()).count(", 0 damaged") == 3


def test_a_picture_whose_bytes_changed_without_a_trace_is_found(config, place, monkeypatch, capsys):
    """A file system that keeps neither change times nor file numbers, and a tool that sets the other times back."""
    monkeypatch.setattr(folder_source, "identity_of", lambda status: Identity(status.st_size, status.st_mtime_ns, 0, 0))
    build_run(config())
    path = place / "pictures" / "3.png"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    capsys.readouterr()
    build_run(config())
    assert "to encode" not in capsys.readouterr().err, "nobody can see it from outside"
    lines = verify_run(config()).splitlines()
    assert "pictures    6 read again, 1 changed without a trace in their file's size and dates" in lines
    assert lines[-1] == "            pictures/3.png: is encoded anew by the next build"


def test_two_sources_with_files_of_the_same_name_are_not_mixed_up(config, place):
    other = place / "other" / "pictures"
    other.mkdir(parents=True)
    (other / "3.png").write_bytes(zoo.encoded(zoo.textured((96, 96), seed=33), "PNG"))
    (other / "3.txt").write_text("another")
    sources = [{"path": str(place / "pictures")}, {"path": str(other)}]
    assert "7 read again, 0 changed" in verify_run(config(data={"sources": sources}))


# Clearing


def test_what_nobody_uses_is_told_and_then_removed(config, place):
    for index in (1, 2, 3, 4):
        remove(place, index)
    before = {store: shards(place, store) for store in ("latents", "texts", "masks")}
    lines = gc_run([config()], remove=False).splitlines()
    assert lines[0].startswith("latents     ")
    assert " of 6 entries would be removed, " in lines[0]
    assert lines[-1] == "nothing was removed; `--remove` does it"
    assert {store: shards(place, store) for store in before} == before
    told = int(lines[0].split()[1])
    assert told >= 1
    lines = gc_run([config()], remove=True).splitlines()
    assert lines[0].startswith(f"latents     {told} of 6 entries removed, ")
    assert sizes(config())["latents"] == 6 - told
    assert "this config uses 2, and 2 of these are there" in stat_run(config()), "nothing that is used is lost"


def test_what_any_of_the_configs_uses_stays(config, place):
    everything, few = config(), config(data={"sources": [{"path": str(place / "few"), "masks": "files"}]})
    shutil.copytree(place / "pictures", place / "few", copy_function=shutil.copy2)
    for path in (place / "few").glob("[1-4]*"):
        path.unlink()
    before = sizes(everything)
    assert gc_run([few, everything], remove=True).splitlines()[-1].startswith("masks       0 of 2 entries removed")
    assert sizes(everything) == before
    gc_run([few], remove=True)
    assert sizes(everything)["latents"] < before["latents"]


def test_a_store_may_be_cleared_of_everything(config):
    gc_run([config(data={"sources": [{"path": str(config().data.sources[0].path)}]})], remove=True)
    assert sizes(config())["masks"] == 0


def test_where_all_is_used_there_is_nothing_to_remove(config):
    assert gc_run([config()], remove=False).splitlines()[-1] == "there is nothing to remove"


def test_what_is_not_worth_packing_anew_is_told_too(config, place):
    """One picture of six: its file is used by half."""
    remove(place, 5)
    lines = gc_run([config()], remove=False).splitlines()
    assert (
        lines[0]
        == "latents     0 of 6 entries would be removed, 0.0 KiB; 1 more that nobody uses stay, in files that are used for the most part"
    )


def test_nothing_is_removed_while_a_run_uses_the_cache(config, place):
    remove(place, 0)
    remove(place, 3)
    before = sizes(config())
    with shared_lock(config().cache.folder):
        assert "would be removed" in gc_run([config()], remove=False)
        with pytest.raises(LockedError):
            gc_run([config()], remove=True)
    assert sizes(config()) == before


def test_configs_of_several_caches_are_refused(config, place):
    with pytest.raises(UsageError, match="2 different caches"):
        gc_run([config(), config(cache={"folder": str(place / "cache2")})], remove=True)


def test_sizes_are_said_in_the_unit_that_fits():
    assert [size_text(size) for size in (0, 4000, 200 << 10, 3 << 30)] == ["0.0 KiB", "3.9 KiB", "0.2 MiB", "3.0 GiB"]
