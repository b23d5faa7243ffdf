"""What the README promises exists: make targets, verbs, presets, exit codes, links and pictures."""

import re
import subprocess
import sys
from pathlib import Path

from aquatint import errors

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_its_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)) <= targets


def test_its_verbs_are_verbs_of_the_program():
    listed = subprocess.run([sys.executable, "-m", "aquatint", "--help"], capture_output=True, text=True, check=True).stdout
    verbs = set(re.findall(r"^  ([a-z]+)  ", listed, re.MULTILINE))
    used = set(re.findall(r"(?:`|bin/)aquatint ([a-z]+)\b", README))
    assert used <= verbs
    assert {"init", "check", "plan", "train", "sample", "export", "doctor", "cache"} <= used


def test_its_presets_exist():
    named = set(re.findall(r"--preset ([a-z0-9-]+)", README))
    assert named <= {path.stem for path in (ROOT / "src/aquatint/config/presets").glob("*.toml")}
    assert named


def test_its_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not target.startswith("http") and not (ROOT / target).exists()] == []


def test_its_exit_codes_are_those_of_the_errors():
    classes = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.AquatintError)]
    written = {int(code) for code in re.findall(r"(?:: |· )(\d+) ", README[README.index("Exit codes") :].replace("\n", " "))}
    assert {one.exit_code for one in classes} <= written
