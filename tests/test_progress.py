"""What a command says while it works, by a clock that the test sets."""

import io
import threading

import pytest

from jaxalign import progress
from jaxalign.progress import Progress, busy, track


class Clock:
    """Seconds, as set."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def progress_by_the_clock():
    """Here the clock writes."""


@pytest.fixture
def said(monkeypatch):
    monkeypatch.setattr(Progress, "_watch", lambda self: None)  # the test calls `tick` itself
    return io.StringIO()


def lines(said: io.StringIO) -> list[str]:
    return said.getvalue().splitlines()


def test_a_line_every_thirty_seconds_and_one_at_the_end(said):
    clock = Clock()
    with Progress("sft", 100, unit="step", stream=said, clock=clock) as work:
        for step in range(1, 101):
            clock.now += 1.0 if step > 1 else 11.0
            work(step, f"loss {1 / step:.4f}")
    assert lines(said) == [
        "sft: step 19 of 100, loss 0.0526, 0:29 so far, 1:21 left",
        "sft: step 48 of 100, loss 0.0208, 0:58 so far, 0:52 left",
        "sft: step 77 of 100, loss 0.0130, 1:27 so far, 0:23 left",
        "sft: step 100 of 100, loss 0.0100, 1:50 in all",
    ]


def test_no_gap_of_thirty_seconds_while_one_item_takes_minutes(said):
    clock = Clock()
    with Progress("answers", 8, done=2, stream=said, clock=clock) as work:
        for _ in range(150):
            clock.now += progress.BEAT
            work.tick()
        work(3)
        clock.now += 3600
        work.tick()
    assert lines(said) == [
        "answers: 2 of 8, 0:29 so far",
        "answers: 2 of 8, 0:58 so far",
        "answers: 3 of 8, 1:01:15 so far",
    ]


def test_nothing_is_said_twice_and_nothing_of_work_that_was_done_already(said):
    clock = Clock()
    with Progress("sft", 5, done=5, stream=said, clock=clock):
        pass
    with Progress("sft", 2, stream=said, clock=clock) as work:
        clock.now += 60
        work(2)
    assert lines(said) == ["sft: 2 of 2, 1:00 so far"]


def test_a_failure_is_not_called_the_end(said):
    def fail():
        with Progress("sft", 5, stream=said, clock=Clock()) as work:
            work(3)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert lines(said) == []


def test_work_without_items_speaks_after_a_second(said):
    clock = Clock()
    with Progress("compiling the step", stream=said, clock=clock) as work:
        clock.now += 0.9
        work.tick()
        assert lines(said) == []
        for _ in range(80):
            clock.now += progress.BEAT
            work.tick()
    assert lines(said) == ["compiling the step", "compiling the step: 0:30 so far"]


def test_the_innermost_one_speaks(said):
    clock = Clock()
    with Progress("sft", 5, stream=said, clock=clock) as outer:
        clock.now += 20
        with Progress("compiling", stream=said, clock=clock) as inner:
            clock.now += 5
            inner.tick()
            clock.now += 10
            outer.tick()
        clock.now += 10
        outer.tick()
        clock.now += 10
        outer.tick()
    assert lines(said) == ["compiling", "sft: 0 of 5, 0:55 so far"]


def test_other_processes_say_nothing(said, monkeypatch):
    silent = threading.Event()
    monkeypatch.setattr(progress, "_silent", silent)
    progress.silence()
    clock = Clock()
    with Progress("sft", 5, stream=said, clock=clock) as work:
        clock.now += 60
        work(1)
        work.tick()
    assert lines(said) == []


def test_track_counts_and_the_thread_speaks(capsys, monkeypatch):
    monkeypatch.setattr(progress, "BEAT", 0.01)
    monkeypatch.setattr(progress, "SLOW", 0.01)
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    with busy("sleeping"):
        progress.time.sleep(0.2)
    assert capsys.readouterr().err.splitlines() == ["letters: 3 of 3, 0:00 in all", "sleeping"]


def test_bars_on_a_terminal_and_no_lines():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    said, clock = Terminal(), Clock()
    with Progress("sft", 5, unit="step", stream=said, clock=clock) as outer:
        with Progress("compiling", stream=said, clock=clock):
            pass
        clock.now += 60
        outer(5, "loss 0.5")
    text = said.getvalue()
    assert "so far" not in text
    assert "step 5 of 5 loss 0.5" in text
