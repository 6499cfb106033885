"""The Prometheus metrics of a teacher server. Every server has its own registry."""

from __future__ import annotations

from functools import partial

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
        counter = partial(Counter, namespace="kvdistill", registry=self.registry)
        gauge = partial(Gauge, namespace="kvdistill", registry=self.registry)
        histogram = partial(Histogram, namespace="kvdistill", registry=self.registry)
        self.requests = counter("requests_total", "Finished calls.", ("method", "code"))
        tokens_help = "Tokens of the samples of finished calls, whether or not they ran."
        self.request_tokens = counter("request_tokens_total", tokens_help, ("method", "code"))
        self.samples = counter("samples_total", "Finished samples, by their own status.", ("status",))
        self.tokens = counter("tokens_total", "Tokens that went through the model, without padding.")
        padding_help = "Padding that went through the model beside these tokens."
        self.padding_tokens = counter("padding_tokens_total", padding_help)
        self.cached_tokens = counter("cached_tokens_total", "Tokens that the engine found in its prefix cache.")
        self.cache_hits = counter("cache_hits_total", "Samples that were sent without the model (cache_bytes).")
        self.cache_misses = counter("cache_misses_total", "Samples that were computed, and not found (cache_bytes).")
        self.cache_bytes = gauge("cache_bytes", "Memory of the results of recent samples.")
        self.generated_tokens = counter("written_tokens_total", "Tokens that the teacher generated (Generate).")
        self.sent_bytes = counter("sent_bytes_total", "Bytes of frames sent, headers included.", ("codec",))
        shared_help = "Bytes of frames sent through shared memory; sent_bytes_total has them too."
        self.shared_bytes = counter("shared_bytes_total", shared_help)
        self.shared_memory_bytes = gauge("shared_memory_bytes", "Memory shared with clients on this machine.")
        self.model_seconds = counter("prefill_seconds_total", "Time batches spent in the model.")
        self.generation_seconds = counter("writing_seconds_total", "Time batches spent generating (Generate).")
        self.encode_seconds = counter("encode_seconds_total", "Time batches spent selecting, encoding, copying.")
        self.engine_errors = counter("engine_errors_total", "Batches on which the engine failed.")
        self.grpc_crashes = counter("grpc_crashes_total", "Crashes of the gRPC server, each followed by a restart.")
        # The value is always 1; queries join its labels to other series of the same instance.
        self.teacher = gauge("teacher_info", "The teacher, as labels.", ("teacher", "model", "engine", "dtype"))
        self.ready = gauge("ready", "1 while the server accepts requests, else 0.")
        self.streams = gauge("open_streams", "StreamKV and Generate calls in progress.")
        self.streams_limit = gauge("open_streams_limit", "Limit of StreamKV and Generate calls in progress.")
        self.queued_samples = gauge("queued_samples", "Samples that wait for the engine.")
        self.queued_tokens = gauge("queued_tokens", "Tokens of the samples that wait for the engine or run in it.")
        self.queued_tokens_limit = gauge("queued_tokens_limit", "Limit of queued tokens.")
        self.queue_wait = histogram("queue_wait_seconds", "Time that a sample waits for the engine.", buckets=SECONDS)
        first_help = "Time from a call's start to its first frame."
        self.first_frame = histogram("first_frame_seconds", first_help, ("method",), buckets=SECONDS)
        duration_help = "Duration of StreamKV and Generate calls."
        self.duration = histogram("request_seconds", duration_help, ("method",), buckets=SECONDS)
        self.batch_samples = histogram("batch_samples", "Samples per batch.", buckets=SIZES)
        self.batch_tokens = histogram("batch_tokens", "Tokens per batch, without padding.", buckets=TOKENS)

    def render(self) -> bytes:
        """Render in the text exposition format."""
        return generate_latest(self.registry)
