"""Which weights stay on the device and which are streamed: a static plan for a budget of device bytes.

A program reads its weights in a fixed order, so everything is decided before the first call. Streamed weights are
copied from host memory into a ring of device memory, in the order of their use, each as early as the space for it is
free. `verify` replays a plan, and shares no code with `plan`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..passes.errors import InputError

SMALL = 64 << 10  # bytes that are copied in about the time that it takes to queue a copy
TRIES = 64  # plans between the fewest streamed bytes and all


@dataclass(frozen=True)
class Unit:
    """Memory that moves as one: a weight, or several that overlap.

    Attributes:
        name: of a weight in it, for messages.
        size: bytes that it takes on the device.
        stays: whether it must be on the device at all times.
    """

    name: str
    size: int
    stays: bool = False


@dataclass(frozen=True)
class Visit:
    """Steps `first` to `last`, both included, through which unit number `unit` has to lie still on the device."""

    unit: int
    first: int
    last: int


@dataclass(frozen=True)
class Load:
    """A copy of a streamed unit into the ring.

    Attributes:
        visit: what it is for.
        offset: where it begins in the ring, in bytes.
        start: step before which it is queued: its space is free from then on.
    """

    visit: Visit
    offset: int
    start: int


@dataclass(frozen=True)
class Plan:
    """What is streamed.

    Attributes:
        streamed: units that are kept in host memory.
        loads: copies of one call, in the order in which they are queued.
        resident: bytes of the units that stay on the device.
        ring: bytes of device memory that copies go to.
        copied: bytes that one call copies.
    """

    streamed: frozenset[int]
    loads: tuple[Load, ...]
    resident: int
    ring: int
    copied: int


def plan(units: Sequence[Unit], visits: Sequence[Visit], budget: int) -> Plan:
    """The plan that copies the least per call and, if it can, lets copies run beside computation.

    Streamed are, in this order of preference, units that are large enough for a copy to be worth queueing, and of
    these the ones that are needed through the fewest steps, since a byte on the device saves a copy per use. Among
    equals the choice is spread evenly over the bytes of weights in the order of their first use: the time of a step
    goes with the bytes of weights that it reads, so each copy has about equally much computation to hide behind.
    The ring holds what a step reads and what the next one needs, where the budget allows for that. Since the largest
    streamed unit decides how large that is, plans that stream units above a size last are compared as well.

    Args:
        units: sizes are multiples of the alignment that addresses need.
        visits: when units are needed; those of one unit are apart in time.
        budget: bytes of device memory for weights.

    Raises:
        InputError: the weights of one step do not fit; it names the largest, and a budget that is enough.
    """
    total = sum(u.size for u in units)
    if total <= budget:
        return Plan(frozenset(), (), total, 0, 0)
    ring = _least_ring(units, visits)
    fixed = sum(u.size for u in units if u.stays)
    if fixed + ring > budget:
        raise _too_small(units, visits, budget, fixed, fixed + ring)
    for ahead in (True, False):
        caps = sorted({max(SMALL, 1 << u.size.bit_length()) for u in units if not u.stays})
        found = [p for cap in caps if (p := _fewest(units, visits, budget, cap, ahead)) is not None]
        if found:
            return min(found, key=lambda p: p.copied + SMALL * len(p.loads))
    everything = frozenset(k for k, u in enumerate(units) if not u.stays)
    made = _planned(units, visits, everything, ring)
    assert made is not None
    return made


def _fewest(units: Sequence[Unit], visits: Sequence[Visit], budget: int, cap: int, ahead: bool) -> Plan | None:
    """The plan with the fewest streamed bytes that fits, larger units than `cap` streamed last; None if none fits."""
    total, movable = sum(u.size for u in units), sum(u.size for u in units if not u.stays)
    amount = total - budget
    while True:
        amount = min(amount, movable)
        streamed = _spread(units, visits, amount, cap)
        needed = _needed(units, [v for v in visits if v.unit in streamed], ahead)
        resident = total - sum(units[k].size for k in streamed)
        missing = resident + needed - budget
        if missing <= 0:
            made = _planned(units, visits, streamed, budget - resident)
            if made is not None:
                return made
        if amount == movable:
            return None
        amount += max(missing, total // TRIES, 1)


def _spread(units: Sequence[Unit], visits: Sequence[Visit], amount: int, cap: int) -> frozenset[int]:
    """Units of about `amount` bytes, the preferred kinds first, evenly over the bytes of each kind in order of use."""
    steps = Counter[int]()
    for v in visits:
        steps[v.unit] += v.last - v.first + 1
    order = dict.fromkeys(v.unit for v in sorted(visits, key=lambda v: v.first))
    kinds: dict[tuple[bool, bool, int], list[int]] = {}
    for k in (*(k for k in range(len(units)) if k not in order), *order):
        size = units[k].size
        if not units[k].stays:
            kinds.setdefault((size < SMALL, size > cap, steps[k]), []).append(k)
    chosen: set[int] = set()
    for _, members in sorted(kinds.items()):
        whole = sum(units[k].size for k in members)
        part = min(amount, whole)
        amount -= part
        passed = done = 0
        for k in members:
            passed += units[k].size
            if 2 * (passed * part - done * whole) >= units[k].size * whole > 0:
                chosen.add(k)
                done += units[k].size
    return frozenset(chosen)


def _needed(units: Sequence[Unit], visits: Sequence[Visit], ahead: bool) -> int:
    """The most bytes that these visits need in a step, and, looking ahead, those that come next."""
    starts: dict[int, int] = {}
    for v in visits:
        starts[v.first] = starts.get(v.first, 0) + units[v.unit].size
    live = {s: sum(units[v.unit].size for v in visits if v.first <= s <= v.last) for s in starts}
    order = sorted(starts)
    coming = {a: starts[b] for a, b in pairwise(order)} if ahead else {}
    return max((live[s] + coming.get(s, 0) for s in order), default=0)


def _planned(units: Sequence[Unit], visits: Sequence[Visit], streamed: frozenset[int], ring: int) -> Plan | None:
    loads = _placed(units, [v for v in visits if v.unit in streamed], ring)
    if loads is None:
        return None
    end = max((n.offset + units[n.visit.unit].size for n in loads), default=0)
    resident = sum(u.size for k, u in enumerate(units) if k not in streamed)
    return Plan(streamed, tuple(loads), resident, end, sum(units[n.visit.unit].size for n in loads))


def _placed(units: Sequence[Unit], visits: Sequence[Visit], ring: int) -> list[Load] | None:
    """Each visit where the ring is free the earliest, those that begin together side by side; None if one never fits.

    `parts` covers the ring: (first byte, byte after the last, step before which it is free).
    """
    groups: dict[int, list[Visit]] = {}
    for v in sorted(visits, key=lambda v: v.first):
        groups.setdefault(v.first, []).append(v)
    parts, loads, start = [(0, ring, 0)], list[Load](), 0
    for first, group in groups.items():
        size = sum(units[v.unit].size for v in group)
        places = [(max(free for a, b, free in parts if a < begin + size and b > begin), begin)
                  for begin, _, _ in parts if begin + size <= ring]  # fmt: skip
        if not places or min(places)[0] > first:
            return None
        free, begin = min(places)
        start, end = max(start, free), begin + size  # copies are queued in the order of their use
        kept = [(a, min(b, begin), f) for a, b, f in parts if a < begin]
        kept += [(max(a, end), b, f) for a, b, f in parts if b > end]
        for v in group:
            loads.append(Load(v, begin, start))
            kept.append((begin, begin + units[v.unit].size, v.last + 1))
            begin += units[v.unit].size
        parts = sorted(p for p in kept if p[0] < p[1])
    return loads


def _least_ring(units: Sequence[Unit], visits: Sequence[Visit]) -> int:
    """Bytes of a ring through which everything that may be streamed fits; the fewest, unless gaps stay unused."""
    movable = [v for v in visits if not units[v.unit].stays]
    low, high = _needed(units, movable, ahead=False), sum(units[v.unit].size for v in movable)
    if _placed(units, movable, low) is not None:
        return low
    while high - low > max(1, low // 256):  # `high` always fits: nothing is ever reused
        middle = (low + high) // 2
        low, high = (low, middle) if _placed(units, movable, middle) is not None else (middle, high)
    return high


def _too_small(units: Sequence[Unit], visits: Sequence[Visit], budget: int, fixed: int, least: int) -> InputError:
    movable = [v for v in visits if not units[v.unit].stays]
    live = [[u for u in movable if u.first <= v.first <= u.last] for v in movable]
    largest = max(live, key=lambda vs: sum(units[v.unit].size for v in vs), default=[])
    name = max((units[v.unit] for v in largest), key=lambda u: u.size, default=max(units, key=lambda u: u.size)).name
    kept = f", beside {fixed} bytes that cannot leave it" if fixed else ""
    return InputError(
        f"{budget} bytes of device memory do not hold the weights of a single step, the one that reads {name}{kept}",
        next_step=f"give device_memory at least {least} bytes",
    )


def verify(made: Plan, units: Sequence[Unit], visits: Collection[Visit], budget: int) -> int:
    """Replay the steps and check that every unit is on the device, whole, whenever it is needed; the peak in bytes.

    Raises:
        AssertionError: a copy overwrites what is still needed, comes too late or lies outside the ring, what must stay
            is streamed, or the budget is exceeded.
    """
    peak = made.ring + sum(u.size for k, u in enumerate(units) if k not in made.streamed)
    assert peak <= budget, f"{peak} bytes exceed the budget of {budget}"
    assert not any(units[k].stays for k in made.streamed), "a unit that must stay is streamed"
    assert [n.start for n in made.loads] == sorted(n.start for n in made.loads), "copies are queued out of order"
    intact: list[Load] = []
    source: dict[Visit, Load] = {}
    for step in range(max((v.last for v in visits), default=-1) + 1):
        for load in (n for n in made.loads if n.start == step):
            begin, end = load.offset, load.offset + units[load.visit.unit].size
            assert begin >= 0 and end <= made.ring, f"{units[load.visit.unit].name} lies outside the ring"
            intact = [n for n in intact if n.offset >= end or n.offset + units[n.visit.unit].size <= begin]
            intact.append(load)
        for visit in visits:
            if visit.first <= step <= visit.last and visit.unit in made.streamed:
                held = [n for n in intact if n.visit == visit]
                name = units[visit.unit].name
                assert len(held) == 1, f"{name} is overwritten or missing when step {step} needs it"
                assert source.setdefault(visit, held[0]) is held[0], f"{name} moves while it is needed"
    return peak
