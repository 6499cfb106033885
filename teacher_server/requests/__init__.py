"""The handling of a request between the gRPC port and the engine.

The life of a `StreamKV` request:

1. `connection_limits.py` limits what callers can use before they are authenticated: connections, calls, and the
   requests of the health and reflection services.
2. `authentication.py` checks the caller's token. `call_interceptor.py` calls it before the request is read, and later
   turns every error into a gRPC status, a log line and metrics.
3. `service.py` counts the open stream against `max_streams`, starts the deadline `max_request_seconds`, and reads the
   request's bytes.
4. `request_size.py` counts the entries and characters of the request on its bytes, before anything is built from them.
5. `request_parsing.py` parses the request, checks its plan and its samples against the teacher, and tokenizes the
   samples, all in the tokenizer's thread.
6. `sample_queue.py` admits the samples, all or none, and batches them with other callers' samples.
7. `scheduler.py` runs each batch in the engine's thread; the engine executes each sample's plan layer by layer.
8. `answer_stream.py` turns each layer into frames, and `service.py` sends them. Sent bytes free the stream's window, so
   that the queue can make more of its samples ready.

`Generate` has one more pass through steps 6 and 7: `generation.py` first queues the prompts, from which the engine
generates text, and then queues the completed texts as samples.
"""
