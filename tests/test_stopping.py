"""SIGTERM ends a command as Ctrl-C does."""

import os
import signal
import threading

import pytest

from dino_hf.cli.stopping import Terminated, stop_like_ctrl_c

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of other systems")


@pytest.fixture(autouse=True)
def default_handlers():
    """Whatever runs the tests may have handlers of its own."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def killed(number: signal.Signals, finally_do) -> None:
    with stop_like_ctrl_c():
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            finally_do()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_runs_finally_blocks(number, code):
    cleaned = []
    with pytest.raises(KeyboardInterrupt) as caught:
        killed(number, lambda: cleaned.append(True))
    assert cleaned == [True]
    assert isinstance(caught.value, Terminated)
    assert caught.value.exit_code == code


def test_a_second_signal_ends_the_process():
    handlers = []
    with pytest.raises(Terminated):
        killed(signal.SIGTERM, lambda: handlers.append(signal.getsignal(signal.SIGTERM)))
    assert handlers == [signal.SIG_DFL]


def test_handlers_are_put_back_and_those_of_others_stay():
    def mine(*_):
        pass

    signal.signal(signal.SIGHUP, mine)
    with stop_like_ctrl_c():
        assert signal.getsignal(signal.SIGHUP) is mine
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, mine)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGHUP) is mine


@pytest.mark.forks
def test_a_forked_worker_dies_of_the_signal_without_cleaning_up(tmp_path):
    with stop_like_ctrl_c():
        child = os.fork()
        if child == 0:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                (tmp_path / "cleaned").touch()
                os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert not (tmp_path / "cleaned").exists()


def test_in_another_thread_nothing_is_set():
    seen = []

    def work():
        with stop_like_ctrl_c():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]
