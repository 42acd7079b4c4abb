"""Signals become exceptions, and wait where they are held back."""

import signal
import threading

import pytest

from mitune.run.stopping import SIGNALS, Stopped, signals_held, signals_raised


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_raised(name, status):
    with pytest.raises(Stopped, match=name) as caught, signals_raised():
        signal.raise_signal(getattr(signal, name))
    assert caught.value.status == status
    assert isinstance(caught.value, KeyboardInterrupt) and not isinstance(caught.value, Exception)


def test_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_raised():
            signal.raise_signal(signal.SIGHUP)
            with signals_held():
                signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_held_until_the_end():
    done = []
    with pytest.raises(Stopped, match="SIGTERM"), signals_raised():
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            done.append("whole")
        done.append("never")
    assert done == ["whole"]


def test_held_without_the_command_line():
    """In a notebook, Ctrl-C is Python's own KeyboardInterrupt."""
    done = []
    with pytest.raises(KeyboardInterrupt), signals_held():
        signal.raise_signal(signal.SIGINT)
        done.append("whole")
    assert done == ["whole"]


def test_held_in_a_block_that_fails():
    with pytest.raises(Stopped) as caught, signals_raised(), signals_held():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("of the block")
    assert isinstance(caught.value.__context__, ValueError)


def test_other_threads_do_without():
    done = []

    def work():
        with signals_raised(), signals_held():
            done.append("whole")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["whole"]
