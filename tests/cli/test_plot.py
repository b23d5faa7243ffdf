from pathlib import Path

from aquatint.cli.main import run
from aquatint.training import plotting
from aquatint.training.plotting import Drawn


def test_each_file_is_named_with_what_to_see_in_it(tmp_path, capsys, tiny_base):
    path = tmp_path / "run.toml"
    path.write_text(f'[model]\nbase = "{tiny_base}"\n[[data.sources]]\npath = "pictures"\n')
    output = tmp_path / "drawn"
    assert run(["plot", str(path), "training.length=20 steps", "noise.offset=0.05", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["schedule", "weights", "timesteps", "noise", "sampling", "learning_rate"]
    assert lines[::2] == [f"wrote {output / name}.png" for name in names]
    assert all(line.startswith("  ") for line in lines[1::2])
    assert sorted(path.stem for path in output.iterdir()) == sorted(names)


def test_plots_go_to_a_folder_here_and_what_is_left_out_is_told(tmp_path, capsys, monkeypatch):
    path, made = tmp_path / "run.toml", []
    path.write_text('[model]\nbase = "none.safetensors"\n[[data.sources]]\npath = "pictures"\n')
    monkeypatch.setattr(plotting, "plot_run", lambda config, folder: made.append(folder) or [Drawn(None, "left out, because")])
    assert run(["plot", str(path)]) == 0
    assert made == [Path("plots")]
    assert capsys.readouterr().out == "left out, because\n"


def test_a_base_that_is_not_there_is_told(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text('[model]\nbase = "none.safetensors"\n[[data.sources]]\npath = "pictures"\n')
    assert run(["plot", str(path), "--output", str(tmp_path / "plots")]) == 2
    error = capsys.readouterr().err
    assert "none.safetensors" in error
    assert "hint: " in error
