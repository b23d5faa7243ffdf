import io
import re

import pytest
from rich.console import Console

from aquatint.utils.progress import Progress, format_seconds, say, track


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def plain(total, start=0, **settings):
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=False, width=200)
    return Progress(total, start, console=console, clock=clock, **settings), file, clock


def advance(progress, clock, steps, *, seconds=1.0, loss=0.1, data_wait=0.0):
    for step in steps:
        clock.now += seconds
        progress.update(step, loss=loss, learning_rate=1e-5, images_per_second=4 / seconds, data_wait=data_wait)


def test_off_a_terminal_there_is_one_line_every_so_often_and_one_at_the_end():
    progress, file, clock = plain(100, plain_seconds=30)
    with progress:
        advance(progress, clock, range(1, 101))
    lines = file.getvalue().splitlines()
    assert [re.match(r"step (\d+)/100", line)[1] for line in lines] == ["1", "31", "61", "91", "100"]
    assert "\x1b" not in file.getvalue()


def test_a_line_says_step_loss_rate_speed_wait_and_time_left():
    progress, _, clock = plain(1200)
    advance(progress, clock, range(1, 11), seconds=2.0, loss=0.125, data_wait=0.25)
    assert progress.line() == "step 10/1,200 (0%) · loss 0.1250 · learning rate 1e-05 · 2 images/s · data wait 25% · 40 min left"


def test_the_time_left_of_a_resumed_run_is_by_the_speed_of_this_process():
    progress, _, clock = plain(1000, 900)
    advance(progress, clock, range(901, 911), seconds=6.0)
    assert progress.line().endswith("9 min left")


def test_the_time_left_follows_a_change_of_speed():
    progress, _, clock = plain(10_000)
    advance(progress, clock, range(1, 1001), seconds=1.0)
    advance(progress, clock, range(1001, 2001), seconds=3.0)
    assert progress.line().endswith("6 h 40 min left")


def test_one_hundred_percent_is_only_shown_at_the_end():
    progress, _, clock = plain(1000)
    advance(progress, clock, [999])
    assert "(99%)" in progress.line()
    advance(progress, clock, [1000])
    assert "1,000/1,000 (100%)" in progress.line()
    assert "left" not in progress.line()


def test_a_loss_that_is_not_finite_does_not_spoil_the_mean():
    progress, _, clock = plain(10)
    advance(progress, clock, [1], loss=0.5)
    advance(progress, clock, [2], loss=float("nan"))
    assert "loss 0.5000" in progress.line()
    lonely, _, clock = plain(10)
    advance(lonely, clock, [1], loss=float("inf"))
    assert "loss nan" in lonely.line()


def test_a_run_without_steps_can_be_shown():
    progress, _, _ = plain(0)
    assert progress.line() == "step 0/0 (100%)"


def test_notes_come_out_as_they_are_written():
    progress, file, _ = plain(10)
    with progress:
        progress.note("warning: [bold]a.png[/bold] has 1024x1024 pixels")
    assert file.getvalue() == "warning: [bold]a.png[/bold] has 1024x1024 pixels\n"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_on_a_terminal_the_bar_is_live_and_notes_stay_above_it(width):
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=True, width=width, color_system=None, legacy_windows=False, _environ={})
    with Progress(1000, 500, console=console, clock=clock) as progress:
        advance(progress, clock, range(501, 511))
        progress.note("saved step 510")
        advance(progress, clock, range(511, 521))
    text = file.getvalue()
    assert text.index("saved step 510") < text.rindex("520/1,000 (52%)")
    assert "━" in text
    rows = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", row) for row in re.split(r"[\r\n]", text)]
    assert max(len(row) for row in rows) <= width


def test_a_dumb_terminal_gets_plain_lines():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, _environ={"TERM": "dumb"}, width=200)
    clock = Clock()
    with Progress(10, console=console, clock=clock) as progress:
        advance(progress, clock, [1])
    assert file.getvalue().startswith("step 1/10 (10%)")


def test_the_screen_is_given_back_when_the_run_fails():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, legacy_windows=False, _environ={})
    with pytest.raises(RuntimeError), Progress(10, console=console):
        raise RuntimeError
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().index("\x1b[?25l")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (45.2, "45 s"), (59.6, "1 min"), (3569, "59 min"), (3599, "1 h 00 min"),
        (3600 * 3 + 300, "3 h 05 min"), (86399, "1 d 0 h"), (86400 * 2 + 3600 * 4, "2 d 4 h"),
    ],
)  # fmt: skip
def test_times_read_as_people_say_them(seconds, text):
    assert format_seconds(seconds) == text


def test_other_work_is_tracked_with_absolute_numbers():
    file, clock = io.StringIO(), Clock()
    with track("pictures", 100, console=Console(file=file, width=200), clock=clock, plain_seconds=10) as advance:
        for done in range(10, 110, 10):
            clock.now += 5
            advance(done, 100)
    assert file.getvalue().splitlines() == [
        "pictures 10/100 (10%)",
        "pictures 30/100 (30%) · 35 s left",
        "pictures 50/100 (50%) · 25 s left",
        "pictures 70/100 (70%) · 15 s left",
        "pictures 90/100 (90%) · 5 s left",
        "pictures 100/100 (100%)",
    ]


def test_the_total_can_change_on_the_way():
    file = io.StringIO()
    with track("pictures", 100, console=Console(file=file, width=200), plain_seconds=0) as advance:
        advance(10, 40)
    assert file.getvalue() == "pictures 10/40 (25%)\n"


def test_what_is_said_goes_to_stderr_as_it_is(capsys):
    say("quarantined: [red]a.png[/red]")
    assert capsys.readouterr() == ("", "quarantined: [red]a.png[/red]\n")
