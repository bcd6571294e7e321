"""Runs posttrain commands in processes of their own without paying for the imports each time: imports once, then forks.

Each line of standard input is a JSON task, each line of standard output its result:

    {"arguments": [...], "folder": cwd,                       what is run, where
     "die": [target, call, when] | null,                      SIGKILL before | after | halfway through a call of target
     "send": [[target, call, signal], ...] | null,            or these signals, after those calls
     "send_up": [target, call, signal] | null,                or rank 0 sends this to what started it
     "kill_after_s": seconds | null,                          or SIGKILL at this time
     "max_file_bytes": bytes | null,                          every write past this size of a file is refused
     "poison": [target, call] | null,                         this call's result (its first part) is made infinite
     "fail": [target, call, message] | null,                  this call raises OSError(message): refused by the disk
     "hang": target | null,                                   this call sleeps for good
     "commands": [[target, call, command], ...] | null,       shell commands, run before those calls
     "exit": target | null,                                   this call ends the process with status 7, without a word
     "first_path": folder | null,                             where modules are looked for first
     "set": {target: value, ...} | null,                      constants of the code
     "others": {...},                                         what befalls the ranks other than on_rank
     "ranks": processes of one run (1),                       joined by gloo, as torchrun would start them
     "each": [{"arguments": [...], "environment": {...}, "folder": cwd, "namespace": the network it is in}, ...] | null,
                                                              what each rank has of its own
     "on_rank": r | null,                                     what befalls it befalls this rank alone
     "launches": true | null}                                 posttrain starts processes itself, which are forked from this
                                                              one (tests/forked.py) and are those that it befalls
    → {"status": as Popen.returncode, of rank 0, "statuses": [of every rank], "output": text, "seconds": s}

A rank that dies of SIGKILL takes the others along, as a machine that fails does. After 100 s all are killed.
"""

import ctypes
import functools
import importlib
import json
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import time

from forked import fork_launches
from warm import warm

LIMIT_S = 100
CLONE_NEWUTS, CLONE_NEWNET = 0x04000000, 0x40000000


def find(target):
    """module:name[.name] → (holder, name)"""
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    return functools.reduce(getattr, outer, importlib.import_module(module)), name


def at_call(target, number, act, when):
    """Replace the function by one that acts at its number-th call (from 1)."""
    holder, name = find(target)
    function, calls = getattr(holder, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            act()
        if calls == number and when == "halfway":
            function(*args[:-1], args[-1][: len(args[-1]) // 2], **kwargs)
            act()
        result = function(*args, **kwargs)
        if calls == number and when == "after":
            act()
        return result

    setattr(holder, name, counted)


def poison(target, number):
    holder, name = find(target)
    function, calls = getattr(holder, name), 0

    def poisoned(*args, **kwargs):
        nonlocal calls
        calls += 1
        result = function(*args, **kwargs)
        if calls != number:
            return result
        return (result[0] * float("inf"), *result[1:]) if isinstance(result, tuple) else result * float("inf")

    setattr(holder, name, poisoned)


def refuse(target, number, message):
    holder, name = find(target)
    function, calls = getattr(holder, name), 0

    def failing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(28, message)
        return function(*args, **kwargs)

    setattr(holder, name, failing)


def befall(task, rank):
    """What is to happen in this rank."""
    if task.get("on_rank") not in (None, rank):
        task = task.get("others", {})
    if task.get("max_file_bytes") is not None:
        limit = task["max_file_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if task.get("die"):
        target, number, when = task["die"]
        at_call(target, number, lambda: os.kill(os.getpid(), signal.SIGKILL), when)
    for target, number, which in task.get("send") or []:
        at_call(target, number, lambda which=which: os.kill(os.getpid(), which), "after")
    if task.get("send_up") and rank == 0:
        target, number, which = task["send_up"]
        at_call(target, number, lambda: os.kill(os.getppid(), which), "after")
    if task.get("poison"):
        poison(*task["poison"])
    if task.get("fail"):
        refuse(*task["fail"])
    for target, number, command in task.get("commands") or []:
        at_call(target, number, lambda command=command: subprocess.run(command, shell=True, check=True), "before")
    for target, value in (task.get("set") or {}).items():
        setattr(*find(target), value)
    if task.get("first_path"):
        sys.path.insert(0, task["first_path"])
    if task.get("exit"):
        at_call(task["exit"], 1, lambda: os._exit(7), "before")
    if task.get("hang"):
        at_call(task["hang"], 1, lambda: time.sleep(1_000), "before")


def child(task, rank):
    if task.get("on_rank") not in (None, rank):
        own = {name: value for name, value in task.get("others", {}).items() if name in ("arguments", "folder")}
        task = {**task, **own}
    os.chdir(task["folder"])
    if task.get("launches"):
        fork_launches(lambda rank: befall(task, rank))
    else:
        befall(task, rank)
    from posttrain.cli import main

    status = main(task["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def enter(namespace):
    """This process joins a network namespace of `ip netns` (os.setns is Python 3.12's), under its name."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as network:
        if libc.setns(network.fileno(), CLONE_NEWNET) or libc.unshare(CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), namespace)
    socket.sethostname(namespace)


def start(task, rank, writing, launch):
    """Fork one rank; launch: what a launcher puts into the environment."""
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        own = (task.get("each") or {rank: {}})[rank]
        os.environ |= task.get("environment", {}) | launch | own.get("environment", {})
        if "namespace" in own:
            enter(own["namespace"])
        arguments = task["arguments"] + own.get("arguments", [])
        status = child({**task, "arguments": arguments, "folder": own.get("folder", task["folder"])}, rank)
    finally:
        os._exit(status)


def launched(ranks):
    """The environment of each rank."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    same = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{k: str(v) for k, v in {**same, "RANK": rank, "LOCAL_RANK": rank}.items()} for rank in range(ranks)]


def wait(processes, kill_at, until):
    """Exit codes, as Popen gives them."""
    codes = {}
    while len(codes) < len(processes):
        late = time.monotonic() > min(kill_at, until)
        if late or -signal.SIGKILL in codes.values():
            for process in processes.keys() - codes.keys():
                os.kill(process, signal.SIGKILL)
        for process in processes.keys() - codes.keys():
            done, ended = os.waitpid(process, os.WNOHANG)
            if done:
                codes[process] = os.waitstatus_to_exitcode(ended)
        time.sleep(0.01)
    return [codes[process] for process in processes]


def run(task):
    """The output goes through a pipe: a file would fall under max_file_bytes. It must fit the pipe's 64 kB."""
    began, (reading, writing) = time.monotonic(), os.pipe()
    sys.stdout.flush()
    environments = launched(task.get("ranks", 1))
    processes = {start(task, rank, writing, launch): rank for rank, launch in enumerate(environments)}
    os.close(writing)
    kill_after_s = task.get("kill_after_s")
    statuses = wait(processes, math.inf if kill_after_s is None else began + kill_after_s, began + LIMIT_S)
    os.set_blocking(reading, False)  # processes that it left behind may still hold the other end
    with os.fdopen(reading, "rb") as pipe:
        output = (pipe.read() or b"").decode(errors="replace")
    seconds = time.monotonic() - began
    return {"status": statuses[0], "statuses": statuses, "output": output, "seconds": seconds}


def main():
    """Import and warm up whatever starts no thread, for threads do not survive a fork."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import posttrain.tools.evaluate  # noqa: F401

    get_checkpoint_conversion_mapping("llama")
    warm()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
