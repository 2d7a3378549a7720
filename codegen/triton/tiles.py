"""Which tile of a product a program computes."""

from __future__ import annotations

from .code import power_of_two
from .product import Groups
from .writer import Writer

GROUP = 8  # tiles of rows that share columns while these are in the second cache level


def number_tiles(w: Writer, down: str, columns: str, width: int) -> None:
    """Number of the tile, in an order in which neighbours share operands."""
    w.line(f"down = {down}")
    w.line(f"over = tl.cdiv({columns}, {width})")
    w.line(f"group = tile // ({GROUP} * over)")
    w.line(f"high = tl.minimum(down - group * {GROUP}, {GROUP})")
    w.line(f"tile_row = group * {GROUP} + tile % ({GROUP} * over) % high")
    w.line(f"tile_column = tile % ({GROUP} * over) // high")


def find_group(w: Writer, groups: Groups, height: int) -> None:
    """The group of this tile, its first row and the row where the group ends; a tile without a group ends here."""
    step, ends = w.sizes.text(groups.step), f"t{groups.ends}"
    w.line(f"each = tl.arange(0, {power_of_two(groups.count)})")
    w.line(f"ends = tl.load({ends} + each * {step}, mask=each < {groups.count}, other=0).to(tl.int32)")
    before = f"(each > 0) & (each < {groups.count})"
    w.line(f"begins = tl.load({ends} + (each - 1) * {step}, mask={before}, other=0).to(tl.int32)")
    w.line(f"tiles = (tl.maximum(ends - begins, 0) + {height - 1}) // {height}")
    w.line("after = tl.cumsum(tiles, 0)")
    w.line("mine = (tile_row < after) & (tile_row >= after - tiles)")
    w.line("own = tl.sum(tl.where(mine, each, 0), 0)")
    w.line(f"first = tl.sum(tl.where(mine, begins + (tile_row - after + tiles) * {height}, 0), 0)")
    w.line("last = tl.sum(tl.where(mine, ends, 0), 0)")
    w.line("if last == 0:")
    w.line("    return")
