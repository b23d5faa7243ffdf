"""The benchmarks can be run: each says its question, those of a step compare like with like, and those for a GPU go through on a CPU."""

import importlib
import json
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from benchmarks import step_counts, step_parity, step_speed
from benchmarks.gpu import full_tune, lora, operations, optimizers, rig, run, vae_encode
from benchmarks.machine import has
from benchmarks.ours import draw_batches, our_loop, our_parts, our_steps, repeated, tiny_unet
from benchmarks.peers import script, script_loop, strong_loop

from aquatint.demo.model import tiny_spec
from aquatint.models.sdxl.model import build_unet, sdxl_spec

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.rglob("*.py") if '__name__ == "__main__"' in path.read_text())
SECTIONS = {"full_tune": full_tune, "lora": lora, "vae_encode": vae_encode}
NOT_ON_A_BARE_MACHINE = ("pydantic", "ruamel", "typer", "pyarrow", "xxhash", "matplotlib")


@pytest.fixture(scope="module")
def batches():
    return draw_batches(dict(tiny_unet().config), 2, 1, side_latent=8)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_can_be_imported_and_begins_with_its_question_or_what_it_measures(path):
    module = importlib.import_module(".".join(["benchmarks", *path.relative_to(FOLDER).with_suffix("").parts]))
    first = module.__doc__.partition("\n\n")[0]
    assert "?" in first or "`python benchmarks/" in first
    assert callable(getattr(module, "main", None)) or module.main_of is rig.main_of


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_step_of_ours_and_of_the_script_go_down_the_same_gradient(batches, prediction):
    (loss, ours), (other_loss, theirs) = (step_parity.one_step(name, batches[0], prediction) for name in ("ours", "script"))
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert ours.keys() == theirs.keys()
    whole = [torch.cat([part.flatten() for part in side.values()]) for side in (ours, theirs)]
    assert step_parity.distance(*whole) < 1e-5


def test_another_prediction_is_another_gradient(batches):
    """So the comparison can fail."""
    found = [step_parity.one_step("script", batches[0], prediction)[1] for prediction in step_parity.PREDICTIONS]
    one, other = (gradients["conv_in.weight"] for gradients in found)
    assert step_parity.distance(one, other) > 0.1


def test_all_loops_lose_the_same_over_a_few_steps(batches):
    losses = []
    for name in ("ours", "ours, by step", "script", "strong"):
        unet = tiny_unet()
        optimizer = step_parity.adamw(name.partition(",")[0], unet, learning_rate=1e-4)
        if name.startswith("ours"):
            loop = (our_loop if name == "ours" else our_steps)(our_parts(unet, optimizer, learning_rate=1e-4))
        else:
            loop = (script_loop if name == "script" else strong_loop)(script(unet, optimizer))
        losses.append([float(loss) for loss in loop(repeated(batches), 3)])
    assert losses[0][0] != losses[0][2]
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert losses[3] == pytest.approx(losses[0], rel=1e-4)  # channels_last adds up in another order


def counted(action):
    tally = step_counts.Tally(torch.device("meta"))
    with tally, step_counts.Lists(tally):
        action()
    return tally.counts


def test_what_makes_the_host_wait_is_told_from_what_does_not():
    on_device, on_host = torch.ones(3, device="meta"), torch.ones(3)
    assert counted(lambda: (on_device.sum().item(), bool(on_device.sum() > 0)))["scalars read"] == 2
    assert counted(on_device.tolist)["lists read"] == 1
    assert counted(lambda: on_host.to("meta"))["copies that wait"] == 1
    quiet = counted(lambda: (on_host.to("meta", non_blocking=True), on_host.sum().item(), on_host.tolist(), on_device + on_device))
    assert [quiet[name] for name in step_counts.WAITS] == [0, 0, 0]


def test_new_tensors_are_told_from_views():
    x = torch.ones(2, 3, device="meta")
    assert counted(lambda: x.t()) == {"aten calls": 1, "views": 1, "copies that wait": 0, "new tensors": 0, "bytes": 0}
    assert counted(lambda: x.add_(x))["new tensors"] == 0
    assert counted(lambda: x + x) == {"aten calls": 1, "views": 0, "copies that wait": 0, "new tensors": 1, "bytes": 24}
    assert counted(lambda: torch._foreach_add_([x, x], 1.0))["tensors in foreach and fused calls"] == 2


@pytest.fixture
def smallest_unet():
    """Of the fewest layers, and without memory."""
    sizes = {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 1]}
    return build_unet(replace(tiny_spec(), unet={**tiny_spec().unet, **sizes}))


def test_the_script_reads_its_loss_twice_a_step(smallest_unet):
    """The reference that our count is held against."""
    optimizer = torch.optim.AdamW(smallest_unet.parameters(), lr=1e-5, foreach=True)
    loop = script_loop(script(smallest_unet, optimizer, device="meta"))
    found = step_counts.count(loop, smallest_unet, optimizer, 8, steps=1)
    assert [found[name] for name in step_counts.WAITS] == [2, 0, 0]
    assert sum(found["aten calls by phase"].values()) == found["aten calls"]


def test_our_loop_never_makes_the_host_wait(smallest_unet):
    optimizer = step_parity.adamw("ours", smallest_unet, learning_rate=1e-5)
    loop = our_loop(our_parts(smallest_unet, optimizer, device="meta"))
    found = step_counts.count(loop, smallest_unet, optimizer, 8, steps=1)
    assert [found[name] for name in step_counts.WAITS] == [0, 0, 0]
    assert sum(found["aten calls by phase"].values()) == found["aten calls"] > found["views"]


@pytest.mark.long
def test_every_program_takes_its_turn_in_a_process_of_its_own():
    seconds = step_speed.measure(threads=1, batch_size=1, rounds=2, steps=1)
    assert list(seconds) == [name for name in step_speed.LOOPS if "accelerate" not in name or has("accelerate")]
    assert all(len(turns) == 2 and min(turn.processor for turn in turns) > 0 for turns in seconds.values())


def test_ratios_are_made_round_by_round():
    seconds = {"ours": [step_speed.Seconds(1.0, 2.0), step_speed.Seconds(2.0, 2.0)], "script": [step_speed.Seconds(3.0, 2.0)] * 2}
    found = step_speed.report(seconds)
    assert found["times as fast as script"] == {"clock": [1.875, 2.25, 2.625], "processor": [1.0, 1.0, 1.0]}
    assert found["ours"]["steps_per_second"] == pytest.approx(1 / 1.5, abs=1e-3)


# For a GPU


@pytest.mark.parametrize(
    ("group", "row", "contender"),
    [
        ("full_tune", 1, "script"),
        pytest.param("full_tune", 2, "strong", marks=pytest.mark.long),
        pytest.param("full_tune", 3, "ours", marks=pytest.mark.long),
        pytest.param("full_tune", 4, "ours, CUDA graph of the passes", marks=pytest.mark.long),
        ("full_tune", 5, "ours, CUDA graph of the step"),
        ("lora", 7, "ours"),
        pytest.param("full_tune", 2, "ours, all", marks=pytest.mark.slow),
        pytest.param("lora", 7, "ours, kernels", marks=pytest.mark.long),
        pytest.param("vae_encode", 11, "diffusers in bfloat16", marks=pytest.mark.long),
        ("vae_encode", 11, "ours"),
    ],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own tracer looks at it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # and does that
def test_a_row_runs_dry(group, row, contender, capsys):
    module = SECTIONS[group]
    batches = module.pictures if group == "vae_encode" else rig.pool
    found = rig.main_of("", module.ROWS, module.BUILDS, module.flops, batches, ["--row", str(row), "--contender", contender, "--dry"])
    assert found["pictures_per_second"] > 0
    assert found["steps"] == 2
    assert (found["phases_ms"] is None) == ("graph" in contender or group == "vae_encode")
    assert json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT ")) == found


@pytest.mark.parametrize("contender", [*optimizers.CONTENDERS, "factorisations"])
def test_an_optimizer_runs_dry(contender, capsys):
    needed = optimizers.NEEDS.get(contender)
    if needed and not has(needed):
        with pytest.raises(SystemExit, match=f"{needed} is not installed"):
            optimizers.main(["--contender", contender, "--dry"])
    else:
        optimizers.main(["--contender", contender, "--dry"])
        assert capsys.readouterr().out.startswith("RESULT {")


@pytest.mark.parametrize("contender", operations.CONTENDERS)
def test_an_operation_runs_dry(contender, capsys):
    operations.main(["--contender", contender, "--dry"])
    found = json.loads(capsys.readouterr().out.removeprefix("RESULT "))["ms"]
    assert len(found) in (2, 3)
    assert all(0 < low <= middle <= high for low, middle, high in found.values())


@pytest.mark.parametrize("module", SECTIONS.values(), ids=SECTIONS)
def test_every_contender_of_a_row_can_be_built_and_belongs_to_one_call(module):
    named = {(row.number, name) for row in module.ROWS.values() for name in row.contenders}
    assert {name for _, name in named} == module.BUILDS.keys()
    calls = [piece for call in run.CALLS for piece in run.pieces(call) if piece.script == module.__name__.rpartition(".")[2]]
    assert {(int(piece.row.removeprefix("row")), piece.contender) for piece in calls} == named
    assert len(calls) == len(named)


@pytest.mark.slow
def test_the_operations_of_a_picture_are_those_counted_by_hand():
    """At 1024 px: three forward passes of 6.76 TFLOP less what the first layer need not; an adapter saves the frozen weights' gradients."""
    scene = rig.Scene(torch.device("cpu"), sdxl_spec(), is_dry=False)
    counts = [module.flops(module.ROWS[row], scene) / 1e12 for module, row in ((full_tune, 1), (lora, 7), (vae_encode, 11))]
    assert counts == pytest.approx([20.23, 14.62, 4.88], abs=0.01)


def test_a_call_ends_in_time_and_keeps_room_for_its_first_row_again(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    chosen = [run.Piece("full_tune", f"row{number}", "ours") for number in range(6)]
    done, left = [], []
    for piece, seconds in run.in_time(chosen, left, repeats=True):
        assert now[0] + seconds <= run.BUDGET_SECONDS
        done.append(piece)
        now[0] += min(130.0, seconds)
    assert done == [*chosen[:4], chosen[0]]
    assert left == chosen[4:]


def test_what_a_process_says_is_added_to_the_file_of_its_row(tmp_path):
    piece = run.Piece("full_tune", "row1", "ours", "full fine-tune")
    for speed in (10.0, 11.0):
        run.add(piece, {"pictures_per_second": speed}, "ours", "nvidia_h200", tmp_path)
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text())
    assert path.name.startswith("gpu_row1_nvidia_h200_")
    assert [one["pictures_per_second"] for one in result["measured"]["ours"]] == [10.0, 11.0]


def test_a_contender_that_is_not_installed_is_left_out_and_one_that_breaks_has_failed(monkeypatch):
    say = "import sys; sys.exit('torchao is not installed')"
    monkeypatch.setattr(run.Piece, "command", lambda self, dry: [sys.executable, "-c", say])
    assert run.run(run.Piece("lora", "row7", "script"), 20, dry=True) == {"left_out": "torchao is not installed"}
    monkeypatch.setattr(run.Piece, "command", lambda self, dry: [sys.executable, "-c", "raise ValueError('no')"])
    assert run.run(run.Piece("lora", "row7", "script"), 20, dry=True) == {"failed": "ValueError: no"}


@pytest.mark.long
def test_a_whole_call_runs_dry_with_no_more_than_a_bare_machine_has(tmp_path, monkeypatch, capsys):
    """In a process of its own, without aquatint's other dependencies, and without a result."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({NOT_ON_A_BARE_MACHINE!r}))")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{FOLDER.parent / 'src'}:{FOLDER.parent}")
    with pytest.raises(SystemExit) as ended:
        run.main(["ours", "--rows", "8", "--dry", "--results", str(tmp_path / "results")])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    assert said.startswith("row8")
    assert "pictures/s" in said
    assert not (tmp_path / "results").exists()


def test_without_a_gpu_a_call_ends_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU was found"):
        run.main(["vae", "--results", str(tmp_path / "results")])
    assert not (tmp_path / "results").exists()


def test_a_call_imports_no_more_than_a_row_does():
    """So that what holds for a row in a process of its own holds for what starts it."""
    imported = {line for line in (FOLDER / "gpu" / "run.py").read_text().splitlines() if line.startswith(("import", "from"))}
    assert {line for line in imported if "aquatint" in line} == {"from aquatint.storage import write_text"}


def test_a_batch_that_does_not_fit_gives_way_to_a_smaller_one_and_a_mistake_does_not():
    def build(row, scene, batch_size):
        raise RuntimeError("GET was unable to find an engine to execute this computation" if batch_size > 1 else "a mistake")

    row = rig.Row(1, "", 64, (2, 1), ("ours",))
    with pytest.raises(RuntimeError, match="a mistake"):
        rig.fits(row, rig.Scene.of(dry=True), build, rig.pool)


def test_marks_tell_a_step_and_its_phases():
    marks = rig.Marks(torch.device("cpu"))
    moments = {"step": 0.0, "predicted": 1.0, "descends": 3.0, "descended": 6.0}
    marks.made = [*moments.items(), ("step", 10.0)]
    (step,) = marks.steps()
    assert marks.ms(step["step"], step["end"]) == 10_000
    assert rig.phases_of([step], marks) == {"forward": 1000, "backward and clip": 2000, "optimizer": 3000}
    assert rig.phases_of([{"step": 0.0, "end": 1.0}], marks) is None


def test_a_pool_gives_batches_of_the_row_without_end():
    row, scene = full_tune.ROWS[1].dry(), rig.Scene.of(dry=True)
    shapes = [batch.latents.shape for batch in islice(rig.pool(row, scene, 2), 5)]
    assert shapes == [(2, 4, 16, 16)] * 5
