// A client of TeacherKV that knows only docs/protocol.md: `node client.mjs HOST:PORT PROTO < request.json`.
// It checks every frame and prints the teacher and the decoded samples as JSON.
import { readFileSync } from "node:fs";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";
import { decode } from "@msgpack/msgpack";
import { createXXHash3 } from "hash-wasm";

const [endpoint, protoFile] = process.argv.slice(2);
const definition = protoLoader.loadSync(protoFile, { keepCase: true, longs: String, defaults: true });
const { TeacherKV } = grpc.loadPackageDefinition(definition).kvcache.v1;
const client = new TeacherKV(endpoint, grpc.credentials.createInsecure());
const request = JSON.parse(readFileSync(0, "utf8"));
const hasher = await createXXHash3();

const xxh3 = (...pieces) => {
  hasher.init();
  for (const piece of pieces) hasher.update(piece);
  return BigInt(`0x${hasher.digest("hex")}`);
};
const check = (good, problem) => {
  if (!good) throw new Error(problem);
};
// Typed arrays need aligned memory, which a slice of a frame does not have.
const copied = (bytes) => bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
const arrays = {
  int8: (bytes) => new Int8Array(copied(bytes)),
  int32: (bytes) => new Int32Array(copied(bytes)),
  float32: (bytes) => new Float32Array(copied(bytes)),
  bfloat16: (bytes) => new Float32Array(new Uint32Array(new Uint16Array(copied(bytes))).map((half) => half << 16).buffer),
};
const width = { int8: 1, bfloat16: 2, int32: 4, float32: 4 };

function decodeInt8(codes, scale, [heads, slots, dim], kind) {
  const group = request.plan.codec.group_size ?? 64;
  const values = new Float32Array(codes.length);
  for (let h = 0; h < heads; h++)
    for (let m = 0; m < slots; m++)
      for (let d = 0; d < dim; d++) {
        const at = (h * slots + m) * dim + d;
        const k = (h * Math.ceil(slots / group) + Math.floor(m / group)) * dim + d;
        const v = (h * slots + m) * Math.ceil(dim / group) + Math.floor(d / group);
        values[at] = codes[at] * scale[kind === "k" ? k : v];
      }
  return values;
}

function decodeRow(record, row) {
  const parts = {};
  let at = 0;
  for (const [name, dtype, shape] of record.parts) {
    const size = width[dtype] * shape.reduce((a, b) => a * b, 1);
    parts[name] = { values: arrays[dtype](row.subarray(at, at + size)), shape };
    at += size;
  }
  check(at === row.length, `a row of layer ${record.layer} has ${row.length} bytes, its parts ${at}`);
  const decoded = (kind) =>
    record.codec === "int8"
      ? decodeInt8(parts[`${kind}.codes`].values, parts[`${kind}.scale`].values, parts[`${kind}.codes`].shape, kind)
      : parts[`${kind}.data`].values;
  const base64 = (kind) => Buffer.from(decoded(kind).buffer).toString("base64");
  return { layer: record.layer, positions: [...parts.positions.values], k: base64("k"), v: base64("v") };
}

const samples = new Map();
const incomplete = new Map();

function take(record, body) {
  if (record.kind === "sample") {
    const numbers = [...arrays.int32(body)];
    const [tokens, byteEnds] = [numbers.slice(0, record.tokens), numbers.slice(record.tokens)];
    samples.set(record.index, { id: record.id, key: record.key, tokens, byteEnds, layers: [], sent: [body] });
  } else if (record.kind === "layer") {
    const size = body.length / record.indices.length;
    record.indices.forEach((index, row) => {
      const bytes = body.subarray(row * size, (row + 1) * size);
      samples.get(index).layers.push(decodeRow(record, bytes));
      samples.get(index).sent.push(bytes);
    });
  } else if (record.kind === "sample_end") {
    check(record.status === "ok", `sample ${record.index}: ${record.status}: ${record.message}`);
    const sample = samples.get(record.index);
    check(sample.key === record.key, `sample ${record.index} ends with another key`);
    check(xxh3(...sample.sent) === BigInt(record.digest), `sample ${record.index} does not match its digest`);
    delete sample.sent;
  } else check(record.kind === "end" && record.samples === request.samples.length, `unexpected ${record.kind}`);
}

let frames = 0, pieces = 0, ended = false;

function read(frame) {
  check(xxh3(frame.header) === BigInt(frame.header_xxh3), `frame ${frames}: the header does not match its hash`);
  const header = decode(frame.header, { useBigInt64: true });
  check(header.v === 1 && header.request === request.request_id && header.seq === frames, `frame ${frames}: its header`);
  check(xxh3(frame.body) === BigInt(header.xxh3), `frame ${frames}: the body does not match its hash`);
  frames += 1;
  let at = 0;
  for (const record of header.records) {
    const body = frame.body.subarray(at, (at += record.bytes ?? 0));
    const begun = record.kind === "more" ? incomplete.get(record.index) : { record, got: [] };
    begun.got.push(body);
    pieces += record.kind === "more";
    const whole = Buffer.concat(begun.got);
    if (whole.length < (begun.record.size ?? 0)) incomplete.set(record.index, begun);
    else take(begun.record, whole);
    ended = record.kind === "end";
  }
  check(at === frame.body.length, `frame ${frames}: its records do not fill the body`);
}

client.Describe({}, (error, info) => {
  if (error) throw error;
  const call = client.StreamKV(request);
  call.on("data", read);
  call.on("end", () => {
    check(ended, "the stream stopped without an end record");
    console.log(JSON.stringify({ info, frames, pieces, samples: [...samples.values()] }));
    client.close();
  });
});
