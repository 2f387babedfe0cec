"""What a replay shows while it runs: a live line on a terminal, else a line now and then."""

import asyncio
from collections.abc import Callable
from statistics import fmean

from rich.console import Console
from rich.live import Live
from rich.text import Text

from csps.percentiles import percentile
from csps.replay.play import Player

REFRESH_S = 0.5
REPORT_S = 15.0  # where nobody watches


def status_line(player: Player, now: float) -> str:
    """Sent, running, done, failed, TTFT so far; `now` of time.monotonic."""
    ttfts = player.ttfts_s
    ttft = (
        f"TTFT mean {fmean(ttfts):.2f} s p50 {percentile(ttfts, 0.5):.2f} s "
        f"p99 {percentile(ttfts, 0.99):.2f} s"
        if ttfts
        else "no first token yet"
    )
    late = f", sending {player.late_s:.1f} s behind" if player.late_s > 1.0 else ""
    return (
        f"{now - player.begun:.0f} s: sent {player.num_sent} of {len(player.requests)}, "
        f"running {len(player.live)}, done {player.num_done}, failed {player.num_failed}, "
        f"{ttft}{late}"
    )


async def show(player: Player, console: Console, clock: Callable[[], float]) -> None:
    """Keep showing how far `player` is, until cancelled."""
    if not console.is_terminal:
        while True:
            await asyncio.sleep(REPORT_S)
            console.print(status_line(player, clock()), highlight=False, soft_wrap=True)
    with Live(console=console, transient=True, auto_refresh=False) as live:
        while True:
            live.update(Text(status_line(player, clock())), refresh=True)
            await asyncio.sleep(REFRESH_S)
