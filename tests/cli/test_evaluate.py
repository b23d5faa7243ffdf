import json
from pathlib import Path

import pytest

from aquatint.cli.main import run
from aquatint.config.schema import dump
from aquatint.training import evaluation
from tests.runs import small_config

REPORT = {
    "checkpoint": "step-000100", "pictures": 1234, "source": "held_out", "scores": {"clip_score": 31.25, "fid": 18.5},
    "remarks": ["of few"], "left_out": {"a.png": "is empty"},
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    made = []

    def evaluate_run(config, name, *, keep_pictures):
        made.append((config, name, keep_pictures))
        return evaluation.Evaluation(Path("runs/x.json"), REPORT)

    monkeypatch.setattr(evaluation, "evaluate_run", evaluate_run)
    return made


def test_evaluate_takes_settings_a_checkpoint_and_whether_to_keep(calls, tmp_path, tiny_base, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(dump(small_config(tmp_path, tiny_base))))
    assert run(["evaluate", str(path), "evaluation.pictures=7", "--checkpoint", "step-000100", "--keep-pictures"]) == 0
    assert run(["evaluate", str(path)]) == 0
    (config, *rest), (_, *defaults) = calls
    assert (config.evaluation.pictures, *rest) == (7, "step-000100", True)
    assert defaults == [None, False]
    assert capsys.readouterr().out.startswith(
        "step-000100: 1,234 held-out pictures, and as many made of their captions\n"
        "CLIP score               31.2500  higher is better\n"
        "FID                      18.5000  lower is better\n"
        "note: of few\nleft out: a.png: is empty\nwrote runs/x.json\n"
    )
