"""Starts an ingest again and again and kills it at random moments; prints how many were killed, and how many ended.

The libraries are loaded once, and each run is a fork: so that the kills hit the writing, and not the importing.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from schemas.errors import SpectrographError
from schemas.recipe import Recipe
from tests.conftest import Recorder
from workers.ingest import run_ingest
from workers.planning import plan_ingest
from workers.request import Request


def run(source: str, store: str, model: str) -> None:
    torch.set_num_threads(1)
    recipe = Recipe.of(["heads", "mlps"], dtype="float32", precision="fp32")
    run_ingest(plan_ingest(Request(Path(source), Path(store), model, None, "default", recipe, "cpu", 4, 4)), Recorder())


def main(source: str, store: str, model: str, times: str) -> None:
    killed = ended = 0
    chance = random.Random(0)
    for _ in range(int(times)):
        child = os.fork()
        if child == 0:
            try:
                run(source, store, model)
            except SpectrographError as error:
                print(error, file=sys.stderr)
                os._exit(1)
            os._exit(0)
        time.sleep(0.12 + chance.random() * 0.15)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status) == 0:
            ended += 1
    print(killed, ended)


if __name__ == "__main__":
    main(*sys.argv[1:])
