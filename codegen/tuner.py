"""Tuning: choose a backend and a schedule for a region from records, by a trial in a child process, or by guess."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..passes.program import Program
from ..targets.folder import cache_folder
from ..targets.records import Records, key_of
from ..targets.target import Target, fingerprint
from . import near
from .base import Backend, Region
from .request import encode_request
from .trial import REFEREE, TIMING, Trial, decode_trial, encode_trial, guess, hold
from .versions import fingerprint_of_code, versions
from .workshop import workshop

PATIENCE = 60.0  # seconds that one candidate may take to be made and checked
LEVELS = ("fast", "default", "max")
Json = Any


@dataclass
class Tuner:
    """Trials for the regions of one program.

    Attributes:
        level: ``fast`` never measures; ``default`` and ``max`` do.
        budget: seconds of trials, after which the likeliest candidate is taken unmeasured.
        records: where trials are looked up and kept.
        isolated: whether candidates are tried in a child process.
        each: seconds of timing per region.
        notes: what a user should know about how choices were made.
    """

    level: str = "default"
    budget: float = 120.0
    records: Records = field(default_factory=Records)
    isolated: bool = True
    each: float = 0.1
    notes: list[str] = field(default_factory=list)
    measured: int = 0
    _spent: float = 0.0

    def choose(self, program: Program, region: Region, backends: Sequence[Backend], target: Target,
               values: Sequence[Any]) -> Trial:  # fmt: skip
        """The trial of a region: recorded, held now, or guessed."""
        key = self._key("trial", region.key(program), backends, target)
        stored = None if self.level == "fast" else self.records.get(key)
        if stored is not None:
            with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError):  # else: not one of ours
                return decode_trial(stored)
        if self.level == "fast" or self._spent >= self.budget:
            if self.level != "fast" and "the tuning budget is spent" not in self.notes:
                self.notes.append("the tuning budget is spent")
            backend, schedule = guess(region, backends, target)
            return Trial(backend.name, schedule)
        kind, sizes = near.kind_of(region.text())
        kind = self._key("near", kind + region.key(program).partition(":")[2], backends, target)
        before = self.records.get(kind)
        only = [] if self.level == "max" else near.winners(before, sizes)
        start = time.perf_counter()
        trial = self._hold(program, region, backends, target, values, only)
        self._spent += time.perf_counter() - start
        self.measured += 1
        if trial.seconds is not None:  # what failed as a whole may work the next time
            found = {key: encode_trial(trial)}
            if not trial.rivals.keys() <= {REFEREE, *only}:  # a chain of near ones would lead far from the first
                found[kind] = near.with_trial(before, sizes, trial)
            self.records.add(found)
        return trial

    def _key(self, what: str, region: str, backends: Sequence[Backend], target: Target) -> str:
        names = [b.name for b in backends]
        return key_of(
            what,
            fingerprint(target),
            region,
            self.each,
            names,
            versions(),
            fingerprint_of_code(),
            torch.get_num_threads(),
        )

    def _hold(self, program: Program, region: Region, backends: Sequence[Backend], target: Target,
              values: Sequence[Any], only: Sequence[str]) -> Trial:  # fmt: skip
        isolated = self.isolated and workshop().possible
        if not isolated or guess(region, backends, target)[0].name == REFEREE:
            return hold(region, backends, target, values, self.each, only=only)
        skip: dict[str, str] = {}
        with tempfile.TemporaryDirectory(dir=_memory_folder(values)) as folder:
            try:
                request = encode_request(program, region, values, target, f"{folder}/values")
            except Exception as reason:  # no stored form, or no room for the values
                self.notes.append(f"tried in this process: {(str(reason).splitlines() or [''])[0]}")
                return hold(region, backends, target, values, self.each, only=only)
            request |= {
                "search": self.level == "max",
                "budget": self.each,
                "threads": torch.get_num_threads(),
                "folder": str(cache_folder()),
                "only": list(only),
            }
            while len(skip) < 8:
                answer = workshop().ask(request | {"skip": list(skip)}, PATIENCE)
                if "trial" in answer:
                    trial = decode_trial(answer["trial"])
                    trial.refused |= skip
                    return trial
                # a child that answers failed as a whole: on a GPU it may lack memory for a context and the values
                alive = target.device == "cuda" and not answer.get("ended")
                if answer["trying"] == TIMING and not alive:
                    return Trial(refused={**skip, "all": answer["failed"]})
                if answer["trying"] == "start" or alive:
                    self.notes.append(f"tried in this process, since the child process failed: {answer['failed']}")
                    trial = hold(region, backends, target, values, self.each, skip=list(skip), only=only)
                    trial.refused |= skip
                    return trial
                skip[answer["trying"]] = answer["failed"]
        return Trial(refused=skip)


def _memory_folder(values: Sequence[Any]) -> str | None:
    """A folder in memory if the values fit there: they need not touch a disk."""
    folder = Path("/dev/shm")
    needed = sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))
    fits = os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 2 * needed
    return str(folder) if fits else None
