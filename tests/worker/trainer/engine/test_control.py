"""The trainer's life hangs on its socket to the agent."""
import os, pathlib, signal, socket, struct, subprocess

TRAINER = pathlib.Path('build/bin/ppft-trainer').resolve()


def spawn():
    ours, theirs = socket.socketpair()
    keep = os.dup2(theirs.fileno(), 100)
    child = subprocess.Popen([TRAINER, '--device', 'cpu:0'], stderr=subprocess.PIPE, close_fds=False, preexec_fn=lambda: os.dup2(keep, 3))
    os.close(keep)
    theirs.close()
    return ours, child


def test_a_closed_socket_ends_it_at_once():
    ours, child = spawn()
    ours.close()
    assert child.wait(timeout=120) == 3


def test_sigterm_ends_it():
    ours, child = spawn()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=120) == -signal.SIGTERM
    ours.close()


def test_a_frame_that_is_no_message_is_a_failure():
    ours, child = spawn()
    ours.sendall(struct.pack('<I', 3) + b'\xff\xff\xff')
    assert child.wait(timeout=120) == 1
    assert b'no AgentMessage' in child.stderr.read()
    ours.close()


def test_a_huge_frame_is_not_read():
    ours, child = spawn()
    ours.sendall(struct.pack('<I', 0xffffffff))
    assert child.wait(timeout=120) == 3
    ours.close()


def test_without_an_agent_it_says_who_starts_it():
    run = subprocess.run([TRAINER], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 2 and 'started by ppft-worker' in run.stderr
