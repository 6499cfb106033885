"""The Prometheus metrics of a teacher server. Every server has its own registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.process_collector import ProcessCollector

# Without the creation time of every counter, half as many series are scraped.
disable_created_metrics()

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = tuple(4.0**exponent for exponent in range(1, 11))


class Metrics:
    """The server's counters, gauges and histograms. Names carry their unit."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests_total", "Finished calls.", "method", "code")
        self.request_tokens = self._counter(
            "request_tokens_total",
            "Tokens of the samples of finished calls, whether or not they ran.",
            "method",
            "code",
        )
        self.samples = self._counter("samples_total", "Finished samples, by their own status.", "status")
        self.tokens = self._counter("tokens_total", "Tokens that went through the model, without padding.")
        self.cached_tokens = self._counter("cached_tokens_total", "Tokens that the engine found in its prefix cache.")
        self.generated_tokens = self._counter("written_tokens_total", "Tokens that the teacher generated (Generate).")
        self.sent_bytes = self._counter("sent_bytes_total", "Bytes of frames sent, headers included.", "codec")
        self.model_seconds = self._counter("prefill_seconds_total", "Time batches spent in the model.")
        self.generation_seconds = self._counter("writing_seconds_total", "Time batches spent generating (Generate).")
        self.encode_seconds = self._counter("encode_seconds_total", "Time batches spent selecting, encoding, copying.")
        self.engine_errors = self._counter("engine_errors_total", "Batches on which the engine failed.")
        self.grpc_crashes = self._counter(
            "grpc_crashes_total", "Crashes of the gRPC server, each followed by a restart."
        )
        # The value is always 1; queries join its labels to other series of the same instance.
        self.teacher = self._gauge(
            "teacher_info",
            "The teacher's name, model, engine and dtype, as labels.",
            "teacher",
            "model",
            "engine",
            "dtype",
        )
        self.ready = self._gauge("ready", "1 while the server accepts requests, else 0.")
        self.streams = self._gauge("open_streams", "StreamKV and Generate calls in progress.")
        self.streams_limit = self._gauge("open_streams_limit", "Limit of StreamKV and Generate calls in progress.")
        self.queued_samples = self._gauge("queued_samples", "Samples that wait for the engine.")
        self.queued_tokens = self._gauge(
            "queued_tokens", "Tokens of the samples that wait for the engine or run in it."
        )
        self.queued_tokens_limit = self._gauge("queued_tokens_limit", "Limit of queued tokens.")
        self.queue_wait = self._histogram("queue_wait_seconds", "Time that a sample waits for the engine.", SECONDS)
        self.first_frame = self._histogram(
            "first_frame_seconds", "Time from a call's start to its first frame.", SECONDS, "method"
        )
        self.duration = self._histogram(
            "request_seconds", "Duration of StreamKV and Generate calls.", SECONDS, "method"
        )
        self.batch_samples = self._histogram("batch_samples", "Samples per batch.", SIZES)
        self.batch_tokens = self._histogram("batch_tokens", "Tokens per batch, without padding.", TOKENS)

    def render(self) -> bytes:
        """Render in the text exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="kvdistill", registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="kvdistill", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="kvdistill", registry=self.registry, buckets=buckets)
