from pathlib import Path

from aquatint.tracking.tracker import Several, guarded


class Recorder:
    def __init__(self):
        self.calls = []

    def log(self, step, values):
        self.calls.append(("log", step, dict(values)))

    def image(self, step, name, path):
        self.calls.append(("image", step, name, path))

    def close(self):
        self.calls.append(("close",))


class Broken:
    def __init__(self):
        self.calls = 0

    def _fail(self, *_):
        self.calls += 1
        raise OSError("the server\nis on fire")

    log = image = close = _fail


def use(tracker):
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.image(3, "samples", Path("a.png"))
    tracker.close()


def test_several_trackers_all_get_everything_in_order():
    first, second = Recorder(), Recorder()
    use(Several([first, second]))
    assert first.calls == second.calls
    assert [call[0] for call in first.calls] == ["log"] * 3 + ["image", "close"]


def test_a_guarded_tracker_that_works_is_used_unchanged():
    plain, inside, warnings = Recorder(), Recorder(), []
    use(plain)
    use(guarded("Recorder", lambda: inside, warnings.append))
    assert inside.calls == plain.calls
    assert warnings == []


def test_a_tracker_that_raises_on_every_call_is_switched_off_with_one_warning():
    broken, warnings = Broken(), []
    use(guarded("Broken", lambda: broken, warnings.append))
    assert broken.calls == 1
    assert warnings == [
        "warning: Broken is off for the rest of this run: the server is on fire (training goes on; metrics.jsonl has everything)"
    ]


def test_a_tracker_that_cannot_be_opened_is_one_warning_and_nothing_more():
    warnings = []

    def refuse():
        raise RuntimeError("not installed")

    use(guarded("Missing", refuse, warnings.append))
    assert len(warnings) == 1
    assert "not installed" in warnings[0]


def test_an_error_without_words_is_named_by_its_kind():
    warnings = []

    def refuse():
        raise KeyError

    guarded("Silent", refuse, warnings.append)
    assert "KeyError" in warnings[0]


def test_ctrl_c_passes_through_the_guard():
    class Interrupted(Recorder):
        def log(self, step, values):
            raise KeyboardInterrupt

    tracker = guarded("Slow", Interrupted, lambda text: None)
    try:
        tracker.log(0, {})
    except KeyboardInterrupt:
        return
    raise AssertionError("Ctrl-C was swallowed")
