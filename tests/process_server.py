"""Runs posttrain commands in processes of their own without paying for the imports each time: imports once, then forks.

Each line of standard input is a JSON task, each line of standard output its result:

    {"arguments": [...], "folder": cwd,                       what is run, where
     "die": [target, call, when] | null,                      SIGKILL before | after | halfway through a call of target
     "send": [[target, call, signal], ...] | null,            or these signals, after those calls
     "kill_after_s": seconds | null,                          or SIGKILL at this time
     "max_file_bytes": bytes | null,                          every write past this size of a file is refused
     "poison": [target, call] | null}                         this call's result (its first part) is made infinite
    → {"status": as Popen.returncode, "output": text, "seconds": s}
"""

import functools
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time


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


def child(task):
    os.chdir(task["folder"])
    if task.get("max_file_bytes") is not None:
        limit = task["max_file_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if task.get("die"):
        target, number, when = task["die"]
        at_call(target, number, lambda: os.kill(os.getpid(), signal.SIGKILL), when)
    for target, number, which in task.get("send") or []:
        at_call(target, number, lambda which=which: os.kill(os.getpid(), which), "after")
    if task.get("poison"):
        poison(*task["poison"])
    from posttrain.cli import main

    status = main(task["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def run(task):
    """The output goes through a pipe: a file would fall under max_file_bytes. It must fit the pipe's 64 kB."""
    began, (reading, writing) = time.monotonic(), os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        status = 99
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.environ |= task.get("environment", {})
            status = child(task)
        finally:
            os._exit(status)
    os.close(writing)
    if task.get("kill_after_s") is not None:
        time.sleep(task["kill_after_s"])
        os.kill(process, signal.SIGKILL)
    _, ended = os.waitpid(process, 0)
    os.set_blocking(reading, False)  # processes that it left behind may still hold the other end
    with os.fdopen(reading, "rb") as pipe:
        output = (pipe.read() or b"").decode(errors="replace")
    return {"status": os.waitstatus_to_exitcode(ended), "output": output, "seconds": time.monotonic() - began}


def main():
    """Import and warm up whatever starts no thread, for threads do not survive a fork."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import posttrain.tools.evaluate
    import posttrain.train  # noqa: F401
    from posttrain.config import resolve

    resolve(["model.path=embedded", "data.train=x.jsonl"])
    get_checkpoint_conversion_mapping("llama")
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
