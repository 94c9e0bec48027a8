"""Counters and histograms of a live engine for Prometheus (`pip install duplex_engine[metrics]`).

Owns the names and units. The counts are those of `LiveEngine.counters`, read when they are scraped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from duplex_engine.errors import InvalidArgument
from duplex_engine.types import MicroTurn

if TYPE_CHECKING:
    from duplex_engine.live.driver import LiveEngine

__all__ = ["Metrics"]

BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)

# name -> (help, counters of `LiveEngine.counters`; a name that ends in _ is a prefix, whose rest is
# the label "kind")
COUNTERS: dict[str, tuple[str, str]] = {
    "turns": ("micro-turns run", "turns"),
    "tokens": ("output tokens", "tokens"),
    "merged_turns": ("micro-turns appended without output of their own", "merged_turns"),
    "filled_milliseconds": ("silence in place of sound that did not come", "filled_ms"),
    "stale_turns": ("micro-turns whose output an interruption made worthless", "stale_turns"),
    "output_lost": ("micro-turns of output that nobody read", "output_lost"),
    "interrupts": ("interruptions", "interrupts"),
    "rewound": ("interruptions that took unheard output back", "rewound"),
    "delegations": ("requests to the background", "delegations"),
    "summaries": ("summaries in place of a forgotten middle", "summaries"),
    "summaries_failed": ("middles forgotten without a summary", "summaries_failed"),
    "background_failed": ("background tasks that raised", "background_failed"),
    "journal_failed": ("journals that raised and are told no more", "journal_failed"),
    "background_microseconds": ("time of background slices", "background_us"),
    "opened": ("sessions opened", "opened"),
    "ended": ("sessions ended, by reason", "ended_"),
    "refused": ("pushes and sessions refused, by status", "refused_"),
    "parked": ("sessions written to a file", "parked"),
    "restored": ("sessions read from a file", "restored"),
}


class Metrics:
    """What one live engine shows; give it to `LiveEngine`.

    registry: a `prometheus_client.CollectorRegistry` for this live engine alone; None takes the
        global one.

    Raises InvalidArgument where it holds those of another, or the package is not installed.
    """

    def __init__(self, registry: Any = None) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise InvalidArgument(
                "Metrics: expected the package prometheus-client, found none; "
                "pip install duplex_engine[metrics]"
            ) from error
        self.registry = prometheus_client.REGISTRY if registry is None else registry
        histogram = prometheus_client.Histogram
        try:
            self._turn_s = histogram(
                "duplex_turn_seconds",
                "what a step took",
                buckets=BUCKETS_S,
                registry=self.registry,
            )
        except ValueError as error:
            raise InvalidArgument(
                "Metrics: expected a registry without the metrics of another live engine, "
                f"found: {error}; give each Metrics a CollectorRegistry of its own"
            ) from error
        self._late_s = histogram(
            "duplex_late_seconds",
            "from when a micro-turn was due until its step began",
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self._live: LiveEngine | None = None
        self.registry.register(self)

    def watch(self, live: LiveEngine) -> None:
        """Counts are read from this live engine."""
        self._live = live

    def observe(self, turn: MicroTurn, late_us: int) -> None:
        """Notes one micro-turn."""
        self._turn_s.observe(turn.timing.total_us / 1e6)
        self._late_s.observe(late_us / 1e6)

    def collect(self) -> Iterator[Any]:
        """What Prometheus reads."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        live = self._live
        if live is None:
            return
        with live._lock:
            counts = dict(live.counters)
            sessions = list(live._sessions.values())
            n_tasks, n_parked = len(live._background), live._leases.n_parked
        for name, (text, key) in COUNTERS.items():
            if not key.endswith("_"):
                yield CounterMetricFamily(f"duplex_{name}", text, value=counts.get(key, 0))
                continue
            family = CounterMetricFamily(f"duplex_{name}", text, labels=["kind"])
            for counted, n in counts.items():
                if counted.startswith(key):
                    family.add_metric([counted.removeprefix(key)], n)
            yield family
        stats = live.engine.stats
        gauges = {
            "sessions": ("sessions being run", sum(s.attached for s in sessions)),
            "detached": ("sessions whose client is away", sum(not s.attached for s in sessions)),
            "parked_files": ("sessions in files", n_parked),
            "background_tasks": ("background tasks", n_tasks),
            "pages_used": ("pages of memory in use", stats["pages_used"]),
            "pages_promised": ("pages promised to sessions", stats["pages_promised"]),
            "pages_total": ("pages of memory", stats["pages_total"]),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"duplex_{name}", text, value=value)
