"""One row of the table of models: every contender is built and checked, then all are sampled in turns.

A process of its own runs this for one model and batch. Rows of one wave are built at the same time, each by its
process; measurements that choose kernels, ours as well as torch.compile's, exclude each other by a lock on a file.
Sampling waits until the parent says that nothing else runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_tree  # noqa: F401
import peers_models as models
import torch
from gpu_clock import best_of, interleaved, ratio_text, synchronize, time_models

from torchlathe.targets.measure import Comparison

Call = Callable[[], Any]
Emit = Callable[[dict[str, Any]], None]
OURS = "torchlathe"
MODES = {"compile": "default", "reduce-overhead": "reduce-overhead", "max-autotune": "max-autotune-no-cudagraphs",
         "max-autotune-graphs": "max-autotune"}  # fmt: skip
PEERS = ("compile", "reduce-overhead", "max-autotune")  # in the order in which they are built
FLOOR = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}  # error that is never held against anyone
LAST = 80.0  # seconds before the end at which ours is built beside the measurements of others
TINY = ("vit", "bert", "llama")


def tiny(name: str, batch: int) -> models.Case:
    """A toy of each family, for dry runs."""
    import transformers as t

    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                            "intermediate_size": 64}  # fmt: skip
    if name == "vit":
        vit = t.ViTForImageClassification(t.ViTConfig(**size, image_size=32, patch_size=8, num_labels=4))
        return models.First(vit, "pixel_values").eval(), (torch.randn(batch, 3, 32, 32),)
    tokens = (torch.randint(5, 50, (batch, 12)),)
    if name == "bert":
        return models.First(t.BertModel(t.BertConfig(**size, vocab_size=64), False), "input_ids").eval(), tokens
    llama = t.LlamaForCausalLM(t.LlamaConfig(**size, num_key_value_heads=1, vocab_size=64, use_cache=False))
    return models.First(llama, "input_ids", use_cache=False).eval(), tokens


class Turn:
    """The right to measure on the device: a lock on a file, of which the system frees a process that is killed."""

    def __init__(self, path: Path) -> None:
        self.file, self.depth = path.open("a"), 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Wait for it, and hold it. May be nested."""
        if self.depth == 0:
            fcntl.lockf(self.file, fcntl.LOCK_EX)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                fcntl.lockf(self.file, fcntl.LOCK_UN)

    def take(self, patience: float) -> bool:
        """Hold it if it is free within some seconds."""
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                if time.monotonic() > end:
                    return False
                time.sleep(0.02)
            else:
                self.depth += 1
                return True

    def give(self) -> None:
        """End what `take` began."""
        self.depth -= 1
        if self.depth == 0:
            fcntl.lockf(self.file, fcntl.LOCK_UN)


def share_with_inductor(turn: Turn) -> None:
    """Let torch.compile's own measurements take turns."""
    from torch._inductor.runtime import benchmarking

    measure = getattr(benchmarking.benchmarker, "benchmark_gpu", None)
    if measure is None:
        return

    def alone(*args: Any, **kwargs: Any) -> Any:
        with turn.held():
            return measure(*args, **kwargs)

    benchmarking.benchmarker.benchmark_gpu = alone  # type: ignore[method-assign]


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, again and again where that is caught on the way."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Race:
    """One model and its contenders.

    Attributes:
        request: what the parent asked for.
        model: in the dtype of the race, on the device.
        args: its inputs.
        wanted: the float32 model's answer.
        row: what is known so far.
    """

    request: Mapping[str, Any]
    model: torch.nn.Module
    args: tuple[torch.Tensor, ...]
    wanted: torch.Tensor
    row: dict[str, Any]
    calls: dict[str, Call]

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Race:
        """The model, its float32 answer, and eager's error."""
        device, name, batch = request["device"], request["model"], request["batch"]
        dtype = getattr(torch, request["dtype"])
        torch.manual_seed(0)
        model, args = tiny(name, batch) if name in TINY else models.build(name, batch)
        model, args = model.to(device), tuple(a.to(device) for a in args)
        torch.backends.cudnn.allow_tf32 = False
        with torch.no_grad():
            wanted = model(*args).float()
        torch.backends.cudnn.allow_tf32 = True
        model = model.to(dtype).requires_grad_(False)
        args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
        row = {"model": name, "batch": batch, "build_seconds": {}, "failed": {}, "error": {}}
        race = cls(request, model, args, wanted, row, {})
        race.enter("eager", lambda: lambda: model(*args), 60.0)
        return race

    def enter(self, name: str, make: Callable[[], Call], patience: float) -> None:
        """Build a contender and check it; one that fails is left out, with the reason."""
        start, device = time.perf_counter(), self.request["device"]
        try:
            with limited(patience):
                call = make()
                for _ in range(3):  # graphs are recorded in the second call
                    result = call()
                synchronize(device)
                took = time.perf_counter() - start
                error = ((result.float() - self.wanted).abs().max() / self.wanted.abs().max()).item()
        except Exception as reason:  # whatever it is, it costs this contender
            took, text = time.perf_counter() - start, (str(reason).strip().splitlines() or [""])[0][:300]
            late = f"took more than {patience:.0f} s; " if took >= patience else ""  # others word it in their own way
            self.row["failed"][name] = f"{late}{type(reason).__name__}: {text}"
            self.row["build_seconds"][name] = took
            return
        self.row["build_seconds"][name], self.row["error"][name] = took, error
        allowed = 2 * self.row["error"]["eager"] + FLOOR[self.args[0].dtype if self.args[0].is_floating_point()
                                                        else next(self.model.parameters()).dtype]  # fmt: skip
        if not error <= allowed:
            self.row["failed"][name] = f"wrong by {error:.1e} of the largest value, allowed are {allowed:.1e}"
        else:
            self.calls[name] = call

    def ours(self) -> Call:
        """torchlathe.optimize for this device."""
        import torchlathe

        options: dict[str, Any] = {"budget": self.request["tune"], "level": self.request["level"]}
        fast = torchlathe.optimize(self.model, self.args, target=self.request["device"], **options)
        with contextlib.suppress(AttributeError):  # for the reader alone
            self.row["notes"] = list(fast.report.notes)
            self.row["kernels"] = [f"{c.kernel.backend} {c.kernel.name} {c.kernel.schedule}" for c in fast.choices]
        return lambda: fast(*self.args)

    def peer(self, name: str) -> Call:
        """torch.compile in one of its modes."""
        compiled = torch.compile(self.model, mode=MODES[name], dynamic=False)
        return lambda: compiled(*self.args)

    def build(self, emit: Emit, until: float) -> None:
        """All contenders: ours as soon as nobody else measures, the peers meanwhile.

        Args:
            until: of `time.time`; what is not built then is left out.
        """
        turn = Turn(Path(self.request["lock"]))
        share_with_inductor(turn)
        peers, ours = list(self.request["peers"]), self.request["ours"]
        while peers or ours:
            left = until - time.time()
            mine = ours and turn.take(0.5 if peers else max(left - LAST, 0.0))
            if mine or not peers:
                name, ours = OURS, False
                self.row["alone"] = mine  # whether nothing else was measured while our kernels were
                self.enter(name, self.ours, min(until - time.time(), self.request["patience"]))
            else:
                name = peers.pop(0)
                self.enter(name, lambda n=name: self.peer(n), min(left, self.request["patience"]))  # type: ignore[misc]
            if mine:
                turn.give()
            emit({"built": name, "why": self.row["failed"].get(name), "took": self.row["build_seconds"].get(name)})

    def run(self) -> dict[str, Any]:
        """Sample all that were built."""
        device = self.request["device"]
        if device == "cuda":
            interleaved({"eager": self.calls["eager"]}, device, 0.3, 1)  # the clocks rise
        timings = time_models(self.calls, device, self.request["seconds"])
        self.row["seconds"] = {n: asdict(t) for n, t in timings.items()}
        cells = {"model": self.row["model"], "batch": str(self.row["batch"])}
        names = (OURS, "eager", *self.request["peers"])
        cells |= {f"{n}, ms": f"{timings[n].median * 1e3:.3f}" if n in timings else "-" for n in names}
        rivals = {n: t for n, t in timings.items() if n != "eager"}
        if OURS in rivals and len(rivals) > 1:
            best = best_of(rivals, OURS)
            self.row["ratio"], self.row["best"] = best[1].ratio, best[0]
            cells["best peer / ours"] = ratio_text(best)
        if OURS in rivals:
            cells["eager / ours"] = f"{Comparison.of(timings[OURS], timings['eager']).ratio:.2f}"
        if OURS in self.row["error"]:
            cells["error of ours, of eager"] = f"{self.row['error'][OURS]:.1e}, {self.row['error']['eager']:.1e}"
        self.row["cells"] = cells
        return self.row


def serve(request: Mapping[str, Any], emit: Emit, wait: Callable[[], float]) -> None:
    """Load; when told until when, build; when told again, sample."""
    with torch.no_grad():
        race = Race.of(request)
        emit({"loaded": True})
        race.build(emit, wait())
        emit({"ready": True})
        wait()
        emit({"row": race.run()})
